"""Verifiable rewards, and the choice of a user's own. No completion is ever evaluated or executed.

A reward function has TRL's signature: it receives prompts, completions and completion_ids, every dataset column,
trainer_state, log_metric and log_extra by keyword, the lists of equal length, and returns one float per completion.
"""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float

from minigrpo.config import UsageError
from minigrpo.data.calls import (
    Log,
    Reward,
    RewardFunction,
    TrainerState,
    call_reward,
    check_parameters,
)
from minigrpo.data.grading import LONGEST, between, extract_answer, reference_answer, same_answer, tail
from minigrpo.user_code import load_named

# The built-in reward functions

STRICT = re.compile(r"\s*<reasoning>\n.*\n</reasoning>\n<answer>\n.*\n</answer>\s*", re.DOTALL)
SOFT = re.compile(r"\s*<reasoning>.*</reasoning>\s*<answer>.*</answer>\s*", re.DOTALL)
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")


def bounded_match(pattern: re.Pattern[str], text: str) -> bool:
    """Tell if a whole text of at most LONGEST characters matches."""
    return len(text) <= LONGEST and pattern.fullmatch(text) is not None


def as_texts(completions: Sequence[Any]) -> list[str]:
    """Return completions as text: those of message prompts are lists of messages, of which the last one counts.

    >>> as_texts(["4", [{"role": "assistant", "content": "5"}]])
    ['4', '5']
    """
    return [text if isinstance(text, str) else text[-1]["content"] for text in completions]


def graded(completions: Sequence[Any], references: Sequence[str]) -> list[bool]:
    """Grade each completion against its reference."""
    return [same_answer(text, wanted) for text, wanted in zip(as_texts(completions), references, strict=True)]


