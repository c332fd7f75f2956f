"""Verifiable rewards, and the calling of a user's own. No completion is ever evaluated or executed.

A reward function has TRL's signature: it receives prompts, completions and completion_ids, and every dataset column by
keyword, as lists of equal length, and returns one float per completion.
"""

import asyncio
import dataclasses
import decimal
import functools
import importlib.util
import inspect
import math
import re
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from minigrpo.config import UsageError
from minigrpo.data.grading import math_equal

RewardFunction = Callable[..., Sequence[float]]

LONGEST = 20_000
"""Characters of a completion that are looked at, from its end, where the answer is: bounds the time of hostile ones."""

NUMBER = re.compile(r"-?\$?\d[\d,]{0,40}(?:\.\d{1,40})?|-?\$?\.\d{1,40}")
STATED_NUMBER = re.compile(
    r"(?:[A-Za-z\s]*[\s=:]\s*)?(?P<sign>-?\$?|\$-)(?P<number>(?:\d[\d,]*\.?\d*|\.\d+)(?:e[+-]?\d{1,3})?)"
    r"(?:\s*%|[A-Za-z]{2,})?(?:\s[A-Za-z\s.]*)?\.?"
)
"""One number, alone or with words, a dollar sign, % or a unit around it; not part of an expression."""

MATH_SECONDS = 30.0

LONGEST_NUMBER = 200
"""Characters of the longest answer that is read as a number."""


# Reading an answer out of a completion


def tail(text: str) -> str:
    return text[-LONGEST:]


def between(text: str, opening: str, closing: str) -> str | None:
    """What stands between the last `opening` and the first `closing` after it."""
    _, found, rest = tail(text).rpartition(opening)
    inside, closed, _ = rest.partition(closing)
    return inside.strip() if found and closed else None


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, braces balanced.

    >>> boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    _, found, rest = tail(text).rpartition(r"\boxed{")
    depth = 1
    for place, char in enumerate(rest if found else ""):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return rest[:place].strip()
    return None


def last_number(text: str) -> str | None:
    numbers = NUMBER.findall(tail(text))
    return numbers[-1] if numbers else None


def marked_answer(text: str) -> str | None:
    """The answer inside <answer> tags, after ####, or in a box; None when nothing marks one."""
    tagged = between(text, "<answer>", "</answer>")
    if tagged is not None:
        return tagged
    _, marked, after = tail(text).rpartition("####")
    if marked and after.strip():
        return after.strip().splitlines()[0].strip()
    return boxed(text)


def extract_answer(text: str) -> str | None:
    r"""The completion's final answer: inside <answer> tags, after ####, in \boxed{}, or its last number.

    >>> extract_answer("<answer>\n42\n</answer>"), extract_answer("It is 6 * 7.\n#### 42"), extract_answer("about 42.")
    ('42', '42', '42')
    """
    marked = marked_answer(text)
    return last_number(text) if marked is None else marked


def as_number(text: str) -> decimal.Decimal | None:
    r"""The number that an answer states beside $ , % units, a final point or \boxed{}; None for an expression.

    >>> as_number("$1,234.50"), as_number("72 clips"), as_number(r"\boxed{18}."), as_number("1/3"), as_number("3x")
    (Decimal('1234.50'), Decimal('72'), Decimal('18'), None, None)
    """
    inside = boxed(text)
    plain = (text if inside is None else inside).replace("\\$", "$").replace("\\%", "%").strip()
    found = STATED_NUMBER.fullmatch(plain) if len(plain) <= LONGEST_NUMBER and plain.isascii() else None
    return decimal.Decimal("-" * ("-" in found["sign"]) + found["number"].replace(",", "")) if found else None


