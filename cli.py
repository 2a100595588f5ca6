"""The command line. Imports nothing heavy before a command needs it."""

from __future__ import annotations

import gc
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import EXIT_ALREADY_RUNNING, EXIT_INTERRUPTED, EXIT_USER_ERROR, AlreadyRunning, Interrupted, UserError

if TYPE_CHECKING:
    from pipeline.dvc_process import Waiting
    from pipeline.workspace import Workspace

app = typer.Typer(
    help="Train a LoRA for Stable Diffusion as a reproducible build.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


data = typer.Typer(help="Look at the pictures and captions.", no_args_is_help=True)
cache = typer.Typer(help="Look after the store of encodings.", no_args_is_help=True)
app.add_typer(data, name="data")
app.add_typer(cache, name="cache")


@app.command()
def run(
    stage: Annotated[str | None, typer.Argument(help="Bring only this stage and those before it up to date.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change params.yaml first; @FILE is a list of its lines."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run even what is up to date; training starts from scratch.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run and why, and change nothing.")] = False,
    pull: Annotated[bool, typer.Option("--pull", help="First take what a DVC remote has.")] = False,
    push: Annotated[bool, typer.Option("--push", help="Then send what is finished there, after a failure too.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Models that are not pinned are errors, as in CI.")] = False,
) -> None:
    """Bring the pipeline up to date: DVC runs the stages whose inputs changed."""
    from pipeline.dvc_process import Waiting, start
    from pipeline.live import can_be_live
    from pipeline.workspace import Workspace

    workspace = Workspace.here()
    _check_stage_name(stage)
    if dry_run:
        from pipeline.edit import preview_values
        from pipeline.summary import print_status

        pending = preview_values(workspace, set_ or [])
        print_status(workspace, start(workspace.root, "status", "--json"), up_to=stage, pending=pending)
        return
    if strict:
        os.environ["REPROLORA_STRICT"] = "1"
    with Waiting(workspace.root, caught=can_be_live()) as dvc:  # first: it loads itself while we do
        from pipeline.dvc import sole_run

        with sole_run(workspace):
            _run(workspace, dvc, stage, set_ or [], force, pull, push)


def _run(
    workspace: Workspace, dvc: Waiting, stage: str | None, assignments: list[str], force: bool, pull: bool, push: bool
) -> None:
    from pipeline import share
    from pipeline.config import load_params
    from pipeline.dataset.source import require_folder
    from pipeline.dvc import reproduce
    from pipeline.edit import set_values
    from pipeline.renew import renew
    from pipeline.summary import print_summary

    for change in set_values(workspace, assignments):
        typer.echo(f"params.yaml: {change}")
    for line in renew(workspace.root):
        typer.echo(line)
    fetched = share.pull(workspace) if pull else False
    require_folder(workspace.root / load_params(workspace.params).dataset.path)
    code, outcomes = reproduce(workspace, dvc, stage, force, fetched)
    unsent = None
    if push:
        try:
            share.push(workspace)
        except UserError as error:  # told last, and never instead of how the run itself ended
            unsent = error
    print_summary(workspace, outcomes)
    if unsent and code:
        typer.echo(f"error: {unsent}", err=True)
    if code:
        raise typer.Exit(_exit_code(code, [o.what for o in outcomes]))
    if unsent:
        raise unsent


@app.command()
def stage(name: Annotated[str, typer.Argument(help="One of the five stages.")]) -> None:
    """Run one stage's work here and now; dvc.yaml calls this."""
    from stages import run as run_stage

    _check_stage_name(name)
    run_stage(name)


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Say which stages would run, and why."""
    from pipeline.dvc_process import start
    from pipeline.workspace import Workspace

    workspace = Workspace.here()
    asked = start(workspace.root, "status", "--json")  # first: what follows is imported while DVC looks
    from pipeline.summary import print_status

    print_status(workspace, asked, as_json=as_json)


@app.command()
def check() -> None:
    """Validate params.yaml and look at the environment, the base model and the pictures, before anything runs."""
    from pipeline.check import check_all
    from pipeline.workspace import Workspace

    if not check_all(Workspace.here()):
        raise typer.Exit(EXIT_USER_ERROR)


@app.command()
def diff(revision: Annotated[str, typer.Argument(metavar="REV", help="A commit, tag, branch or experiment.")] = "HEAD") -> None:
    """Compare settings, metrics and samples with another revision's: a table here, and reports/diff.html."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from pipeline.page.diff import differences, write_diff
    from pipeline.workspace import Workspace

    workspace = Workspace.here()
    for title, rows in zip(("setting", "metric"), differences(workspace, revision), strict=True):
        table = Table(title, revision, "now", "", box=None, pad_edge=False)
        for row in rows:
            word = {True: "better", False: "worse", None: ""}[row.better]
            table.add_row(*(escape(text) for text in (row.what, row.then, row.now, word)))
        Console().print(table if rows else f"every {title} is the same")
    typer.echo(write_diff(workspace, revision))


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where the project is to lie.")],
    images: Annotated[
        str, typer.Option(metavar="FOLDER|hf://OWNER/NAME[@REVISION]", help="Pictures with captions; copied, or fetched.")
    ],
    preset: Annotated[str, typer.Option(help="sd15, sd21, sdxl, sd3, or demo for the embedded base.")] = "sd15",
    trigger: Annotated[str, typer.Option(help="Word that calls the style or subject up.")] = "",
) -> None:
    """Make a project of one's own that uses this reprolora: pictures and settings that suit them, under git and DVC."""
    from pipeline.init_project import init_project

    proposals = init_project(folder, images, preset, trigger)
    for proposal in proposals:
        typer.echo(f"  {proposal.key}: {proposal.value}  ({proposal.reason})")
    if not proposals:
        typer.echo("  no loose picture was found to measure: the preset's settings stay")
    typer.echo(f"{folder} is ready: its README says how to go on")


@app.command("import-config")
def import_config(
    file: Annotated[
        Path,
        typer.Argument(help="A .toml of sd-scripts, a .yaml of ai-toolkit, or a file with a diffusers script's command line."),
    ],
    out: Annotated[Path, typer.Option(help="What to write.")] = Path("params.yaml"),
    family: Annotated[str | None, typer.Option(help="sd or sdxl, where the file's names do not tell.")] = None,
) -> None:
    """Translate another trainer's settings to params.yaml, and list what has no equivalent."""
    from pipeline.import_config import import_config as translate
    from pipeline.shipped import shipped

    if family not in (None, "sd", "sdxl"):
        raise UserError(f"--family {family}: sd or sdxl")
    made = translate(file, shipped("presets"), out, family)
    for line in made.carried:
        typer.echo(f"  {line}")
    for line in made.dropped:
        typer.echo(f"  no equivalent: {line}")
    typer.echo(f"{out}: a preset for {made.family} with these values; `reprolora check` looks at the rest")


@app.command()
def sweep(
    set_: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=A,B,...", help="Values to try; several make a grid. LOW..HIGH with --search."),
    ],
    metric: Annotated[str, typer.Option(help="What the best is best by (docs/metrics.md).")] = "held_out_loss_ratio",
    jobs: Annotated[int, typer.Option("-j", "--jobs", min=1, help="Experiments at once.")] = 1,
    search: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="N trials that Optuna proposes, instead of a grid (extra: search).")
    ] = None,
) -> None:
    """Try combinations of settings, a DVC experiment each; the best first. A sweep that was cut off goes on."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from pipeline.page.html import number
    from pipeline.search import search as run_proposed
    from pipeline.sweep import sweep as run_all
    from pipeline.sweep import write_sweep
    from pipeline.workspace import Workspace

    workspace = Workspace.here()
    trials = run_proposed(workspace, set_, metric, jobs, search) if search else run_all(workspace, set_, metric, jobs)
    table = Table("settings", metric, "experiment", box=None, pad_edge=False)
    for trial in trials:
        value = number(trial.metrics.get(metric)) if trial.metrics else "failed"
        table.add_row(escape(" ".join(trial.changes)), value, trial.name)
    Console().print(table)
    typer.echo(write_sweep(workspace, trials, metric))
    if trials[0].metrics.get(metric) is not None:
        typer.echo(f"`reprolora apply {trials[0].name}` takes the best over")
    if any(not trial.metrics for trial in trials):
        raise typer.Exit(1)


@app.command()
def apply(experiment: Annotated[str, typer.Argument(help="As the sweep's table names it.")]) -> None:
    """Bring an experiment's settings and results into the workspace."""
    from pipeline.dvc import sole_run
    from pipeline.sweep import apply as take_over
    from pipeline.workspace import Workspace

    workspace = Workspace.here()
    with sole_run(workspace):
        take_over(workspace, experiment)
    typer.echo(f"{experiment} is applied: `reprolora run` brings the rest up to date")


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="The page docs/parameters.md instead.")] = False,
) -> None:
    """Print the JSON schema of params.yaml; params.schema.json is this, committed."""
    from pipeline.parameters import parameters_page
    from pipeline.schema import schema_text
    from pipeline.shipped import shipped

    params = shipped("params.yaml")
    typer.echo(parameters_page(params, shipped("dvc.yaml")) if markdown else schema_text(params), nl=False)


