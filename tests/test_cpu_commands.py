"""LoRA, offline and group-rule runs through the commands' own entry points, and what other commands make of them."""

import dataclasses
import io
import json
import os
import types

import numpy as np
import pytest

from minigrpo import evaluate, generate, report, train
from minigrpo.command_line import parse_flags
from minigrpo.config import DataOptions, UsageError
from minigrpo.data.grading import most_common
from minigrpo.data.recorded import read_recorded
from minigrpo.diagnostics import diagnose
from minigrpo.grpo.advantages import normalised_separately, ragged_advantages
from minigrpo.grpo.experience import Experience, concatenate, has_contrast, take_groups
from minigrpo.grpo.offline import margin
from minigrpo.model.hub import find_source
from minigrpo.rollout.generator import Rollout
from minigrpo.runtime import program_cache

BFLOAT16 = 2**-8
"""Rounding of the weights that a finished run writes."""

SMALL = [
    "--batch_size=4",
    "--num_generations=4",
    "--max_completion_length=32",
    "--report_to=none",
    "--max_steps=2",
    "--eval_steps=0",
]


def run(command, *flags):
    assert command.main(parse_flags([*flags], command.SECTIONS)) == 0


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scored_rows(count):
    """Prompts with three responses, of which those that show their work are right."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        a, b = (int(x) for x in rng.integers(1, 30, 2))
        right = f"<reasoning>\n{a} + {b} = {a + b}\n</reasoning>\n<answer>\n{a + b}\n</answer>"
        wrong = [f"<answer>\n{a + b + k}\n</answer>" for k in (1, 2)]
        prompt = f"Tom has {a} pens and buys {b} more. How many pens does Tom have now?"
        yield {"prompt": prompt, "responses": [wrong[0], right, wrong[1]], "scores": [0.0, 1.0, 0.0], "metadata": {}}


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A finished offline LoRA run with validation."""
    folder = tmp_path_factory.mktemp("offline")
    for name, count in (("train", 64), ("held", 16)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored_rows(count)))
    flags = [f"--dataset={folder}/train.jsonl", f"--eval_dataset={folder}/held.jsonl", "--offline", "--eval_steps=6"]
    lora = ["--lora_rank=8", "--lora_dropout=0.1", "--beta=0.05", "--learning_rate=1e-3", "--max_completion_length=64"]
    steps = ["--batch_size=8", "--num_generations=4", "--max_steps=12", "--save_steps=6", "--report_to=none"]
    run(train, *flags, *lora, *steps, f"--output_dir={folder}/run")
    return folder / "run"


def test_offline_training_prefers_the_better_responses_of_held_out_prompts(offline):
    rows = lines(offline / "evaluations.jsonl")
    assert [row["step"] for row in rows] == [0, 6, 12]
    assert rows[-1]["margin"] > rows[0]["margin"] + 0.02 and rows[-1]["loss"] < rows[0]["loss"] - 0.02
    metrics = lines(offline / "metrics.jsonl")
    assert all(np.isfinite(list(row.values())).all() for row in metrics)
    assert metrics[0]["kl"] < 1e-5 < metrics[-1]["kl"] and "rollout/tokens_per_second" not in metrics[0]


def test_a_run_with_dropout_goes_on_and_is_run_again_by_its_own_settings(offline):
    """Its config.json says what was done: rows are not packed under dropout, so packing was not asked for."""
    assert json.loads((offline / "config.json").read_text())["packing"] is False
    before = (offline / "metrics.jsonl").read_text()
    run(train, "--resume", f"--output_dir={offline}")
    assert (offline / "metrics.jsonl").read_text() == before
    with pytest.raises(UsageError, match="--packing=true: not with --lora_dropout=0.1"):
        run(train, f"--flagfile={offline}/flags.txt", f"--output_dir={offline}/again", "--packing=true")


def test_a_lora_checkpoint_holds_adapters_alone(offline):
    source = find_source(f"{offline}/checkpoints/12")
    assert source.lora.rank == 8
    size = sum(path.stat().st_size for path in (offline / "checkpoints" / "12").rglob("*") if path.is_file())
    model = sum(path.stat().st_size for path in (offline / "final").glob("*.safetensors"))
    assert size < 1.5 * model


def test_adapter_checkpoint_and_final_model_answer_alike(offline, tmp_path, capsys):
    (tmp_path / "asked.txt").write_text("Ann has 2 pens and buys 5 more. How many pens does Ann have now?\n")
    answers = []
    for model in ("", "/final", "/adapter", "/checkpoints/12"):
        run(generate, f"--model={offline}{model}", f"--prompts={tmp_path}/asked.txt", "--temperature=0")
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[1:] == answers[:-1] and answers[0]["completions"][0].startswith("<")


