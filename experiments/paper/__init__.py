"""The paper: its numbers, what reproduces each of them, and measurements of our own beside it."""
