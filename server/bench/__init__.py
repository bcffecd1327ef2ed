"""``deltaserve bench``: latency of any OpenAI server under a mix of variants."""
