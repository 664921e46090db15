"""`python -m brickyard`, as launchers such as torchrun start it."""

import sys

from brickyard.cli import main

if __name__ == "__main__":
    sys.exit(main())
