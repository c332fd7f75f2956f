"""Calling a reward function as TRL calls it, whatever it does: hang, raise, exit, or return no scores."""

import asyncio
import contextlib
import copy
import functools
import inspect
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
from jaxtyping import Float

from minigrpo.config import UsageError
from minigrpo.data.columns import LARGEST_SCORE
from minigrpo.data.witness import WITNESS
from minigrpo.user_code import error_place, shown

RewardFunction = Callable[..., Sequence[float]]

PATIENCE = 10.0
"""Seconds after its time limit in which a function may be interrupted, before the process is killed."""


@dataclass(frozen=True)
class Reward:
    """A reward function with its name and weight."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    builtin: bool = False
    """Its work is bounded by itself, so it runs without a time limit and the score never depends on load."""


@dataclass(frozen=True)
class TrainerState:
    """Progress of the run, by the names of transformers' TrainerState."""

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    num_train_epochs: int = 0
    train_batch_size: int | None = None
    logging_steps: int = 1
    eval_steps: int = 0
    save_steps: int = 0
    num_input_tokens_seen: int = 0
    is_world_process_zero: bool = True
    is_local_process_zero: bool = True


@dataclass(frozen=True)
class Log:
    """Metrics and columns that reward functions log about `count` completions."""

    count: int
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)

    def log_metric(self, name: str, value: Any) -> None:
        """Log a number, averaged over the calls of a step."""
        self.metrics.setdefault(str(name), []).append(float(value))

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Log one value per completion; ValueError for another number of them."""
        plain = [as_plain(value) for value in itertools.islice(values, self.count + 1)]
        if len(plain) != self.count:
            raise ValueError(f"log_extra({column!r}) needs {self.count} values, one per completion")
        self.extra[str(column)] = plain


def as_plain(value: Any) -> Any:
    """Convert a value to something JSON can hold: itself, its number, or its text."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return value if isinstance(value, str | int | float | None) else shown(value)


# Telling what a function raised


def code_of(function: Any) -> CodeType | None:
    """Return the code behind a function, a partial, a decorated function or an instance with __call__."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    method = vars(type(function)).get("__call__")  # of an instance
    return getattr(function, "__code__", getattr(method, "__code__", None))


def describe(error: BaseException, function: Any) -> str:
    """Describe an error raised by a reward function, with the file and line in it."""
    code = code_of(function)
    place = error_place(error, Path(code.co_filename).parent if code else None)
    if not place and code:
        place = f" at {code.co_filename}:{code.co_firstlineno}"
    return f"raised {shown(error)}{place}"


# Arguments


def lacking(function: RewardFunction, names: Iterable[str]) -> list[str]:
    """Return the parameters without a default that are not among `names`."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [name for name, p in parameters(function).items() if p.kind in named and p.default is p.empty]
    return [name for name in needed if name not in set(names)]


def parameters(function: RewardFunction) -> Mapping[str, inspect.Parameter]:
    """Return the function's parameters by name; **kwargs alone for C functions without a signature."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions of C have no signature
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


def check_parameters(reward: Reward, names: Iterable[str]) -> None:
    """Raise UsageError when the function needs an argument that is not among `names`."""
    names = list(names)
    missing = lacking(reward.function, names)
    if missing:
        columns = ", ".join(names)
        raise UsageError(
            f"reward {reward.name}: needs {missing[0]!r}, which no column of the dataset gives; has {columns}"
        )


def accepted(function: RewardFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that the function has parameters for; all of them when it takes **kwargs."""
    known = parameters(function)
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in known}


ATOMS = (str, int, float, bytes, type(None))


def fresh(value: Any) -> Any:
    """Copy lists, dictionaries and objects, so that a function's changes to them are seen by nobody else."""
    if isinstance(value, ATOMS):
        return value
    if type(value) is list:
        return [item if isinstance(item, ATOMS) else fresh(item) for item in value]
    if type(value) is dict:
        return {name: fresh(item) for name, item in value.items()}
    try:
        return copy.deepcopy(value)
    except Exception:  # an object of the user's own may refuse to be copied in any way
        return value


# Time


class Overtime(BaseException):
    """Raised inside a function that takes too long; no Exception, so that it is not swallowed."""


