"""Sinks of a run's metrics and completions: TensorBoard, Weights & Biases, trackio, MLflow, a user's own class."""

import functools
import importlib
import inspect
import json
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from minigrpo.config import RunOptions, UsageError
from minigrpo.runtime.files import write_whole, writing
from minigrpo.user_code import error_place, load_named, shown

PROJECT = "minigrpo"
"""Name of the project or experiment where the user names none."""

Rows = list[dict[str, Any]]
Opener = Callable[[Path, dict[str, Any], int], "Sink"]
"""(run folder, settings by flag, finished steps) -> an open sink."""


@runtime_checkable
class Sink(Protocol):
    """A receiver of metrics. One with `log_completions(step, rows)` gets sample completions too."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Take the metrics of a step."""

    def close(self) -> None:
        """Close the sink: nothing follows."""


def grouped(metrics: dict[str, float]) -> dict[str, float]:
    """Return metrics under the tags that transformers gives them: train/loss, eval/accuracy."""
    return {name if name.startswith("eval/") else f"train/{name}": value for name, value in metrics.items()}


def as_table(rows: Rows) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and cells of sample completions; a cell is a text, a number or None.

    >>> as_table([{"step": 1, "prompt": "2+2", "rewards": {"answer": 3.0}}, {"step": 1, "prompt": [{"role": "user"}]}])
    (['step', 'prompt', 'rewards/answer'], [[1, '2+2', 3.0], [1, '[{"role": "user"}]', None]])
    """
    flat = [
        {name: value for name, value in row.items() if name != "rewards"}
        | {f"rewards/{name}": score for name, score in (row.get("rewards") or {}).items()}
        for row in rows
    ]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    return columns, [[as_cell(row.get(name)) for name in columns] for row in flat]


def as_cell(value: Any) -> Any:
    """Return a value itself, or as JSON where it is no text or number."""
    return value if isinstance(value, str | int | float | None) else json.dumps(value, ensure_ascii=False)


def as_text(rows: Rows) -> str:
    """Return sample completions as a block for people: for each, its scores, its prompt and its completion."""
    blocks = []
    for row in rows:
        columns, (cells,) = as_table([row])
        values = {name: cell for name, cell in zip(columns, cells, strict=True) if cell is not None}
        prompt, completion = str(values.pop("prompt", "")), str(values.pop("completion", ""))
        title = "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
        )
        blocks.append(f"--- {title}\n{indented('prompt', prompt)}\n{indented('completion', completion)}")
    return "\n".join(blocks)


def indented(label: str, text: str) -> str:
    """Return a label and the lines of a text under it."""
    return f"{label}:\n" + "\n".join(f"    {line}" for line in text.splitlines())


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

    def log_completions(self, step: int, rows: Rows) -> None:
        """Write sample completions as text of a step; UsageError when the disk refuses."""
        summary = self.events.Event().summary
        value = summary.value.add(tag="completions")
        value.metadata.plugin_data.plugin_name = "text"
        value.tensor.dtype = 7  # DT_STRING
        block = "\n".join(f"    {line}" for line in as_text(rows).splitlines())  # four spaces: shown as it is
        value.tensor.string_val.append(block.encode("utf-8", "backslashreplace"))
        value.tensor.tensor_shape.dim.add(size=1)
        with writing(self.path):
            self.write(step, summary=summary)

    def close(self) -> None:
        """Close the file; each event is in it already."""
        with writing(self.path):
            self.writer._py_recordio_writer.close()


class Wandb:
    """Metrics for Weights & Biases; a resumed run goes on under its own id. The key stays in the environment."""

    def __init__(self, folder: Path, options: RunOptions, settings: dict[str, Any]):
        self.wandb = import_extra("wandb")
        try:
            named = wandb_names(self.wandb.setup().settings, folder, options)
            identity = lasting_name(folder / "wandb_id.txt", secrets.token_hex(8))
            self.run = self.wandb.init(id=identity, resume="allow", config=settings, **named)
        except self.wandb.errors.Error as error:
            raise UsageError(
                f"--report_to=wandb: {str(error).splitlines()[0]}; set WANDB_API_KEY, or --wandb_mode=offline"
            ) from error
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send metrics of a step."""
        self.run.log(grouped(metrics) | {"train/global_step": step})

    def log_completions(self, step: int, rows: Rows) -> None:
        """Send sample completions as a new table."""
        columns, cells = as_table(rows)
        table = self.wandb.Table(columns=columns, data=cells, allow_mixed_types=True)
        self.run.log({"completions": table, "train/global_step": step})

    def close(self) -> None:
        """Wait until everything is sent."""
        self.run.finish()


