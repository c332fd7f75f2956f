"""Pictures of a run against its steps, with titles, and axes that fit what they show."""

import io
import math
import re
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from minigrpo.diagnostics import loss_is_zero
from minigrpo.reporting.history import History, Rows, part_names
from minigrpo.reporting.significance import Z95, interval

matplotlib.use("Agg")

SMOOTH = 20
"""A running mean goes over one part in SMOOTH of the steps."""

POINTS = 240
"""Most points of a line; a longer run's are means of neighbours."""

INK = "#010203"
"""Colour of text and axes, which the page replaces by its own."""

LINES = ("#2f7ed8", "#e07b00", "#2a9d5c", "#c6457a", "#8560c9", "#8c7a3d", "#16a0a8", "#d04a2c")
"""Colours that can be read on white and on black."""

STYLE: Any = {
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True,
    "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none",
    "svg.hashsalt": "minigrpo", "legend.frameon": False, "axes.prop_cycle": cycler(color=LINES),
    "text.parse_math": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color",
                     "ytick.color", "grid.color"), INK),
}  # fmt: skip


# Lines


def series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and finite values of a metric, at most POINTS of each: means of equally many neighbours."""
    pairs = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    both = np.array([pair for pair in pairs if math.isfinite(pair[1])], float).reshape(-1, 2)
    size = -(-len(both) // POINTS) or 1
    whole = both[: len(both) // size * size].reshape(-1, size, 2)
    return whole[:, :, 0].max(axis=1), whole[:, :, 1].mean(axis=1)


def draw_line(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, color: str) -> None:
    """Draw values, pale, and their running mean; a single value as a point."""
    window = max(1, len(values) // SMOOTH)
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    if window > 1:
        axes.plot(steps, values, color=color, alpha=0.3, linewidth=1)
    axes.plot(steps[window - 1 :], smooth, color=color, label=label, marker="." if len(values) < 30 else "")


def blank(title: str, ylabel: str, xlabel: str = "step") -> tuple[Figure, Axes]:
    """Return an empty picture."""
    figure = Figure(figsize=(5.2, 3.1), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    return figure, axes


def as_share(axes: Axes) -> None:
    """Let the axis of a share go from 0 to 1, in percent."""
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def from_zero(axes: Axes) -> None:
    """Let an axis of what cannot be negative begin at 0."""
    top = axes.get_ylim()[1]
    axes.set_ylim(0, top if top > 0 else 1)


def add_legend(figure: Figure, axes: Axes) -> None:
    """Name the lines under the picture, where they cover none."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)


def draw(rows: Rows, names: Mapping[str, str], title: str, ylabel: str, scale: Any = None) -> Figure | None:
    """Draw metrics against steps; `names` maps them to labels, `scale` sets the axis. None if no step has any."""
    lines = {label: series(rows, name) for name, label in names.items()}
    lines = {label: line for label, line in lines.items() if len(line[0])}
    if not lines:
        return None
    figure, axes = blank(title, ylabel)
    for (label, (steps, values)), color in zip(lines.items(), LINES * len(lines), strict=False):
        draw_line(axes, steps, values, label, color)
    if scale:
        scale(axes)
    add_legend(figure, axes)
    return figure


# The pictures


def reward_picture(rows: Rows) -> Figure | None:
    """Draw the mean reward of every step with its 95 % interval over prompts."""
    figure = draw(rows, {"reward": "reward"}, "Reward", "mean of a step's completions")
    (steps, values), (known, errors) = series(rows, "reward"), series(rows, "reward_stderr")
    if figure and len(known) == len(steps):
        band = Z95 * errors
        figure.axes[0].fill_between(steps, values - band, values + band, color=LINES[0], alpha=0.15, linewidth=0)
    return figure


def progress_picture(rows: Rows) -> Figure | None:
    """Draw held-out accuracy with its 95 % interval, and pass@k and majority@k where they were measured."""
    more = dict.fromkeys(name for row in rows for name in row if "@" in name)
    strict = any(row.get("strict_accuracy") != row.get("accuracy") for row in rows)
    names = {"accuracy": "accuracy"} | ({"strict_accuracy": "in the format"} if strict else {})
    names |= {name: name for name in more}
    figure = draw(rows, names, "Held-out accuracy", "problems answered rightly", as_share)
    known = [row for row in rows if row.get("problems") and isinstance(row.get("accuracy"), int | float)]
    if figure and known:
        ends = np.array([interval(row["accuracy"], int(row["problems"])) for row in known])
        shares = np.array([row["accuracy"] for row in known])
        bars = np.abs(ends.T - shares)
        steps = [row["step"] for row in known]
        figure.axes[0].errorbar(steps, shares, bars, fmt="none", ecolor=LINES[0], capsize=3)
    return figure


def lengths_picture(rows: Rows) -> Figure | None:
    """Draw mean completion lengths, and the band from the shortest to the longest."""
    name = "completions/{}_length"
    figure = draw(rows, {name.format("mean"): "mean"}, "Completion length", "tokens")
    (steps, low), (_, high) = (series(rows, name.format(kind)) for kind in ("min", "max"))
    if figure and len(steps) and len(low) == len(high):
        axes = figure.axes[0]
        axes.fill_between(steps, low, high, color=LINES[0], alpha=0.15, linewidth=0, label="shortest to longest")
        from_zero(axes)
        add_legend(figure, axes)
    return figure


