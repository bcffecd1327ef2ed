"""HTTP: OpenAI routes, variant routes, operations."""
