"""Findings about a run before it starts, and those about its rewards and the format that its prompts ask for."""

import contextlib
import dataclasses
import functools
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from minigrpo.config import Settings
from minigrpo.data.calls import Reward, parameters
from minigrpo.data.chat import Tokenizer
from minigrpo.data.datasets import PromptSet
from minigrpo.data.grading import take_undecided
from minigrpo.data.probes import (
    BAD_KINDS,
    KINDS,
    XML,
    Bench,
    Trial,
    Tried,
    marks_of,
    reference_columns,
    try_rewards,
)
from minigrpo.data.rows import Row

OK, WARN, FAIL = "ok", "warn", "fail"
STATUSES = (OK, WARN, FAIL)
"""Of a finding, from harmless to one with which nothing is learned; their places are the exit codes."""

MOST_EARNED = {
    "answer": 3.0, "math_answer": 1.0, "think_format": 1.0, "correctness": 2.0, "integer": 0.5, "strict_format": 0.5,
    "soft_format": 0.5, "tag_presence": 0.8, "tag_count": 0.5,
}  # fmt: skip
"""Most that a completion earns from each built-in reward."""

GRADERS = ("answer", "math_answer", "correctness")
NEAR_MOST = 0.85
"""Share of its maximum that a reward must give to right answers on average."""

STILL_LOW = {"wrong": 0.95, "empty": 0.75, "truncated": 0.75, "rambling": 0.75}
"""Share of a right answer's reward, above the least of all, up to which a bad answer's counts as low."""

LOST = 0.35
"""Share of the best format's reward below which a reward is lost on the format that the prompt asks for."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """A line of the check's page."""

    name: str
    status: str
    text: str
    cure: str = ""

    def line(self) -> str:
        """Return the line: status, subject, what was found, and what mends it."""
        return f"{self.status:<5} {self.name}: {self.text}{f'; {self.cure}' if self.cure else ''}"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A run that is about to start, without its weights."""

    settings: Settings
    tokenizer: Tokenizer
    model_folder: Path
    """Folder of config.json and generation_config.json."""
    data: PromptSet
    rewards: Sequence[Reward]
    rows_tried: int = 4
    """Rows whose references the reward functions are tried on."""
    seconds: float = math.inf
    """Most that one call of an own reward function may take here."""

    @functools.cached_property
    def places(self) -> list[int]:
        """Return the indices of the rows that rewards are tried on, evenly spread."""
        return spread(len(self.data), self.rows_tried)

    @functools.cached_property
    def rows(self) -> list[Row]:
        """Return those rows."""
        return [self.data.rows[place] for place in self.places]

    @functools.cached_property
    def prompts(self) -> list[tuple[str, str]]:
        """Return each prompt as the model sees it, up to the end of its last message, and what the template adds."""
        hub = self.tokenizer.hub
        texts = [hub.decode(self.data.tokens[place], skip_special_tokens=False) for place in self.places]
        return [split_prompt(text, last_text(row)) for text, row in zip(texts, self.rows, strict=True)]

    @functools.cached_property
    def trial(self) -> Trial:
        """Return the reward functions' scores of made-up answers."""
        asked, wanted = self.asked_format()
        bench = Bench(
            rows=self.rows,
            problems=[],
            tokenizer=self.tokenizer,
            limit=self.settings.rollout.max_completion_length,
            timeout=min(self.seconds, self.settings.rewards.reward_timeout),
            thinking=self.opening.endswith("<think>"),
            hurried=self.seconds < self.settings.rewards.reward_timeout,
        )
        with undisturbed():
            return try_rewards(self.rewards, bench, asked, wanted)

    @property
    def opening(self) -> str:
        """Return the text with which the template opens the assistant's turn."""
        return self.prompts[0][1].rstrip()

    def asked_format(self) -> tuple[frozenset[str], str]:
        """Return the marks of the format that every prompt asks for, and a text that names them in order."""
        asked = frozenset.intersection(*(marks_of(before) for before, _ in self.prompts))
        wanted = self.prompts[0][0]
        if not asked and self.settings.model.model.startswith("builtin:"):  # which was taught this one
            asked, wanted = marks_of(XML.text), XML.text
        thinks = self.tokenizer.enable_thinking and "<think>" in self.tokenizer.template.source
        if self.opening.endswith("<think>") or (thinks and "</think>" not in self.opening):
            asked, wanted = asked | {"<think>"}, f"<think></think>{wanted}"
        return asked, wanted


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Leave the global random numbers and the count of undecided comparisons as they were."""
    before, numbers = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numbers)
        take_undecided()


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` of `count` indices, evenly spread.

    >>> spread(10, 3), spread(2, 3)
    ([0, 4, 9], [0, 1])
    """
    return sorted(set(np.linspace(0, count - 1, min(count, most)).astype(int).tolist()))


