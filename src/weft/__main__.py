"""`python -m weft` is `weft`: for where the environment's programs are not on the path."""

import sys

from weft.cli import main

if __name__ == "__main__":  # workers of loaders and spawned processes import this file too
    sys.exit(main())
