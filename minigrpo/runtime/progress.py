"""Progress reports: a live line in a terminal, one line a minute elsewhere, and all of it in RUN/train.log."""

import os
import re
import sys
import threading
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any, TextIO

import jax

from minigrpo.config import UsageError
from minigrpo.runtime.workers import WORKERS

TICK, MINUTE = 0.5, 60.0
"""Seconds between redrawings of the live line, and between lines where there is no terminal."""

LONG_COMPILE = 1.0
"""Seconds of compiling that are worth a line of their own."""

COMPILING = "/jax/core/compile/backend_compile_duration"
"""Event of jax's around each compilation: a scalar when it starts, a duration when it is done."""

RECENT = 20
"""Steps that the time to finish is reckoned from."""


def clock_text(seconds: float) -> str:
    """Return a duration as people read it: '4:05', '1:02:03'."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def program_name(context: dict[str, Any]) -> str:
    """Return the name of the function that is compiled: jit(gradients) is gradients."""
    return str(context.get("fun_name", "a program")).removeprefix("jit(").removesuffix(")")


REDUCE = {
    "rollout": "--slots or --pool_pages, or decode over more chips, or add --offload_optimizer=true",
    "evaluation": "--slots, or --eval_size, or add --offload_optimizer=true",
    "update": "the rows of a micro-batch by a higher --gradient_accumulation_steps, or --remat=full, or add "
    "--offload_optimizer=true or --lora_rank=16",
}
"""Phase -> what to reduce when it does not fit a device."""


def out_of_memory(phase: str, text: str) -> str:
    """Return one line for a device that ran out of memory."""
    wanted = re.search(r"(?:allocating|Used|allocate) ([\d.]+ ?[KMG]i?B?|\d+ bytes)", text)
    size = f", which wanted {wanted[1]}" if wanted else ""
    cure = REDUCE.get(phase, "--max_completion_length or the model's size")
    where = f"a device ran out of memory in the {phase or 'first'} phase{size}"
    return f"{where}; reduce {cure}; minigrpo.plan tells what fits"


class Progress:
    """Status of the process, shown on stderr. Threads may use it; it never holds up the end of the process."""

    def __init__(self, stream: Any = None):
        """Show on `stream`, sys.stderr if None; of several workers only the first shows anything."""
        self.stream = open(os.devnull, "w") if WORKERS.index else stream or sys.stderr
        self.live = self.stream.isatty()
        self.lock = threading.RLock()
        self.pid = os.getpid()
        self.log: TextIO | None = None
        self.early: list[str] = []
        """Text shown before the run folder was there."""
        self.drawn = ""
        self.name = self.detail = ""
        self.since = self.spoke = time.monotonic()
        self.total = self.finished = 0
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.compiling: dict[int, tuple[str, float]] = {}
        """Program and start of what each thread compiles."""
        self.compiled = 0.0
        """Seconds compiled since the last step."""
        self.programs: Counter[str] = Counter()
        """How often each program was compiled, or read from disk."""
        self.announced: set[tuple[str, float]] = set()
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    # Beginning and end

    def __enter__(self) -> "Progress":
        """Start the clock, listen to jax's compiler, and take over sys.stderr."""
        jax.monitoring.register_scalar_listener(self.compile_starts)
        jax.monitoring.register_event_duration_secs_listener(self.compile_ends)
        self.original, sys.stderr = sys.stderr, Tee(self)
        self.thread = threading.Thread(target=self.run, name="progress", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Stop the clock, wipe the live line and close train.log. UsageError where a device ran out of memory."""
        self.end()
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            raise UsageError(out_of_memory(self.name, str(error))) from error

    def end(self) -> None:
        """Stop the clock, wipe the live line and close train.log."""
        self.ended.set()
        sys.stderr = self.original
        jax.monitoring.unregister_scalar_listener(self.compile_starts)
        jax.monitoring.unregister_event_duration_listener(self.compile_ends)
        if self.thread:
            self.thread.join(2 * TICK)
        with self.lock:
            self.wipe()
            log, self.log = self.log, None
            if log:
                log.close()

    def open_log(self, folder: Path) -> None:
        """Copy lines to RUN/train.log from now on, beginning with the lines shown before the folder existed.

        Workers but the first have a log of their own, RUN/train.worker-1.log.
        """
        name = f"train.worker-{WORKERS.index}.log" if WORKERS.index else "train.log"
        with self.lock:
            self.log = open(folder / name, "a", encoding="utf-8", errors="backslashreplace")
            early, self.early = self.early, []
            self.record("".join(early))

    # Saying

    def say(self, text: str) -> None:
        """Show a line."""
        self.write(text + "\n")

    def write(self, text: str) -> None:
        """Show text above the live line, and log it."""
        if os.getpid() != self.pid:  # a forked child: the lock may be held for ever
            self.stream.write(text)
            return
        with self.lock:
            self.wipe()
            self.show(text)
            self.record(text)
            self.spoke = time.monotonic()

    def show(self, text: str) -> None:
        """Write to the stream. Where it is gone, as with a closed connection or pipe, train.log goes on alone."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            self.live, self.stream = False, open(os.devnull, "w")
            self.original = self.stream  # for what is written after the end

    def record(self, text: str) -> None:
        """Log text; a disk that is full loses these lines, and the metrics' own error says so."""
        if self.log is None:
            self.early.append(text)
            return
        try:
            self.log.write(text)
            self.log.flush()
        except (OSError, ValueError):
            self.log = None

    # What is going on

    def phase(self, name: str, detail: str = "") -> None:
        """Begin a phase, such as 'rollout', or go on in it with another detail; '' is none, and wipes the live line."""
        with self.lock:
            if name != self.name or not detail:
                self.since = time.monotonic()
                self.spoke = max(self.spoke, self.since)
            self.name, self.detail = name, detail
            if not name:
                self.wipe()

    def start_steps(self, total: int, finished: int) -> None:
        """Note the run's length and how many steps are behind it."""
        self.total, self.finished = total, finished

    def step(self, finished: int, seconds: float, compiled: bool = False) -> None:
        """Note a finished step; steps that compiled something do not count for the time to finish."""
        with self.lock:
            self.finished = finished
            if not compiled and self.compiled < 0.1 * seconds:
                self.recent.append(seconds)
            self.compiled = 0.0

    def seconds_left(self) -> float | None:
        """Return the time to finish, from recent steps without compiling; None before there is one."""
        return (self.total - self.finished) * sum(self.recent) / len(self.recent) if self.recent else None

    def compile_starts(self, event: str, value: float | int, **context: Any) -> None:
        """Note that a thread compiles a program."""
        if event == COMPILING:
            self.compiling[threading.get_ident()] = (program_name(context), time.monotonic())

    def compile_ends(self, event: str, duration_secs: float, **context: Any) -> None:
        """Note that a program is compiled, and say so if it took long."""
        if event != COMPILING:
            return
        self.compiling.pop(threading.get_ident(), None)
        self.compiled += duration_secs
        self.programs[program_name(context)] += 1
        if duration_secs >= LONG_COMPILE:
            self.say(f"compiled {program_name(context)} in {duration_secs:.1f} s")

    # Drawing

    def status(self, now: float) -> str:
        """Return the live line: steps, phase with seconds, what is being compiled, time to finish."""
        steps = f"step {self.finished + 1}/{self.total}" if self.total > self.finished else ""
        parts = (self.name, self.detail, f"{now - self.since:.0f} s")
        phase = ", ".join(part for part in parts if part) if self.name else ""
        slow = [(name, now - start) for name, start in list(self.compiling.values()) if now - start >= LONG_COMPILE]
        compiling = f"compiling {slow[0][0]}, {slow[0][1]:.0f} s" if slow else ""
        left = self.seconds_left()
        finish = f"{clock_text(left)} to finish" if left and steps else ""
        return " | ".join(part for part in (steps, phase, compiling, finish) if part)

    def run(self) -> None:
        """Redraw until the end, in a thread."""
        while not self.ended.wait(TICK):
            self.draw(time.monotonic())

    def draw(self, now: float) -> None:
        """Redraw the live line of a terminal; elsewhere print it when nothing was printed for a minute."""
        for started in list(self.compiling.values()):
            if now - started[1] >= LONG_COMPILE and started not in self.announced:
                self.announced.add(started)
                self.say(f"compiling {started[0]}")
        line = self.status(now)
        if not self.live:
            if line and now - self.spoke >= MINUTE:
                self.say(line)
            return
        with self.lock:
            self.wipe()
            self.drawn = line[: self.columns() - 1]
            self.show(self.drawn)

    def columns(self) -> int:
        """Return the width of the terminal, 80 where it cannot be asked any more."""
        try:
            return os.get_terminal_size(self.stream.fileno()).columns
        except (OSError, ValueError):
            return 80

    def wipe(self) -> None:
        """Take the live line off the terminal."""
        if self.drawn:
            drawn, self.drawn = self.drawn, ""
            self.show("\r" + " " * len(drawn) + "\r")


class Tee:
    """sys.stderr while a Progress is open: what any code writes there appears above the live line and in train.log."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def write(self, text: str) -> int:
        """Show and log text."""
        self.progress.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        """Return anything else a stream has from the stream itself."""
        return getattr(self.progress.stream, name)
