"""The training loop."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import lora
from pipeline.batches import Batches
from pipeline.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from pipeline.config import Train
from pipeline.diffusion import Objective, mse_per_sample
from pipeline.errors import UserError
from pipeline.families.base import Family
from pipeline.files import write_text
from pipeline.optim import adamw, learning_rate_at
from pipeline.progress import progress, say
from pipeline.randomness import torch_seed

_READ_EVERY = 10  # steps between looks at the loss: each look waits for the device

CURVE_COLUMNS = ("step", "loss", "learning_rate", "grad_norm")
Row = dict[str, float]
Observer = Callable[[list[Row]], None]


@dataclass(frozen=True)
class Hardware:
    """How the machine is used; nothing here changes what is computed, but for the order of float sums."""

    device: torch.device
    micro_batch: int | None  # samples per forward pass; None: the whole batch
    checkpoint_every: int  # steps
    keep_checkpoints: int


def train(
    denoiser: nn.Module,
    family: Family,
    objective: Objective,
    batches: Batches,
    settings: Train,
    hardware: Hardware,
    work: Path,
    stop: Callable[[], bool],
    check_stop: Callable[[str], None],
    observe: Observer,
) -> dict[str, Tensor]:
    """Train the adapter that is injected in `denoiser`, going on from the newest checkpoint in `work`.

    Args:
        denoiser: frozen base with LoRA layers, on the CPU.
        batches: the data; order and draws are functions of (seed, step, position).
        work: folder of checkpoints and of the curve so far.
        stop: asked between steps; when true a checkpoint is saved and `check_stop` raises.
        check_stop: raises `Interrupted`, given what was saved.
        observe: told of every few steps' losses and rates.

    Returns:
        The adapter's weights, float32, on the CPU.

    Raises:
        UserError: the loss or the gradient is not finite; the checkpoints so far stay.
    """
    from accelerate import Accelerator

    parameters = lora.trainable_parameters(denoiser)
    optimiser = adamw(parameters, settings.learning_rate, settings.weight_decay)
    accelerator = Accelerator(cpu=hardware.device.type == "cpu", mixed_precision=settings.mixed_precision)
    model, optimiser = accelerator.prepare(denoiser.train(), optimiser)
    first = _resume(work, denoiser, optimiser)
    curve = Curve(work / "curve.jsonl", first)
    pending: list[tuple[int, Tensor, Tensor]] = []  # (step, loss, gradient norm), still on the device

    def settle() -> None:
        rows = _read(pending, batches, settings)
        pending.clear()
        curve.append(rows)
        observe(rows)

    def save(step: int) -> None:
        settle()  # raises if a loss was not finite: a checkpoint is always a good one
        adapter = {k: v.detach().cpu().clone() for k, v in lora.state(denoiser).items()}
        checkpoint = Checkpoint(step, adapter, optimiser.state_dict()["state"])
        save_checkpoint(work / "checkpoints", checkpoint, hardware.keep_checkpoints)

    with progress("training", settings.steps, "steps", done=first) as bar:
        for step in range(first, settings.steps):
            if stop():
                save(step)
                check_stop(f"step {step} of {settings.steps} is saved")
            torch.manual_seed(torch_seed(settings.seed, step + 1))  # what LoRA dropout draws from
            rate = learning_rate_at(step, settings.learning_rate, settings.schedule, settings.steps, settings.warmup_steps)
            for group in optimiser.param_groups:
                group["lr"] = rate
            members = batches.members(step)
            micro = hardware.micro_batch or len(members)
            loss = torch.zeros((), device=accelerator.device)
            for start in range(0, len(members), micro):
                part = _loss_sum(model, family, objective, batches, step, start, start + micro, accelerator.device)
                part = part / len(members)
                accelerator.backward(part)
                loss += part.detach()
            norm = accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimiser.step()
            optimiser.zero_grad()
            pending.append((step, loss, norm.detach()))
            if (step + 1) % hardware.checkpoint_every == 0 or step + 1 == settings.steps:
                save(step + 1)
            elif len(pending) == _READ_EVERY:
                settle()
            bar.advance(note=f"loss {curve.smoothed:.4f}, {_memory_mib():.0f} MiB" if curve.rows else "")
    return {k: v.detach().cpu().clone() for k, v in lora.state(denoiser).items()}


def _loss_sum(
    model: nn.Module,
    family: Family,
    objective: Objective,
    batches: Batches,
    step: int,
    start: int,
    stop: int,
    device: torch.device,
) -> Tensor:
    """The summed loss of positions [start, stop) of a step's batch: a scalar with gradients."""
    batch = batches.batch(step, start, stop)
    x_0, noise = batch.x_0.to(device), batch.noise.to(device)
    t = objective.timesteps(batch.u).to(device)
    text = {part: values.to(device) for part, values in batch.text.items()}
    x_t = objective.noised(x_0, noise, t)
    dtype = next(model.parameters()).dtype
    predicted = family.predict(
        model,
        x_t.to(dtype),
        t,
        {part: values.to(dtype) for part, values in text.items()},
        batch.geometry.to(device),
    )
    return mse_per_sample(predicted, objective.target(x_0, noise, t)).sum()


