"""The loop: equal to a reference written from the formulas, deterministic, resumable to the bit, and it learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from encoded import encode_folder
from safetensors.torch import load_file

from pipeline import lora
from pipeline.batches import Batches
from pipeline.checkpoint import latest_checkpoint
from pipeline.config import Params, Train
from pipeline.device import same_bytes_every_time
from pipeline.encodings import Encodings
from pipeline.errors import Interrupted, UserError
from pipeline.evaluate.losses import Questions, mean_loss
from pipeline.families import family
from pipeline.model_source import LocalModel
from pipeline.progress import progress
from pipeline.safetensors_file import write_safetensors
from pipeline.train import Hardware, _loss_sum, read_curve, train
from pipeline.train_job import perform

CPU = torch.device("cpu")
BASE_TYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SPEC = lora.LoraSpec(rank=2, alpha=4.0, dropout=0.0, targets=("to_q", "to_k", "to_v", "to_out.0"))


def stopping(at: int | None) -> tuple[Callable[[], bool], Callable[[str], None]]:
    """What a training asks whether to stop, which says so after `at` times, and what it calls then."""
    asked: list[None] = []

    def stop() -> bool:
        asked.append(None)
        return at is not None and len(asked) > at

    def check_stop(saved: str) -> None:
        raise Interrupted(saved)

    return stop, check_stop


def performed(params: Params, root: Path, work: Path, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    """What the stage calls, from settings and encodings to an adapter's weights."""
    AcceleratorState._reset_state(reset_partial_state=True)
    work.mkdir(exist_ok=True)
    return perform(params, root, work, *stopping(stop_at), lambda rows: None).weights


def bench_in(folder: Path, encodings: Encodings, base: Path, device: torch.device = CPU) -> Bench:
    """One with some work folders."""
    for name in ("run", "other", "whole", "parts"):
        (folder / name).mkdir()
    return Bench(encodings, base, folder, device=device)


@dataclass
class Bench:
    """Everything a training run needs, on a tiny base."""

    encodings: Encodings
    base: Path
    work: Path
    family: str = "sd"
    device: torch.device = CPU
    settings: dict[str, Any] = field(default_factory=lambda: {"steps": 8, "batch_size": 4, "learning_rate": 0.01, "seed": 3})

    def train(
        self,
        work: str = "run",
        stop_at: int | None = None,
        micro: int | None = None,
        every: int = 3,
        denoiser: torch.nn.Module | None = None,
        spec: lora.LoraSpec = SPEC,
        keep: int = 2,
        hardware: dict[str, Any] | None = None,
        **changes: Any,
    ) -> dict[str, torch.Tensor]:
        AcceleratorState._reset_state(reset_partial_state=True)  # one training a process, elsewhere than here
        settings = Train(**{**self.settings, **changes})
        model, kind = LocalModel(self.base, None, None), family(self.family)
        denoiser = denoiser or kind.load_denoiser(model, BASE_TYPES[settings.mixed_precision])
        lora.inject(denoiser, spec, settings.seed)
        batches = Batches(self.encodings, settings.batch_size, settings.seed, settings.caption_dropout)
        stop, check_stop = stopping(stop_at)
        return train(
            denoiser,
            kind,
            kind.objective(model),
            batches,
            settings,
            Hardware(self.device, micro, every, keep, **(hardware or {})),
            self.work / work,
            stop,
            check_stop,
            lambda rows: None,
        )

    def curve(self, work: str = "run") -> list[dict[str, float]]:
        return read_curve(self.work / work)


@pytest.fixture(scope="module")
def encodings(tmp_path_factory: pytest.TempPathFactory, pictures_folder: Path, sd_folder: Path) -> Encodings:
    out = tmp_path_factory.mktemp("encoded")
    return encode_folder(pictures_folder, sd_folder, out / "store", out / "out", held_out_fraction=0.0)[0]


