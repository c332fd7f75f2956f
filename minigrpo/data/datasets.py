"""Datasets of prompts: built in, from files and from the Hub, as rows and as tokens."""

import array
import contextlib
import dataclasses
import hashlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

import minigrpo.data.arithmetic as arithmetic
from minigrpo.config import DataOptions, RunOptions, Settings, UsageError
from minigrpo.data.chat import Tokenizer, warn_of_templated
from minigrpo.data.columns import Prompt, Reader, answer_reader, chat, completion_readers, prompt_reader, refuse_unused
from minigrpo.data.files import JSON_FILES, TABLES, is_file, read_file, read_rows, refuse_choice, suffix
from minigrpo.data.rows import Mapped, Ragged, Row, Rows, Selected

XML_PROMPT = (
    "Solve the problem. Respond in the following format:\n"
    "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n"
    "The answer is a single number."
)
XML_REWARDS = "correctness,integer,strict_format,soft_format,tag_count"

CHUNK_ROWS, CHUNK_CHARACTERS = 2048, 2**20
"""Most texts, and about the most characters, given to the tokenizer at once: it needs 200 bytes for a character."""

USUAL_CHARACTERS = 16
"""A text with more characters than this for each token allowed is tokenized in pieces, until it is too long."""

PIECE = 2**16
"""Characters of such a piece."""

PROGRESS_DELAY = 2.0
"""Seconds before tokenizing shows its progress."""


TEMPLATED_ROWS = 1000
"""First rows that are searched for prompts that hold a template's control tokens already."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Rows that each have "prompt" (text or messages), perhaps "answer" (text), and all other columns."""

    name: str
    rows: Rows | list[Row]
    system_prompt: str = XML_PROMPT
    reward: str = XML_REWARDS


def check_evaluated(settings: Settings) -> None:
    """Raise UsageError for flags of held-out rows where no --eval_steps reads them."""
    named = ("eval_config", "eval_dataset", "eval_num_generations", "eval_size", "eval_split")
    defaults = RunOptions()
    given = [name for name in named if getattr(settings.run, name) != getattr(defaults, name)]
    if given and not settings.run.eval_steps and not settings.run.resume:
        raise UsageError(f"--{given[0]}={getattr(settings.run, given[0])}: nothing is evaluated; set --eval_steps")


def load_dataset(options: DataOptions, split: str, answer_required: bool = True) -> Dataset:
    """Read the "train" or "test" rows that --dataset names; a file has the same rows for both.

    `answer_required` says that a reward or a command reads the reference answer: every row must then have one.
    """
    name = options.dataset
    if name == "builtin:arithmetic":
        refuse_choice(name, options.dataset_config, options.dataset_split)
        count = {"train": 10_000, "test": 1_000}[split]
        return Dataset(name, arithmetic.problems(split, count), arithmetic.SYSTEM_PROMPT)
    rows = named_rows(options, split)
    refuse_recorded(options, rows[0])
    prompt = prompt_reader(rows[0], options)
    answer = answer_reader(rows[0], options, prompt, answer_required)
    readers = {"prompt": prompt} | ({"answer": answer} if answer else {})
    return Dataset(name, with_columns(f"--dataset={name}", rows, readers))


def named_rows(options: DataOptions, split: str) -> Rows:
    """Read the rows of a file, folder or Hub dataset as they are."""
    name = options.dataset
    if name == "builtin:arithmetic":
        raise UsageError(
            f"--dataset={name}: has no responses on file; name a file that has them, or leave --offline out"
        )
    if name.startswith("builtin:"):
        raise UsageError(f"--dataset={name}: no such built-in dataset; there is builtin:arithmetic")
    return read_rows(name, options.dataset_config, options.dataset_split, split)


def with_columns(label: str, rows: Rows | list[Row], readers: dict[str, Reader]) -> Rows:
    """Return rows with further columns, each read from the row by its own function; UsageError for a row that fails."""

    def convert(row: Row) -> Row:
        refuse_unused(row)
        return row | {column: read(row) for column, read in readers.items()}

    return Mapped(label, rows, convert).checked()


