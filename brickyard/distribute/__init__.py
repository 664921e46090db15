"""Training on several machines: what travels between them, and how they stay the same."""
