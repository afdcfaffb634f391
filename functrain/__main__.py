"""`python -m functrain` is `functrain`."""

import sys

from functrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
