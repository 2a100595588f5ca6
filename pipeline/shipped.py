"""Where the files lie that come with the code: presets, the embedded base, `dvc.yaml` and what else a project is made of."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UserError

CODE = Path(__file__).resolve().parent.parent  # `pipeline/` and `stages/` lie here: the checkout, or site-packages


def shipped(name: str) -> Path:
    """A file or folder of the checkout that this is; else of the installation's `share/reprolora`.

    Raises:
        UserError: the installation lacks it.
    """
    # the nearest `share` above the code is the one of its own installation, whether in an environment, for a user or a system
    for folder in (CODE, *(parent / "share" / "reprolora" for parent in (CODE, *CODE.parents))):
        if (folder / "dvc.yaml").is_file() and (folder / name).exists():
            return folder / name
    raise UserError(f"share/reprolora/{name} is missing beside {CODE}: install reprolora again")
