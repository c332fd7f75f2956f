"""Small runs that bench/faults.py starts, breaks, continues and compares."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import unittest.mock
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from fault_cases import REWARD

from minigrpo import sft, train
from minigrpo.command_line import parse_flags
from minigrpo.config import UsageError
from minigrpo.runtime.run_folder import TIMINGS, last_step

ROOT = pathlib.Path(__file__).resolve().parent.parent

STEPS, LONGEST = 4, 600.0
"""Steps of a run, and the seconds beyond which it hangs."""

SAMPLED = ("--batch_size=2", "--num_generations=2", "--max_completion_length=16", "--page_size=16")
SAVED = ("--save_steps=2", f"--max_steps={STEPS}", "--mesh=1,1", "--report_to=none")
LORA = ("--lora_rank=2", "--lora_dropout=0.1", "--beta=0.1", "--sync_ref_steps=1", "--zero_std_groups=resample")


UPDATES: dict[tuple[str, ...], Any] = {}
"""Specs of the updates of jobs, by their flags."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A kind of run."""

    name: str
    command: ModuleType
    flags: tuple[str, ...]


def write_data(folder: pathlib.Path) -> None:
    """Write prompts with answers and completions, prompts with scored responses, and a reward function."""
    rows = [{"prompt": f"{a} + 2?", "answer": f"{a + 2}", "completion": f"#### {a + 2}"} for a in range(12)]
    scored = [
        {"prompt": row["prompt"], "responses": ["no", row["completion"]], "scores": [0.0, 1.0], "metadata": {}}
        for row in rows
    ]
    for name, lines in (("rows", rows), ("scored", scored)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "rewards.py").write_text(REWARD.replace("BODY", "pass"))


def make_jobs(folder: pathlib.Path) -> list[Job]:
    """Return the kinds of run; supervised ones where they can be resumed."""
    rows, scored = (f"--dataset={folder}/{name}.jsonl" for name in ("rows", "scored"))
    own = (f"--reward={folder}/rewards.py:score", "--reward_timeout=3")
    evaluated = ("--eval_steps=2", f"--eval_dataset={folder}/rows.jsonl", "--eval_size=4")
    jobs = [
        Job("full", train, (rows, *own, *SAMPLED, *SAVED)),
        Job("lora", train, (rows, *SAMPLED, *LORA, *SAVED)),
        Job("offline", train, (scored, "--offline", *SAMPLED, *SAVED)),
        Job("evaluated", train, (rows, *SAMPLED, *evaluated, *SAVED)),
    ]
    if "run" in sft.SECTIONS:
        jobs.append(Job("sft", sft, (rows, "--batch_size=4", "--max_completion_length=16", *SAVED)))
    return jobs


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one try showed."""

    case: str
    lost: str = ""
    """What was lost, or said wrongly; empty if nothing."""
    text: str = ""
    """Of the processes' stderr."""
    hung: bool = False

    @property
    def traceback(self) -> bool:
        """Tell if a traceback was shown."""
        return "Traceback (most recent call last)" in self.text


# Runs


def results(run: pathlib.Path) -> dict[str, Any]:
    """Return what must be equal after any fault, and the names of all files."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {
        "metrics": [{name: row[name] for name in row if not name.startswith(TIMINGS)} for row in rows]
    }
    for path in (*run.glob("[ce]*.jsonl"), *run.glob("*/*.safetensors")):
        found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    found["files"] = {str(path.relative_to(run)) for path in run.rglob("*") if not is_passing(path.relative_to(run))}
    return found


def is_passing(path: pathlib.Path) -> bool:
    """Tell if a file is orbax's own, or of a checkpoint before the last: one made at a signal takes its place."""
    older = path.parts[0] == "checkpoints" and len(path.parts) > 1 and path.parts[1] != str(STEPS)
    return older or "default" in path.parts


