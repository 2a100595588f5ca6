"""Settings searched for: Optuna proposes each trial by what the earlier ones came to; a DVC experiment each, as in a sweep.

The study lies in `.work/sweeps/`. A proposal depends on the trials before it and its own number alone, so that a search that was
killed goes on as it would have, and one asked for again finds its experiments.
"""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipeline.edit import preview_values
from pipeline.errors import UserError
from pipeline.files import hash_json
from pipeline.lock import held
from pipeline.metrics import DEFINITIONS
from pipeline.progress import say
from pipeline.sweep import (
    Trial,
    best_first,
    commit_to_start_from,
    experiment,
    group_of,
    known,
    metrics_of,
    name_of,
    parse,
    refuse_unmeasured,
    setting,
    values,
)
from pipeline.workspace import Workspace

_NUMBER = r"[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_DIGITS = 4  # of a proposed fraction: what the experiment is named by and trained with


@dataclass(frozen=True)
class Range:
    """Every number from `low` to `high`, both included."""

    low: int | float
    high: int | float

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def log(self) -> bool:
        """Fractions that span a factor of ten are drawn evenly by their logarithm."""
        return not self.whole and self.low > 0 and self.high >= 10 * self.low


Axis = Range | tuple[Any, ...]


def axes(assignments: list[str]) -> dict[str, Axis]:
    """`lora.rank=4..32` -> a range; `train.optimiser=adamw,lion` -> the values to choose from.

    Raises:
        UserError: an assignment is neither, or a range is empty.
    """
    found: dict[str, Axis] = {}
    for assignment in assignments:
        key, text = parse(assignment)
        if key in found:
            raise UserError(f"--set {assignment}: {key} is given twice")
        match = _RANGE.fullmatch(text.strip())
        if not match:
            found[key] = tuple(values(text))
            continue
        low, high = (int(end) if re.fullmatch(r"[+-]?\d+", end) else float(end) for end in match.groups())
        if not low < high:
            raise UserError(f"--set {assignment}: {low} is not below {high}")
        found[key] = Range(low, high)
    return found


def search(workspace: Workspace, assignments: list[str], metric: str, jobs: int, count: int) -> list[Trial]:
    """Bring the study to `count` trials, and return those, the best first. The first ten are drawn at random.

    Args:
        assignments: as `axes` reads them.
        metric: of `pipeline.metrics.DEFINITIONS`, with a direction.
        jobs: experiments at once.

    Raises:
        UserError: as `sweep` does, or Optuna is not installed.
        AlreadyRunning: another process is at the same search.
    """
    space = axes(assignments)
    optuna = _optuna()
    refuse_unmeasured(workspace, metric)
    for key, axis in space.items():  # what is not allowed is refused before anything runs
        for value in (axis.low, axis.high) if isinstance(axis, Range) else axis:
            preview_values(workspace, [setting(key, value)])
    head = commit_to_start_from(workspace)
    key = hash_json([head, sorted(assignments), metric])[:10]
    path = workspace.work / "sweeps" / f"search-{key}.db"
    with held(path.with_suffix(".lock"), "this search is already running"):
        study = optuna.create_study(
            study_name=f"search-{key}",
            storage=f"sqlite:///{path}",
            direction="minimize" if DEFINITIONS[metric].better == "lower" else "maximize",
            load_if_exists=True,
        )
        _bring_to(study, workspace, space, metric, jobs, count, head, group_of(head, assignments))
        trials = {name_of(head, c): c for c in (_changes(t, space) for t in study.trials[:count])}
    return best_first([Trial(name, c, metrics_of(workspace, name)) for name, c in trials.items()], metric)


def _bring_to(
    study: Any, workspace: Workspace, space: dict[str, Axis], metric: str, jobs: int, count: int, head: str, group: str
) -> None:
    """Run what the study lacks. A trial without a value stays open: it was killed or it failed, and the next search tries again."""
    there, lock = set(known(workspace)), threading.Lock()

    def unfinished() -> list[int]:
        return [trial.number for trial in study.trials[:count] if not trial.state.is_finished()]

    def run(number: int | None) -> None:
        with lock:
            trial = study.trials[number] if number is not None else _proposed(study, space, parallel=jobs > 1)
            changes = _changes(trial, space)
            name = name_of(head, changes)
            new = name not in there
            there.add(name)
        if new:
            experiment(workspace, changes, name, group)
        value = metrics_of(workspace, name).get(metric)
        with lock:
            if value is not None:
                study.tell(trial.number, value)
            else:
                there.discard(name)

    todo = [*unfinished(), *[None] * (count - len(study.trials))]
    say(f"{count} trials, {count - len(todo)} of them are there already")
    for number in todo[:1]:  # alone: it makes what all share, and MLflow's store
        run(number)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        list((pool.map if jobs > 1 else map)(run, todo[1:]))  # one at a time ends at once when it is interrupted
    for number in unfinished() if jobs > 1 else []:
        run(number)  # two that share a stage get in each other's way: what fell over runs once more, alone


def _proposed(study: Any, space: dict[str, Axis], parallel: bool) -> Any:
    """The next trial, drawn with a seed of its own: an interrupted study proposes what the whole one would have."""
    optuna = _optuna()
    seed = int(hash_json([study.study_name, len(study.trials)])[:8], 16)
    study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=parallel)
    kinds = optuna.distributions
    distributions = {}
    for key, axis in space.items():
        if not isinstance(axis, Range):
            distributions[key] = kinds.CategoricalDistribution([setting(key, value) for value in axis])
        elif axis.whole:
            distributions[key] = kinds.IntDistribution(axis.low, axis.high)
        else:
            distributions[key] = kinds.FloatDistribution(axis.low, axis.high, log=axis.log)
    return study.ask(distributions)


def _changes(trial: Any, space: dict[str, Axis]) -> tuple[str, ...]:
    """A trial's settings."""
    return tuple(_change(key, axis, trial.params[key]) for key, axis in space.items())


def _change(key: str, axis: Axis, drawn: Any) -> str:
    if not isinstance(axis, Range):
        return str(drawn)  # a choice is the whole setting
    return setting(key, drawn if axis.whole else min(max(float(f"{drawn:.{_DIGITS}g}"), axis.low), axis.high))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError(f"--search needs Optuna, which cannot be imported ({error}): pip install 'reprolora[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
