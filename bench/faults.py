"""Faults made on purpose: `python bench/faults.py [--rows=...] [--tries=N|short] [--seed=0]`. Last line JSON.

Each row breaks small runs of the built-in model in one way. What --resume makes of them must equal a run left alone bit
for bit: metrics but for timings, completions, evaluations, weights; and no file may be missing. `lost` counts the tries
where it does not, or where the process hid the fault or ended otherwise than documented; each is told on stderr.
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import io
import json
import operator
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

os.environ["JAX_PLATFORMS"] = "cpu"  # of the runs too

import jax
import jax.numpy as jnp
from fault_cases import DISK, FULL_PLACES, HERE, OWN_PROCESS, REWARD, STRUCTURE, refuse
from fault_runs import STEPS, Job, Lab, Outcome, Process, run_here

from minigrpo.command_line import run_command
from minigrpo.config import Options, Settings, UsageError, option
from minigrpo.runtime.checkpoint import MANIFEST, Checkpoints, read_manifest, read_marker
from minigrpo.runtime.run_folder import last_step
from minigrpo.runtime.signals import EXIT_STOPPED

HUNG = 60.0
"""Seconds to end in after a signal."""

REWARDS = {body: (wanted, body in OWN_PROCESS) for body, wanted in (OWN_PROCESS | HERE).items()}
"""Misbehaving functions: body -> (what is to come of it, whether in a process of its own)."""

CASES = {"structure": list(STRUCTURE), "disk": list(DISK), "reward": list(REWARDS)}
"""Rows of fixed cases, each of which is tried once."""

FULL = {"kill": 60, "term": 40, "int": 40, "flip": 200, **{row: len(cases) for row, cases in CASES.items()}}
SHORT = {"kill": 1, "term": 1, "int": 0, "flip": 20, "structure": 10, "disk": 1, "reward": 8}
"""Tries per row."""


@dataclasses.dataclass(frozen=True)
class FaultOptions(Options):
    """Faults"""

    rows: str = option(",".join(FULL), "rows of the table, by commas")
    tries: str = option("full", "tries of each row: full, short, or a number")
    seed: int = option(0, "of the moments and places")
    folder: str = option("", "where runs and compiled programs are kept; a temporary folder if empty")


@dataclasses.dataclass(frozen=True)
class BenchSettings(Settings):
    """This bench's settings."""

    faults: FaultOptions = FaultOptions()


# Rows


def kill(lab: Lab, number: int) -> Outcome:
    """SIGKILL at a random moment."""
    job = lab.jobs[number % len(lab.jobs)]
    run = lab.new("kill")
    lab.reference(job)
    process = Process(job, run)
    case = lab.wait(job, run, process)
    process.process.kill()
    process.end()
    return lab.resume(job, run, case, process.text)


def stop(which: signal.Signals, lab: Lab, number: int) -> Outcome:
    """SIGTERM or SIGINT at a random moment."""
    job = lab.jobs[number % len(lab.jobs)]
    run = lab.new("stop")
    lab.reference(job)
    process = Process(job, run)
    case = lab.wait(job, run, process)
    steps, running = last_step(run / "metrics.jsonl"), process.process.poll() is None
    process.process.send_signal(which)
    code = process.end(HUNG)
    if code is None:
        return Outcome(case, text=process.text, hung=True)
    if process.text.endswith("KeyboardInterrupt\n") and str(ROOT / "minigrpo") not in process.text:
        return Outcome(f"{case}, while Python itself was starting")  # its own traceback, before any code of ours
    return lab.resume(job, run, case, process.text, wrong_exit(code, which, steps, run) if running else "")


def wrong_exit(code: int, which: signal.Signals, steps: int, run: pathlib.Path) -> str:
    """Return what is wrong with the end of a run that had finished `steps` steps when it got a signal."""
    saved, finished = read_marker(run), (run / "final").exists()
    if code == EXIT_STOPPED:
        return "" if saved >= steps else f"step {saved} saved, {steps} were finished"
    if code in (128 + which, -which):
        return "" if finished or steps == 0 else f"ended without saving step {steps}"
    return "" if code == 0 and finished and steps >= STEPS - 1 else f"exit code {code}, signal after step {steps}"


def restore(run: pathlib.Path, like: dict[str, jax.Array]) -> tuple[int, str, str]:
    """Restore the newest good checkpoint of a run -> its step, a digest of its bytes, and what was said."""
    checkpoints = Checkpoints(run / "checkpoints", 9)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            step, state, _ = checkpoints.restore(like)
    finally:
        checkpoints.close()
    arrays = jax.device_get(state)
    return (
        step,
        hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest(),
        said.getvalue(),
    )


