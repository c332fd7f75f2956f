"""`python -m minigrpo.generate`: answers to a prompt, to a file of prompts, or in a chat in the terminal."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minigrpo.build import Build, build, make_generator
from minigrpo.command_line import run_named
from minigrpo.commands import COMMANDS
from minigrpo.config import Settings, UsageError
from minigrpo.data.columns import chat
from minigrpo.data.datasets import read_prompts
from minigrpo.data.template import Message
from minigrpo.door import make_callable
from minigrpo.model.hub import run_defaults
from minigrpo.model.params import Params
from minigrpo.planning.memory import device_share_bytes, pool_limit
from minigrpo.rollout.generator import Generator
from minigrpo.rollout.stop import end_at_stops, find_stops
from minigrpo.runtime.progress import Progress
from minigrpo.runtime.workers import WORKERS, joined

SECTIONS = COMMANDS["generate"].sections


UNUSED = frozenset({"dataset", "offline", "answer_column"})
"""Flags of data that no prompt of this command is taken from."""


class Stream:
    """The text of one completion, written to stdout while its tokens come in."""

    def __init__(self, built: Build):
        self.built = built
        self.stops = built.settings.rollout.stop_texts
        self.reset()

    def reset(self) -> None:
        """Begin another completion."""
        self.tokens: dict[int, int] = {}
        self.shown = ""
        self.first: float | None = None
        """When the first token came."""

    def __call__(self, completion: Any, position: Any, token: Any) -> None:
        """Show one more token of the answer; called by the rollout for every token it samples."""
        completion, position, token = (np.asarray(x) for x in (completion, position, token))
        if completion[0] > 0:  # no completion: the slot's tokens are being filled in
            return
        self.first = self.first or time.perf_counter()
        self.tokens[int(position[0])] = int(token[0])
        self.show(final=False)

    def show(self, final: bool) -> None:
        """Add text that has become certain; a character may take several tokens, which may come out of order."""
        known = [self.tokens[i] for i in range(len(self.tokens)) if i in self.tokens]
        decode = self.built.tokenizer.decode
        text = decode([known])[0]
        if any(stop in text for stop in self.stops):
            text = decode([known[: find_stops([known], self.stops, decode)[1][0]]])[0]
        if len(known) < len(self.tokens) or not text.startswith(self.shown) or (text.endswith("\ufffd") and not final):
            return
        sys.stdout.write(text[len(self.shown) :])
        sys.stdout.flush()
        self.shown = text


def encode(built: Build, prompt: str | list[Message]) -> list[int]:
    """Tokenize a prompt in the chat template; UsageError when it has too many tokens."""
    data = built.settings.data
    system = "" if data.system_prompt == "auto" else data.system_prompt
    tokens = built.tokenizer.encode_prompts([built.tokenizer.render(chat(prompt, system))])[0]
    if not tokens:
        raise UsageError(f"--chat_template={data.chat_template}: makes no text of {str(prompt)[:40]!r}; choose another")
    if len(tokens) > data.max_prompt_length:
        raise UsageError(f"--max_prompt_length={data.max_prompt_length}: {str(prompt)[:40]!r} has {len(tokens)} tokens")
    return tokens


def stream_generator(built: Build, params: Params, progress: Progress) -> tuple[Generator, Stream]:
    """Return a generator that shows what it samples, its program ready for prompts of any length.

    Afterwards nothing is drawn into the line that an answer is streamed to.
    """
    stream = Stream(built)
    limit = pool_limit(built.spec, device_share_bytes(params))
    generator = make_generator(built.spec, built.settings.rollout, limit, stream)
    compile_program(generator, params, 1, 1, progress)
    progress.phase("")
    return generator, stream


def compile_program(generator: Generator, params: Params, prompts: int, group: int, progress: Progress) -> None:
    """Compile the program for so many prompts by a run on empty ones, which sample nothing."""
    progress.phase("rollout", "getting ready")
    generator(params, [[]] * prompts, list(range(prompts)), group, (0, 0))


def answer(
    built: Build, params: Params, prompt: str | list[Message], number: int, generator: Generator, stream: Stream
) -> str:
    """Show one completion as it is sampled, with its speed on stderr; `number` names it for the random numbers."""
    stream.reset()
    started = time.perf_counter()
    rollout = generator(params, [encode(built, prompt)], [number], 1, (built.settings.generate.seed, 0))
    rollout = end_at_stops(rollout, stream.stops, built.tokenizer.decode)
    seconds = time.perf_counter() - (stream.first or started)
    stream.tokens = dict(enumerate(rollout.completions[0]))
    stream.show(final=True)
    sys.stdout.write("\n")
    count = int(rollout.lengths[0])
    speed = f", {(count - 1) / seconds:.0f} tokens/s" if count > 1 else ""
    sys.stderr.write(f"{count} token{'s' * (count != 1)} in {time.perf_counter() - started:.1f} s{speed} once begun\n")
    return stream.shown


def lines_of_chat() -> Iterator[str]:
    """Yield a person's lines until an empty one; a terminal shows when one is awaited."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.strip()


