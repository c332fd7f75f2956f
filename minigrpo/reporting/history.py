"""The files of a run folder that a report reads."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from minigrpo.config import UsageError, read_json
from minigrpo.runtime.run_folder import read_steps

Rows = list[dict[str, Any]]

MEASURES = ("right", "margin", "reward")
"""What is compared of an answer, the first of them that is there; a margin is that of responses on file."""


@dataclasses.dataclass(frozen=True)
class History:
    """Contents of a run folder."""

    folder: Path
    settings: dict[str, Any]
    metrics: Rows
    evaluations: Rows
    samples: Rows
    answers: Rows
    """A row for every held-out problem of every evaluation."""


def read_history(folder: Path) -> History:
    """Read a run folder; UsageError when there is no run, or one without a finished step."""
    names = ("metrics", "evaluations", "completions", "answers")
    metrics, *others = (read_steps(folder / f"{name}.jsonl") for name in names)
    if not metrics:
        raise UsageError(f"--run={folder}: no metrics.jsonl with a finished step there; name the folder of a run")
    for row in metrics:
        check_numbers(folder, row)
    return History(folder, read_json(folder / "config.json"), metrics, *others)


REQUIRED = ("loss",)
"""What every line of metrics.jsonl must have; supervised training has no reward."""


def check_numbers(folder: Path, row: dict[str, Any]) -> None:
    """Raise UsageError for a line of metrics.jsonl with something else than numbers."""
    bad = next((name for name in (*REQUIRED, *row) if not isinstance(row.get(name), int | float)), None)
    if bad:
        raise UsageError(f"{folder}/metrics.jsonl: step {row['step']} has {row.get(bad)!r:.60} as {bad!r}")


def column(rows: Rows, name: str) -> list[float]:
    """Return a metric's finite values over the steps that have it."""
    return [float(row[name]) for row in rows if isinstance(row.get(name), int | float) and math.isfinite(row[name])]


def average(rows: Rows, name: str) -> float | None:
    """Average a metric over the steps that have it; None when none has."""
    values = column(rows, name)
    return sum(values) / len(values) if values else None


def part_names(rows: Rows) -> list[str]:
    """Return the reward functions that any step has a mean of."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name.split("/")[1] for name in names if name.startswith("rewards/") and name.endswith("/mean")]


Key = tuple[str, str]
"""A problem: its prompt and its reference answer, as JSON or text."""


def measure_of(rows: Rows) -> str | None:
    """Return what is compared of these answers; None where there is nothing. A reward that does not apply is null."""

    def is_there(name: str) -> bool:
        values = [row.get(name, "") for row in rows]
        numbers = [value for value in values if isinstance(value, int | float)]
        return bool(numbers) and len(numbers) + values.count(None) == len(values)

    return next(filter(is_there, MEASURES), None)


def outcomes(rows: Rows, measure: str) -> dict[Key, float]:
    """Average a measure over each problem's answers."""
    values: dict[Key, list[float]] = {}
    for row in rows:
        if row[measure] is not None:
            values.setdefault((repr(row.get("prompt")), repr(row.get("answer"))), []).append(float(row[measure]))
    return {key: sum(own) / len(own) for key, own in values.items()}


def on_same_problems(
    before: dict[Key, float], after: dict[Key, float]
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Return both results of the problems that both have, in one order."""
    both = [key for key in before if key in after]
    return np.array([before[key] for key in both], float), np.array([after[key] for key in both], float)


def at_step(rows: Rows, step: int) -> Rows:
    """Return the rows of one step."""
    return [row for row in rows if row["step"] == step]
