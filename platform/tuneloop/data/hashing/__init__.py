"""Compiled kernels and hashes that rows are compared by."""
