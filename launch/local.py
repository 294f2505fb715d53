#!/usr/bin/env python
"""Launch a run on this machine; see `launch/local.py --help`."""

import sys

from dist_sft.local import main

if __name__ == "__main__":
    sys.exit(main())