def test_generate_streams_and_chats(offline, capsys, monkeypatch):
    run(generate, f"--model={offline}", "--prompt=Ann has 2 pens.", "--temperature=0")
    streamed = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("Ann has 2 pens.\nAnd now?\n\nnever read\n"))
    run(generate, f"--model={offline}", "--chat", "--temperature=0")
    assert capsys.readouterr().out.startswith(streamed)
    with pytest.raises(UsageError, match="give one of --prompt"):
        run(generate, f"--model={offline}")


def test_evaluate_counts_every_way_beside_the_base(offline, tmp_path, capsys):
    flags = [
        "--dataset=builtin:arithmetic",
        "--eval_size=12",
        "--num_generations=4",
        "--reward=tag_count*2",
        f"--output={tmp_path}/answers.jsonl",
    ]
    run(evaluate, f"--model={offline}", "--base=builtin:tiny", *flags)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for figures in (result, result["base"]):
        assert 0 <= figures["strict_accuracy"] <= figures["accuracy"] <= figures["pass@2"] <= figures["pass@4"] <= 1
        assert figures["interval"][0] <= figures["accuracy"] <= figures["interval"][1] and "majority@4" in figures
    assert result["reward"] == pytest.approx(2 * result["rewards/tag_count"]) and result["reward"] > 0
    answers = lines(tmp_path / "answers.jsonl")
    assert len(answers) == 2 * 12 * 4
    tuned = [row["right"] for row in answers if row["model"] == str(offline)]
    assert np.mean(tuned) == result["accuracy"]


def test_evaluate_measures_the_margin_of_a_scored_file_without_answers(offline, tmp_path, capsys):
    held = offline.parent / "held.jsonl"
    flags = [f"--dataset={held}", "--base=builtin:tiny", "--temperature=1", f"--output={tmp_path}/margins.jsonl"]
    run(evaluate, f"--model={offline}", *flags, "--max_completion_length=64")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    validated = lines(offline / "evaluations.jsonl")
    assert result["margin"] == pytest.approx(validated[-1]["margin"], rel=BFLOAT16)
    assert result["base"]["margin"] == pytest.approx(validated[0]["margin"], abs=1e-4)
    rows = lines(tmp_path / "margins.jsonl")
    told = [row["margin"] for row in lines(offline / "answers.jsonl") if row["step"] == 12]
    assert [row["margin"] for row in rows if row["model"] == str(offline)] == pytest.approx(told, rel=4 * BFLOAT16)
    with pytest.raises(UsageError, match="--reward=tag_count: .* has no answers to ask for"):
        run(evaluate, f"--model={offline}", *flags[:2], "--reward=tag_count")


def test_a_base_that_is_not_there_is_told_before_sampling(offline, capsys):
    with pytest.raises(UsageError, match="--base=/nosuch"):
        run(evaluate, f"--model={offline}", "--base=/nosuch", "--dataset=builtin:arithmetic", "--eval_size=2")
    assert "accuracy" not in capsys.readouterr().err


def test_pass_at_k_and_the_majority():
    right = np.array([[True, False, False, False], [False] * 4])
    assert evaluate.pass_at(right, 1) == 0.125 and evaluate.pass_at(right, 4) == 0.5
    assert evaluate.pass_at(right, 2) == pytest.approx(0.25)
    assert most_common(["#### 3", "#### 4", "#### 4.0", "#### 5"]) == "#### 4"
    assert most_common(["#### 7", "#### 8"]) == "#### 7"
    assert most_common(["#### 0", "#### 5", "#### 0.0", "#### 5", "#### $0"]) == "#### 0"
    assert most_common(["none", "none at all", "nothing", "#### 5", "#### 5"]) == "#### 5"


def test_the_report_is_one_page_with_every_picture(offline):
    page = (offline / "report.html").read_text()
    assert page.count("<svg") == len(list((offline / "report").glob("*.png"))) >= 8
    assert "http" not in page.replace("https://", "http://").split("<h2>Samples")[0]
    assert page.count('<div class="member"') >= 3 and "held-out margin" in page
    summary = json.loads((offline / "summary.json").read_text())
    assert summary["steps"] == 12 and summary["doctor"]
    with pytest.raises(UsageError, match=r"no metrics.jsonl"):
        run(report, f"--run={offline}/final")


