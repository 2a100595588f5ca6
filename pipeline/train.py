"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import lora
from pipeline.average import final_weights, update_average
from pipeline.batches import Batches
from pipeline.checkpoint import Checkpoint, best_so_far, latest_checkpoint, save_best, save_checkpoint
from pipeline.config import Train
from pipeline.curve import Curve, Row, read_curve, read_rows
from pipeline.device import arrange, attention_kernel, full_memory_is_the_users, peak_mib, same_bytes_every_time
from pipeline.diffusion import Objective, logit_normal, on_device, power, within
from pipeline.errors import UserError
from pipeline.evaluate.losses import Questions, mean_loss, spread
from pipeline.families.base import Family
from pipeline.live_text import LiveText
from pipeline.losses import Huber, Loss, sample_losses
from pipeline.noise import NoiseShape
from pipeline.optim import build_optimiser, learning_rate_at, scaled_learning_rate
from pipeline.progress import progress, say
from pipeline.randomness import torch_seed
from pipeline.safetensors_file import read_safetensors, write_safetensors
from pipeline.team import ALONE, Team

__all__ = ["Hardware", "read_curve", "train"]

SNAPSHOTS = "snapshots"  # folder in the work directory: adapters that are kept on the way
_READ_EVERY = 10  # steps between looks at the loss: each look waits for the device
_HELD_OUT_SAMPLES, _HELD_OUT_TIMESTEPS = 64, 8  # what a look at the held-out loss costs at most: 512 forward passes
_LEAST_SCALE = 2.0**-10  # a float16 loss scale below this means that no step succeeds any more

Observer = Callable[[list[Row]], None]


