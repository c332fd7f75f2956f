"""Made-up answers to a dataset's own problems, and how reward functions score them.

Right answers are written in every format that the prompt, the reward functions or common usage suggest; beside them
stand wrong, empty, truncated and rambling ones. Nothing is sampled, so no model is needed.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType
from typing import Any

import numpy as np
from jaxtyping import Float

from minigrpo.config import UsageError
from minigrpo.data.calls import Reward, RewardFunction, code_of, parameters
from minigrpo.data.chat import Tokenizer
from minigrpo.data.grading import as_number, boxed, reference_answer
from minigrpo.data.rewards import GIVEN, LEFT_OUT, score_completions
from minigrpo.data.rows import Row

STOCK = "I read the problem again, and work it out step by step."
"""Reasoning where a row brings none; it holds no digit and no answer."""

RAMBLING_CHARACTERS = 8_000
"""Most characters of a rambling answer; its token ids go on to the length limit."""

BAD_KINDS = ("wrong", "empty", "truncated", "rambling")
KINDS = ("right", *BAD_KINDS)


# Formats


@dataclasses.dataclass(frozen=True)
class Format:
    """A way to write an answer; `text` holds {reasoning}, {answer} or {reference} where those go."""

    name: str
    text: str

    def write(self, problem: "Problem", right: bool = True) -> str:
        """Return the problem's right answer, or its wrong one, in this format."""
        parts = vars(problem if right else problem.mistaken)
        return re.sub(r"\{(reasoning|answer|reference)\}", lambda found: parts[found[1]], self.text)


XML = Format("<reasoning> and <answer> tags", "<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>")
BOX = Format(r"\boxed{}", "{reasoning}\nThe answer is \\boxed{{answer}}.")
WORDS = Format("words", "{reasoning}\nThe final answer is {answer}.")
LABEL = Format("'Answer:'", "{reasoning}\nAnswer: {answer}")
ALONE = Format("the answer alone", "{answer}")

PLAIN = (WORDS, BOX, LABEL, ALONE)
"""Formats in which a model may answer without being asked for one."""

FORMATS = (
    XML,
    Format("<think> and <answer> tags", "<think>\n{reasoning}\n</think>\n<answer>\n{answer}\n</answer>"),
    Format("<think>, then ####", "<think>\n{reasoning}\n</think>\nSo the answer is\n#### {answer}"),
    Format(r"<think>, then \boxed{}", "<think>\n{reasoning}\n</think>\n\nThe answer is \\boxed{{answer}}."),
    Format("####", "{reasoning}\n#### {answer}"),
    *PLAIN,
    Format("JSON", '{"reasoning": "", "answer": "{answer}"}'),
    Format("a code block", "```python\n{answer}\n```"),
    Format("the reference as it is", "{reference}"),
)
"""Formats that are tried for every reward function."""

HOLDERS = ("answer", "final_answer", "solution", "final", "result", "output", "response")
"""Names of tags that hold a final answer, the likeliest first."""

KNOWN_TAGS = frozenset({"think", "thinking", "reasoning", "thought", *HOLDERS})
TAG = re.compile(r"</?([A-Za-z][\w-]{1,30})>")
HTML = frozenset("br em ul ol li td tr th div sub sup span table strong code pre html body img center".split())
LEADS = re.compile(r"(?i)(?:\bthe |\bmy )?(?:\bfinal )?\b(?:answer|solution|result)(?: is)?:")


def tags_of(text: str) -> list[str]:
    """Return the names of a text's tags in order of first appearance; unknown names count only if they are closed."""
    names = dict.fromkeys(found[1] for found in TAG.finditer(text))
    return [name for name in names if name not in HTML and (name.lower() in KNOWN_TAGS or f"</{name}>" in text)]


def marks_of(text: str) -> frozenset[str]:
    r"""Return the marks of a format that a text mentions: its tags, ####, \boxed and JSON; else words like Answer:.

    >>> sorted(marks_of("Think in <think> tags, and put the answer into \\boxed{}."))
    ['<think>', '\\boxed']
    """
    marks = {f"<{name}>" for name in tags_of(text)}
    marks |= {mark for mark in ("####", "\\boxed") if mark in text}
    marks |= {"JSON"} if re.search(r"""["']answer["']\s*:""", text) else set()
    return frozenset(marks or (found[0] for found in LEADS.finditer(text)))


