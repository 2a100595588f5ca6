"""torchrun without its pages of report: the process that failed has said what is wrong, and is to have the last word."""

from __future__ import annotations

import logging
import sys

from pipeline.launch import leave_with_parent


def main(arguments: list[str]) -> None:
    """As `torchrun` does; exits as the first process that failed did."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    leave_with_parent()
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        run(parse_args(arguments))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # it could not say so itself
            print(f"error: process {rank} was ended by signal {-failure.exitcode}", file=sys.stderr, flush=True)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    except SignalException as signal:
        sys.exit(128 + signal.sigval)


if __name__ == "__main__":
    main(sys.argv[1:])
