"""Several processes: joining, agreeing on host values, ending together; runs of two workers equal runs of one."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time

import pytest
from conftest import ROOT
from pod_runs import (
    SMALL,
    alone,
    codes,
    command,
    errors,
    files_of,
    launch,
    rows,
    same_metrics,
    same_weights,
    start,
    wait_for_step,
)

from minigrpo.config import ClusterOptions, Settings, UsageError
from minigrpo.runtime import links, workers
from minigrpo.runtime.links import split_address
from minigrpo.runtime.signals import StopRequest
from minigrpo.runtime.workers import Place, Workers, find_place, first_difference

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[001-002]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}  # fmt: skip


# Finding one's place


def options(**given):
    return ClusterOptions(**given)


def test_a_process_on_its_own_has_no_place():
    assert find_place(options(), {}) is None
    assert find_place(options(coordinator_address="a:1", num_processes=1, process_id=0), {}) is None


def test_flags_and_variables_of_jax_give_the_place():
    assert find_place(options(coordinator_address="a:1", num_processes=4, process_id=0), {}) == Place("a:1", 4, 0)
    environ = {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
    assert find_place(options(), environ) == Place("b:2", 3, 2)
    assert find_place(options(process_id=1), environ) == Place("b:2", 3, 1)


def test_slurm_gives_the_place(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    place = find_place(options(), {})
    assert (place.count, place.index) == (2, 1) and place.address.startswith("node001:")


@pytest.mark.parametrize(
    ("given", "environ", "said"),
    [
        ({"coordinator_address": "a:1"}, {}, "--num_processes"),
        ({"num_processes": 2}, {}, "--coordinator_address"),
        ({"num_processes": 2, "process_id": 0}, {}, "--coordinator_address"),
        ({"coordinator_address": "a:1", "num_processes": 2}, {}, "--process_id"),
        ({"coordinator_address": "a:1", "num_processes": 2, "process_id": 2}, {}, "--process_id=2"),
        ({}, {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two"),
        ({}, {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1"),
    ],
)
def test_half_a_place_is_refused(given, environ, said):
    with pytest.raises(UsageError, match=said):
        find_place(options(**given), environ)


@pytest.mark.parametrize("address", ["", "host", "host:", ":80", "host:0", "host:70000", "host:http"])
def test_an_address_is_host_and_port(address):
    with pytest.raises(UsageError, match="HOST:PORT"):
        split_address(address)


def test_the_first_difference_names_worker_and_value():
    assert first_difference([{"jax": "1"}, {"jax": "1"}]) == ""
    assert "worker 1 has jax 2 and worker 0 1" in first_difference([{"jax": "1"}, {"jax": "2"}])
    assert "worker 2 has --max_steps 5" in first_difference([{"--max_steps": 4}] * 2 + [{"--max_steps": 5}])


# Meeting, without jax


@pytest.fixture
def port():
    return links.free_port()


class Gang:
    """Workers in threads of this process, each with its own links; nothing of jax is started."""

    def __init__(self, port, facts, timeout=20.0, absent=(), numbers=None, counts=None):
        self.ended, self.errors, self.started = {}, {}, time.monotonic()
        self.all = [Workers() for _ in facts]
        for worker in self.all:
            worker.serve = lambda: 1
            worker.exit = lambda code, worker=worker: self.stop(worker, code)
            worker.stop = StopRequest()
            worker.stop.partners, worker.stop.exit = worker, worker.exit
        given = port, facts, timeout, numbers or [0, 1, 2], counts
        self.threads = [
            threading.Thread(target=self.join, args=(i, *given), daemon=True)
            for i in range(len(facts)) if i not in absent
        ]  # fmt: skip
        for thread in self.threads:
            thread.start()
        for thread in self.threads:
            thread.join(timeout + 10)

    def join(self, i, port, facts, timeout, numbers, counts):
        worker = self.all[i]
        worker.index, worker.count = numbers[i], counts[i] if counts else len(facts)
        deadline = time.monotonic() + timeout
        try:
            (worker.meet if worker.index else worker.welcome)("127.0.0.1", port, facts[i], deadline, timeout)
        except UsageError as error:
            self.errors[i] = str(error)
        else:
            threading.Thread(target=worker.read, daemon=True).start()

    def stop(self, worker, code):
        self.ended[self.all.index(worker)] = code
        for link in worker.links.values():
            link.close()
        threading.Event().wait()

    def each(self, call):
        results = {}
        threads = [
            threading.Thread(target=lambda i=i, w=w: results.update({i: call(i, w)}), daemon=True)
            for i, w in enumerate(self.all)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        return results

    def wait_for_end(self, count):
        for _ in range(100):
            if len(self.ended) == count:
                break
            time.sleep(0.1)
        return self.ended


def hang_up(link):
    """End a connection as the end of its process would; a thread may be waiting on it."""
    with socket.socket(fileno=os.dup(link.fileno())) as own:
        own.shutdown(socket.SHUT_RDWR)


def test_workers_gather_the_same_values_turn_after_turn(port):
    gang = Gang(port, [{}, {}, {}])
    assert not gang.errors
    for turn in range(5):
        value = {"rewards": [0.1 + turn, float("inf")], "text": "ä\ud83d"}
        seen = gang.each(lambda i, worker, value=value: worker.gather(value | {"from": i}))
        assert seen[0] == seen[1] == seen[2] == [value | {"from": i} for i in range(3)]
    assert gang.each(lambda i, worker: worker.any(i == 2)) == {0: True, 1: True, 2: True}
    assert gang.each(lambda i, worker: worker.any(False)) == {0: False, 1: False, 2: False}
    calls = []
    assert gang.each(lambda i, worker: worker.first(lambda: calls.append(i) or "x")) == {0: "x", 1: "x", 2: "x"}
    assert calls == [0]


def test_a_worker_that_does_not_come_is_named(port):
    gang = Gang(port, [{}, {}, {}], timeout=2.0, absent=(2,))
    assert "--start_timeout=2: worker 2 did not come" in gang.errors[0] and "worker 2" in gang.errors[1]


def test_worker_0_that_does_not_come_is_named(port):
    gang = Gang(port, [{}, {}], timeout=2.0, absent=(0,))
    assert "worker 0 did not answer" in gang.errors[1]


def test_differing_facts_stop_every_worker_in_the_same_words(port):
    gang = Gang(port, [{"jax": "0.10"}, {"jax": "0.10"}, {"jax": "0.11"}])
    assert "worker 2 has jax 0.11" in gang.errors[0] and gang.errors[0] == gang.errors[1] == gang.errors[2]


def test_two_workers_of_one_number_are_refused(port):
    gang = Gang(port, [{}, {}, {}], timeout=5.0, numbers=[0, 1, 1])
    assert "--process_id=1: two workers have it" in gang.errors[0]


def test_a_taken_port_is_named(port):
    with socket.create_server(("", port)):
        gang = Gang(port, [{}, {}], timeout=2.0)
    assert f"port {port} cannot be used" in gang.errors[0]


def test_noise_on_the_port_is_not_a_worker(port):
    def knock():
        hello = {"kind": "hello", "index": 1, "count": 2, "facts": {}, "clock": 0.0}
        strange = [{"index": -1}, {"index": 2}, {"index": 10**9}, {"index": True}, {"count": "2"}, {"facts": []}]
        texts = ["[1]", '{"kind":"hello"}', "hi", *(json.dumps(hello | change) for change in strange)]
        frames = [len(text).to_bytes(4, "big") + text.encode() for text in texts]
        for content in (b"GET / HTTP/1.1\r\n\r\n", b"", *frames):
            for _ in range(50):
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=1) as visitor:
                        visitor.sendall(content)
                    break
                except OSError:
                    time.sleep(0.05)

    threading.Thread(target=knock, daemon=True).start()
    assert not Gang(port, [{}, {}]).errors


def test_a_stranger_that_stays_holds_nobody_up(port):
    visitors = []

    def stay():
        while not visitors:
            with contextlib.suppress(OSError):
                visitors.append(socket.create_connection(("127.0.0.1", port), timeout=1))
        visitors[0].sendall(b"GET / HTTP/1.1")  # the beginning of a long frame

    threading.Thread(target=stay, daemon=True).start()
    gang = Gang(port, [{}, {}, {}], timeout=12.0, absent=(2,))
    visitors[0].close()
    assert "worker 2 did not come" in gang.errors[0] and time.monotonic() - gang.started < 18


def test_workers_of_unequal_number_are_told_so(port):
    gang = Gang(port, [{}, {}], timeout=5.0, counts=[2, 3])
    said = "worker 1 has --num_processes=3 and worker 0 2; make them equal"
    assert gang.errors == {0: said, 1: said}


def test_an_error_on_one_worker_ends_all_in_its_words(port, capfd):
    gang = Gang(port, [{}, {}, {}])
    threading.Thread(target=gang.all[1].fail, args=(UsageError("--reward=x: raised"),), daemon=True).start()
    assert gang.wait_for_end(3) == {0: 2, 1: 2, 2: 2}
    assert capfd.readouterr().err.count("worker 1: error: --reward=x: raised") == 3


def test_a_lost_worker_ends_the_others_with_the_code_that_says_resume(port, capfd):
    gang = Gang(port, [{}, {}, {}])
    hang_up(gang.all[2].links[0])
    ended = gang.wait_for_end(3)
    assert {ended[0], ended[1]} == {75} and "worker 2 is gone" in capfd.readouterr().err


def test_lost_worker_0_ends_the_others(port, capfd):
    gang = Gang(port, [{}, {}, {}])
    gang.all[0].ending.set()
    for link in gang.all[0].links.values():
        hang_up(link)
    ended = gang.wait_for_end(2)
    assert {ended[1], ended[2]} == {75} and "worker 0 is gone" in capfd.readouterr().err


class FreedLock:
    """A lock that a thread which saves takes as usual; a loop that leaves its block waits for it a second at most."""

    def __init__(self):
        self.lock = threading.Lock()

    def __enter__(self):
        self.lock.acquire(timeout=1.0 if threading.current_thread() is threading.main_thread() else -1)

    def __exit__(self, *error):
        with contextlib.suppress(RuntimeError):
            self.lock.release()


def test_workers_save_the_same_step_together_or_not_at_all(port, capfd):
    """One worker has left its rollout when another is asked to stop: all wait for the next one."""
    gang, saved = Gang(port, [{}, {}, {}]), []
    with contextlib.ExitStack() as stack:
        for worker in gang.all:
            stack.enter_context(worker.stop.graceful(20.0, "continue with --resume"))
            worker.stop.guard = FreedLock()  # a process that has ended leaves nobody waiting
        for i in (0, 1):
            stack.enter_context(gang.all[i].stop.saving(4, lambda: saved.append(4)))
        gang.all[1].stop.hear(signal.SIGTERM)
        time.sleep(0.5)
        assert all(worker.stop.requested for worker in gang.all) and not saved and not gang.ended
        with gang.all[2].stop.saving(5, lambda: saved.append("another step")):
            time.sleep(0.3)
        assert not saved and not gang.ended
        stack.enter_context(gang.all[2].stop.saving(4, lambda: saved.append(4)))
        assert gang.wait_for_end(3) == {0: 75, 1: 75, 2: 75} and saved == [4, 4, 4]
    said = capfd.readouterr().err
    assert said.count("SIGTERM at worker 1: stopping within 20 s") == 2 and "is gone" not in said
    assert said.count("stopped after step 4, which is saved; continue with --resume") == 3


def test_a_worker_that_cannot_save_in_time_ends_all_at_the_deadline(port, capfd):
    gang = Gang(port, [{}, {}])
    with contextlib.ExitStack() as stack:
        for worker in gang.all:
            stack.enter_context(worker.stop.graceful(1.0, "continue with --resume"))
        stack.enter_context(gang.all[0].stop.saving(4, lambda: None))
        gang.all[0].stop.hear(signal.SIGTERM)
        ended = gang.wait_for_end(2)
        assert ended == {0: 75, 1: 75}
    assert "took longer than --grace_seconds" in capfd.readouterr().err


def test_a_worker_that_never_answers_holds_nobody_past_the_deadline(port, capfd):
    """Worker 1 has not begun its loop, so no thread of it is asked."""
    gang = Gang(port, [{}, {}])
    with gang.all[0].stop.graceful(1.0, "continue with --resume"):
        gang.all[0].stop.guard = FreedLock()
        with gang.all[0].stop.saving(4, lambda: None):
            gang.all[0].stop.hear(signal.SIGTERM)
            assert gang.wait_for_end(2) == {0: 75, 1: 75}
    assert capfd.readouterr().err.count("took longer than --grace_seconds") == 2


def test_a_save_that_fails_on_one_worker_ends_all_in_its_words(port, capfd):
    gang = Gang(port, [{}, {}, {}])

    def save(worker):
        if worker is gang.all[1]:
            raise UsageError("runs/x: the disk is full")
        threading.Event().wait(20)

    with contextlib.ExitStack() as stack:
        for worker in gang.all:
            stack.enter_context(worker.stop.graceful(20.0, ""))
            worker.stop.guard = FreedLock()
            stack.enter_context(worker.stop.saving(4, lambda worker=worker: save(worker)))
        gang.all[0].stop.hear(signal.SIGTERM)
        assert gang.wait_for_end(3) == {0: 75, 1: 75, 2: 75}
    assert capfd.readouterr().err.count("error: runs/x: the disk is full") == 3


def test_messages_are_data_only(port):
    """Nothing that arrives is unpickled."""
    source = (ROOT / "minigrpo/runtime/links.py").read_text() + (ROOT / "minigrpo/runtime/workers.py").read_text()
    assert "pickle" not in source and ".recv()" not in source and ".send(" not in source


# Whole runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run by one process and by two workers."""
    folder = tmp_path_factory.mktemp("workers")
    alone(folder, "train", *SMALL, f"--output_dir={folder}/one")
    pair = start(folder, 2, "train", *SMALL, f"--output_dir={folder}/two")
    assert codes(pair) == [0, 0], errors(folder, 0)[-3:] + errors(folder, 1)[-3:]
    return folder


