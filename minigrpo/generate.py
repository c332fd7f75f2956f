"""`python -m minigrpo.generate`: answers to a prompt, to a file of prompts, or in a chat in the terminal."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigrpo.build import Build
from minigrpo.config import (
    Settings,
    UsageError,
    run_command,
)
from minigrpo.data.chat import Message
from minigrpo.data.datasets import PROMPT_COLUMNS, chat, choose_column, is_prompt, read_jsonl
from minigrpo.model.hub import run_defaults
from minigrpo.model.params import Params
from minigrpo.planning.memory import pool_limit

SECTIONS = ("model", "data", "rollout", "generate")


UNUSED = frozenset({"dataset", "offline", "answer_column"})
"""Flags of data that no prompt of this command is taken from."""


class Stream:
    """Writes one completion's text to stdout while its tokens come in."""

    def __init__(self, built: Build):
        self.built = built
        self.tokens: dict[int, int] = {}
        self.shown = ""

    def __call__(self, completion: Any, position: Any, token: Any) -> None:
        self.tokens[int(position[0])] = int(token[0])
        self.show(final=False)

    def show(self, final: bool) -> None:
        """Adds what has become certain; a character may take several tokens, which may come out of order."""
        known = [self.tokens[i] for i in range(len(self.tokens)) if i in self.tokens]
        text = self.built.tokenizer.decode([known])[0]
        if len(known) < len(self.tokens) or not text.startswith(self.shown) or (text.endswith("\ufffd") and not final):
            return
        sys.stdout.write(text[len(self.shown) :])
        sys.stdout.flush()
        self.shown = text


def encode(built: Build, prompt: str | list[Message]) -> list[int]:
    """Tokens of a prompt in the chat template; UsageError when there are too many."""
    data = built.settings.data
    system = "" if data.system_prompt == "auto" else data.system_prompt
    tokens = built.tokenizer.encode([built.tokenizer.render(chat(prompt, system))])[0]
    if len(tokens) > data.max_prompt_length:
        raise UsageError(f"--max_prompt_length={data.max_prompt_length}: {str(prompt)[:40]!r} has {len(tokens)} tokens")
    return tokens


def answer(built: Build, params: Params, prompt: str | list[Message], number: int) -> str:
    """One completion, shown as it is sampled, with its speed on stderr; `number` names it for the random numbers."""
    stream = Stream(built)
    limit = pool_limit(built.spec, device_share_bytes(params))
    generator = make_generator(built.spec, built.settings.rollout, limit, stream)
    started = time.perf_counter()
    rollout = generator(params, [encode(built, prompt)], [number], 1, (built.settings.generate.seed, 0))
    seconds = time.perf_counter() - started
    stream.tokens = dict(enumerate(rollout.completions[0]))
    stream.show(final=True)
    sys.stdout.write("\n")
    count = int(rollout.lengths[0])
    sys.stderr.write(f"{count} tokens in {seconds:.1f} s, compiling included: {count / seconds:.0f} tokens/s\n")
    return stream.shown


def talk(built: Build, params: Params) -> None:
    """Answers line after line, the whole chat being the prompt."""
    messages: list[Message] = []
    for number, line in enumerate(sys.stdin):
        if not line.strip():
            break
        messages.append({"role": "user", "content": line.strip()})
        messages.append({"role": "assistant", "content": answer(built, params, messages, number)})


def read_prompts(path: Path, prompt_column: str) -> Iterator[str | list[Message]]:
    """Prompts of a JSONL file's prompt column, or the lines of any other file."""
    if path.suffix in (".jsonl", ".json"):
        rows = read_jsonl(path, "prompts")
        column = choose_column(rows[0], "prompt_column", prompt_column, PROMPT_COLUMNS)
        for number, row in enumerate(rows, 1):
            if not is_prompt(row.get(column)):
                raise UsageError(f"--prompts={path}: row {number} has no prompt in {column!r}")
            yield row[column]
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts={path}: cannot be read ({error})") from error
    yield from (line for line in lines if line.strip())


def answer_file(built: Build, params: Params, path: Path) -> None:
    """One JSON line per prompt: {"prompt": ..., "completions": [...]}."""
    options = built.settings.generate
    prompts = list(read_prompts(path, built.settings.data.prompt_column))
    if not prompts:
        raise UsageError(f"--prompts={path}: the file has no prompts")
    generator = make_generator(built.spec, built.settings.rollout, pool_limit(built.spec, device_share_bytes(params)))
    tokens = [encode(built, prompt) for prompt in prompts]
    started = time.perf_counter()
    rollout = generator(params, tokens, list(range(len(prompts))), options.num_generations, (options.seed, 0))
    seconds = time.perf_counter() - started
    texts = built.tokenizer.decode(rollout.completions)
    for number, prompt in enumerate(prompts):
        own = texts[number * options.num_generations : (number + 1) * options.num_generations]
        sys.stdout.write(json.dumps({"prompt": prompt, "completions": own}, ensure_ascii=False) + "\n")
    count = int(rollout.lengths.sum())
    sys.stderr.write(f"{count} tokens in {seconds:.1f} s, compiling included: {count / seconds:.0f} tokens/s\n")


def main(settings: Settings) -> int:
    options = settings.generate
    asked = [name for name in ("prompt", "prompts", "chat") if getattr(options, name)]
    if len(asked) != 1:
        raise UsageError("give one of --prompt=TEXT, --prompts=FILE and --chat (see --help)")
    unused = settings.explicit & (UNUSED if options.prompts else UNUSED | {"num_generations", "prompt_column"})
    if unused:
        raise UsageError(f"--{min(unused)}: means nothing here; leave it out")
    model = settings.model.model
    built = build(settings, options.mesh, {model: run_defaults(model)})
    params = built.load(options.seed)
    if options.prompt:
        answer(built, params, options.prompt, 0)
    elif options.prompts:
        answer_file(built, params, Path(options.prompts))
    else:
        talk(built, params)
    return 0


FOOTER = """--model may also be a run folder, one of its checkpoints or an adapter; it is asked as that run did."""

if __name__ == "__main__":
    run_command("python -m minigrpo.generate", __doc__ or "", SECTIONS, main, FOOTER)
