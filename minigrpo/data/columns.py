"""Cells of a row as prompts, answers, completions and scores, whatever the shape of the row."""

import math
import numbers
import re
import reprlib
from collections.abc import Callable
from functools import partial
from typing import Any

from minigrpo.config import DataOptions, UsageError
from minigrpo.data.rows import CellError, Row
from minigrpo.data.template import Message

PROMPT_COLUMNS = ("prompt", "question", "problem")
ANSWER_COLUMNS = (
    "answer", "solution", "ground_truth", "final_answer", "target", "reward_model.ground_truth", "output",
)  # fmt: skip
COMPLETION_COLUMNS = ("completion", "response", "output", "answer", "solution")
CHAT_COLUMNS = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names for roles."""

UNUSED = {"tools": "tools", "image": "an image", "images": "images", "videos": "videos", "audios": "audio"}
"""Columns that change a prompt in other libraries, and that a row may have only empty -> what they hold."""

WRITTEN_MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](role|from)['\"]\s*:")
LARGEST_SCORE = 1e9

Prompt = str | list[Message]
Reader = Callable[[Row], Any]


# Columns


def lookup(row: Row, column: str) -> Any:
    """Return a cell by its column, dots leading into nested ones; CellError when there is none.

    >>> lookup({"reward_model": {"ground_truth": "4"}}, "reward_model.ground_truth")
    '4'
    """
    if column in row:
        return row[column]
    value: Any = row
    for key in column.split("."):
        if not isinstance(value, dict) or key not in value:
            raise CellError(f"has no column {column!r}")
        value = value[key]
    return value


def find_column(row: Row, usual: tuple[str, ...]) -> str | None:
    """Return the first of the usual columns that a row has."""
    for column in usual:
        try:
            lookup(row, column)
        except CellError:
            continue
        return column
    return None


def choose_column(row: Row, flag: str, given: str, usual: tuple[str, ...], cure: str = "") -> str:
    """Return the column that a flag names, or that is found; UsageError with the row's columns and the cure."""
    wanted = usual if given == "auto" else (given,)
    found = find_column(row, wanted)
    if found is None:
        raise UsageError(
            f"--{flag}={given}: the dataset has no column {' or '.join(wanted)}; its columns are {column_names(row)}"
            f"{cure}"
        )
    return found


def column_names(row: Row) -> str:
    """Return the columns of a row, nested ones with dots, cut after 40."""
    names = [
        name for key, value in row.items() for name in ([f"{key}.{k}" for k in value] if is_struct(value) else [key])
    ]
    return (", ".join(names[:40]) or "none") + (f" and {len(names) - 40} more" if len(names) > 40 else "")


def is_struct(value: Any) -> bool:
    """Tell if a cell is a non-empty struct."""
    return isinstance(value, dict) and bool(value)


def describe(value: Any) -> str:
    """Describe a cell for an error: its kind and its beginning."""
    if value is None or value == "":
        return "nothing"
    return f"{type(value).__name__} {reprlib.repr(value)}"


# Messages


def messages_of(value: list[Any]) -> list[Message]:
    """Return a chat as roles and texts, from {role, content} or ShareGPT's {from, value}."""
    if not value:
        raise CellError("has an empty list of messages")
    return [message_of(f"message {place}", message) for place, message in enumerate(value, 1)]


def message_of(where: str, message: Any) -> Message:
    """Return one message; its other texts, such as reasoning_content, are kept."""
    if not isinstance(message, dict):
        raise CellError(f"has {describe(message)} as {where}; a message has a role and content")
    role = message.get("role") or message.get("from")
    content = message.get("value") if message.get("content") is None else message["content"]
    if not isinstance(role, str) or not role:
        raise CellError(f"has no role in {where}")
    if message.get("tool_calls") or role in ("function_call", "observation", "tool"):
        raise CellError(f"has tool calls in {where}, which minigrpo does not train on")
    if ROLES.get(role, role) not in ("system", "user", "assistant"):
        raise CellError(f"has the role {role!r} in {where}; roles are system, user and assistant")
    extra = {key: text for key, text in message.items() if isinstance(text, str) and key not in ("from", "value")}
    return extra | {"role": ROLES.get(role, role), "content": text_of(where, content)}


