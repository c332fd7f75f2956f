"""The main job as a person runs it: end to end, twice, killed and resumed, and with bad input."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

from minigrpo import train
from minigrpo.command_line import parse_flags
from minigrpo.config import Settings, UsageError, check_limits, section_types
from minigrpo.runtime.run_folder import TIMINGS

SMALL = (
    "--batch_size=4",
    "--num_generations=4",
    "--max_completion_length=40",
    "--save_steps=2",
    "--report_to=none",
    "--eval_steps=0",
)


def command(*flags, module="train"):
    return [sys.executable, "-W", "error", "-m", f"minigrpo.{module}", *flags]


def run(*flags, module="train", timeout=300, **env):
    env = os.environ | {"HF_HUB_OFFLINE": "1"} | env
    env.pop("JAX_PLATFORMS", None)
    return subprocess.run(
        command(*flags, module=module), cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )


def metrics(folder):
    """The run's metrics without those that measure the machine."""
    rows = [json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMINGS)} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of 6 steps on a 4,2 mesh, with a reference model."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    flags = (*SMALL, "--mesh=4,2", "--max_steps=6", "--beta=0.04", "--num_iterations=2")
    result = run(*flags, f"--output_dir={folder}")
    assert result.returncode == 0, result.stderr[-2000:]
    return folder, flags, result


def test_the_main_job_runs_and_reports(finished):
    folder, _, result = finished
    lines = [line for line in result.stderr.splitlines() if line.startswith("step ")]
    assert len(lines) == 6 and all("reward" in line and "tok/s" in line for line in lines)
    assert "Traceback" not in result.stderr and "WARNING" not in result.stderr
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert np.isfinite(list(row.values())).all()
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
    assert all(row["kl"] > 0 for row in rows)
    samples = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert len(samples) == 6 * (4 + 3)  # the whole group of a step's first prompt, one completion of each other
    assert {"step", "prompt", "completion", "reward"} <= set(samples[0])


def test_the_run_folder_holds_what_is_promised(finished):
    folder, _, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "flags.txt", "metrics.jsonl", "completions.jsonl", "checkpoints", "final"} <= names
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["4", "6"]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {
        path.name for path in (folder / "final").iterdir()
    }
    assert json.loads((folder / "config.json").read_text())["learning_rate"] > 0
    assert json.loads((folder / "final" / "config.json").read_text())["torch_dtype"] == "float32"  # as it computes
    first = json.loads((folder / "completions.jsonl").read_text().splitlines()[0])
    numbers = {"logprobs", "policy_logprobs", "ref_logprobs", "entropy", "clipped"}
    assert {len(first[name]) for name in numbers} == {len(first["tokens"])} and min(first["entropy"]) >= 0


def test_the_final_model_evaluates(finished):
    folder, _, _ = finished
    flags = (f"--model={folder}/final", "--dataset=builtin:arithmetic", "--eval_size=40", "--max_completion_length=64")
    result = run(*flags, "--page_size=16", module="evaluate")
    assert result.returncode == 0, result.stderr[-2000:]
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["problems"] == 40 and 0.2 < answer["accuracy"] < 0.8


def test_a_run_folder_reruns_itself_identically(finished, tmp_path):
    folder, _, _ = finished
    result = run(f"--flagfile={folder}/flags.txt", f"--output_dir={tmp_path}/again")
    assert result.returncode == 0, result.stderr[-2000:]
    assert metrics(tmp_path / "again") == metrics(folder)


def wait_for_step(folder, step, process):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step}: {process.communicate()[1][-2000:]}")


