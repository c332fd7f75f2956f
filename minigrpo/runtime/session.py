"""A run in a folder that can be stopped and resumed: what training commands have around their loops."""

import contextlib
import dataclasses
import functools
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minigrpo.config import RunOptions, Settings, UsageError
from minigrpo.remote import local_copy
from minigrpo.runtime.bucket import BucketHome, RunHome, open_home
from minigrpo.runtime.checkpoint import Checkpoints, check_same_run, read_run_settings
from minigrpo.runtime.files import write_whole
from minigrpo.runtime.progress import Progress
from minigrpo.runtime.run_folder import (
    RunFolder,
    check_empty,
    check_writable,
    evaluated,
    make_folder,
    read_steps,
    save_settings,
)
from minigrpo.runtime.signals import EXIT_STOPPED, STOP
from minigrpo.runtime.sinks import Opener, Terminal, find_sinks, open_sinks
from minigrpo.runtime.workers import WORKERS

SHARED_TRIES = 50
"""Looks at a shared disk, five a second, until a file of another worker's must be there."""


@dataclasses.dataclass(frozen=True)
class Position:
    """Progress of a run, saved with every checkpoint."""

    step: int = 0
    """Finished steps."""
    skipped_in_a_row: int = 0

    def after(self, skipped: bool) -> "Position":
        """Return the position after one more step."""
        return Position(self.step + 1, self.skipped_in_a_row + 1 if skipped else 0)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Results on held-out rows."""

    values: dict[str, float]
    """Such as accuracy, pass@2, reward, rewards/NAME, problems."""
    answers: list[dict[str, Any]]
    """A row for every answer, or for every prompt with responses on file."""


Measurement = Callable[[Any, int], Measured]
"""(state, finished steps) -> what --eval_steps measures."""


def read_evaluation(folder: Path, step: int) -> dict[str, float] | None:
    """Return what was measured after `step` steps, as --keep_best knows it; None where nothing was."""
    rows = [row for row in read_steps(folder / "evaluations.jsonl") if row["step"] == step]
    return evaluated({name: value for name, value in rows[-1].items() if name != "step"}) if rows else None


class Stopped(Exception):
    """The end of the loop on request, after a step whose checkpoint is under way."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


# The folder


def choose_home(options: RunOptions) -> contextlib.AbstractContextManager[RunHome]:
    """Return the home of the run, new or to be resumed, in a folder or a bucket, as worker 0 names it."""
    new = options.output_dir == "auto" and not options.resume
    named = WORKERS.first(lambda: time.strftime("runs/%Y%m%d-%H%M%S") if new else options.output_dir)
    return open_home(named, options.resume)


def with_run_settings(settings: Settings, home: RunHome | None = None) -> Settings:
    """Return settings with a resumed run's own values for every flag that was not given."""
    if not settings.run.resume:
        return settings
    if settings.run.output_dir == "auto":
        raise UsageError("--resume: name the run to continue with --output_dir")
    saved = read_run_settings(home.folder if home else local_copy("output_dir", settings.run.output_dir))
    check_same_command(settings, saved)
    saved = {name: value for name, value in saved.items() if name not in ("resume", "output_dir")}
    try:
        continued = settings.with_defaults(saved)
    except UsageError as error:
        raise UsageError(f"{settings.run.output_dir}/config.json: {error}; mend the file") from error
    return dataclasses.replace(continued, explicit=settings.explicit | frozenset(saved))


def check_same_command(settings: Settings, saved: dict[str, Any]) -> None:
    """Raise UsageError for settings of a run that has other flags than this command."""
    own = settings.as_dict()
    foreign, missing = saved.keys() - own.keys(), own.keys() - saved.keys()
    if foreign and missing:
        raise UsageError(
            f"--resume: {settings.run.output_dir} was begun by another command, or version of minigrpo, with "
            f"--{min(foreign)} and without --{min(missing)}; continue it with that one"
        )


def check_home(settings: Settings, home: RunHome) -> None:
    """Raise UsageError rather than mix two runs, or begin one that could not be written. Creates nothing."""
    WORKERS.first(lambda: check_own(settings, home))


def check_own(settings: Settings, home: RunHome) -> None:
    """Check the run folder as this worker sees it."""
    if settings.run.resume:
        for note in check_same_run(home.folder, settings.as_dict()):
            sys.stderr.write(f"{note}\n")
    else:
        check_empty(home.folder)
    check_writable(home.folder)


