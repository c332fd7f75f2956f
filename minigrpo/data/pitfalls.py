"""Findings about a run's prompts, reference answers, template, end tokens, lengths and sampling."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minigrpo.config import TINY, Settings, UsageError
from minigrpo.data.calls import Reward, parameters
from minigrpo.data.chat import control_tokens, file_ends, template_end
from minigrpo.data.columns import ANSWER_COLUMNS, CHAT_COLUMNS, find_column, lookup
from minigrpo.data.datasets import XML_PROMPT
from minigrpo.data.findings import FAIL, OK, WARN, Finding, Subject, last_text, reward_findings, spread
from minigrpo.data.grading import marked_answer, same_answer, take_undecided
from minigrpo.data.probes import as_reference
from minigrpo.data.template import PROBE

MOST_ROWS = 200
"""Rows whose prompts and answers are compared."""

LONG_ANSWER = 12
"""Words beyond which an answer that nothing marks is taken for a whole solution."""

MOST_REPEATS = 8
"""Times that a step may take every prompt before it is warned of."""

HELD_OUT_NAME = re.compile(r"(?i)(?:^|[^a-z])(test|valid|validation|dev|eval)(?:$|[^a-z])")
NOTHING = frozenset({"nan", "none", "null", "n/a", "na", "unknown", "-", "?", "todo"})
PLACE_FOR_THOUGHT = 1024
"""Tokens that a Qwen3 model thinks for at least, on problems of any size."""


def sample(subject: Subject) -> list[dict[str, Any]]:
    """Return rows evenly spread over the data."""
    return [subject.data.rows[place] for place in spread(len(subject.data), MOST_ROWS)]


# Prompts


def prompt_findings(subject: Subject) -> list[Finding]:
    """Return what is wrong with the prompts, and how many were dropped."""
    rows = sample(subject)
    texts = [last_text(row) for row in rows]
    found = [*dropped(subject), *repeated(texts), *leaking(rows, texts), *templated(subject, rows)]
    return found + split_findings(subject.settings, rows)


def dropped(subject: Subject) -> list[Finding]:
    """Return a finding about prompts that are too long."""
    count, limit = subject.data.dropped, subject.settings.data.max_prompt_length
    share = count / (count + len(subject.data))
    text = f"{len(subject.data):,} used, {count:,} dropped as longer than --max_prompt_length={limit}"
    if subject.settings.data.offline:
        text += (
            f" or without a response within --max_completion_length={subject.settings.rollout.max_completion_length}"
        )
    status = FAIL if share > 0.5 else WARN if share > 0.05 else OK
    cure = "" if status == OK else f"{math.floor(100 * share)}% are lost: raise the limit"
    if cure and subject.settings.model.model == TINY:
        cure += f", or name your --model, as {TINY}'s tokenizer cuts words into many tokens"
    return [Finding("prompts", status, text, cure)]


def repeated(texts: list[str]) -> list[Finding]:
    """Return a finding about prompts that are all the same."""
    if len(texts) < 2 or len(set(texts)) > 1:
        return []
    return [Finding("prompts", FAIL, f"all are the same: {texts[0]!r:.80}", "name another column with --prompt_column")]


def leaking(rows: Sequence[dict[str, Any]], texts: list[str]) -> list[Finding]:
    """Return a finding about prompts that hold their reference answer."""
    known = [(text, as_reference(row.get("answer"))) for row, text in zip(rows, texts, strict=True)]
    long = [answer.strip() in text for text, answer in known if answer and len(answer.strip()) >= 20]
    same = [answer.strip() == text for text, answer in known if answer]
    if not (same and np.mean(same) > 0.5) and not (len(long) > len(rows) / 2 and np.mean(long) > 0.5):
        return []
    cure = "name the columns with --prompt_column and --answer_column"
    return [Finding("prompts", FAIL, "most hold their own reference answer", cure)]


def templated(subject: Subject, rows: Sequence[dict[str, Any]]) -> list[Finding]:
    """Return a finding about prompts that hold the template's control tokens."""
    tokens = [] if subject.tokenizer.raw else control_tokens(subject.tokenizer)
    count = sum(any(token in last_text(row) for token in tokens) for row in rows)
    if not count:
        return []
    text = f"{count} of {len(rows)} already hold control tokens such as {tokens[0]}"
    return [Finding("prompts", WARN, text, "if they are templated already, pass --chat_template=none")]


