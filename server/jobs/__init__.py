"""Compression jobs: a fine-tuned checkpoint becomes a variant, in a process of its own, while the server serves."""
