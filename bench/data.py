"""What preparing and encoding cost: rates at two sizes, memory, the share of the bare VAE, one new picture among many.

    make bench-data                        # some minutes on two cores
    python bench/data.py --small 200 --large 2000

Every measurement runs in a process of its own, on generated pictures and the embedded base. Written to
`bench/results/data.json`; compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "data.json"
SIDE = 64  # pixels of the pictures
ROUNDS = 3  # of encode and the bare VAE in turn
WIDE, WIDE_COUNT = 256, 160  # some larger ones, which the VAE takes sixteen times as long for
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
        rows = {}
        for count in (args.small, args.large):
            folder = Path(temporary) / str(count)
            draw(folder / "data", count)
            rows[count] = {what: child(what, folder) for what in ("prepare", "encode")}
            print(
                f"{count} pictures: " + ", ".join(f"{w} {r['rate']:.0f}/s, {r['mib']:.0f} MiB" for w, r in rows[count].items())
            )
        large = Path(temporary) / str(args.large)
        full = sum(rows[args.large][what]["seconds"] for what in ("prepare", "encode"))
        draw(large / "data", 1, first=args.large)
        one_more = {what: child(what, large) for what in ("prepare", "encode")}
        wide = Path(temporary) / "wide"
        draw(wide / "data", WIDE_COUNT, side=WIDE)
        child("prepare", wide, WIDE)
        rates = [rows[args.large]["encode"]["rate"] / child("bare", large)["rate"] for _ in range(ROUNDS)]
        shares = {SIDE: spread(rates), WIDE: share(wide, WIDE)}
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


def share(folder: Path, side: int) -> dict[str, float]:
    """Encode's rate over the bare VAE's, in rounds: machines drift."""
    found = []
    for _ in range(ROUNDS):
        for made in ("store", "out"):
            shutil.rmtree(folder / made, ignore_errors=True)
        found.append(child("encode", folder, side)["rate"] / child("bare", folder, side)["rate"])
    return spread(found)


def spread(values: list[float]) -> dict[str, float]:
    """Of ratios."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


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
    import torch
    from encoded import HOW

    from pipeline.dataset.manifest import read_manifest
    from pipeline.encode import Todo
    from pipeline.encode import encode as run
    from pipeline.encoders import encode_todo
    from pipeline.encodings import ContentStore, write_encoded
    from pipeline.families import family
    from pipeline.model_source import LocalModel

    manifest, kind, model = read_manifest(folder / "dataset"), family("sd"), LocalModel(ROOT / "assets" / "tiny-sd", None, None)
    store, device = ContentStore(folder / "store"), torch.device("cpu")
    kind.load_vae(model, device, torch.float32)
    kind.load_text_encoders(model, device)

    def work(todo: Todo) -> None:
        encode_todo(todo, manifest, folder, kind, model, store, HOW, device, 1, lambda: None)

    start = time.perf_counter()
    index, counts = run(manifest, kind, model, store, HOW, work)
    write_encoded(folder / "out", index, store)
    return measured(start, len(index.samples)) | {"pictures": counts.pictures}


def bare(folder: Path, side: int) -> dict[str, float]:
    """The VAE's forward pass alone, on random pixels at hand, in batches of the encoder's size."""
    import torch

    from pipeline.families import family
    from pipeline.model_source import LocalModel

    kind = family("sd")
    vae = kind.load_vae(LocalModel(ROOT / "assets" / "tiny-sd", None, None), torch.device("cpu"), torch.float32)
    pixels, batches = torch.randn(8, 3, side, side), max(10, 250 * SIDE**2 // side**2)
    with torch.inference_mode():
        for _ in range(10):
            kind.encode_pixels(vae, pixels)
        start = time.perf_counter()
        for _ in range(batches):
            kind.encode_pixels(vae, pixels)
    return measured(start, 8 * batches)


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
CHILDREN = {"prepare": prepare, "encode": encode, "bare": bare}


if __name__ == "__main__":
    main()
