"""What preparing and encoding cost: rates at two sizes, memory, the share of the bare VAE, one new picture among many.

    make bench-data                        # a quarter of an hour on two cores
    python bench/data.py --small 200 --large 2000

Every measurement runs in a process of its own, on generated pictures and the embedded base. The smaller set is measured before and
after the larger, for machines drift, and its better time counts. Written to `bench/results/data.json`; compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.dataset.manifest import Manifest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "data.json"
SIDE = 128  # pixels of the pictures: a quarter and less of what people train on, for the models' work must not hide ours
ROUNDS = 16  # how often some pictures are encoded and given to the bare VAE, in turn
SHARED = {64: 960, 128: 240, 256: 64}  # pixels a side: how many pictures, which the VAE takes as long for
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=1000)
    parser.add_argument("--large", type=int, default=10_000)
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "FOLDER", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        ANONYMOUS.start()
        what, folder, side = args.child
        print(json.dumps(CHILDREN[what](Path(folder), int(side))))
        return
    results: dict[str, object] = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    with tempfile.TemporaryDirectory() as temporary:
        rows: dict[int, dict[str, dict[str, float]]] = {}
        for i, count in enumerate((args.small, args.large, args.small)):
            folder = Path(temporary) / f"{i}-{count}"
            draw(folder / "data", count)
            row = {what: child(what, folder) for what in ("prepare", "encode")}
            print(f"{count} pictures: " + ", ".join(f"{w} {r['rate']:.0f}/s, {r['mib']:.0f} MiB" for w, r in row.items()))
            before = rows.setdefault(count, row)
            rows[count] = {what: min(before[what], row[what], key=lambda r: r["seconds"]) for what in row}
        large = Path(temporary) / f"1-{args.large}"
        full = sum(rows[args.large][what]["seconds"] for what in ("prepare", "encode"))
        draw(large / "data", 1, first=args.large)
        one_more = {what: child(what, large) for what in ("prepare", "encode")}
        shares = {}
        for side, count in SHARED.items():
            folder = Path(temporary) / f"{side}-pixels"
            draw(folder / "data", count, side=side)
            child("prepare", folder, side)
            shares[side] = child("share", folder, side)
    small, big = rows[args.small], rows[args.large]
    results |= {
        "pictures": [args.small, args.large],
        "measured": {str(count): row for count, row in rows.items()},
        "cost per picture, large / small": {w: small[w]["rate"] / big[w]["rate"] for w in ("prepare", "encode")},
        "peak memory, large / small": {w: big[w]["mib"] / small[w]["mib"] for w in ("prepare", "encode")},
        "kilobytes more for each more picture": {
            w: (big[w]["anonymous_mib"] - small[w]["anonymous_mib"]) * 1024 / (args.large - args.small)
            for w in ("prepare", "encode")
        },
        "encode's rate as a share of the bare VAE's, by pixels a side": shares,
        "one new picture, as a share of a full run": sum(r["seconds"] for r in one_more.values()) / full,
        "one new picture, encoded": one_more["encode"]["pictures"],
    }
    print(json.dumps({k: v for k, v in results.items() if k != "measured"}, indent=2))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def child(what: str, folder: Path, side: int = SIDE) -> dict[str, float]:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--child", what, str(folder), str(side)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def draw(folder: Path, count: int, first: int = 0, side: int = SIDE) -> None:
    """Pictures of smooth noise, half as wide again as they are high, no two alike."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        small = np.random.default_rng(i).integers(0, 256, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(small).resize((side * 3 // 2, side), Image.Resampling.BICUBIC).save(folder / f"{i:06d}.jpg", quality=90)
        (folder / f"{i:06d}.txt").write_text(f"noise number {i % 50}")


def prepare(folder: Path, side: int) -> dict[str, float]:
    """prepare-dataset's own work."""
    from pipeline.config import Dataset
    from pipeline.dataset.manifest import write_manifest
    from pipeline.dataset.prepare import prepare as run

    start = time.perf_counter()
    prepared = run(folder, Dataset(path="data", resolution=side), lambda: None, folder / "unpacked")
    write_manifest(folder / "dataset", prepared.manifest, prepared.rejects)
    return measured(start, len(prepared.manifest.samples))


def encode(folder: Path, _: int) -> dict[str, float]:
    """precompute-latents-and-embeddings' own work, of sides as they were prepared; the models are loaded before the clock starts."""
    from pipeline.dataset.manifest import read_manifest

    model = Model()
    start = time.perf_counter()
    samples, encoded = model.encode(read_manifest(folder / "dataset"), folder, folder)
    return measured(start, samples) | {"pictures": encoded}


def share(folder: Path, side: int) -> dict[str, float]:
    """Encode's rate over that of the VAE's forward pass alone, on random pixels at hand in batches of the encoder's size: both
    in one process, in turn, for machines drift."""
    import torch

    from pipeline.dataset.manifest import read_manifest

    model, manifest = Model(), read_manifest(folder / "dataset")
    pixels, batches = torch.randn(8, 3, side, side), math.ceil(len(manifest.samples) / 8)
    encoding, alone = [], []  # pictures a second
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as fresh:
            start = time.perf_counter()
            _, encoded = model.encode(manifest, folder, Path(fresh))
            encoding.append(encoded / (time.perf_counter() - start))
        with torch.inference_mode():
            start = time.perf_counter()
            for _ in range(batches):
                model.kind.encode_pixels(model.vae, pixels)
            alone.append(8 * batches / (time.perf_counter() - start))
    ratios = [one / other for one, other in zip(encoding, alone, strict=True)]
    # neighbours on the machine only ever slow a round down: the best of each say most
    return {
        "of the best": max(encoding) / max(alone),
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
    }


class Model:
    """The embedded base, loaded."""

    def __init__(self) -> None:
        import torch

        from pipeline.families import family
        from pipeline.model_source import LocalModel

        self.kind, self.source = family("sd"), LocalModel(ROOT / "assets" / "tiny-sd", None, None)
        self.device = torch.device("cpu")
        self.vae = self.kind.load_vae(self.source, self.device, torch.float32)
        self.kind.load_text_encoders(self.source, self.device)

    def encode(self, manifest: Manifest, folder: Path, out: Path) -> tuple[int, int]:
        """The stage's work: how many samples there are, and how many pictures were not in the store under `out`."""
        from encoded import HOW

        from pipeline.encode import Todo
        from pipeline.encode import encode as run
        from pipeline.encoders import encode_todo
        from pipeline.encodings import ContentStore, write_encoded

        store = ContentStore(out / "store")

        def work(todo: Todo) -> None:
            encode_todo(todo, manifest, folder, self.kind, self.source, store, HOW, self.device, 1, lambda: None)

        index, counts = run(manifest, self.kind, self.source, store, HOW, work)
        write_encoded(out / "out", index, store)
        return len(index.samples), counts.pictures


def measured(start: float, count: int) -> dict[str, float]:
    """Seconds, pictures a second and peak memory since the process began."""
    seconds = time.perf_counter() - start
    # this process, or the largest of its decoding workers
    mib = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    return {"seconds": seconds, "rate": count / seconds, "mib": mib, "anonymous_mib": ANONYMOUS.mib}


class Anonymous(threading.Thread):
    """Looks again and again how much memory the process has that is no file's page: those the kernel takes back as it likes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mib = 0.0

    def run(self) -> None:
        while True:
            found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
            self.mib = max(self.mib, int(found[1]) / 1024 if found else 0.0)
            time.sleep(0.02)


ANONYMOUS = Anonymous()
CHILDREN = {"prepare": prepare, "encode": encode, "share": share}


if __name__ == "__main__":
    main()
