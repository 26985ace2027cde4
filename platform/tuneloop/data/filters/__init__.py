"""What is mended in a row, and why a row is dropped."""
