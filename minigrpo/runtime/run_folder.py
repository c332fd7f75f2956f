"""The run folder: metrics.jsonl, sample completions, TensorBoard, and one readable line per step."""

import importlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minigrpo.config import RunOptions, UsageError

TIMINGS = ("step_time", "time/", "tokens_per_second", "rollout/tokens_per_second", "device/")
"""Prefixes of the metrics that measure the machine and so differ between equal runs."""


class TensorBoard:
    """Metrics for TensorBoard, in the run folder."""

    def __init__(self, folder: Path, first_step: int):
        from tensorboardX import SummaryWriter  # takes seconds where torch is installed, which it imports

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Metrics for Weights & Biases; a resumed run goes on under its own id. The key stays in the environment."""

    def __init__(self, folder: Path, options: RunOptions, settings: dict[str, Any]):
        wandb = import_wandb()
        path = folder / "wandb_id.txt"
        if not path.exists():
            path.write_text(secrets.token_hex(8) + "\n")
        try:
            self.run = wandb.init(
                project=options.wandb_project,
                mode=options.wandb_mode,
                dir=str(folder),
                id=path.read_text().strip(),
                resume="allow",
                name=folder.absolute().name,
                config=settings,
            )
        except wandb.errors.Error as error:
            raise UsageError(
                f"--report_to=wandb: {str(error).splitlines()[0]}; set WANDB_API_KEY, or --wandb_mode=offline"
            ) from error

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def close(self) -> None:
        self.run.finish()


Sink = TensorBoard | Wandb


def import_wandb() -> Any:
    """The wandb library, which is an extra; UsageError when it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UsageError("--report_to=wandb: not installed; pip install 'minigrpo[wandb]'") from error


def open_sinks(folder: Path, options: RunOptions, settings: dict[str, Any], first_step: int) -> list[Sink]:
    makers: dict[str, Callable[[], Sink]] = {
        "tensorboard": lambda: TensorBoard(folder, first_step),
        "wandb": lambda: Wandb(folder, options, settings),
    }
    return [make() for name, make in makers.items() if name in options.report_to.split(",")]


class RunFolder:
    """Sinks of one run. Only the first process of several writes."""

    def __init__(self, folder: Path, total_steps: int, sinks: list[Sink], writes: bool, first_step: int):
        self.folder = folder
        self.writes = writes
        self.tokens = 0.0
        self.sinks = sinks
        self.bar = tqdm(
            total=total_steps, unit="step", disable=not (writes and sys.stderr.isatty()), dynamic_ncols=True
        )
        self.cut_after(first_step)

    def cut_after(self, step: int) -> None:
        """Forgets what was logged after `step` finished steps: a resumed run logs it again."""
        self.bar.update(step)
        for name in ("metrics.jsonl", "completions.jsonl", "evaluations.jsonl"):
            path = self.folder / name
            if self.writes and path.exists():
                kept = [line for line in read_lines(path) if line_step(line) <= step] if step else []
                partial = path.with_suffix(".partial")
                partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
                os.replace(partial, path)
                if name == "metrics.jsonl" and kept:
                    self.tokens = json.loads(kept[-1])["num_tokens"]

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of step number `step`, counted from 1, to every sink."""
        if not self.writes:
            return
        self.tokens += metrics["num_tokens"]
        metrics = metrics | {"num_tokens": self.tokens}
        self.append("metrics.jsonl", [{"step": step} | metrics])
        for sink in self.sinks:
            sink.log(step, metrics)
        self.bar.write(step_line(step, self.bar.total, metrics), file=sys.stderr)
        self.bar.update(1)

    def append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Adds one line per row to a JSONL file of the folder, on disk before it returns."""
        if self.writes:
            write_lines(self.folder / name, rows)

    def say(self, text: str) -> None:
        if self.writes:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()
        for sink in self.sinks:
            sink.close()


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Appends rows to a JSONL file."""
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_lines(path: Path) -> list[str]:
    """A file's lines, whatever a crash left of the last one."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n")


