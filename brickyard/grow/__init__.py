"""Methods that let a model grow: weights or modules that are not there at first train later."""

from brickyard.core.verb import make_callable

make_callable(__name__)