@app.command()
def report() -> None:
    """Write reports/index.html, the page to look at, from what the last run left; `run` does it too."""
    from pipeline.page.report import write_page
    from pipeline.workspace import Workspace

    typer.echo(write_page(Workspace.here()))


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
def fetch(
    source: Annotated[str | None, typer.Argument(metavar="hf://OWNER/NAME[@REVISION]", help="A dataset of the Hub.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Move the pin to the newest commit; alone, all pins.")] = False,
) -> None:
    """Bring a dataset of the Hub under data/, pinned to a commit."""
    from pipeline.fetch import fetch as fetch_one
    from pipeline.fetch import update_all
    from pipeline.workspace import Workspace

    root = Workspace.here().root
    if source is None and not update:
        raise UserError("which dataset? `reprolora fetch hf://owner/name`; `--update` alone updates all that were fetched")
    for line in update_all(root) if source is None else [fetch_one(root, source, update)]:
        typer.echo(line)


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


@data.command("inspect")
def data_inspect() -> None:
    """Print what prepare-dataset found out when it last ran."""
    from pipeline.data import inspect
    from pipeline.workspace import Workspace

    inspect(Workspace.here())


@data.command("preview")
def data_preview() -> None:
    """Read the pictures as prepare-dataset would, and change nothing."""
    from pipeline.data import preview
    from pipeline.workspace import Workspace

    preview(Workspace.here())