def last_text(row: Row) -> str:
    """Return the text of a row's prompt, or of the last message in it."""
    prompt = row["prompt"]
    return str(prompt if isinstance(prompt, str) else prompt[-1]["content"]).strip()


def split_prompt(text: str, last: str) -> tuple[str, str]:
    """Split a rendered prompt after its last message's text; all of it where that is not found as it is."""
    before, found, after = text.rpartition(last)
    return (before + found, after) if found else (text, "")


# Rewards


def reward_findings(subject: Subject) -> list[Finding]:
    """Return a finding about each reward function, one about their sum, and one about the format."""
    if not subject.rewards:
        return []
    trial = subject.trial
    return [judge_reward(trial, one) for one in trial.tried] + judge_sum(trial) + judge_format(subject, trial)


def amount(value: float) -> str:
    """Return a score as people write it."""
    return "none" if math.isnan(value) else f"{value:.3g}"


def scores_text(scores: dict[str, float]) -> str:
    """Return the scores of answers by kind."""
    return ", ".join(f"{kind} {amount(scores[kind])}" for kind in KINDS)


def judge_reward(trial: Trial, one: Tried) -> Finding:
    """Return the gravest finding about a reward function, or its scores."""
    name = f"reward {one.reward.name}"
    if "no result after" in one.error and trial.bench.hurried:
        text = f"takes more than {trial.bench.timeout:g} s over some made-up answers, so it is not tried here"
        return Finding(name, WARN, text, "python -m minigrpo.check takes the time")
    if one.error:
        return Finding(name, FAIL, one.error.removeprefix(f"reward {one.reward.name}: "), error_cure(one))
    scores = one.by_kind[one.best]
    if all(math.isnan(value) for value in one.by_format.values()):
        return Finding(name, WARN, "returned None for every answer tried", "see that it applies to these rows")
    if one.highest - one.lowest < 1e-9:
        text = f"gives {amount(one.highest)} to every answer, right, wrong or empty, in {len(one.by_format)} formats"
        return Finding(name, WARN if is_unknown(trial, one.reward) else FAIL, text, constant_cure(trial, one))
    if not one.steady:
        text = "gives other scores when the same answers are asked again"
        return Finding(name, WARN, text, "make it a function of its arguments alone")
    found = judge_grading(one, scores, name) if trial.referenced else None
    if found:
        return found
    form = "" if one.grades or not trial.referenced else "; it judges the form, not the answer"
    return Finding(name, OK, f"{scores_text(scores)} ({one.best}){form}")


def is_unknown(trial: Trial, reward: Reward) -> bool:
    """Tell if an own reward function may want what no reference holds, such as code that passes tests."""
    return not reward.builtin and trial.referenced and "answer" not in trial.bench.rows[0]


def error_cure(one: Tried) -> str:
    """Return what mends a reward function that fails."""
    if "string indices must be integers" in one.error or "'str' object has no attribute" in one.error:
        return "prompts of text get completions that are text: read completion, not completion[0]['content']"
    if "'list' object" in one.error or "got 'list'" in one.error:
        return "prompts of messages get completions that are messages: read completion[-1]['content']"
    return "such an answer would end the run: mend the function"


def constant_cure(trial: Trial, one: Tried) -> str:
    """Return what mends a reward function that gives all answers the same."""
    if one.reward.builtin:
        return f"leave {one.reward.name} out, or see that --answer_column is the right one"
    if not trial.referenced:
        return "such a reward teaches nothing: call it by hand on a good and a bad answer"
    sample = trial.bench.right(trial.expected)[0]
    return f"call it by hand on a right answer, such as {shortened(sample)!r}"


