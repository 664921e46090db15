"""Methods that combine models fine-tuned from one base into one."""

from brickyard.core.verb import make_callable

make_callable(__name__)