def against_reward(rows: Rows, name: str, title: str, label: str) -> Figure | None:
    """Draw a metric against the reward, a point per step, early steps pale; POINTS steps of a longer run."""
    pairs = [(row.get("reward"), row.get(name)) for row in rows]
    points = np.array([pair for pair in pairs if None not in pair], float).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    points = points[:: -(-len(points) // POINTS) or 1]
    if len(points) < 2:
        return None
    figure, axes = blank(title, label, "reward")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
    shades = [to_rgba(LINES[0], alpha) for alpha in np.linspace(0.4, 1, len(points))]
    axes.scatter(points[:, 0], points[:, 1], s=28, c=shades, linewidths=0)
    return figure


def gradient_picture(history: History) -> Figure | None:
    """Draw the gradient's norm, and the limit it is clipped to."""
    figure = draw(history.metrics, {"grad_norm": "norm before clipping"}, "Gradient", "norm")
    limit = history.settings.get("max_grad_norm")
    if not figure:
        return None
    axes = figure.axes[0]
    if isinstance(limit, int | float) and limit < 2 * axes.get_ylim()[1]:
        axes.axhline(limit, color=LINES[1], linestyle="--", linewidth=1, label="--max_grad_norm")
        add_legend(figure, axes)
    from_zero(axes)
    return figure


CLIPPED = {f"clip_ratio/{kind}_mean": f"{kind} ratio" for kind in ("low", "high")}


def loss_pictures(history: History) -> dict[str, Figure | None]:
    """Draw the loss, unless it is 0 by construction."""
    if loss_is_zero(history.settings, history.metrics):
        title = "Gradient against reward, later steps stronger"
        return {"gradient_reward": against_reward(history.metrics, "grad_norm", title, "gradient norm")}
    return {
        "loss": draw(history.metrics, {"loss": "loss"}, "Loss", "loss"),
        "loss_reward": against_reward(history.metrics, "loss", "Loss against reward, later steps stronger", "loss"),
    }


def held_out_pictures(rows: Rows) -> dict[str, Figure | None]:
    """Draw what --eval_steps measured."""
    parts = {"reward": "all, weighted"} | {f"rewards/{name}": name for name in held_out_parts(rows)}
    margin = draw(rows, {"margin": "margin"}, "Held-out margin", "nats per token, better over worse")
    loss = draw(rows, {"loss": "loss"}, "Held-out loss", "loss")
    progress = progress_picture(rows) or margin or loss
    return {
        "progress": progress,
        "held_out_rewards": draw(rows, parts, "Held-out rewards", "mean"),
        "held_out_loss": None if progress is loss else loss,
    }


def held_out_parts(rows: Rows) -> list[str]:
    """Return the reward functions that --eval_steps measured."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("rewards/"))
    return [name.removeprefix("rewards/") for name in names]


def training_pictures(history: History) -> dict[str, Figure | None]:
    """Draw the metrics of the steps."""
    rows, settings = history.metrics, history.settings
    parts = {f"rewards/{name}/mean": name for name in part_names(rows)}
    times = {name: name.removeprefix("time/") for row in rows[:1] for name in row if name.startswith("time/")}
    cut, equal = "completions/clipped_ratio", "frac_reward_zero_std"
    updates = settings.get("num_iterations", 1) * settings.get("num_minibatches", 1)
    kl = {"kl": "KL"} if settings.get("beta") else {}
    return {
        "reward": reward_picture(rows),
        "reward_parts": draw(rows, parts, "Rewards by function", "mean") if len(parts) > 1 else None,
        **loss_pictures(history),
        "lengths": lengths_picture(rows),
        "clipped": draw(rows, {cut: "cut"}, "Cut at the length limit", "completions", as_share),
        "contrast": draw(rows, {equal: "no contrast"}, "Groups of one reward, which teach nothing", "groups", as_share),
        "entropy": draw(rows, {"entropy": "entropy"}, "Entropy", "nats per token", from_zero),
        "grad_norm": gradient_picture(history),
        "kl": draw(rows, kl, "KL to the reference", "nats per token"),
        "clip": draw(rows, CLIPPED if updates > 1 else {}, "Tokens whose ratio is clipped", "tokens", as_share),
        "learning_rate": draw(rows, {"learning_rate": "rate"}, "Learning rate", "rate", from_zero),
        "seconds": draw(rows, times, "Seconds of a step", "seconds", from_zero),
    }


def pictures(history: History) -> dict[str, tuple[bytes, str]]:
    """Draw every picture that the run has data for -> {name: (PNG, SVG for the page)}."""
    with matplotlib.rc_context(STYLE):
        drawn = held_out_pictures(history.evaluations) | training_pictures(history)
        return {name: (png(figure), svg(figure)) for name, figure in drawn.items() if figure}


def png(figure: Figure) -> bytes:
    """Render a figure as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, facecolor="white")
    return file.getvalue()


def svg(figure: Figure) -> str:
    """Render a figure as an SVG element whose text and axes take the colour of the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    element = text[text.index("<svg") :].replace(INK, "currentColor")
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), element)
    title = figure.axes[0].get_title(loc="left")
    box = re.search(r'viewBox="[^"]*"', element)
    assert box
    return f'<svg role="img" aria-label="{title}" {box[0]}>' + element[element.index(">") + 1 :]
