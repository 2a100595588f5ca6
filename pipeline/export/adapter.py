"""An adapter in memory, whatever file it came from: layers with their factors, rank and α.

ΔW of a layer, with s = α / r:
    LoRA, DoRA  s · B A                                (Hu et al. 2021, arXiv 2106.09685; Liu et al. 2024, arXiv 2402.09353)
    LoHa        s · (W1a W1b) ⊙ (W2a W2b)              (Hyeon-Woo et al. 2021, arXiv 2108.06098)
    LoKr        s · W1 ⊗ W2, each whole or a product   (Yeh et al. 2023, arXiv 2309.14859)
DoRA's magnitude then scales the rows of W + ΔW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.errors import UserError

Kind = Literal["lora", "dora", "loha", "lokr"]
_LORA = {"lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale"}


@dataclass(frozen=True)
class Layer:
    """One layer's factors, under the names that Kohya's scripts and LyCORIS give them.

    `lora_down.weight` (r, in) or (r, in, k, k), `lora_up.weight` (out, r) or (out, r, 1, 1), `dora_scale` (out, 1) or
    (out, 1, 1, 1); `hada_w1_a` (out, r), `hada_w1_b` (r, in · k · k), …; `lokr_w1` (p, q), `lokr_w2` (out/p, in/q, …), ….
    """

    parts: dict[str, Tensor]
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """α / r."""
        return self.alpha / self.rank

    @property
    def kind(self) -> Kind:
        if "dora_scale" in self.parts:
            return "dora"
        if any(part.startswith("hada_") for part in self.parts):
            return "loha"
        if any(part.startswith("lokr_") for part in self.parts):
            return "lokr"
        return "lora"


@dataclass(frozen=True)
class Adapter:
    """Layers by `<component>.<module path>` under diffusers' names: `unet.down_blocks.0.….to_q`,
    `text_encoder.text_model.encoder.layers.0.….q_proj`."""

    layers: dict[str, Layer]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of layers in it, sorted; one in all but odd files."""
        return tuple(sorted({layer.kind for layer in self.layers.values()}))

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(sorted({name.split(".", 1)[0] for name in self.layers}))

    def of(self, component: str) -> dict[str, Layer]:
        """A component's layers by their module paths within it."""
        start = component + "."
        return {name.removeprefix(start): layer for name, layer in self.layers.items() if name.startswith(start)}

    def map(self, change: Callable[[Layer], Layer]) -> Adapter:
        return Adapter({name: change(layer) for name, layer in self.layers.items()})


def layer_of(parts: dict[str, Tensor], alpha: float | None, name: str) -> Layer:
    """A layer out of its factors; α is the rank where a file states none. Files with half a layer are refused."""
    rank = _rank(parts)
    if rank is None:  # LoKr with both factors whole: loaders take the scale for 1, whatever α says
        rank = max(1, round(alpha)) if alpha else 1
        alpha = float(rank)
    missing = _missing(parts)
    if missing:
        raise UserError(f"the layer {name} is not whole: it has {', '.join(sorted(parts))} and no {missing}")
    return Layer(parts, rank, float(rank) if alpha is None else alpha)


def delta(layer: Layer) -> Tensor:
    """ΔW in float32, (out, in) or (out, in, k, k); of a flattened convolution (out, in · k · k). DoRA's magnitude is not in it."""
    p = {name: tensor.float() for name, tensor in layer.parts.items()}
    if layer.kind in ("lora", "dora"):
        if "lora_mid.weight" in p:  # CP decomposition of a convolution
            up, mid, down = p["lora_up.weight"].flatten(1), p["lora_mid.weight"], p["lora_down.weight"].flatten(1)
            return torch.einsum("or,rskl,si->oikl", up, mid, down) * layer.scale
        down, up = p["lora_down.weight"], p["lora_up.weight"]
        product = up.flatten(1) @ down.flatten(1)
        return (product * layer.scale).reshape(up.shape[0], *down.shape[1:])
    if layer.kind == "loha":
        if "hada_t1" in p:
            halves = [torch.einsum("rskl,ro,si->oikl", p[f"hada_t{i}"], p[f"hada_w{i}_a"], p[f"hada_w{i}_b"]) for i in (1, 2)]
        else:
            halves = [p[f"hada_w{i}_a"] @ p[f"hada_w{i}_b"] for i in (1, 2)]
        return halves[0] * halves[1] * layer.scale
    w1 = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    if "lokr_t2" in p:
        w2 = torch.einsum("rskl,ro,si->oikl", p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
    else:
        w2 = p["lokr_w2"] if "lokr_w2" in p else p["lokr_w2_a"] @ p["lokr_w2_b"]
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.dim() - 2)), w2) * layer.scale


