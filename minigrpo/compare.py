"""`python -m minigrpo.compare RUN RUN`: two runs or models on the same held-out problems, by a paired test."""

import json
import sys
from pathlib import Path
from typing import Any

from minigrpo.command_line import run_named
from minigrpo.commands import COMMANDS
from minigrpo.config import Settings, UsageError
from minigrpo.reporting.history import MEASURES, Rows, at_step, measure_of, on_same_problems, outcomes
from minigrpo.reporting.significance import Estimate, estimate, interval, paired_difference
from minigrpo.reporting.verdict import p_text
from minigrpo.runtime.run_folder import read_steps

SECTIONS = COMMANDS["compare"].sections

WORDS = {"right": "accuracy", "margin": "margin", "reward": "reward"}


def read_answers(path: Path, flag: str) -> dict[str, Rows]:
    """Read the last evaluation of a run folder, or a file of `evaluate --output` -> {name: a row per answer}."""
    if path.is_dir():
        rows = read_steps(path / "answers.jsonl")
        if not rows:
            raise UsageError(
                f"--{flag}={path}: has no answers.jsonl, which --eval_steps writes; "
                "write one with minigrpo.evaluate --output=FILE and name that file"
            )
        last = max(row["step"] for row in rows)
        return {f"{path}, step {last}": at_step(rows, last)}
    models: dict[str, Rows] = {}
    for row in read_file(path, flag):
        models.setdefault(f"{path}, {row.get('model')}", []).append(row)
    return models


def read_file(path: Path, flag: str) -> Rows:
    """Read the rows of a file of answers; UsageError naming the flag, and the line that is no answer."""
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--{flag}={path}: is no run folder, and cannot be read as a file of answers") from error
    rows = []
    for number, line in enumerate(lines if lines != [""] else [], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"--{flag}={path}: line {number} is not JSON; name a file of evaluate --output") from error
        if not isinstance(row, dict) or not any(name in row for name in MEASURES):
            raise UsageError(f"--{flag}={path}: line {number} is no answer of evaluate --output")
        rows.append(row)
    if not rows:
        raise UsageError(f"--{flag}={path}: the file has no answers")
    return rows


def read_pair(run: str, other: str) -> tuple[tuple[str, Rows], tuple[str, Rows]]:
    """Read what is compared: two names, or one file that holds two models."""
    if not run:
        raise UsageError("--run=: name two run folders, as in python -m minigrpo.compare runs/a runs/b")
    found = list(read_answers(Path(run), "run").items())
    if other:
        more = list(read_answers(Path(other), "other").items())
        for path, own in ((run, found), (other, more)):
            if len(own) != 1:
                raise UsageError(f"{path}: holds {len(own)} models; compare a file of one, or name only this file")
        found += more
    if len(found) != 2:
        raise UsageError(
            f"--other=: {run} holds {len(found)} model{'s' * (len(found) != 1)}; name what to compare with"
        )
    return found[0], found[1]


def compare(before: Rows, after: Rows) -> dict[str, Any]:
    """Compare two models' answers to the problems that both were asked, by what both have."""
    measure = measure_of(before + after)
    if measure is None:
        raise UsageError("nothing that both have was measured: one has accuracy, the other only margins or rewards")
    one, two = on_same_problems(outcomes(before, measure), outcomes(after, measure))
    if len(one) < 2:
        raise UsageError(f"{len(one)} problem{'s' * (len(one) != 1)} in common: evaluate both on the same --dataset")
    difference = paired_difference(one, two)
    return {
        "measure": WORDS[measure],
        "problems": len(one),
        "run": described(estimate(one), len(one), measure),
        "other": described(estimate(two), len(two), measure),
        "only_run": int((one > two).sum()),
        "only_other": int((two > one).sum()),
        "difference": difference.mean,
        "standard_error": difference.error,
        "p_value": difference.p_value,
        "significant": difference.significant,
        "problems_needed": difference.needed,
        "smallest_found": difference.smallest,
    }


def described(value: Estimate, count: int, measure: str) -> dict[str, Any]:
    """Return a mean with its 95 % interval: Wilson's of a share, else by its standard error."""
    half = 1.96 * value.error
    ends = interval(value.mean, count) if measure == "right" else (value.mean - half, value.mean + half)
    return {"mean": value.mean, "interval": ends}


def shown(value: float, measure: str, signed: bool = False) -> str:
    """Return a value as people read it, accuracy in percent."""
    sign = "+" if signed else ""
    return f"{value:{sign}.1%}" if measure == "accuracy" else f"{value:{sign}.4g}"


def lines(names: tuple[str, str], result: dict[str, Any]) -> list[str]:
    """Put a comparison into words."""
    measure = result["measure"]
    rows = []
    for name, side in zip(names, (result["run"], result["other"]), strict=True):
        low, high = (shown(end, measure) for end in side["interval"])
        rows.append(f"{name}: {measure} {shown(side['mean'], measure)} (95 % interval {low} to {high})")
    counts = f"{result['only_run']} problems go better in the first, {result['only_other']} in the second"
    rows.append(f"{result['problems']} problems in common; {counts}")
    size = f"{shown(result['difference'], measure, True)} with a standard error of "
    size += f"{shown(result['standard_error'], measure)}, {p_text(result['p_value'])}"
    return [*rows, f"second less first: {size}", conclusion(result)]


def conclusion(result: dict[str, Any]) -> str:
    """Say which is better, or how many problems would tell."""
    if result["significant"]:
        return f"The {'second' if result['difference'] > 0 else 'first'} is better: chance alone seldom does this."
    if result["problems_needed"] is None:
        return "They do not differ on these problems."
    least = shown(result["smallest_found"], result["measure"])
    return (
        f"Too close to tell: these {result['problems']} problems show differences from about {least}. "
        f"If this one is real, about {result['problems_needed']:,} problems would show it."
    )


def main(settings: Settings) -> int:
    """Compare --run with --other; return the exit code."""
    options = settings.compare
    first, second = read_pair(options.run, options.other)
    result = compare(first[1], second[1])
    sys.stderr.write("\n".join(lines((first[0], second[0]), result)) + "\n")
    sys.stdout.write(json.dumps({"first": first[0], "second": second[0], **result}) + "\n")
    return 0


if __name__ == "__main__":
    run_named("compare", main)
