"""What bitsandbytes brings: a base in 8 or 4 bits, and AdamW with its state in 8 bits. `make test-extras` runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from encoded import encode_folder
from test_train import SPEC, Bench, performed, same

from pipeline import lora
from pipeline.config import load_params
from pipeline.encodings import Encodings
from pipeline.errors import Interrupted
from pipeline.families import family
from pipeline.model_source import LocalModel
from pipeline.quantise import quantise
from pipeline.safetensors_file import read_safetensors
from pipeline.workspace import ENCODED

pytest.importorskip("bitsandbytes", reason="pip install '.[8bit]'; `make test-extras` does")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.05), ("nf4", 0.4)])
def test_a_quantised_base_is_near_the_base_and_its_adapter_learns(sd_folder: Path, kind: str, tolerance: float) -> None:
    model, sd = LocalModel(sd_folder, None, None), family("sd")
    plain, small = (sd.load_denoiser(model, torch.float32) for _ in range(2))
    plain.to(DEVICE)
    quantise(small, kind, DEVICE)
    args = tuple(x.to(DEVICE) for x in (torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 16, 16)))
    with torch.no_grad():
        a, b = (net(args[0], args[1], encoder_hidden_states=args[2]).sample for net in (plain, small))
    assert 0 < float((a - b).norm() / a.norm()) < tolerance
    weights = dict(small.named_parameters())
    assert weights["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"].dtype in (torch.int8, torch.uint8)
    parameters = lora.inject(small, lora.LoraSpec(2, 2.0, 0.0, ("to_q", "to_v")), 0)
    small.to(DEVICE)
    assert all(p.dtype == torch.float32 for p in parameters)
    optimiser = torch.optim.AdamW(parameters, lr=0.01)
    losses = []
    for _ in range(20):
        loss = small(args[0], args[1], encoder_hidden_states=args[2]).sample.square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {k.split(".lora_")[0] for k in lora.state(small)} == {k.split(".lora_")[0] for k in _adapted(plain)}


def _adapted(denoiser: torch.nn.Module) -> list[str]:
    lora.inject(denoiser, lora.LoraSpec(2, 2.0, 0.0, ("to_q", "to_v")), 0)
    return list(lora.state(denoiser))


@pytest.fixture(scope="module")
def encodings(tmp_path_factory: pytest.TempPathFactory, pictures_folder: Path, sd_folder: Path) -> Encodings:
    out = tmp_path_factory.mktemp("encoded")
    return encode_folder(pictures_folder, sd_folder, out / "store", out / "out", held_out_fraction=0.0)[0]


def test_adamw8bit_moves_resumes_to_the_bit_and_keeps_its_state_small(
    encodings: Encodings, sd_folder: Path, tmp_path: Path
) -> None:
    """Of a large rank: bitsandbytes leaves the state of small tensors in 32 bits."""
    bench, spec = Bench(encodings, sd_folder, tmp_path, device=DEVICE), lora.LoraSpec(256, 256.0, 0.0, SPEC.targets)
    options = {"optimiser": "adamw8bit", "ema_decay": 0.9, "schedule": "cosine", "warmup_steps": 2}
    for name in ("whole", "parts", "other"):
        (tmp_path / name).mkdir()
    whole = bench.train("whole", micro=3, spec=spec, **options)
    with pytest.raises(Interrupted):
        bench.train("parts", micro=3, stop_at=5, spec=spec, **options)
    assert same(whole, bench.train("parts", micro=3, spec=spec, **options))
    assert not same(whole, bench.train("other", micro=3, spec=spec, **{**options, "optimiser": "adamw"}))
    last = sorted((tmp_path / "whole" / "checkpoints").iterdir())[-1]
    state = read_safetensors(last / "optimiser.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in state.values())


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_training_on_a_quantised_base_goes_on_to_the_same_bytes(
    kind: str, new_project: Callable[..., object], pictures_folder: Path, sd_folder: Path, tmp_path: Path
) -> None:
    """Through what the stage calls, from settings to the adapter of a base as it was published."""
    project = new_project()
    project.set("train", quantise_base=kind, steps=6)
    project.set("runtime", device=DEVICE.type)
    params = load_params(project.path("params.yaml"))
    encode_folder(pictures_folder, sd_folder, tmp_path / "store", project.root / ENCODED)

    whole = performed(params, project.root, tmp_path / "whole")
    with pytest.raises(Interrupted):
        performed(params, project.root, tmp_path / "parts", stop_at=3)
    assert same(whole, performed(params, project.root, tmp_path / "parts"))
    assert all(tensor.dtype == torch.float32 for tensor in whole.values())
    plain = family("sd").load_denoiser(LocalModel(sd_folder, None, None), torch.float32)
    lora.inject(plain, lora.LoraSpec(**params.lora.model_dump(exclude={"init_from", "text_encoder"})), 0)
    lora.load_state(plain, whole)  # fits the base that was never rounded
