"""Which rows are trained on and which are held out.

`split.split_rows` puts rows on the sides, `mixture.mixture_of` reads the weights of sources or
tasks, and `split.limit_train` keeps the train rows that both leave (`split.Split`).
"""
