"""The run folder: metrics.jsonl, sample completions, settings, and one readable line per step."""

import copy
import json
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minigrpo.config import Settings, UsageError
from minigrpo.runtime.files import size_text, sync, write_whole, writing
from minigrpo.runtime.progress import Progress
from minigrpo.runtime.sinks import Sink, failure

TIMINGS = ("step_time", "time/", "tokens_per_second", "rollout/tokens_per_second", "device/")
"""Prefixes of the metrics that measure the machine and so differ between equal runs."""

LATEST = ("epoch", "num_tokens", "learning_rate", "device/peak_bytes")
"""Metrics of which the latest value stands for several steps; of all others the mean does."""

TOKEN_NUMBERS = ("logprobs", "old_logprobs", "policy_logprobs", "ref_logprobs", "entropy", "clipped")
"""Columns of completions.jsonl with a number per token, beside "tokens"; sinks are not told them."""

LOGS = ("metrics.jsonl", "completions.jsonl", "evaluations.jsonl", "answers.jsonl")

BEGUN = ("train.log", "config.json.partial")
"""Files of a run that was killed before its settings were written: it cannot be resumed, only begun again."""


class RunFolder:
    """The logs and sinks of one run. Only the first process of several writes."""

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        sinks: list[Sink],
        writes: bool,
        first_step: int,
        progress: Progress | None = None,
        logging_steps: int = 1,
    ):
        self.folder, self.total_steps, self.sinks, self.writes = folder, total_steps, sinks, writes
        self.progress = progress or Progress()
        self.logging_steps = logging_steps
        self.unreported: dict[int, dict[str, float]] = {}
        """Metrics by step that neither sinks nor the terminal have yet."""
        self.tokens = 0.0
        self.cut_after(first_step)
        self.progress.start_steps(total_steps, first_step)

    def cut_after(self, step: int) -> None:
        """Drop lines logged after `step` finished steps: a resumed run logs them again."""
        for path in (self.folder / name for name in LOGS if self.writes):
            if not path.exists():
                continue
            kept = [line for line in read_lines(path) if line_step(line) <= step] if step else []
            write_whole(path, "".join(line + "\n" for line in kept))
            if path.name == "metrics.jsonl" and kept:
                self.tokens = json.loads(kept[-1]).get("num_tokens", 0.0)

    def log(self, step: int, metrics: dict[str, float], compiled: bool = False) -> None:
        """Write the metrics of step number `step`, counted from 1, and after every --logging_steps tell the sinks.

        UsageError naming the file when the disk refuses. `compiled` leaves the step out of the time to finish.
        """
        if not self.writes:
            return
        self.tokens += metrics["num_tokens"]
        metrics = metrics | {"num_tokens": self.tokens}
        self.append("metrics.jsonl", [{"step": step} | metrics])
        self.unreported[step] = metrics
        if step % self.logging_steps == 0 or step == self.total_steps:
            self.report_steps()
        self.progress.step(step, metrics["step_time"], compiled)

    def report_steps(self) -> None:
        """Send the means over the steps since the last report to the sinks and the terminal, if there are any."""
        if not self.unreported:
            return
        step, metrics = max(self.unreported), means(list(self.unreported.values()))
        self.unreported = {}
        self.tell("log", step, metrics)
        self.say(step_line(step, self.total_steps, metrics))

    def log_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Write the results of --eval_steps after `step` steps, {'accuracy': 0.5}, to every sink."""
        if not self.writes:
            return
        self.append("evaluations.jsonl", [{"step": step} | values])
        self.tell("log", step, evaluated(values))
        self.say(f"step {step}: held out: " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def log_completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Write sample completions of a step to completions.jsonl and to every sink that takes them."""
        self.append("completions.jsonl", rows)
        if self.writes and rows:
            brief = [
                {name: value for name, value in row.items() if name not in ("tokens", *TOKEN_NUMBERS)} for row in rows
            ]
            self.tell("log_completions", step, sorted(brief, key=lambda row: row.get("member", 0)))

    def tell(self, method: str, step: int, content: Any) -> None:
        """Hand a copy of `content` to every sink that has the method; one that fails is named, and told nothing more.

        UsageError, as of a full disk, ends the run.
        """
        for sink in [sink for sink in self.sinks if hasattr(sink, method)]:
            try:
                getattr(sink, method)(step, copy.deepcopy(content))
            except (UsageError, KeyboardInterrupt):
                raise
            except BaseException as error:  # a library, or the user's own class, may raise anything
                self.sinks.remove(sink)
                self.say(
                    f"warning: sink {type(sink).__name__} failed at step {step}: {failure(error)}; it gets nothing "
                    "more, and the run goes on"
                )

    def append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Add one line per row to a JSONL file of the folder, on the disk itself before it returns."""
        if self.writes:
            write_lines(self.folder / name, rows)

    def say(self, text: str) -> None:
        """Show a line in the terminal and in train.log."""
        if self.writes:
            self.progress.say(text)

    def close(self) -> None:
        """Report the last steps and close every sink, also where one fails; UsageError for the first that does."""
        failures = []
        try:
            self.report_steps()
        except UsageError as error:
            failures.append(error)
        for sink in self.sinks:
            try:
                sink.close()
            except UsageError as error:
                failures.append(error)
            except Exception as error:
                self.say(f"warning: sink {type(sink).__name__} failed at its end: {failure(error)}")
        self.sinks = []
        if failures:
            raise failures[0]


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the steps that have it, or its latest value where a mean says nothing."""
    having = {name: [row[name] for row in rows if name in row] for row in rows for name in row}
    return {name: values[-1] if name in LATEST else sum(values) / len(values) for name, values in having.items()}


