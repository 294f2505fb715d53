#!/usr/bin/env python
"""Submit a run to SLURM; see `launch/slurm.py --help`."""

import sys

from start import start

if __name__ == "__main__":
    sys.exit(start("slurm"))
