"""What holds for all tests."""

import os
import signal

# The same tests everywhere; `make test-gpu` asks for those that need a GPU. Before torch looks.
if "DIST_SFT_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# A shell ignores Ctrl-C for what it runs in the background, and nohup a closed terminal; what the
# tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
