#!/usr/bin/env python
"""Launch a run on this machine; see `launch/local.py --help`."""

import sys

from start import start

if __name__ == "__main__":
    sys.exit(start("local"))