def line_step(line: str) -> int:
    """The step of a metrics line; past every step for a line cut short by a crash."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, IndexError):
        return sys.maxsize
    return step if isinstance(step, int) else sys.maxsize


def last_step(path: Path) -> int:
    """Return the step of the last whole line of one of a run's JSONL files; 0 when there is none."""
    return max((line_step(line) for line in read_lines(path) if line_step(line) < sys.maxsize), default=0)


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The whole lines of one of a run's JSONL files; [] when there is none."""
    lines = read_lines(path) if path.is_file() else []
    return [json.loads(line) for line in lines if line_step(line) < sys.maxsize]


def step_line(step: int, total: int, metrics: dict[str, float]) -> str:
    """What a person reads of a step."""
    rewards = " ".join(
        f"{name.split('/')[1]} {value:.2f}"
        for name, value in metrics.items()
        if name.startswith("rewards/") and name.endswith("/mean")
    )
    phases = " ".join(
        f"{name.removeprefix('time/')} {value:.1f}" for name, value in metrics.items() if name.startswith("time/")
    )
    return (
        f"step {step}/{total}  reward {metrics['reward']:.3f} ({rewards})  loss {metrics['loss']:+.4f}  "
        f"kl {metrics['kl']:.4f}  grad {metrics['grad_norm']:.3f}  length {metrics['completions/mean_length']:.0f} "
        f"(cut {metrics['completions/clipped_ratio']:.0%})  {metrics['tokens_per_second']:.0f} tok/s  "
        f"{metrics['step_time']:.1f} s ({phases})"
    )


def check_empty(folder: Path) -> None:
    """UsageError when something is in the folder: a result never mixes with, or replaces, what was there."""
    if folder.is_dir() and any(folder.iterdir()):
        if (folder / "metrics.jsonl").exists():
            raise UsageError(
                f"--output_dir={folder}: holds a run already; name another folder, or let minigrpo.train continue "
                "its own with --resume"
            )
        raise UsageError(f"--output_dir={folder}: is not empty; name a new folder")


def check_writable(folder: Path) -> None:
    """UsageError when the run folder could not be made or written; makes nothing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UsageError(f"--output_dir={folder}: cannot be written, {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise UsageError(f"--output_dir={folder}: cannot be written, no permission in {existing}")


def make_folder(folder: Path) -> None:
    """Creates the run folder; UsageError naming it when the system refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir={folder}: cannot be written ({error.strerror or error})") from error


def completion_metrics(lengths: np.ndarray, stopped: np.ndarray) -> dict[str, float]:
    """Lengths in tokens, and the share of completions cut off by the length limit."""
    ended = lengths[stopped] if stopped.any() else np.zeros(1)
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/mean_terminated_length": float(ended.mean()),
        "completions/clipped_ratio": float(1 - stopped.mean()),
    }


def reward_metrics(total: np.ndarray, parts: dict[str, np.ndarray], group: int) -> dict[str, float]:
    """Mean reward, mean std inside groups, the share of groups without any, and each function's mean and std.

    NaN stands for no completion, or for a function that does not apply to it.
    """
    spreads = np.array([spread(row) for row in total.reshape(-1, group)])
    metrics = {
        "reward": mean(total),
        "reward_std": float(spreads.mean()),
        "frac_reward_zero_std": float((spreads < 1e-8).mean()),
    }
    for name, scores in parts.items():
        metrics |= {f"rewards/{name}/mean": mean(scores), f"rewards/{name}/std": spread(scores)}
    return metrics


def mean(values: np.ndarray) -> float:
    """Of those that are not NaN; 0 for none."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else 0.0


def spread(values: np.ndarray) -> float:
    """Unbiased std of those that are not NaN; 0 for fewer than two."""
    present = values[~np.isnan(values)]
    return float(present.std(ddof=1)) if len(present) > 1 else 0.0
