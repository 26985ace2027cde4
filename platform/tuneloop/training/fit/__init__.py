"""Will it fit: memory, time, and what is refused before a worker starts."""