def _resume(work: Path, denoiser: nn.Module, optimiser: Any) -> int:
    """Load the newest checkpoint; returns the number of steps done."""
    checkpoint = latest_checkpoint(work / "checkpoints")
    if checkpoint is None:
        return 0
    lora.load_state(denoiser, checkpoint.adapter)
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": checkpoint.optimiser, "param_groups": groups})
    say(f"  going on from the checkpoint at step {checkpoint.step}")
    return checkpoint.step


def _read(pending: list[tuple[int, Tensor, Tensor]], batches: Batches, settings: Train) -> list[Row]:
    """Fetch losses and norms from the device, all at once."""
    if not pending:
        return []
    values = torch.stack([torch.stack([loss.float(), norm.float()]) for _, loss, norm in pending]).tolist()
    rows = []
    for (step, _, _), (loss, norm) in zip(pending, values, strict=True):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            names = "\n".join(f"  {s.id}: {s.caption[:100]}" for s in batches.members(step))
            raise UserError(
                f"training step {step}: loss {loss}, gradient norm {norm}: not finite. Its samples:\n{names}\n"
                "The last good checkpoint is kept. Lower train.learning_rate, raise train.warmup_steps, or set "
                f"train.mixed_precision to no (it is {settings.mixed_precision})"
            )
        rate = learning_rate_at(step, settings.learning_rate, settings.schedule, settings.steps, settings.warmup_steps)
        rows.append({"step": step, "loss": loss, "learning_rate": rate, "grad_norm": norm})
    return rows


class Curve:
    """The training curve in `work`, one JSON line a step; a resumed run cuts what lies beyond its checkpoint."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path = path
        old = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.rows: list[Row] = [row for row in (_parsed(line) for line in old) if row and row["step"] < steps]
        write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.smoothed = sum(r["loss"] for r in self.rows[-50:]) / max(1, len(self.rows[-50:]))

    def append(self, rows: list[Row]) -> None:
        """Add steps, on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows
        recent = self.rows[-50:]
        self.smoothed = sum(r["loss"] for r in recent) / len(recent)


def curve_csv(rows: list[Row]) -> str:
    """The curve as the CSV that DVC plots; a pure function of the rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CURVE_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "step": int(row["step"])} for row in rows)
    return text.getvalue()


def read_curve(work: Path) -> list[Row]:
    """All rows of a finished or unfinished run."""
    path = work / "curve.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _parsed(line: str) -> Row | None:
    try:
        row: Row = json.loads(line)
    except json.JSONDecodeError:
        return None  # the last line of a run that was killed while writing it
    return row


def _memory_mib() -> float:
    """Peak memory of this process, or of the GPU where there is one, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
