"""Optimisers and steps: how what a tuner trains is updated, and in what arithmetic."""
