"""What rows are compared by: their contents, word shingles, MinHash bands, Bloom filters.

The other rooms call `content` (what a row says, and its keys), `columns` (text columns, without
numba) and `signatures`; only `signatures` and the room `dedup` use the compiled `kernels`.
"""