def test_killed_and_resumed_equals_uninterrupted(finished, tmp_path):
    folder, flags, _ = finished
    target = tmp_path / "killed"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    process = subprocess.Popen(
        command(*flags, f"--output_dir={target}", "--offload_optimizer=true"),
        cwd=ROOT,
        env=env,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    wait_for_step(target, 5, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (target / "final").exists()
    own = {"JAX_COMPILATION_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path)}
    result = run(*flags, f"--output_dir={target}", "--resume", "--offload_optimizer=true", **own)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "resumed after step" in result.stderr and list((tmp_path / "minigrpo" / "programs").glob("*-atime"))
    assert metrics(target) == metrics(folder)
    want, got = (path / "final" / "model.safetensors" for path in (folder, target))
    assert want.read_bytes() == got.read_bytes()


def test_a_torn_checkpoint_is_named_and_the_one_before_used(finished, tmp_path):
    folder, flags, _ = finished
    copy = tmp_path / "torn"
    shutil.copytree(folder, copy)
    damage(copy / "checkpoints" / "6")
    result = run(*flags, f"--output_dir={copy}", "--resume")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "checkpoints/6 is not usable" in result.stderr and "resumed after step 4" in result.stderr
    assert metrics(copy) == metrics(folder)


def damage(step):
    for path in step.rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:100])


def write_checkpoint(folder, **changes):
    shutil.copytree(ROOT / "minigrpo" / "builtin", folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


ARITHMETIC = "--dataset=builtin:arithmetic"
SHORT = (ARITHMETIC, "--max_completion_length=64")


def bad_inputs(tmp_path):
    other = write_checkpoint(tmp_path / "llama", model_type="llama")
    wide = write_checkpoint(tmp_path / "wide", hidden_size=256)
    torn = write_checkpoint(tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:5000])
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "answer": "1"}\n{oops\n')
    (tmp_path / "fine.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n')
    (tmp_path / "columns.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "file").write_text("not a folder")
    return {
        "unknown flag": (["--learning_rat=1"], "--learning_rat: no such flag; did you mean --learning_rate?"),
        "not a number": (["--max_steps=ten"], "--max_steps=ten: must be a whole number"),
        "infinite": (["--num_epochs=inf"], "--num_epochs=inf: must be a finite number"),
        "decay": (["--adam_b1=1"], "--adam_b1=1.0: must be less than 1.0"),
        "own folder": ([f"--output_dir={other}"], "llama: is not empty; name a new folder"),
        "held out": (
            ["--eval_steps=1", "--eval_dataset=no.jsonl"],
            "--eval_dataset=no.jsonl: cannot be read",
        ),
        "stray word": (["10"], "unexpected argument '10'"),
        "no test split": (
            ["--eval_steps=5", f"--dataset={tmp_path}/fine.jsonl"],
            "fine.jsonl has no test split; name one",
        ),
        "zero length": (["--max_completion_length=0"], "--max_completion_length=0: must be at least 1"),
        "endless": (
            ["--max_completion_length=99999999999"],
            "--max_completion_length=99999999999: must be at most 1048576",
        ),
        "page": (["--page_size=1000000"], "--page_size=1000000: must be at most 4096"),
        "greedy": (["--temperature=0"], "--temperature=0: greedy completions"),
        "k1": (["--kl_estimator=k1"], "--kl_estimator=k1: as a loss its expected gradient is zero"),
        "cispo": (["--loss_type=cispo"], "--loss_type=cispo: needs --epsilon_high"),
        "bad mesh": (["--mesh=4x2"], "--mesh=4x2: must be two positive whole numbers"),
        "heads": (["--mesh=1,8"], "tp=8 does not divide the model's 4 attention heads"),
        "accumulation": (["--gradient_accumulation_steps=some"], "--gradient_accumulation_steps=some: must be auto or"),
        "architecture": ([f"--model={other}", ARITHMETIC], "model_type 'llama' is not supported"),
        "shapes": (
            [f"--model={wide}", ARITHMETIC, *SHORT],
            "model.embed_tokens.weight has shape [512, 128], not [512, 256]",
        ),
        "truncated": (
            [f"--model={torn}", ARITHMETIC, *SHORT],
            "torn/model.safetensors: not a complete safetensors file",
        ),
        "no weights": ([f"--model={tmp_path}"], f"{tmp_path}/config.json: not a readable config.json"),
        "hub": (["--model=Qwen/Nowhere"], "--model=Qwen/Nowhere: not in the Hub cache"),
        "hub data": (["--dataset=gsm8k"], "--dataset=gsm8k: "),
        "not json": ([f"--dataset={tmp_path}/broken.jsonl"], "broken.jsonl:2: not JSON"),
        "columns": ([f"--dataset={tmp_path}/columns.jsonl"], "no column prompt or question or problem"),
        "empty": ([f"--dataset={tmp_path}/empty.jsonl"], "the file has no rows"),
        "too long": (["--max_prompt_length=2"], "--max_prompt_length=2: every prompt of builtin:arithmetic is longer"),
        "reward": (["--reward=niceness"], "--reward=niceness: no such reward"),
        "reward's file alone": (
            ["--reward=mine.py"],
            "--reward=mine.py: name the function too, as in mine.py:FUNCTION",
        ),
        "penalty": (["--overlong_penalty=0.5"], "--overlong_penalty=0.5: means nothing without --overlong_buffer"),
        "cap": (["--rollout_correction_cap=3"], "=3.0: means nothing without --rollout_correction"),
        "resamples": (["--max_resamples=9"], "--max_resamples=9: means nothing without --zero_std_groups=resample"),
        "mixture": (["--ref_mixup_alpha=0.5"], "--ref_mixup_alpha=0.5: means nothing without --sync_ref_steps"),
        "wandb": (["--wandb_mode=offline"], "--wandb_mode=offline: means nothing without --report_to=wandb"),
        "output": ([f"--output_dir={tmp_path}/file/run"], f"--output_dir={tmp_path}/file/run: cannot be written"),
        "nothing to resume": (["--resume", f"--output_dir={tmp_path}/none"], "holds no run"),
        "resume what": (["--resume"], "--resume: name the run to continue with --output_dir"),
    }


def test_bad_input_is_one_clear_line(tmp_path):
    """Every mistake: one line that says what and where, and nothing written."""
    cases = bad_inputs(tmp_path)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for name, (flags, message) in cases.items():
        named = any(flag.startswith("--output_dir") or flag == "--resume" for flag in flags)
        extra = [] if named else [f"--output_dir={tmp_path}/run"]
        with pytest.raises(UsageError) as caught:
            train.main(parse_flags([*flags, *extra, "--max_steps=1"], train.SECTIONS))
        assert message in str(caught.value) and "\n" not in str(caught.value), (name, str(caught.value))
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before, name


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", "x", "--batch_size='x': must be a whole number"),
        ("batch_size", 1.5, "--batch_size=1.5: must be a whole number"),
        ("learning_rate", True, "--learning_rate=True: must be a number"),
        ("learning_rate", [], "--learning_rate=[]: must be a number"),
        ("epsilon_high", "x", "--epsilon_high='x': must be a number"),
        ("model", 5, "--model=5: must be text"),
        ("enable_thinking", 1, "--enable_thinking=1: must be true or false"),
        ("batch_size", 0, "--batch_size=0: must be at least 1"),
    ],
)
def test_settings_of_the_wrong_kind_are_named(name, value, message):
    """As a config.json may have them; the type checker of the tests would refuse to build the options themselves."""
    sections = section_types(train.SECTIONS, Settings).values()
    field = next(one for section in sections for one in dataclasses.fields(section) if one.name == name)
    with pytest.raises(UsageError) as caught:
        check_limits(field, value)
    assert str(caught.value).startswith(message)


def test_a_runs_settings_of_the_wrong_kind_name_the_file(tmp_path):
    (tmp_path / "config.json").write_text('{"batch_size": "x"}')
    result = run("--resume", f"--output_dir={tmp_path}")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"error: {tmp_path}/config.json: --batch_size='x': must be a whole number; mend the file" in result.stderr


def test_bad_input_ends_a_command_with_one_line_and_code_2(tmp_path):
    result = run("--mesh=3,1", f"--output_dir={tmp_path}/run")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "fsdp=3 does not divide the model's 128 hidden_size" in errors[0]


def test_a_missing_file_of_the_package_is_a_bug_and_not_the_users(monkeypatch):
    from minigrpo import command_line

    def broken(settings):
        open(ROOT / "minigrpo" / "no_such.json")

    monkeypatch.setattr("sys.argv", ["train"])
    with pytest.raises(FileNotFoundError):
        command_line.run_command("x", "", ("run",), broken)


def test_another_run_is_not_resumed_or_overwritten(finished):
    folder, flags, _ = finished
    before = (folder / "metrics.jsonl").read_bytes()
    result = run(*flags, f"--output_dir={folder}", "--resume", "--learning_rate=1")
    assert result.returncode == 2 and "is another run; it differs in --learning_rate=1.0 (was" in result.stderr
    result = run(*flags, f"--output_dir={folder}")
    assert result.returncode == 2 and "holds a run already" in result.stderr
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_another_loss_trains_too(tmp_path):
    loss = ("--loss_type=cispo", "--epsilon_high=5", "--rollout_correction=token", "--mask_truncated_completions")
    rewards = ("--baseline=rloo", "--normalize_rewards=each", "--reward=answer,tag_count*0.5")
    flags = (
        *SMALL,
        "--max_completion_length=96",
        *loss,
        *rewards,
        "--num_iterations=2",
        "--remat=attention",
        "--max_steps=2",
        "--mesh=2,1",
    )
    result = run(*flags, f"--output_dir={tmp_path}/run")
    assert result.returncode == 0, result.stderr[-2000:]
    rows = metrics(tmp_path / "run")
    assert len(rows) == 2 and all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)


