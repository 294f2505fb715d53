"""torchrun that heeds no signal and ends with the node that started it.

Schedulers signal every process of a job, often more than once. torchrun passes the first signal on
and abandons its ranks at the second; its ranks would be told twice. Here the node alone hears
signals, and tells ranks in a file (`stopping`).
"""

from __future__ import annotations

import signal

from dist_sft import process

IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)


def main() -> None:
    """Run torchrun with this process's arguments."""
    process.die_with_parent()
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    from torch.distributed.run import main as torchrun

    torchrun()


if __name__ == "__main__":
    main()
