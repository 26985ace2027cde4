"""Exact and near duplicates, and rows that ask the same but answer differently."""
