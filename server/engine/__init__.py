"""The engine: delta-aware layers, the bank of resident variants, batching over variants, sampling."""
