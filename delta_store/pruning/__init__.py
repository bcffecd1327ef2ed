"""Delta-parameter pruning: which of a delta's numbers are kept."""
