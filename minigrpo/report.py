"""`python -m minigrpo.report`: a run folder's plots, summary.json, and one self-contained HTML page."""

import base64
import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from minigrpo.command_line import run_named
from minigrpo.commands import COMMANDS
from minigrpo.config import Settings, UsageError, read_json
from minigrpo.diagnostics import diagnose
from minigrpo.runtime.run_folder import read_steps

matplotlib.use("Agg")

TEMPLATE = Path(__file__).parent / "builtin" / "report.html.jinja"
COLUMNS = (
    "num_tokens", "step_time", "tokens_per_second", "reward", "reward_std", "loss", "grad_norm", "learning_rate",
    "entropy", "kl", "skipped_updates",
)  # fmt: skip
"""What every line of metrics.jsonl must have."""

SMOOTH = 20
"""A running mean goes over one part in SMOOTH of the steps."""

SHOWN = 12
"""Sample completions on the page, half of them the first, half the last."""

Rows = list[dict[str, Any]]


SECTIONS = COMMANDS["report"].sections


@dataclasses.dataclass(frozen=True)
class History:
    """Contents of a run folder."""

    folder: Path
    settings: dict[str, Any]
    metrics: Rows
    evaluations: Rows
    samples: Rows


def read_history(folder: Path) -> History:
    """Read a run folder; UsageError when there is no run, or one without a finished step."""
    metrics, *others = (read_steps(folder / f"{name}.jsonl") for name in ("metrics", "evaluations", "completions"))
    if not metrics:
        raise UsageError(f"--run={folder}: no metrics.jsonl with a finished step there; name the folder of a run")
    for name in columns_of(metrics):
        bad = next((row for row in metrics if not isinstance(row.get(name), int | float)), None)
        if bad:
            raise UsageError(f"{folder}/metrics.jsonl: step {bad['step']} has {bad.get(name)!r} as {name!r}")
    return History(folder, read_json(folder / "config.json"), metrics, *others)


def columns_of(metrics: Rows) -> tuple[str, ...]:
    """Return what every line of the metrics must have: supervised training samples nothing that gets a reward."""
    sampled = ("reward", "reward_std", "kl")
    return COLUMNS if "reward" in metrics[0] else tuple(name for name in COLUMNS if name not in sampled)


# Pictures


def draw(rows: Rows, names: dict[str, str], ylabel: str) -> Figure:
    """Draw metrics against steps, pale, and their running means; `names` maps metrics to the labels of their lines."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, (name, label) in enumerate(present(rows, names).items()):
        steps = [row["step"] for row in rows if row.get(name) is not None]
        values = [row[name] for row in rows if row.get(name) is not None]
        window = max(1, len(values) // SMOOTH)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps, values, color=f"C{number}", alpha=1 if window == 1 else 0.3, linewidth=1)
        axes.plot(steps[window - 1 :], smooth, color=f"C{number}", label=label)
    axes.set(xlabel="step", ylabel=ylabel)
    axes.grid(alpha=0.3)
    if len(names) > 1:
        axes.legend(fontsize=8)
    return figure


def present(rows: Rows, names: dict[str, str]) -> dict[str, str]:
    """Keep the metrics that any step has."""
    return {name: label for name, label in names.items() if any(row.get(name) is not None for row in rows)}


def reward_parts(rows: Rows) -> dict[str, str]:
    """Label the total reward and each reward function's mean."""
    names = [name for name in rows[0] if name.startswith("rewards/") and name.endswith("/mean")]
    return {"reward": "all, weighted"} | {name: name.split("/")[1] for name in names}


def phase_names(rows: Rows) -> dict[str, str]:
    """Label the times of the phases."""
    return {name: name.removeprefix("time/") for name in rows[0] if name.startswith("time/")}


LENGTH = "completions/mean_length"
LENGTHS = {f"completions/{kind}_length": kind for kind in ("mean", "min", "max")}


