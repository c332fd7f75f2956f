"""Responses on file with their scores: in lists, flat, as preferences, or as chats."""

import array
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from minigrpo.config import DataOptions, UsageError
from minigrpo.data.chat import Tokenizer
from minigrpo.data.columns import (
    CHAT_COLUMNS,
    PROMPT_COLUMNS,
    answer_reader,
    completion_text,
    find_column,
    messages_of,
    number_of,
    prompt_reader,
    refuse_unused,
    split_chat,
)
from minigrpo.data.datasets import Dataset, PromptSet, encode, named_rows, tokenize, with_columns, with_progress
from minigrpo.data.rows import CellError, Ints, Mapped, Ragged, Row, Rows

RESPONSE_COLUMNS, SCORE_COLUMNS = ("response", "completion"), ("score", "reward", "label")
"""Of flat rows, one response each; a label is true or false."""

SCORE_PAIRS = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
"""Columns of a preference's own scores."""

Recorded = tuple[list[str], list[float]]
"""Responses of a prompt, and their scores."""


def read_recorded(options: DataOptions, split: str = "train") -> Dataset:
    """Read rows with "prompt", "responses" (texts) and "scores" (numbers); no system prompt unless it is given.

    From {prompt, responses, scores}, {prompt, response, score} grouped by prompt, {prompt, chosen, rejected} with
    their own scores or 1 and 0, and chats, whose last answer scores 1.
    """
    rows, label = named_rows(options, split), f"--dataset={options.dataset}"
    if is_flat(rows[0]):
        return Dataset(options.dataset, grouped(Mapped(label, rows, lambda row: flat_row(options, row))), "")
    return Dataset(options.dataset, Mapped(label, rows, lambda row: recorded_row(options, row)).checked(), "")


def recorded_row(options: DataOptions, row: Row) -> Row:
    """Return a row of any kind but the flat one, with "prompt", "responses" and "scores"."""
    refuse_unused(row)
    before: list[Any] = []
    if "responses" in row:
        responses, scores = scored_lists(row)
    elif "chosen" in row:
        before, responses, scores = preference(row)
    elif column := find_column(row, CHAT_COLUMNS):
        before, response = chat_response(column, row[column])
        responses, scores = [response], [1.0]
    else:
        flat = "; rows of one response each are not mixed with others" if "response" in row else ""
        raise CellError(f"has no responses, chosen or messages; its columns are {', '.join(row)}{flat}")
    return row | {"prompt": recorded_prompt(options, row, before), "responses": responses, "scores": scores}


def recorded_prompt(options: DataOptions, row: Row, before: list[Any]) -> Any:
    """Return the prompt of the row's own column, else the messages before its response."""
    column = find_column(row, PROMPT_COLUMNS)
    if options.prompt_column == "auto" and before and (column is None or not row[column]):
        return before
    if options.prompt_column == "auto" and not find_column(row, (*PROMPT_COLUMNS, *CHAT_COLUMNS, "instruction")):
        raise CellError("has no prompt before its responses")
    return prompt_reader(row, options)(row)


def scored_lists(row: Row) -> Recorded:
    """Return a row's responses and scores; CellError unless there are as many of each."""
    responses, scores = row["responses"], row.get("scores")
    if not isinstance(responses, list) or not responses or not isinstance(scores, list):
        raise CellError("needs a list of responses and as many scores")
    if len(responses) != len(scores):
        raise CellError(f"has {len(responses)} responses and {len(scores)} scores; it needs as many of each")
    return [completion_text("responses", response) for response in responses], [number_of(score) for score in scores]


def preference(row: Row) -> tuple[list[Any], list[str], list[float]]:
    """Return the messages before the responses, if they are there, both responses, and their scores."""
    if "rejected" not in row:
        raise CellError("has no column 'rejected'")
    before, chosen = chat_response("chosen", row["chosen"])
    responses = [chosen, chat_response("rejected", row["rejected"])[1]]
    pair = next((pair for pair in SCORE_PAIRS if any(row.get(column) is not None for column in pair)), None)
    return before, responses, [number_of(row.get(column)) for column in pair] if pair else [1.0, 0.0]


def chat_response(column: str, value: Any) -> tuple[list[Any], str]:
    """Return the messages before a response, and its text."""
    response = completion_text(column, value)
    return ([] if isinstance(value, str) else split_chat(messages_of(value))[0]), response


def is_recorded(row: Row) -> bool:
    """Tell whether a row holds responses with scores, in any form but a chat."""
    return "responses" in row or "chosen" in row or is_flat(row)