def difference(wanted: dict[str, Any], run: pathlib.Path) -> str:
    """Return the first difference of a run from the one left alone, "" if there is none."""
    found = results(run)
    missing = sorted(wanted["files"] - found["files"])
    unequal = [name for name in wanted if name != "files" and wanted[name] != found.get(name)]
    return ", ".join([*(f"{name} missing" for name in missing[:3]), *(f"{name} differs" for name in unequal)])


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a run of its own."""
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | more


@contextlib.contextmanager
def once_built(job: Job) -> Iterator[None]:
    """Build a job's update once, so that its programs are traced once; leave out the report, most of a run's time."""
    name = "grpo_update_spec" if job.command is train else "make_update_spec"
    make = getattr(job.command, name)

    def remembered(*given: Any, **more: Any) -> Any:
        if job.flags not in UPDATES:
            UPDATES[job.flags] = make(*given, **more)
        return UPDATES[job.flags]

    page = "describe_run" if job.command is train else "write_report"
    patch = functools.partial(unittest.mock.patch.object, job.command)
    with patch(name, remembered), patch(page, lambda run, *rest: f"{run}/report.html"):
        yield


def run_here(job: Job, run: pathlib.Path, *more: str) -> tuple[int, str]:
    """Run a command in this process, where its programs are compiled already -> exit code and stderr."""
    flags = [*job.flags, *more, f"--output_dir={run}"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), once_built(job):
        try:
            code = job.command.main(parse_flags(flags, job.command.SECTIONS))
        except (UsageError, OSError) as error:
            code = said.write(f"error: {error}\n") and 2
        except KeyboardInterrupt:
            code = said.write("interrupted\n") and 130
        except Exception:  # what run_command would let through
            code = said.write(traceback.format_exc()) and 1
    return code, said.getvalue()


class Process:
    """A command in a process of its own, its stderr in a file."""

    def __init__(self, job: Job, run: pathlib.Path, *more: str, prepare: Callable[[], None] | None = None, **env: str):
        self.log = tempfile.TemporaryFile()
        command = [sys.executable, "-m", job.command.__name__, *job.flags, *more, f"--output_dir={run}"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(**env), stdout=subprocess.DEVNULL, stderr=self.log, preexec_fn=prepare
        )

    def end(self, seconds: float = LONGEST) -> int | None:
        """Wait for the end -> exit code, None if it hung."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None

    @property
    def text(self) -> str:
        """Return its stderr so far."""
        return os.pread(self.log.fileno(), 10**7, 0).decode(errors="replace")


@dataclasses.dataclass
class Lab:
    """Where runs are made, broken and compared."""

    folder: pathlib.Path
    random: random.Random
    alone: dict[str, tuple[pathlib.Path, float, dict[str, Any]]] = dataclasses.field(default_factory=dict)
    made: int = 0

    def __post_init__(self) -> None:
        write_data(self.folder)
        self.jobs = make_jobs(self.folder)
        self.rewards = self.folder / "rewards.py"

    def new(self, name: str) -> pathlib.Path:
        """Return the path of a new run."""
        self.made += 1
        return self.folder / f"{self.made}-{name}"

    def reference(self, job: Job) -> tuple[pathlib.Path, float, dict[str, Any]]:
        """Return the folder, seconds in a process of its own and results of the run left alone; it is made once."""
        if job.name not in self.alone:
            here, own = self.new(f"{job.name}-here"), self.new(f"{job.name}-alone")
            code, said = run_here(job, here)
            assert code == 0, said
            started = time.monotonic()
            process = Process(job, own)
            assert process.end() == 0, process.text
            seconds, wanted = time.monotonic() - started, results(here)
            assert difference(wanted, own) == "", f"{job.name} is not the same twice: {difference(wanted, own)}"
            self.alone[job.name] = own, seconds, wanted
        return self.alone[job.name]

    def wait(self, job: Job, run: pathlib.Path, process: Process) -> str:
        """Wait for a random moment of a run, by the clock or soon after a random step -> its name."""
        seconds = self.reference(job)[1]
        if self.random.random() < 0.5:
            delay = self.random.uniform(0.001, seconds)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.process.wait(delay)
            return f"{job.name} after {delay:.3f} s of {seconds:.0f}"
        step, delay = self.random.randrange(STEPS + 1), self.random.uniform(0, 0.1 * seconds)
        while process.process.poll() is None and last_step(run / "metrics.jsonl") < step:
            time.sleep(0.005)
        time.sleep(delay)
        return f"{job.name} {delay:.3f} s after step {step}"

    def resume(self, job: Job, run: pathlib.Path, case: str, text: str, wrong: str = "") -> Outcome:
        """Continue a run that was broken, compare it with the one left alone, and delete it."""
        wanted = self.reference(job)[2]
        code, said = run_here(job, run, *(["--resume"] if (run / "config.json").exists() else []))
        wrong = wrong or (f"exit code {code}: {said[-300:]}" if code else difference(wanted, run))
        if not wrong:
            shutil.rmtree(run.resolve())
        return Outcome(case, wrong, text + said)
