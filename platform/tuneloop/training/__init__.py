"""Finetuning: rows to batches, a DeepSpeed engine on every Ray Train worker, export, model card."""