def plain_text(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


Extract = Callable[[str], str | None]
"""How a final answer is found: `extract_answer`, or `marked_answer` to be strict about its form."""


def same_answer(completion: str, reference: str, extract: Extract = extract_answer) -> bool:
    """Whether the completion's final answer equals the reference, as numbers if both are, else as text."""
    given, wanted = extract(completion), marked_answer(reference)
    wanted = reference if wanted is None else wanted
    if given is None:
        return False
    numbers = as_number(given), as_number(wanted)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return plain_text(given) == plain_text(wanted)


# The built-in reward functions

STRICT = re.compile(r"\s*<reasoning>\n.*\n</reasoning>\n<answer>\n.*\n</answer>\s*", re.DOTALL)
SOFT = re.compile(r"\s*<reasoning>.*</reasoning>\s*<answer>.*</answer>\s*", re.DOTALL)
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")


def bounded_match(pattern: re.Pattern, text: str) -> bool:
    return len(text) <= LONGEST and pattern.fullmatch(text) is not None


def answer(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """3.0 when the final answer equals the reference."""
    return [3.0 * same_answer(text, wanted) for text, wanted in zip(completions, answer, strict=True)]


def math_answer(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 when the final answer equals the reference as `answer` has it, or symbolically by the math-verify library.

    Expressions that take long are not equal, nor any that the library would see after MATH_SECONDS of one call.
    """
    deadline = time.monotonic() + MATH_SECONDS

    def right(text: str, wanted: str) -> bool:
        given, marked = extract_answer(text), marked_answer(wanted)
        reference = wanted if marked is None else marked
        if same_answer(text, wanted) or given is None:
            return given is not None
        return time.monotonic() < deadline and math_equal(given, reference)

    return [float(right(text, wanted)) for text, wanted in zip(completions, answer, strict=True)]


def think_format(completions: Sequence[str], **_: Any) -> list[float]:
    """1.0 for a closed thinking block followed by a #### answer."""
    return [float("</think>" in tail(text) and "####" in tail(text).rpartition("</think>")[2]) for text in completions]


def correctness(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """2.0 for the right answer inside <answer> tags, 1.5 for the right answer anywhere else, 0 otherwise."""

    def score(text: str, wanted: str) -> float:
        if not same_answer(text, wanted):
            return 0.0
        return 2.0 if between(text, "<answer>", "</answer>") is not None else 1.5

    return [score(text, wanted) for text, wanted in zip(completions, answer, strict=True)]


def integer(completions: Sequence[str], **_: Any) -> list[float]:
    """0.5 when the content of the <answer> tags is a whole number."""
    return [
        0.5 * bool(re.fullmatch(r"-?\d{1,40}", between(text, "<answer>", "</answer>") or "")) for text in completions
    ]


def strict_format(completions: Sequence[str], **_: Any) -> list[float]:
    """0.5 for <reasoning> and <answer> blocks, each tag on a line of its own, and nothing else."""
    return [0.5 * bounded_match(STRICT, text) for text in completions]


def soft_format(completions: Sequence[str], **_: Any) -> list[float]:
    """0.5 for a <reasoning> block followed by an <answer> block."""
    return [0.5 * bounded_match(SOFT, text) for text in completions]


def tag_presence(completions: Sequence[str], **_: Any) -> list[float]:
    """0.2 for each of the four tags that is present."""
    return [0.2 * sum(tag in tail(text) for tag in TAGS) for text in completions]


def tag_count(completions: Sequence[str], **_: Any) -> list[float]:
    """0.125 for each tag that stands exactly once, less 0.001 per character after the last tag, at least 0."""

    def score(text: str) -> float:
        once = sum(text.count(tag) == 1 for tag in TAGS)
        trailing = len(text.rpartition("</answer>")[2].strip()) if "</answer>" in text else 0
        return max(0.0, 0.125 * once - 0.001 * trailing)

    return [score(text) for text in completions]


def overlong(limit: int, buffer: int, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """0 up to `limit` - `buffer` tokens, from there down to -1 at `limit` (DAPO, arXiv:2503.14476, eq. 13)."""
    return [-min(1.0, max(0.0, (len(ids) - (limit - buffer)) / buffer)) for ids in completion_ids]


FUNCTIONS = (
    answer, math_answer, think_format, correctness, integer, strict_format, soft_format, tag_presence, tag_count,
)  # fmt: skip
BUILTIN: dict[str, RewardFunction] = {function.__name__: function for function in FUNCTIONS}


# Choosing and calling


@dataclasses.dataclass(frozen=True)
class Reward:
    """One reward function with its name and weight."""

    name: str
    function: RewardFunction
    weight: float = 1.0


def parse_rewards(flag: str) -> list[Reward]:
    """'correctness,mine.py:brevity*0.5' -> rewards; UsageError naming the part that is wrong."""
    rewards = [parse_reward(part.strip()) for part in flag.split(",")]
    check_names(flag, rewards)
    return rewards


def check_names(flag: str, rewards: list[Reward]) -> None:
    names = [reward.name for reward in rewards]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"--reward={flag}: {twice} is given twice")


def overlong_rewards(buffer: int, penalty: float, limit: int) -> list[Reward]:
    """The reward of --overlong_buffer, if it is asked for; `limit` is that on a completion's tokens."""
    if buffer > limit:
        raise UsageError(f"--overlong_buffer={buffer}: must be at most --max_completion_length={limit}")
    return [Reward("overlong", functools.partial(overlong, limit, buffer), penalty)] if buffer else []


def parse_reward(part: str) -> Reward:
    source, _, weight = part.partition("*")
    try:
        scale = float(weight or 1)
    except ValueError as error:
        raise UsageError(f"--reward={part}: the weight {weight!r} is not a number") from error
    if not math.isfinite(scale):
        raise UsageError(f"--reward={part}: the weight must be finite")
    if ":" in source:
        path, _, name = source.rpartition(":")
        return Reward(name, load_function(Path(path), name), scale)
    if source not in BUILTIN:
        raise UsageError(f"--reward={source}: no such reward; use path.py:FUNCTION or one of {', '.join(BUILTIN)}")
    return Reward(source, BUILTIN[source], scale)


def load_function(path: Path, name: str) -> RewardFunction:
    """The function `name` of the Python file `path`."""
    if not path.is_file() or path.suffix != ".py":
        raise UsageError(f"--reward={path}:{name}: there is no Python file {path}")
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own file may raise anything
        raise UsageError(f"--reward={path}:{name}: importing {path} failed: {error!r}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"--reward={path}:{name}: {path} has no function {name}")
    return function


def call_reward(reward: Reward, timeout: float, arguments: dict[str, Any]) -> Float[np.ndarray, "B"]:
    """The function's scores, NaN where it returns None: it does not apply. It may be a coroutine.

    UsageError naming it when it raises, hangs, or returns anything but finite floats.
    """
    outcome: dict[str, Any] = {}

    def call():
        try:
            scores = reward.function(**accepted(reward.function, arguments))
            outcome["scores"] = asyncio.run(finish(scores)) if inspect.isawaitable(scores) else scores
        except BaseException as error:  # the user's own function may raise anything
            outcome["error"] = error

    thread = threading.Thread(target=call, daemon=True, name=f"reward {reward.name}")
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise UsageError(f"reward {reward.name}: no result after {timeout:g} s; see --reward_timeout")
    if "error" in outcome:
        raise UsageError(f"reward {reward.name}: raised {outcome['error']!r}")
    return check_scores(reward.name, outcome["scores"], len(arguments["completions"]))


async def finish(scores: Awaitable) -> Any:
    return await scores


def accepted(function: RewardFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the function has parameters for; all of them when it takes **kwargs."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def check_scores(name: str, scores: Any, count: int) -> Float[np.ndarray, "B"]:
    try:
        values = np.asarray(scores, np.float64)  # None becomes NaN
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"reward {name}: returned {scores!r:.80}, not a list of floats") from error
    if values.shape != (count,):
        raise UsageError(
            f"reward {name}: returned shape {list(values.shape)} for {count} completions; one float each is due"
        )
    bad = [i for i, value in enumerate(values) if not math.isfinite(value) and scores[i] is not None]
    if bad:
        raise UsageError(f"reward {name}: returned {values[bad[0]]} for completion {bad[0]}; scores must be finite")
    return values


def score_completions(
    rewards: list[Reward], timeout: float, arguments: dict[str, Any]
) -> tuple[Float[np.ndarray, "B"], dict[str, Float[np.ndarray, "B"]]]:
    """Weighted sum of all rewards that apply, NaN where none does, and each function's own unweighted scores."""
    parts = {reward.name: call_reward(reward, timeout, arguments) for reward in rewards}
    weighted = np.array([reward.weight * parts[reward.name] for reward in rewards])
    return np.where(np.isnan(weighted).all(axis=0), np.nan, np.nansum(weighted, axis=0)), parts
