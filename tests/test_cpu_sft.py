"""Supervised training as a run: what it learns, writes and measures, and how it stops and goes on."""

import json
import math
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file, save_file

from minigrpo import sft
from minigrpo.command_line import parse_flags
from minigrpo.config import UsageError
from minigrpo.runtime.run_folder import TIMINGS
from minigrpo.runtime.signals import EXIT_STOPPED, STOP

ROWS = [{"prompt": "say " * (1 + n % 7), "completion": "yes " * (1 + n % 11)} for n in range(30)]
SMALL = ("--model=builtin:tiny", "--mesh=2,1", "--batch_size=4", "--max_completion_length=48", "--report_to=none")
STEPS = ("--learning_rate=1e-3", "--max_steps=6", "--save_steps=2", "--eval_steps=3", "--keep_best=-eval/loss")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_rows(path):
    """A JSONL file without what measures the machine."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMINGS)} for row in rows]


def run(*flags):
    return sft.main(parse_flags([*flags], sft.SECTIONS))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 6 steps with evaluation, its flags, and what it said."""
    folder = tmp_path_factory.mktemp("sft")
    data = write_rows(folder / "rows.jsonl", ROWS), write_rows(folder / "held.jsonl", ROWS[:6])
    flags = (*SMALL, *STEPS, f"--dataset={data[0]}", f"--eval_dataset={data[1]}")
    assert run(*flags, f"--output_dir={folder}/whole") == 0
    return folder / "whole", flags


def test_the_run_learns_and_compiles_each_program_once(whole):
    folder, _ = whole
    losses = [row["loss"] for row in read_rows(folder / "metrics.jsonl")]
    held = [row["loss"] for row in read_rows(folder / "evaluations.jsonl")]
    assert len(losses) == 6 and losses[-1] < 0.7 * losses[0] and held[-1] < 0.7 * held[0]
    log = (folder / "train.log").read_text()
    assert "compiled: batch_loss 1, gradients 1, apply_gradients 1\n" in log


def test_the_run_folder_holds_what_other_commands_read(whole):
    folder, _ = whole
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "flags.txt", "metrics.jsonl", "evaluations.jsonl", "train.log", "report.html"} <= names
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["4", "6"]
    assert (folder / "final" / "model.safetensors").exists() and not (folder / "adapter").exists()
    assert {path.stem for path in (folder / "report").iterdir()} >= {"loss", "progress", "learning_rate", "grad_norm"}
    lines = (folder / "train.log").read_text().splitlines()
    assert sum(line.startswith("step ") and "  loss " in line and " tok/s  " in line for line in lines) == 6
    measured = [line.partition(": held out: loss")[0] for line in lines if ": held out: loss" in line]
    assert measured == ["step 0", "step 3", "step 6"]
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    present = {"loss", "learning_rate", "grad_norm", "entropy", "epoch", "num_tokens", "step_time"}
    assert present | {"tokens_per_second", "skipped_updates"} <= row.keys()
    assert row["epoch"] == 6 * 4 / len(ROWS)
    samples = read_rows(folder / "completions.jsonl")
    assert len(samples) == 6 * 4 and all(sample["completion"].startswith("yes") for sample in samples)


