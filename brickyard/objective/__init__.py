"""Objectives: what is minimised, on hidden states and the output layer."""