def check_shared(folder: Path) -> None:
    """Raise UsageError, on every worker, when a worker does not see the run folder that worker 0 made."""
    if WORKERS.count == 1:
        return
    path = folder / ".shared"
    token = WORKERS.first(lambda: write_token(path))
    seen = WORKERS.gather(sees(path, token))
    if WORKERS.writes:
        path.unlink(missing_ok=True)
    if not all(seen):
        raise UsageError(
            f"--output_dir={folder}: worker {seen.index(False)} does not see what worker 0 wrote there; name a folder "
            "on a disk that all workers share, or a bucket such as gs://BUCKET/run"
        )


def write_token(path: Path) -> str:
    """Write a word that nobody else has into a file -> the word."""
    token = secrets.token_hex(16)
    write_whole(path, token)
    return token


def sees(path: Path, token: str) -> bool:
    """Return whether a file holds the word, which network disks may show some seconds late."""
    for _ in range(SHARED_TRIES):
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # makes NFS look again
            if path.read_text(encoding="utf-8") == token:
                return True
        time.sleep(0.2)
    return False


def resume_command(home: RunHome) -> str:
    """Return the flags that continue a run."""
    return f"--resume --output_dir={home.name}"


# The run


@dataclasses.dataclass(frozen=True)
class Session:
    """A run under way: its logs, its checkpoints, and the position that it starts from. States are any pytree."""

    log: RunFolder
    checkpoints: Checkpoints
    first: Position
    options: RunOptions
    home: RunHome

    @property
    def progress(self) -> Progress:
        """Return the status line."""
        return self.log.progress

    def saving(self, at: Position, state: Any) -> contextlib.AbstractContextManager[None]:
        """Make a stop signal save `state` at once inside this block, which does not change it.

        What the devices must compute for that is begun here: a rollout keeps them busy until its end.
        """
        self.checkpoints.begin_digests(at.step, state)
        return STOP.saving(at.step, functools.partial(self.save_now, at, state))

    def save_now(self, at: Position, state: Any) -> None:
        """Save the state at once and wait until it is on disk."""
        self.checkpoints.save(at.step, state, dataclasses.asdict(at))
        self.checkpoints.wait()

    def evaluate(self, at: Position, state: Any, measure: Measurement | None) -> bool:
        """Measure the state where --eval_steps asks, and log it -> True if it is the best so far by --keep_best."""
        every = self.options.eval_steps
        if measure is None or (at.step % every and at.step != self.log.total_steps):
            return False
        self.progress.phase("evaluation")
        with self.saving(at, state):
            measured = measure(state, at.step)
        if measured.answers:
            self.log.append("answers.jsonl", [{"step": at.step} | row for row in measured.answers])
        self.log.log_evaluation(at.step, measured.values)
        return self.checkpoints.rate(at.step, evaluated(measured.values))

    def evaluate_first(self, state: Any, measure: Measurement | None) -> None:
        """Measure the state that the run starts from, if no earlier process has: a stop may have cut it off."""
        known = WORKERS.first(lambda: read_evaluation(self.log.folder, self.first.step))
        if known is None:
            self.evaluate(self.first, state, measure)
        elif self.checkpoints.metric in known:  # --keep_best may be new, and name what was not measured then
            self.checkpoints.rate(self.first.step, known)

    def check_skipped(self, at: Position, batch: Any) -> None:
        """Raise UsageError after --max_skipped_steps steps in a row without a finite loss and gradient.

        The last step's `batch`, a dataclass of arrays on the host, is saved first.
        """
        count = at.skipped_in_a_row
        if count != self.options.max_skipped_steps:
            return
        path = self.log.folder / f"not-finite-step-{at.step}.npz"
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        if self.log.writes:
            np.savez(path, **{name: value for name, value in fields.items() if value is not None})
        raise UsageError(
            f"--max_skipped_steps={count}: the loss or gradient of {count} steps in a row was not finite, so nothing "
            f"was learned from them; the last one's batch is {path}. Start again with a lower --learning_rate"
        )

    def end_step(self, at: Position, state: Any, best: bool) -> None:
        """Save the state where a checkpoint is due, or `best` by --keep_best; raise Stopped where a signal asked."""
        due, stopping = best or self.checkpoints.due(at.step), STOP.requested
        answers = WORKERS.gather([due, stopping])
        stopping = any(asked for _, asked in answers)
        if answers[0][0] or stopping:
            self.checkpoints.save(at.step, state, dataclasses.asdict(at))
        if stopping:
            raise Stopped(at.step)

    def complete(
        self, loop: Callable[[], tuple[Position, Any]], export: Callable[[Any], Path], programs: dict[str, int]
    ) -> int:
        """Run the loop to its end, or until a signal asks to stop -> the exit code.

        `export` writes the last state's model and the report, and returns the report's path. `programs` are the names
        of the run's device programs, and how often each may be compiled.
        """
        home, closers = self.home, (self.log.close, self.home.flush)
        with STOP.graceful(self.options.grace_seconds, f"continue with {resume_command(home)}", closers):
            try:
                at, state = loop()
            except Stopped as stopped:
                return self.stop(stopped)
            page = f"{home.name}/{self.finish(at, state, export).name}"
            best = f"; the best by --keep_best is step {self.checkpoints.best.step}" if self.checkpoints.best else ""
            self.log.say(compiled(self.progress.programs, programs))
            self.log.say(f"done: {at.step} steps; model in {home.name}/final, report in {page}{best}")
        return 0

    def finish(self, at: Position, state: Any, export: Callable[[Any], Path]) -> Path:
        """Write the last checkpoint, the model and the report; the model also where a checkpoint could not be."""
        try:
            self.checkpoints.save(at.step, state, dataclasses.asdict(at))
            self.checkpoints.close()
        finally:
            self.log.close()
            self.progress.phase("export")
            page = export(state)
            self.home.flush()
        return page

    def stop(self, stopped: Stopped) -> int:
        """End a run that was asked to stop, its checkpoint on disk -> the exit code."""
        STOP.finishing()
        self.checkpoints.wait()
        self.log.close()
        self.log.say(f"stopped after step {stopped.step}; continue with {resume_command(self.home)}")
        return EXIT_STOPPED