def text_of(where: str, content: Any) -> str:
    """Return the text of a message's content, which is text or a list of parts of the type "text"."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise CellError(f"has {describe(content)} as the content of {where}; content is text")
    other = next((part for part in content if not is_text_part(part)), None)
    if other is not None:
        kind = other.get("type") if isinstance(other, dict) else None
        raise CellError(f"has {kind or describe(other)!r} in {where}; minigrpo trains on text alone")
    return "".join(part["text"] for part in content)


def is_text_part(part: Any) -> bool:
    """Tell if a part of a message's content is text."""
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def split_chat(messages: list[Message]) -> tuple[list[Message], str | None]:
    """Return the messages before the assistant's last answer, and that answer; None where a chat ends otherwise.

    >>> split_chat([{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}])
    ([{'role': 'user', 'content': '2 + 2?'}], '4')
    """
    answered = messages[-1]["role"] == "assistant"
    return (messages[:-1], messages[-1]["content"]) if answered else (messages, None)


def chat(prompt: Prompt, system_prompt: str) -> list[Message]:
    """Return the messages of one prompt, the system prompt first unless the prompt brings its own."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


# Prompts


def prompt_cell(column: str, row: Row) -> Prompt:
    """Return a column's cell as a prompt: text, or messages, of a chat column those before the answer."""
    value = lookup(row, column)
    if isinstance(value, list):
        messages = messages_of(value)
        return nonempty(split_chat(messages)[0]) if column in CHAT_COLUMNS else messages
    if not isinstance(value, str) or not value.strip():
        raise CellError(f"has {describe(value)} as {column!r}; a prompt is text or a list of messages")
    if WRITTEN_MESSAGES.match(value):
        raise CellError(f"has messages written as text in {column!r}; save the file as JSON Lines or Parquet")
    return value


def nonempty(messages: list[Message]) -> list[Message]:
    """Return the messages; CellError when there are none."""
    if not messages:
        raise CellError("has no messages before the answer")
    return messages


def chat_prompt(column: str, row: Row) -> Prompt:
    """Return the messages before a chat's answer, after the row's own system text, if it has one."""
    prompt = prompt_cell(column, row)
    return chat(prompt, system_text(row)) if system_text(row) else prompt


def alpaca_prompt(row: Row) -> Prompt:
    """Return Alpaca's instruction and input as one text, or a chat when there is a system text or a history."""
    given = [row["instruction"], row.get("input") or ""]
    if not all(isinstance(text, str) for text in given) or not given[0].strip():
        raise CellError(f"has {describe(given[0])} as 'instruction'; with 'input', it must be text")
    turns = [message for turn in row.get("history") or [] for message in history_turn(turn)]
    text = "\n".join(filter(None, given))
    if not turns and not system_text(row):
        return text
    return chat([*turns, {"role": "user", "content": text}], system_text(row))


def history_turn(turn: Any) -> list[Message]:
    """Return an earlier question and its answer as messages."""
    if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
        raise CellError(f"has {describe(turn)} in 'history'; each turn is a pair of texts")
    return [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]


def system_text(row: Row) -> str:
    """Return a row's system message, empty if it has none; CellError when it is not text."""
    value = row.get("system") or ""
    if not isinstance(value, str):
        raise CellError(f"has {describe(value)} as 'system'; it must be text")
    return value


