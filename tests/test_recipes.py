"""What a training may be set to: optimisers, averages, held-out loss, length, hardware; each resumed to the bit."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import SPEC, Bench, bench_in, same

from pipeline import lora
from pipeline.batches import Batches
from pipeline.checkpoint import best_so_far
from pipeline.continuation import adopt
from pipeline.curve import read_curve, read_held_out
from pipeline.device import out_of_memory
from pipeline.encodings import Encodings
from pipeline.errors import Interrupted, UserError
from pipeline.evaluate.losses import Questions, mean_loss
from pipeline.families import family
from pipeline.model_source import LocalModel
from pipeline.optim import build_optimiser
from pipeline.progress import progress
from pipeline.safetensors_file import read_safetensors


@pytest.fixture
def bench(encodings: Encodings, sd_folder: Path, tmp_path: Path) -> Bench:
    return bench_in(tmp_path, encodings, sd_folder)


RECIPES: dict[str, dict[str, Any]] = {
    "adamw-ema": {
        "ema_decay": 0.9,
        "schedule": "cosine-with-restarts",
        "schedule_cycles": 2,
        "optimiser_args": {"betas": (0.8, 0.9)},
    },
    "adafactor": {"optimiser": "adafactor", "schedule": "linear"},
    "prodigy": {"optimiser": "prodigy", "learning_rate": 1.0, "schedule": "cosine", "optimiser_args": {"d_coef": 2.0}},
    "lion-ema": {"optimiser": "lion", "schedule": "polynomial", "schedule_power": 2.0, "ema_decay": 0.99},
    "schedule-free": {"optimiser": "schedule-free-adamw", "warmup_steps": 2},
    "huber": {"huber": {"c": 0.1}, "noise_offset": 0.1, "pyramid_noise": 0.5, "input_perturbation": 0.1, "timestep_power": 0.5},
    "min-snr": {"min_snr_gamma": 5.0, "timestep_range": (0.2, 0.9), "scale_learning_rate": "sqrt", "learning_rate": 0.005},
    "debiased": {"debiased": True, "timestep_logit_normal": (0.3, 1.0)},
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_moves_resumes_to_the_bit_and_differs_from_the_plain_one(bench: Bench, name: str) -> None:
    options = {**RECIPES[name], "held_out_every": 4}
    whole = bench.train("whole", micro=3, **options)
    with pytest.raises(Interrupted):
        bench.train("parts", micro=3, stop_at=5, **options)
    assert same(whole, bench.train("parts", micro=3, **options))
    assert bench.curve("whole") == bench.curve("parts")
    assert read_held_out(bench.work / "whole") == read_held_out(bench.work / "parts")
    assert not same(whole, bench.train("other", micro=3))
    denoiser = family("sd").load_denoiser(LocalModel(bench.base, None, None), torch.float32)
    lora.inject(denoiser, SPEC, 3)
    start = lora.state(denoiser)
    assert all(not torch.equal(whole[k], start[k]) for k in whole)


def test_the_average_is_the_formulas(bench: Bench) -> None:
    averaged = bench.train(steps=6, every=1, keep=10, ema_decay=0.7)
    denoiser = family("sd").load_denoiser(LocalModel(bench.base, None, None), torch.float32)
    lora.inject(denoiser, SPEC, 3)
    mean = {k: v.detach().double().clone() for k, v in lora.state(denoiser).items()}
    for step in range(6):
        weights = read_safetensors(bench.work / "run" / "checkpoints" / f"step-{step + 1:08d}" / "adapter.safetensors")
        d = min(0.7, (1 + step) / (10 + step))
        mean = {k: d * m + (1 - d) * weights[k].double() for k, m in mean.items()}
    for k, m in mean.items():
        torch.testing.assert_close(averaged[k].double(), m, rtol=1e-5, atol=1e-8)
    plain = bench.train("other", steps=6)
    assert same(plain, weights) and not same(plain, averaged)  # averaging changes no step


def test_schedule_free_hands_out_its_averaged_iterate(bench: Bench) -> None:
    """x, of which the trained y is an interpolation with z: x = (y − (1 − β) z) / β."""
    x = bench.train(steps=5, optimiser="schedule-free-adamw")
    folder = bench.work / "run" / "checkpoints" / "step-00000005"
    y, state = read_safetensors(folder / "adapter.safetensors"), read_safetensors(folder / "optimiser.safetensors")
    for i, k in enumerate(_names_in_module_order(bench)):
        torch.testing.assert_close(x[k], (y[k] - 0.1 * state[f"{i}.z"]) / 0.9, rtol=1e-4, atol=1e-6)
    assert not same(x, y)


def _names_in_module_order(bench: Bench) -> list[str]:
    denoiser = family("sd").load_denoiser(LocalModel(bench.base, None, None), torch.float32)
    lora.inject(denoiser, SPEC, 3)
    return [n.replace(".default", "") for n, p in denoiser.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(("name", "library"), [("lion", "pytorch_optimizer"), ("adamw8bit", "bitsandbytes.optim")])
def test_a_missing_library_is_named_with_its_extra(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"train.optimiser: {name} needs .*pip install 'reprolora\[(optimisers|8bit)\]'"):
        build_optimiser(name, [[torch.nn.Parameter(torch.zeros(2))]], 1e-3, 0.0, {})


# --- held-out loss


@pytest.mark.parametrize("options", [{"ema_decay": 0.9}, {"optimiser": "schedule-free-adamw"}], ids=["ema", "schedule-free"])
def test_looking_with_averaged_weights_changes_no_step(bench: Bench, options: dict[str, Any]) -> None:
    assert same(bench.train("whole", **options), bench.train("parts", held_out_every=2, **options))
    assert bench.curve("whole") == bench.curve("parts")


def test_looking_at_held_out_pictures_changes_no_step(bench: Bench) -> None:
    plain = bench.train("whole")
    assert same(plain, bench.train("parts", held_out_every=2))
    rows = read_held_out(bench.work / "parts")
    assert [r["step"] for r in rows] == [0, 2, 4, 6, 8]
    kind, model = family("sd"), LocalModel(bench.base, None, None)
    denoiser = kind.load_denoiser(model, torch.float32).eval()
    questions = Questions(bench.encodings.samples("held-out"), 8)
    cpu = torch.device("cpu")
    for weights, row in ((None, rows[0]), (plain, rows[-1])):
        if weights:
            lora.inject(denoiser, SPEC, 0)
            lora.load_state(denoiser, weights)
        with progress("", 0, "") as bar:
            value = mean_loss(
                denoiser.eval(), kind, kind.objective(model), bench.encodings, questions, 4, cpu, lambda: None, bar
            )
        assert row["held_out_loss"] == pytest.approx(value, rel=1e-6)


def test_the_best_is_kept(bench: Bench) -> None:
    """A rate that is far too high soon makes things worse."""
    options = {"steps": 12, "learning_rate": 0.3, "held_out_every": 1}
    last = bench.train("whole", every=1, keep=20, **options)
    rows = read_held_out(bench.work / "whole")[1:]
    best = min(rows, key=lambda r: r["held_out_loss"])
    assert best["step"] < 12
    settings = bench.settings
    bench.settings = {**settings, "keep": "best"}
    kept = bench.train("parts", **options)
    expected = read_safetensors(bench.work / "whole" / "checkpoints" / f"step-{int(best['step']):08d}" / "adapter.safetensors")
    assert same(kept, expected) and not same(kept, last)
    assert best_so_far(bench.work / "parts" / "best.safetensors") == (best["step"], best["held_out_loss"])
    with pytest.raises(Interrupted):
        bench.train("other", stop_at=7, **options)
    assert same(kept, bench.train("other", **options))


def test_held_out_loss_without_held_out_pictures_is_refused(bench: Bench) -> None:
    with pytest.raises(UserError, match="is more than the training's 8 steps"):
        bench.train(held_out_every=9)
    bench.encodings = copy.copy(bench.encodings)
    bench.encodings.index = replace(bench.encodings.index, samples=tuple(bench.encodings.samples("train")))
    with pytest.raises(UserError, match="no picture is held out"):
        bench.train(held_out_every=2)


# --- length


@pytest.mark.parametrize("optimiser", ["adamw", "prodigy", "schedule-free-adamw"])
def test_a_longer_training_goes_on_from_the_shorter_ones_end(bench: Bench, optimiser: str) -> None:
    options = {"optimiser": optimiser, "warmup_steps": 2, "held_out_every": 2}
    adopt(bench.work / "run", "kind", 5, keep_best=False)
    bench.train("run", steps=5, **options)
    adopt(bench.work / "parts", "kind", 9, keep_best=False)
    counted: list[int] = []
    original = Batches.batch

    def count(self: Batches, step: int, *rest: int) -> Any:
        counted.append(step)
        return original(self, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "batch", count)
        longer = bench.train("parts", steps=9, **options)
    assert counted == [5, 6, 7, 8]
    assert same(longer, bench.train("whole", steps=9, **options))
    assert bench.curve("parts") == bench.curve("whole")
    assert read_held_out(bench.work / "parts") == read_held_out(bench.work / "whole")


def test_what_is_not_of_the_kind_or_beyond_the_length_is_left_alone(bench: Bench) -> None:
    adopt(bench.work / "run", "kind", 6, keep_best=False)
    bench.train("run", steps=6, every=3)
    adopt(bench.work / "other", "another kind", 9, keep_best=False)
    assert not (bench.work / "other" / "checkpoints").exists()
    adopt(bench.work / "parts", "kind", 5, keep_best=False)  # shorter: the checkpoint at 3 serves, the one at 6 does not
    assert [p.name for p in (bench.work / "parts" / "checkpoints").iterdir()] == ["step-00000003"]
    assert same(bench.train("parts", steps=5), bench.train("whole", steps=5))
    assert [r["step"] for r in bench.curve("parts")] == list(range(5))


def test_a_damaged_checkpoint_of_another_training_is_passed_over(bench: Bench) -> None:
    adopt(bench.work / "run", "kind", 6, keep_best=False)
    bench.train("run", steps=6, every=3)
    newest = bench.work / "run" / "checkpoints" / "step-00000006" / "adapter.safetensors"
    newest.write_bytes(newest.read_bytes()[:-4])
    adopt(bench.work / "parts", "kind", 9, keep_best=False)
    assert same(bench.train("parts", steps=9), bench.train("whole", steps=9))


def test_epochs_count_steps(bench: Bench) -> None:
    per_epoch = Batches(bench.encodings, 4, 3).steps_per_epoch
    settings = {k: v for k, v in bench.settings.items() if k != "steps"}
    whole = bench.train("whole", steps=2 * per_epoch)
    bench.settings = settings
    assert same(whole, bench.train("parts", epochs=2))


# --- hardware


@pytest.mark.parametrize(
    "hardware", [{"gradient_checkpointing": True}, {"channels_last": True}, {"attention": "math"}], ids=lambda h: next(iter(h))
)
def test_hardware_changes_rounding_and_nothing_else(bench: Bench, hardware: dict[str, Any]) -> None:
    whole = bench.train("whole")
    other = bench.train("parts", hardware=hardware)
    for name in whole:
        torch.testing.assert_close(other[name], whole[name], rtol=1e-3, atol=2e-5)


def test_fp16_on_the_cpu_is_refused(bench: Bench) -> None:
    with pytest.raises(UserError, match="fp16 needs CUDA"):
        bench.train(mixed_precision="fp16")


def test_full_gpu_memory_names_the_settings_that_help(bench: Bench) -> None:
    denoiser = family("sd").load_denoiser(LocalModel(bench.base, None, None), torch.float32)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    denoiser.register_forward_hook(full)
    with pytest.raises(UserError) as caught:
        bench.train(denoiser=denoiser)
    for setting in ("runtime.micro_batch: 2", "runtime.gradient_checkpointing: true", "train.mixed_precision: bf16"):
        assert setting in str(caught.value)
    assert "Tried to allocate" in str(out_of_memory(denoiser, 10, 1, RuntimeError("Tried to allocate")))


# --- kinds of adapters


def spec(**changes: Any) -> lora.LoraSpec:
    return lora.LoraSpec(**{"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": SPEC.targets, **changes})


KINDS = {
    "rslora": spec(rslora=True),
    "dora": spec(dora=True),
    "gaussian": spec(init="gaussian"),
    "pissa": spec(init="pissa"),
    "pissa-rslora": spec(init="pissa", rslora=True, rank_pattern={"to_k": 3}, alpha_pattern={"to_out.0": 1.0}),
    "loha": spec(method="loha"),
    "lokr": spec(method="lokr"),
    "loha-conv": spec(method="loha", targets=("conv1", "to_q")),
    "conv": spec(targets=("conv1", "conv_shortcut", "to_q")),
    "patterns": spec(rank_pattern={"to_k": 5, "attn2.to_q": 1}, alpha_pattern={"to_v": 1.0}),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_trains_and_its_file_works_on_the_published_base(bench: Bench, name: str) -> None:
    kind, model = family("sd"), LocalModel(bench.base, None, None)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), {"hidden": torch.randn(2, 16, 16)}

    def ask(denoiser: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return kind.predict(denoiser.eval(), x, t, text, torch.zeros(2, 6))

    before = ask(kind.load_denoiser(model, torch.float32))
    fresh = kind.load_denoiser(model, torch.float32)
    lora.inject(fresh, KINDS[name], 3)
    start = {k: v.detach().clone() for k, v in lora.state(fresh).items()}
    torch.testing.assert_close(ask(fresh), before, rtol=1e-4, atol=1e-4)
    trained = kind.load_denoiser(model, torch.float32)
    weights, written = lora.portable(bench.train(spec=KINDS[name], steps=3, denoiser=trained), start, KINDS[name])
    assert not torch.allclose(ask(trained), before, atol=1e-3)
    loaded = kind.load_denoiser(model, torch.float32)
    lora.inject(loaded, lora.LoraSpec(**json.loads(json.dumps(vars(written)))), 0)  # as validate reads it
    assert lora.scales(loaded) == pytest.approx(lora.scales(trained))
    lora.load_state(loaded, weights)
    torch.testing.assert_close(ask(loaded), ask(trained), rtol=1e-4, atol=1e-4)
    if not KINDS[name].dora:
        lora.set_scale(loaded, 0.0)
        torch.testing.assert_close(ask(loaded), before, rtol=1e-5, atol=1e-5)


def test_patterns_give_layers_ranks_of_their_own(bench: Bench) -> None:
    denoiser = family("sd").load_denoiser(LocalModel(bench.base, None, None), torch.float32)
    lora.inject(denoiser, KINDS["patterns"], 0)
    for name, tensor in lora.state(denoiser).items():
        if ".lora_A." in name:
            expected = 5 if ".to_k." in name else 1 if ".attn2.to_q." in name else 2
            assert len(tensor) == expected, name
    with pytest.raises(UserError, match=r"lora.rank_pattern: 'conv1' names no layer that lora.targets names"):
        lora.inject(
            family("sd").load_denoiser(LocalModel(bench.base, None, None), torch.float32), spec(rank_pattern={"conv1": 2}), 0
        )
    with pytest.raises(UserError, match="pissa is for linear layers"):
        lora.inject(
            family("sd").load_denoiser(LocalModel(bench.base, None, None), torch.float32),
            spec(init="pissa", targets=("conv1",)),
            0,
        )


def test_training_starts_from_an_adapters_file(bench: Bench, tmp_path: Path) -> None:
    from pipeline.export.diffusers_format import FILE_NAME, write_diffusers
    from pipeline.export.peft_format import adapter_of_modules
    from pipeline.safetensors_file import write_safetensors

    trained = bench.train(steps=3)  # rank 2, α 4
    adapted = family("sd").load_denoiser(LocalModel(bench.base, None, None), torch.float32)
    lora.inject(adapted, spec(alpha=4.0), 0)
    lora.load_state(adapted, trained)
    write_diffusers(tmp_path / FILE_NAME, adapter_of_modules({"unet": adapted}), torch.float32, {})
    write_safetensors(tmp_path / "adapter.safetensors", trained)
    (tmp_path / "training.json").write_text(json.dumps({"scales": {name.split(".lora_")[0]: 2.0 for name in trained}}))
    for file in (FILE_NAME, "adapter.safetensors"):
        for alpha in (4.0, 1.0):
            denoiser = family("sd").load_denoiser(LocalModel(bench.base, None, None), torch.float32)
            shape = spec(alpha=alpha)
            lora.inject(denoiser, shape, 0)
            lora.start_from(denoiser, tmp_path / file, "unet")
            for name, tensor in lora.state(denoiser).items():
                carried = trained[name] * (4.0 / alpha if ".lora_B." in name else 1)
                torch.testing.assert_close(tensor, carried)
    with pytest.raises(UserError, match=r"does not fit lora.rank.*\[2, \d+\] there and \[3, \d+\] here"):
        lora.inject(other := family("sd").load_denoiser(LocalModel(bench.base, None, None), torch.float32), spec(rank=3), 0)
        lora.start_from(other, tmp_path / "adapter.safetensors", "unet")
    shutil.copy(tmp_path / "adapter.safetensors", tmp_path / "adapter.bin")
    with pytest.raises(UserError, match=r"is no .safetensors file"):
        lora.start_from(other, tmp_path / "adapter.bin", "unet")


def test_curves_survive_a_line_cut_short(bench: Bench) -> None:
    bench.train("run", steps=4)
    path = bench.work / "run" / "curve.jsonl"
    path.write_text(path.read_text()[:-20])
    assert [r["step"] for r in read_curve(bench.work / "run")] == [0, 1, 2]