def compiled(counts: dict[str, int], programs: dict[str, int]) -> str:
    """Return the line on how often the run's programs were compiled, and which of them too often."""
    own = {name: count for name, count in counts.items() if name in programs}
    often = [name for name, count in own.items() if count > programs[name]]
    more = (
        f"\nnote: {', '.join(often)} compiled again for other shapes, which costs time: please report it"
        if often
        else ""
    )
    return f"compiled: {', '.join(f'{name} {count}' for name, count in own.items()) or 'nothing'}{more}"


def open_checkpoints(home: RunHome, options: RunOptions) -> Checkpoints:
    """Open the checkpoints of a run folder as the flags say."""
    return Checkpoints(
        home,
        options.save_total_limit,
        save_steps=options.save_steps,
        save_minutes=options.save_minutes,
        keep_best=options.keep_best,
    )


def restore(checkpoints: Checkpoints, state: Any) -> tuple[Position, Any]:
    """Return the newest checkpoint's position and state."""
    step, state, host = checkpoints.restore(state)
    return Position(step, int(host.get("skipped_in_a_row", 0))), state


def open_session(
    home: RunHome,
    settings: Settings,
    total_steps: int,
    state: Any,
    progress: Progress,
    openers: dict[str, Opener] | None = None,
) -> tuple[Session, Any]:
    """Make or reopen the run folder -> the session, and `state` or, with --resume, the newest checkpoint's.

    `openers` are the sinks that --report_to names, where `find_sinks` has found them before.
    """
    options, folder = settings.run, home.folder
    WORKERS.first(lambda: make_folder(folder))
    if not isinstance(home, BucketHome):
        check_shared(folder)
    progress.open_log(folder)
    if WORKERS.writes:
        save_settings(folder, settings)
    home.flush()
    checkpoints = open_checkpoints(home, options)
    progress.say(checkpoints.space(state))
    first, state = restore(checkpoints, state) if options.resume else (Position(), state)
    openers = find_sinks(options) if openers is None else openers
    sinks = open_sinks(openers, folder, settings.as_dict(), first.step) if WORKERS.writes else []
    sinks += [Terminal(progress.say, options.print_completions)] if options.print_completions else []
    log = RunFolder(folder, total_steps, sinks, WORKERS.writes, first.step, progress, options.logging_steps)
    if options.resume:
        log.say(f"resumed after step {first.step}")
    return Session(log, checkpoints, first, options, home), state