def test_hostile_samples_are_escaped(offline, tmp_path):
    for name in ("metrics.jsonl", "config.json"):
        (tmp_path / name).write_text((offline / name).read_text())
    sample = {
        "step": 1,
        "prompt": "<script>alert(1)</script>",
        "completion": "</pre><img src=x onerror=1>\ud800",
        "reward": 1,
    }
    (tmp_path / "completions.jsonl").write_text(json.dumps(sample) + "\n")
    text = report.write_report(tmp_path).read_text()
    assert "<script>alert" not in text and "<img src=x" not in text and "&lt;script&gt;" in text


def test_groups_without_contrast_are_replaced_and_the_reference_follows(tmp_path):
    flags = ["--zero_std_groups=resample", "--max_resamples=2", "--num_minibatches=2", "--num_iterations=2"]
    moving = ["--beta=0.1", "--sync_ref_steps=1", "--overlong_buffer=8", "--learning_rate=1e-3"]
    truncated = ["--top_k=30", "--top_p=0.9", "--min_p=0.01", "--rollout_correction=token", "--stop=7"]
    run(train, *SMALL, *flags, *moving, *truncated, f"--output_dir={tmp_path}/run", "--save_steps=1")
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert "rewards/overlong/mean" in rows[0] and rows[0]["kl"] > 0
    assert all(0.7 < row["rollout/kept_mass"] < 0.999 for row in rows)
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-4
    told = [row["completion"] for row in lines(tmp_path / "run" / "completions.jsonl")]
    ends = [len(text) - text.index("7") for text in told if "7" in text]
    assert ends and max(ends) <= 4


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--quantize=int8"], "--quantize=int8: freezes the base weights"),
        (["--lora_rank=4", "--lora_targets=x"], "--lora_targets=x"),
        (["--num_minibatches=3"], "--num_minibatches=3: must divide"),
        (["--sync_ref_steps=2", "--beta=0"], "--sync_ref_steps=2: --beta=0 has no reference"),
        (["--report_to=print"], "--report_to=print"),
        (["--offline", "--reward=answer"], "--reward: --offline takes the responses and scores"),
        (["--overlong_buffer=900"], "--overlong_buffer=900"),
        (["--offline", "--dataset=builtin:arithmetic"], "--dataset=builtin:arithmetic"),
        (["--offline", "--normalize_rewards=each"], "--normalize_rewards: --offline takes"),
        (["--offline", "--top_p=0.9"], "--top_p: --offline takes the responses"),
        (["--lora_alpha=8"], "--lora_alpha: means nothing without --lora_rank"),
        (["--lora_rank=4", "--lora_dropout=0.1", "--packing=true"], "--packing=true: not with --lora_dropout=0.1"),
        (["--packing=false", "--share_prompts=true"], "--share_prompts=true: needs --packing=true"),
        (["--lora_rank=4", "--lora_dropout=0.1", "--share_prompts=true"], "--share_prompts=true: not with --lora_drop"),
        (["--lora_rank=4", "--init=random"], "--init=random: adapters need a base"),
        (["--lora_rank=4", "--sync_ref_steps=1", "--ref_mixup_alpha=0.5", "--beta=1"], "--ref_mixup_alpha=0.5: a mix"),
    ],
)
def test_bad_input_is_one_clear_line(flags, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        run(train, *SMALL, *flags, f"--output_dir={tmp_path}/run")
    assert not (tmp_path / "run").exists()


def test_adapters_on_a_checkpoint_keep_to_it(offline, tmp_path, capsys):
    """LoRA from a full run's checkpoint: the adapter, its checkpoint and the merged model are the same model."""
    run(train, *SMALL, "--learning_rate=3e-3", f"--output_dir={tmp_path}/full", "--save_steps=2", "--log_completions=0")
    base = f"--model={tmp_path}/full/checkpoints/2"
    run(
        train,
        *SMALL,
        base,
        "--dataset=builtin:arithmetic",
        "--lora_rank=4",
        "--save_steps=2",
        f"--output_dir={tmp_path}/lora",
    )
    (tmp_path / "asked.txt").write_text("Ann has 2 pens and buys 5 more. How many pens does Ann have now?\n")
    capsys.readouterr()
    answers = []
    for model in ("final", "adapter", "checkpoints/2"):
        run(generate, f"--model={tmp_path}/lora/{model}", f"--prompts={tmp_path}/asked.txt", "--temperature=0")
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1] == answers[2]
    written = json.loads((tmp_path / "lora" / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str((tmp_path / "lora" / "base").resolve())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "lora/base").iterdir()
    }


