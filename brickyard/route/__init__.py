"""Methods that keep several fine-tuned models of one base apart and choose among them, prompt by prompt."""

from brickyard.core.verb import make_callable

make_callable(__name__)
