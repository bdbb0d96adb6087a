"""``python -m ecore``: the command line without its script."""

import sys

from ecore.cli import main

if __name__ == "__main__":
    sys.exit(main())
