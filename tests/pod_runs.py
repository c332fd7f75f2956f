"""Runs of several workers on this machine, and how they are compared with a run of one process."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

from minigrpo.runtime import links
from minigrpo.runtime.run_folder import TOKEN_NUMBERS

SMALL = ("--mesh=4,1", "--max_steps=3", "--batch_size=4", "--num_generations=4", "--max_completion_length=32",
         "--save_steps=1", "--report_to=none")  # fmt: skip


def command(module, *flags):
    return [sys.executable, "-m", f"minigrpo.{module}", *flags]


def environment(folder):
    own = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(folder / "programs")}
    return os.environ | own | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}


def alone(folder, module, *flags):
    """Run a command with one process to its end -> what it printed."""
    done = subprocess.run(
        command(module, *flags), env=environment(folder), cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def launch(folder, i, count, port, arguments, cwd=None):
    """Start worker i; what it prints is in worker-I.stdout and worker-I.stderr. It knows its number as WORKER too."""
    where = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}"]
    with open(folder / f"worker-{i}.stdout", "w") as out, open(folder / f"worker-{i}.stderr", "w") as err:
        env = environment(folder) | {"WORKER": str(i)}
        return subprocess.Popen([*arguments, *where], stdout=out, stderr=err, env=env, cwd=cwd or folder)


def start(folder, count, module, *flags, own=lambda i: ()):
    """Start all workers of a command."""
    port = links.free_port()
    return [launch(folder, i, count, port, [*command(module, *flags), *own(i)]) for i in range(count)]


def codes(processes, seconds=420):
    deadline = time.monotonic() + seconds
    return [process.wait(max(1, deadline - time.monotonic())) for process in processes]


def errors(folder, i):
    lines = (folder / f"worker-{i}.stderr").read_text().splitlines()
    return [line for line in lines if "Gloo" not in line]


def rows(path):
    timings = ("time/", "step_time", "tokens_per_second", "rollout/tokens", "device/")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(timings)} for row in lines]


def same_metrics(one, two):
    for first, second in zip(rows(one / "metrics.jsonl"), rows(two / "metrics.jsonl"), strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            if name.startswith(("reward", "completions/")):
                assert second[name] == value, name
            elif not name.startswith("sampling/"):  # differences of float32 log-probs: noise over noise
                assert second[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    for first, second in zip(rows(one / "completions.jsonl"), rows(two / "completions.jsonl"), strict=True):
        for name in first.keys() & set(TOKEN_NUMBERS):  # written to four decimals, whose last may be rounded either way
            assert second.pop(name) == pytest.approx(first.pop(name), abs=1.5e-4), name
        assert first == second


def weights_of(folder):
    import ml_dtypes  # noqa: F401  NumPy's bfloat16
    from safetensors.numpy import load_file

    return {name: value.astype(np.float32) for name, value in load_file(folder / "model.safetensors").items()}


def wait_for_step(folder, step, processes):
    for _ in range(2400):
        path = folder / "newest_checkpoint.txt"
        if path.exists() and int(path.read_text()) >= step:
            return
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    raise AssertionError("no checkpoint came")


def same_weights(one, two):
    """Weights are exported in bfloat16, whose last bit a difference of 1e-6 may change."""
    first, second = weights_of(one), weights_of(two)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert np.abs(value - second[name]).max() <= 1e-6 + 2**-8 * np.abs(value).max(), name


def files_of(run):
    return {str(path.relative_to(run)) for path in run.rglob("*") if "checkpoints" not in path.parts}