@functools.cache
def saved_states(run: pathlib.Path) -> tuple[dict[int, str], dict[str, jax.Array]]:
    """Return the digests of the last two checkpoints of a run, and arrays like theirs."""
    newest = run / "checkpoints" / str(STEPS)
    arrays = read_manifest(newest)["arrays"]
    like = {name: jnp.zeros(shape, dtype) for name, (shape, dtype, _) in arrays.items()}
    last = restore(run, like)
    newest.rename(run / "aside")
    before = restore(run, like)
    (run / "aside").rename(newest)
    return {last[0]: last[1], before[0]: before[1]}, like


def flip(lab: Lab, number: int) -> Outcome:
    """Flip one bit of the newest checkpoint: in each file in turn, and in every second try anywhere by size."""
    run = lab.reference(lab.jobs[0])[0]
    (saved, like), newest = saved_states(run), run / "checkpoints" / str(STEPS)
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    by_size = lab.random.choices(files, [path.stat().st_size for path in files])[0]
    path = by_size if number % 2 else files[number // 2 % len(files)]
    kept = path.read_bytes()
    at, bit = lab.random.randrange(len(kept)), lab.random.randrange(8)
    path.write_bytes(kept[:at] + bytes([kept[at] ^ 1 << bit]) + kept[at + 1 :])
    step, state, said = restore(run, like)
    aside = run / f"unusable-checkpoint-{STEPS}"
    told = step == STEPS or (f"{STEPS} is not usable" in said and aside.is_dir())
    if aside.is_dir():
        aside.rename(newest)
    path.write_bytes(kept)
    wrong = "" if told and state == saved[step] else f"step {step} restored in silence"
    return Outcome(f"bit {bit} of byte {at} of {path.relative_to(run)}", wrong, said)


def structure(lab: Lab, number: int) -> Outcome:
    """Leave behind what a crash, or a person, may leave in the folder of checkpoints."""
    original = lab.reference(lab.jobs[0])[0]
    (saved, like), run = saved_states(original), lab.new("structure")
    shutil.copytree(original, run)
    case = CASES["structure"][number]
    act, wanted, more = STRUCTURE[case]
    act(run / "checkpoints", run / "checkpoints" / str(STEPS) / MANIFEST)
    before = sorted(path.name for path in run.rglob("*"))
    try:
        step: Any
        step, state, said = restore(run, like | {name: jnp.zeros(3) for name in more})
        wrong = "" if step == wanted and state == saved[step] else f"step {step} restored, not {wanted}"
    except UsageError as error:
        said, moved = str(error), before != sorted(path.name for path in run.rglob("*"))
        wrong = "" if wanted == "refused" and "\n" not in said and not moved else f"refused: {said}"
    shutil.rmtree(run)
    return Outcome(case, wrong, said)


def disk(lab: Lab, number: int) -> Outcome:
    """Let the disk fill up, vanish or refuse while a run goes on."""
    case = CASES["disk"][number]
    kind, value = DISK[case]
    job = lab.jobs[3 if value == "evaluations.jsonl" else 0]
    original, run = lab.reference(job)[0], lab.new("disk")
    if kind == "no room":
        FULL_PLACES.append(value)
        ended, said = run_here(job, run)
        FULL_PLACES.clear()
        return lab.resume(job, run, case, said, wrong_error(ended, said))
    size = int(value * sum(path.stat().st_size for path in original.rglob("*"))) if kind == "full" else 0
    with limited(run.with_name(run.name + "-disk"), size) as (place, prepare, free):
        run = place / "run" if size else run
        process = broken(job, run, kind, value, prepare)
        code = process.end()
        free()
        wrong = wrong_error(code, process.text) if kind != "link" else ""
        if kind == "removed":  # by hand, with all that was in it
            shutil.rmtree(run, ignore_errors=True)
        resumed = lab.resume(job, run, case, process.text, wrong)
        return dataclasses.replace(resumed, hung=code is None)


def wrong_error(code: int | None, said: str) -> str:
    """Return what is wrong with the end of a run whose disk refused; it may be one line, or nothing that mattered."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    return "" if code == len(lines) == 0 or (code == 2 and len(lines) == 1) else f"exit code {code}, {said[-300:]}"


@contextlib.contextmanager
def limited(place: pathlib.Path, size: int) -> Any:
    """Give a folder of `size` bytes, or where mounting is not allowed a limit on every file's size; 0 is no limit."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if not size:
        yield place, drop_privileges, lambda: None
    elif subprocess.run([*mount, f"size={size}", "tmpfs", place], capture_output=True).returncode == 0:
        try:
            yield place, None, lambda: subprocess.run([*mount, "remount,size=1g", "tmpfs", place], check=True)
        finally:
            subprocess.run(["umount", "-l", place], check=True)
    else:
        limit = size // 3  # the largest file is about a third of all
        yield place, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)), lambda: None


def drop_privileges() -> None:
    """Let permissions hold for root too: PR_CAPBSET_DROP of CAP_DAC_OVERRIDE."""
    ctypes.CDLL(None).prctl(24, 1)