def split_findings(settings: Settings, rows: Sequence[dict[str, Any]]) -> list[Finding]:
    """Return a finding about data that is meant to be held out."""
    options = settings.data
    name = Path(options.dataset).name if Path(options.dataset).suffix else ""
    given = {f"--dataset_split={options.dataset_split}": options.dataset_split, f"--dataset={options.dataset}": name}
    named = {str(row.get("split", "")) for row in rows}
    given |= {"the column split": named.pop()} if len(named) == 1 else {}
    for flag, text in given.items():
        found = HELD_OUT_NAME.search(text)
        if found and not re.search(r"(?i)train", text):
            cure = "train on the training split, and keep this one for --eval_dataset"
            return [Finding("split", WARN, f"{flag} looks like held-out data ({found[1]})", cure)]
    return []


# Reference answers


def answer_findings(subject: Subject) -> list[Finding]:
    """Return what is wrong with the reference answers that a reward reads."""
    if not any(reads_answer(reward) for reward in subject.rewards):
        return []
    rows = sample(subject)
    pairs = [(row, answer) for row in rows if (answer := as_reference(row.get("answer"))) is not None]
    if not pairs:
        return []
    checks: tuple[Callable[..., str], ...] = (
        empty_answers,
        equal_answers,
        numbered_answers,
        other_column,
        long_answers,
    )
    texts = [text for check in checks if (text := check(*zip(*pairs, strict=True)))]
    cure = "name the column of the final answer with --answer_column"
    return [Finding("reference answers", WARN, texts[0], cure)] if texts else []


def reads_answer(reward: Reward) -> bool:
    """Tell if a reward function may read the column `answer`."""
    known = parameters(reward.function)
    return "answer" in known or (not reward.builtin and any(p.kind is p.VAR_KEYWORD for p in known.values()))