@dataclass(frozen=True)
class Hardware:
    """How the machine is used; nothing here changes what is computed, but for rounding and the order of float sums."""

    device: torch.device
    micro_batch: int | None  # samples per forward pass; None: the whole share of a batch
    checkpoint_every: int  # steps
    keep_checkpoints: int
    gradient_checkpointing: bool = False
    compile: bool = False
    channels_last: bool = False
    attention: str = "auto"
    deterministic: bool = True
    preview_every: int | None = None  # steps


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
    live: LiveText | None = None,
    team: Team = ALONE,
    preview: Callable[[int], None] = lambda step: None,
    measured: Objective | None = None,
) -> dict[str, Tensor]:
    """Train the adapter that is injected in `denoiser`, going on from the newest checkpoint in `work`.

    Args:
        denoiser: frozen base with LoRA layers, on the CPU.
        batches: the data; order and draws are functions of (seed, step, position).
        work: folder of checkpoints and of the curves so far.
        stop: asked between steps; when true a checkpoint is saved and `check_stop` raises.
        check_stop: raises `Interrupted`, given what was saved.
        observe: told of every few steps' losses and rates, and of held-out losses.
        live: text encoders that learn too, on the device; None: the stored embeddings are read.
        team: this process's place among those that train together.
        measured: what the held-out loss asks, where that is not what is trained on; as validate asks it.
        preview: draws pictures with the adapter as it is, in the first process, every `hardware.preview_every` steps.

    Returns:
        The adapter's weights as `lora.joint_state` names them, float32, on the CPU: the last, averaged if asked for, or those
        of the best held-out loss.

    Raises:
        UserError: the loss or the gradient is not finite, or memory does not do; the checkpoints so far stay.
    """
    from accelerate import Accelerator

    if settings.mixed_precision == "fp16" and hardware.device.type != "cuda":
        raise UserError(f"train.mixed_precision: fp16 needs CUDA, and the device is {hardware.device.type}: use bf16 or no")
    steps = settings.length(batches.steps_per_epoch)
    rates = _learning_rates(settings, steps)
    text_modules = live.modules if live else {}
    text_share = (settings.text_encoder_learning_rate or settings.learning_rate) / settings.learning_rate
    groups = [lora.trainable_parameters(denoiser), [p for m in text_modules.values() for p in lora.trainable_parameters(m)]]
    parameters = [p for group in groups for p in group]
    optimiser = build_optimiser(
        settings.optimiser, groups, _peak(settings), settings.weight_decay, settings.optimiser_args.given()
    )
    accelerator = Accelerator(cpu=hardware.device.type == "cpu", mixed_precision=settings.mixed_precision)
    arrange(denoiser, hardware.gradient_checkpointing, hardware.compile, hardware.channels_last)
    # evaluation_mode: no DDP around it, the team adds the gradients up
    with full_memory_is_the_users(denoiser, sum(p.numel() for p in parameters), hardware.micro_batch or settings.batch_size):
        model = accelerator.prepare_model(denoiser, evaluation_mode=True)
    networks = [model, *text_modules.values()]
    objective, asked = (on_device(o, accelerator.device) for o in (objective, measured or objective))
    optimiser = accelerator.prepare_optimizer(optimiser)
    average = [p.detach().clone() for p in parameters] if settings.ema_decay else None
    checkpoint = team.from_first(latest_checkpoint(work / "checkpoints") if team.rank == 0 else None)
    first = checkpoint.step if checkpoint else 0
    if checkpoint:
        _restore(checkpoint, denoiser, text_modules, optimiser, average, accelerator.scaler)
        if team.rank == 0:
            say(f"  going on from the checkpoint at step {first}")
    curve, held_out = (_curve(work / name, end, team) for name, end in (("curve.jsonl", first), ("held_out.jsonl", first + 1)))
    questions = _questions(batches, settings, steps)
    best = _best(work, settings, team)
    pending: list[tuple[int, Tensor, Tensor]] = []  # (step, loss, gradient norm), still on the device

    def weights() -> dict[str, Tensor]:
        return {k: v.detach().cpu().clone() for k, v in lora.joint_state(denoiser, text_modules).items()}

    def settle() -> None:
        rows = _read(pending, batches, settings, rates, accelerator.scaler)
        pending.clear()
        curve.append(rows)
        observe(rows)

    def save(step: int) -> None:
        settle()  # raises if a loss was not finite: a checkpoint is always a good one
        if not team.leads:
            return
        state = optimiser.state_dict()
        checkpoint = Checkpoint(
            step,
            weights(),
            state["state"],
            tuple(map(_learned, state["param_groups"])),
            None if average is None else {str(i): mean for i, mean in enumerate(average)},
            accelerator.scaler.state_dict() if accelerator.scaler else None,
        )
        save_checkpoint(work / "checkpoints", checkpoint, hardware.keep_checkpoints)

    def measure(step: int) -> None:
        nonlocal best
        assert questions is not None
        settle()
        with _evaluating(networks), final_weights(parameters, average, optimiser), progress("", 0, "") as silent:
            size = hardware.micro_batch or settings.batch_size
            encode = live.encode if live else None
            value = mean_loss(
                model,
                family,
                asked,
                batches.encodings,
                questions,
                size,
                accelerator.device,
                lambda: None,
                silent,
                encode,
            )
            if settings.keep == "best" and step and (best is None or value < best[1]):
                best = (step, value)
                if team.leads:
                    save_best(work / "best.safetensors", weights(), step, value)
        held_out.append([{"step": step, "held_out_loss": value}])
        observe(held_out.rows[-1:])

    for network in networks:
        network.train()
    count = sum(p.numel() for p in parameters)
    with (
        full_memory_is_the_users(denoiser, count, hardware.micro_batch or settings.batch_size),
        progress("training", steps if team.rank == 0 else 0, "steps", done=first) as bar,
        same_bytes_every_time(hardware.device, hardware.deterministic),
    ):
        if questions and not held_out.rows:
            measure(first)  # the base: what all later ones are to be held against
        for step in range(first, steps):
            if team.any(stop()):
                save(step)
                check_stop(f"step {step} of {steps} is saved")
            torch.manual_seed(torch_seed(settings.seed, step + 1))  # what LoRA dropout draws from
            for group, share in zip(optimiser.param_groups, (1.0, text_share), strict=False):
                group["lr"] = rates(step) * share
            members = batches.members(step)
            loss = torch.zeros((), device=accelerator.device)
            begin, end = team.share(len(members))
            for start in range(begin, end, hardware.micro_batch or max(1, end - begin)):
                last = min(end, start + (hardware.micro_batch or end))
                part = _loss_sum(
                    model, family, objective, batches, settings, step, start, last, accelerator.device, live, hardware.attention
                )
                part = part / len(members)
                with attention_kernel(hardware.attention):  # backward too: checkpointed blocks are computed again
                    accelerator.backward(part)
                loss += part.detach()
            if begin == end:  # a loss scale must be known to this process too, before it steps
                accelerator.backward(sum((p.sum() for p in parameters), loss) * 0)
            team.add_up(parameters, loss)
            norm = accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimiser.step()
            optimiser.zero_grad()
            if average is not None and settings.ema_decay:
                update_average(average, parameters, settings.ema_decay, step)
            pending.append((step, loss, norm.detach()))
            if settings.held_out_every and (step + 1) % settings.held_out_every == 0:
                measure(step + 1)  # before the checkpoint: whoever goes on from that finds it measured
            if settings.snapshot_every and (step + 1) % settings.snapshot_every == 0 and team.leads:
                with final_weights(parameters, average, optimiser):
                    write_safetensors(work / SNAPSHOTS / f"step-{step + 1:08d}.safetensors", weights())
            if (step + 1) % hardware.checkpoint_every == 0 or step + 1 == steps:
                save(step + 1)
            elif len(pending) == _READ_EVERY:
                settle()
            if hardware.preview_every and (step + 1) % hardware.preview_every == 0 and team.rank == 0:
                with _evaluating(networks), final_weights(parameters, average, optimiser):
                    preview(step + 1)
            bar.advance(note=f"loss {curve.smoothed:.4f}, {peak_mib():.0f} MiB" if curve.rows else "")
    if settings.keep == "best" and team.leads:
        return read_safetensors(work / "best.safetensors")
    with final_weights(parameters, average, optimiser):
        return weights()


