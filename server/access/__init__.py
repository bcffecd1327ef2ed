"""Who may do what, how much of it, and how much they did: keys, limits, usage."""