def shortened(text: str, most: int = 100) -> str:
    """Return a text's two ends."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def judge_grading(one: Tried, scores: dict[str, float], name: str) -> Finding | None:
    """Return what is wrong with how a reward function tells right from bad answers; None for nothing."""
    sign = -1.0 if one.reward.weight < 0 else 1.0
    built = one.reward.name if one.reward.builtin else ""
    top, right = MOST_EARNED.get(built), scores["right"]
    if one.contrast(one.best) < -0.02 * (one.highest - one.lowest) - 1e-9:
        more = f"wrong answers earn {amount(scores['wrong'])}, right ones {amount(right)}"
        return Finding(
            name, FAIL, more, "turn its sign, or weight it with *-1" if sign > 0 else "turn its weight's sign"
        )
    if built in GRADERS and not one.grades:
        text = f"does not tell reference answers from wrong ones ({scores_text(scores)})"
        return Finding(name, FAIL, text, "see that --answer_column names short answers, or references marked by ####")
    if top is not None and right < NEAR_MOST * top:
        text = f"right answers earn {amount(right)} of {top:g} on average, in whatever format"
        return Finding(name, WARN, text, f"the reference answers do not suit it: leave {built} out")
    return judge_bad_answers(one, scores, sign, name) if one.grades else None


def judge_bad_answers(one: Tried, scores: dict[str, float], sign: float, name: str) -> Finding | None:
    """Return the bad answers that earn too much from a reward that grades."""
    values = {kind: sign * np.nan_to_num(score) for kind, score in scores.items()}
    floor, right = min(values.values()), values["right"]
    high = {kind: (values[kind] - floor) / (right - floor) for kind in BAD_KINDS}
    kind = max(high, key=lambda kind: high[kind] / STILL_LOW[kind])
    if high[kind] <= STILL_LOW[kind]:
        return None
    text = f"{kind} answers earn {amount(scores[kind])}, right ones {amount(scores['right'])}"
    return Finding(name, FAIL if high[kind] >= 1 else WARN, text, f"a policy would learn {LEARNED[kind]}: mend it")


LEARNED = {
    "wrong": "to be wrong",
    "empty": "to say nothing",
    "truncated": "never to finish",
    "rambling": "to ramble up to the limit",
}
"""What a policy learns that earns as much by a kind of bad answer."""


def judge_sum(trial: Trial) -> list[Finding]:
    """Return a finding about the weighted sum of all rewards; none without references or where a function fails."""
    if not trial.referenced or any(one.error for one in trial.tried):
        return []
    name = "rewards together"
    if not any(one.grades and one.reward.weight for one in trial.tried):
        text = "right and wrong answers earn the same: no reward compares them with the reference answers"
        status = WARN if all(is_style(trial, one.reward) for one in trial.tried) else FAIL
        return [Finding(name, status, text, "add one that does, such as --reward=correctness")]
    totals = {kind: trial.total(kind) for kind in KINDS}
    worst = max(BAD_KINDS, key=lambda kind: totals[kind])
    form = f"in the format {trial.expected.name}"
    if totals[worst] >= totals["right"] - 1e-9:
        text = f"{form}, {worst} answers earn {amount(totals[worst])}, right ones {amount(totals['right'])}"
        return [Finding(name, FAIL, text, "weigh the rewards otherwise, or mend the format")]
    return [Finding(name, OK, f"{scores_text(totals)} ({trial.expected.name})")]


def is_style(trial: Trial, reward: Reward) -> bool:
    """Tell if an own reward function names no column of references, so it was never meant to compare."""
    named = set(parameters(reward.function))
    return not reward.builtin and named.isdisjoint({"answer", *reference_columns(trial.bench.rows, [reward])})


# Format


def is_lost(trial: Trial, one: Tried) -> bool:
    """Tell if right answers in the expected format earn little of what other formats earn from a reward."""
    if one.error or one.reward.weight <= 0 or one.highest - one.lowest < 1e-9:
        return False
    best = max(value for value in one.by_format.values() if not math.isnan(value))
    expected = np.nan_to_num(one.by_format[trial.expected.name], nan=one.lowest)
    return bool(best - one.lowest > 1e-9 and expected - one.lowest < LOST * (best - one.lowest))


def judge_format(subject: Subject, trial: Trial) -> list[Finding]:
    """Return a finding about the format that the prompt asks for and the one that the rewards want."""
    expected = trial.expected
    asks = f"the prompt asks for {' '.join(sorted(trial.asked))}" if trial.asked else "the prompt asks for no format"
    lost = [one for one in trial.tried if is_lost(trial, one)]
    if not lost:
        return [Finding("format", OK, f"{asks}, and the rewards agree ({expected.name})")]
    names = ", ".join(one.reward.name for one in lost)
    wanted = " or ".join(dict.fromkeys(one.best for one in lost))
    earned = ", ".join(
        f"{amount(one.by_format[expected.name])} of {amount(max(one.by_format.values()))}" for one in lost
    )
    text = f"{asks}; right answers written so ({expected.name}) earn {earned} from {names}, which wants {wanted}"
    blind = any(trial.referenced and one.grades and one.contrast(expected.name) <= 1e-9 for one in lost)
    return [Finding("format", FAIL if blind else WARN, text, format_cure(subject, wanted))]


def format_cure(subject: Subject, wanted: str) -> str:
    """Return what makes prompt and rewards agree."""
    thinks = subject.tokenizer.enable_thinking or subject.opening.endswith("<think>")
    if thinks and "<think>" not in wanted:
        return "turn thinking off, or choose --reward that reads what follows </think> only"
    closed = (
        "; the template closes the thinking block, so pass --enable_thinking too"
        if (wanted.startswith("<think>") and "</think>" in subject.opening)
        else ""
    )
    return f"ask for {wanted} in --system_prompt{closed}, or choose --reward for the format that is asked for"
