"""Let `python -m procworker` be the command."""

import sys

from procworker.cli import main

if __name__ == "__main__":
    sys.exit(main())
