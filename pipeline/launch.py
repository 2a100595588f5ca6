"""Several processes of one stage, on this machine or on several, each told its place by torchrun or `accelerate launch`."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Runtime
from pipeline.errors import EXIT_INTERRUPTED, Interrupted, UserError

_GRACE = 60.0  # seconds that the processes get to save what they have


@dataclass(frozen=True)
class Processes:
    """Who takes part."""

    here: int  # processes on this machine
    machines: int = 1
    machine_rank: int = 0
    main_address: str | None = None  # host:port, where there are several machines
    accelerate_config: str | None = None  # a file that says all of this instead

    def command(self, module: str, arguments: list[str]) -> list[str]:
        """What starts them."""
        if self.accelerate_config:
            launcher = ["accelerate.commands.launch", "--config_file", self.accelerate_config, "--module"]
            return [sys.executable, "-m", *launcher, module, *arguments]
        # torchrun, which `accelerate launch` uses for GPUs too; on CPUs that would start a single process
        meet = ["--standalone"]
        if self.machines > 1:
            assert self.main_address  # the settings' check
            host, _, port = self.main_address.rpartition(":")
            places = [f"--nnodes={self.machines}", f"--node-rank={self.machine_rank}"]
            meet = [*places, f"--master-addr={host}", f"--master-port={port}"]
        each = [f"--nproc-per-node={self.here}", f"--shutdown-timeout={int(_GRACE) - 5}"]
        return [sys.executable, "-m", "pipeline.quiet_torchrun", *meet, *each, "--module", module, *arguments]


def processes_of(runtime: Runtime) -> Processes | None:
    """Those that `runtime` asks to train; None where it is this process alone.

    Raises:
        UserError: the named Accelerate config is not there.
    """
    config = runtime.accelerate_config
    if config and not Path(config).is_file():
        raise UserError(
            f"runtime.accelerate_config: there is no file {config}: `accelerate config --config_file {config}` writes one"
        )
    if runtime.processes == 1 and runtime.machines == 1 and not config:
        return None
    return Processes(runtime.processes, runtime.machines, runtime.machine_rank, runtime.main_address, config)


def launch(module: str, arguments: list[str], processes: Processes, check_stop: Callable[[], None]) -> None:
    """Run `python -m module arguments` in all of them and wait.

    Raises:
        UserError: one of them failed; its own message stands above.
        Interrupted: from `check_stop`; the processes have been told to save and have left.
    """
    command = processes.command(module, arguments)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", _threads_each(processes.here))}
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
    if process.returncode == EXIT_INTERRUPTED:
        raise Interrupted(
            "one of the processes, or another machine, was told to stop; what is finished is saved: run again to go on"
        )
    if process.returncode:
        raise UserError(
            f"one of the processes failed (exit {process.returncode}): its message stands above; "
            "set runtime.processes to 1 to run in one"
        )


def leave_with_parent() -> None:
    """Get SIGTERM when the process that started this one dies: from the kernel (prctl(2), PR_SET_PDEATHSIG = 1), elsewhere by
    looking. Nothing is to go on training in a work directory that nobody holds any more."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM, 0, 0, 0)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _threads_each(processes: int) -> str:
    return str(max(1, (os.cpu_count() or 1) // processes))
