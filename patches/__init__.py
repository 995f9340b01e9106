"""Runtime patches: one a file, each with its version guard, its reason and what would retire it (README.md)."""
