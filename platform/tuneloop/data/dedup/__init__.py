"""Exact and near duplicates, and rows with the same prompt and different answers.

`deduplicate.deduplicate` removes rows and says which repeat which (`minhash.Duplicates`);
`conflicts.find_conflicts` lists contradictions (`Conflicts`). Nothing else is called from outside.
"""