def _loss_sum(
    model: nn.Module,
    family: Family,
    objective: Objective,
    batches: Batches,
    settings: Train,
    step: int,
    start: int,
    stop: int,
    device: torch.device,
    live: LiveText | None,
    kernel: str = "auto",
) -> Tensor:
    """The summed loss of positions [start, stop) of a step's batch: a scalar with gradients."""
    batch = batches.batch(step, start, stop)
    shape = NoiseShape(settings.noise_offset, settings.pyramid_noise, settings.input_perturbation)
    noise = shape.noise(batch.noise, settings.seed, step, start)
    input_noise = _sent(shape.input_noise(noise, settings.seed, step, start), device)
    x_0, noise = _sent(batch.x_0, device), _sent(noise, device)
    t = _sent(objective.timesteps(_placed(batch.u, settings)), device)
    text = live.encode(batch.captions) if live else {part: _sent(values, device) for part, values in batch.text.items()}
    x_t = objective.noised(x_0, input_noise, t)
    dtype = next(model.parameters()).dtype
    text = {part: values.to(dtype) for part, values in text.items()}
    geometry = _sent(batch.geometry, device)
    with attention_kernel(kernel):  # not text encoders' or previews': those may be in another precision
        predicted = family.predict(model, x_t.to(dtype), t, text, geometry)
    mask = None if batch.mask is None else _sent(batch.mask, device)
    losses = sample_losses(_loss(settings), objective, predicted, objective.target(x_0, noise, t), t, mask)
    return (losses * _sent(batch.weight, device).to(losses.dtype)).sum()


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it: a copy from pageable memory would wait for all that was asked of the GPU before."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _placed(u: Tensor, settings: Train) -> Tensor:
    """Where on the schedule uniform draws fall, under the settings' bias and range."""
    if settings.timestep_logit_normal:
        u = logit_normal(u, *settings.timestep_logit_normal)
    if settings.timestep_power:
        u = power(u, settings.timestep_power)
    return u if settings.timestep_range == (0.0, 1.0) else within(u, *settings.timestep_range)


def _loss(settings: Train) -> Loss:
    h = settings.huber
    huber = Huber(h.c, h.schedule, h.scale) if h else None
    return Loss(huber, settings.min_snr_gamma, settings.debiased)


