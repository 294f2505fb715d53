"""What holds for all tests."""

import signal

# A shell ignores Ctrl-C for what it runs in the background, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
