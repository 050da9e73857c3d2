"""`python -m executor plan.json --steps N -o run.json`, as torchrun starts it on every rank."""

from __future__ import annotations

import sys

from executor.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