def _learning_rates(settings: Train, steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the step."""
    cycles, exponent = settings.schedule_cycles or 1, settings.schedule_power or 1.0
    return lambda step: learning_rate_at(
        step, _peak(settings), settings.schedule, steps, settings.warmup_steps, cycles, exponent
    )


def _peak(settings: Train) -> float:
    return scaled_learning_rate(settings.learning_rate, settings.batch_size, settings.scale_learning_rate)


def _questions(batches: Batches, settings: Train, steps: int) -> Questions | None:
    """What the held-out loss is measured on; None if it is not."""
    if settings.held_out_every is None:
        return None
    if settings.held_out_every > steps:
        raise UserError(f"train.held_out_every: {settings.held_out_every} is more than the training's {steps} steps: lower it")
    held_out = [s for s in batches.encodings.samples("held-out") if not s.regularisation]
    samples = spread(held_out, _HELD_OUT_SAMPLES)
    if not samples:
        raise UserError(
            "train.held_out_every is set, but no picture is held out: raise dataset.held_out_fraction, or set it to null"
        )
    return Questions(samples, _HELD_OUT_TIMESTEPS)


def _learned(group: dict[str, Any]) -> dict[str, Any]:
    """What a parameter group holds besides parameters; without infinite bounds, which are settings and stand there anyway."""
    return {k: v for k, v in group.items() if k != "params" and not (isinstance(v, float) and math.isinf(v))}


def _restore(
    checkpoint: Checkpoint,
    denoiser: nn.Module,
    text_modules: Mapping[str, nn.Module],
    optimiser: Any,
    average: list[Tensor] | None,
    scaler: Any,
) -> None:
    """Put back all that a checkpoint holds."""
    lora.load_joint_state(denoiser, text_modules, checkpoint.adapter)
    groups = [
        # JSON has made lists of pairs; settings are the settings', what the optimiser learned is the checkpoint's
        {**group, **{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}}
        for group, saved in zip(optimiser.state_dict()["param_groups"], checkpoint.groups, strict=True)
    ]
    optimiser.load_state_dict({"state": checkpoint.optimiser, "param_groups": groups})
    for i, mean in enumerate(average or ()):
        assert checkpoint.average is not None
        mean.copy_(checkpoint.average[str(i)])
    if scaler is not None:
        scaler.load_state_dict(checkpoint.scaler)


@contextmanager
def _evaluating(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the block nothing is dropped out."""
    for network in networks:
        network.eval()
    yield
    for network in networks:
        network.train()


def _best(work: Path, settings: Train, team: Team) -> tuple[int, float] | None:
    """Step and loss of the best adapter so far, and its file on every machine."""
    path = work / "best.safetensors"
    first = best_so_far(path) if team.rank == 0 and settings.keep == "best" else None
    best, weights = team.from_first((first, read_safetensors(path) if first and team.size > 1 else None))
    if best and weights and team.leads and team.rank:
        save_best(path, weights, *best)
    return best if best is None else (int(best[0]), float(best[1]))


def _curve(path: Path, end: int, team: Team) -> Curve:
    """The rows before `end`, as the first process has them on disk."""
    rows = team.from_first([row for row in read_rows(path) if row["step"] < end] if team.rank == 0 else None)
    return Curve(rows, path if team.leads else None)


def _read(
    pending: list[tuple[int, Tensor, Tensor]],
    batches: Batches,
    settings: Train,
    rates: Callable[[int], float],
    scaler: Any,
) -> list[Row]:
    """Fetch losses and norms from the device, all at once."""
    if not pending:
        return []
    values = torch.stack([torch.stack([loss.float(), norm.float()]) for _, loss, norm in pending]).tolist()
    # float16 gradients overflow now and then: that step is passed over and the loss scale halved
    halving = scaler is not None and scaler.get_scale() > _LEAST_SCALE
    rows = []
    for (step, _, _), (loss, norm) in zip(pending, values, strict=True):
        if not (math.isfinite(loss) and (math.isfinite(norm) or halving)):
            names = "\n".join(f"  {s.id}: {s.captions[0][:100]}" for s in batches.members(step))
            raise UserError(
                f"training step {step}: loss {loss}, gradient norm {norm}: not finite. Its samples:\n{names}\n"
                "The last good checkpoint is kept. Lower train.learning_rate, raise train.warmup_steps, or set "
                f"train.mixed_precision to no (it is {settings.mixed_precision})"
            )
        rows.append({"step": step, "loss": loss, "learning_rate": rates(step), "grad_norm": norm})
    return rows