def asked_format(text: str, asked: frozenset[str] | None = None) -> list[Format]:
    """Return the format with the marks of a text, or those asked for, its tags on lines of their own and on one."""
    marks = marks_of(text) if asked is None else asked
    tags = [tag for tag in tags_of(text) if f"<{tag}>" in marks]
    holder = next((tag for name in HOLDERS for tag in tags if tag.lower() == name), "")
    thinking = sorted((tag for tag in tags if tag != holder), key=lambda tag: tag.lower() != "think")
    answer = r"\boxed{{answer}}" if "\\boxed" in marks else "{answer}"
    lead = next((mark for mark in sorted(marks) if mark.endswith(":")), "")
    last = f"#### {answer}" if "####" in marks else f"{lead} {answer}" if lead else f"The answer is {answer}."
    formats = []
    for gap, style in (("\n", ""), ("", ", each on one line")):
        parts = [f"<{tag}>{gap}{{reasoning}}{gap}</{tag}>" for tag in thinking] or ["{reasoning}"] * (not holder)
        parts.append(f"<{holder}>{gap}{answer}{gap}</{holder}>" if holder else last)
        shown = " and ".join(sorted(marks - {f"<{tag}>" for tag in tags}, reverse=True))
        named = ", ".join(f"<{tag}>" for tag in (*thinking, holder) if tag)
        formats.append(Format(", ".join(filter(None, (named, shown))) + style, "\n".join(parts)))
    return formats if marks - {"JSON"} else []


def constants(code: CodeType | None, names: dict[str, Any], seen: set[int]) -> Iterator[str]:
    """Yield the texts and patterns in a function's code, in functions inside it, and in globals that it names."""
    if code is None or id(code) in seen or len(seen) > 50:
        return
    seen.add(id(code))
    for value in [*code.co_consts, *(names.get(name) for name in code.co_names)]:
        value = getattr(value, "pattern", value)
        if isinstance(value, str):
            yield value
        elif isinstance(value, tuple | list | frozenset):
            yield from (part for part in value if isinstance(part, str))
        else:
            inner = value if isinstance(value, CodeType) else getattr(value, "__code__", None)
            yield from constants(inner, getattr(value, "__globals__", names), seen)


def formats_of(function: RewardFunction) -> list[Format]:
    """Return the formats that an own reward function's texts and patterns point to."""
    plain = function.func if isinstance(function, functools.partial) else function
    texts = [text[:2000] for text in constants(code_of(function), getattr(plain, "__globals__", {}), set())]
    joined = "\n".join(texts).replace("\\n", "\n").replace("\\s*", "").replace("\\<", "<").replace("\\/", "/")
    leads = dict.fromkeys(found[0] for found in LEADS.finditer(joined))
    return asked_format(joined) + [Format(f"'{lead}'", f"{{reasoning}}\n{lead} {{answer}}") for lead in leads][:4]


# Problems


@dataclasses.dataclass(frozen=True)
class Problem:
    """A row's reference with its parts, and a wrong answer in the same style."""

    reasoning: str
    answer: str
    reference: str
    wrong: str

    @property
    def mistaken(self) -> "Problem":
        """Return the problem with the wrong answer wherever the right one stood."""
        standing = re.compile(rf"(?<![\w.]){re.escape(self.answer)}(?![\w]|\.\d)")
        texts = [standing.sub(lambda _: self.wrong, text) for text in (self.reasoning, self.reference)]
        return Problem(texts[0], self.wrong, texts[1] if texts[1] != self.reference else self.wrong, self.answer)


RATIONALES = ("completion", "solution", "rationale", "explanation", "reasoning", "cot", "output")


def unboxed(text: str) -> str:
    """Return a text without the boxes around its boxed answers."""
    while (inside := boxed(text)) is not None:
        pattern = r"\\(?:boxed|fbox)\s*\{\s*" + re.escape(inside) + r"\s*\}"
        before, text = text, re.sub(pattern, inside.replace("\\", r"\\"), text)
        if text == before:
            break
    return text


