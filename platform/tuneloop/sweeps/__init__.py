"""Sweeps: the same loop over a grid of dotted keys, and what more data or a larger model buys."""
