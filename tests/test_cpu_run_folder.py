"""The run folder: logs whole after a crash, disk errors in one line, sinks without threads, words while one waits."""

import errno
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import ROOT
from tensorboardX.proto import event_pb2
from transformers.integrations.integration_utils import rewrite_logs
from trl.trainer.utils import nanstd

from minigrpo.config import RunOptions, Settings, UsageError
from minigrpo.runtime import files, progress, run_folder
from minigrpo.runtime.bucket import RunHome
from minigrpo.runtime.checkpoint import Best, Checkpoints
from minigrpo.runtime.progress import Progress
from minigrpo.runtime.run_folder import (
    RunFolder,
    completion_metrics,
    reward_metrics,
    save_settings,
)
from minigrpo.runtime.session import Position, Session
from minigrpo.runtime.signals import EXIT_STOPPED, StopRequest
from minigrpo.runtime.sinks import TensorBoard, Wandb, find_sinks, grouped, open_sinks

METRICS = {
    "num_tokens": 10.0, "reward": 0.5, "rewards/answer/mean": 0.25, "loss": 0.1, "kl": 0.0, "grad_norm": 1.0,
    "learning_rate": 3e-6, "completions/mean_length": 8.0, "completions/clipped_ratio": 0.5, "step_time": 2.0,
    "tokens_per_second": 40.0, "time/rollout": 1.0, "device/peak_bytes": 3 << 30,
}  # fmt: skip