def evaluated(values: dict[str, float]) -> dict[str, float]:
    """Return the results of an evaluation under the names that sinks and --keep_best know: eval/accuracy."""
    return {f"eval/{name.removeprefix('eval/')}": value for name, value in values.items()}


def save_settings(folder: Path, settings: Settings) -> None:
    """Write config.json, which `--config` reads back, flags.txt, which `--flagfile` does, and command.txt.

    Each is whole or absent, also after a crash, and begins a run of its own: --resume is left out. A resumed run keeps
    the command that it was started with.
    """
    values = settings.as_dict() | ({"resume": False} if "run" in settings.sections else {})
    write_whole(folder / "config.json", json.dumps(values, indent=2) + "\n")
    given = {name: str(value) for name, value in values.items() if value is not None and name != "resume"}
    lines = ["--" + name + "=" + value.replace("\n", "\\n") for name, value in given.items()]
    write_whole(folder / "flags.txt", "\n".join(lines) + "\n")
    if not (folder / "command.txt").exists():
        write_whole(folder / "command.txt", command_line(settings) + "\n")


def command_line(settings: Settings) -> str:
    """Return the command with the flags that were given, as a shell reads it."""
    command = "sft" if "sft" in settings.sections else "train"
    given = {name: value for name, value in settings.as_dict().items() if name in settings.explicit}
    flags = [f"--{name}={value}".replace("\n", "\\n") for name, value in given.items()]
    return f"python -m minigrpo.{command} " + shlex.join(flags) if flags else f"python -m minigrpo.{command}"


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a JSONL file, on the disk itself before it returns; UsageError when the disk refuses."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with writing(path):
        new = not path.exists()
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync(path.parent)


def read_lines(path: Path) -> list[str]:
    """Return a file's lines, including a last one cut short by a crash."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n")


def line_step(line: str) -> int:
    """Return the step of a metrics line; past every step for a line cut short by a crash."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, IndexError):
        return sys.maxsize
    return step if isinstance(step, int) else sys.maxsize


def last_step(path: Path) -> int:
    """Return the step of the last whole line of one of a run's JSONL files; 0 when there is none."""
    return max((row["step"] for row in read_steps(path)), default=0)


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of one of a run's JSONL files; [] when there is none."""
    lines = read_lines(path) if path.is_file() else []
    return [json.loads(line) for line in lines if line_step(line) < sys.maxsize]


def step_line(step: int, total: int, metrics: dict[str, float]) -> str:
    """Format a step's metrics as a line for people; without what is measured of completions, if there are none."""
    parts = [f"step {step}/{total}"]
    if "reward" in metrics:
        parts.append(f"reward {metrics['reward']:.3f} ({reward_text(metrics)})")
    parts.append(f"loss {metrics['loss']:+.4f}")
    if "kl" in metrics:
        parts.append(f"kl {metrics['kl']:.4f}")
    parts.append(f"grad {metrics['grad_norm']:.3f}")
    if "learning_rate" in metrics:
        parts.append(f"lr {metrics['learning_rate']:.1e}")
    if "completions/mean_length" in metrics:
        parts.append(
            f"length {metrics['completions/mean_length']:.0f} (cut {metrics['completions/clipped_ratio']:.0%})"
        )
    parts += [f"{metrics['tokens_per_second']:.0f} tok/s", f"{metrics['step_time']:.1f} s ({phases_text(metrics)})"]
    if peak := metrics.get("device/peak_bytes"):
        parts.append(f"memory {size_text(int(peak))}")
    return "  ".join(parts)


