"""Which variants exist and which version each name points at."""
