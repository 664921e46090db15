"""Merges: inputs, the engine's call, the table of scores, and what stays on disk."""
