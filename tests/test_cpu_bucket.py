"""Runs, models and datasets in buckets: a server of the real protocol that fails, fills up, stops, and comes back."""

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from orbax.checkpoint._src.serialization import tensorstore_utils

pytest.importorskip("gcp_storage_emulator")

from bucket_server import BUCKET, BucketServer

pytest.importorskip("gcsfs")

from minigrpo import remote, report, train
from minigrpo.command_line import parse_flags
from minigrpo.config import UsageError
from minigrpo.model import hub
from minigrpo.runtime import bucket, session
from minigrpo.runtime.bucket import open_home
from minigrpo.runtime.checkpoint import Checkpoints
from minigrpo.runtime.run_folder import TIMINGS
from minigrpo.runtime.workers import WORKERS

STATE = {"a": jnp.arange(4096.0).reshape(64, 64), "b": jnp.ones(3, jnp.bfloat16)}
LIKE = jax.tree.map(jnp.zeros_like, STATE)
WRITES = ("POST", "PUT")


@pytest.fixture(scope="module")
def only_server():
    """One for all tests, as gcsfs and tensorstore keep its address."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    server = BucketServer()
    before = dict(os.environ)
    os.environ.update(server.env)
    yield server
    os.environ.clear()
    os.environ.update(before)
    server.stop()


@pytest.fixture
def server(only_server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PATIENCE", 8.0)
    monkeypatch.setattr(bucket, "PATIENCE", 8.0)
    hasty = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 20))
    monkeypatch.setattr("gcsfs.retry.asyncio", hasty)
    for name in ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT"):
        retries = {"gcs_request_retries": {"max_retries": 5, "max_delay": "1s"}}
        monkeypatch.setattr(tensorstore_utils, name, getattr(tensorstore_utils, name) | retries)
    only_server.faults.clear()
    yield only_server
    only_server.faults.clear()


def enter(home):
    with home:
        pass


def url_of(tmp_path, scheme="gs"):
    return f"{scheme}://{BUCKET}/{tmp_path.name}/run"


def metrics(text):
    rows = [json.loads(line) for line in text.splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMINGS)} for row in rows]


def equal(state, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True))


# Names


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gs:/bucket/run", "gs: takes two slashes, and folders one; write gs://BUCKET/FOLDER"),
        ("gs:///bucket/run", "takes two slashes"),
        ("gs://bucket//run", "takes two slashes"),
        ("gs://bucket", "names a bucket but nothing in it"),
        ("gs://bucket/", "names a bucket but nothing in it"),
        ("gs://", "names a bucket but nothing in it"),
        ("gss://bucket/run", "unknown scheme 'gss'; write gs://BUCKET/FOLDER"),
        ("g_s://bucket/run", "unknown scheme 'g_s'"),
    ],
)
def test_names_that_cannot_be_meant_are_one_line(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags in ([f"--output_dir={name}"], ["--resume", f"--output_dir={name}"]):
        with pytest.raises(UsageError) as error:
            train.main(parse_flags(flags, train.SECTIONS))
        assert str(error.value).startswith(f"--output_dir={name}: ") and said in str(error.value)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="--dataset="):
        remote.local_copy("dataset", name)


@pytest.mark.parametrize("name", ["runs/mine", "/tmp/a:b/c", "builtin:tiny", "Qwen/Qwen3-1.7B", "C:x", "./gs:x", ""])
def test_paths_and_hub_ids_are_no_urls(name):
    assert not remote.is_url(name)


def test_slashes_at_the_end_and_capitals_are_no_other_folder():
    assert remote.clean_url("x", "GS://Bucket/run///") == remote.clean_url("x", "gcs://Bucket/run") == "gs://Bucket/run"
    assert remote.clean_url("x", "file:///tmp/run/") == "file:///tmp/run"


@pytest.mark.parametrize(("scheme", "cure"), [("gs", "pip install 'minigrpo[gcs]'"), ("s3", "Install s3fs")])
def test_a_missing_library_is_one_line(scheme, cure, monkeypatch):
    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.filesystem", missing)
    with pytest.raises(UsageError, match=f"not installed; {cure.replace('[', '.').replace(']', '.')}"):
        enter(open_home(f"{scheme}://bucket/run", False))


# Uploading


@pytest.fixture(params=["memory", "file", "gs"])
def place(request, server, tmp_path):
    """URL of a run that does not exist yet."""
    root = f"memory://{tmp_path.name}" if request.param == "memory" else f"file://{tmp_path}/there"
    return url_of(tmp_path) if request.param == "gs" else f"{root}/run"


def contents(url):
    files = remote.filesystem(url)
    return {name: files.cat_file(f"{url}/{name}") for name in remote.list_files(url, files)}


def test_files_that_changed_are_uploaded_whole_and_the_folder_here_goes(place, monkeypatch):
    with open_home(place, False) as home:
        (home.folder / "final").mkdir()
        for name in ("metrics.jsonl", "config.json", "final/config.json", "final/model.safetensors", "x.partial"):
            (home.folder / name).write_text(name)
        (home.folder / "final.partial").mkdir()
        (home.folder / "final.partial" / "model").write_text("half")
        assert list(home.changed())[-2:] == ["config.json", "final/config.json"]
        home.flush()
        assert not home.changed()
        with open(home.folder / "metrics.jsonl", "a") as file:
            file.write(" more")
        assert list(home.changed()) == ["metrics.jsonl"]
        (home.folder / "late").write_text("at the end")
    whole = {name: name.encode() for name in ("config.json", "final/config.json", "final/model.safetensors")}
    assert contents(place) == whole | {"metrics.jsonl": b"metrics.jsonl more", "late": b"at the end"}
    assert not home.folder.exists()
    with pytest.raises(UsageError, match=f"--output_dir={place}: holds a run already"):
        enter(open_home(place, False))
    with open_home(place, True) as home:
        assert sorted(path.name for path in home.folder.iterdir()) == ["config.json", "late", "metrics.jsonl"]
        assert not home.changed()


def test_logs_are_uploaded_once_a_minute(place, monkeypatch):
    monkeypatch.setattr(bucket, "UPLOAD_SECONDS", 0.05)
    with open_home(place, False) as home:
        (home.folder / "metrics.jsonl").write_text("1")
        deadline = time.monotonic() + 10
        while "metrics.jsonl" not in contents(place):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_checkpoints_of_every_scheme_come_back(place):
    with open_home(place, False) as home:
        checkpoints = Checkpoints(home, 2)
        for step in (1, 2, 3):
            checkpoints.save(step, jax.tree.map(lambda x, n=step: x + n, STATE), {"skipped": step})
        checkpoints.close()
    assert {name.split("/")[1] for name in contents(place) if name.startswith("checkpoints/")} == {"2", "3"}
    with open_home(place, True) as home:
        step, state, host = Checkpoints(home, 2).restore(LIKE)
    assert step == 3 and host == {"skipped": 3} and equal(state, jax.tree.map(lambda x: x + 3, STATE))


def test_logs_are_there_before_a_checkpoint_is(place, monkeypatch):
    seen = []
    with open_home(place, False) as home:
        checkpoints = Checkpoints(home, 2)
        (home.folder / "metrics.jsonl").write_text("of step 4")
        flush = home.flush

        def watched():
            flush()
            seen.append(sorted(contents(place)))

        monkeypatch.setattr(home, "flush", watched)
        checkpoints.save(4, STATE)
        checkpoints.close()
        monkeypatch.undo()
    assert "metrics.jsonl" in seen[0] and "checkpoints/4/commit_success.txt" not in seen[0]


def test_two_processes_do_not_write_one_run(place):
    with open_home(place, False):
        with pytest.raises(UsageError, match="another process of this host writes there"):
            enter(open_home(place, True))
        with open_home(place, True, "1") as other:
            (other.folder / "train-1.log").write_text("mine")
    assert contents(place) == {"train-1.log": b"mine"}


def test_several_workers_write_to_gs_or_a_shared_folder(place, monkeypatch):
    monkeypatch.setattr(WORKERS, "count", 2)
    if place.startswith("gs://"):
        enter(open_home(place, False))
    else:
        with pytest.raises(UsageError, match=f"--output_dir={place}: several workers write to gs://"):
            enter(open_home(place, False))


def test_the_name_of_a_run_is_that_of_worker_0(monkeypatch):
    monkeypatch.setattr(WORKERS, "first", lambda make: "runs/of-worker-0")
    with session.choose_home(parse_flags([], train.SECTIONS).run) as home:
        assert home.name == "runs/of-worker-0"


def test_a_state_of_many_arrays_comes_back(server, tmp_path):
    state = {f"layer/{i}": jnp.full((32, 32), float(i)) for i in range(60)}
    with open_home(url_of(tmp_path), False) as home:
        checkpoints = Checkpoints(home, 2)
        checkpoints.save(1, state)
        checkpoints.close()
        assert equal(Checkpoints(home, 2).restore(jax.tree.map(jnp.zeros_like, state))[1], state)


# Failures


def saved_one(url):
    with open_home(url, False) as home:
        checkpoints = Checkpoints(home, 3)
        checkpoints.save(2, STATE)
        checkpoints.close()


def fails_with(code, text="", methods=WRITES):
    return lambda method, path: code if method in methods and text in path else 0


@pytest.mark.parametrize(
    ("code", "inside"), [(503, ""), (503, "/d/"), (429, "_METADATA"), (503, "commit_success"), (503, "metrics.jsonl")]
)
def test_a_server_that_is_busy_in_the_middle_of_a_checkpoint_is_asked_again(server, tmp_path, code, inside):
    url, left = url_of(tmp_path), [3]

    def busy(method, path):
        hit = fails_with(code, inside)(method, path)
        left[0] -= bool(hit)
        return hit if left[0] >= 0 else 0

    with open_home(url, False) as home:
        checkpoints = Checkpoints(home, 3)
        (home.folder / "metrics.jsonl").write_text("x")
        server.faults.append(busy)
        checkpoints.save(2, STATE)
        checkpoints.close()
        assert Checkpoints(home, 3).restore(LIKE)[0] == 2
    assert left[0] < 0


@pytest.mark.parametrize(
    ("code", "inside", "cure"),
    [
        (403, "/d/", "let this account read and write there"),
        (507, "/d/", "make room in the bucket"),
        (403, "commit_success", "let this account read and write there"),
        (507, "commit_success", "make room in the bucket"),
        (403, "metrics.jsonl", "let this account read and write there"),
        (404, "metrics.jsonl", "create the bucket"),
    ],
)
def test_a_bucket_that_refuses_is_one_line_and_what_was_there_stays_whole(server, tmp_path, code, cure, inside):
    url = url_of(tmp_path)
    saved_one(url)
    with pytest.raises(UsageError) as error, open_home(url, True) as home:
        checkpoints = Checkpoints(home, 3)
        checkpoints.restore(LIKE)
        (home.folder / "metrics.jsonl").write_text("more")
        server.faults.append(fails_with(code, inside))
        checkpoints.save(4, STATE)
        checkpoints.close()
    assert url in str(error.value) and cure in str(error.value) and "--resume" in str(error.value)
    assert "\n" not in str(error.value) and "html" not in str(error.value)
    server.faults.clear()
    with open_home(url, True) as home:
        checkpoints = Checkpoints(home, 3)
        step, state, _ = checkpoints.restore(LIKE)
        assert step == 2 and equal(state, STATE) and checkpoints.steps() == [2]
    assert not [name for name in server.names(f"{tmp_path.name}/run") if name.startswith("checkpoints/4")]


def test_a_server_that_is_stopped_and_started_is_waited_for(server, tmp_path):
    url = url_of(tmp_path)
    saved_one(url)
    with open_home(url, True) as home:
        checkpoints = Checkpoints(home, 3)
        checkpoints.restore(LIKE)
        server.stop()
        threading.Timer(2.0, server.start).start()
        (home.folder / "metrics.jsonl").write_text("more")
        checkpoints.save(4, STATE)
        checkpoints.close()
        assert checkpoints.steps() == [2, 4]


def test_a_slow_server_is_only_slow(server, tmp_path):
    server.faults.append(lambda method, path: time.sleep(0.05))
    saved_one(url_of(tmp_path))
    with open_home(url_of(tmp_path), True) as home:
        assert Checkpoints(home, 3).restore(LIKE)[0] == 2


REFUSED = {
    "no bucket": ("gs://no-such-bucket/run", None, "create the bucket, or correct its name"),
    "no permission to write": (None, fails_with(403), "let this account read and write there"),
    "no permission to read": (None, fails_with(403, methods=("GET",)), "let this account read and write there"),
    "full": (None, fails_with(507), "make room in the bucket"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bucket_that_cannot_be_used_is_refused_before_anything_else(server, tmp_path, case):
    url, fault, cure = REFUSED[case]
    server.faults += [fault] if fault else []
    with pytest.raises(UsageError) as error:
        train.main(parse_flags([f"--output_dir={url or url_of(tmp_path)}"], train.SECTIONS))
    assert (url or url_of(tmp_path)) in str(error.value) and cure in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_that_is_not_there_is_not_resumed(server, tmp_path):
    url = url_of(tmp_path)
    with pytest.raises(UsageError, match=f"--resume: {url} holds no run .no config.json.; check --output_dir"):
        train.main(parse_flags(["--resume", f"--output_dir={url}"], train.SECTIONS))


def test_a_checkpoint_that_is_damaged_is_set_aside_in_the_bucket(server, tmp_path, capfd):
    url = url_of(tmp_path)
    with open_home(url, False) as home:
        checkpoints = Checkpoints(home, 3)
        for step in (2, 4):
            checkpoints.save(step, STATE)
        checkpoints.close()
    remote.filesystem(url).rm_file(f"{url}/checkpoints/4/manifest/metadata")
    with open_home(url, True) as home:
        assert Checkpoints(home, 3).restore(LIKE)[0] == 2
    assert "checkpoints/4 is not usable, trying the one before" in capfd.readouterr().err
    assert {name.split("/")[0] for name in server.names(f"{tmp_path.name}/run")} >= {"unusable-checkpoint-4"}


# Copies on this host


def test_a_file_is_downloaded_once_for_each_content(place):
    files, url = remote.filesystem(place), f"{place}/rows.jsonl"
    files.makedirs(place, exist_ok=True)
    files.pipe_file(url, b'{"prompt": "a"}\n')
    first = remote.local_copy("dataset", url)
    assert first.name == "rows.jsonl" and first.read_bytes() == b'{"prompt": "a"}\n'
    stamp = first.stat().st_mtime_ns
    assert remote.local_copy("dataset", url) == first and first.stat().st_mtime_ns == stamp
    files.pipe_file(url, b'{"prompt": "other"}\n')
    assert remote.local_copy("dataset", url).read_bytes() == b'{"prompt": "other"}\n'
    with pytest.raises(UsageError, match="there is nothing of that name"):
        remote.local_copy("dataset", f"{place}/other.jsonl")


def test_a_download_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}/rows.jsonl"
    remote.filesystem(url).pipe_file(url, b"x" * 2_000_000)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=remote.ROOM + 1_000_000))
    with pytest.raises(UsageError, match="1 MiB to download, but .* MiB free .*; make room, or name another place"):
        remote.local_copy("dataset", url)


def test_a_download_that_breaks_off_leaves_nothing(server, tmp_path):
    url = url_of(tmp_path)
    saved_one(url)
    server.faults.append(lambda method, path: 403 if "alt=media" in path or "/download/" in path else 0)
    with pytest.raises(UsageError, match="let this account read"):
        remote.local_copy("model", url)
    server.faults.clear()
    kept = [path for path in (tmp_path / "cache/minigrpo/files").rglob("*") if path.is_file()]
    assert all(path.suffix == ".lock" for path in kept)


# The whole


SMALL = (
    "--batch_size=2", "--num_generations=2", "--max_completion_length=16", "--save_steps=2", "--max_steps=4",
    "--mesh=1,1",
)  # fmt: skip
ROWS = [{"prompt": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(2, 14)]


def run(*flags, command=("-m", "minigrpo.train")):
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *command, *flags], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900
    )


def start_and_kill(server, folder, flags):
    """Run until its first checkpoint is whole, then end it without warning."""
    command = [sys.executable, "-m", "minigrpo.train", *flags, "--max_steps=4"]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 900
    while "checkpoints/2/commit_success.txt" not in server.names(folder):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-2000:]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()


RESUME = """
import sys, minigrpo
run = minigrpo.train(resume=True, output_dir=sys.argv[1])
print(run.finished, run.folder, len(run.metrics), run.save(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def finished(only_server, tmp_path_factory):
    """The same run in a local folder, and in a bucket where it was killed and resumed without its local files."""
    base = tmp_path_factory.mktemp("whole")
    rows = base / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    os.environ["XDG_CACHE_HOME"] = str(base / "cache")
    url = f"gs://{BUCKET}/whole"
    with remote.filesystem(url).open(f"{url}/rows.jsonl", "wb") as file:
        file.write(rows.read_bytes())
    local = run(*SMALL, f"--dataset={rows}", f"--output_dir={base}/run")
    assert local.returncode == 0, local.stderr[-2000:]
    start_and_kill(only_server, "whole/run", (*SMALL, f"--dataset={url}/rows.jsonl", f"--output_dir={url}/run/"))
    logged = only_server.read("whole/run/metrics.jsonl").decode()
    shutil.rmtree(base / "cache")
    resumed = run(f"{url}/run", str(base / "saved"), command=("-c", RESUME))
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    return base / "run", url, logged, resumed


def test_killed_and_resumed_from_the_bucket_equals_a_local_run(finished, only_server):
    local, url, logged, resumed = finished
    assert len(logged.splitlines()) >= 2, "the checkpoint counted before its logs were there"
    assert "resumed after step 2" in resumed.stderr and "Traceback" not in resumed.stderr
    assert f"model in {url}/run/final, report in {url}/run/report.html" in resumed.stderr
    ours, theirs = only_server.read("whole/run/metrics.jsonl").decode(), (local / "metrics.jsonl").read_text()
    assert metrics(ours) == metrics(theirs)
    assert only_server.read("whole/run/completions.jsonl") == (local / "completions.jsonl").read_bytes()
    weights = "final/model.safetensors"
    assert only_server.read(f"whole/run/{weights}") == (local / weights).read_bytes()


def test_the_python_door_names_the_bucket_and_reads_from_it(finished):
    local, url, _, resumed = finished
    saved = local.parent / "saved"
    assert resumed.stdout.splitlines()[-1] == f"True {url}/run 4 {saved}"
    assert (saved / "model.safetensors").read_bytes() == (local / "final/model.safetensors").read_bytes()


def test_the_bucket_holds_what_a_run_folder_does(finished, only_server):
    local, *_ = finished
    here = {str(path.relative_to(local)) for path in local.rglob("*") if path.is_file()}
    there = set(only_server.names("whole/run"))
    kinds = ("checkpoints/", "tensorboard/")
    assert {name for name in here if not name.startswith(kinds)} == {
        name for name in there if not name.startswith(kinds)
    }
    assert {name.split("/")[1] for name in there if name.startswith("checkpoints/")} == {"2", "4"}
    assert any(name.startswith("tensorboard/") for name in there)


@pytest.mark.parametrize("part", ["", "/final", "/checkpoints/4"])
def test_a_part_of_a_run_in_a_bucket_is_the_same_model(finished, part):
    local, url, *_ = finished
    copy = remote.local_copy("model", f"{url}/run{part}")
    ours, theirs = hub.run_defaults(f"{url}/run{part}"), hub.run_defaults(f"{local}{part}")
    assert ours == theirs and ours["max_completion_length"] == 16
    source = hub.find_source(f"{url}/run{part}")
    assert (source.base_step or source.folder) == (copy if part else copy / "final")
    if part != "/checkpoints/4":
        for path in (local / "final").glob("*.[js]*"):  # README.md names the dataset
            assert (source.folder / path.name).read_bytes() == path.read_bytes()


def test_a_checkpoint_in_a_bucket_is_evaluated(finished):
    flags = (f"--model={finished[1]}/run/checkpoints/4", "--eval_size=2", "--dataset=builtin:arithmetic")
    result = run(*flags, command=("-m", "minigrpo.evaluate"))
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout.splitlines()[-1])["problems"] == 2


def test_generate_answers_with_a_model_in_a_bucket(finished):
    flags = (f"--model={finished[1]}/run/final", "--prompt=What is 1 plus 1?")
    result = run(*flags, command=("-m", "minigrpo.generate"))
    assert result.returncode == 0 and result.stdout.strip(), result.stderr[-2000:]


def test_a_report_of_a_run_in_a_bucket_is_written_there(finished, only_server, capfd):
    url = finished[1]
    remote.filesystem(url).rm_file(f"{url}/run/report.html")
    assert report.main(parse_flags([f"--run={url}/run"], report.SECTIONS)) == 0
    assert f"report written to {url}/run/report.html" in capfd.readouterr().err
    assert b"</html>" in only_server.read("whole/run/report.html")
    with pytest.raises(UsageError, match=f"{url}/nothing.*no metrics.jsonl"):
        report.main(parse_flags([f"--run={url}/nothing"], report.SECTIONS))