def prompt_reader(row: Row, options: DataOptions) -> Reader:
    """Return a function that reads the prompts of rows with these columns; UsageError when none is found.

    The named column wins, then the usual ones, then Alpaca's, then a chat.
    """
    if options.prompt_column == "auto" and not find_column(row, PROMPT_COLUMNS):
        if "instruction" in row:
            return alpaca_prompt
        if column := find_column(row, CHAT_COLUMNS):
            return partial(chat_prompt, column)
    column = choose_column(row, "prompt_column", options.prompt_column, PROMPT_COLUMNS)
    return partial(chat_prompt if column in CHAT_COLUMNS else prompt_cell, column)


def refuse_unused(row: Row) -> None:
    """Raise CellError for a column that other libraries would put into the prompt."""
    found = next((column for column in UNUSED if row.get(column)), None)
    if found:
        raise CellError(f"has {UNUSED[found]} in {found!r}, which minigrpo does not train on; remove the column")


# Answers, completions and scores


def answer_cell(column: str, row: Row) -> str:
    """Return a column's cell as a reference answer: text as it is, a number as text, of messages the last answer."""
    value = lookup(row, column)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return completion_text(column, value)
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, numbers.Number) and not isinstance(value, bool) and value == value:
        return str(value)
    raise CellError(f"has {describe(value)} as {column!r}; an answer is text or a number")


def completion_cell(column: str, row: Row) -> str:
    """Return a column's cell as a completion."""
    return completion_text(column, lookup(row, column))


def completion_text(column: str, value: Any) -> str:
    """Return a completion: text, or messages that end with the assistant and may begin with the prompt."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise CellError(f"has {describe(value)} as {column!r}; a completion is text or a list of messages")
    before, answer = split_chat(messages_of(value))
    if answer is None:
        raise CellError(f"has no answer in {column!r}: its last message is not the assistant's")
    if before and before[0]["role"] == "assistant":
        raise CellError(f"has a completion of several turns in {column!r}; one message of the assistant is due")
    return answer


def number_of(value: Any) -> float:
    """Return a score, which may be text as in CSV; CellError when it is not a number or is huge."""
    try:
        score = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        score = math.nan
    if not abs(score) < LARGEST_SCORE:
        raise CellError(f"has {describe(value)} as a score; scores must be numbers, not huge")
    return score


def value_or_cell(column: str, row: Row) -> Any:
    """Return the reference answer that no reward demands: as text where it can be, else the cell as it is, or None."""
    try:
        return answer_cell(column, row)
    except CellError:
        raw = find_column(row, (column,)) and column not in CHAT_COLUMNS
        return lookup(row, column) if raw else None


def answer_reader(row: Row, options: DataOptions, prompt: Reader, required: bool) -> Reader | None:
    """Return a function that reads reference answers; None when there are none and none are required.

    The named column wins, then the usual ones, then a chat's last answer where the chat is the prompt.
    """
    usual = (*ANSWER_COLUMNS, *(prompt.args if isinstance(prompt, partial) and prompt.func is chat_prompt else ()))
    if options.answer_column == "auto" and not required and not find_column(row, usual):
        return None
    wanted = usual if find_column(row, usual) else ANSWER_COLUMNS
    cure = "; name the one with reference answers, or take rewards that read none" if required else ""
    column = choose_column(row, "answer_column", options.answer_column, wanted, cure)
    return partial(answer_cell if required else value_or_cell, column)


def completion_readers(row: Row, options: DataOptions) -> tuple[Reader, Reader]:
    """Return functions that read prompts and completions: named or usual columns, else a chat and its last answer."""
    chosen = find_column(row, CHAT_COLUMNS)
    named = options.prompt_column != "auto" or options.answer_column != "auto"
    usual = find_column(row, (*PROMPT_COLUMNS, "instruction")) and find_column(row, COMPLETION_COLUMNS)
    if chosen and not named and not usual:
        return partial(chat_prompt, chosen), partial(completion_cell, chosen)
    column = choose_column(row, "answer_column", options.answer_column, COMPLETION_COLUMNS)
    return prompt_reader(row, options), partial(completion_cell, column)
