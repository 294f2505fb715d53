#!/usr/bin/env python
"""Submit a run to SLURM; see `launch/slurm.py --help`."""

import sys

from dist_sft.slurm import main

if __name__ == "__main__":
    sys.exit(main())