def test_what_a_crash_left_of_a_line_is_passed_over(offline, tmp_path):
    for name in ("metrics.jsonl", "config.json"):
        (tmp_path / name).write_bytes((offline / name).read_bytes())
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'[1]\n{"step": 13, "loss": "\xc3')
    assert json.loads((report.write_report(tmp_path).parent / "summary.json").read_text())["steps"] == 12
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": "x"}\n')
    with pytest.raises(UsageError, match="step 1 has 'x' as 'loss'"):
        report.write_report(tmp_path)


# The pieces


def recorded(tmp_path, *rows):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = DataOptions(dataset=str(tmp_path / "rows.jsonl"))
    return [(row["prompt"], row["responses"], row["scores"]) for row in read_recorded(options).rows]


def test_the_three_kinds_of_rows(tmp_path):
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    read = recorded(
        tmp_path,
        {"prompt": "a", "responses": ["x", "y"], "scores": [0, 0.5]},
        {"prompt": "b", "chosen": "good", "rejected": "bad"},
        {"chosen": chat, "rejected": chat[:1] + [{"role": "assistant", "content": "5"}]},
        {"messages": chat},
    )
    assert read == [
        ("a", ["x", "y"], [0, 0.5]),
        ("b", ["good", "bad"], [1.0, 0.0]),
        (chat[:1], ["4", "5"], [1.0, 0.0]),
        (chat[:1], ["4"], [1.0]),
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a"},
        {"prompt": "a", "responses": ["x"], "scores": [1, 2]},
        {"prompt": "a", "responses": ["x"], "scores": [float("nan")]},
        {"prompt": "", "responses": ["x"], "scores": [1]},
        {"messages": [{"role": "user", "content": "no answer"}]},
        {"prompt": "a", "chosen": "x"},
    ],
)
def test_bad_rows_are_named_by_number(tmp_path, row):
    with pytest.raises(UsageError, match="row 2"):
        recorded(tmp_path, {"prompt": "a", "responses": ["x"], "scores": [1]}, row)


def test_ragged_advantages():
    rewards = np.array([1.0, 0.0, np.nan, 2.0, np.nan, np.nan, 3.0, 5.0, 7.0])
    group = np.array([0.5, -0.5]) / (np.std([1, 0], ddof=1) + 1e-4)
    three = np.array([-2.0, 0.0, 2.0]) / (2.0 + 1e-4)
    np.testing.assert_allclose(ragged_advantages(rewards, 3, "group"), [*group, 0, 0, 0, 0, *three], rtol=1e-6)
    np.testing.assert_allclose(
        ragged_advantages(rewards, 3, "none", lone=1.0), [0.5, -0.5, 0, 2, 0, 0, -2, 0, 2], rtol=1e-6
    )
    alone = np.array([np.nan, np.nan, 4.0])
    assert ragged_advantages(alone, 3, "batch", lone=1.0).tolist() == [0, 0, 4]


def test_completions_that_no_function_scores_have_no_advantage():
    parts = {"a": np.array([1.0, np.nan, 0.0, 1.0]), "b": np.array([np.nan, np.nan, 2.0, 0.0])}
    result = normalised_separately(parts, {"a": 1.0, "b": 0.5}, 2)
    assert result[1] == 0 and np.isfinite(result).all() and abs(result[[0, 2, 3]].mean()) < 1e-6


def test_margin_compares_inside_prompts():
    logprobs = np.array([[-1.0, -2.0, -3.0], [-9.0, -9.0, -9.0], [-5.0, -4.0, 0.0]])
    scores = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, np.nan]])
    assert margin(logprobs, scores) == pytest.approx((1.5 - 1.0) / 2)


def made_up(base, prompts=2, group=2):
    rows = prompts * group
    tokens = base + np.arange(rows)[:, None] * np.ones((1, 3), int)
    rollout = Rollout(tokens, tokens * 0.5, np.full(rows, 3), np.ones(rows, bool), decode_steps=3, occupancy=1.0)
    texts = [f"{base + row}" for row in range(rows)]
    values = base + np.arange(rows, dtype=float)
    prompts_, rows_ = [[base + i] for i in range(prompts)], [{"prompt": str(base + i)} for i in range(prompts)]
    mask = np.ones(prompts, bool)
    return Experience(prompts_, rows_, rollout, texts, values, {"r": values}, mask, {"t": 1.0}, {}, {"x": texts})


def test_groups_keep_their_rows_together():
    both = concatenate(made_up(0), made_up(100))
    taken = take_groups(both, np.array([2, 1]))
    assert taken.prompts == [[100], [1]] and [row["prompt"] for row in taken.rows] == ["100", "1"]
    assert taken.extra == {"x": taken.texts} and taken.texts == ["100", "101", "2", "3"] and taken.seconds == {"t": 2.0}
    np.testing.assert_array_equal(taken.rollout.tokens[:, 0], [100, 101, 2, 3])
    np.testing.assert_array_equal(taken.components["r"], taken.rewards)


