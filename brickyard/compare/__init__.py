"""Comparisons: plan, run, verdict, report."""
