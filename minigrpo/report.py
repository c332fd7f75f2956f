"""`python -m minigrpo.report RUN`: a run folder's plots, summary.json, and one self-contained HTML page."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from minigrpo.command_line import run_named
from minigrpo.commands import COMMANDS
from minigrpo.config import Settings, UsageError
from minigrpo.diagnostics import diagnose, loss_is_zero
from minigrpo.reporting.history import History, average, column, part_names, read_history
from minigrpo.reporting.page import render
from minigrpo.reporting.significance import interval
from minigrpo.reporting.verdict import Verdict, best_step, held_out_change, judge, training_change
from minigrpo.runtime.bucket import open_home
from minigrpo.runtime.files import write_whole, writing
from minigrpo.runtime.progress import clock_text

SECTIONS = COMMANDS["report"].sections

LENGTH = "completions/mean_length"


def summarize(history: History, verdict: Verdict) -> dict[str, Any]:
    """Summarize the run in figures; first and last are means over a tenth of the steps."""
    rows = history.metrics
    tenth = max(1, len(rows) // 10)

    def ends(name: str) -> dict[str, float | None]:
        return {"first": average(rows[:tenth], name), "last": average(rows[-tenth:], name)}

    hours = sum(column(rows, "step_time")) / 3600
    return {
        "verdict": verdict.word,
        "words": verdict.text,
        "model": history.settings.get("model"),
        "dataset": history.settings.get("dataset"),
        "steps": rows[-1]["step"],
        "best": best_step(history),
        "tokens": rows[-1].get("num_tokens"),
        "hours": hours,
        "time": clock_text(3600 * hours),
        "tokens_per_second": average(rows, "tokens_per_second"),
        "changes": changes(history),
        **{name: ends(name) for name in ("reward", "loss", "entropy")},
        "rewards": {name: ends(f"rewards/{name}/mean") for name in part_names(rows)},
        "mean_length": ends(LENGTH),
        "kl": average(rows[-tenth:], "kl"),
        "skipped_updates": sum(column(rows, "skipped_updates")),
        "evaluations": {"first": history.evaluations[:1], "last": history.evaluations[-1:]},
        "doctor": diagnose(history.settings, rows),
    }


def changes(history: History) -> list[dict[str, str]]:
    """Return what changed from beginning to end, in words: {"name", "before", "after"}."""
    found = {"": held_out_change(history), ", other rows every step": training_change(history.metrics)}
    return [
        {"name": change.name + more, "before": change.number(change.before), "after": change.number(change.after)}
        for more, change in found.items()
        if change
    ]


def notes_of(history: History) -> list[str]:
    """Return what the pictures leave out, and why."""
    if not loss_is_zero(history.settings, history.metrics):
        return []
    return [
        "The loss is not drawn: on-policy, without a reference, it is 0 by construction. The gradient and the reward "
        "show what the updates do; every ratio is 1, so no token is clipped."
    ]


def write_report(folder: Path) -> Path:
    """Write FOLDER/report/*.png, FOLDER/summary.json and FOLDER/report.html, and return the page's path."""
    from minigrpo.reporting.pictures import pictures  # matplotlib takes a second to import

    history = read_history(folder)
    verdict = judge(history)
    summary = summarize(history, verdict)
    drawn = pictures(history)
    with writing(folder / "report"):
        (folder / "report").mkdir(exist_ok=True)
        for name, (png, _) in drawn.items():
            (folder / "report" / f"{name}.png").write_bytes(png)
    write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    images = {name: svg for name, (_, svg) in drawn.items()}
    page = folder / "report.html"
    text = render(history, summary, verdict, images, notes_of(history))
    write_whole(page, text)
    return page


def closing_words(folder: Path) -> str:
    """Return what a run's last lines say: accuracy before and after with 95 % intervals, and what came of it."""
    history = read_history(folder)
    rows = [row for row in history.evaluations if row.get("problems") and "accuracy" in row]
    lines = [accuracy_line(rows[0], rows[-1])] if len(rows) > 1 else []
    return "\n".join([*lines, judge(history).text])


def accuracy_line(first: dict[str, Any], last: dict[str, Any]) -> str:
    """Return held-out accuracy before and after, with 95 % intervals."""

    def words(row: dict[str, Any]) -> str:
        low, high = interval(row["accuracy"], int(row["problems"]))
        return f"{row['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%})"

    return f"held out, {last['problems']:.0f} problems: {words(first)} before, {words(last)} after"


def main(settings: Settings) -> int:
    """Write the report of --run and print its findings; return the exit code."""
    options = settings.report
    if not options.run:
        raise UsageError("--run=: name a run folder, such as --run=runs/mine")
    with open_home(options.run, True, f"report-{os.getpid()}", "run") as home:
        page = write_report(home.folder)
        sys.stderr.write(f"report written to {home.name}/{page.name}\n{closing_words(home.folder)}\n")
        for line in json.loads((home.folder / "summary.json").read_text())["doctor"]:
            sys.stderr.write(f"* {line}\n")
    return 0


if __name__ == "__main__":
    run_named("report", main)