@pytest.mark.slow
def test_two_workers_train_as_one_process_does(runs):
    same_metrics(runs / "one", runs / "two")
    same_weights(runs / "one/final", runs / "two/final")


@pytest.mark.slow
def test_only_worker_0_speaks_and_every_file_is_written_once(runs):
    assert errors(runs, 1) == [] and "step 3/3" in (runs / "worker-0.stderr").read_text()
    one, both = files_of(runs / "one"), files_of(runs / "two")
    assert both - one == {"train.worker-1.log"} and not one - both
    assert "compiled" in (runs / "two/train.worker-1.log").read_text()


RANDOM = """
import os, random, time

def chance(completions, **kwargs):
    return [random.random() for _ in completions]

def fails(completions, **kwargs):
    if os.environ.get("WORKER") == "1":
        raise ValueError("on worker 1 alone")
    return [float(len(text)) for text in completions]

def rests(completions, trainer_state, **kwargs):
    time.sleep(3600 if trainer_state.global_step and os.path.exists("rest") else 0)
    return [float(len(text)) for text in completions]

def hangs(completions, **kwargs):
    time.sleep(3600 if os.environ.get("WORKER") == "1" else 0)
    return [float(len(text)) for text in completions]
"""


@pytest.mark.slow
def test_a_random_reward_is_agreed_on(runs, tmp_path):
    (tmp_path / "own.py").write_text(RANDOM)
    (tmp_path / "programs").symlink_to(runs / "programs")
    flags = [*SMALL, f"--output_dir={tmp_path}/run", "--reward=own.py:chance"]
    assert codes(start(tmp_path, 2, "train", *flags)) == [0, 0]
    logged = rows(tmp_path / "run/completions.jsonl")
    assert len({row["reward"] for row in logged}) > 1


