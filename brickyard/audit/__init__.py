"""Methods that look at a model and its changes and report; they train nothing."""

from brickyard.core.verb import make_callable

make_callable(__name__)