def test_a_group_has_contrast_when_two_scores_differ():
    scores = np.array([3.3, 3.3, 3.3, 1.0, np.nan, 1.0, 0.0, 1.0, np.nan])
    made = dataclasses.replace(made_up(0, 3, 3), components={"first": scores, "second": np.arange(9.0)})
    assert has_contrast(made).tolist() == [False, False, True]


def healthy(**changes):
    row = {
        "loss": 0.01, "grad_norm": 0.5, "reward": 1.0, "reward_std": 0.3, "rewards/a/mean": 1.0, "kl": 0.01,
        "completions/clipped_ratio": 0.0, "frac_reward_zero_std": 0.1, "learning_rate": 1e-5, "skipped_updates": 0,
        "sampling/sampling_logp_difference/mean": 1e-4, "entropy": 0.5,
    }  # fmt: skip
    return [row | changes for _ in range(30)]


SETTINGS = {"loss_type": "grpo", "beta": 0.1, "num_iterations": 1, "learning_rate": 1e-5, "max_grad_norm": 1.0}


@pytest.mark.parametrize(
    "changes, settings, finding",
    [
        ({}, {}, "Nothing unusual"),
        ({"loss": 1e-8}, {"beta": 0}, "that is right"),
        ({"loss": float("nan")}, {"beta": 0}, "Nothing unusual"),
        ({"reward": 0.0, "reward_std": 0.0}, {}, "reward 0"),
        ({"completions/clipped_ratio": 0.9}, {}, "90% of recent completions"),
        ({"frac_reward_zero_std": 0.8}, {}, "80% of recent groups"),
        ({"sampling/sampling_logp_difference/mean": 0.5}, {}, "Sampler and trainer"),
        ({"skipped_updates": 1}, {}, "30 updates were skipped"),
        ({"grad_norm": 3.0}, {}, "clipped in 100%"),
        ({"kl": 3.0}, {}, "3 nats per token from its reference"),
    ],
)
def test_the_doctor_explains(changes, settings, finding):
    assert finding in diagnose(SETTINGS | settings, healthy(**changes))[0]


def test_the_doctor_sees_trends():
    rows = healthy()
    rising = [row | {"learning_rate": 1e-7 * i} for i, row in enumerate(rows)]
    assert "still warming up" in diagnose(SETTINGS, rising)[0]
    falling = [row | {"entropy": 0.5 if i < 15 else 0.01} for i, row in enumerate(rows)]
    assert "Entropy fell" in diagnose(SETTINGS, falling)[0]
    dead = [row | {"rewards/b/mean": 0.0} for row in rows]
    assert "Reward b was 0" in diagnose(SETTINGS, dead)[0]


class JaxSettings:
    """jax's own, as they are before anything is said."""

    def __init__(self, folder=None, enabled=True):
        self.jax_compilation_cache_dir, self.jax_enable_compilation_cache = folder, enabled

    def update(self, name, value):
        setattr(self, name, value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [(JaxSettings(), "minigrpo/programs"), (JaxSettings("elsewhere"), "elsewhere"), (JaxSettings(enabled=False), None)],
)
def test_compiled_programs_are_kept_where_nothing_else_is_said(settings, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(program_cache, "jax", types.SimpleNamespace(config=settings))
    program_cache.keep_programs()
    own = expected == "minigrpo/programs"
    assert getattr(settings, "jax_compilation_cache_max_size", None) == (program_cache.MAX_BYTES if own else None)
    assert settings.jax_compilation_cache_dir == (str(tmp_path / expected) if own else expected)
    assert (tmp_path / "minigrpo" / "programs").exists() == own and not capsys.readouterr().err


def test_a_cache_folder_that_cannot_be_written_is_told_and_does_no_harm(tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    monkeypatch.setattr(program_cache, "jax", types.SimpleNamespace(config=JaxSettings()))
    program_cache.keep_programs()
    assert program_cache.jax.config.jax_compilation_cache_dir is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(file) in said and "JAX_COMPILATION_CACHE_DIR" in said


def test_programs_that_jax_was_killed_over_are_dropped(tmp_path, monkeypatch):
    """They have no time stamp; one that was written just now may get it yet."""
    names = ["old-cache", "old-atime", "torn-cache", "fresh-cache"]
    for name in names:
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, times=None if name == "fresh-cache" else (0, 0))
    program_cache.drop_torn_programs(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({*names} - {"torn-cache"})
