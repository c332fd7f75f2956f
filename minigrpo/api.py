"""The Python door: train, load, generate and evaluate from a script or a notebook. Arguments have the flags' names.

>>> import minigrpo  # doctest: +SKIP
>>> def brevity(completions, **kwargs):
...     return [-len(text) / 100 for text in completions]
>>> run = minigrpo.train(model="builtin:tiny", rewards=["correctness", brevity], max_steps=20)  # doctest: +SKIP
>>> run.metrics[-1]["reward"], run.generate(["What is 2 + 3?"])  # doctest: +SKIP
"""

import dataclasses
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minigrpo.config import GenerateOptions, Settings, UsageError, check_limits, field_type, section_types
from minigrpo.other_names import other_name, similar

RewardLike = str | Callable[..., Sequence[float]] | tuple[str | Callable[..., Sequence[float]], float | int]
"""A reward's name as in --reward, a function with TRL's signature, or either with its weight."""

Rows = str | Path | Iterable[Mapping[str, Any]]
"""A dataset: what --dataset takes, or rows: a list of dicts, a `datasets.Dataset` or a pandas DataFrame."""

PYTHON_NAMES = {
    "reward_funcs": "use rewards=[function, ...]",
    "reward_functions": "use rewards=[function, ...]",
    "train_dataset": "use dataset=rows",
    "callbacks": "use on_step=function, which gets the step and its metrics",
}
"""Arguments of other libraries whose place here is not a flag's."""

OnStep = Callable[[int, dict[str, float]], None]


def settings_of(sections: tuple[str, ...], flags: Mapping[str, Any]) -> Settings:
    """Return a command's settings from keyword arguments; UsageError for an unknown name or a bad value."""
    types = section_types(sections, Settings).values()
    known = {field.name: field for options in types for field in dataclasses.fields(options)}
    values = {}
    for name, value in flags.items():
        if name not in known:
            near = similar(name, known)
            hint = PYTHON_NAMES.get(name) or other_name(name) or (f"did you mean {near[0]}?" if near else "")
            raise UsageError(f"{name}: no such argument{'; ' if hint else ''}{hint.replace('--', '')}")
        if value is not None:
            values[name] = as_flag(known[name], value)
            check_limits(known[name], values[name])
    return Settings(sections=sections, explicit=frozenset(values)).with_values(values)


def as_flag(field: dataclasses.Field[Any], value: Any) -> Any:
    """Return a flag's value: for one that is text, (4, 2) as '4,2', and numbers, booleans and paths as text."""
    if field_type(field) is not str:
        return value
    if field.name == "stop" and isinstance(value, tuple | list):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_dataset(rows: Rows, name: str = "dataset") -> str:
    """Return the value of --dataset for rows, which are written to a file of minigrpo's cache under their digest.

    UsageError that begins with `name`, the argument's, for anything that holds no rows.
    """
    if isinstance(rows, str | Path):
        return str(rows)
    text = "".join(row_text(f"{name}: row {number}", row) for number, row in enumerate(row_list(rows, name), 1))
    if not text:
        raise UsageError(f"{name}: holds no rows")
    folder = Path.home() / ".cache" / "minigrpo" / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.jsonl"
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    return str(path)


def row_list(rows: Any, name: str) -> Iterable[Any]:
    """Return the rows of a list, a Dataset, or a DataFrame, whose missing cells become None."""
    if hasattr(rows, "notna") and hasattr(rows, "to_dict"):
        return list(rows.astype(object).where(rows.notna(), None).to_dict("records"))
    if isinstance(rows, Mapping):
        raise UsageError(
            f"{name}: a dict of {', '.join(map(str, rows))[:60]}; give a list of rows, or one of its splits"
        )
    if not isinstance(rows, Iterable):
        raise UsageError(f"{name}: {rows!r:.60} is neither a name nor a list of rows, each a dict")
    return rows


def row_text(where: str, row: Any) -> str:
    """Return a row as a line of JSON; UsageError that begins with `where` for one that cannot be written so."""
    try:
        text = json.dumps(dict(row), ensure_ascii=False, default=lambda cell: cell.tolist()) + "\n"
        return text.encode().decode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: holds half of a surrogate pair, which is no character") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{where}: {row!r:.60} is no dict of texts, numbers, lists and dicts ({error!s:.80})"
        ) from error


def as_rewards(rewards: Any) -> str:
    """Return the value of --reward for a reward or a list of them; UsageError for anything else."""
    several = isinstance(rewards, list | tuple) and not is_reward(rewards)
    given = list(rewards) if several else [rewards]
    wrong = next((reward for reward in given if not is_reward(reward)), None)
    if wrong is not None or not given:
        raise UsageError(f"rewards: {wrong!r:.60} is neither a name, a function, nor a pair of one with its weight")
    return ",".join(map(as_reward, given))