@pytest.fixture
def bench(encodings: Encodings, sd_folder: Path, tmp_path: Path) -> Bench:
    return bench_in(tmp_path, encodings, sd_folder)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def reference(bench: Bench, steps: int, clip: float, dtype: torch.dtype) -> tuple[list[float], list[float], dict[str, Any]]:
    """The same run written from the formulas alone: explicit W + (α/r)·BA, ᾱ from the betas, AdamW by hand."""
    from diffusers import UNet2DConditionModel

    settings = Train(**bench.settings)
    unet = UNet2DConditionModel.from_pretrained(bench.base / "unet").to(dtype).eval()
    kind = family("sd")
    source = kind.load_denoiser(LocalModel(bench.base, None, None), torch.float32)
    lora.inject(source, SPEC, settings.seed)
    start = {k: v.detach().clone().to(dtype) for k, v in lora.state(source).items()}
    trained = {k: v.requires_grad_(True) for k, v in start.items()}
    frozen = {k: v.detach() for k, v in unet.named_parameters()}
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    batches = Batches(bench.encodings, settings.batch_size, settings.seed)
    moments: dict[str, list[torch.Tensor]] = {k: [torch.zeros_like(v), torch.zeros_like(v)] for k, v in trained.items()}
    losses, norms = [], []
    for step in range(steps):
        batch = batches.batch(step, 0, settings.batch_size)
        t = (batch.u * 1000).long()
        a = alpha_bar[t].to(dtype).view(-1, 1, 1, 1)
        x_t = a.sqrt() * batch.x_0.to(dtype) + (1 - a).sqrt() * batch.noise.to(dtype)
        merged = dict(frozen)
        for name in {k.rsplit(".lora_", 1)[0] for k in trained}:
            delta = trained[f"{name}.lora_B.weight"] @ trained[f"{name}.lora_A.weight"]
            merged[f"{name}.weight"] = frozen[f"{name}.weight"] + SPEC.alpha / SPEC.rank * delta
        out = torch.func.functional_call(unet, merged, (x_t, t, batch.text["hidden"].to(dtype))).sample
        loss = ((out - batch.noise.to(dtype)) ** 2).mean()
        grads = torch.autograd.grad(loss, list(trained.values()))
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        losses.append(loss.item())
        norms.append(norm.item())
        scale = min(1.0, clip / (norm.item() + 1e-6))
        with torch.no_grad():
            for (name, p), g in zip(trained.items(), grads, strict=True):
                m, v = moments[name]
                g = g * scale
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g**2)
                p.mul_(1 - settings.learning_rate * settings.weight_decay)
                m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                p.sub_(settings.learning_rate * m_hat / (v_hat.sqrt() + 1e-8))
    return losses, norms, {k: v.detach() for k, v in trained.items()}


