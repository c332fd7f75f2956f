"""Sinks of metrics and completions, a user's own among them; the model card, the Hub, and what serves the model."""

import base64
import http.server
import io
import json
import re
import struct
import sys
import threading
import types

import huggingface_hub
import numpy as np
import pytest
import yaml
from conftest import ROOT
from huggingface_hub import constants
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from tensorboardX.proto import event_pb2

from minigrpo import share, train
from minigrpo.build import Build
from minigrpo.command_line import parse_flags
from minigrpo.config import DataOptions, RewardOptions, RunOptions, Settings, UsageError
from minigrpo.data.chat import load_tokenizer
from minigrpo.model.weights import export
from minigrpo.runtime.progress import Progress
from minigrpo.runtime.run_folder import RunFolder
from minigrpo.runtime.sinks import Mlflow, TensorBoard, Terminal, Trackio, Wandb, as_text, find_sinks, open_sinks

BUILTIN = ROOT / "minigrpo" / "builtin"
ROWS = [
    {"step": 1, "prompt": [{"role": "user", "content": "é|?"}], "completion": "a\n```b", "reward": None, "length": 3}
    | {"rewards": {"answer": None}},
    {
        "step": 1,
        "prompt": "2+2",
        "completion": "4",
        "reward": 1.5,
        "length": 1,
        "rewards": {"answer": 3.0},
        "note": "n",
    },
]
COLUMNS = ["step", "prompt", "completion", "reward", "length", "rewards/answer", "note"]


METRICS = {
    "num_tokens": 10.0, "reward": 0.5, "loss": 0.1, "kl": 0.0, "grad_norm": 1.0, "completions/mean_length": 8.0,
    "completions/clipped_ratio": 0.5, "step_time": 2.0, "tokens_per_second": 40.0,
}  # fmt: skip