def answer(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """Return 3.0 when the final answer equals the reference as a number, as text or as mathematics, else 0."""
    return [3.0 * right for right in graded(completions, answer)]


def math_answer(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1.0 where `answer` returns 3.0."""
    return [float(right) for right in graded(completions, answer)]


def think_format(completions: Sequence[Any], **_: Any) -> list[float]:
    """Return 1.0 for a closed thinking block followed by a #### answer."""
    return [
        float("</think>" in tail(text) and "####" in tail(text).rpartition("</think>")[2])
        for text in as_texts(completions)
    ]


def correctness(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """Return 2.0 for the reference as written inside <answer> tags, 1.5 for a right answer otherwise, else 0.

    <answer>18</answer> earns 2.0 for 18; <answer>18.0</answer>, <answer>$18</answer> and "#### 18" earn 1.5.
    """

    def score(text: str, wanted: str) -> float:
        if not same_answer(text, wanted):
            return 0.0
        tagged = between(text, "<answer>", "</answer>") is not None
        return 2.0 if tagged and extract_answer(text) == reference_answer(wanted).strip() else 1.5

    return [score(text, wanted) for text, wanted in zip(as_texts(completions), answer, strict=True)]


def integer(completions: Sequence[Any], **_: Any) -> list[float]:
    """Return 0.5 when the content of the <answer> tags is a whole number."""
    return [
        0.5 * bool(re.fullmatch(r"-?\d{1,40}", between(text, "<answer>", "</answer>") or ""))
        for text in as_texts(completions)
    ]


def strict_format(completions: Sequence[Any], **_: Any) -> list[float]:
    """Return 0.5 for <reasoning> and <answer> blocks, each tag on a line of its own, and nothing else."""
    return [0.5 * bounded_match(STRICT, text) for text in as_texts(completions)]


def soft_format(completions: Sequence[Any], **_: Any) -> list[float]:
    """Return 0.5 for a <reasoning> block followed by an <answer> block."""
    return [0.5 * bounded_match(SOFT, text) for text in as_texts(completions)]


def tag_presence(completions: Sequence[Any], **_: Any) -> list[float]:
    """Return 0.2 for each of the four tags that is present."""
    return [0.2 * sum(tag in tail(text) for tag in TAGS) for text in as_texts(completions)]


def tag_count(completions: Sequence[Any], **_: Any) -> list[float]:
    """Return 0.125 for each tag that occurs exactly once, less 0.001 per character after the last tag, at least 0."""

    def score(text: str) -> float:
        once = sum(text.count(tag) == 1 for tag in TAGS)
        trailing = len(text.rpartition("</answer>")[2].strip()) if "</answer>" in text else 0
        return max(0.0, 0.125 * once - 0.001 * trailing)

    return [score(text) for text in as_texts(completions)]


def overlong(limit: int, buffer: int, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """Return 0 up to `limit` - `buffer` tokens, from there down to -1 at `limit` (DAPO, arXiv:2503.14476, eq. 13)."""
    return [-min(1.0, max(0.0, (len(ids) - (limit - buffer)) / buffer)) for ids in completion_ids]


FUNCTIONS = (
    answer, math_answer, think_format, correctness, integer, strict_format, soft_format, tag_presence, tag_count,
)  # fmt: skip
BUILTIN: dict[str, RewardFunction] = {function.__name__: function for function in FUNCTIONS}


# Choosing

FROM_PYTHON: dict[str, RewardFunction] = {}
"""Functions that a Python program gave to `minigrpo.train`, by name; --reward knows them as python:NAME."""

KNOWN_ELSEWHERE = {
    "accuracy": "answer", "accuracy_reward": "math_answer", "correctness_reward_func": "correctness",
    "int_reward_func": "integer", "strict_format_reward_func": "strict_format", "xmlcount_reward_func": "tag_count",
    "soft_format_reward_func": "soft_format", "think_format_reward": "think_format", "format": "think_format",
    "format_reward": "think_format", "soft_overlong_punishment": "overlong", "math_verify": "math_answer",
}  # fmt: skip
"""Names of other trainers' rewards -> the nearest one here, for hints only."""


def near(name: str, known: Iterable[str]) -> str:
    """Return a hint at the most similar name, "" when none is similar."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {KNOWN_ELSEWHERE.get(found[0], found[0])}?" if found else ""


def parse_rewards(flag: str) -> list[Reward]:
    """Parse 'correctness,mine.py:brevity*0.5,package.module:function'; UsageError naming the part that is wrong."""
    modules: dict[str, ModuleType] = {}
    rewards = [parse_reward(part.strip(), modules) for part in flag.split(",")]
    check_names(flag, rewards)
    return rewards


def check_names(flag: str, rewards: list[Reward]) -> None:
    """Raise UsageError for two rewards with the same name."""
    names = [reward.name for reward in rewards]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"--reward={flag}: {twice} is given twice; leave one out, or give its function another name")


def check_columns(rewards: list[Reward], columns: Iterable[str]) -> None:
    """Raise UsageError for a reward with a parameter that neither a column of the dataset nor TRL's signature gives."""
    names = [name for name in columns if name not in LEFT_OUT]
    for reward in rewards:
        check_parameters(reward, dict.fromkeys([*names, *GIVEN]))


def overlong_rewards(buffer: int, penalty: float, limit: int) -> list[Reward]:
    """Return the reward of --overlong_buffer, if it is asked for; `limit` is on a completion's tokens."""
    if buffer > limit:
        raise UsageError(f"--overlong_buffer={buffer}: must be at most --max_completion_length={limit}")
    return [Reward("overlong", functools.partial(overlong, limit, buffer), penalty, builtin=True)] if buffer else []


def parse_reward(part: str, modules: dict[str, ModuleType]) -> Reward:
    """Parse NAME or FILE:FUNCTION, either with *WEIGHT, into a reward; UsageError naming --reward."""
    source, starred, weight = part.partition("*")
    try:
        scale = float(weight) if starred else 1.0
    except ValueError as error:
        raise UsageError(f"--reward={part}: the weight {weight!r} is not a number") from error
    if not math.isfinite(scale):
        raise UsageError(f"--reward={part}: the weight must be finite")
    path, _, name = source.strip().rpartition(":")
    if path == "python":
        if name not in FROM_PYTHON:
            raise UsageError(f"--reward={part}: is a function of a Python program; go on there, with rewards=[{name}]")
        return Reward(name, FROM_PYTHON[name], scale)
    if path:
        return Reward(name, load_named("--reward", path, name, modules), scale)
    if name not in BUILTIN:
        if name.endswith(".py"):
            raise UsageError(f"--reward={part}: name the function too, as in {name}:FUNCTION")
        hint = near(name, [*BUILTIN, *KNOWN_ELSEWHERE])
        raise UsageError(
            f"--reward={part}: no such reward{hint}; use path.py:FUNCTION, package.module:FUNCTION "
            f"or one of {', '.join(BUILTIN)}"
        )
    return Reward(name, BUILTIN[name], scale, builtin=True)


# Scoring

LEFT_OUT = ("prompt", "completion")
"""Columns that TRL does not hand to reward functions, which get prompts and completions."""

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")


@dataclasses.dataclass(frozen=True)
class Scores:
    """Rewards of B completions, and what the functions logged about them."""

    rewards: Float[np.ndarray, " B"]
    """Weighted sum of all functions that apply, NaN where none does."""
    by_function: dict[str, Float[np.ndarray, " B"]]
    """Each function's own scores without its weight, NaN where it does not apply."""
    metrics: dict[str, float]
    """Of log_metric, averaged over the calls."""
    extra: dict[str, list[Any]]
    """Of log_extra, a value per completion that JSON can hold."""


def as_messages(prompt: Any, text: str) -> Any:
    """Return a completion in the form of its prompt, as TRL does: messages for messages, text for text."""
    return [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text


def score_completions(
    rewards: list[Reward], timeout: float, arguments: dict[str, Any], state: TrainerState | None = None
) -> Scores:
    """Call all reward functions. `arguments`: prompts, completions as text, completion_ids and the columns, B each.

    UsageError naming the function that fails.
    """
    texts = arguments["completions"]
    log = Log(len(texts))
    given = {name: value for name, value in arguments.items() if name not in LEFT_OUT}
    given |= {"trainer_state": state or TrainerState(), "log_metric": log.log_metric, "log_extra": log.log_extra}
    prompts = arguments.get("prompts", texts)
    given["completions"] = [as_messages(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    scores = {reward.name: call_reward(reward, timeout, given) for reward in rewards}
    weighted = np.array([reward.weight * scores[reward.name] for reward in rewards])
    total = np.where(np.isnan(weighted).all(axis=0), np.nan, np.nansum(weighted, axis=0))
    return Scores(total, scores, {name: float(np.mean(values)) for name, values in log.metrics.items()}, log.extra)