@pytest.mark.slow
@pytest.mark.parametrize(("reward", "more", "said"), [
    ("fails", (), "on worker 1 alone"), ("hangs", ("--reward_timeout=3",), "--reward_timeout"),
])  # fmt: skip
def test_a_reward_that_fails_on_one_worker_ends_all_in_one_line(runs, tmp_path, reward, more, said):
    (tmp_path / "own.py").write_text(RANDOM)
    (tmp_path / "programs").symlink_to(runs / "programs")
    pair = start(tmp_path, 2, "train", *SMALL, f"--output_dir={tmp_path}/run", f"--reward=own.py:{reward}", *more)
    assert codes(pair) == [2, 2]
    for i in range(2):
        last = errors(tmp_path, i)[-1]
        assert last.startswith("worker 1: error: ") and said in last
        assert "Traceback" not in "\n".join(errors(tmp_path, i))


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "number"), [
    (0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGTERM), (1, signal.SIGTERM),
])  # fmt: skip
def test_a_worker_that_ends_ends_the_others_and_the_run_goes_on_with_one_process(runs, tmp_path, victim, number):
    (tmp_path / "programs").symlink_to(runs / "programs")
    long = [*SMALL, "--max_steps=8", "--lr_schedule=constant", "--warmup_ratio=0", f"--output_dir={tmp_path}/run"]
    pair = start(tmp_path, 2, "train", *long)
    wait_for_step(tmp_path / "run", 2, pair)
    pair[victim].send_signal(number)
    ended = codes(pair, 60)
    assert ended[1 - victim] == 75 and ended[victim] == (-9 if number == signal.SIGKILL else 75)
    assert "Traceback" not in "\n".join(errors(tmp_path, 0) + errors(tmp_path, 1))
    alone(tmp_path, "train", "--resume", f"--output_dir={tmp_path}/run")
    alone(tmp_path, "train", *long[:-1], f"--output_dir={tmp_path}/whole")
    same_metrics(tmp_path / "whole", tmp_path / "run")