def reasoning_of(row: Row, reference: str, answer: str) -> str:
    """Return the worked solution of a row without the marks of its answer, or stock words."""
    texts = [reference, *(row[name] for name in RATIONALES if isinstance(row.get(name), str))]
    for text in texts:
        text = re.sub(r"(?s)<answer>.*?</answer>", "", text.partition("####")[0])
        text = unboxed(text)
        text = TAG.sub("", text).strip()
        if len(text) > len(answer) + 10:
            return text
    return STOCK


def wrong_answer(answer: str, others: Iterable[str]) -> str:
    """Return a wrong answer of the same kind: another number, another row's answer, or none of these.

    >>> wrong_answer("72", []), wrong_answer("yes", ["yes", "no"])
    ('151', 'no')
    """
    number = as_number(answer)
    values = [] if number is None else [2 * number + 7, 3 * number + 11, number + 1]
    numbers = [str(value) if value.denominator == 1 else f"{float(value):g}" for value in values]
    known = answer.strip().lower()
    apart = (text for text in (*numbers, *others) if text.strip().lower() not in known and known not in text.lower())
    return next(apart, "none of these")


def as_reference(value: Any) -> str | None:
    """Return a cell as a reference answer; None for anything but text and numbers."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if isinstance(value, str) and value.strip() else str(value) if is_number else None


def reference_columns(rows: Sequence[Row], rewards: Iterable[Reward]) -> list[str]:
    """Return the columns that may hold the reference: `answer`, and those that own reward functions name."""
    ignored = {*GIVEN, *LEFT_OUT, "question", "problem", "answer"}
    named = [name for reward in rewards if not reward.builtin for name in parameters(reward.function)]
    names = dict.fromkeys(["answer", *(name for name in named if name not in ignored)])
    return [name for name in names if all(as_reference(row.get(name)) is not None for row in rows)]


def problems_of(rows: Sequence[Row], column: str) -> list[Problem]:
    """Return the rows' problems with their references in `column`; "" gives made-up answers."""
    references = [as_reference(row.get(column)) or "42" for row in rows]
    answers = [reference_answer(text).strip() for text in references]
    return [
        Problem(reasoning_of(row, reference, answer), answer, reference, wrong_answer(answer, answers))
        for row, reference, answer in zip(rows, references, answers, strict=True)
    ]


# Scoring


