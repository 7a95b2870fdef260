"""The generator beside others: each in an environment of its own, on the same rows, with one thread."""
