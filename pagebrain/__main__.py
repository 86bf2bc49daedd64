"""``python -m pagebrain`` is the command ``pagebrain``."""

import sys

from pagebrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