def talk(built: Build, params: Params, progress: Progress) -> None:
    """Answer line after line, the whole chat being the prompt."""
    messages: list[Message] = []
    generator, stream = stream_generator(built, params, progress)
    for number, line in enumerate(lines_of_chat()):
        messages.append({"role": "user", "content": line})
        text = answer(built, params, messages, number, generator, stream)
        messages.append({"role": "assistant", "content": text})


def answer_file(built: Build, params: Params, path: Path, progress: Progress) -> None:
    """Write one JSON line per prompt: {"prompt": ..., "completions": [...]}."""
    options = built.settings.generate
    prompts = read_prompts(path, built.settings.data)
    generator = make_generator(built.spec, built.settings.rollout, pool_limit(built.spec, device_share_bytes(params)))
    tokens = [encode(built, prompt) for prompt in prompts]
    compile_program(generator, params, len(prompts), options.num_generations, progress)
    progress.phase("rollout", f"{len(prompts) * options.num_generations} answers")
    started = time.perf_counter()
    rollout = generator(params, tokens, list(range(len(prompts))), options.num_generations, (options.seed, 0))
    rollout = end_at_stops(rollout, built.settings.rollout.stop_texts, built.tokenizer.decode)
    seconds = time.perf_counter() - started
    texts = built.tokenizer.decode(rollout.completions)
    progress.phase("")
    for number, prompt in enumerate(prompts):
        own = texts[number * options.num_generations : (number + 1) * options.num_generations]
        sys.stdout.write(json.dumps({"prompt": prompt, "completions": own}, ensure_ascii=False) + "\n")
    count = int(rollout.lengths.sum())
    sys.stderr.write(f"{count} tokens in {seconds:.1f} s: {count / seconds:.0f} tokens/s\n")


def main(settings: Settings) -> int:
    """Answer as the settings say."""
    options = settings.generate
    if [bool(options.prompt), bool(options.prompts), options.chat].count(True) != 1:
        raise UsageError("give one of --prompt=TEXT, --prompts=FILE and --chat (see --help)")
    unused = settings.explicit & (UNUSED if options.prompts else UNUSED | {"num_generations", "prompt_column"})
    if unused - settings.from_file:
        raise UsageError(f"--{min(unused - settings.from_file)}: means nothing here; leave it out")
    if unused:
        sys.stderr.write(f"note: of the config file, ignored: {', '.join(sorted(unused))}\n")
    with joined(settings), Progress() as progress:
        if WORKERS.count > 1 and not options.prompts:
            raise UsageError("several workers answer --prompts=FILE only; --prompt and --chat need one process")
        respond(settings, progress)
    return 0


def respond(settings: Settings, progress: Progress) -> None:
    """Load the model, and answer the prompt, the file or the chat."""
    progress.phase("loading")
    options, model = settings.generate, settings.model.model
    built = build(settings, options.mesh, {model: run_defaults(model)})
    params = built.load(options.seed)
    if options.prompt:
        answer(built, params, options.prompt, 0, *stream_generator(built, params, progress))
    elif options.prompts:
        answer_file(built, params, Path(options.prompts), progress)
    else:
        talk(built, params, progress)


make_callable(__name__)

if __name__ == "__main__":
    run_named("generate", main)
