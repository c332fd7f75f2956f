"""Faults made on purpose: the table of bench/faults.py in short, and functions that nothing inside can interrupt."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

from minigrpo.config import UsageError
from minigrpo.data.calls import Reward, call_reward
from minigrpo.model.weights import write_tensors
from minigrpo.runtime.run_folder import check_empty


def python(*command, timeout=300):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.slow
def test_a_short_table_of_faults_loses_nothing(tmp_path):
    """A kill, a SIGTERM, flips, structure, disks and reward functions; the last line of the bench is JSON."""
    result = python("bench/faults.py", "--tries=short", "--seed=1", f"--folder={tmp_path}", timeout=1200)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert {"kill", "term", "flip", "structure", "disk", "reward"} <= rows.keys()
    assert all(row["tried"] > 0 for name, row in rows.items() if name != "int")
    assert all(row[what] == 0 for row in rows.values() for what in ("lost", "tracebacks", "hung"))


def test_the_table_counts_what_is_lost(tmp_path, monkeypatch):
    """The bench can fail: a run whose weights differ, or that lacks a file, is told."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    from fault_runs import difference, results

    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "step_time": 1.0}\n')
    (run / "final" / "model.safetensors").write_bytes(b"weights")
    wanted = results(run)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "step_time": 2.0}\n')
    assert difference(wanted, run) == ""
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.25, "step_time": 1.0}\n')
    assert difference(wanted, run) == "metrics differs"
    (run / "final" / "model.safetensors").unlink()
    assert difference(wanted, run).startswith("final/model.safetensors missing, metrics differs")


@pytest.mark.parametrize(("rows", "tries"), [("kill,nonsense", "1"), ("kill", "many")])
def test_flags_of_the_table_are_checked(rows, tries):
    result = python("bench/faults.py", f"--rows={rows}", f"--tries={tries}")
    assert result.returncode == 2 and "Traceback" not in result.stderr


STUCK = """
import collections, hashlib, itertools, os, signal, sys
from minigrpo.data import calls

calls.PATIENCE = 0.5
bodies = {
    "holds": lambda completions: collections.deque(itertools.repeat(0), maxlen=0),
    "hashes": lambda completions: hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1),
    "stopped": lambda completions: [os.kill(os.getpid(), signal.SIGSTOP) or 1.0],
}
print(calls.call_reward(calls.Reward("own", bodies[sys.argv[1]]), 0.5, {"completions": ["a"]}))
"""


@pytest.mark.parametrize("body", ["holds", "hashes"])
def test_a_function_that_nothing_can_interrupt_ends_the_process_in_one_line(body):
    result = python("-c", STUCK, body, timeout=60)
    assert result.returncode == -9
    assert result.stderr == (
        "error: reward own: no result after 0.5 s, in code that cannot be interrupted; the run was killed. Mend it, "
        "continue with --resume\n"
    )


def test_a_process_that_is_stopped_for_long_is_not_killed():
    command = [sys.executable, "-c", STUCK, "stopped"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None and stat(process.pid) != "T":
            time.sleep(0.05)
        time.sleep(2.5)
        process.send_signal(18)
        assert process.communicate(timeout=60)[0] == "[1.]\n" and process.returncode == 0


def stat(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("status", [0, 3])
def test_leaving_by_the_back_door_is_an_error(status):
    leave = os._exit
    with pytest.raises(UsageError, match=rf"reward own: raised SystemExit\('os._exit\({status}\)'\) at .*faults.py"):
        call_reward(Reward("own", lambda completions: os._exit(status)), 5.0, {"completions": ["a"]})
    assert os._exit is leave


def swallows(completions):
    for _ in range(3):
        with contextlib.suppress(BaseException):
            time.sleep(5)
    return [1.0]


def test_scores_that_come_too_late_are_an_error_also_when_every_interruption_was_swallowed():
    with pytest.raises(UsageError, match=r"reward own: no result after 0.1 s"):
        call_reward(Reward("own", swallows), 0.1, {"completions": ["a"]})


FORKS = """
import os
from minigrpo.data.calls import Reward, call_reward
from minigrpo.model.weights import write_tensors
from minigrpo.runtime.run_folder import check_empty

def own(completions):
    child = os.fork()
    if not child:
        os._exit(7)
    return [float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))]

print(call_reward(Reward("own", own), 5.0, {"completions": ["a"]}))
"""


def test_a_forked_child_leaves_as_it_likes():
    assert python("-c", FORKS).stdout == "[7.]\n"


LEFT = """
import sys, threading, time
from minigrpo import command_line

def main(settings):
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return int(sys.stdin.read())

command_line.LEFT_BEHIND = 0.2
command_line.run_command("x", "", ("run",), main)
"""


@pytest.mark.parametrize("code", [0, 75])
def test_threads_left_behind_do_not_hold_up_the_end(code):
    command = [sys.executable, "-c", LEFT]
    result = subprocess.run(command, cwd=ROOT, input=str(code), capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (code, "note: threads that other code left behind were cut off\n")


def test_a_run_killed_before_it_had_settings_is_begun_again(tmp_path):
    for name in ("train.log", "config.json.partial"):
        (tmp_path / name).write_text("")
        check_empty(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="is not empty"):
        check_empty(tmp_path)


def test_a_disk_that_fills_in_the_export_is_one_line(tmp_path):
    """The error comes from the library of safetensors, which does not raise the system's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UsageError, match="x.safetensors: cannot be written .* about 391 KiB needed.; .*--resume"):
            write_tensors(tmp_path / "x.safetensors", {"a": np.ones(100_000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.raises(UsageError, match="No such file or directory, .*put the folder back"):
        write_tensors(tmp_path / "gone" / "x.safetensors", {"a": np.ones(1, np.float32)})
