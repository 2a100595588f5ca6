"""Several processes of one stage, each told its place by torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from pipeline.errors import UserError

_GRACE = 60.0  # seconds that the processes get to save what they have


def launch(module: str, arguments: list[str], processes: int, check_stop: Callable[[], None]) -> None:
    """Run `python -m module arguments` in that many processes and wait for them.

    Raises:
        UserError: one of them failed; its own message stands above.
        Interrupted: from `check_stop`; the processes have been told to save and have left.
    """
    # torchrun, which `accelerate launch` uses for GPUs too; on CPUs that would start a single process
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["--module", module, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", _threads_each(processes))}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        while process.poll() is None:
            check_stop()
            time.sleep(0.2)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise UserError(
            f"one of {processes} processes failed (exit {process.returncode}): its message stands above; "
            "set runtime.processes to 1 to run in one"
        )


def _threads_each(processes: int) -> str:
    return str(max(1, (os.cpu_count() or 1) // processes))