GUARDED = """
import functools, runpy, threading
from jax.experimental import multihost_utils
from minigrpo.runtime import STOP

STOP.install()  # as python -m does

def in_the_loop(collective, *arguments, **named):
    assert threading.current_thread() is threading.main_thread(), "a rollout would hold up this program"
    return collective(*arguments, **named)

for name in ("sync_global_devices", "broadcast_one_to_all", "process_allgather"):
    setattr(multihost_utils, name, functools.partial(in_the_loop, getattr(multihost_utils, name)))
runpy.run_module("minigrpo.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_request_within_a_rollout_is_met_at_once_by_all_workers(runs, tmp_path):
    (tmp_path / "own.py").write_text(RANDOM)
    (tmp_path / "rest").touch()
    (tmp_path / "programs").symlink_to(runs / "programs")
    flags = [*SMALL, "--save_steps=100", "--eval_steps=0", f"--output_dir={tmp_path}/run", "--reward=own.py:rests"]
    port = links.free_port()
    pair = [launch(tmp_path, i, 2, port, [sys.executable, "-c", GUARDED, *flags]) for i in range(2)]
    metrics = tmp_path / "run/metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert all(process.poll() is None for process in pair)
        time.sleep(0.1)
    time.sleep(2)
    pair[1].send_signal(signal.SIGTERM)
    assert codes(pair, 30) == [75, 75]
    assert "SIGTERM at worker 1: stopping within 25 s, with a checkpoint" in errors(tmp_path, 0)
    for i in range(2):
        assert errors(tmp_path, i)[-1].startswith("stopped after step 1, which is saved; continue with --resume")
    (tmp_path / "rest").unlink()
    alone(tmp_path, "train", "--resume", f"--output_dir={tmp_path}/run")
    assert [row["step"] for row in rows(metrics)] == [1, 2, 3]


@pytest.mark.slow
def test_workers_started_differently_are_told_before_anything_runs(tmp_path):
    pair = start(tmp_path, 2, "train", *SMALL, own=lambda i: (f"--seed={i}",))
    assert codes(pair, 120) == [2, 2]
    for i in range(2):
        assert errors(tmp_path, i) == ["error: worker 1 has --seed 1 and worker 0 0; make them equal"]


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    for i in range(2):
        (tmp_path / str(i)).mkdir()
    port, run = links.free_port(), command("train", *SMALL, "--output_dir=run")
    pair = [launch(tmp_path, i, 2, port, run, cwd=tmp_path / str(i)) for i in range(2)]
    assert codes(pair) == [2, 2]
    assert "worker 1 does not see what worker 0 wrote" in errors(tmp_path, 0)[-1]


def test_facts_name_what_must_be_equal():
    facts = workers.own_facts(Settings(sections=("steps", "cluster")))
    assert {"Python", "jax", "jaxlib", "--seed"} <= facts.keys() and "--process_id" not in facts


def test_flags_of_workers_are_not_ignored_where_jax_has_started():
    import dataclasses

    settings = Settings(sections=("cluster",), explicit=frozenset({"num_processes"}))
    settings = dataclasses.replace(settings, cluster=ClusterOptions(num_processes=2))
    with pytest.raises(UsageError, match="--num_processes: jax has started"), workers.joined(settings):
        pass


def test_a_second_run_of_several_workers_in_one_process_is_refused(monkeypatch):
    monkeypatch.setattr(workers.WORKERS, "count", 2)
    with pytest.raises(UsageError, match="several workers: jax has started"), workers.joined(Settings()):
        pass
