"""Train rows that repeat the test split or an evaluation file."""