def test_the_held_out_loss_is_that_of_the_whole_softmax(whole):
    """By one forward pass per row over whole logits, without packing, tiles or padding."""
    from conftest import forward

    from minigrpo.build import build

    folder, _ = whole
    built = build(parse_flags([f"--model={folder}/checkpoints/6", "--mesh=1,1"], sft.SECTIONS), "1,1")
    texts = [f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n" for row in ROWS[:6]]
    prompts = built.tokenizer.encode(texts)
    completions = [
        [*ids, built.tokenizer.end_of_turn] for ids in built.tokenizer.encode(["yes " * n for n in range(1, 7)])
    ]
    sequences = [[*prompt, *own] for prompt, own in zip(prompts, completions, strict=True)]
    width = max(map(len, sequences))
    padded = [ids + [0] * (width - len(ids)) for ids in sequences]
    logits = np.asarray(forward(built.spec.config, built.load(), padded), np.float64)[..., : built.spec.num_tokens]
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    own = [
        logprobs[row, at - 1, ids[at]] for row, ids in enumerate(sequences) for at in range(len(prompts[row]), len(ids))
    ]
    last = read_rows(folder / "evaluations.jsonl")[-1]
    assert last["rows"] == 6 and last["tokens"] == len(own)
    assert math.isclose(last["loss"], -np.mean(own), rel_tol=1e-5)


class Killed(BaseException):
    """The end of the process, as far as a run can tell."""


def interrupt_at(monkeypatch, step, act):
    """Let something happen when update number `step` has been made, once."""
    real, made = sft.update, []

    def update(*arguments):
        made.append(1)
        result = real(*arguments)
        if len(made) == step:
            act()
        return result

    monkeypatch.setattr(sft, "update", update)


def kill():
    raise Killed


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_an_interrupted_run_goes_on_bit_for_bit(whole, tmp_path, monkeypatch, capsys, end):
    folder, flags = whole
    interrupt_at(monkeypatch, 4 if end == "killed" else 5, kill if end == "killed" else STOP.asked.set)
    if end == "killed":
        with pytest.raises(Killed):
            run(*flags, f"--output_dir={tmp_path}/run")
    else:
        assert run(*flags, f"--output_dir={tmp_path}/run") == EXIT_STOPPED
        assert f"stopped after step 5; continue with --resume --output_dir={tmp_path}/run" in capsys.readouterr().err
    assert not (tmp_path / "run" / "final").exists()
    assert run("--resume", f"--output_dir={tmp_path}/run") == 0
    resumed = re.search(r"resumed after step (\d)", capsys.readouterr().err)
    assert int(resumed[1]) in ({2, 3} if end == "killed" else {5})  # 3 is the best by its evaluation
    for name in ("metrics.jsonl", "evaluations.jsonl", "completions.jsonl"):
        assert read_rows(tmp_path / "run" / name) == read_rows(folder / name), name
    ours, theirs = (load_file(path / "final" / "model.safetensors") for path in (tmp_path / "run", folder))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("step", [0, 4])
def test_an_evaluation_that_a_stop_cuts_off_is_made_later(whole, tmp_path, monkeypatch, capfd, step):
    folder, flags = whole
    real, exits = sft.held_out_loss, []
    monkeypatch.setattr(STOP, "exit", exits.append)

    def cut_off(*arguments):
        if not step or (tmp_path / "run/metrics.jsonl").exists():
            STOP.hear(signal.SIGTERM)
            while not exits:
                time.sleep(0.01)
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(sft, "held_out_loss", cut_off)
    with pytest.raises(Killed):
        run(*flags, "--eval_steps=4", "--keep_best=", f"--output_dir={tmp_path}/run")
    assert exits == [EXIT_STOPPED] and f"stopped after step {step}, which is saved" in capfd.readouterr().err
    monkeypatch.setattr(sft, "held_out_loss", real)
    assert run("--resume", f"--output_dir={tmp_path}/run") == 0
    measured, whole_run = (read_rows(path / "evaluations.jsonl") for path in (tmp_path / "run", folder))
    assert [row["step"] for row in measured] == [0, 4, 6] and measured[2] == whole_run[2]
    assert read_rows(tmp_path / "run/metrics.jsonl") == read_rows(folder / "metrics.jsonl")


def test_adapters_are_trained_and_written_alone_and_merged(whole, tmp_path):
    _, flags = whole
    more = ("--lora_rank=4", "--lora_dropout=0.1", "--max_steps=2", "--save_steps=0")
    assert run(*flags, *more, f"--output_dir={tmp_path}/run") == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    merged = load_file(tmp_path / "run" / "final" / "model.safetensors")
    base = load_file(ROOT / "minigrpo" / "builtin" / "model.safetensors")
    assert merged.keys() == base.keys()
    moved = {name for name in base if not np.array_equal(merged[name], base[name])}
    assert len(moved) == 4 * 7 and not any("norm" in name or "embed" in name for name in moved)


def huge_model(folder):
    """The built-in model with norms that overflow every loss."""
    shutil.copytree(ROOT / "minigrpo" / "builtin", folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    norm = tensors["model.norm.weight"]
    save_file(tensors | {"model.norm.weight": np.full_like(norm, 3e38)}, weights)
    return folder


@pytest.mark.parametrize(("limit", "message"), [(5, "every update was not finite"), (2, "--max_skipped_steps=2: ")])
def test_updates_that_are_not_finite_end_the_run(whole, tmp_path, limit, message):
    _, flags = whole
    own = [flag for flag in flags if not flag.startswith(("--model", "--eval", "--keep", "--max_steps"))]
    more = (f"--model={huge_model(tmp_path / 'huge')}", "--max_steps=2", f"--max_skipped_steps={limit}")
    with pytest.raises(UsageError, match=message):
        run(*own, *more, f"--output_dir={tmp_path}/run")
    assert not (tmp_path / "run" / "final").exists()
    assert [row["skipped_updates"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 1]
    assert (tmp_path / "run" / "not-finite-step-2.npz").exists() == (limit == 2)


BAD = {
    "no test split": (("--eval_steps=1",), "--eval_steps=1: .* has no test split; name one with --eval_dataset"),
    "held out": (("--eval_steps=1", "--eval_dataset=no.jsonl"), "--eval_dataset=no.jsonl: cannot be read"),
    "best": (("--keep_best=-eval/loss",), "--keep_best=-eval/loss: nothing is evaluated; set --eval_steps"),
    "offline": (("--offline",), "--offline: means nothing here; python -m minigrpo.train"),
    "int8": (("--quantize=int8",), "--quantize=int8: freezes the base weights"),
    "dropout": (("--packing=true", "--lora_rank=2", "--lora_dropout=0.1"), "--packing=true: not with --lora_dropout"),
    "accumulation": (("--gradient_accumulation_steps=0",), "--gradient_accumulation_steps=0: must be auto or"),
    "too long": (("--max_completion_length=1",), "--max_completion_length=1: every completion of .* is longer"),
    "resume what": (("--resume",), "--resume: name the run to continue with --output_dir"),
    "gone flag": (("--log_steps=1",), "--log_steps: no such flag; did you mean --logging_steps?"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_flags_are_one_line_and_write_nothing(tmp_path, name):
    flags, message = BAD[name]
    place = () if name == "resume what" else (f"--output_dir={tmp_path}/run",)
    data = write_rows(tmp_path / "rows.jsonl", ROWS[:3])
    with pytest.raises(UsageError, match=message) as caught:
        run("--model=builtin:tiny", "--mesh=1,1", f"--dataset={data}", *flags, *place)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(whole, tmp_path):
    folder, flags = whole
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty; name a new folder"):
        run(*flags, f"--output_dir={tmp_path}")
    with pytest.raises(UsageError, match="holds a run already; name another folder, or continue it with --resume"):
        run(*flags, f"--output_dir={folder}")
    with pytest.raises(UsageError, match="is another run; it differs in --learning_rate=0.5"):
        run("--resume", f"--output_dir={folder}", "--learning_rate=0.5")
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("own", ["sft", "train"])
def test_a_run_is_continued_by_the_command_that_began_it(tmp_path, own):
    from minigrpo import train

    commands = {"sft": sft, "train": train}
    values = parse_flags([], commands.pop(own).SECTIONS).as_dict()
    (tmp_path / "config.json").write_text(json.dumps(values))
    (other,) = commands.values()
    with pytest.raises(UsageError, match="was begun by another command, or version of minigrpo, with --"):
        other.main(parse_flags(["--resume", f"--output_dir={tmp_path}"], other.SECTIONS))
