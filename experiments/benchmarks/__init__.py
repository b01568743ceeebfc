"""One short script a question; each prints a ratio measured in one process."""
