"""From raw rows to a dataset artifact: read, validate, tokenize, deduplicate, split, describe."""
