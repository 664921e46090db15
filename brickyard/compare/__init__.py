"""Comparisons: plan, run, verdict, report."""

from brickyard.core.verb import make_callable

make_callable(__name__)
