#!/usr/bin/env python
"""Run a recipe on a Ray cluster; see `launch/ray_job.py --help`."""

import sys

from dist_sft.ray_job import main

if __name__ == "__main__":
    sys.exit(main())
