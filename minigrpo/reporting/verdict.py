"""Outcome of a run in one sentence: learned, worse, too early to tell, or broken and why."""

import dataclasses
import math
from typing import Any

from minigrpo.diagnostics import no_reward
from minigrpo.reporting.history import History, Rows, at_step, column, measure_of, on_same_problems, outcomes
from minigrpo.reporting.significance import (
    Difference,
    Estimate,
    estimate,
    mean_difference,
    paired_difference,
    share_difference,
)

LEARNED, WORSE, EARLY, BROKEN = "learned", "worse", "too early to tell", "broken"

LEAST = 3
"""Steps at either end of a run that its trend is taken from, at least; a quarter of them otherwise."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Outcome of a run, and a sentence about it with standard errors."""

    word: str
    text: str


@dataclasses.dataclass(frozen=True)
class Change:
    """A measure at the beginning and at the end of a run."""

    name: str
    """As in a sentence: 'held-out accuracy'."""
    before: Estimate
    after: Estimate
    difference: Difference
    where: str
    """What was compared: 'on the same 500 problems'."""
    advice: str
    """What would tell more."""
    percent: bool = False
    falls: bool = False
    """Less is better, as of a loss."""

    def number(self, value: Estimate) -> str:
        """Return a value with its standard error."""
        if self.percent:
            return f"{100 * value.mean:.1f} ± {100 * value.error:.1f} %"
        return f"{value.mean:.3g}" + ("" if math.isnan(value.error) else f" ± {value.error:.2g}")

    def size(self, value: float) -> str:
        """Return a difference, in points for a share."""
        return f"{100 * abs(value):.1f} points" if self.percent else f"{abs(value):.2g}"


def judge(history: History) -> Verdict:
    """Tell in a sentence what came of a run."""
    reason = broken(history.settings, history.metrics)
    if reason:
        return Verdict(BROKEN, f"Broken: {reason}")
    change = held_out_change(history) or training_change(history.metrics)
    if change is None:
        steps = history.metrics[-1]["step"]
        return Verdict(EARLY, f"Too early to tell: {steps} step{'s' * (steps != 1)} cannot show a trend.")
    return in_words(change, history.metrics[-1]["step"])


def in_words(change: Change, steps: int) -> Verdict:
    """Put a change into words."""
    values = f"from {change.number(change.before)} to {change.number(change.after)} in {steps} step{'s' * (steps != 1)}"
    difference = change.difference
    if not difference.significant:
        return Verdict(EARLY, f"Too early to tell: {change.name} went {values}, {change.where}. {change.advice}")
    better = (difference.mean < 0) == change.falls
    how = "fell" if difference.mean < 0 else "rose"
    error = f"{100 * difference.error:.1f} points" if change.percent else f"{difference.error:.2g}"
    sure = f"by {change.size(difference.mean)} with a standard error of {error}"
    word = "Learned" if better else "Worse"
    return Verdict(
        LEARNED if better else WORSE,
        f"{word}: {change.name} {how} {values}, {sure} {change.where} ({p_text(difference.p_value)}).",
    )


def p_text(p_value: float) -> str:
    """Return a p-value as people write it.

    >>> p_text(0.0123), p_text(1e-9)
    ('p = 0.012', 'p < 0.001')
    """
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


# Broken


def broken(settings: dict[str, Any], rows: Rows) -> str | None:
    """Return why nothing can have been learned; None where nothing forbids it."""
    failed = sum(row.get("skipped_updates", 0) > 0 or not math.isfinite(row["loss"]) for row in rows)
    if 2 * failed > len(rows):
        return f"loss or gradient was not finite in {failed} of {len(rows)} steps. Lower --learning_rate."
    if all("reward" in row for row in rows) and (finding := no_reward(settings, rows)):
        return finding[0].lower() + finding[1:]
    if always(rows, "frac_reward_zero_std", 1.0):
        return (
            "in every step all completions of a group got the same reward, so nothing could be learned. Check that "
            "--reward tells good answers from bad ones, or take easier or harder problems."
        )
    if always(rows, "grad_norm", 0.0):
        return "the gradient was 0 in every step, so no weight changed."
    return None


def always(rows: Rows, name: str, value: float) -> bool:
    """Tell whether a metric had this value in every step."""
    return all(row.get(name) == value for row in rows)


