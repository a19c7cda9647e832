"""`python -m weft.cli` is `weft`."""

import sys

from weft.cli import main

if __name__ == "__main__":  # workers of loaders and spawned processes import this file too
    sys.exit(main())