def resized(adapter: Adapter, rank: int) -> Adapter:
    """The best approximation of rank at most `rank` to each ΔW (Eckart and Young: the largest singular values). A layer's scale
    α / r stays what it was; layers of less rank are left alone; LoHa and LoKr become LoRA.

    Raises:
        UserError: every layer is smaller already.
    """
    largest = max(layer.rank for layer in adapter.layers.values())
    if set(adapter.kinds) <= {"lora", "dora"} and rank > largest:
        raise UserError(f"rank {rank} is more than the adapter has ({largest}): a resize only makes it smaller")
    return adapter.map(lambda layer: _resized(layer, rank))


def combined(weighted: Sequence[tuple[Adapter, float]], rank: int | None = None) -> Adapter:
    """One adapter whose ΔW is Σ wᵢ ΔWᵢ, exactly: factors side by side, so ranks add up; then resized if asked.

    Raises:
        UserError: one of them is a DoRA, whose magnitudes do not add.
    """
    for adapter, _ in weighted:
        if "dora" in adapter.kinds:
            raise UserError(
                "a DoRA adapter cannot be combined with others: its magnitudes scale the base's weights, and do not add"
            )
    layers = {}
    for name in sorted({name for adapter, _ in weighted for name in adapter.layers}):
        factors = [(_as_lora(a.layers[name]), w) for a, w in weighted if name in a.layers]
        downs = [layer.parts["lora_down.weight"].float() for layer, _ in factors]
        ups = [layer.parts["lora_up.weight"].float() * (w * layer.scale) for layer, w in factors]
        if len({tuple(d.shape[1:]) for d in downs}) > 1:
            raise UserError(f"the adapters are for different bases: {name} has inputs of {[tuple(d.shape[1:]) for d in downs]}")
        down, up = torch.cat(downs, dim=0), torch.cat(ups, dim=1)
        layers[name] = Layer({"lora_down.weight": down, "lora_up.weight": up}, down.shape[0], float(down.shape[0]))
    whole = Adapter(layers)
    return resized(whole, rank) if rank is not None else whole


def _resized(layer: Layer, rank: int) -> Layer:
    if layer.kind in ("loha", "lokr") or "lora_mid.weight" in layer.parts:
        return _factored(delta(layer), rank, 1.0)
    if layer.rank <= rank:
        return layer
    down, up = layer.parts["lora_down.weight"].float(), layer.parts["lora_up.weight"].float()
    # of a product of thin factors: two QRs and the decomposition of an r × r matrix
    q_up, r_up = torch.linalg.qr(up.flatten(1))
    q_down, r_down = torch.linalg.qr(down.flatten(1).T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T)
    root = s[:rank].sqrt()
    parts = {
        "lora_down.weight": (root[:, None] * (vh[:rank] @ q_down.T)).reshape(rank, *down.shape[1:]),
        "lora_up.weight": ((q_up @ u[:, :rank]) * root).reshape(up.shape[0], rank, *up.shape[2:]),
    }
    if "dora_scale" in layer.parts:
        parts["dora_scale"] = layer.parts["dora_scale"]
    return Layer(parts, rank, layer.scale * rank)


def _as_lora(layer: Layer) -> Layer:
    """The same ΔW as a LoRA layer."""
    if layer.kind == "lora" and "lora_mid.weight" not in layer.parts:
        return layer
    change = delta(layer)
    return _factored(change, min(change.flatten(1).shape), 1.0)


def _factored(change: Tensor, rank: int, scale: float) -> Layer:
    u, s, vh = torch.linalg.svd(change.flatten(1), full_matrices=False)
    significant = int((s > s[0] * 1e-6).sum()) if len(s) and s[0] > 0 else 1
    kept = max(1, min(rank, significant))
    root = s[:kept].sqrt()
    up, down = u[:, :kept] * root, root[:, None] * vh[:kept]
    if change.dim() == 4:
        up, down = up[:, :, None, None], down.reshape(kept, *change.shape[1:])
    return Layer({"lora_down.weight": down, "lora_up.weight": up}, kept, scale * kept)


def _rank(parts: dict[str, Tensor]) -> int | None:
    for part in ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if part in parts:
            return parts[part].shape[0]
    return None


def _missing(parts: dict[str, Tensor]) -> str | None:
    names = set(parts)
    if names & _LORA:
        required = {"lora_down.weight", "lora_up.weight"}
    elif "hada_w1_a" in names or "hada_w1_b" in names or "hada_w2_a" in names:
        required = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
    else:
        required = {f"lokr_{w}" if f"lokr_{w}" in names else f"lokr_{w}_{half}" for w in ("w1", "w2") for half in "ab"}
    return ", ".join(sorted(required - names)) or None