def recorded_problems(options: DataOptions, split: str) -> Dataset | None:
    """Read the prompts of rows with responses and their reference answers; None where the rows have no answer."""
    dataset = read_recorded(options, split)

    def prompt(row: Row) -> Any:
        return row["prompt"]

    if not answer_reader(dataset.rows[0], options, prompt, required=False):
        return None
    answer = answer_reader(dataset.rows[0], options, prompt, required=True)
    assert answer
    return Dataset(dataset.name, with_columns(f"--dataset={dataset.name}", dataset.rows, {"answer": answer}))


# One response a row


def is_flat(row: Row) -> bool:
    """Tell whether a row holds one response with its score."""
    listed = "responses" in row or "chosen" in row
    return not listed and bool(find_column(row, RESPONSE_COLUMNS) and find_column(row, SCORE_COLUMNS))


def flat_row(options: DataOptions, row: Row) -> Row:
    """Return a row with "prompt", "responses" and "scores" of one entry each."""
    refuse_unused(row)
    response, score = (find_column(row, columns) for columns in (RESPONSE_COLUMNS, SCORE_COLUMNS))
    if response is None or score is None:
        raise CellError(f"has no response with a score; its columns are {', '.join(row)}")
    prompt = recorded_prompt(options, row, [])
    text = completion_text(response, row[response])
    return row | {"prompt": prompt, "responses": [text], "scores": [number_of(row[score])]}


@dataclasses.dataclass(frozen=True, eq=False)
class Grouped(Rows):
    """Flat rows of the same prompt as one row, in order of first appearance; other columns are the first row's."""

    source: Rows
    members: Ragged

    def __len__(self) -> int:
        return len(self.members)

    def row(self, index: int) -> Row:
        """Return one row for the prompt at `index`, with the responses and scores of all its members."""
        rows = [self.source[member] for member in self.members[index]]
        return rows[0] | {name: [row[name][0] for row in rows] for name in ("responses", "scores")}


def grouped(rows: Rows) -> Grouped:
    """Group flat rows by their prompt, of which only a hash is kept."""
    members: dict[bytes, Ints] = {}
    for number, row in enumerate(rows):
        prompt = json.dumps(row["prompt"], sort_keys=True).encode()
        members.setdefault(hashlib.blake2b(prompt, digest_size=16).digest(), array.array("i")).append(number)
    groups = Ragged()
    for group in members.values():
        groups.append(group)
    return Grouped(rows, groups)


# Tokens


def load_recorded(
    tokenizer: Tokenizer,
    options: DataOptions,
    limit: int,
    end_token: int,
    split: str = "train",
    most: int | None = None,
) -> PromptSet:
    """Read prompts whose rows hold "response_tokens", end token included, beside "responses" and "scores".

    Prompts and responses that are too long are dropped, and a line on stderr counts both. `limit` is
    --max_completion_length; `most` prompts are read, None being all, and of `split` unless --dataset_split is given.
    """
    dataset = read_recorded(options, split)
    dataset = dataclasses.replace(dataset, rows=dataset.rows[:most])
    data = tokenize(dataset, tokenizer, options)
    fits, counts = fitting(tokenizer, data, dataset.name, limit)
    kept = np.flatnonzero(np.add.reduceat(fits, np.cumsum(counts) - counts))
    if not len(kept):
        raise UsageError(f"--max_completion_length={limit}: every response of {dataset.name} is longer")
    data = data.only(kept)
    sys.stderr.write(
        f"data: {int(fits.sum())} responses of {len(data)} prompts; "
        f"dropped as too long: {data.dropped} prompts, {int((~fits).sum())} responses\n"
    )
    short = Mapped(dataset.name, data.rows, lambda row: short_responses(tokenizer, limit, end_token, row))
    return dataclasses.replace(data, rows=short)


def fitting(tokenizer: Tokenizer, data: PromptSet, name: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for every response of all prompts whether it is short enough, and each prompt's count of responses."""
    counts = array.array("q")

    def texts() -> Iterator[str]:
        for row in with_progress(data.rows, f"tokenizing the responses of {name}"):
            counts.append(len(row["responses"]))
            yield from row["responses"]

    fits = np.fromiter((is_short(ids, limit) for ids in encode(tokenizer, texts(), limit)), bool)
    return fits, np.frombuffer(counts, np.int64)


def is_short(ids: list[int] | None, limit: int) -> bool:
    """Tell whether token ids leave room for the end token."""
    return ids is not None and len(ids) < limit


def short_responses(tokenizer: Tokenizer, limit: int, end_token: int, row: Row) -> Row:
    """Return a row with only its responses that are short enough, and their tokens as "response_tokens"."""
    tokens = list(encode(tokenizer, row["responses"], limit))
    kept = [i for i, ids in enumerate(tokens) if is_short(ids, limit)]
    own = {name: [row[name][i] for i in kept] for name in ("responses", "scores")}
    return row | own | {"response_tokens": [[*(tokens[i] or []), end_token] for i in kept]}