@cache.command("stats")
def cache_stats() -> None:
    """Say how much the store of encodings holds, and how much of it is in use."""
    from pipeline.cache import stats
    from pipeline.workspace import Workspace

    typer.echo(stats(Workspace.here()))


@cache.command("gc")
def cache_gc(
    older_than: Annotated[float, typer.Option(metavar="DAYS", help="Keep what was written since.")] = 0.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing.")] = False,
) -> None:
    """Delete encodings that the present build/encoded does not use; they are encoded again when they are needed again."""
    from pipeline.cache import collect
    from pipeline.workspace import Workspace

    typer.echo(collect(Workspace.here(), older_than, dry_run))


@cache.command("verify")
def cache_verify() -> None:
    """Read every encoding and compare it with its checksum; damaged ones are deleted."""
    from pipeline.cache import verify
    from pipeline.workspace import Workspace

    damaged, told = verify(Workspace.here())
    typer.echo(told)
    if damaged:
        raise typer.Exit(1)


@app.command()
def show(file: Path, as_json: Annotated[bool, typer.Option("--json", help="For programs; metadata whole.")] = False) -> None:
    """Print an adapter file's facts, whoever made it: format, family, rank, alpha, trigger, metadata."""
    import json

    from pipeline.export.show import facts, lines

    found = facts(file)
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False) if as_json else "\n".join(lines(found)))


@app.command()
def verify(file: Path) -> None:
    """Hold an adapter file's lineage against this project: what matches, what differs, what cannot be checked."""
    from pipeline.export.verify import verify as check_lineage
    from pipeline.workspace import Workspace

    findings = check_lineage(Workspace.here(), file)
    for finding in findings:
        typer.echo(f"{finding.verdict:<18} {finding.link:<10} {finding.note}")
    if any(finding.verdict == "differs" for finding in findings):
        raise typer.Exit(1)


class _Format(StrEnum):
    diffusers = "diffusers"
    kohya = "kohya"