def broken(job: Job, run: pathlib.Path, kind: str, value: Any, prepare: Callable[[], None] | None) -> Process:
    """Start a run, and let its disk refuse from a random moment on."""
    if kind == "link":
        run.with_name(run.name + "-there").mkdir()
        run.symlink_to(run.with_name(run.name + "-there"))
    process = Process(job, run, prepare=prepare)
    if kind != "full":
        while process.process.poll() is None and last_step(run / "metrics.jsonl") < value[0]:
            time.sleep(0.005)
        if kind == "removed":
            value[1](run)
        elif kind == "link":
            process.process.kill()
        else:
            modes(run, 0o555)
            process.end()
            modes(run, 0o755)
    return process


def modes(folder: pathlib.Path, mode: int) -> None:
    """Set the permissions of a folder and of all folders in it."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(mode)


def reward(lab: Lab, number: int) -> Outcome:
    """Train with a reward function that misbehaves in the third step, then with the same one mended."""
    case, job, path = CASES["reward"][number], lab.jobs[0], lab.rewards
    wanted, alone = REWARDS[case]
    lab.reference(job)
    run = lab.new("reward")
    path.write_text(REWARD.replace("BODY", case))
    if alone:
        process = Process(job, run)
        code, said = process.end(), process.text
    else:
        code, said = run_here(job, run)
    path.write_text(REWARD.replace("BODY", "pass"))
    lines = [line for line in said.splitlines() if line.startswith(("error: reward score: ", "interrupted"))]
    as_told = {
        "refused": code in (2, 130, -signal.SIGKILL) and len(lines) == 1,
        "killed": code is not None and code < 0,
        "fine": code == 0,
    }[wanted]
    resumed = lab.resume(job, run, case, said, "" if as_told else f"exit code {code}: {said[-300:]}")
    return dataclasses.replace(resumed, hung=code is None)


COLUMNS = ("tried", "lost", "tracebacks", "hung", "seconds")
WRONG = [operator.attrgetter(name) for name in ("lost", "traceback", "hung")]

ROWS: dict[str, Callable[[Lab, int], Outcome]] = {
    "kill": kill,
    "term": functools.partial(stop, signal.SIGTERM),
    "int": functools.partial(stop, signal.SIGINT),
    "flip": flip,
    "structure": structure,
    "disk": disk,
    "reward": reward,
}


# The table


def tries_of(row: str, asked: str) -> list[int]:
    """Return the numbers of a row's tries, spread over its cases; UsageError for an unknown number."""
    if asked not in ("full", "short") and not asked.isdecimal():
        raise UsageError(f"--tries={asked}: must be full, short or a whole number")
    count = FULL[row] if asked == "full" else SHORT[row] if asked == "short" else int(asked)
    if row not in CASES:
        return list(range(count))
    cases = len(CASES[row])
    return [(number + 1) * cases // count - 1 for number in range(count)] if count < cases else list(range(cases))


def run_row(row: str, lab: Lab, asked: str) -> dict[str, Any]:
    """Run a row's tries, tell each that failed, and print its line -> the line's numbers."""
    started, outcomes = time.monotonic(), []
    for number in tries_of(row, asked):
        outcomes.append(ROWS[row](lab, number))
        last = outcomes[-1]
        bad = any(what(last) for what in WRONG)
        told = f"{last.lost}{' hung' * last.hung}\n{last.text[-2000:]}" if bad else "nothing lost"
        sys.stderr.write(f"{row} {number}, {time.monotonic() - started:.0f} s: {last.case}: {told}\n")
    sums = [sum(bool(what(outcome)) for outcome in outcomes) for what in WRONG]
    counts = dict(zip(COLUMNS, [len(outcomes), *sums, round(time.monotonic() - started)], strict=True))
    sys.stdout.write(f"{row:10}" + "".join(f"{value:>12}" for value in counts.values()) + "\n")
    sys.stdout.flush()
    return counts


def main(settings: BenchSettings) -> int:
    """Run the table -> 0 if nothing was lost and nothing hung, without a traceback."""
    options, rows = settings.faults, settings.faults.rows.split(",")
    if unknown := [row for row in rows if row not in ROWS]:
        raise UsageError(f"--rows={unknown[0]}: must be of {', '.join(ROWS)}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would runs
    with tempfile.TemporaryDirectory(prefix="minigrpo-faults-") as temporary:
        folder = pathlib.Path(options.folder or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        sys.addaudithook(refuse)
        lab = Lab(pathlib.Path(tempfile.mkdtemp(dir=folder)), random.Random(options.seed))
        sys.stdout.write(" " * 10 + "".join(f"{name:>12}" for name in COLUMNS) + "\n")
        table = {row: run_row(row, lab, options.tries) for row in rows}
    sys.stdout.write(json.dumps({"bench": "faults", "seed": options.seed, "rows": table}) + "\n")
    return int(any(row["lost"] or row["tracebacks"] or row["hung"] for row in table.values()))


if __name__ == "__main__":
    run_command("python bench/faults.py", __doc__ or "", ("faults",), main, kind=BenchSettings)
