"""`python -m scaledreamer` is the command `scaledreamer`."""

import sys

from scaledreamer.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
