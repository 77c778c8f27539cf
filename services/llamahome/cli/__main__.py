"""``python -m llamahome.cli``: the command by the running interpreter, whatever PATH says."""

from __future__ import annotations

import sys

from llamahome.cli import main

if __name__ == "__main__":
    sys.exit(main())
