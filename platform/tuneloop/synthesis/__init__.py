"""Training rows written by a larger model from the user's documents."""
