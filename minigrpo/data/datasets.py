"""Datasets of prompts with reference answers: built-in, GSM8K, any JSONL file or Hub dataset."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from minigrpo.config import DataOptions, UsageError
from minigrpo.data import arithmetic
from minigrpo.data.chat import Message, Tokenizer

PROMPT_COLUMNS = ("prompt", "question", "problem")
ANSWER_COLUMNS = ("answer", "solution")
GSM8K = "openai/gsm8k"
XML_PROMPT = (
    "Solve the problem. Respond in the following format:\n"
    "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n"
    "The answer is a single number."
)
XML_REWARDS = "correctness,integer,strict_format,soft_format,tag_count"

LARGEST_SCORE = 1e9

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Rows that each have "prompt" (text or messages) and "answer" (text), and whatever other columns there are."""

    name: str
    rows: list[Row]
    system_prompt: str = XML_PROMPT
    reward: str = XML_REWARDS


def load_dataset(options: DataOptions, split: str) -> Dataset:
    """The "train" or "test" rows that --dataset names. A JSONL file has no test rows of its own."""
    name = options.dataset
    if name == "builtin:arithmetic":
        count = {"train": 10_000, "test": 1_000}[split]
        return Dataset(name, arithmetic.problems(split, count), arithmetic.SYSTEM_PROMPT)
    if name.startswith("builtin:"):
        raise UsageError(f"--dataset={name}: no such built-in dataset; there is builtin:arithmetic")
    rows = read_rows(name, split)
    refuse_recorded(name, rows[0])
    return Dataset(name, map_columns(rows, options))


def refuse_recorded(name: str, row: Row) -> None:
    """UsageError for responses on file where completions are going to be sampled."""
    if "responses" in row or "chosen" in row:
        raise UsageError(f"--dataset={name}: holds responses; --offline trains on them without sampling")


def is_file(name: str) -> bool:
    """Whether --dataset means a JSONL file rather than a built-in or Hub dataset."""
    return Path(name).suffix in (".jsonl", ".json") or Path(name).is_file()


def read_rows(name: str, split: str) -> list[Row]:
    return read_jsonl(Path(name)) if is_file(name) else read_hub(name, split)


def read_jsonl(path: Path, flag: str = "dataset") -> list[Row]:
    """One object per line; UsageError naming `flag`, file and line otherwise. Blank lines are skipped."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--{flag}={path}: cannot be read ({error})") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(parse_line(path, number, line))
    if not rows:
        raise UsageError(f"--{flag}={path}: the file has no rows")
    return rows


def parse_line(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{path}:{number}: not JSON ({error})") from error
    if "\\ud" in line.lower() and not is_unicode(row):
        raise UsageError(f"{path}:{number}: holds half of a surrogate pair, which is no character")
    if not isinstance(row, dict):
        raise UsageError(f"{path}:{number}: a line must be a JSON object, not {type(row).__name__}")
    return row


def from_chat(row: Row) -> Row:
    prompt, answer = split_messages(row.get("messages"))
    return row | {"prompt": prompt, "answer": answer}


def is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_hub(name: str, split: str) -> list[Row]:
    """A Hub dataset's split, through the datasets library; "gsm8k" is short for openai/gsm8k."""
    import datasets  # slow to import, and only needed here

    hub_id, config = (GSM8K, "main") if name in ("gsm8k", GSM8K) else (name, None)
    try:
        table = datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:  # the library raises many kinds for a missing dataset, split or network
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"--dataset={name}: split {split!r} cannot be had from the Hub or its cache ({reason})"
        ) from error
    return [dict(row) for row in table]


def map_columns(rows: list[Row], options: DataOptions) -> list[Row]:
    """Rows with "prompt" and "answer" taken from the columns that the flags name or that are found.

    Of chat {messages} the last answer is the reference.
    """
    rows = [from_chat(row) for row in rows] if "messages" in rows[0] and "prompt" not in rows[0] else rows
    prompt = choose_column(rows[0], "prompt_column", options.prompt_column, PROMPT_COLUMNS)
    answer = choose_column(rows[0], "answer_column", options.answer_column, ANSWER_COLUMNS)
    mapped = []
    for number, row in enumerate(rows, 1):
        if prompt not in row or answer not in row:
            missing = prompt if prompt not in row else answer
            raise UsageError(f"--dataset={options.dataset}: row {number} has no column {missing!r}")
        if not is_prompt(row[prompt]) or row[answer] is None:
            column = answer if is_prompt(row[prompt]) else prompt
            raise UsageError(f"--dataset={options.dataset}: row {number} has {repr(row[column])[:60]} as {column!r}")
        mapped.append(row | {"prompt": row[prompt], "answer": str(row[answer])})
    return mapped


# Responses on file


