"""What rows are compared by: word shingles, MinHash bands, Bloom filters.

The other rooms call `columns` (text columns, without numba) and `signatures`; nothing but
`signatures` calls the compiled `kernels`.
"""
