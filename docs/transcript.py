"""Records docs/transcript.md: a first project, from the wheel to a picture, as a terminal shows it.

    pip wheel . --no-deps --wheel-dir /tmp/wheel
    python docs/transcript.py /tmp/wheel/reprolora-*.whl

Takes some ten minutes on two cores. The commands are run in a folder that is thrown away, shown as ~.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PICTURES = 24
SECTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("An environment", ("python3 -m venv .venv", "source .venv/bin/activate", "pip install --quiet ./reprolora-*.whl")),
    (
        "A project of one's own, on the embedded base; `--preset sd15` and the like for a real one",
        (
            "ls pictures | head -n 4",
            "cat pictures/001.txt",
            "reprolora init mine --images pictures --preset demo --trigger nightglow",
            "cd mine",
            "ls -A",
            "reprolora check",
        ),
    ),
    ("The first run", ("reprolora run", "reprolora status", "git add --all && git commit --quiet --message 'First adapter'")),
    (
        "A parameter changed: what it affects runs",
        (
            "reprolora run --dry-run --set train.learning_rate=1e-3",
            "reprolora run --set train.learning_rate=1e-3",
            "reprolora diff HEAD",
            "git commit --quiet --all --message 'A third of the learning rate'",
        ),
    ),
    ("Several values tried", ("reprolora sweep --set lora.rank=8,16",)),
    ("Pictures", ('reprolora generate "a large red star in the middle on a white background, nightglow style" --count 2',)),
    ("And nothing is run twice", ("reprolora run | tail -n 18",)),
)
_NEXT = "\x1e"  # between two sections


def main() -> None:
    """Run the commands and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument(
        "--packages", type=Path, help="site-packages that hold the dependencies already; by default pip fetches them"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve()
        shutil.copy(arguments.wheel, home)
        (home / "pictures").mkdir()
        for i in range(1, PICTURES + 1):
            for end in ("png", "txt"):
                shutil.copy(HERE.parent / f"assets/demo-dataset/{i:03}.{end}", home / "pictures")
        done = subprocess.run(
            ["bash", "-c", _script(arguments.packages)], cwd=home, env=_environment(), capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{done.stdout}\nexit {done.returncode}")
        (HERE / "transcript.md").write_text(
            _page(done.stdout.replace(str(home), "~"), fetched=not arguments.packages), encoding="utf-8"
        )


def _script(packages: Path | None) -> str:
    lines = ["set -eo pipefail", "exec 2>&1"]
    for i, (_, commands) in enumerate(SECTIONS):
        lines += [f"printf '{_NEXT}'"] if i else []
        for command in commands:
            lines += [f"printf '%s\\n' {shlex.quote('$ ' + command)}", command]
            if packages and command.startswith("python3 -m venv"):
                lines.append(
                    f"echo {shlex.quote(str(packages.resolve()))} > $(echo .venv/lib/python*/site-packages)/packages.pth"
                )
    return "\n".join(lines)


def _environment() -> dict[str, str]:
    who = {
        f"GIT_{role}_{what}": value
        for role in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "me"), ("EMAIL", "me@example.org"))
    }
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("REPROLORA", "MLFLOW", "DVC", "VIRTUAL_ENV"))}
    return {**kept, **who, "COLUMNS": "110", "TERM": "dumb", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_WAIT_POLICY": "passive"}


def _page(output: str, fetched: bool) -> str:
    packages = "" if fetched else "; what the wheel depends on was there already"
    told = f"From the wheel to a picture, as a terminal shows it; recorded by `docs/transcript.py` on a CPU{packages}."
    head = f"# A first project\n\n{told}\n"
    parts = [
        f"\n## {title}\n\n```console\n{text.rstrip()}\n```\n"
        for (title, _), text in zip(SECTIONS, output.split(_NEXT), strict=True)
    ]
    return head + "".join(parts)


if __name__ == "__main__":
    main()