def in_thread(work: Callable[[], Any], seconds: float = math.inf) -> Any:
    """Run work in a thread of its own; raise Overtime and abandon it when it is not done in time."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = work()
        except BaseException as error:  # handed to the caller
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True, name="reward")
    thread.start()
    while thread.is_alive() and seconds > 0:  # in short waits, which signals may interrupt
        thread.join(min(seconds, 0.2))
        seconds -= 0.2
    if thread.is_alive():
        raise Overtime
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise Overtime in the main thread after some seconds: a thread ends sleeps, a timer regular expressions.

    They start anew when the process was stopped, as by Ctrl-Z, and goes on.
    """
    done = threading.Event()
    main, end = threading.main_thread().ident or 0, time.monotonic() + seconds

    def restart(number: int, frame: FrameType | None) -> None:
        nonlocal end
        end = time.monotonic() + seconds

    def stop(number: int, frame: FrameType | None) -> None:
        if not done.is_set() and time.monotonic() >= end:
            raise Overtime

    def watch() -> None:
        while not done.wait(max(0.1, end - time.monotonic())):  # again, should the function have swallowed it
            signal.pthread_kill(main, signal.SIGURG)

    handlers = {signal.SIGCONT: restart, signal.SIGURG: stop, signal.SIGVTALRM: stop}  # they run in this order
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    signal.setitimer(signal.ITIMER_VIRTUAL, min(seconds, 0.5) or 0.01, 0.5)
    threading.Thread(target=watch, daemon=True, name="reward timeout").start()
    try:
        yield
        if time.monotonic() >= end:  # it swallowed the interruption
            raise Overtime
    finally:
        done.set()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """Run work with a time limit: in the main thread, as libraries that use signals need, or else in a thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_kill"):
        return in_thread(work, seconds)
    with interrupted_after(seconds):
        return work()


@contextlib.contextmanager
def exits_raised() -> Iterator[None]:
    """Let os._exit raise SystemExit in this process, which it would end without a word; not in forked children."""
    leave, owner = os._exit, os.getpid()

    def raise_exit(status: int) -> None:
        if os.getpid() != owner:
            leave(status)
        raise SystemExit(f"os._exit({status})")

    os._exit = raise_exit  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = leave


async def finish(scores: Awaitable[Any]) -> Any:
    """Await the scores of an async reward function."""
    return await scores


# Scores


def read_scores(name: str, scores: Any, count: int) -> list[float]:
    """Return a float per completion, NaN for None; UsageError for anything else."""
    values = scores.tolist() if hasattr(scores, "tolist") else scores  # arrays and tensors, with or without gradient
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        raise UsageError(f"reward {name}: returned {shown(scores)}, not a list of floats")
    values = list(itertools.islice(values, count + 1))
    if len(values) != count:
        size = len(scores) if hasattr(scores, "__len__") else len(values)
        raise UsageError(f"reward {name}: returned shape [{size}] for {count} completions; one float each is due")
    return [read_score(name, place, value) for place, value in enumerate(values)]


def read_score(name: str, place: int, value: Any) -> float:
    """Read one returned score as a float, NaN for None; UsageError for anything that is not a finite number."""
    if value is None:
        return math.nan
    try:
        plain = value.tolist() if hasattr(value, "tolist") else value
        number = math.nan if isinstance(plain, str | bytes) else float(plain)
    except Exception as error:  # the user's own type may raise anything
        raise UsageError(
            f"reward {name}: returned {shown(value)} for completion {place}, not a list of floats"
        ) from error
    if isinstance(plain, str | bytes):
        raise UsageError(f"reward {name}: returned {shown(value)} for completion {place}, not a list of floats")
    if not abs(number) <= LARGEST_SCORE:
        raise UsageError(
            f"reward {name}: returned {number} for completion {place}; scores must be finite, {LARGEST_SCORE:g} at most"
        )
    return number


def call_reward(reward: Reward, timeout: float, arguments: dict[str, Any]) -> Float[np.ndarray, " B"]:
    """Return the function's scores, NaN where it returns None: it does not apply. It may be a coroutine.

    UsageError naming it when it raises, exits, hangs, or returns anything but finite floats.
    """
    check_parameters(reward, arguments)
    taken = accepted(reward.function, arguments)

    def work() -> list[float]:
        scores: Any = reward.function(**taken)
        if inspect.isawaitable(scores):
            scores = in_thread(functools.partial(asyncio.run, finish(scores)))  # a notebook's own loop is running
        return read_scores(reward.name, scores, len(arguments["completions"]))

    if reward.builtin:
        return np.array(work(), np.float64)
    taken = {name: fresh(value) if isinstance(value, list) else value for name, value in taken.items()}
    stuck = f"error: reward {reward.name}: no result after {timeout:g} s, in code that cannot be interrupted; the run "
    try:
        with exits_raised(), WITNESS.limit(timeout + PATIENCE, stuck + "was killed. Mend it, continue with --resume"):
            return np.array(within(timeout, work), np.float64)
    except Overtime:
        raise UsageError(f"reward {reward.name}: no result after {timeout:g} s; see --reward_timeout") from None
    except (UsageError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the user's own function may raise anything
        raise UsageError(f"reward {reward.name}: {describe(error, reward.function)}") from error