@dataclasses.dataclass(frozen=True)
class Bench:
    """Rows, and everything that turns texts about them into the arguments of reward functions."""

    rows: list[Row]
    problems: list[Problem]
    tokenizer: Tokenizer
    limit: int
    """Tokens that a completion may have."""
    timeout: float
    thinking: bool = False
    """The prompt ends with an opened <think>, so a completion begins after it."""
    hurried: bool = False
    """`timeout` is shorter than --reward_timeout."""
    seen: dict[str, tuple[list[int], str]] = dataclasses.field(default_factory=dict)
    """Texts so far -> their token ids, and the text that rewards get of those, without special tokens."""

    def right(self, form: Format) -> list[str]:
        """Return every problem's right answer."""
        return [self.begun(form.write(problem)) for problem in self.problems]

    def begun(self, text: str) -> str:
        """Return a text as it goes on from the prompt."""
        return text.removeprefix("<think>").lstrip("\n") if self.thinking else text

    def answers(self, form: Format) -> dict[str, list[str]]:
        """Return an answer of every kind to every problem, in the order of KINDS."""
        wrong = [self.begun(form.write(problem, right=False)) for problem in self.problems]
        count = len(wrong)
        rambling = f"{STOCK} " * (min(RAMBLING_CHARACTERS, 4 * self.limit) // len(STOCK) + 1)
        cut = [text[: len(text) * 2 // 5] for text in wrong]
        return dict(zip(KINDS, (self.right(form), wrong, [""] * count, cut, [rambling] * count), strict=True))

    def score(self, reward: Reward, texts: list[str], kinds: list[str]) -> Float[np.ndarray, " B"]:
        """Return a reward function's scores of texts, each about the next row in turn; UsageError when it fails."""
        self.learn(texts)
        ids = [self.tokens(self.seen[text][0], kind) for text, kind in zip(texts, kinds, strict=True)]
        rows = [self.rows[place % len(self.rows)] for place in range(len(texts))]
        columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}
        arguments = {"prompts": columns["prompt"], "completions": [self.seen[text][1] for text in texts]}
        arguments = columns | arguments | {"completion_ids": ids}
        return score_completions([reward], self.timeout, arguments).by_function[reward.name]

    def learn(self, texts: list[str]) -> None:
        """Tokenize texts that were not seen before."""
        new = [text for text in dict.fromkeys(texts) if text not in self.seen]
        ids = self.tokenizer.encode(new)
        self.seen.update(zip(new, zip(ids, self.tokenizer.decode(ids), strict=True), strict=True))

    def tokens(self, ids: list[int], kind: str) -> list[int]:
        """Return a completion's token ids: ended, or going on to the limit where it rambles or is cut."""
        if kind == "rambling":
            return (ids * (self.limit // max(1, len(ids)) + 1))[: self.limit]
        return ids if kind == "truncated" else [*ids, self.tokenizer.end_of_turn]


@dataclasses.dataclass(frozen=True)
class Tried:
    """A reward function's mean scores of made-up answers; NaN where it returned None for all."""

    reward: Reward
    by_format: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of right answers, by the format's name."""
    by_kind: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """Of answers in a format, by their kind."""
    lowest: float = 0.0
    highest: float = 0.0
    error: str = ""
    steady: bool = True
    """The same answers got the same scores when they were asked again."""

    @property
    def best(self) -> str:
        """Return the format in which right answers stand out most from wrong ones, or else score most."""
        return max(self.by_kind, key=lambda name: (round(self.contrast(name), 9), self.by_format[name]))

    def contrast(self, name: str) -> float:
        """Return what a right answer in a format earns more than a wrong one, with the sign of the weight."""
        gap = self.by_kind[name]["right"] - self.by_kind[name]["wrong"]
        return float(np.nan_to_num(gap)) * (-1.0 if self.reward.weight < 0 else 1.0)

    @property
    def grades(self) -> bool:
        """Tell if right answers earn more than wrong ones in some format."""
        return any(self.contrast(name) > 0.02 * (self.highest - self.lowest) + 1e-9 for name in self.by_kind)


@dataclasses.dataclass(frozen=True)
class Trial:
    """All reward functions on the same made-up answers."""

    tried: list[Tried]
    asked: frozenset[str]
    """Marks of the format that every prompt asks for."""
    expected: Format
    """The format that the model will answer in, if it obeys."""
    referenced: bool
    """There are reference answers, so right and wrong have a meaning."""
    bench: Bench

    def total(self, kind: str) -> float:
        """Return the weighted sum of all rewards for a kind of answer in the expected format."""
        parts = [one.reward.weight * one.by_kind[self.expected.name][kind] for one in self.tried if not one.error]
        return float(np.nansum(parts))


def mean(scores: Float[np.ndarray, " B"]) -> float:
    """Return the mean of the scores that are numbers, NaN for none."""
    known = scores[~np.isnan(scores)]
    return float(known.mean()) if known.size else float("nan")


def failing_kind(bench: Bench, reward: Reward, answers: dict[str, list[str]]) -> str:
    """Return the first kind of answer on which a reward function fails by itself, "" for none."""
    for kind, texts in answers.items():
        try:
            bench.score(reward, texts, [kind] * len(texts))
        except UsageError:
            return kind
    return ""


def first_scores(bench: Bench, reward: Reward, formats: list[Format]) -> Tried:
    """Score right answers in every format."""
    texts = [text for form in formats for text in bench.right(form)]
    try:
        scores = bench.score(reward, texts, ["right"] * len(texts)).reshape(len(formats), -1)
    except UsageError as error:
        return Tried(reward, error=str(error))
    return Tried(reward, {form.name: mean(row) for form, row in zip(formats, scores, strict=True)})


def all_scores(bench: Bench, tried: Tried, formats: list[Format]) -> Tried:
    """Score every kind of answer in some formats."""
    answers = [bench.answers(form) for form in formats]
    texts = [text for own in answers for group in own.values() for text in group]
    kinds = [kind for own in answers for kind, group in own.items() for _ in group]
    try:
        scores = bench.score(tried.reward, texts, kinds).reshape(len(formats), len(KINDS), -1)
    except UsageError as error:
        slow = "no result after" in str(error)
        kind = "" if slow else failing_kind(bench, tried.reward, answers[0])
        return dataclasses.replace(tried, error=f"{error}{f' (on {kind} answers)' if kind else ''}")
    means = {
        form.name: {kind: mean(row) for kind, row in zip(KINDS, own, strict=True)}
        for form, own in zip(formats, scores, strict=True)
    }
    again = [(means[form.name]["right"], tried.by_format[form.name]) for form in formats]
    known = [value for value in (*tried.by_format.values(), *scores.ravel().tolist()) if value == value] or [0.0]
    steady = all(np.isclose(*pair, equal_nan=True) for pair in again)
    return dataclasses.replace(tried, by_kind=means, lowest=min(known), highest=max(known), steady=steady)


def expected_format(asked: frozenset[str], formats: list[Format], totals: dict[str, float]) -> Format:
    """Return the format with the marks that are asked for, or a plain one, in which right answers earn most."""
    exact = [form for form in formats if asked and asked == marks_of(form.text)]
    fitting = exact or [form for form in formats if asked and asked <= marks_of(form.text)] or list(PLAIN)
    return max(fitting, key=lambda form: round(totals[form.name], 9))


def candidates(asked: frozenset[str], wanted: str, rewards: Iterable[Reward]) -> list[Format]:
    """Return every format to try, one of a name; `wanted` is the text that names the marks asked for."""
    own = [form for reward in rewards if not reward.builtin for form in formats_of(reward.function)]
    every = (*asked_format(wanted, asked), *own, *FORMATS)
    by_text = {form.text: form for form in reversed(every)}
    return list({form.name: form for form in every if by_text[form.text] is form}.values())


def try_column(
    bench: Bench, rewards: Sequence[Reward], formats: list[Format], asked: frozenset[str], referenced: bool
) -> Trial:
    """Try all reward functions on one column's references."""
    first = [first_scores(bench, reward, formats) for reward in rewards]
    known = [one for one in first if not one.error]
    totals = {
        form.name: float(np.nansum([one.reward.weight * one.by_format[form.name] for one in known])) for form in formats
    }
    expected = expected_format(asked, formats, totals)
    tried = []
    for one in first:
        best = "" if one.error else best_format(one)
        own = [form for form in formats if form.name == best]
        chosen = list({form.name: form for form in (expected, *own)}.values())
        tried.append(one if one.error else all_scores(bench, one, chosen))
    return Trial(tried, asked, expected, referenced, bench)


def best_format(tried: Tried) -> str:
    """Return the name of the format in which right answers earn most."""
    sign = -1.0 if tried.reward.weight < 0 else 1.0
    return max(tried.by_format, key=lambda name: float(np.nan_to_num(sign * tried.by_format[name], nan=-1e30)))


def try_rewards(rewards: Sequence[Reward], bench: Bench, asked: frozenset[str], wanted: str) -> Trial:
    """Try reward functions on made-up answers in the column of references that they tell best from wrong ones.

    `asked` are the marks that every prompt asks for; `wanted` is a text that names them in their order.
    """
    formats = candidates(asked, wanted, rewards)
    columns = reference_columns(bench.rows, rewards)
    trials = [
        try_column(dataclasses.replace(bench, problems=problems_of(bench.rows, column)), rewards, formats, asked, True)
        for column in columns
    ] or [try_column(dataclasses.replace(bench, problems=problems_of(bench.rows, "")), rewards, formats, asked, False)]
    return max(trials, key=lambda trial: round(trial.total("right") - trial.total("wrong"), 9))
