"""Rows to token ids and comparison keys, in batches."""
