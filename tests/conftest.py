"""What holds for all tests."""

import signal

# A shell ignores Ctrl-C for what it runs in the background, and nohup a closed terminal; what the
# tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
