"""`python -m mor`: the command `mor`, for when its script is not on the path."""

import sys

from mor.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
