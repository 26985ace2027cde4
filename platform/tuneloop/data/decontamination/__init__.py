"""Removing train rows that repeat the test split, the validation split or an evaluation file.

`held_out.read_evaluations` reads the files; `decontaminate.decontaminate` finds and removes the
train rows, and says what it found (`Contamination`). Nothing else is called from outside.
"""
