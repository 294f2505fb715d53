#!/usr/bin/env python
"""Run a recipe on a Ray cluster; see `launch/ray_job.py --help`."""

import sys

from start import start

if __name__ == "__main__":
    sys.exit(start("ray_job"))
