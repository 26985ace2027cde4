"""Train, validation and test rows, and the shares of a mixture."""
