"""Shrinking: a smaller model that keeps what a larger one can do."""

from brickyard.core.verb import make_callable

make_callable(__name__)
