"""Reports in words: statistics against scipy, verdicts, pictures, the page, and runs compared."""

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import mesh_of
from scipy import stats
from test_cpu_commands import SETTINGS, healthy, made_up
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import decoders, models, pre_tokenizers

from minigrpo import compare, evaluate, report, train
from minigrpo.build import Build
from minigrpo.command_line import name_arguments, parse_flags
from minigrpo.config import DataOptions, RolloutOptions, UsageError
from minigrpo.data.calls import Reward
from minigrpo.data.datasets import PromptSet
from minigrpo.data.recorded import is_recorded, recorded_problems
from minigrpo.data.rows import Ragged
from minigrpo.evaluate import Measured, Scoring, answer_questions, with_interval
from minigrpo.grpo import samples
from minigrpo.grpo.batch import Batch, PackingSpec, pack, put_batch
from minigrpo.grpo.offline import margin, margins
from minigrpo.reporting import pictures, significance
from minigrpo.reporting.history import History
from minigrpo.reporting.page import MEMBERS, TOKENS
from minigrpo.reporting.verdict import BROKEN, EARLY, LEARNED, WORSE, best_step, judge
from minigrpo.runtime.run_folder import command_line, reward_metrics

# Statistics


@pytest.mark.parametrize(("right", "count"), [(0, 7), (48, 100), (500, 500), (1, 2)])
def test_the_interval_is_wilsons(right, count):
    known = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert significance.interval(right / count, count) == pytest.approx((known.low, known.high), abs=1e-4)


@pytest.mark.parametrize(("ups", "downs"), [(0, 0), (5, 0), (12, 30), (90, 60), (400, 300)])
def test_right_and_wrong_are_compared_by_mcnemars_exact_test(ups, downs):
    before = np.r_[np.zeros(ups), np.ones(downs), np.ones(50), np.zeros(20)]
    after = np.r_[np.ones(ups), np.zeros(downs), np.ones(50), np.zeros(20)]
    found = significance.paired_difference(before, after)
    wanted = stats.binomtest(ups, ups + downs).pvalue if ups + downs else 1.0
    assert found.p_value == pytest.approx(wanted) and found.mean == pytest.approx((ups - downs) / len(before))
    assert found.error == pytest.approx(stats.sem(after - before))


def test_shares_are_compared_by_sign_changes():
    rng = np.random.default_rng(1)
    before, after = rng.integers(0, 9, 40) / 8, rng.integers(1, 10, 40) / 8
    known = stats.permutation_test(
        (after, before), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=20_000, rng=rng
    )
    assert significance.paired_difference(before, after).p_value == pytest.approx(known.pvalue, abs=0.01)


def test_steps_are_compared_by_welchs_test():
    one, two = [1.0, 2.0, 4.0, 3.0], [2.0, 4.5, 5.0]
    found = significance.mean_difference(one, two)
    assert found.p_value == pytest.approx(stats.ttest_ind(one, two, equal_var=False).pvalue)


def test_as_many_problems_as_are_needed_show_the_difference_in_four_of_five_tests():
    rng = np.random.default_rng(0)
    probabilities = {(0, 0): 0.4, (1, 1): 0.4, (0, 1): 0.13, (1, 0): 0.07}
    pairs = np.array(list(probabilities))
    few = pairs[np.repeat(np.arange(4), [40, 40, 13, 7])].astype(float)
    needed = significance.paired_difference(few[:, 0], few[:, 1]).needed
    found = 0
    for _ in range(200):
        drawn = pairs[rng.choice(4, needed, p=list(probabilities.values()))].astype(float)
        found += significance.paired_difference(drawn[:, 0], drawn[:, 1]).significant
    assert 0.68 < found / 200 < 0.9


def test_the_standard_error_of_a_reward_counts_groups_as_one():
    total = np.repeat([0.0, 1.0, 2.0, np.nan], 4)
    assert reward_metrics(total, {}, 4)["reward_stderr"] == pytest.approx(1 / math.sqrt(3))
    assert reward_metrics(np.ones(4), {}, 4)["reward_stderr"] == 0