def logged(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def make(folder, first_step=0, sinks=()):
    folder.mkdir(exist_ok=True)
    return RunFolder(folder, 9, list(sinks), True, first_step, Progress(io.StringIO()))


def test_a_resumed_run_goes_on_after_its_checkpoint_and_drops_a_torn_line(tmp_path):
    log = make(tmp_path)
    for step in (1, 2, 3):
        log.log(step, METRICS)
        log.append("completions.jsonl", [{"step": step, "completion": "a\ud800"}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')
    log = make(tmp_path, first_step=2)
    log.log(3, METRICS)
    assert [(row["step"], row["num_tokens"]) for row in logged(tmp_path)] == [(1, 10), (2, 20), (3, 30)]
    assert [row["step"] for row in logged(tmp_path, "completions.jsonl")] == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["completions.jsonl", "metrics.jsonl"]
    assert run_folder.last_step(tmp_path / "metrics.jsonl") == 3 and run_folder.last_step(tmp_path / "none") == 0


def test_the_step_line_shows_the_rate_and_the_memory(tmp_path):
    log = make(tmp_path)
    log.log(1, METRICS)
    line = log.progress.stream.getvalue()
    assert "step 1/9  reward 0.500 (answer 0.25)" in line and "lr 3.0e-06" in line and "memory 3.0 GiB" in line


def test_the_step_line_of_supervised_training_has_nothing_of_completions(tmp_path):
    log = make(tmp_path)
    names = ("loss", "grad_norm", "learning_rate", "num_tokens", "tokens_per_second", "step_time")
    log.log(1, {name: METRICS[name] for name in names} | {"time/update": 1.5})
    line = log.progress.stream.getvalue().strip()
    assert line.startswith(f"step 1/9  loss {METRICS['loss']:+.4f}  grad ") and line.endswith(" s (update 1.5)")
    assert "lr 3.0e-06" in line and "reward" not in line and "kl" not in line and "length" not in line


def refuse(number):
    def act(*_, **__):
        raise OSError(number, os.strerror(number))

    return act


WRITES = {
    "metrics": lambda log: log.log(1, METRICS),
    "completions": lambda log: log.append("completions.jsonl", [{"step": 1}]),
    "evaluations": lambda log: log.log_evaluation(1, {"accuracy": 0.5}),
    "cut": lambda log: log.cut_after(0),
    "settings": lambda log: save_settings(log.folder, Settings(sections=("run",))),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize(("number", "cure"), [(28, "make room there"), (30, "make the disk writable"), (5, "disk")])
def test_a_disk_that_refuses_is_one_line_with_file_and_cure(tmp_path, monkeypatch, name, number, cure):
    log = make(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setattr(files.os, "fsync", refuse(number))
    with pytest.raises(
        UsageError, match=f"{tmp_path}/.*: cannot be written .*{cure}.*continue with --resume"
    ) as caught:
        WRITES[name](log)
    assert "\n" not in str(caught.value) and ("free" in str(caught.value)) == (number == 28)


@pytest.mark.parametrize("name", sorted(WRITES.keys() - {"cut"}))
def test_a_folder_that_is_gone_is_one_line(tmp_path, name):
    log = make(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="run/.* cannot be written .No such file or directory.; put the folder back"):
        WRITES[name](log)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    files.write_whole(path, "old")
    monkeypatch.setattr(files.os, "replace", refuse(28))
    with pytest.raises(UsageError, match="config.json: cannot be written .No space left on device, .* free"):
        files.write_whole(path, "new")
    assert path.read_text() == "old"


def test_settings_are_read_back_by_flagfile(tmp_path):
    sections = ("run", "steps")
    save_settings(tmp_path, Settings(run=RunOptions(keep_best="reward"), sections=sections))
    from minigrpo.command_line import parse_flags

    again = parse_flags([f"--flagfile={tmp_path}/flags.txt"], sections)
    assert again.as_dict() == json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (150 << 20, "150 MiB"), (9 << 40, "9216 GiB")],
)
def test_sizes_are_readable(size, text):
    assert files.size_text(size) == text


# Sinks


def events(folder):
    """TensorBoard's own format, read by hand: length, checksum, event, checksum."""
    for path in sorted(folder.glob("*tfevents*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("Q", data[:8])
            yield event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard_has_transformers_tags_without_a_thread(tmp_path):
    before = threading.active_count()
    log = make(tmp_path, sinks=[TensorBoard(tmp_path, 4)])
    log.log(5, METRICS)
    log.log_evaluation(5, {"accuracy": 0.75})
    assert threading.active_count() == before
    found = list(events(tmp_path / "tensorboard"))  # on disk before the writer is closed
    values = {value.tag: (event.step, value.simple_value) for event in found for value in event.summary.value}
    assert found[1].session_log.status == event_pb2.SessionLog.START and found[1].step == 5
    assert values.keys() == rewrite_logs(METRICS | {"eval_accuracy": 1}).keys()
    assert values["eval/accuracy"] == (5, 0.75) and values["train/rewards/answer/mean"] == (5, 0.25)
    started = time.monotonic()
    log.close()
    assert time.monotonic() - started < 0.5
    make(tmp_path, first_step=5, sinks=[TensorBoard(tmp_path, 5)]).close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_a_full_disk_in_tensorboard_is_one_line_and_closes(tmp_path, monkeypatch):
    first, second = TensorBoard(tmp_path, 0), TensorBoard(tmp_path, 1)
    log = make(tmp_path, sinks=[first, second])
    with monkeypatch.context() as patch:
        patch.setattr(first.writer, "flush", refuse(28))
        with pytest.raises(UsageError, match="tensorboard: cannot be written .No space left"):
            log.log(1, METRICS)
    with monkeypatch.context() as patch:
        patch.setattr(first.writer._py_recordio_writer, "close", refuse(28))
        with pytest.raises(UsageError, match="tensorboard: cannot be written"):
            log.close()
    first.close()
    assert second.writer._py_recordio_writer._writer.closed
    log.close()


class FakeRun:
    def __init__(self):
        self.logs, self.defined = [], []

    def log(self, values):
        self.logs.append(values)

    def define_metric(self, *names, **options):
        self.defined.append((names, options))

    def finish(self):
        self.finished = True


def fake_wandb(monkeypatch, folder, **known):
    """wandb as its 0.29 is: settings read from WANDB_..., an id and options given to init."""
    run, given = FakeRun(), {}
    settings = {"project": None, "run_name": None, "root_dir": str(folder)} | known
    module = types.SimpleNamespace(
        errors=types.SimpleNamespace(Error=RuntimeError),
        setup=lambda: types.SimpleNamespace(settings=types.SimpleNamespace(**settings)),
        init=lambda **options: given.update(options) or run,
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.chdir(folder)
    return run, given


def test_weights_and_biases_gets_our_names_where_nothing_else_is_named(tmp_path, monkeypatch):
    run, given = fake_wandb(monkeypatch, tmp_path)
    (sink,) = open_sinks(find_sinks(RunOptions(report_to="wandb")), tmp_path, {"seed": 1}, 0)
    assert {name: given[name] for name in ("project", "name", "dir", "config")} == {
        "project": "minigrpo", "name": tmp_path.name, "dir": str(tmp_path), "config": {"seed": 1},
    }  # fmt: skip
    assert "mode" not in given and given["id"] == (tmp_path / "wandb_id.txt").read_text().strip()
    sink.log(3, {"loss": 1.0, "eval/accuracy": 0.5})
    assert run.logs == [{"train/loss": 1.0, "eval/accuracy": 0.5, "train/global_step": 3}]


def test_the_environments_names_win_over_ours_and_flags_over_both(tmp_path, monkeypatch):
    known = {"project": "theirs", "run_name": "theirs", "root_dir": "/elsewhere"}
    _, given = fake_wandb(monkeypatch, tmp_path, **known)
    Wandb(tmp_path, RunOptions(), {})
    assert not {"project", "name", "dir", "mode"} & given.keys()
    Wandb(tmp_path, RunOptions(report_to="wandb", wandb_project="flag", wandb_mode="offline"), {})
    assert given["project"] == "flag" and given["mode"] == "offline" and "name" not in given


# Metrics that bear TRL's names

REWARDS = np.array([1.0, 0.0, 1.0, 1.0, 2.0, 2.0, np.nan, np.nan])


@pytest.mark.parametrize(("scale", "share"), [("group", 0.75), ("none", 0.75), ("batch", 0.0)])
def test_reward_metrics_are_trls(scale, share):
    found = reward_metrics(REWARDS, {"answer": REWARDS}, 2, scale)
    assert found["reward_std"] == pytest.approx(float(nanstd(torch.tensor(REWARDS))))
    assert found["rewards/answer/std"] == found["reward_std"] and found["reward"] == pytest.approx(7 / 6)
    assert found["frac_reward_zero_std"] == share
    assert reward_metrics(np.ones(4), {}, 2, "batch")["frac_reward_zero_std"] == 1


def test_terminated_lengths_are_trls():
    found = completion_metrics(np.array([3, 8, 5]), np.array([True, False, True]))
    names = ("mean_terminated_length", "min_terminated_length", "max_terminated_length", "max_length", "clipped_ratio")
    assert [found[f"completions/{name}"] for name in names] == [4, 3, 5, 8, pytest.approx(1 / 3)]
    assert completion_metrics(np.array([8]), np.array([False]))["completions/max_terminated_length"] == 0


def test_tags_are_transformers():
    assert grouped({"loss": 1.0, "rewards/a/mean": 2.0}) == rewrite_logs({"loss": 1.0, "rewards/a/mean": 2.0})


# Words while one waits


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 2


def test_a_phase_is_told_once_a_minute_where_there_is_no_terminal():
    shown = Progress(io.StringIO())
    shown.start_steps(9, 2)
    shown.phase("rollout")
    start = shown.since
    shown.draw(start + 30)
    assert shown.stream.getvalue() == ""
    shown.draw(start + 61)
    assert shown.stream.getvalue() == "step 3/9 | rollout, 61 s\n"


def test_a_phase_goes_on_under_another_detail_and_ends_with_a_clean_line(monkeypatch):
    monkeypatch.setattr(progress.os, "get_terminal_size", lambda _: os.terminal_size((80, 9)))
    shown = Progress(Terminal())
    shown.phase("evaluation", "0 of 9 problems answered")
    shown.since = start = shown.since - 40
    shown.phase("evaluation", "4 of 9 problems answered")
    assert shown.status(start + 50) == "evaluation, 4 of 9 problems answered, 50 s"
    shown.draw(start + 50)
    shown.phase("")
    assert shown.stream.getvalue().endswith(" \r") and shown.status(start + 51) == ""
    shown.phase("loading", "a model")
    assert shown.since > start + 30


class Gone(io.StringIO):
    """A terminal or pipe whose other end has gone."""

    def isatty(self):
        return True

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_run_outlives_its_terminal(tmp_path, monkeypatch):
    """As after a lost connection, or `2>&1 | head`: what follows is in train.log alone."""
    monkeypatch.setattr(sys, "stderr", Gone())
    with Progress() as shown:
        shown.open_log(tmp_path)
        shown.phase("rollout")
        shown.draw(time.monotonic())
        shown.say("a line")
        sys.stderr.write("another\n")
    sys.stderr.write("after the end\n")
    sys.stderr.close()
    assert (tmp_path / "train.log").read_text() == "a line\nanother\n"


def test_the_time_to_finish_leaves_out_steps_that_compiled():
    shown = Progress(io.StringIO())
    shown.start_steps(10, 0)
    shown.step(1, 60.0, compiled=True)
    assert shown.seconds_left() is None
    shown.compiled = 30.0
    shown.step(2, 60.0)
    shown.step(3, 2.0)
    shown.step(4, 4.0)
    assert shown.seconds_left() == 18 and shown.status(time.monotonic()) == "step 5/10 | 0:18 to finish"


def test_a_compilation_is_announced_while_it_goes_on_and_when_it_is_done(monkeypatch):
    monkeypatch.setattr(progress, "LONG_COMPILE", 0.0)
    seen = []
    with Progress(io.StringIO()) as shown:

        def look(event, duration, **_):
            if event == progress.COMPILING:
                seen.append(shown.status(time.monotonic() + 5))

        jax.monitoring.register_scalar_listener(look)

        @jax.jit
        def update_step(x):
            return x * 7.25

        update_step(jnp.ones(3))
        jax.monitoring.unregister_scalar_listener(look)
    assert any("compiling" in line and "update_step" in line for line in seen)
    assert "update_step" in shown.stream.getvalue() and "compiled" in shown.stream.getvalue() and not shown.compiling


def test_the_log_holds_what_the_terminal_showed_but_not_the_live_line(tmp_path, monkeypatch):
    monkeypatch.setattr(progress.os, "get_terminal_size", lambda _: os.terminal_size((40, 9)))
    terminal = Terminal()
    with Progress(terminal) as shown:
        shown.say("before the folder")
        shown.open_log(tmp_path)
        shown.phase("loading a model with a rather long name indeed")
        shown.draw(time.monotonic())
        sys.stderr.write("from anywhere\n")
        print("printed", file=sys.stderr)
    assert sys.stderr is not shown and not shown.thread.is_alive()
    assert (tmp_path / "train.log").read_text() == "before the folder\nfrom anywhere\nprinted\n"
    drawn = "loading a model with a rather long name"[:39]
    assert f"{drawn}\r{' ' * len(drawn)}\rfrom anywhere\n" in terminal.getvalue()


def test_a_full_disk_or_a_forked_child_does_not_stop_the_words(tmp_path):
    shown = Progress(io.StringIO())
    shown.open_log(tmp_path)
    shown.log.close()
    shown.say("still here")
    shown.pid, shown.lock = -1, None
    shown.say("from a child")
    assert shown.stream.getvalue() == "still here\nfrom a child\n"


# Stopping


class Ended(Exception):
    pass


@pytest.fixture
def stop():
    """A stop request whose exit is noted instead of taken."""
    request = StopRequest()
    request.exits = []
    request.exit = request.exits.append
    return request


def wait_for(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("metric", "best"), [("-eval/loss", Best("eval/loss", 3, 1.0)), ("eval/pass@4", None)])
def test_a_measurement_that_is_on_file_counts_for_the_best(tmp_path, metric, best):
    """Its process may have ended before a checkpoint could say so."""
    options = RunOptions(eval_steps=3, keep_best=metric)
    (tmp_path / "evaluations.jsonl").write_text('{"step": 0, "loss": 9.0}\n{"step": 3, "loss": 1.0}\n')
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, keep_best=options.keep_best)
    log = RunFolder(tmp_path, 6, [], True, 3)
    session = Session(log, checkpoints, Position(3), options, RunHome(tmp_path))
    session.evaluate_first(None, lambda state, step: pytest.fail("measured again"))
    assert checkpoints.best == best


@pytest.mark.parametrize(("number", "code", "text"), [(2, 130, "interrupted\n"), (15, 143, "ended by SIGTERM\n")])
def test_a_signal_with_nothing_to_save_ends_in_one_line(stop, number, code, text, capfd):
    stop.hear(signal.Signals(number))
    assert stop.exits == [code] and capfd.readouterr().err == text and not stop.requested


def test_the_first_signal_asks_and_a_second_interrupt_ends(stop, capfd):
    with stop.graceful(30.0, "continue with --resume"):
        stop.hear(signal.SIGTERM)
        stop.hear(signal.SIGTERM)
        assert stop.requested and stop.exits == []
        stop.hear(signal.SIGINT)
        assert stop.exits == [130]
    assert capfd.readouterr().err == "SIGTERM: stopping within 30 s, with a checkpoint\ninterrupted\n"


def test_a_request_during_a_rollout_saves_at_once(stop, capfd):
    closed, held = [], []
    with stop.graceful(30.0, "continue with --resume", (lambda: closed.append(1),)):
        with stop.saving(7, lambda: held.append(stop.savable[0])):
            stop.hear(signal.SIGINT)
            wait_for(lambda: stop.exits)
    assert stop.exits == [EXIT_STOPPED] and closed == [1] and held == [7]
    assert "stopped after step 7, which is saved; continue with --resume" in capfd.readouterr().err


def test_a_request_during_an_update_waits_for_the_step_but_not_for_ever(stop, capfd):
    with stop.graceful(0.2, "continue with --resume"):
        stop.hear(signal.SIGTERM)
        wait_for(lambda: stop.exits)
    assert stop.exits == [EXIT_STOPPED]
    assert "took longer than --grace_seconds; continue with --resume" in capfd.readouterr().err


def test_a_partners_request_is_not_the_first_interrupt_of_this_process(stop, capfd):
    """Ctrl-C in a terminal reaches every process that it started, beside what the others tell."""
    with stop.graceful(30.0, ""):
        stop.hear_partner(signal.SIGINT, "worker 1")
        stop.hear_partner(signal.SIGINT, "worker 2")
        stop.hear(signal.SIGINT)
        assert stop.requested and stop.exits == []
        stop.hear(signal.SIGINT)
        assert stop.exits == [130]
    assert capfd.readouterr().err == "Ctrl-C at worker 1: stopping within 30 s, with a checkpoint\ninterrupted\n"


def test_a_partners_request_before_the_loop_is_met_in_it(stop):
    stop.hear_partner(signal.SIGTERM, "worker 1")
    assert stop.exits == [] and not stop.requested
    with stop.graceful(30.0, ""):
        assert stop.requested and stop.signal == signal.SIGTERM
    with stop.graceful(30.0, ""):
        assert not stop.requested


def test_a_checkpoint_under_way_is_not_cut_off(stop):
    with stop.graceful(0.2, ""):
        stop.hear(signal.SIGTERM)
        stop.finishing()
        time.sleep(0.4)
    assert stop.exits == []


def test_a_save_that_fails_and_a_closer_that_hangs_end_in_one_line_too(stop, capfd, monkeypatch):
    monkeypatch.setattr("minigrpo.runtime.signals.CLOSING", 0.1)
    stop.closers = [threading.Event().wait]
    stop.save_and_end(1, lambda: 1)
    stop.save_and_end(1, lambda: 1 / 0)
    assert stop.exits == [EXIT_STOPPED] * 2 and "error: division by zero" in capfd.readouterr().err


PROGRAM = """
import sys, time, os
from minigrpo.runtime.signals import STOP, started_as_command
STOP.install()
if sys.argv[1] == "fork":
    child = os.fork()
    if child == 0:
        time.sleep(5)
        os._exit(0)
    os.kill(child, 15)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 15
print("ready", flush=True)
if sys.argv[1] == "swallow":
    while True:
        try:
            time.sleep(0.01)
        except BaseException:
            pass
if sys.argv[1] == "lock":
    import threading
    threading.Lock().acquire(); gate = threading.Lock(); gate.acquire(); gate.acquire()
with STOP.graceful(30.0, "go on"):
    print("inside", flush=True)
    while not STOP.requested:
        time.sleep(0.01)
sys.exit(75)
"""


@pytest.mark.parametrize(
    ("mode", "number", "code", "text"),
    [
        ("swallow", signal.SIGINT, 130, "interrupted\n"),
        ("lock", signal.SIGTERM, 143, "ended by SIGTERM\n"),
        ("fork", signal.SIGTERM, 75, "SIGTERM: stopping within 30 s, with a checkpoint\n"),
    ],
)
def test_a_real_signal_is_heard_whatever_the_main_thread_does(mode, number, code, text):
    command = [sys.executable, "-c", PROGRAM, mode]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    waited_for = "inside" if mode == "fork" else "ready"
    while process.stdout.readline().strip() != waited_for:
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    assert (process.wait(10), process.communicate()[1]) == (code, text)


def test_a_device_without_memory_is_one_line_with_phase_and_cure():
    import jax

    text = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 34359738368 bytes."
    with (
        pytest.raises(UsageError, match="in the rollout phase, which wanted 34359738368 bytes; reduce --slots"),
        Progress(io.StringIO()) as shown,
    ):
        shown.phase("rollout")
        raise jax.errors.JaxRuntimeError(text)


class Recorded(TensorBoard):
    """A sink that remembers, and writes nothing."""

    def __init__(self):
        self.points = {}

    def log(self, step, metrics):
        self.points[step] = metrics

    def close(self):
        pass


def test_sinks_and_lines_have_the_means_of_every_few_steps_and_the_file_every_step(tmp_path):
    sink, stream = Recorded(), io.StringIO()
    log = RunFolder(tmp_path, 7, [sink], True, 0, Progress(stream), logging_steps=3)
    for step in range(1, 8):
        more = {"rewards/rare/mean": 8.0} if step == 2 else {}
        log.log(step, METRICS | {"reward": float(step), "learning_rate": step * 1e-6} | more)
    assert [row["reward"] for row in logged(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert {step: point["reward"] for step, point in sink.points.items()} == {3: 2.0, 6: 5.0, 7: 7.0}
    assert {step: point["num_tokens"] for step, point in sink.points.items()} == {3: 30, 6: 60, 7: 70}
    assert sink.points[6]["learning_rate"] == 6e-6 and sink.points[3]["rewards/rare/mean"] == 8.0
    assert re.findall(r"step (\d)/7  reward (\S+)", stream.getvalue()) == [
        ("3", "2.000"),
        ("6", "5.000"),
        ("7", "7.000"),
    ]


def test_steps_of_a_run_that_is_stopped_between_reports_reach_the_sinks(tmp_path):
    sink = Recorded()
    log = RunFolder(tmp_path, 9, [sink], True, 3, Progress(io.StringIO()), logging_steps=4)
    log.log(4, METRICS)
    log.log(5, METRICS | {"reward": 1.0})
    log.log(6, METRICS | {"reward": 3.0})
    log.close()
    assert {step: point["reward"] for step, point in sink.points.items()} == {4: 0.5, 6: 2.0}