def test_a_run_that_blew_up_saves_its_batch_and_ends(tmp_path):
    """A step of 1e30 leaves weights whose gradients overflow: the next step that has any ends the run."""
    flags = (*SMALL, "--learning_rate=1e30", "--max_steps=9", "--max_skipped_steps=1", "--mesh=2,1")
    result = run(*flags, f"--output_dir={tmp_path}/run")
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-2000:]
    assert "--max_skipped_steps=1: the loss or gradient of 1 steps in a row was not finite" in result.stderr
    rows = metrics(tmp_path / "run")
    assert 1 < len(rows) < 9 and [row["skipped_updates"] for row in rows] == [0] * (len(rows) - 1) + [1]
    saved = np.load(tmp_path / "run" / f"not-finite-step-{len(rows)}.npz")
    assert saved["completions"].shape[0] == 16 and "ref_logprobs" not in saved


def test_a_run_whose_checkpoints_are_gone_is_not_started_over(tmp_path):
    flags = (*SMALL, "--num_epochs=0.0008", "--mesh=1,1", f"--output_dir={tmp_path}/run")
    first = run(*flags)
    assert first.returncode == 0 and "done: 2 steps" in first.stderr, first.stderr[-2000:]
    before = metrics(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    result = run("--resume", f"--output_dir={tmp_path}/run")
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-2000:]
    assert metrics(tmp_path / "run") == before


def test_a_command_of_a_single_word_is_refused_with_the_right_one():
    for word, wanted in (("train", "train"), ("learn", "COMMAND")):
        command = [sys.executable, "-m", "minigrpo", word, "--max_steps=1"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert result.returncode == 2 and not result.stdout
        assert result.stderr == f"error: {word}: commands are written python -m minigrpo.{wanted}\n"


def test_output_that_nobody_reads_is_no_traceback():
    command = [sys.executable, "-m", "minigrpo.check", "--model=builtin:tiny"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert "Traceback" not in process.stderr.read() and process.wait(60) == 141


@pytest.mark.parametrize("module", ["train", "sft", "evaluate", "plan", "tiny"])
def test_help_is_readable(module):
    result = run("--help", module=module)
    assert result.returncode == 0 and result.stderr == ""
    assert f"usage: python -m minigrpo.{module}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 140