def is_reward(value: Any) -> bool:
    """Tell if a value is a reward's name, a function, or a pair of either with a number."""
    if isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[1], int | float):
        value = value[0]
    return isinstance(value, str) or callable(value)


def as_reward(reward: RewardLike) -> str:
    """Return a reward as --reward names it; a function is known by its own name from here on."""
    from minigrpo.data.rewards import FROM_PYTHON

    function, weight = reward if isinstance(reward, tuple) else (reward, None)
    starred = "" if weight is None else f"*{weight}"
    if isinstance(function, str):
        return function + starred
    name = getattr(function, "__name__", type(function).__name__)
    if FROM_PYTHON.setdefault(name, function) is not function:
        FROM_PYTHON[name] = function  # a cell that was run again
    return f"python:{name}{starred}"


class StepCallback:
    """A sink that calls a function with the metrics of training; evaluations have none of them."""

    def __init__(self, on_step: OnStep):
        self.on_step = on_step

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Call the function."""
        if not all(name.startswith("eval/") for name in metrics):
            self.on_step(step, metrics)

    def close(self) -> None:
        """Do nothing: the function holds nothing open."""


# Training


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run that has ended, and its folder."""

    folder: str | Path
    finished: bool
    """False for one that was asked to stop; `train(resume=True, output_dir=run.folder)` goes on."""

    @property
    def metrics(self) -> list[dict[str, float]]:
        """Return the metrics of every step, as in metrics.jsonl."""
        return self.lines("metrics.jsonl")

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """Return the results of every evaluation on held-out rows, as in evaluations.jsonl."""
        return self.lines("evaluations.jsonl")

    def lines(self, name: str) -> list[dict[str, float]]:
        """Return the rows of a JSONL file of the folder."""
        from minigrpo.runtime.run_folder import read_steps

        return read_steps(self.local / name)

    @functools.cached_property
    def local(self) -> Path:
        """Return the folder, or a copy of it on this host when it is in a bucket."""
        from minigrpo.remote import local_copy

        return local_copy("output_dir", str(self.folder))

    @functools.cached_property
    def model(self) -> "Model":
        """Return the trained model."""
        return load(self.local / "final")

    def generate(self, prompts: str | Sequence[Any], **more: Any) -> Any:
        """Answer as `Model.generate` does, with the trained model."""
        return self.model.generate(prompts, **more)

    def evaluate(self, dataset: Rows = "auto", **more: Any) -> dict[str, Any]:
        """Measure as `Model.evaluate` does, with the trained model."""
        return self.model.evaluate(dataset, **more)

    def save(self, folder: str | Path) -> Path:
        """Copy the trained model, as a Hub folder, to a new place -> that place."""
        return Path(shutil.copytree(self.local / "final", folder))


def train(
    *,
    dataset: Rows = "auto",
    rewards: RewardLike | Sequence[RewardLike] | None = None,
    on_step: OnStep | None = None,
    **flags: Any,
) -> TrainedRun:
    """Train a model with GRPO -> the run; UsageError in one line for bad input.

    `flags` are those of `python -m minigrpo.train`: model, max_steps, mesh=(4, 2) ... `on_step(step, metrics)` is
    called after every step, or with the means of every `logging_steps`. Call it again with resume=True and the run's
    output_dir to go on.
    """
    from minigrpo import train as command
    from minigrpo.runtime.progress import Progress
    from minigrpo.runtime.session import choose_home, with_run_settings
    from minigrpo.runtime.workers import joined

    if on_step is not None and not callable(on_step):
        raise UsageError(f"on_step: {on_step!r:.60} is no function of (step, metrics)")
    folder = run_folder(flags.pop("output_dir", None), flags.get("resume"))
    own: dict[str, Any] = {"output_dir": folder, "dataset": written(dataset, "dataset")}
    own |= {"eval_dataset": written(flags.pop("eval_dataset", None), "eval_dataset")}
    own |= {"reward": as_rewards(rewards)} if rewards is not None else {}
    settings = settings_of(command.SECTIONS, flags | own)
    sinks = {"on_step": lambda folder, values, step: StepCallback(on_step)} if on_step else {}
    with joined(settings), Progress() as progress, choose_home(settings.run) as home:
        code = command.run_training(with_run_settings(settings, home), progress, home, sinks)
    return TrainedRun(folder if "://" in folder else Path(folder), code == 0)


def run_folder(given: Any, resume: Any) -> str:
    """Return the run folder that the argument output_dir names, whole: the process may change its own folder."""
    if given in (None, "auto"):
        if resume:
            raise UsageError("output_dir: name the run to continue")
        given = time.strftime("runs/%Y%m%d-%H%M%S")
    return str(given) if "://" in str(given) else str(Path(given).absolute())