def read_recorded(options: DataOptions) -> Dataset:
    """Rows with "prompt", "responses" (texts) and "scores" (numbers), for training without sampling.

    From {prompt, responses, scores}, {prompt, chosen, rejected} (scores 1 and 0) or chat {messages} (score 1).
    """
    rows = read_rows(options.dataset, "train")
    return Dataset(options.dataset, [recorded_row(options.dataset, number, row) for number, row in enumerate(rows, 1)])


def recorded_row(name: str, number: int, row: Row) -> Row:
    kind = next((kind for kind in RECORDED if kind in row), None)
    if kind is None:
        raise UsageError(
            f"--dataset={name}: row {number} has no responses, chosen or messages; its columns are {', '.join(row)}"
        )
    prompt, responses, scores = RECORDED[kind](row)
    if not is_prompt(prompt):
        raise UsageError(f"--dataset={name}: row {number} has no prompt before its responses")
    texts = isinstance(responses, list) and bool(responses) and all(isinstance(text, str) for text in responses)
    if not texts or not isinstance(scores, list) or len(scores) != len(responses):
        raise UsageError(f"--dataset={name}: row {number} needs a list of responses and as many scores")
    if not all(isinstance(score, int | float) and abs(score) < LARGEST_SCORE for score in scores):
        raise UsageError(
            f"--dataset={name}: row {number} has scores {str(scores)[:60]}; they must be numbers, not huge"
        )
    return row | {"prompt": prompt, "responses": responses, "scores": scores}


def scored_row(row: Row) -> tuple[Any, Any, Any]:
    return row.get("prompt"), row["responses"], row.get("scores")


def preference_row(row: Row) -> tuple[Any, Any, Any]:
    """The chosen response scores 1, the rejected one 0; each is text or messages, which may hold the prompt too."""
    prompt, chosen = split_messages(row["chosen"])
    return row.get("prompt") or prompt, [chosen, split_messages(row.get("rejected"))[1]], [1.0, 0.0]


def chat_row(row: Row) -> tuple[Any, Any, Any]:
    """The last assistant message is the response."""
    prompt, response = split_messages(row["messages"])
    return prompt, [response], [1.0]


RECORDED = {"responses": scored_row, "chosen": preference_row, "messages": chat_row}
"""Column that tells a kind of row -> how to read it, as (prompt, responses, scores)."""


def split_messages(messages: Any) -> tuple[Any, Any]:
    """A chat that ends with the assistant -> the messages before, and that answer; text is an answer alone.

    >>> split_messages([{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}])
    ([{'role': 'user', 'content': '2 + 2?'}], '4')
    """
    if not is_prompt(messages) or isinstance(messages, str):
        return None, messages
    answered = messages[-1]["role"] == "assistant"
    return messages[:-1], messages[-1]["content"] if answered else None


def is_prompt(value: Any) -> bool:
    """Text, or messages that each have a role and content."""
    if isinstance(value, list):
        return bool(value) and all(
            isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
            for message in value
        )
    return isinstance(value, str) and bool(value)


def choose_column(row: Row, flag: str, given: str, usual: tuple[str, ...]) -> str:
    wanted = usual if given == "auto" else (given,)
    found = next((name for name in wanted if name in row), None)
    if found is None:
        raise UsageError(
            f"--{flag}={given}: the dataset has no column {' or '.join(wanted)}; its columns are {', '.join(row)}"
        )
    return found


def chat(prompt: str | list[Message], system_prompt: str) -> list[Message]:
    """Messages of one prompt, the system prompt first unless the prompt brings its own."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Rows whose prompt is short enough, with the prompt's tokens."""

    rows: list[Row]
    tokens: list[list[int]]
    dropped: int

    def __len__(self) -> int:
        return len(self.rows)


def tokenize(dataset: Dataset, tokenizer: Tokenizer, options: DataOptions) -> Prompts:
    """Renders and tokenizes every prompt; those longer than --max_prompt_length are dropped and counted."""
    system = dataset.system_prompt if options.system_prompt == "auto" else options.system_prompt
    tokens = tokenizer.encode([tokenizer.render(chat(row["prompt"], system)) for row in dataset.rows])
    kept = [i for i, row in enumerate(tokens) if 0 < len(row) <= options.max_prompt_length]
    if not kept:
        raise UsageError(
            f"--max_prompt_length={options.max_prompt_length}: every prompt of {dataset.name} is longer; "
            f"the shortest has {min(map(len, tokens))} tokens"
        )
    return Prompts([dataset.rows[i] for i in kept], [tokens[i] for i in kept], len(tokens) - len(kept))


def batch_numbers(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """What step number `step` (from 0) trains on: epoch * count + row, which never repeats in a run.

    Every epoch is shuffled anew, and its order is a function of (seed, epoch) alone.

    >>> sorted(batch_numbers(4, 2, 0, 7) + batch_numbers(4, 2, 1, 7)), sorted(batch_numbers(4, 4, 1, 7))
    ([0, 1, 2, 3], [4, 5, 6, 7])
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    epochs = {position // count for position in positions}
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs}
    return [position // count * count + int(orders[position // count][position % count]) for position in positions]