def figures(history: History) -> dict[str, Figure]:
    """Draw every figure -> {file name: picture}."""
    rows, held = history.metrics, history.evaluations
    if "reward" not in rows[0]:
        return supervised_figures(history)
    pictures = {
        "reward": draw(rows, reward_parts(rows), "reward"),
        "loss": draw(rows, {"loss": "loss"}, "loss"),
        "grad_norm": draw(rows, {"grad_norm": "gradient norm before clipping"}, "gradient norm"),
        "learning_rate": draw(rows, {"learning_rate": "learning rate"}, "learning rate"),
        "entropy": draw(rows, {"entropy": "entropy"}, "entropy (nats per token)"),
        "lengths": draw(rows, LENGTHS, "completion length (tokens)"),
        "clipped": draw(rows, {"completions/clipped_ratio": "cut"}, "share cut at the length limit"),
        "seconds": draw(rows, phase_names(rows), "seconds per step"),
    }
    measured = present(held, {"accuracy": "accuracy", "strict_accuracy": "strict accuracy", "margin": "margin"})
    if history.settings.get("beta"):
        pictures["kl"] = draw(rows, {"kl": "KL to the reference"}, "KL to the reference (nats per token)")
    return ({"progress": draw(held, measured, "held out")} if held and measured else {}) | pictures


def supervised_figures(history: History) -> dict[str, Figure]:
    """Draw every figure of supervised training -> {file name: picture}."""
    rows, held = history.metrics, history.evaluations
    pictures = {
        "loss": draw(rows, {"loss": "loss"}, "loss (nats per token)"),
        "grad_norm": draw(rows, {"grad_norm": "gradient norm before clipping"}, "gradient norm"),
        "learning_rate": draw(rows, {"learning_rate": "learning rate"}, "learning rate"),
        "entropy": draw(rows, {"entropy": "entropy"}, "entropy (nats per token)"),
        "seconds": draw(rows, phase_names(rows), "seconds per step"),
    }
    return ({"progress": draw(held, {"loss": "loss"}, "held-out loss (nats per token)")} if held else {}) | pictures


def png(figure: Figure) -> bytes:
    """Render a figure as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


# Summary


def mean(rows: Rows, name: str) -> float:
    """Average a metric over the steps that have it; 0 when none has."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else 0.0


def summarize(history: History) -> dict[str, Any]:
    """Summarize the run in figures; first and last are means over a tenth of the steps."""
    rows = history.metrics
    tenth = max(1, len(rows) // 10)
    first, last = rows[:tenth], rows[-tenth:]
    return {
        "model": history.settings.get("model"),
        "dataset": history.settings.get("dataset"),
        "steps": rows[-1]["step"],
        "tokens": rows[-1]["num_tokens"],
        "hours": sum(row["step_time"] for row in rows) / 3600,
        "tokens_per_second": mean(rows, "tokens_per_second"),
        "reward": {"first": mean(first, "reward"), "last": mean(last, "reward")},
        "mean_length": {"first": mean(first, LENGTH), "last": mean(last, LENGTH)},
        "kl": mean(last, "kl"),
        "entropy": {"first": mean(first, "entropy"), "last": mean(last, "entropy")},
        "skipped_updates": sum(row["skipped_updates"] for row in rows),
        "evaluations": {"first": history.evaluations[:1], "last": history.evaluations[-1:]},
        "doctor": diagnose(history.settings, rows),
    }


# The page


def chosen_samples(samples: Rows) -> Rows:
    """Return the first and the last samples, SHOWN at most."""
    half = SHOWN // 2
    return samples if len(samples) <= SHOWN else samples[:half] + samples[-half:]


def render(history: History, summary: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """Render the page, pictures included; everything from the run is escaped."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    images = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        name=history.folder.absolute().name,
        summary=summary,
        images=images,
        samples=chosen_samples(history.samples),
        settings=history.settings,
    )


def write_report(folder: Path) -> Path:
    """Write FOLDER/report/*.png, FOLDER/summary.json and FOLDER/report.html, and return the page's path."""
    history = read_history(folder)
    summary = summarize(history)
    (folder / "report").mkdir(exist_ok=True)
    pictures = {name: png(figure) for name, figure in figures(history).items()}
    for name, data in pictures.items():
        (folder / "report" / f"{name}.png").write_bytes(data)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    page = folder / "report.html"
    page.write_text(render(history, summary, pictures), encoding="utf-8", errors="backslashreplace")
    return page


def main(settings: Settings) -> int:
    """Write the report of --run and print its findings; return the exit code."""
    options = settings.report
    if not options.run:
        raise UsageError("--run=: name a run folder, such as --run=runs/mine")
    page = write_report(Path(options.run))
    sys.stderr.write(f"report written to {page}\n")
    for line in json.loads((Path(options.run) / "summary.json").read_text())["doctor"]:
        sys.stderr.write(f"* {line}\n")
    return 0


if __name__ == "__main__":
    run_named("report", main)
