"""Measures latency and throughput of any server with OpenAI's API, as its clients see them."""
