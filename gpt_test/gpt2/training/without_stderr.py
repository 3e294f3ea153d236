"""The command `gpt2` in a process whose standard error is closed."""

from __future__ import annotations

import os
import sys

from gpt2.cli import main

if __name__ == "__main__":
    os.close(2)
    sys.stderr = None  # type: ignore[assignment]  # as Python sets it
    main()