def reward_text(metrics: dict[str, float]) -> str:
    """List the reward functions' means."""
    means = {name: value for name, value in metrics.items() if name.startswith("rewards/") and name.endswith("/mean")}
    return " ".join(f"{name.split('/')[1]} {value:.2f}" for name, value in means.items())


def phases_text(metrics: dict[str, float]) -> str:
    """List the seconds of the phases."""
    phases = {name.removeprefix("time/"): value for name, value in metrics.items() if name.startswith("time/")}
    return " ".join(f"{name} {value:.1f}" for name, value in phases.items())


def check_empty(folder: Path) -> None:
    """Raise UsageError when something is in the folder: a result never mixes with, or replaces, what was there."""
    if folder.is_dir() and any(path.name not in BEGUN for path in folder.iterdir()):
        if (folder / "metrics.jsonl").exists():
            raise UsageError(
                f"--output_dir={folder}: holds a run already; name another folder, or continue it with --resume"
            )
        raise UsageError(f"--output_dir={folder}: is not empty; name a new folder")


def check_writable(folder: Path) -> None:
    """Raise UsageError when the run folder could not be made or written; make nothing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UsageError(f"--output_dir={folder}: cannot be written, {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise UsageError(f"--output_dir={folder}: cannot be written, no permission in {existing}")


def make_folder(folder: Path) -> None:
    """Create the run folder; UsageError naming it when the system refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir={folder}: cannot be written ({error.strerror or error})") from error


def memory_metrics() -> dict[str, float]:
    """Return the most bytes that the first device of the process has held; {} where the backend does not tell."""
    memory = jax.local_devices()[0].memory_stats() or {}
    return {"device/peak_bytes": memory["peak_bytes_in_use"]} if "peak_bytes_in_use" in memory else {}


def completion_metrics(lengths: np.ndarray, stopped: np.ndarray) -> dict[str, float]:
    """Return lengths in tokens, of all completions and of those that ended, and the share cut by the length limit."""
    ended = lengths[stopped] if stopped.any() else np.zeros(1)
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/mean_terminated_length": float(ended.mean()),
        "completions/min_terminated_length": float(ended.min()),
        "completions/max_terminated_length": float(ended.max()),
        "completions/clipped_ratio": float(1 - stopped.mean()),
    }


def reward_metrics(
    total: np.ndarray, parts: dict[str, np.ndarray], group: int, scale: str = "group"
) -> dict[str, float]:
    """Return mean and std of all rewards, the share of groups without any spread, and each function's mean and std.

    NaN marks a missing completion, or a function that does not apply to it. Under --scale_rewards=batch the whole batch
    is one group, so the share is 0 or 1, as in TRL.
    """
    rows = total.reshape(1, -1) if scale == "batch" else total.reshape(-1, group)
    spreads = np.array([spread(row) for row in rows])
    metrics = {
        "reward": mean(total),
        "reward_std": spread(total),
        "reward_stderr": standard_error(total, group),
        "frac_reward_zero_std": float((spreads < 1e-8).mean()),
    }
    for name, scores in parts.items():
        metrics |= {f"rewards/{name}/mean": mean(scores), f"rewards/{name}/std": spread(scores)}
    return metrics


def mean(values: np.ndarray) -> float:
    """Return the mean of values that are not NaN; 0 for none."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else 0.0


def standard_error(total: np.ndarray, group: int) -> float:
    """Return the standard error of the mean reward: groups are independent, completions of one prompt are not."""
    means = np.array([mean(row) for row in total.reshape(-1, group) if not np.isnan(row).all()])
    return spread(means) / max(1, len(means)) ** 0.5


def spread(values: np.ndarray) -> float:
    """Return the unbiased std of values that are not NaN; 0 for fewer than two."""
    present = values[~np.isnan(values)]
    return float(present.std(ddof=1)) if len(present) > 1 else 0.0