# Held-out problems

HELD_OUT = {"accuracy": "held-out accuracy", "margin": "the held-out margin", "reward": "the held-out reward"}
"""Measures of --eval_steps, the first that is there, in words."""


def held_out_measure(evaluations: Rows) -> str | None:
    """Return the measure of --eval_steps that tells most; None without evaluations."""
    return next((name for name in HELD_OUT if any(name in row for row in evaluations)), None)


def held_out_change(history: History) -> Change | None:
    """Return the change of held-out results from the first to the last evaluation; None unless there are two."""
    rows = [row for row in history.evaluations if held_out_measure([row])]
    name = held_out_measure(rows)
    if name is None or len(rows) < 2:
        return None
    paired = paired_answers(history.answers, rows[0]["step"], rows[-1]["step"])
    if paired:
        before, after, difference = paired
    elif name == "accuracy" and min(row.get("problems", 0) for row in rows) > 0:
        before, after, difference = unpaired_shares(rows[0], rows[-1])
    else:
        return None
    where = f"on {'the same ' if paired else ''}{difference.count} problems"
    change = Change(HELD_OUT[name], before, after, difference, where, "", percent=name == "accuracy")
    return dataclasses.replace(change, advice=held_out_advice(change))


def held_out_advice(change: Change) -> str:
    """Say how large a difference must be to show, and what helps."""
    if not change.difference.error:
        return "No problem went from wrong to right or back: train longer, or raise --learning_rate."
    seen = change.size(change.difference.smallest)
    count = change.difference.count
    return f"With {count} problems a difference shows from about {seen} on: train longer, or raise --eval_size."


def paired_answers(answers: Rows, first: int, last: int) -> tuple[Estimate, Estimate, Difference] | None:
    """Compare the answers of two steps problem by problem; None where they are not on file."""
    sides = at_step(answers, first), at_step(answers, last)
    measure = measure_of(sides[0] + sides[1])
    if not measure or not sides[0] or not sides[1]:
        return None
    before, after = on_same_problems(*(outcomes(rows, measure) for rows in sides))
    return (estimate(before), estimate(after), paired_difference(before, after)) if len(before) > 1 else None


def unpaired_shares(first: dict[str, Any], last: dict[str, Any]) -> tuple[Estimate, Estimate, Difference]:
    """Compare two accuracies of which only the number of problems is known."""
    sides = [(row["accuracy"], int(row["problems"])) for row in (first, last)]
    before, after = (Estimate(share, math.sqrt(share * (1 - share) / count)) for share, count in sides)
    return before, after, share_difference(before.mean, after.mean, min(count for _, count in sides))


# The steps themselves


def training_change(rows: Rows) -> Change | None:
    """Return the change of the reward, or of the loss without rewards, from the first steps to the last.

    None for too few steps.
    """
    name = "reward" if any("reward" in row for row in rows) else "loss"
    values = column(rows, name)
    part = max(LEAST, len(values) // 4)
    if len(values) < 2 * part:
        return None
    first, last = values[:part], values[-part:]
    advice = "Other prompts every step hide small changes: train longer, or measure the same ones with --eval_steps."
    where = f"over the first and last {part} steps"
    label = "the training reward" if name == "reward" else "the training loss"
    difference = mean_difference(first, last)
    return Change(label, estimate(first), estimate(last), difference, where, advice, falls=name == "loss")


# The best step


def best_step(history: History) -> dict[str, Any] | None:
    """Return the best step by --keep_best, else held out, else in training: {"step", "metric", "value"}."""
    chosen = history.settings.get("keep_best") or ""
    measure = held_out_measure(history.evaluations)
    metric = chosen.removeprefix("-") or (f"eval/{measure}" if measure else "reward")
    rows, name = history.metrics, metric
    if metric.startswith("eval/"):
        rows, name = history.evaluations, metric.removeprefix("eval/")
    rated = [(row[name], row["step"]) for row in rows if isinstance(row.get(name), int | float)]
    rated = [(value, step) for value, step in rated if math.isfinite(value)]
    if not rated:
        return None
    sign = -1 if chosen.startswith("-") else 1
    value, step = max(rated, key=lambda pair: (sign * pair[0], -pair[1]))
    return {"step": step, "metric": metric, "value": value}