def wandb_names(known: Any, folder: Path, options: RunOptions) -> dict[str, Any]:
    """Return arguments of wandb.init: flags, and our values for those that WANDB_... variables, `known`, leave open."""
    given = {"mode": options.wandb_mode, "project": options.wandb_project}
    ours = {"project": PROJECT, "name": folder.absolute().name, "dir": str(folder)}
    unset = {
        "project": known.project in (None, "", "uncategorized"),
        "name": not known.run_name,
        "dir": Path(known.root_dir) == Path.cwd(),
    }
    defaults = {name: value for name, value in ours.items() if unset[name]}
    return defaults | {name: value for name, value in given.items() if value is not None}


def lasting_name(path: Path, new: str) -> str:
    """Return the name that a file of the run folder holds, and write `new` into it where there is none yet."""
    if not path.exists():
        write_whole(path, new + "\n")
    return path.read_text().strip()


class Trackio:
    """Metrics for trackio, in its own folder (TRACKIO_DIR); a resumed run goes on under its own name."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.trackio = import_extra("trackio")
        name = lasting_name(folder / "trackio_name.txt", f"{folder.absolute().name}-{secrets.token_hex(2)}")
        self.run = self.trackio.init(project=PROJECT, name=name, resume="allow", config=settings, embed=False)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send metrics of a step."""
        self.run.log(grouped(metrics), step=step)

    def log_completions(self, step: int, rows: Rows) -> None:
        """Send sample completions as a new table."""
        pandas = importlib.import_module("pandas")  # which trackio needs, and its tables
        columns, cells = as_table(rows)
        self.run.log({"completions": self.trackio.Table(dataframe=pandas.DataFrame(cells, columns=columns))}, step=step)

    def close(self) -> None:
        """Wait until everything is written."""
        self.run.finish()


PARAMS_AT_ONCE = 100
"""Settings that MLflow takes in one call."""


class Mlflow:
    """Metrics for MLflow, in RUN/mlflow unless MLFLOW_TRACKING_URI is set; a resumed run goes on under its own id."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.mlflow = import_extra("mlflow")
        self.client, experiment = self.open_store((folder / "mlflow").absolute())
        path = folder / "mlflow_id.txt"
        if path.exists():
            self.id = path.read_text().strip()
            self.client.update_run(self.id, status="RUNNING")
            return
        self.id = self.client.create_run(experiment, run_name=folder.absolute().name).info.run_id
        write_whole(path, self.id + "\n")
        params = [self.mlflow.entities.Param(name, str(value)) for name, value in settings.items()]
        for start in range(0, len(params), PARAMS_AT_ONCE):
            self.client.log_batch(self.id, params=params[start : start + PARAMS_AT_ONCE])

    def open_store(self, own: Path) -> tuple[Any, str]:
        """Return a client, of the folder `own` where the environment names no server, and the experiment's id."""
        named = self.mlflow.environment_variables.MLFLOW_EXPERIMENT_NAME.get() or PROJECT
        place: dict[str, str] = {}
        if self.mlflow.is_tracking_uri_set():
            client = self.mlflow.MlflowClient()
        else:
            with writing(own):
                own.mkdir(exist_ok=True)
            client = self.mlflow.MlflowClient(tracking_uri=f"sqlite:///{own}/mlflow.db")
            place = {"artifact_location": (own / "artifacts").as_uri()}
        known = client.get_experiment_by_name(named)
        return client, known.experiment_id if known else client.create_experiment(named, **place)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send metrics of a step, with _ for the characters that MLflow's names must not have."""
        now, metric = int(time.time() * 1000), self.mlflow.entities.Metric
        values = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in grouped(metrics).items()}
        self.client.log_batch(self.id, [metric(name, float(value), now, step) for name, value in values.items()])

    def log_completions(self, step: int, rows: Rows) -> None:
        """Send sample completions as a table of their own, as MLflow's log_table writes it."""
        columns, cells = as_table(rows)
        self.client.log_dict(self.id, {"columns": columns, "data": cells}, f"completions/step-{step:06d}.json")

    def close(self) -> None:
        """Mark the run as finished."""
        self.client.set_terminated(self.id)


