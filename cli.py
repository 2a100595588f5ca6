"""The command line. Imports nothing heavy before a command needs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import EXIT_ALREADY_RUNNING, EXIT_INTERRUPTED, EXIT_USER_ERROR, AlreadyRunning, Interrupted, UserError

app = typer.Typer(
    help="Train a LoRA for Stable Diffusion as a reproducible build.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def run(
    stage: Annotated[str | None, typer.Argument(help="Bring only this stage and those before it up to date.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change params.yaml first.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Run even what is up to date; training starts from scratch.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run and why, and change nothing.")] = False,
) -> None:
    """Bring the pipeline up to date: DVC runs the stages whose inputs changed."""
    from pipeline.config import load_params
    from pipeline.dataset.sidecar import require_folder
    from pipeline.dvc import reproduce
    from pipeline.edit import preview_values, set_values
    from pipeline.summary import print_status, print_summary
    from pipeline.workspace import Workspace

    workspace = Workspace.here()
    _check_stage_name(stage)
    if dry_run:
        print_status(workspace, up_to=stage, pending=preview_values(workspace, set_ or []))
        return
    for change in set_values(workspace, set_ or []):
        typer.echo(f"params.yaml: {change}")
    require_folder(workspace.root / load_params(workspace.params).dataset.path)
    code, outcomes = reproduce(workspace, stage, force)
    print_summary(workspace, outcomes)
    if code:
        raise typer.Exit(_exit_code(code, [o.what for o in outcomes]))


@app.command()
def stage(name: Annotated[str, typer.Argument(help="One of the five stages.")]) -> None:
    """Run one stage's work here and now; dvc.yaml calls this."""
    from stages import run as run_stage

    _check_stage_name(name)
    run_stage(name)


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Say which stages would run, and why."""
    from pipeline.summary import print_status
    from pipeline.workspace import Workspace

    print_status(Workspace.here(), as_json=as_json)


@app.command()
def check() -> None:
    """Validate params.yaml and look at the environment, the base model and the pictures, before anything runs."""
    from pipeline.check import check_all
    from pipeline.workspace import Workspace

    if not check_all(Workspace.here()):
        raise typer.Exit(EXIT_USER_ERROR)


@app.command()
def pin() -> None:
    """Fill in the revisions of the base and CLIP models in params.yaml."""
    from pipeline.check import pin_models
    from pipeline.workspace import Workspace

    changes = pin_models(Workspace.here())
    for change in changes:
        typer.echo(f"params.yaml: {change}")
    if not changes:
        typer.echo("params.yaml: every model is pinned already")


@app.command()
def generate(
    prompt: str,
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter file; by default the exported one; 'none' for the base alone.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Weight of the adapter.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the first picture; the next ones count up.")] = 0,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Number of pictures.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("generated"),
) -> None:
    """Draw pictures with the base of params.yaml and an adapter."""
    from pipeline.generate import generate as draw
    from pipeline.workspace import Workspace

    for path in draw(Workspace.here(), prompt, adapter, scale, seed, count, out):
        typer.echo(path)


@app.command()
def sync() -> None:
    """Log to MLflow whatever it lacks of the results that lie here."""
    from pipeline.config import load_params
    from pipeline.tracking import sync as fill
    from pipeline.workspace import Workspace

    workspace = Workspace.here()
    gained = fill(workspace, load_params(workspace.params).tracking)
    for line in gained:
        typer.echo(f"logged {line}")
    if not gained:
        typer.echo("MLflow has everything")


@app.command()
def ui(port: Annotated[int, typer.Option(help="On this machine.")] = 5000) -> None:
    """Open MLflow's UI on this project's store."""
    from pipeline.config import load_params
    from pipeline.tracking import default_uri
    from pipeline.workspace import Workspace

    workspace = Workspace.here()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or load_params(workspace.params).tracking.uri
    if uri and uri.startswith("http"):
        typer.echo(f"the store is a server with a UI of its own: {uri}")
        return
    if not uri and not workspace.mlruns.is_dir():
        raise UserError("there is nothing to show yet: run the pipeline first, or fill MLflow with `python cli.py sync`")
    typer.echo(f"MLflow UI on http://127.0.0.1:{port} (Ctrl-C ends it)")
    arguments = [
        "mlflow",
        "ui",
        "--backend-store-uri",
        uri or default_uri(workspace),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    os.execv(sys.executable, [sys.executable, "-m", *arguments])


def _check_stage_name(name: str | None) -> None:
    from stages import STAGES

    if name is not None and name not in STAGES:
        import difflib

        near = difflib.get_close_matches(name, STAGES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(STAGES)}"
        raise UserError(f"no stage is called {name!r}: {hint}")


def _exit_code(dvc_code: int, outcomes: list[str]) -> int:
    """DVC turns every failure of a stage into its own 255; give the stage's meaning back."""
    meanings = {"interrupted": EXIT_INTERRUPTED, "already running": EXIT_ALREADY_RUNNING, "refused": EXIT_USER_ERROR}
    found = [meanings[what] for what in outcomes if what in meanings]
    return found[0] if found else dvc_code if 0 < dvc_code < 255 else 1


def main() -> None:
    """Entry point: errors that are the user's to mend are one message, without a traceback."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "MLFLOW_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "true")
    try:
        app()
    except AlreadyRunning as error:
        _fail(error, EXIT_ALREADY_RUNNING)
    except UserError as error:
        _fail(error, EXIT_USER_ERROR)
    except Interrupted as error:
        typer.echo(f"stopped: {error}", err=True)
        sys.exit(EXIT_INTERRUPTED)


def _fail(error: Exception, code: int) -> None:
    typer.echo(f"error: {error}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
