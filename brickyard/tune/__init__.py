"""Tuners and heads: what is trained on a base."""
