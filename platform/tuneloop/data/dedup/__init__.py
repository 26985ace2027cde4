"""Exact and near duplicates, and rows with the same prompt and different answers.

`distributed.resolve_duplicates` says which rows repeat which (`minhash.Duplicates`);
`conflicts.find_conflicts` lists contradictions. Nothing else is called from outside.
"""