def test_the_first_step_equals_the_formulas_in_double_precision(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import train as module

    monkeypatch.setattr(module.Batches, "batch", _double(module.Batches.batch))
    denoiser = family("sd").load_denoiser(LocalModel(bench.base, None, None), torch.float64)
    adapter = bench.train(steps=1, max_grad_norm=1e9, denoiser=_double_adapter(denoiser, monkeypatch))
    losses, norms, expected = reference(bench, 1, 1e9, torch.float64)
    row = bench.curve()[0]
    assert row["loss"] == pytest.approx(losses[0], rel=1e-6) and row["grad_norm"] == pytest.approx(norms[0], rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(adapter[name].double(), value, rtol=1e-5, atol=1e-8)


def _double(method: Any) -> Any:
    def batch(self: Any, *args: int) -> Any:
        from dataclasses import replace

        b = method(self, *args)
        return replace(b, x_0=b.x_0.double(), noise=b.noise.double())

    return batch


def _double_adapter(denoiser: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    inject = lora.inject

    def in_double(*args: Any) -> Any:
        parameters = inject(*args)
        for p in parameters:
            p.data = p.data.double()
        return parameters

    monkeypatch.setattr(lora, "inject", in_double)
    return denoiser


def test_fifty_steps_follow_the_reference(bench: Bench) -> None:
    adapter = bench.train(steps=50, max_grad_norm=0.05)
    losses, norms, expected = reference(bench, 50, 0.05, torch.float32)
    curve = bench.curve()
    assert [r["loss"] for r in curve] == pytest.approx(losses, rel=2e-3)
    assert [r["grad_norm"] for r in curve] == pytest.approx(norms, rel=5e-2)
    moved = torch.cat([(expected[k] - v).flatten() for k, v in adapter.items()]).norm()
    size = torch.cat([v.flatten() for v in expected.values()]).norm()
    assert moved / size < 0.02


def test_clipping_clips(bench: Bench) -> None:
    free = bench.train("run", steps=3, max_grad_norm=1e6)
    tight = bench.train("other", steps=3, max_grad_norm=1e-9)
    assert bench.curve("other")[0]["grad_norm"] > 1e-3  # the norm told is the one before clipping
    # AdamW divides by the gradient's size, so only ε against a vanishing gradient shows that clipping took place
    start = bench.train("parts", steps=1, learning_rate=1e-9, max_grad_norm=1e6)
    b = [k for k in free if "lora_B" in k]
    assert max((tight[k] - start[k]).abs().max() for k in b) < 0.2 * max((free[k] - start[k]).abs().max() for k in b)


def test_same_seed_same_bytes_and_another_seed_another_adapter(bench: Bench) -> None:
    first = bench.train("run")
    assert same(first, bench.train("other"))
    assert not same(first, bench.train("parts", seed=4))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("at", [1, 4, 7])
def test_stopping_and_going_on_changes_no_bit(bench: Bench, schedule: str, at: int) -> None:
    options = {"schedule": schedule, "warmup_steps": 2, "caption_dropout": 0.3}
    spec = lora.LoraSpec(2, 4.0, 0.2, SPEC.targets)  # dropout draws random numbers of its own
    whole = bench.train("whole", spec=spec, **options)
    with pytest.raises(Interrupted, match=f"step {at} of 8 is saved"):
        bench.train("parts", stop_at=at, spec=spec, **options)
    assert same(whole, bench.train("parts", spec=spec, **options))
    assert bench.curve("whole") == bench.curve("parts")


def test_a_damaged_checkpoint_falls_back_to_the_one_before(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    whole = bench.train("whole")
    bench.train("parts", every=2)
    folders = sorted((bench.work / "parts" / "checkpoints").iterdir())
    assert [f.name for f in folders] == ["step-00000006", "step-00000008"]
    for name in ("optimiser.safetensors", "adapter.safetensors"):
        target = folders[-1] / name
        data = bytearray(target.read_bytes())
        data[-1] ^= 1
        target.write_bytes(bytes(data))
    assert same(whole, bench.train("parts", every=2))
    assert "is damaged" in capsys.readouterr().out
    for folder in (bench.work / "parts" / "checkpoints").glob("step-*"):
        (folder / "state.json").write_text("{")
    assert latest_checkpoint(bench.work / "parts" / "checkpoints") is None


def test_micro_batches_change_float_order_and_nothing_else(bench: Bench) -> None:
    whole = bench.train("whole", micro=None)
    for micro in (1, 3):
        split = bench.train("parts" if micro == 1 else "other", micro=micro)
        for name in whole:
            torch.testing.assert_close(split[name], whole[name], rtol=1e-3, atol=2e-5)


def test_a_loss_that_is_not_finite_stops_names_step_and_samples_and_keeps_the_checkpoint(bench: Bench) -> None:
    denoiser = family("sd").load_denoiser(LocalModel(bench.base, None, None), torch.float32)
    calls = []

    def poison(module: Any, args: Any, output: Any) -> Any:
        calls.append(None)
        if len(calls) == 6:
            output.sample.data.fill_(math.nan)
        return output

    denoiser.register_forward_hook(poison)
    with pytest.raises(UserError) as caught:
        bench.train(denoiser=denoiser)
    members = Batches(bench.encodings, 4, 3).members(5)
    assert "training step 5: loss nan" in str(caught.value)
    assert all(f"{s.id}: {s.captions[0]}" in str(caught.value) for s in members)
    checkpoint = latest_checkpoint(bench.work / "run" / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 3
    assert all(t.isfinite().all() for t in checkpoint.adapter.values())
    assert [r["step"] for r in bench.curve()] == [0, 1, 2]


def test_it_learns(bench: Bench) -> None:
    """Over fixed noise and timesteps; attention alone can lower a random base's loss by a few per cent."""
    kind, model = family("sd"), LocalModel(bench.base, None, None)

    def loss(denoiser: torch.nn.Module) -> float:
        questions = Questions(bench.encodings.index.samples, 8)
        arguments = (kind, kind.objective(model), bench.encodings, questions, 16, torch.device("cpu"), lambda: None)
        with progress("", 0, "") as bar:
            return mean_loss(denoiser.eval(), *arguments, bar)

    denoiser = kind.load_denoiser(model, torch.float32)
    before = loss(denoiser)
    bench.train(steps=120, batch_size=10, learning_rate=0.03, denoiser=denoiser)
    assert loss(denoiser) < 0.97 * before


def test_weights_are_float32_and_all_move_under_bf16(bench: Bench) -> None:
    """In bf16 itself most updates of this size round to nothing."""
    denoiser = family("sd").load_denoiser(LocalModel(bench.base, None, None), torch.bfloat16)
    start = {k: v.clone() for k, v in _injected(denoiser).items()}
    adapter = bench.train(steps=3, mixed_precision="bf16", learning_rate=1e-4)
    a = [k for k in adapter if "lora_A" in k]
    assert all(v.dtype == torch.float32 for v in adapter.values())
    moved = torch.cat([(adapter[k] != start[k]).flatten() for k in a]).float().mean()
    assert moved > 0.95
    rounded = torch.cat([(adapter[k].bfloat16() != start[k].bfloat16()).flatten() for k in a]).float().mean()
    assert rounded < 0.5


def _injected(denoiser: torch.nn.Module) -> dict[str, torch.Tensor]:
    lora.inject(denoiser, SPEC, 3)
    return lora.state(denoiser)


def test_a_fresh_adapter_changes_nothing_and_scale_weighs_it(bench: Bench) -> None:
    kind, model = family("sd"), LocalModel(bench.base, None, None)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), {"hidden": torch.randn(2, 16, 16)}
    plain = kind.load_denoiser(model, torch.float32)
    before = kind.predict(plain, x, t, text, torch.zeros(2, 6))
    lora.inject(plain, SPEC, 0)
    assert torch.equal(before, kind.predict(plain, x, t, text, torch.zeros(2, 6)))
    trained = bench.train(steps=4)
    lora.load_state(plain, trained)
    plain.eval()
    full = kind.predict(plain, x, t, text, torch.zeros(2, 6))
    assert not torch.allclose(before, full)
    lora.set_scale(plain, 0.0)
    assert torch.equal(before, kind.predict(plain, x, t, text, torch.zeros(2, 6)))
    lora.set_scale(plain, 1.0)
    assert torch.equal(full, kind.predict(plain, x, t, text, torch.zeros(2, 6)))


def test_a_target_that_names_no_layer_lists_what_there_is(bench: Bench) -> None:
    denoiser = family("sd").load_denoiser(LocalModel(bench.base, None, None), torch.float32)
    with pytest.raises(UserError, match=r"lora.targets: 'q_proj' names no layer.*to_q"):
        lora.inject(denoiser, lora.LoraSpec(2, 2.0, 0.0, ("to_q", "q_proj")), 0)


def test_checkpoint_files_are_plain_safetensors(bench: Bench) -> None:
    bench.train()
    folder = bench.work / "run" / "checkpoints" / "step-00000008"
    assert {p.name for p in folder.iterdir()} == {"adapter.safetensors", "optimiser.safetensors", "state.json"}
    assert load_file(folder / "adapter.safetensors")
    assert {k.split(".")[1] for k in load_file(folder / "optimiser.safetensors")} == {"exp_avg", "exp_avg_sq", "step"}


def test_sd15_rank_4_has_the_parameters_the_method_is_known_by(tmp_path: Path) -> None:
    """797,184, and about 3.2 MB in float32; the UNet is built from its config, without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    parameters = lora.inject(unet.requires_grad_(False), lora.LoraSpec(4, 4.0, 0.0, SPEC.targets), 0)
    assert sum(p.numel() for p in parameters) == 797_184
    file = tmp_path / "adapter.safetensors"
    write_safetensors(file, {name: torch.zeros(tensor.shape) for name, tensor in lora.state(unet).items()})
    assert 3.18e6 < file.stat().st_size < 3.25e6


def test_prior_weight_and_masks_reach_the_loss(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regularisation pictures of weight 0 and black masks: what is left is the other samples' loss alone."""
    kind, model, settings = family("sd"), LocalModel(bench.base, None, None), Train(**bench.settings)
    denoiser, objective = kind.load_denoiser(model, torch.float32), kind.objective(model)
    batches = Batches(bench.encodings, 4, 3)
    honest = batches.batch(0, 0, 4)

    def loss(**changes: Any) -> float:
        monkeypatch.setattr(batches, "batch", lambda *_: replace(honest, **changes))
        return _loss_sum(denoiser, kind, objective, batches, settings, 0, 0, 4, torch.device("cpu"), None).item()

    whole, alone = loss(), [loss(weight=torch.eye(4)[i]) for i in range(4)]
    assert whole == pytest.approx(sum(alone), rel=1e-5) and min(alone) > 0
    assert loss(weight=torch.tensor([1.0, 1.0, 0.5, 0.0])) == pytest.approx(alone[0] + alone[1] + alone[2] / 2, rel=1e-5)
    masks = torch.ones(4, 1, *honest.x_0.shape[2:])
    masks[1] = 0
    assert loss(mask=masks) == pytest.approx(whole - alone[1], rel=1e-5)
    assert loss(mask=torch.zeros_like(masks)) == 0


def test_an_attention_kernel_that_cannot_compute_this_is_named(bench: Bench) -> None:
    """cuDNN's is for GPUs."""
    with pytest.raises(UserError, match=r"runtime\.attention: cudnn .*set it to auto"):
        bench.train("run", hardware={"attention": "cudnn"})


def test_a_cudnn_error_is_not_taken_for_want_of_determinism() -> None:
    """Its messages quote a line of Python with the word in it."""
    for wanted in (True, False):
        with pytest.raises(RuntimeError, match="INTERNAL"), same_bytes_every_time(torch.device("cuda"), wanted):
            raise RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR\ntorch.backends.cudnn.deterministic = False")
    refused = pytest.raises(UserError, match=r"runtime\.deterministic: put_ does not .*\nSet it to false")
    with refused, same_bytes_every_time(torch.device("cuda"), True):
        raise RuntimeError("put_ does not have a deterministic implementation, but you set …")
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