class _Dtype(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class _FamilyName(StrEnum):
    sd = "sd"
    sdxl = "sdxl"


_To = Annotated[_Format, typer.Option(help="kohya is what ComfyUI, A1111 and Forge read.")]
_AsDtype = Annotated[_Dtype | None, typer.Option(help="Of the weights; by default as they are.")]
_Rank = Annotated[int | None, typer.Option(min=1, help="Resize to at most this rank, by singular values.")]
_ForFamily = Annotated[_FamilyName | None, typer.Option("--family", help="Where the file does not tell.")]


@app.command()
def convert(source: Path, target: Path, to: _To, dtype: _AsDtype = None, rank: _Rank = None, family: _ForFamily = None) -> None:
    """Write an adapter file in another format, dtype or rank; alpha and metadata go along."""
    from pipeline.export.convert import convert as write

    write(source, target, to.value, dtype and dtype.value, rank, family and family.value)
    typer.echo(target)


@app.command()
def combine(
    adapters: Annotated[list[str], typer.Argument(metavar="FILE:WEIGHT...", help="Such as a.safetensors:0.5 b.safetensors.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    to: _To = _Format.kohya,
    dtype: _AsDtype = None,
    rank: _Rank = None,
    family: _ForFamily = None,
) -> None:
    """Write several adapters, weighted, as one. Ranks add up; --rank brings them down again."""
    from pipeline.export.convert import combine as write
    from pipeline.export.convert import parse_weighted

    write([parse_weighted(text) for text in adapters], out, to.value, dtype and dtype.value, rank, family and family.value)
    typer.echo(out)


@app.command()
def push(dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go where; contact nobody.")] = False) -> None:
    """Publish dist/adapter on the Hub (export.push_to_hub), if the gate passed; the token comes from HF_TOKEN."""
    from pipeline.export.hub import plan
    from pipeline.export.hub import push as publish
    from pipeline.workspace import Workspace

    publication = plan(Workspace.here())
    typer.echo(f"{publication.repo} ({'private' if publication.private else 'public'}): {publication.message}")
    if dry_run:
        for name, path in publication.files.items():
            typer.echo(f"  {name}  {path.stat().st_size:,} bytes")
        return
    changed = publish(publication)
    for name in changed:
        typer.echo(f"  {name}")
    if not changed:
        typer.echo("the Hub has everything")


@app.command()
def gate(
    against: Annotated[
        str | None, typer.Option(metavar="REV", help="Also compare with the metrics of this commit or tag.")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Share by which a metric may be worse than at REV.")] = 0.05,
) -> None:
    """Hold the metrics against `gate` and, if asked, an earlier commit's; exit 1 where one fails."""
    from pipeline.gating import verdict
    from pipeline.workspace import Workspace

    findings = verdict(Workspace.here(), against, tolerance)
    for finding in findings:
        typer.echo(finding.sentence())
    failed = sum(not finding.passed for finding in findings)
    typer.echo(f"the gate fails: {failed} of {len(findings)} limits" if failed else f"the gate passes: {len(findings)} limits")
    if failed:
        raise typer.Exit(1)


@app.command()
def sync() -> None:
    """Log to MLflow whatever it lacks of the results that lie here."""
    from pipeline.tracking import fill_gap
    from pipeline.workspace import Workspace

    gained = fill_gap(Workspace.here())
    for line in gained:
        typer.echo(f"logged {line}")
    if not gained:
        typer.echo("MLflow has everything")


@app.command()
def play(
    host: Annotated[str, typer.Option(help="Whom to listen to; 0.0.0.0 for everybody.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="On this machine.")] = 7860,
) -> None:
    """Draw in a browser, with any adapters, beside the base (extra: ui)."""
    from pipeline.playground import play as serve
    from pipeline.workspace import Workspace

    serve(Workspace.here(), host, port)


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
        raise UserError("there is nothing to show yet: run the pipeline first, or fill MLflow with `reprolora sync`")
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
    if name is None:
        return
    from stages import STAGES

    if name not in STAGES:
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
    finally:
        gc.freeze()  # else the interpreter looks at every object once more when it ends: 0.04 s of a `status`


def _fail(error: Exception, code: int) -> None:
    typer.echo(f"error: {error}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