# Runs on file


MORE = {"num_tokens": 1000.0, "step_time": 1.0, "tokens_per_second": 50.0, "completions/mean_length": 40.0}


def metric_rows(rewards):
    lengths = {"completions/min_length": 9.0, "completions/max_length": 60.0, "time/rollout": 0.5, "reward_stderr": 0.1}
    rows = healthy()[:1] * len(rewards)
    return [
        row
        | MORE
        | lengths
        | {"step": i + 1, "reward": value, "rewards/a/mean": value / 2, "rewards/b/mean": value / 2}
        for i, (row, value) in enumerate(zip(rows, rewards, strict=True))
    ]


def answer_rows(step, right):
    return [
        {"step": step, "prompt": f"{i}?", "answer": str(i), "completion": "x", "right": bool(own)}
        for i, own in enumerate(right)
    ]


def evaluation(step, right):
    return {"step": step, "accuracy": float(np.mean(right)), "strict_accuracy": 0.1, "problems": float(len(right))}


def history(rewards=(1.0, 1.1, 0.9, 1.0), before=None, after=None, answers=True, settings=None, **changes):
    rows = [row | changes for row in metric_rows(rewards)]
    held = [] if before is None else [evaluation(0, before), evaluation(len(rows), after)]
    told = answer_rows(0, before) + answer_rows(len(rows), after) if held and answers else []
    return History(Path("run"), SETTINGS | (settings or {}), rows, held, [], told)


def first(count, of):
    return [True] * count + [False] * (of - count)


@pytest.mark.parametrize(
    ("run", "word", "text"),
    [
        (
            history(before=first(240, 500), after=first(280, 500)),
            LEARNED,
            "Learned: held-out accuracy rose from 48.0 ± 2.2 % to 56.0 ± 2.2 % in 4 steps, by 8.0 points with a "
            "standard error of 1.2 points on the same 500 problems (p < 0.001).",
        ),
        (history(before=first(280, 500), after=first(240, 500)), WORSE, "Worse: held-out accuracy fell from 56.0"),
        (history(before=first(240, 500), after=first(244, 500)), EARLY, "Too early to tell: held-out accuracy went"),
        (history(before=first(5, 9), after=first(5, 9)), EARLY, "No problem went"),
        (history(before=first(240, 500), after=first(280, 500), answers=False), LEARNED, "on 500 problems (p = 0.011)"),
        (history(rewards=[1.0] * 2), EARLY, "Too early to tell: 2 steps cannot show a trend."),
        (history(rewards=[1.0, 1.1, 0.9, 2.0, 2.1, 1.9]), LEARNED, "the training reward rose from 1 ± 0.058 to 2"),
        (history(rewards=[2.74, 3.16, 3.1, 2.93, 2.86, 2.65, 2.58]), EARLY, "Too early to tell: the training reward"),
        (history(rewards=[0.0] * 9, reward_std=0.0), BROKEN, "Broken: every completion of every step got reward 0"),
        (history(frac_reward_zero_std=1.0), BROKEN, "Broken: in every step all completions of a group got the same"),
        (history(loss=math.nan), BROKEN, "Broken: loss or gradient was not finite in 4 of 4 steps."),
        (history(grad_norm=0.0), BROKEN, "Broken: the gradient was 0 in every step"),
    ],
)
def test_the_verdict_says_what_happened(run, word, text):
    found = judge(run)
    assert found.word == word and text in found.text
    assert all(len(sentence.split()) <= 40 for sentence in found.text.split(". "))


def test_the_verdict_pairs_answers_by_problem():
    """Ten problems gained and none lost is no chance; the two accuracies alone cannot tell."""
    before, after = first(250, 500), first(260, 500)
    assert judge(history(before=before, after=after)).word == LEARNED
    assert judge(history(before=before, after=after, answers=False)).word == EARLY