def values(folder):
    """Every value in TensorBoard's files, read by hand: length, checksum, event, checksum."""
    for path in sorted(folder.glob("*tfevents*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("Q", data[:8])
            yield from event_pb2.Event.FromString(data[12 : 12 + length]).summary.value
            data = data[16 + length :]


def make(folder, sinks, first_step=0):
    return RunFolder(folder, 9, sinks, True, first_step, Progress(io.StringIO()))


def logged(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# A user's own

OWN = """
import json

class Own:
    def __init__(self, folder, settings):
        self.file = open(folder / "own.jsonl", "a")
        self.write("settings", settings)
        settings.clear()

    def write(self, *row):
        self.file.write(json.dumps(row) + "\\n")

    def log(self, step, metrics):
        self.write("log", step, metrics)
        metrics.clear()

    def log_completions(self, step, rows):
        self.write("completions", step, rows)
        rows[0]["rewards"].clear()

    def close(self):
        self.write("close")
        self.file.close()

class Plain:
    def __init__(self, folder, settings): pass
    def log(self, step, metrics): pass
    def close(self): raise OSError("cannot end")

class Fails(Plain):
    def log(self, step, metrics):
        if step == 2:
            raise ValueError("no\\nroute")
    def close(self): pass

class Exits(Fails):
    def log(self, step, metrics): raise SystemExit(0)

class NoLog:
    def __init__(self, folder, settings): pass
    def close(self): pass

class NoClose(NoLog):
    close = None
    def log(self, step, metrics): pass

class NoArguments(Plain):
    def __init__(self): pass

class OneArgument(Plain):
    def log(self, metrics): pass

class BadTable(Plain):
    def log_completions(self): pass

class Raises(Plain):
    def __init__(self, folder, settings): raise RuntimeError("no\\nkey")

class Ends(Plain):
    def __init__(self, folder, settings): raise SystemExit(3)

class Static(Plain):
    @staticmethod
    def log(step, metrics): pass
    def close(self): pass

def function(folder, settings): pass
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


def opened(flag, folder, settings=None, first_step=0):
    return open_sinks(find_sinks(RunOptions(report_to=flag)), folder, settings or {"seed": 1}, first_step)


def test_a_users_own_sink_gets_all_and_can_spoil_nothing(tmp_path, own):
    settings = {"seed": 1}
    log = make(tmp_path, opened(f"{own}:Own, tensorboard,{own}:Static", tmp_path, settings))
    log.log(1, METRICS)
    log.log_completions(1, ROWS)
    log.log_evaluation(1, {"accuracy": 0.5})
    log.close()
    metrics = METRICS | {"num_tokens": 10.0}
    assert logged(tmp_path / "own.jsonl") == [
        ["settings", {"seed": 1}], ["log", 1, metrics], ["completions", 1, ROWS], ["log", 1, {"eval/accuracy": 0.5}],
        ["close"],
    ]  # fmt: skip
    assert settings == {"seed": 1} and logged(tmp_path / "completions.jsonl") == ROWS
    tags = {value.tag for value in values(tmp_path / "tensorboard")}
    assert {"train/loss", "completions", "eval/accuracy"} <= tags and "warning" not in log.progress.stream.getvalue()


BAD = {
    "nosuch.py:Own": "there is no Python file .*nosuch.py",
    "mine.py:Owm": "has no class Owm; did you mean Own",
    "mine.py:function": "function is no class; a sink is a class with log",
    "mine.py:NoLog": r"has no log\(step, metrics\)",
    "mine.py:NoClose": r"has no close\(\)",
    "mine.py:NoArguments": r"__init__ must take \(folder, settings\)",
    "mine.py:OneArgument": r"log must take \(step, metrics\)",
    "mine.py:BadTable": r"log_completions must take \(step, rows\)",
    "broken.py:Own": r"importing .*broken.py failed: ZeroDivisionError\(.*\) at .*broken.py:1",
    "mine.py:Raises": r"cannot be opened: RuntimeError\('no.*key'\) at .*mine.py:\d+",
    "mine.py:Ends": r"cannot be opened: SystemExit\(3\) at .*mine.py:\d+",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_sink_is_one_line(tmp_path, own, name):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UsageError, match=f"^--report_to={re.escape(f'{tmp_path}/{name}')}: .*{BAD[name]}") as caught:
        opened(f"{tmp_path}/{name}", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("print", "'print' is not tensorboard, wandb, trackio, mlflow, none or FILE.py:CLASS"),
        ("none,wandb", "none goes alone"),
        ("", "'' is not"),
        ("tensorboard,", "'' is not"),
        ("mine.py:", "'mine.py:' is not"),
        (":Own", "':Own' is not"),
    ],
)
def test_names_of_sinks_are_checked(flag, message):
    with pytest.raises(UsageError, match=f"^--report_to={flag}: {message}"):
        RunOptions(report_to=flag)


def test_sinks_are_named_once():
    assert RunOptions(report_to="wandb, tensorboard,wandb").sinks == ("wandb", "tensorboard")
    assert RunOptions(report_to="none").sinks == ()


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_an_extra_that_is_absent_or_broken_is_one_line(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=rf"^--report_to={name}: not installed; pip install 'minigrpo\[{name}\]'$"):
        find_sinks(RunOptions(report_to=name))
    monkeypatch.delitem(sys.modules, name)
    (tmp_path / f"{name}.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=f"^--report_to={name}: cannot be imported .*no_such_library"):
        find_sinks(RunOptions(report_to=name))


def test_a_sink_that_fails_is_named_once_and_the_run_goes_on(tmp_path, own):
    flag = f"{own}:Fails,{own}:Own,{own}:Exits,{own}:Plain"
    log = make(tmp_path, opened(flag, tmp_path))
    for step in (1, 2, 3):
        log.log(step, METRICS)
    log.close()
    warnings = [line for line in log.progress.stream.getvalue().splitlines() if line.startswith("warning")]
    wanted = [
        "warning: sink Exits failed at step 1: SystemExit(0)",
        r"warning: sink Fails failed at step 2: ValueError('no\nroute')",
        "warning: sink Plain failed at its end: OSError('cannot end')",
    ]
    assert [line.split(" at /")[0] for line in warnings] == wanted and "mine.py:" in warnings[1]
    assert [row[1] for row in logged(tmp_path / "own.jsonl") if row[0] == "log"] == [1, 2, 3]
    assert len(logged(tmp_path / "metrics.jsonl")) == 3


# Completions


def test_completions_are_text_in_tensorboard_and_a_block_in_the_terminal(tmp_path):
    said = []
    log = make(tmp_path, [TensorBoard(tmp_path, 0), Terminal(said.append, 1)])
    log.log_completions(1, ROWS)
    log.log_completions(2, [])
    log.log(2, METRICS)
    log.close()
    (text,) = [value for value in values(tmp_path / "tensorboard") if value.tag == "completions"]
    assert text.metadata.plugin_data.plugin_name == "text" and text.tensor.dtype == 7
    assert [size.size for size in text.tensor.tensor_shape.dim] == [1]
    shown = text.tensor.string_val[0].decode()
    assert all(line.startswith("    ") for line in shown.splitlines()) and "```b" in shown and "2+2" in shown
    assert said == [as_text(ROWS[:1])]
    assert said[0] == (
        '--- step 1  length 3\nprompt:\n    [{"role": "user", "content": "é|?"}]\ncompletion:\n    a\n    ```b'
    )
    assert as_text(ROWS[1:]).startswith(
        "--- step 1  reward 1.5  length 1  note n  rewards/answer 3\nprompt:\n    2+2\n"
    )


def test_more_completions_than_are_kept_cannot_be_printed():
    with pytest.raises(UsageError, match="^--print_completions=5: only --log_completions=4 are kept"):
        RunOptions(print_completions=5)


# Services, first as they are used, then the libraries themselves where installed


class Calls:
    """A library, of which every call is noted."""

    def __init__(self, **answers):
        self.calls, self.answers = [], answers

    def __getattr__(self, name):
        def call(*arguments, **named):
            self.calls.append((name, arguments, named))
            return self.answers.get(name)

        return call

    def of(self, name):
        return [(arguments, named) for called, arguments, named in self.calls if called == name]


def test_weights_and_biases_gets_a_table_per_step(tmp_path, monkeypatch):
    run = Calls()
    known = types.SimpleNamespace(project=None, run_name=None, root_dir="/")
    library = types.SimpleNamespace(
        errors=types.SimpleNamespace(Error=RuntimeError),
        setup=lambda: types.SimpleNamespace(settings=known),
        init=lambda **_: run,
        Table=lambda **given: given,
    )
    monkeypatch.setitem(sys.modules, "wandb", library)
    sink = Wandb(tmp_path, RunOptions(), {})
    sink.log_completions(3, ROWS)
    sink.log_completions(4, ROWS[1:])
    first, second = (arguments[0] for arguments, _ in run.of("log"))
    assert first["train/global_step"] == 3 and second["train/global_step"] == 4
    assert first["completions"]["columns"] == COLUMNS
    assert first["completions"]["data"][1] == [1, "2+2", "4", 1.5, 1, 3.0, "n"]
    assert first["completions"]["data"][0][1] == '[{"role": "user", "content": "é|?"}]'
    assert first["completions"] is not second["completions"]


def test_trackio_goes_on_under_its_name(tmp_path, monkeypatch):
    run = Calls()
    library = Calls(init=run, Table="table")
    monkeypatch.setitem(sys.modules, "trackio", library)
    for step in (1, 2):
        sink = Trackio(tmp_path, {"seed": 1})
        sink.log(step, {"loss": 1.0, "eval/accuracy": 0.5})
        sink.log_completions(step, ROWS)
        sink.close()
    first, second = (named for _, named in library.of("init"))
    assert first == second and first["resume"] == "allow" and first["config"] == {"seed": 1}
    assert re.fullmatch(f"{tmp_path.name}-[0-9a-f]{{4}}", first["name"]) and first["project"] == "minigrpo"
    assert run.of("log")[2] == (({"train/loss": 1.0, "eval/accuracy": 0.5},), {"step": 2})
    assert run.of("log")[1] == (({"completions": "table"},), {"step": 1})


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_the_real_mlflow_holds_metrics_and_tables_of_a_resumed_run(tmp_path, monkeypatch, quiet):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = {f"flag{number}": number for number in range(130)} | {"none": None}
    for step in (1, 2):
        sink = Mlflow(tmp_path, settings)
        sink.log(step, {"loss": 0.5 * step, "eval/pass@4": 1.0, "bad": float("nan")})
        sink.log_completions(step, ROWS)
        sink.close()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("minigrpo").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED" and run.info.run_name == tmp_path.name and len(run.data.params) == 131
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 1.0)]
    assert run.data.metrics["eval/pass_4"] == 1.0
    files = [item.path for item in client.list_artifacts(run.info.run_id, "completions")]
    assert files == ["completions/step-000001.json", "completions/step-000002.json"]
    table = json.loads(next((tmp_path / "mlflow" / "artifacts").rglob("step-000002.json")).read_text())
    assert table["columns"] == COLUMNS and table["data"][1][2] == "4"


@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_the_real_trackio_holds_a_resumed_run(tmp_path, monkeypatch, quiet):
    trackio = pytest.importorskip("trackio")
    for module in ("trackio", "trackio.utils", "trackio.sqlite_storage", "trackio.media.utils"):
        for name in ("TRACKIO_DIR", "MEDIA_DIR"):
            if hasattr(sys.modules.get(module), name):
                monkeypatch.setattr(sys.modules[module], name, tmp_path / "trackio")
    for step in (1, 2):
        sink = Trackio(tmp_path, {"seed": 1})
        sink.log(step, {"loss": 0.5 * step})
        sink.log_completions(step, ROWS)
        sink.close()
    (run,) = trackio.Api().runs("minigrpo")
    assert run.name == (tmp_path / "trackio_name.txt").read_text().strip()


@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_the_real_wandb_writes_a_table_offline(tmp_path, quiet):
    pytest.importorskip("wandb")
    for step in (1, 2):
        sink = Wandb(tmp_path, RunOptions(wandb_mode="offline"), {"seed": 1})
        sink.log(step, {"loss": 1.0})
        sink.log_completions(step, ROWS)
        sink.close()
    tables = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/completions*.json"))
    assert len(tables) == 2 and json.loads(tables[0].read_text())["columns"] == COLUMNS


# The Hub


class Hub(http.server.BaseHTTPRequestHandler):
    """A Hub on this machine: answers as huggingface.co's API does, notes what is asked, and refuses on request."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.act()

    def do_POST(self):
        self.act()

    def act(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.server.asked.append((path, body, self.headers.get("Authorization")))
        refused = next((status for part, status in self.server.refused.items() if part in path), None)
        answers = {
            "/api/whoami-v2": {"name": "me"},
            "/api/repos/create": {"url": f"{self.server.url}/me/model"},
            "/api/models/me/model/auth-check/write": {},
            "/api/models/me/model": {"id": "me/model", "private": self.server.private, "tags": [], "siblings": []},
            "/api/models/me/model/tree/main": self.server.there,
            "/api/validate-yaml": {"errors": [], "warnings": []},
            "/api/models/me/model/commit/main": {"commitUrl": f"{self.server.url}/me/model/commit/a", "commitOid": "a"}
            | {"pullRequestUrl": None},
        }
        if path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(body)["files"]]
            made = {"uploadMode": "regular", "shouldIgnore": False}
            answers[path] = {"files": [{"path": file} | made for file in files]}
        answer = answers.get(path) if refused is None else {"error": "because"}
        data = json.dumps({} if answer is None else answer).encode()
        self.send_response(refused or (404 if answer is None else 200))
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.refused, server.private, server.there = [], {}, False, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    server.server_close()


def committed(server):
    """Contents by path of everything committed, and paths deleted."""
    rows = [json.loads(line) for path, body, _ in server.asked if "/commit/" in path for line in body.splitlines()]
    files = {row["value"]["path"]: base64.b64decode(row["value"]["content"]) for row in rows if row["key"] == "file"}
    return files, [row["value"]["path"] for row in rows if row["key"] == "deletedFile"]


@pytest.fixture
def trained(tmp_path):
    """Folders as a LoRA run leaves them."""
    for name, text in {"final/README.md": "---\ntags: [a]\n---\n", "final/model.safetensors": "weights"}.items():
        (tmp_path / "run" / "final").mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
    (tmp_path / "run" / "adapter").mkdir()
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").write_text("adapters")
    return tmp_path / "run"


def test_a_model_is_uploaded_whole_and_old_weights_go(hub, trained):
    hub.there = [
        {"type": "file", "path": path, "size": 1, "oid": "a"}
        for path in (
            "model-00001-of-00002.safetensors",
            "model.safetensors",
            "model.safetensors.index.json",
            "notes.txt",
        )
    ]
    share.check_hub(RunOptions(push_to_hub="me/model"))
    assert share.push(trained, "me/model") == f"{hub.url}/me/model"
    files, deleted = committed(hub)
    assert files.keys() == {"README.md", "model.safetensors", "adapter/adapter_model.safetensors"}
    assert files["model.safetensors"] == b"weights"
    assert set(deleted) == {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    order = [path for path, _, _ in hub.asked]
    assert order.index("/api/whoami-v2") < order.index("/api/repos/create") < order.index("/api/validate-yaml")
    assert all(token == "Bearer hf_secret" for path, _, token in hub.asked if "/commit/" in path)


REFUSED = {
    "whoami": (401, "the token is not valid; set HF_TOKEN anew"),
    "repos/create": (403, "the token may not write there"),
    "auth-check": (403, "the token may not write there"),
    "api": (500, "the Hub answered 500"),
}


@pytest.mark.parametrize("place", REFUSED)
def test_a_repository_that_cannot_be_written_is_one_line_before_the_run(hub, place):
    status, message = REFUSED[place]
    hub.refused = {place: status} | ({"models/me/model": 404} if place == "repos/create" else {})
    with pytest.raises(UsageError, match=f"^--push_to_hub=me/model: {message}") as caught:
        share.check_hub(RunOptions(push_to_hub="me/model"))
    assert "\n" not in str(caught.value) and "hf_secret" not in str(caught.value)


def test_a_private_model_is_never_put_into_a_public_repository(hub):
    options = RunOptions(push_to_hub="me/model", hub_private=True)
    with pytest.raises(UsageError, match="^--hub_private: me/model exists and is public"):
        share.check_hub(options)
    hub.private = True
    share.check_hub(options)
    bodies = [json.loads(body) for path, body, _ in hub.asked if path == "/api/repos/create"]
    assert all(body.get("visibility") == "private" or body.get("private") for body in bodies)


def test_without_network_token_or_permission_to_use_it_nothing_starts(hub, monkeypatch):
    options = RunOptions(push_to_hub="me/model")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UsageError, match="^--push_to_hub=me/model: HF_HUB_OFFLINE is set; unset it"):
            share.check_hub(options)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "get_token", lambda: None)
        with pytest.raises(UsageError, match="^--push_to_hub=me/model: there is no token; set HF_TOKEN"):
            share.check_hub(options)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match="^--push_to_hub=me/model: the Hub gave no answer .ConnectError") as caught:
        share.check_hub(options)
    assert "\n" not in str(caught.value) and hub.asked == []


@pytest.mark.parametrize("name", ["model", "me/", "/model", "me/a/b", "me/a b", "me/../x", "https://x/me/a", "me/-a."])
def test_names_of_repositories_are_checked(name):
    with pytest.raises(UsageError, match=f"^--push_to_hub={re.escape(name)}: must be OWNER/NAME"):
        RunOptions(push_to_hub=name)


def test_privacy_without_an_upload_is_refused():
    with pytest.raises(UsageError, match="^--hub_private: nothing is uploaded"):
        RunOptions(hub_private=True)


@pytest.mark.parametrize("name", ["me/model", "My-Org/Qwen2.5-0.5B_grpo", "a1/b"])
def test_good_names_of_repositories_are_the_hubs(name):
    validate_repo_id(name)
    assert RunOptions(push_to_hub=name).push_to_hub == name


def test_an_upload_that_fails_is_one_line_with_the_command_for_later(hub, trained):
    hub.refused = {"/commit/": 403}
    spaced = trained.rename(trained.with_name("my run"))
    log = make(spaced, [])
    with pytest.raises(UsageError, match="^--push_to_hub=me/model: the upload failed: the token may not") as caught:
        train.upload(log, "me/model")
    text = str(caught.value)
    assert (
        "\n" not in text and f"hf upload me/model '{spaced}/final' . && hf upload me/model '{spaced}/adapter'" in text
    )
    hub.asked.clear()
    share.check_hub(RunOptions())
    assert hub.asked == []


# A run with all of it


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished LoRA run of two steps with a user's own sink, completions printed, evaluated."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "mine.py").write_text(OWN)
    flags = [
        "--batch_size=4", "--num_generations=4", "--max_completion_length=32", "--max_steps=2", "--lora_rank=4",
        "--eval_steps=2", "--eval_size=8", f"--report_to=tensorboard,{folder}/mine.py:Own", "--print_completions=2",
        f"--output_dir={folder}/run",
    ]  # fmt: skip
    assert train.main(parse_flags(flags, train.SECTIONS)) == 0
    return folder / "run"


def test_a_run_shows_completions_and_tells_its_sinks(run_folder):
    text = (run_folder / "train.log").read_text()
    assert text.count("--- step 1 ") == 2 and text.count("--- step 2 ") == 2 and "completion:\n    " in text
    rows = logged(run_folder / "own.jsonl")
    assert [row[:2] for row in rows[1:]] == [
        ["log", 0], ["log", 1], ["completions", 1], ["log", 2], ["completions", 2], ["log", 2], ["close"],
    ]  # fmt: skip
    written = [row for row in logged(run_folder / "completions.jsonl") if row["step"] == 1]
    assert rows[0][1]["max_steps"] == 2 and len(rows[3][2]) == len(written) >= 4
    by_token = {name for name, value in written[0].items() if isinstance(value, list) and name != "prompt"}
    assert {"tokens", "logprobs", "policy_logprobs", "entropy", "clipped"} <= by_token
    assert not by_token & rows[3][2][0].keys() and "entropy" not in text.partition("--- step 1 ")[2].splitlines()[0]


def card_of(run):
    text = (run / "final" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_says_what_the_run_was(run_folder):
    front, body = card_of(run_folder)
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["grpo", "minigrpo"]}
    row = logged(run_folder / "evaluations.jsonl")[-1]
    share_right, half = row["accuracy"], 1.96
    middle = (share_right + half**2 / 16) / (1 + half**2 / 8)  # Wilson's, of 8 problems
    spread = half / (1 + half**2 / 8) * (share_right * (1 - share_right) / 8 + half**2 / 256) ** 0.5
    interval = f"95 % interval {middle - spread:.1%} to {middle + spread:.1%}"
    assert f"{share_right:.1%} ({interval}) after 2 steps" in body and "after 0 steps" in body
    assert "on 8 held-out problems of builtin:arithmetic" in body and "`builtin:tiny`" in body
    assert "--lora_rank=4" in body and "--num_generations=4" in body and "Mean reward: " in body
    assert str(run_folder.parent) not in body and "output_dir" not in body and "mine.py" not in body
    for name in re.findall(r"!\[.+?\]\((.+?)\)", body):
        assert (run_folder / "final" / name).read_bytes().startswith(b"\x89PNG")
    assert body.count("![") == 2 and "vllm serve path/to/final" in body and "in PEFT's format" in body


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_the_cards_example_runs(run_folder, capsys):
    pytest.importorskip("transformers")
    code = re.search(r"```python\n(.*?)```", card_of(run_folder)[1], re.DOTALL)[1]
    exec(
        code.replace('"path/to/final"', repr(str(run_folder / "final"))).replace(
            "max_new_tokens=32", "max_new_tokens=4"
        )
    )
    assert "assistant" in capsys.readouterr().out


def settings_of(**sections):
    return Settings(**sections, sections=("model", "data", "rewards", "rollout", "run"))


def test_a_card_names_the_hubs_models_and_data_and_nobodys_folders(tmp_path):
    for name in ("final", "adapter", "report"):
        (tmp_path / name).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 8}')
    summary = {"steps": 7, "tokens": 1234567.0, "hours": 2.5, "reward": {"first": 0.5, "last": 1.0}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    settings = settings_of(
        data=DataOptions(dataset="gsm8k", system_prompt='Think.\n"Well".'),
        rewards=RewardOptions(reward="/home/me/secret/mine.py:brevity*0.5,answer"),
        run=RunOptions(push_to_hub="me/model", output_dir="/home/me/secret/run"),
    )
    share.write_card(tmp_path, settings, "Qwen/Qwen3-1.7B")
    front, body = card_of(tmp_path)
    assert front["base_model"] == "Qwen/Qwen3-1.7B" and front["datasets"] == ["openai/gsm8k"]
    huggingface_hub.ModelCard.load(tmp_path / "final" / "README.md")
    assert "[openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k)" in body and "/home" not in body
    assert "`mine.py:brevity*0.5,answer`" in body and "not measured" in body and "1,234,567 tokens in 2.5 hours" in body
    assert 'model="me/model"' in body and "vllm serve me/model" in body and "![" not in body
    assert 'generator("What is 12 times 7?",' in body  # no chat template there
    assert "elsewhere PEFT cannot find it" not in body
    (tmp_path / "final" / "chat_template.jinja").write_text("{{ messages }}")
    share.write_card(tmp_path, settings, str(tmp_path))
    front, body = card_of(tmp_path)
    assert "base_model" not in front and "elsewhere PEFT cannot find it" in body
    assert r'[{"role": "system", "content": "Think.\n\"Well\"."}, {"role": "user"' in body and "/tmp" not in body


def test_the_card_of_scored_responses_has_their_margin(tmp_path):
    (tmp_path / "final").mkdir()
    summary = {"steps": 7, "tokens": 5.0, "hours": 0.01, "reward": {"first": 0.5, "last": 0.5}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    rows = [{"step": 0, "margin": -0.0127}, {"step": 45, "margin": 0.0057}]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    share.write_card(tmp_path, settings_of(data=DataOptions(offline=True, dataset="rows.jsonl")), "builtin:tiny")
    _, body = card_of(tmp_path)
    assert "-0.0127 after 0 steps; 0.0057 after 45 steps" in body and "on scored responses" in body
    assert "`rows.jsonl`" in body and "Mean reward" not in body and "accuracy" not in body


# What serves the model


def faults_for_servers(folder):
    """What vLLM and SGLang would stumble over, by their documented rules."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    index_file = folder / "model.safetensors.index.json"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    held = {}
    for file in files:
        with safe_open(folder / file, framework="numpy") as tensors:
            held |= dict.fromkeys(tensors.keys(), file)
            kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}
    index = json.loads(index_file.read_text()) if index_file.exists() else {"weight_map": held}
    template = tokenizer.get("chat_template") or (folder / "chat_template.jinja").exists()
    checks = {
        "architectures": config["architectures"] in (["Qwen3ForCausalLM"], ["Qwen2ForCausalLM"]),
        "model_type": config["model_type"] == config["architectures"][0].removesuffix("ForCausalLM").lower(),
        "dtype": (config.get("dtype") or config["torch_dtype"], kinds) in
            [("bfloat16", {"BF16"}), ("float32", {"F32"})],
        "length": config["max_position_embeddings"] > 0,
        "ends": ends and all(0 <= end < config["vocab_size"] for end in np.atleast_1d(ends)),
        "template": bool(template),
        "index": index["weight_map"] == held,
        "size": not index_file.exists() or index["metadata"]["total_size"] > 0,
        "names": files == ["model.safetensors"]
            or all(re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name) for name in files),
        "one of both": not (index_file.exists() and "model.safetensors" in files),
        "tokenizer": (folder / "tokenizer.json").exists(),
        "readable": all(path.stat().st_mode & 0o444 == 0o444 for path in folder.iterdir()),
    }  # fmt: skip
    return [name for name, good in checks.items() if not good]


def test_a_trained_model_is_what_vllm_and_sglang_expect(run_folder):
    assert faults_for_servers(run_folder / "final") == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_in_several_files_is_too(tiny_params, tiny_config, tmp_path, monkeypatch, dtype):
    import ml_dtypes

    monkeypatch.setattr("minigrpo.model.weights.SHARD_BYTES", 20_000)
    kind = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[dtype]
    export(tmp_path / "model", BUILTIN, tiny_params, tiny_config, (1, 2), kind)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    assert faults_for_servers(tmp_path / "model") == []
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    sizes = 0
    for path in (tmp_path / "model").glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            sizes += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())
    assert index["metadata"]["total_size"] == sizes


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_peft_finds_the_base_of_a_run_on_the_builtin_model(run_folder):
    peft = pytest.importorskip("peft")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(run_folder / "adapter")
    assert model.peft_config["default"].base_model_name_or_path == str(BUILTIN)


@pytest.mark.parametrize(("template", "given", "written"), [(None, "auto", True), ("{{ messages }}", "auto", False)])
def test_a_template_that_training_supplied_goes_along(tmp_path, template, given, written):
    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((BUILTIN / name).read_bytes())
    tokens = json.loads((BUILTIN / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens))
    tokenizer = load_tokenizer(tmp_path, False, given, False, tmp_path)
    built = types.SimpleNamespace(
        settings=types.SimpleNamespace(data=DataOptions(chat_template=given)),
        source=types.SimpleNamespace(tokenizer_folder=tmp_path),
        tokenizer=tokenizer,
    )
    found = Build.own_template.fget(built)
    assert (found is not None) == written and (not written or "<|im_start|>" in found)
