"""Base models, chat rendering, export and parity, and the client that asks a served model."""
