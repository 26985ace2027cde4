"""Which rows are trained on and which are held out.

`assign.split_ledger` chooses the sides (`split.Split`), and `assign.assign_sides` keeps the train
rows that decontamination, the weights (`mixture`) and `num_train_examples` leave. From outside come
also `split.is_stratified` and `mixture.find_task_ids`.
"""
