"""Messages to token ids: the one renderer, and the tokenizer backends behind it."""
