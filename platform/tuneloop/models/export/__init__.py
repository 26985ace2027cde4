"""A trained model as files anyone can load, and the proof that they answer as it did."""