def test_noise_is_seldom_called_learning():
    rng = np.random.default_rng(0)
    words = [
        judge(history(rewards=rng.normal(1, 0.2, steps).tolist())).word for steps in (6, 10, 40) for _ in range(150)
    ]
    assert np.mean([word != EARLY for word in words]) < 0.08


def test_supervised_runs_have_a_verdict_by_their_loss():
    rows = [{"step": i + 1, "loss": 3 - 0.2 * i, "grad_norm": 1.0, "learning_rate": 1e-4} for i in range(12)]
    assert "Learned: the training loss fell" in judge(History(Path("run"), {}, rows, [], [], [])).text
    assert judge(History(Path("run"), {}, rows[::-1], [], [], [])).word == WORSE


@pytest.mark.parametrize(
    ("settings", "held", "wanted"),
    [
        ({}, [], (2, "reward", 1.5)),
        ({"keep_best": "-loss"}, [], (1, "loss", 0.01)),
        ({}, [(0, 0.5), (2, 0.75), (3, 0.75)], (2, "eval/accuracy", 0.75)),
        ({"keep_best": "-eval/accuracy"}, [(0, 0.5), (2, 0.25)], (2, "eval/accuracy", 0.25)),
        ({"keep_best": "nothing"}, [], None),
    ],
)
def test_the_best_step(settings, held, wanted):
    evaluations = [{"step": step, "accuracy": value} for step, value in held]
    found = best_step(History(Path("run"), settings, metric_rows([1.0, 1.5, 1.5]), evaluations, [], []))
    assert found == (wanted and dict(zip(("step", "metric", "value"), wanted, strict=True)))


# Pictures


def drawn(run):
    with pictures.matplotlib.rc_context(pictures.STYLE):
        figures = pictures.held_out_pictures(run.evaluations) | pictures.training_pictures(run)
    return {name: figure for name, figure in figures.items() if figure}


def test_pictures_have_titles_shares_from_0_to_1_and_whole_steps():
    run = history(before=first(4, 9), after=first(5, 9), settings={"num_iterations": 2})
    found = drawn(run)
    assert {"progress", "reward", "reward_parts", "loss", "loss_reward", "lengths", "clipped", "kl"} <= found.keys()
    for name, figure in found.items():
        axes = figure.axes[0]
        assert axes.get_title(loc="left") and axes.get_xlabel() and axes.get_ylabel()
        figure.canvas.draw()
        if axes.get_xlabel() == "step":
            assert all(tick == round(tick) for tick in axes.get_xticks()), name
    for name in ("progress", "clipped", "contrast"):
        assert found[name].axes[0].get_ylim() == (-0.02, 1.02)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"accuracy": 0.5, "problems": 9.0, "rewards/a": 1.0}, {"progress", "held_out_rewards"}),
        ({"margin": 0.5, "loss": 1.0}, {"progress", "held_out_loss"}),
        ({"loss": 1.0}, {"progress"}),
    ],
)
def test_progress_is_drawn_of_what_was_measured(values, names):
    with pictures.matplotlib.rc_context(pictures.STYLE):
        found = pictures.held_out_pictures([{"step": 0} | values, {"step": 5} | values])
    assert {name for name, figure in found.items() if figure} == names


def test_a_loss_that_is_zero_by_construction_is_not_drawn():
    run = history(loss=1e-8, settings={"beta": 0})
    assert {"loss", "loss_reward"}.isdisjoint(drawn(run)) and "gradient_reward" in drawn(run)
    assert "0 by construction" in report.notes_of(run)[0] and report.notes_of(history()) == []


@pytest.mark.parametrize("steps", [1, 5000])
def test_a_run_of_any_length_is_drawn_small(steps):
    run = history(rewards=[1.0 + i % 7 for i in range(steps)])
    found = pictures.pictures(run)
    assert sum(len(svg) for _, svg in found.values()) < 600_000
    for png, svg in found.values():
        assert png.startswith(b"\x89PNG") and svg.count("<svg") == 1 and "http" not in svg
        assert pictures.INK not in svg and "currentColor" in svg


