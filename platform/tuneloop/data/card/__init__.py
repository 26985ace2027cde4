"""The dataset card: what went in, what was removed and why."""
