"""Sweeps: the same loop over values of dotted keys, and what more data or a larger model buys."""