class Terminal:
    """Sample completions as a block of text in the terminal and train.log, `count` of them per step."""

    def __init__(self, say: Callable[[str], None], count: int):
        self.say, self.count = say, count

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Leave metrics to the line of the step."""

    def log_completions(self, step: int, rows: Rows) -> None:
        """Print the first completions."""
        if rows:
            self.say(as_text(rows[: self.count]))

    def close(self) -> None:
        """Leave the terminal as it is."""


def import_extra(name: str) -> Any:
    """Return a library that is an extra; UsageError when it is not installed or does not import."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == name
        reason = "not installed" if absent else f"cannot be imported ({shown(error)})"
        raise UsageError(f"--report_to={name}: {reason}; pip install 'minigrpo[{name}]'") from error


# A user's own

CALLS: dict[str, tuple[Any, ...]] = {"__init__": (Path(), {}), "log": (0, {}), "log_completions": (0, []), "close": ()}
"""Methods of a sink -> arguments that they are called with."""

TAKEN = {"__init__": "folder, settings", "log": "step, metrics", "log_completions": "step, rows", "close": ""}
"""Those arguments' names."""


def own_sink(given: str) -> Callable[..., Any]:
    """Return the class of FILE.py:CLASS or PACKAGE.MODULE:CLASS; UsageError for one that is no sink."""
    source, _, name = given.rpartition(":")
    found = load_named("--report_to", source, name, {}, "class")
    if not isinstance(found, type):
        raise UsageError(f"--report_to={given}: {name} is no class; a sink is a class with log(step, metrics), close()")
    for method, arguments in CALLS.items():
        if method != "log_completions" or hasattr(found, method):
            check_method(given, found, method, arguments)
    return found


def check_method(given: str, sink: type, method: str, arguments: tuple[Any, ...]) -> None:
    """Raise UsageError for a method that is missing, or that cannot be called with these arguments."""
    act = getattr(sink, method, None)
    if not callable(act):
        raise UsageError(f"--report_to={given}: has no {method}({TAKEN[method]}); a sink has log and close")
    static = isinstance(inspect.getattr_static(sink, method), staticmethod | classmethod)
    try:
        inspect.signature(act).bind(*(() if static else (None,)), *arguments)
    except TypeError as error:
        raise UsageError(f"--report_to={given}: {method} must take ({TAKEN[method]}), and does not") from error


# Opening


def find_sinks(options: RunOptions) -> dict[str, Opener]:
    """Return the sinks that --report_to names, to be opened later; UsageError for one that cannot be had."""
    openers: dict[str, Opener] = {}
    for name in options.sinks:
        if ":" in name:
            openers[name] = functools.partial(open_own, own_sink(name))
        elif name != "tensorboard":
            import_extra(name)
    ours: dict[str, Opener] = {
        "tensorboard": lambda folder, settings, first_step: TensorBoard(folder, first_step),
        "wandb": lambda folder, settings, first_step: Wandb(folder, options, settings),
        "trackio": lambda folder, settings, first_step: Trackio(folder, settings),
        "mlflow": lambda folder, settings, first_step: Mlflow(folder, settings),
    }
    return {name: openers.get(name) or ours[name] for name in options.sinks}


def open_own(sink: Callable[..., Any], folder: Path, settings: dict[str, Any], first_step: int) -> Any:
    """Construct a user's own sink."""
    return sink(folder, dict(settings))


def open_sinks(openers: dict[str, Opener], folder: Path, settings: dict[str, Any], first_step: int) -> list[Sink]:
    """Open sinks in a run folder; UsageError naming the one that cannot be opened."""
    sinks = []
    for name, opener in openers.items():
        try:
            sinks.append(opener(folder, settings, first_step))
        except (UsageError, KeyboardInterrupt):
            raise
        except BaseException as error:  # a library, or the user's own class, may raise anything
            raise UsageError(f"--report_to={name}: cannot be opened: {failure(error)}") from error
    return sinks


def failure(error: BaseException) -> str:
    """Return what a sink raised, and where, in one line."""
    return f"{shown(error)}{error_place(error, None)}"