def refuse_recorded(options: DataOptions, row: Row) -> None:
    """Raise UsageError for recorded responses where completions would be sampled, unless the prompts are named."""
    if options.prompt_column == "auto" and ("responses" in row or "chosen" in row):
        raise UsageError(
            f"--dataset={options.dataset}: holds responses; --offline trains on them without sampling, "
            "--prompt_column=prompt samples new ones"
        )


def load_completions(options: DataOptions, problems: int, split: str = "train") -> Dataset:
    """Read "train" or "test" rows with "prompt" and "completion" (text); no system prompt unless it is given.

    `problems` is the number of rows of builtin:arithmetic.
    """
    name = options.dataset
    if name == "builtin:arithmetic":
        refuse_choice(name, options.dataset_config, options.dataset_split)
        rows = arithmetic.problems(split, problems, arithmetic.SFT_START)
        return Dataset(name, rows, arithmetic.SYSTEM_PROMPT)
    raw = named_rows(options, split)
    prompt, completion = completion_readers(raw[0], options)
    return Dataset(name, with_columns(f"--dataset={name}", raw, {"prompt": prompt, "completion": completion}), "")


def read_prompts(path: Path, options: DataOptions) -> list[Prompt]:
    """Read the prompts of a file of rows, or the lines of any other file; UsageError naming --prompts otherwise."""
    if suffix(path) in (*JSON_FILES, *TABLES):
        rows = read_file(path, "prompts")
        prompt = prompt_reader(rows[0], options)
        return [row["prompt"] for row in with_columns(f"--prompts={path}", rows, {"prompt": prompt})]
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.rstrip("\r\n") for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts={path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not lines:
        raise UsageError(f"--prompts={path}: the file has no prompts")
    return list(lines)


def held_out_options(data: DataOptions, run: RunOptions) -> DataOptions:
    """Return the options of the prompts of --eval_steps; UsageError when only the training prompts are there."""
    own = run.eval_dataset == "auto"
    if own and run.eval_split == "auto" and (is_file(data.dataset) or data.offline):
        raise UsageError(
            f"--eval_steps={run.eval_steps}: {data.dataset} has no test split; name one with --eval_dataset"
        )
    dataset = data.dataset if own else run.eval_dataset
    config = data.dataset_config if own and run.eval_config == "auto" else run.eval_config
    return dataclasses.replace(data, dataset=dataset, dataset_config=config, dataset_split=run.eval_split)


@contextlib.contextmanager
def naming_eval_flags() -> Iterator[None]:
    """Name --eval_dataset and its kin in errors from inside, where held-out rows are read as others are."""
    try:
        yield
    except UsageError as error:
        text = str(error).replace("--dataset=", "--eval_dataset=").replace("--dataset_", "--eval_")
        raise UsageError(text) from error


# Tokens


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Rows whose prompt is short enough, with the prompt's tokens: `rows[i]` is a dict, `tokens[i]` a list of ids."""

    rows: Rows | list[Row]
    tokens: Ragged
    dropped: int

    def __len__(self) -> int:
        return len(self.tokens)

    def digest(self) -> str:
        """Return a digest of all prompts' tokens."""
        digest = hashlib.blake2b(digest_size=6)
        for tokens in self.tokens:
            digest.update(np.array([*tokens, -1], np.int64).tobytes())
        return digest.hexdigest()

    def only(self, kept: Sequence[int] | np.ndarray) -> "PromptSet":
        """Return the prompts of these indices, which rise; the others count as dropped."""
        return PromptSet(Selected(self.rows, kept), self.tokens.only(kept), self.dropped + len(self) - len(kept))


def tokenize(dataset: Dataset, tokenizer: Tokenizer, options: DataOptions) -> PromptSet:
    """Render and tokenize every prompt; prompts longer than --max_prompt_length are dropped and counted."""
    system = dataset.system_prompt if options.system_prompt == "auto" else options.system_prompt
    rows = with_progress(dataset.rows, f"tokenizing {dataset.name}")
    texts = (tokenizer.render(chat(row["prompt"], system)) for row in rows)
    limit, kept, tokens, shortest = options.max_prompt_length, array.array("q"), Ragged(), 0
    for number, ids in enumerate(encode(tokenizer, texts, limit, are_prompts=True)):
        if ids and len(ids) <= limit:
            kept.append(number)
            tokens.append(ids)
        shortest = min(shortest or len(ids), len(ids)) if ids else shortest
    if not kept:
        measured = f"; the shortest has {shortest} tokens" if shortest else ""
        raise UsageError(f"--max_prompt_length={limit}: every prompt of {dataset.name} is longer{measured}")
    chats = (chat(row["prompt"], "") for row in itertools.islice(iter(dataset.rows), TEMPLATED_ROWS))
    warn_of_templated(tokenizer, chats, f"--dataset={dataset.name}")
    return PromptSet(Selected(dataset.rows, kept), tokens, len(dataset.rows) - len(kept))


def tokenize_completions(
    dataset: Dataset, tokenizer: Tokenizer, options: DataOptions, limit: int, end_token: int
) -> tuple[PromptSet, Ragged]:
    """Tokenize prompts and "completion" texts, the end token added; rows with either too long are dropped and counted.

    `limit` is --max_completion_length, the end token included.
    """
    data = tokenize(dataset, tokenizer, options)
    texts = (row["completion"] for row in with_progress(data.rows, f"tokenizing the completions of {dataset.name}"))
    kept, completions = array.array("q"), Ragged()
    for number, ids in enumerate(encode(tokenizer, texts, limit)):
        if ids is not None and len(ids) < limit:
            kept.append(number)
            completions.append([*ids, end_token])
    if not kept:
        raise UsageError(f"--max_completion_length={limit}: every completion of {dataset.name} is longer")
    return data.only(kept), completions


def with_progress(rows: Rows | list[Row], caption: str) -> Iterator[Row]:
    """Yield the rows, with a line of progress on stderr when they take long."""
    interval = 0.5 if sys.stderr.isatty() else 10.0
    yield from tqdm(
        rows, caption, unit=" rows", delay=PROGRESS_DELAY, mininterval=interval, leave=False, file=sys.stderr
    )


def encode(
    tokenizer: Tokenizer, texts: Iterable[str], limit: int, are_prompts: bool = False
) -> Iterator[list[int] | None]:
    """Yield the token ids of each text, some thousand texts at a time; None for one of far more than `limit` tokens."""
    encode_texts = tokenizer.encode_prompts if are_prompts else tokenizer.encode
    for chunk in in_chunks(texts):
        short = [text for text in chunk if not far_too_long(tokenizer, text, limit)]
        tokens = dict(zip(short, encode_texts(short), strict=True))
        yield from (tokens.get(text) for text in chunk)


def in_chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield the texts in lists of bounded count and length; a long text ends its list."""
    chunk: list[str] = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if len(chunk) == CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def far_too_long(tokenizer: Tokenizer, text: str, limit: int) -> bool:
    """Tell whether a text has more than twice `limit` tokens, counted piece by piece and no further than needed."""
    count = 0
    for start in range(0, len(text), PIECE) if len(text) > max(PIECE, USUAL_CHARACTERS * limit) else ():
        count += len(tokenizer.encode([text[start : start + PIECE]])[0])
        if count > 2 * limit:
            return True
    return False


def batch_numbers(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Return the numbers that step `step` (from 0) trains on: epoch * count + row, which never repeats in a run.

    Every epoch is shuffled anew, and its order is a function of (seed, epoch) alone.

    >>> sorted(batch_numbers(4, 2, 0, 7) + batch_numbers(4, 2, 1, 7)), sorted(batch_numbers(4, 4, 1, 7))
    ([0, 1, 2, 3], [4, 5, 6, 7])
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    epochs = {position // count for position in positions}
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs}
    return [position // count * count + int(orders[position // count][position % count]) for position in positions]
