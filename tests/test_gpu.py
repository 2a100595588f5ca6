"""What only a CUDA GPU can show; skipped where there is none. `make test-gpu` runs it, and the bases in 8 and 4 bits on it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from encoded import HOW, encode_folder, encode_manifest, prepare_folder
from project import Project, make_project
from test_train import Bench, bench_in, performed, same

from pipeline.config import load_params
from pipeline.device import pick_device
from pipeline.encodings import ContentStore, Encodings
from pipeline.errors import Interrupted, UserError
from pipeline.workspace import ENCODED

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def exact() -> None:
    """As every stage sets the GPU up: no TF32, deterministic kernels."""
    pick_device("cuda")


@pytest.fixture
def bench(encodings: Encodings, sd_folder: Path, tmp_path: Path) -> Bench:
    return bench_in(tmp_path, encodings, sd_folder, CUDA)


# --- the loop


def test_in_float32_a_gpu_trains_what_a_cpu_does(bench: Bench) -> None:
    bench.train("run")
    replace(bench, device=torch.device("cpu")).train("other")
    gpu, cpu = bench.curve("run"), bench.curve("other")
    assert [row["loss"] for row in gpu] == pytest.approx([row["loss"] for row in cpu], rel=1e-4)
    assert [row["grad_norm"] for row in gpu] == pytest.approx([row["grad_norm"] for row in cpu], rel=1e-3)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_gpu_gives_the_same_bytes_again_and_after_a_stop(bench: Bench, precision: str) -> None:
    options = {"mixed_precision": precision, "ema_decay": 0.9, "schedule": "cosine", "warmup_steps": 2}
    whole = bench.train("whole", micro=3, **options)
    assert same(whole, bench.train("other", micro=3, **options))
    with pytest.raises(Interrupted):
        bench.train("parts", micro=3, stop_at=5, **options)
    assert same(whole, bench.train("parts", micro=3, **options))
    assert all(tensor.dtype == torch.float32 for tensor in whole.values())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kernel", ["auto", "flash", "efficient"])
def test_attention_over_many_cells_gives_the_same_bytes_again(
    precision: str, kernel: str, tmp_path: Path, pictures_folder: Path, sd_folder: Path
) -> None:
    """Its backward pass adds up over blocks of cells, in any order unless told otherwise; the tiny base's latents are one block."""
    from diffusers import UNet2DConditionModel

    encodings, _ = encode_folder(
        pictures_folder, sd_folder, tmp_path / "store", tmp_path / "out", resolution=256, allow_upscaling=True
    )
    bench = Bench(encodings, sd_folder, tmp_path, device=CUDA)

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return (
            UNet2DConditionModel(
                block_out_channels=(64, 128),
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                layers_per_block=1,
                cross_attention_dim=16,
                attention_head_dim=1,
            )
            .requires_grad_(False)
            .to(torch.bfloat16 if precision == "bf16" else torch.float16)
        )

    def train(work: str, deterministic: bool = True) -> dict[str, torch.Tensor]:
        (tmp_path / work).mkdir()
        hardware = {"attention": kernel, "deterministic": deterministic}
        return bench.train(work, denoiser=network(), hardware=hardware, mixed_precision=precision)

    assert same(train("whole"), train("other"))
    train("run", deterministic=False)
    right, rough = ([row["loss"] for row in bench.curve(work)] for work in ("whole", "run"))
    assert rough == pytest.approx(right, rel=1e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_what_float32_learns(bench: Bench, precision: str) -> None:
    bench.train("whole", steps=60)
    bench.train("run", steps=60, mixed_precision=precision)
    exact, half = (sum(row["loss"] for row in bench.curve(name)[-10:]) for name in ("whole", "run"))
    first = sum(row["loss"] for row in bench.curve("run")[:10])
    assert half < 0.95 * first and half == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("optimiser", ["adafactor", "prodigy", "lion", "schedule-free-adamw"])
def test_every_optimiser_goes_on_to_the_same_bytes(bench: Bench, optimiser: str) -> None:
    rate = {"prodigy": 1.0}.get(optimiser, 0.003)
    options = {"optimiser": optimiser, "learning_rate": rate, "mixed_precision": "bf16"}
    whole = bench.train("whole", **options)
    with pytest.raises(Interrupted):
        bench.train("parts", stop_at=5, **options)
    assert same(whole, bench.train("parts", **options))


def test_what_is_drawn_and_measured_on_the_way_fits_the_device(bench: Bench) -> None:
    options: dict[str, Any] = {
        "noise_offset": 0.1,
        "pyramid_noise": 0.5,
        "input_perturbation": 0.1,
        "min_snr_gamma": 5.0,
        "huber": {"c": 0.1, "schedule": "snr", "scale": "smooth-l1"},
        "timestep_logit_normal": (0.0, 1.0),
        "caption_dropout": 0.2,
        "ema_decay": 0.9,
        "held_out_every": 2,
        "snapshot_every": 2,
    }
    bench.settings["keep"] = "best"
    gpu = bench.train("run", **options)
    cpu = replace(bench, device=torch.device("cpu")).train("other", **options)
    assert [row["loss"] for row in bench.curve("run")] == pytest.approx([row["loss"] for row in bench.curve("other")], rel=1e-3)
    assert gpu.keys() == cpu.keys()


@pytest.mark.parametrize(
    "hardware",
    [
        {"channels_last": True},
        {"gradient_checkpointing": True},
        {"attention": "math"},
        {"attention": "efficient"},
        {"compile": True},
    ],
    ids=lambda hardware: next(iter(hardware)) + "-" + str(next(iter(hardware.values()))),
)
def test_how_the_gpu_is_used_changes_rounding_alone(bench: Bench, hardware: dict[str, Any]) -> None:
    bench.train("whole")
    bench.train("run", hardware=hardware)
    plain, other = ([row["loss"] for row in bench.curve(name)] for name in ("whole", "run"))
    assert other == pytest.approx(plain, rel=1e-3)


def test_a_kernel_that_cannot_compute_this_is_named(bench: Bench) -> None:
    """Flash attention takes no float32; nor need it where something else than the denoiser computes, in another precision."""
    with pytest.raises(UserError, match=r"runtime\.attention: flash .*set it to auto"):
        bench.train("run", hardware={"attention": "flash"})


def test_tf32_is_used_where_asked_for() -> None:
    a = torch.randn(512, 512, device=CUDA)
    right = a.double() @ a.double()

    def error() -> float:
        return float(((a @ a).double() - right).norm() / right.norm())

    pick_device("cuda", tf32=True)
    rough = error()
    pick_device("cuda")
    assert error() < 1e-5 < rough < 1e-2


# --- memory


@pytest.fixture
def little_memory() -> Iterator[Callable[[int], None]]:
    """Called with MiB: what is left beside that which is taken now."""
    torch.cuda.empty_cache()

    def limit(mib: int) -> None:
        total = torch.cuda.get_device_properties(CUDA).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + mib * 2**20) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_encode_halves_its_batch_when_a_gpu_is_full(
    tmp_path: Path,
    sd_folder: Path,
    pictures_folder: Path,
    little_memory: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = prepare_folder(pictures_folder, resolution=256, allow_upscaling=True, held_out_fraction=0.0)

    def encoded(name: str) -> ContentStore:
        store = ContentStore(tmp_path / name)
        encode_manifest(manifest, pictures_folder.parent, sd_folder, store, device=CUDA)
        return store

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    whole = encoded("whole")
    peak = (torch.cuda.max_memory_allocated() - before) // 2**20
    capsys.readouterr()
    little_memory(max(3, peak * 6 // 10))
    small = encoded("small")
    assert "out of memory with 8 pictures at once: going on with 4" in capsys.readouterr().out
    assert whole.keys() == small.keys()
    for key, entry in whole.read(whole.keys()).items():
        for part, values in entry.items():
            assert torch.allclose(values, small.read([key])[key][part], atol=1e-5), (key, part)


def test_a_full_gpu_says_what_helps_and_loses_nothing(bench: Bench, little_memory: Callable[[int], None]) -> None:
    def fill() -> list[torch.Tensor]:
        """Take what the allocator holds and may still ask for, but for crumbs."""
        little_memory(0)
        taken: list[torch.Tensor] = []
        for size in (2**20, 2**16, 2**12):
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    taken.append(torch.empty(size, dtype=torch.uint8, device=CUDA))
        return taken

    with pytest.raises(Interrupted):
        bench.train("run", stop_at=3)
    full = fill()
    with pytest.raises(UserError, match=r"the GPU's memory is full(.|\n)*runtime\.micro_batch: 2"):
        bench.train("run")
    before = bench.curve("run")
    del full
    bench.train("run", micro=2)
    assert len(before) == 3 and bench.curve("run")[:3] == before and len(bench.curve("run")) == 8


# --- encodings, and families through what the stage calls


@pytest.mark.parametrize(("compute", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1), ("float16", 0.02)])
def test_a_gpu_encodes_what_a_cpu_does(
    tmp_path: Path, sd_folder: Path, pictures_folder: Path, compute: str, tolerance: float
) -> None:
    manifest = prepare_folder(pictures_folder)
    stores = [ContentStore(tmp_path / name) for name in ("cpu", "gpu")]
    how = replace(HOW, compute_dtype=compute)
    exact, _ = encode_manifest(manifest, pictures_folder.parent, sd_folder, stores[0])
    found, _ = encode_manifest(manifest, pictures_folder.parent, sd_folder, stores[1], how=how, device=CUDA, workers=1)
    for a, b in zip(exact.samples, found.samples, strict=True):
        for one, other in ((a.latents[0], b.latents[0]), (a.texts[0], b.texts[0])):
            x, y = stores[0].read([one])[one], stores[1].read([other])[other]
            for part in x.keys() - {"geometry"}:
                assert float((x[part].float() - y[part].float()).norm() / x[part].float().norm()) < tolerance, part


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(("name", "text_encoder"), [("sd", True), ("sdxl", False), ("sdxl", True), ("sd3", False)])
def test_every_family_trains_and_goes_on_to_the_same_bytes(
    name: str,
    text_encoder: bool,
    precision: str,
    request: pytest.FixtureRequest,
    clip_folder: Path,
    pictures_folder: Path,
    tmp_path: Path,
) -> None:
    base: Path = request.getfixturevalue(f"{name}_folder")
    project = project_of(name, tmp_path / "project", base, clip_folder, pictures_folder)
    project.set("train", mixed_precision=precision, min_snr_gamma=None)
    project.set("lora", text_encoder=text_encoder)
    params = load_params(project.path("params.yaml"))
    encode_folder(pictures_folder, base, tmp_path / "store", project.root / ENCODED, name=name)

    whole = performed(params, project.root, tmp_path / "whole")
    with pytest.raises(Interrupted):
        performed(params, project.root, tmp_path / "parts", stop_at=3)
    assert same(whole, performed(params, project.root, tmp_path / "parts"))
    assert all(tensor.isfinite().all() for tensor in whole.values())


# --- the stages


def project_of(name: str, root: Path, base: Path, clip: Path, pictures: Path) -> Project:
    project = make_project(root, base, clip, pictures)
    project.set("model", family=name)
    project.set("runtime", device="cuda")
    if name == "sd3":
        project.set("validate", scheduler="base")
        project.set("export", formats=["diffusers"])
    return project


@pytest.mark.parametrize(("name", "dtype"), [("sd", "float32"), ("sd", "float16"), ("sdxl", "float16"), ("sd3", "bfloat16")])
def test_the_five_stages_on_a_gpu(
    name: str, dtype: str, request: pytest.FixtureRequest, clip_folder: Path, pictures_folder: Path, tmp_path: Path
) -> None:
    base: Path = request.getfixturevalue(f"{name}_folder")
    project = project_of(name, tmp_path / "project", base, clip_folder, pictures_folder)
    project.set("validate", dtype=dtype)
    project.set("runtime", sample_every=3)
    done = project.cli("run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(project.executed()) == 5
    metrics = json.loads(project.path("reports/validate/metrics.json").read_text())
    assert 0 < metrics["held_out_loss"] < 10
    again = project.cli("run")
    assert again.returncode == 0 and project.executed() == []
    drawn = project.cli("generate", "a red circle", "--count", "2", "--out", "drawn")
    assert drawn.returncode == 0, drawn.stdout + drawn.stderr
    assert len(list(project.path("drawn").glob("*.png"))) == 2
    if dtype == "float32":
        project.set("runtime", device="cpu")
        done = project.cli("run", "--force")
        assert done.returncode == 0, done.stdout + done.stderr
        on_cpu = json.loads(project.path("reports/validate/metrics.json").read_text())
        assert on_cpu["held_out_loss"] == pytest.approx(metrics["held_out_loss"], rel=1e-3)


def test_check_names_the_gpu_and_what_is_free(project: Project) -> None:
    project.set("runtime", device="cuda")
    done = project.cli("check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert torch.cuda.get_device_name() in done.stdout and "GiB free" in done.stdout


def test_more_processes_than_gpus_are_refused(project: Project) -> None:
    project.set("runtime", device="cuda", processes=torch.cuda.device_count() + 1)
    done = project.cli("run")
    assert done.returncode not in (0, 1), done.stdout + done.stderr
    assert f"cuda:{torch.cuda.device_count()} is not available here" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
