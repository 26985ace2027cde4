"""Human verdicts: stored once, never edited, and what they say about the arms."""
