"""Tuners and heads: what is trained on a base."""

from brickyard.core.verb import make_callable

make_callable(__name__)