# The page


def group_rows(step, members, tokens, **more):
    texts, count = "<b>t" * 1, tokens
    return [
        {"step": step, "group": 0, "member": i, "prompt": "How many?", "answer": "#### 4", "completion": "x" * count}
        | {"reward": float(i % 2), "advantage": i % 2 - 0.5, "length": count, "stopped": i > 0, "rewards": {"a": 1.0}}
        | {"tokens": [texts] * count, "logprobs": [-0.5] * count, "policy_logprobs": [-0.4] * count}
        | more
        for i in range(members)
    ]


def write_run(folder, run=None, samples=(), settings=None):
    run = run or history(before=first(24, 50), after=first(40, 50))
    files = {"metrics": run.metrics, "evaluations": run.evaluations, "answers": run.answers, "completions": samples}
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"model": "m", "dataset": "d"} | run.settings | (settings or {})))
    return folder


def test_the_page_begins_with_words_and_shows_a_whole_group(tmp_path):
    write_run(tmp_path, samples=group_rows(1, 4, 3) + group_rows(4, 4, 3))
    (tmp_path / "command.txt").write_text("python -m minigrpo.train --max_steps=4\n")
    page = report.write_report(tmp_path).read_text()
    body = page[page.index("<body>") :]
    assert body.index("Learned: held-out accuracy rose from 48.0") < body.index("<h2>")
    assert "python -m minigrpo.train --max_steps=4" in body and '<a href="metrics.jsonl">' in body
    assert body.count('<div class="member"') == 8 and "#### 4" in body and "advantage" in body
    assert 'id="ratio"' in body and 'id="surprise"' in body and 'id="drift"' not in body
    assert 'id="entropy"' not in body and 'id="clipped"' not in body
    assert "ratio 1.1052" in body and "<b>t" not in body and "&lt;b&gt;t" in body
    assert "http" not in page and "<script" not in page


def test_tokens_are_coloured_by_every_number_on_file(tmp_path):
    numbers = {"old_logprobs": [-0.6] * 3, "ref_logprobs": [-1.4] * 3, "entropy": [1.5] * 3, "clipped": [0, 1, -1]}
    write_run(tmp_path, samples=group_rows(1, 2, 3, **numbers))
    body = report.write_report(tmp_path).read_text().partition("<body>")[2]
    for name in ("advantage", "surprise", "entropy", "ratio", "clipped", "drift"):
        assert f'id="{name}"' in body
    assert "--e:0.75" in body and "entropy 1.50" in body and "ratio 1.2214" in body and "over reference 2.718" in body
    assert (body.count("--cu:1.00"), body.count("--cd:1.00"), body.count("clipped,")) == (2, 2, 4)


@pytest.mark.parametrize(
    ("numbers", "ratio"),
    [
        ({"policy_logprobs": [], "old_logprobs": [-0.3] * 3}, "ratio 1.2214"),  # of an older minigrpo
        ({"logprobs": [], "old_logprobs": [-0.6] * 3}, "ratio 1.2214"),  # of responses on file
        ({"policy_logprobs": [None] * 3, "entropy": [None, 0.5, None]}, ""),  # of an update that was not finite
    ],
)
def test_numbers_that_are_missing_are_left_out(tmp_path, numbers, ratio):
    write_run(tmp_path, samples=group_rows(1, 2, 3, **numbers))
    body = report.write_report(tmp_path).read_text().partition("<body>")[2]
    assert ('id="ratio"' in body) == bool(ratio) and ratio in body and 'id="clipped"' not in body


def test_the_page_stays_small(tmp_path):
    long = group_rows(1, 40, 3000, prompt="p" * 50_000)
    singles = [{"step": i, "prompt": "p", "completion": "y" * 90_000, "reward": None} for i in range(50)]
    write_run(tmp_path, history(rewards=[1.0] * 2000), samples=[*long, *singles, *group_rows(9, 40, 3000)])
    page = report.write_report(tmp_path)
    assert page.stat().st_size < 2_000_000
    text = page.read_text()
    assert text.count("<i ") == 2 * MEMBERS * TOKENS and f"{40 - MEMBERS} more completions" in text
    assert f"{3000 - TOKENS} more tokens" in text and "more characters" in text


