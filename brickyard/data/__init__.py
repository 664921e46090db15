"""Steps over the rows of a data set: what to keep, in which mixture, in which order."""

from brickyard.core.verb import make_callable

make_callable(__name__)