def empty_answers(rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> str:
    """Tell of answers that say nothing."""
    empty = sum(answer.strip().lower() in NOTHING for answer in answers)
    return f"{empty} of {len(answers)} say nothing, such as 'None' or 'nan'" if empty > 0.02 * len(answers) else ""


def equal_answers(rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> str:
    """Tell of answers that are nearly all the same."""
    answer, count = Counter(answers).most_common(1)[0]
    return f"{count} of {len(answers)} are {answer!r:.60}" if len(answers) >= 4 and count > 0.95 * len(answers) else ""


def numbered_answers(rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> str:
    """Tell of answers that only rise from row to row, as an index does."""
    numbers = [int(answer) for answer in answers if answer.strip().isdigit()]
    rising = len(numbers) == len(answers) >= 4 and bool((np.diff(numbers) > 0).all())
    return f"they rise from row to row, {answers[0]}, {answers[1]}, {answers[2]}, as an index does" if rising else ""


def other_column(rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> str:
    """Tell of another usual column of answers, short or marked, that says something else."""
    for column in ANSWER_COLUMNS:
        cells = [as_reference(lookup(row, column)) if find_column(row, (column,)) else None for row in rows[:20]]
        pairs = [(cell, answer) for cell, answer in zip(cells, answers[:20], strict=True) if cell and is_final(cell)]
        agree = sum(cell == answer or same_answer(as_marked(cell), answer) for cell, answer in pairs)
        if len(pairs) > len(rows[:20]) / 2 and agree < len(pairs) / 2:
            return f"'{column}' says something else: {pairs[0][0]!r:.60}, not {pairs[0][1]!r:.60}"
    return ""


SHORT = 40
"""Characters of a final answer at most."""


def is_final(cell: str) -> bool:
    """Tell if a cell is a final answer: short or marked."""
    return len(cell) < SHORT or marked_answer(cell) is not None


def as_marked(cell: str) -> str:
    """Return a final answer as a completion that marks it."""
    return cell if marked_answer(cell) is not None else f"#### {cell}"


def long_answers(rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> str:
    """Tell of answers that are whole solutions without a marked answer, and of columns that may hold it."""
    lengths = [len(answer.split()) if marked_answer(answer) is None else 0 for answer in answers]
    if np.median(lengths) <= LONG_ANSWER:
        return ""
    text = f"most are whole solutions without a marked answer, of {int(np.median(lengths))} words"
    short = [name for name, value in rows[0].items() if len(as_reference(value) or " " * SHORT) < SHORT]
    short = [name for name in short if name not in ("answer", "prompt", *CHAT_COLUMNS)]
    columns = f"; short ones are in {', '.join(short)}" if short else ""
    return f"{text}: only the very same words would be right{columns}"


# Template and end tokens


def template_findings(subject: Subject) -> list[Finding]:
    """Return what is wrong with the chat template and with the tokens that end a completion."""
    if subject.tokenizer.raw:
        return [Finding("chat template", OK, f"none: prompts are taken as they are; {ends_text(subject)}")]
    found = [*broken_template(subject), *end_findings(subject)]
    return found or [Finding("chat template", OK, ends_text(subject))]


def token_names(subject: Subject, tokens: Sequence[int]) -> str:
    """Return tokens by text and id."""
    return ", ".join(f"{subject.tokenizer.hub.id_to_token(token)} ({token})" for token in tokens)


def ends_text(subject: Subject) -> str:
    """Return the tokens that end a completion."""
    return f"a completion ends with {token_names(subject, subject.tokenizer.stop_tokens)}"


def system_prompt(settings: Settings) -> str:
    """Return the system prompt of a run."""
    options = settings.data
    own = "" if options.offline or options.dataset.startswith("builtin:") else XML_PROMPT
    return own if options.system_prompt == "auto" else options.system_prompt


def broken_template(subject: Subject) -> list[Finding]:
    """Return findings about a template that leaves out messages, or does not open the assistant's turn."""
    template, user = subject.tokenizer.template, {"role": "user", "content": PROBE}
    cure = "pass another with --chat_template=FILE"
    found, name = [], "chat template"
    if PROBE not in template.render([user], enable_thinking=subject.tokenizer.enable_thinking):
        found.append(Finding(name, FAIL, "leaves the user's message out of the prompt", cure))
    if system_prompt(subject.settings):
        system = {"role": "system", "content": f"{PROBE} of the system"}
        if system["content"] not in template.render([system, {**user, "content": "?"}]):
            found.append(Finding(name, WARN, "leaves the system prompt out", f"{cure}, or write it into the prompts"))
    if template.render([user]) == template.render([user], add_generation_prompt=False):
        text = "does not open the assistant's turn: the model may go on with the user's"
        found.append(Finding(name, WARN, text, cure))
    return found


def end_findings(subject: Subject) -> list[Finding]:
    """Return findings about a template's end of turn that the model may never write."""
    tokenizer, hub = subject.tokenizer, subject.tokenizer.hub
    end = template_end(tokenizer.template, hub)
    if end is None:
        text = f"writes no end token after an answer; {ends_text(subject)}, which the model may never write"
        return [Finding("end token", WARN, text, "let --chat_template=FILE end answers with one of them")]
    files = [file_ends(subject.model_folder / name, hub) for name in ("generation_config.json", "config.json")]
    named = files[0] or files[1]
    base = re.search(r"-Base$", subject.settings.model.model)
    if (not named or end in named) and not base:
        return []
    own = token_names(subject, named or tokenizer.stop_tokens)
    text = f"the template ends an answer with {token_names(subject, [end])}, the checkpoint's own end is {own}"
    cure = "a base model may run on to the limit: pass --chat_template=none, or teach the template with minigrpo.sft"
    return [Finding("end token", WARN, text, cure)]


# Lengths


def length_findings(subject: Subject) -> list[Finding]:
    """Return a finding about reference answers against the limit; none without references or of responses on file."""
    if not subject.rewards or not subject.trial.referenced:
        return thinking_findings(subject)
    limit, trial = subject.settings.rollout.max_completion_length, subject.trial
    written = [as_reference(row.get("completion")) or "" for row in subject.rows]
    encode = subject.tokenizer.encode
    pairs = zip(encode(trial.bench.right(trial.expected)), encode(written), strict=True)
    lengths = np.array([max(len(made), len(own)) + 1 for made, own in pairs])
    share, longest = float(np.mean(lengths > limit)), int(lengths.max())
    text = f"reference answers have {np.median(lengths):.0f} tokens, {longest} at most"
    status = FAIL if share > 0.5 else WARN if share > 0.05 else OK
    cure = "" if status == OK else f"{share:.0%} would be cut: raise it to {-(-longest // 32) * 64} or more"
    found = Finding("lengths", status, f"{text}; --max_completion_length={limit}", cure)
    return [found, *thinking_findings(subject)]


def thinking_findings(subject: Subject) -> list[Finding]:
    """Return a finding about a limit that leaves no room for thinking."""
    limit = subject.settings.rollout.max_completion_length
    thinks = "<think>" in subject.tokenizer.template.source and "</think>" not in subject.opening
    if not subject.rewards or not subject.tokenizer.enable_thinking or not thinks or limit >= PLACE_FOR_THOUGHT:
        return []
    text = f"--enable_thinking with --max_completion_length={limit}: thoughts alone are often longer"
    return [Finding("thinking", WARN, text, f"raise it to {PLACE_FOR_THOUGHT} or more, or turn thinking off")]


# Groups, sampling and rates


def group_findings(subject: Subject) -> list[Finding]:
    """Return findings about groups whose completions would all be alike, and about the learning rate."""
    if subject.settings.data.offline:
        return recorded_groups(subject)
    rollout, found = subject.settings.rollout, []
    if rollout.top_k == 1:
        found.append(f"--top_k={rollout.top_k}")
    if rollout.temperature < 0.3:
        found.append(f"--temperature={rollout.temperature:g}")
    if rollout.top_p < 0.2:
        found.append(f"--top_p={rollout.top_p:g}")
    if rollout.min_p > 0.7:
        found.append(f"--min_p={rollout.min_p:g}")
    text = "nearly greedy: completions of a group will be nearly equal, and teach nothing"
    return [Finding("sampling", WARN, f"{flag} is {text}", "sample with --temperature=0.9 or so") for flag in found]


def recorded_groups(subject: Subject) -> list[Finding]:
    """Return a finding about responses on file of which a prompt's all have the same score."""
    scores = [row["scores"] for row in sample(subject)]
    several = [own for own in scores if len(own) > 1]
    if not several:
        alike = len({own[0] for own in scores if own}) < 2 and len(scores) > 1
        text = "every prompt has one response, all with the same score: this is supervised training"
        return [Finding("scores", OK, text)] if alike else []
    share = float(np.mean([len(set(own)) == 1 for own in several]))
    text = f"{share:.0%} of prompts have responses that all score the same, which teach nothing"
    status = FAIL if share == 1 else WARN if share > 0.8 else OK
    return [
        Finding("scores", status, text, "" if status == OK else "give them different scores, or take other responses")
    ]


def batch_findings(subject: Subject) -> list[Finding]:
    """Return a finding about a step that takes every prompt many times."""
    size, count = subject.settings.steps.batch_size, len(subject.data)
    if size <= MOST_REPEATS * count:
        return []
    text = f"a step takes {size:,} prompts, and there are {count:,}: each comes about {size // count} times in it"
    return [Finding("batch", WARN, text, f"use --batch_size={count} or less, or more prompts")]


def rate_findings(subject: Subject) -> list[Finding]:
    """Return findings about a learning rate out of the usual range."""
    settings = subject.settings
    rate, most = settings.optimizer.learning_rate, 1e-2 if settings.lora.lora_rank else 1e-3
    if rate > most:
        text = f"--learning_rate={rate:g} is far above the usual {most / 1e3:g} to {most:g}"
        return [Finding("learning rate", WARN, text, "lower it, or training breaks down")]
    if settings.optimizer.warmup_ratio == 1:
        return [Finding("learning rate", WARN, "--warmup_ratio=1 warms up to the last step", "use 0.1")]
    return []


CHECKS: tuple[Callable[[Subject], list[Finding]], ...] = (
    prompt_findings, answer_findings, reward_findings, template_findings, length_findings, group_findings,
    batch_findings, rate_findings,
)  # fmt: skip


def subject_of(check: Callable[[Subject], list[Finding]]) -> str:
    """Return what a check is about."""
    return check.__name__.removesuffix("_findings")


def find_mistakes(subject: Subject) -> list[Finding]:
    """Return all findings, the harmless ones included; a check that cannot be made is one too."""
    found = []
    for check in CHECKS:
        try:
            found += check(subject)
        except UsageError as error:
            found.append(Finding(subject_of(check), FAIL, str(error)))
        except Exception as error:  # data may be anything, and looking at it must not stop a run
            text = f"could not be looked at ({type(error).__name__}: {error!s:.200})"
            found.append(Finding(subject_of(check), WARN, text, "please report it"))
    take_undecided()
    return found