def written(rows: Any, name: str) -> str | None:
    """Return a dataset's name, of rows that of the file they are written to; None for one that the flags choose."""
    return None if rows is None or (isinstance(rows, str) and rows == "auto") else as_dataset(rows, name)


# A loaded model


LIMITED = {field.name: field for field in dataclasses.fields(GenerateOptions)}
"""Flags of the command whose limits hold for arguments too."""


def is_chat(prompt: Any) -> bool:
    """Tell if a prompt is a chat: a list of messages."""
    return isinstance(prompt, list | tuple) and bool(prompt) and all(isinstance(part, Mapping) for part in prompt)


def check_prompts(prompts: Any) -> list[Any]:
    """Return several prompts; UsageError for what is no list of texts and chats."""
    several = list(prompts) if isinstance(prompts, Iterable) and not isinstance(prompts, Mapping) else [prompts]
    wrong = [prompt for prompt in several if not isinstance(prompt, str) and not is_chat(prompt)]
    if wrong:
        raise UsageError(
            f"prompts: {wrong[0]!r:.60} is neither a text nor a list of messages, each with role and content"
        )
    return several


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on its devices, ready to answer."""

    build: Any
    params: Any

    def generate(
        self, prompts: str | Sequence[Any], num_generations: int = 1, seed: int = 0
    ) -> str | list[str] | list[list[str]]:
        """Answer prompts: texts, or chats as lists of messages.

        A single prompt gives a text, several give a list; with num_generations above 1 each answer is a list itself.
        """
        from minigrpo import generate as command
        from minigrpo.rollout.stop import end_at_stops

        alone = isinstance(prompts, str) or is_chat(prompts)
        several: list[Any] = [prompts] if alone else check_prompts(prompts)
        check_limits(LIMITED["num_generations"], num_generations)
        check_limits(LIMITED["seed"], seed)
        if not several:
            return []
        tokens = [command.encode(self.build, prompt) for prompt in several]
        rollout = self.generator(self.params, tokens, list(range(len(several))), num_generations, (seed, 0))
        rollout = end_at_stops(rollout, self.build.settings.rollout.stop_texts, self.build.tokenizer.decode)
        texts = self.build.tokenizer.decode(rollout.completions)
        groups = [texts[at : at + num_generations] for at in range(0, len(texts), num_generations)]
        answers = [group[0] if num_generations == 1 else group for group in groups]
        return answers[0] if alone else answers

    @functools.cached_property
    def generator(self) -> Any:
        """Return the generator, whose program is compiled once for every number of prompts."""
        from minigrpo.build import make_generator
        from minigrpo.planning.memory import device_share_bytes, pool_limit

        limit = pool_limit(self.build.spec, device_share_bytes(self.params))
        return make_generator(self.build.spec, self.build.settings.rollout, limit)

    def evaluate(self, dataset: Rows = "auto", eval_size: int = 500, num_generations: int = 1) -> dict[str, Any]:
        """Measure the accuracy on held-out rows, greedily for one answer each -> what `minigrpo.evaluate` prints."""
        from minigrpo import evaluate as command
        from minigrpo.config import EvalOptions
        from minigrpo.runtime.progress import Progress

        settings = self.build.settings
        if dataset != "auto":
            settings = settings.with_values({"dataset": as_dataset(dataset)})
        asked = dataclasses.replace(
            settings, evaluate=EvalOptions(eval_size=eval_size, num_generations=num_generations)
        )
        built = dataclasses.replace(self.build, spec=dataclasses.replace(self.build.spec, settings=asked))
        problems = command.held_out(built.tokenizer, asked.data, eval_size)
        decoding = command.greedy_options(asked.rollout) if num_generations == 1 else asked.rollout
        return command.evaluate(built, problems, decoding, Progress(), self.params)[0]


def load(model: str | Path = "auto", **flags: Any) -> Model:
    """Load a model, a run folder, one of its checkpoints or an adapter, as `python -m minigrpo.generate` does.

    `flags` are that command's: mesh, temperature, max_completion_length, compute_dtype ...
    """
    from minigrpo import generate as command
    from minigrpo.build import build
    from minigrpo.model.hub import run_defaults

    settings = settings_of(command.SECTIONS, flags | {"model": None if model is None else str(model)})
    name = settings.model.model
    built = build(settings, settings.generate.mesh, {name: run_defaults(name)})
    return Model(built, built.load(settings.generate.seed))


def generate(prompts: str | Sequence[Any], model: str | Path = "auto", num_generations: int = 1, **flags: Any) -> Any:
    """Load a model and answer prompts; `load` keeps the model for the next ones."""
    return load(model, **flags).generate(prompts, num_generations)


def evaluate(model: str | Path = "auto", dataset: Rows = "auto", eval_size: int = 500, **flags: Any) -> dict[str, Any]:
    """Load a model and measure its accuracy on held-out rows."""
    return load(model, **flags).evaluate(dataset, eval_size)
