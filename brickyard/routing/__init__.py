"""Routed models: a dense part, experts beside it and a router, as one folder."""
