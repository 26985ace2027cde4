"""tuneloop: finetune a small language model on your task, and prove whether it helped."""

__version__ = "0.1.0"
