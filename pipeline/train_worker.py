"""One of several processes that train together: `torchrun -m pipeline.train_worker JOB`.

The stage that started them holds the lock, follows the curve and publishes; the first process of each machine leaves the adapter
in the stage's work directory.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from pipeline.config import Params
from pipeline.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, Interrupted, UserError
from pipeline.files import write_json
from pipeline.launch import leave_with_parent
from pipeline.team import join
from pipeline.train_job import perform

_FIRST_SPEAKS = 3.0  # seconds: where all fail alike, the first one's message ends the others before they repeat it


def write_job(path: Path, params: Params, root: Path, work: Path, fingerprint: str) -> None:
    """Write down what the processes have to do."""
    sections = {name: params.section(name) for name in json.loads(params.model_dump_json(by_alias=True))}
    write_json(path, {"params": sections, "root": str(root), "work": str(work), "fingerprint": fingerprint})


def main(path: Path) -> None:
    """Do this process's part of a training."""
    asked = []

    def leave(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    leave_with_parent()
    job = json.loads(path.read_text(encoding="utf-8"))
    params, work = Params.model_validate_json(json.dumps(job["params"])), Path(job["work"])
    team = join()

    def check_stop(saved: str) -> None:
        raise Interrupted(saved)

    try:
        root, mark = Path(job["root"]), job["fingerprint"]
        trained = perform(params, root, work, lambda: bool(asked), check_stop, lambda rows: None, team, mark)
    except Interrupted:
        sys.exit(EXIT_INTERRUPTED)
    except UserError as error:
        patience = time.monotonic() + _FIRST_SPEAKS * (team.rank > 0)
        while time.monotonic() < patience:
            if asked:
                sys.exit(EXIT_USER_ERROR)
            time.sleep(0.05)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    if team.leads:
        trained.write(work)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
