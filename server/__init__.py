"""The server: an OpenAI-compatible API and the engine that batches over variants."""
