"""Sinks of a run's metrics: TensorBoard and Weights & Biases."""

import importlib
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minigrpo.config import RunOptions, UsageError
from minigrpo.runtime.files import write_whole, writing


def grouped(metrics: dict[str, float]) -> dict[str, float]:
    """Return metrics under the tags that transformers gives them: train/loss, eval/accuracy."""
    return {name if name.startswith("eval/") else f"train/{name}": value for name, value in metrics.items()}


class TensorBoard:
    """Metrics for TensorBoard, in the run folder; written as they come, without a thread that could hold up the end."""

    def __init__(self, folder: Path, first_step: int):
        from tensorboardX.event_file_writer import EventsWriter  # imports torch where installed, which takes seconds
        from tensorboardX.proto import event_pb2

        self.events, self.path = event_pb2, folder / "tensorboard"
        with writing(self.path):
            self.path.mkdir(exist_ok=True)
            self.writer = EventsWriter(str(self.path / "events"), f".{os.getpid()}.{first_step}")
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self.write(first_step + 1, session_log=start)  # what an earlier process logged from here on is dropped

    def write(self, step: int, **content: Any) -> None:
        """Write one event and hand it to the system."""
        self.writer.write_event(self.events.Event(wall_time=time.time(), step=step, **content))
        self.writer.flush()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics of a step; UsageError when the disk refuses."""
        summary = self.events.Event().summary
        for name, value in grouped(metrics).items():
            summary.value.add(tag=name, simple_value=value)
        with writing(self.path):
            self.write(step, summary=summary)

    def close(self) -> None:
        """Close the file; each event is in it already."""
        with writing(self.path):
            self.writer._py_recordio_writer.close()


class Wandb:
    """Metrics for Weights & Biases; a resumed run goes on under its own id. The key stays in the environment."""

    def __init__(self, folder: Path, options: RunOptions, settings: dict[str, Any]):
        wandb = import_wandb()
        path = folder / "wandb_id.txt"
        if not path.exists():
            write_whole(path, secrets.token_hex(8) + "\n")
        try:
            named = wandb_names(wandb.setup().settings, folder, options)
            self.run = wandb.init(id=path.read_text().strip(), resume="allow", config=settings, **named)
        except wandb.errors.Error as error:
            raise UsageError(
                f"--report_to=wandb: {str(error).splitlines()[0]}; set WANDB_API_KEY, or --wandb_mode=offline"
            ) from error
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send metrics of a step."""
        self.run.log(grouped(metrics) | {"train/global_step": step})

    def close(self) -> None:
        """Wait until everything is sent."""
        self.run.finish()


def wandb_names(known: Any, folder: Path, options: RunOptions) -> dict[str, Any]:
    """Return arguments of wandb.init: flags, and our values for those that WANDB_... variables, `known`, leave open."""
    given = {"mode": options.wandb_mode, "project": options.wandb_project}
    ours = {"project": "minigrpo", "name": folder.absolute().name, "dir": str(folder)}
    unset = {
        "project": known.project in (None, "", "uncategorized"),
        "name": not known.run_name,
        "dir": Path(known.root_dir) == Path.cwd(),
    }
    defaults = {name: value for name, value in ours.items() if unset[name]}
    return defaults | {name: value for name, value in given.items() if value is not None}


Sink = TensorBoard | Wandb


def import_wandb() -> Any:
    """Return the wandb library, which is an extra; UsageError when it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UsageError("--report_to=wandb: not installed; pip install 'minigrpo[wandb]'") from error


def open_sinks(folder: Path, options: RunOptions, settings: dict[str, Any], first_step: int) -> list[Sink]:
    """Return the sinks that --report_to names."""
    makers: dict[str, Callable[[], Sink]] = {
        "tensorboard": lambda: TensorBoard(folder, first_step),
        "wandb": lambda: Wandb(folder, options, settings),
    }
    return [make() for name, make in makers.items() if name in options.report_to.split(",")]