def test_a_supervised_runs_page(tmp_path):
    rows = [{"step": i + 1, "loss": 3 - 0.2 * i, "grad_norm": 1.0, "learning_rate": 1e-4} for i in range(12)]
    write_run(tmp_path, History(tmp_path, {}, rows, [], [], []))
    assert "the training loss fell" in report.write_report(tmp_path).read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["verdict"] == LEARNED and summary["best"] is None and summary["reward"]["first"] is None


def test_the_summary_and_the_closing_words(tmp_path):
    write_run(tmp_path)
    report.write_report(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["best"] == {"step": 4, "metric": "eval/accuracy", "value": 0.8} and summary["verdict"] == LEARNED
    words = report.closing_words(tmp_path).splitlines()
    low, high = stats.binomtest(24, 50).proportion_ci(method="wilson")
    assert words[0].startswith(f"held out, 50 problems: 48.0% (95 % interval {low:.1%} to {high:.1%}) before, 80.0%")
    assert words[1] == summary["words"]


# What a run records


def test_a_sample_is_a_whole_group_and_one_of_each_of_the_next():
    made = made_up(0, 3, 4)
    advantages = np.arange(12, dtype=np.float32)
    rows = samples.sample_rows(made, advantages, 7, 2, [{"tokens": [str(i)]} for i in range(4)])
    assert [(row["group"], row["member"], row["advantage"]) for row in rows] == [
        (0, 0, 0), (0, 1, 1), (0, 2, 2), (0, 3, 3), (1, 0, 4),
    ]  # fmt: skip
    assert rows[3]["tokens"] == ["3"] and "tokens" not in rows[4] and rows[0]["step"] == 7
    assert rows[4]["completion"] == "4" and rows[4]["x"] == "4" and rows[4]["rewards"] == {"r": 4.0}
    assert samples.sample_rows(made, advantages, 7, 0, []) == []


def test_recorded_steps_are_few_and_have_both_ends():
    for total in (1, 3, 19, 467, 10_000):
        steps = [step for step in range(1, total + 1) if samples.records_tokens(step, total)]
        assert steps[0] == 1 and steps[-1] == total and len(steps) <= 42


def test_the_trainers_log_probs_are_those_of_the_first_group():
    """Packing sorts completions by length; row b's log-probs are b + position / 10."""
    lengths = np.array([2, 5, 3, 4], np.int32)
    wanted = (np.arange(4.0)[:, None] + np.arange(5) / 10).astype(np.float32)
    packing = PackingSpec(devices=1, rows=2, prompt_tokens=4, completion_tokens=5, group=2)
    batch = Batch(np.ones((4, 5), np.int32), lengths, np.zeros(4, np.float32), old_logprobs=wanted)
    packed = put_batch(mesh_of(1, 1), pack(packing, [[1, 2], [3]], batch))
    scores = samples.TokenScores(packed, {"entropy": packed.batch.old_logprobs + 1})
    made = made_up(0, 2, 2)
    found = samples.first_group_scores(made, scores)
    np.testing.assert_array_equal(found["old_logprobs"], wanted[:2])
    np.testing.assert_array_equal(found["entropy"], wanted[:2] + 1)
    made.group_mask[0] = False
    assert samples.first_group_scores(made, scores) == {} and found.keys() == {"old_logprobs", "entropy"}


def test_a_character_of_several_tokens_is_shown_with_its_last():
    hub = HubTokenizer(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    hub.pre_tokenizer, hub.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ids = hub.encode("a€🙂b").ids
    texts = samples.token_texts(hub.decode_batch, ids)
    assert len(texts) == len(ids) == 9 and texts == ["a", "", "", "€", "", "", "", "🙂", "b"]
    assert "".join(samples.token_texts(hub.decode_batch, ids[2:3] * 9)).count("\ufffd") >= 2


def test_the_command_of_a_run_reads_back():
    flags = ["--max_steps=3", "--system_prompt=be brief\\nplease 'now'", "--learning_rate=0.001"]
    settings = parse_flags(flags, train.SECTIONS)
    command = shlex.split(command_line(settings))
    assert command[:3] == ["python", "-m", "minigrpo.train"]
    assert parse_flags(command[3:], train.SECTIONS) == settings


# Compared


def write_answers(path, model, right, **more):
    rows = [{"model": model} | row | more for row in answer_rows(0, right)]
    with open(path, "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def run_compare(capsys, *names):
    assert compare.main(parse_flags(name_arguments([str(name) for name in names], ("run", "other")), ("compare",))) == 0
    said = capsys.readouterr()
    return json.loads(said.out.splitlines()[-1]), said.err


def test_runs_are_compared_on_the_problems_of_their_last_evaluations(tmp_path, capsys):
    one = write_run(tmp_path / "one", history(before=first(9, 50), after=first(20, 50)))
    two = write_run(tmp_path / "two", history(before=first(9, 60), after=first(32, 60)))
    found, words = run_compare(capsys, one, two)
    assert found["problems"] == 50 and found["run"]["mean"] == 0.4 and found["other"]["mean"] == 0.64
    assert (found["only_run"], found["only_other"]) == (0, 12) and found["significant"]
    assert found["p_value"] == pytest.approx(stats.binomtest(0, 12).pvalue)
    assert "The second is better" in words and "50 problems in common" in words


def test_models_in_one_file_are_compared_and_told_how_many_problems_are_needed(tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    for right in (first(20, 50), first(20, 50)):
        write_answers(path, "a", right)
    for right in (first(21, 50), first(22, 50)):
        write_answers(path, "b", right)
    found, words = run_compare(capsys, path)
    assert found["difference"] == pytest.approx(0.03) and not found["significant"]
    assert "Too close to tell" in words and f"about {found['problems_needed']:,} problems would show it" in words


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "--run=: name two run folders"),
        (["empty"], "--run=DIR/empty: has no answers.jsonl"),
        (["absent", "one.jsonl"], "--run=DIR/absent: is no run folder"),
        (["one.jsonl"], "--other=: DIR/one.jsonl holds 1 model; name what to compare with"),
        (["one.jsonl", "two.jsonl"], "DIR/two.jsonl: holds 2 models; compare a file of one"),
        (["one.jsonl", "bad.jsonl"], "--other=DIR/bad.jsonl: line 2 is not JSON"),
        (["one.jsonl", "other.jsonl"], "--other=DIR/other.jsonl: line 1 is no answer"),
        (["one.jsonl", "elsewhere.jsonl"], "0 problems in common"),
        (["one.jsonl", "margin.jsonl"], "nothing that both have was measured"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_line(names, message, tmp_path):
    (tmp_path / "empty").mkdir()
    write_answers(tmp_path / "one.jsonl", "a", first(2, 5))
    for model in ("a", "b"):
        write_answers(tmp_path / "two.jsonl", model, first(2, 5))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "right": true}\n{oops\n')
    (tmp_path / "other.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    write_answers(tmp_path / "elsewhere.jsonl", "a", first(2, 5), prompt="other")
    (tmp_path / "margin.jsonl").write_text('{"prompt": "0?", "answer": "0", "margin": 0.5}\n')
    argv = name_arguments([f"{tmp_path}/{name}" for name in names], ("run", "other"))
    with pytest.raises(UsageError) as caught:
        compare.main(parse_flags(argv, ("compare",)))
    assert message.replace("DIR", str(tmp_path)) in str(caught.value) and "\n" not in str(caught.value)


def test_arguments_without_a_name_are_named_in_order():
    assert name_arguments(["a", "--x=1", "b", "c"], ("run", "other")) == ["--run=a", "--x=1", "--other=b", "c"]


# Held-out rows


def prompt_set(rows):
    tokens = Ragged()
    for _ in rows:
        tokens.append([1])
    return PromptSet(rows, tokens, 1)


def brevity(completions, **_):
    return [None if text == "skip" else 1.0 / len(text) for text in completions]


def asked(monkeypatch, rows, texts, rewards=()):
    """Results on `rows`, the model's answers being `texts`."""
    monkeypatch.setattr(evaluate, "ask", lambda *_: (texts, [[1] * len(text) for text in texts]))
    scoring = Scoring(tuple(Reward(one.__name__, one, 2.0) for one in rewards))
    built, samples = object.__new__(Build), len(texts) // len(rows)
    return answer_questions(built, {}, prompt_set(rows), RolloutOptions(), samples, scoring, 0)


def test_held_out_answers_are_graded_and_scored_by_own_rewards(monkeypatch):
    rows = [{"prompt": "2 + 2?", "answer": "4", "kind": "a"}, {"prompt": "3 + 3?", "answer": "6", "kind": "b"}]
    found = asked(monkeypatch, rows, ["#### 4", "#### 5", "skip", "#### 7"], [brevity])
    values = found.values
    assert values["accuracy"] == 0.25 and values["pass@2"] == 0.5 and values["majority@2"] == 0.5
    assert values["rewards/brevity"] == pytest.approx(1 / 6) and values["reward"] == pytest.approx(2 / 6)
    assert values["problems"] == 2 and values["dropped"] == 1
    assert [row["right"] for row in found.answers] == [True, False, False, False]
    assert found.answers[2]["reward"] is None and found.answers[1]["rewards"] == {"brevity": 1 / 6}


def test_rows_without_reference_answers_are_measured_by_rewards_alone(monkeypatch):
    found = asked(monkeypatch, [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}], ["x", "yy", "zzzz"], [brevity])
    assert "accuracy" not in found.values and found.values["rewards/brevity"] == pytest.approx(7 / 12)
    low, high = with_interval(found)["interval"]
    assert (low + high) / 2 == pytest.approx(7 / 6) and high - low == pytest.approx(2 * 1.96 * stats.sem([2, 1, 0.5]))
    assert json.loads(json.dumps(found.answers))[0]["reward"] == 2.0


@pytest.mark.parametrize(
    ("rows", "answers"),
    [
        ([{"prompt": "a", "responses": ["x", "y"], "scores": [0, 1], "answer": "4"}], ["4"]),
        ([{"prompt": "a", "chosen": "x", "rejected": "y"}], None),
        ([{"prompt": "a", "response": r, "score": 1, "answer": "4"} for r in "xy"], ["4"]),
        ([{"question": "a", "responses": ["x"], "scores": [0], "solution": "#### 7"}], ["#### 7"]),
    ],
)
def test_the_prompts_of_scored_files_are_asked_where_there_is_an_answer(tmp_path, rows, answers):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert is_recorded(rows[0])
    found = recorded_problems(DataOptions(dataset=str(tmp_path / "rows.jsonl")), "test")
    assert (found and [row["answer"] for row in found.rows]) == answers
    assert found is None or [row["prompt"] for row in found.rows] == ["a"]


def test_margins_are_each_prompts_own():
    logprobs = np.array([[-1.0, -2.0, -3.0], [-9.0, -9.0, -9.0], [-5.0, -4.0, 0.0]])
    scores = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, np.nan]])
    np.testing.assert_array_equal(margins(logprobs, scores), [1.5, np.nan, -1.0])
    assert margin(logprobs, scores) == 0.25 and margin(logprobs[1:2], scores[1:2]) == 0
    measured = Measured({"margin": 0.25}, [{"prompt": "a", "margin": 1.5}, {"prompt": "b", "margin": -1.0}])
    low, high = with_interval(measured)["interval"]
    assert high - low == pytest.approx(2 * 1.96 * 1.25)
