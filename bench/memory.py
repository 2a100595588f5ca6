"""What a training step takes on a GPU beside the network, by pictures a forward pass: what `check` tells is fitted to this.

    python bench/memory.py                # a minute or two on an H200

Networks of full size with random weights in bf16, rank 16 on the attention, through the real loop. MiB a megapixel of the picture are
the peak less what is there between two steps, over micro-batch and area. Written to `bench/results/memory.json`.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch  # noqa: E402
from train import LATENT, full_size, ours  # noqa: E402

from pipeline.device import pick_device  # noqa: E402

STEPS = 4


def main() -> None:
    """Print a line each and keep them."""
    device, rows = pick_device("cuda"), []
    for size in ("sd15", "sdxl"):
        for micro in (1, 2, 4):
            with TemporaryDirectory() as folder:
                network, batches = full_size(size, Path(folder), device, micro)
                for checkpointing in (False, True):  # in this order: it cannot be turned off again
                    rows.append(measured(size, micro, checkpointing, network, batches, device))
                    print(json.dumps(rows[-1]), flush=True)
                del network, batches
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    out = ROOT / "bench" / "results" / "memory.json"
    out.write_text(json.dumps({"machine": machine, "precision": "bf16", "measured": rows}, indent=2) + "\n")


def measured(size: str, micro: int, checkpointing: bool, network: Any, batches: Any, device: torch.device) -> dict[str, Any]:
    """Some steps of the loop."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    ours(STEPS, network, batches, size, device, gradient_checkpointing=checkpointing)()
    still, peak = torch.cuda.memory_allocated() / 2**20, torch.cuda.max_memory_allocated() / 2**20
    megapixels = micro * (LATENT[size] * 8) ** 2 / 1e6
    return {
        "size": size,
        "micro_batch": micro,
        "gradient_checkpointing": checkpointing,
        "peak MiB": round(peak),
        "reserved MiB": round(torch.cuda.max_memory_reserved() / 2**20),
        "MiB between steps": round(still),
        "MiB a megapixel": round((peak - still) / megapixels),
    }


if __name__ == "__main__":
    main()
