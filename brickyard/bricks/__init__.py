"""The bricks of a base: what is installed, what it costs, improves and damages."""
