"""A process that loads DVC and then waits at the pipe `sys.argv[1]` to be told what to do; `pipeline.dvc_process.Waiting` starts it.

Run as a file, with `python -P`: the project's folder may hold packages called `pipeline` or `dvc`.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Load, wait, work."""
    try:
        import dvc.cli.parser
        import dvc.repo.reproduce  # noqa: F401  # what `dvc repro` needs
        from dvc.cli import main as work

        with open(int(sys.argv[1]), encoding="utf-8") as pipe:
            told = pipe.read()
    except KeyboardInterrupt:  # which the one who would tell us has got too
        os._exit(130)
    if told:  # else they are gone
        order = json.loads(told)
        os.environ.update(order["environment"])
        sys.argv = ["dvc", *order["arguments"]]
        sys.exit(work(order["arguments"]))


if __name__ == "__main__":
    main()
