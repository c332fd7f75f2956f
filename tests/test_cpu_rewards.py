"""Rewards: answers as people write them, hostile completions, and functions that misbehave."""

import json
import time

import numpy as np
import pytest

from minigrpo import rewards
from minigrpo.config import UsageError
from minigrpo.rewards import Reward, call_reward, extract_answer, parse_rewards, same_answer, score_completions

GOOD = "<reasoning>\n6 * 7 = 42\n</reasoning>\n<answer>\n42\n</answer>"


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        (GOOD, "42"),
        ("The total is $1,234.50.", "1234.5"),
        ("#### 72 clips", "work\n#### 72"),
        (r"so we get \boxed{18}.", "18"),
        (r"\boxed{\$1,000}", "1000"),
        ("<answer>50%</answer>", "50"),
        ("<answer>-3.0</answer>", "-3"),
        ("it is 7.00 dollars", "7"),
        ("<answer>.5</answer>", "0.50"),
        ("<answer> Paris </answer>", "paris"),
        ("<answer>1/2</answer>", "1/2"),
        ("<answer>x^2+1</answer>", "x^2+1"),
        ("<answer>10:30</answer>", "10:30"),
        ("<answer>1.5e3 meters</answer>", "1500"),
        ("<answer>-$5</answer>", "-5"),
        ("<answer>x = 12kg</answer>", "12"),
    ],
)
def test_right_answers(completion, reference):
    assert same_answer(completion, reference)


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("<answer>43</answer>", "42"),
        ("", "42"),
        ("no number at all", "42"),
        ("<answer>42", "43"),
        ("#### 7\n#### 8", "7"),
        ("<answer>4.2</answer>", "42"),
        ("<answer>-42</answer>", "42"),
        ("<answer></answer> 42", "42"),
        ("<answer>2</answer>", "1/2"),
        ("<answer>1/3</answer>", "#### 1/2"),
        ("<answer>3x</answer>", "3y"),
        ("<answer>4 or 42</answer>", "42"),
    ],
)
def test_wrong_answers(completion, reference):
    assert not same_answer(completion, reference)


def test_built_in_rewards_score_as_documented():
    texts = [GOOD, "<reasoning>x</reasoning><answer>42</answer>", "the answer is 42", "<answer>\n41\n</answer>\nextra"]
    wanted = {
        "answer": [3.0, 3.0, 3.0, 0.0],
        "correctness": [2.0, 2.0, 1.5, 0.0],
        "integer": [0.5, 0.5, 0.0, 0.5],
        "strict_format": [0.5, 0.0, 0.0, 0.0],
        "soft_format": [0.5, 0.5, 0.0, 0.0],
        "tag_presence": [0.8, 0.8, 0.0, 0.4],
        "tag_count": [0.5, 0.5, 0.0, 0.245],
    }
    for name, scores in wanted.items():
        got = rewards.BUILTIN[name](completions=texts, answer=["42"] * 4)
        np.testing.assert_allclose(got, scores, err_msg=name)
    thinking = ["<think>\nhm\n</think>\n#### 4", "#### 4 <think></think>", "<think> #### 4"]
    assert rewards.think_format(completions=thinking) == [1.0, 0.0, 0.0]


def test_real_graded_solutions(shared):
    """Solutions of a real model with marks made elsewhere: at least 99 % agreement."""
    rows = [json.loads(line) for line in (shared / "scored" / "gsm8k_scored.jsonl").read_text().splitlines()]
    references = {
        json.loads(line)["question"]: json.loads(line)["answer"]
        for line in (shared / "gsm8k" / "test.jsonl").read_text().splitlines()
    }
    pairs = [
        (same_answer(response, references[row["prompt"]]), score > 0.5)
        for row in rows
        if row["prompt"] in references
        for response, score in zip(row["responses"], row["scores"], strict=True)
    ]
    assert len(pairs) > 2000
    assert np.mean([ours == marked for ours, marked in pairs]) >= 0.99


def test_hostile_completions_cost_bounded_time():
    hostile = [
        "9" * 1_000_000,
        "<answer>" * 100_000,
        "<reasoning>\n" * 50_000 + "\n</reasoning>\n<answer>\n" * 50_000,
        r"\boxed{" * 100_000,
        "{" * 1_000_000,
        "1," * 500_000,
        "-$" * 500_000 + "1.",
        "\u202e\ud800 \x00 <answer>٣</answer>",
        "1e999999999",
        "<answer>" + "0." * 100_000 + "</answer>",
    ]
    started = time.perf_counter()
    for function in rewards.BUILTIN.values():
        scores = function(completions=hostile, answer=["42"] * len(hostile))
        assert np.isfinite(scores).all()
    assert time.perf_counter() - started < 5


def test_nothing_is_evaluated(tmp_path):
    target = tmp_path / "pwned"
    text = f"<answer>__import__('pathlib').Path({str(target)!r}).touch()</answer>"
    assert not same_answer(text, "42") and not target.exists()


def test_rewards_are_parsed_with_weights_and_files(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def brevity(completions, level):\n    return [len(c) + l for c, l in zip(completions, level)]\n")
    parsed = parse_rewards(f"correctness*0.5, {path}:brevity")
    assert [(reward.name, reward.weight) for reward in parsed] == [("correctness", 0.5), ("brevity", 1.0)]
    arguments = {"completions": [GOOD, "x"], "answer": ["42", "1"], "level": [10, 20], "prompts": ["", ""]}
    total, parts = score_completions(parsed, 5.0, arguments)
    np.testing.assert_allclose(parts["brevity"], [len(GOOD) + 10, 21])
    np.testing.assert_allclose(total, [1.0 + len(GOOD) + 10, 21])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("nothing", "--reward=nothing: no such reward"),
        ("answer*heavy", "the weight 'heavy' is not a number"),
        ("answer,answer", "answer is given twice"),
        ("missing.py:f", "there is no Python file missing.py"),
    ],
)
def test_bad_reward_flags(flag, message):
    with pytest.raises(UsageError, match=message):
        parse_rewards(flag)


def test_files_that_fail_or_lack_the_function_are_named(tmp_path):
    (tmp_path / "a.py").write_text("1/0")
    (tmp_path / "b.py").write_text("x = 1")
    with pytest.raises(UsageError, match=r"importing .*a.py failed: ZeroDivisionError"):
        parse_rewards(f"{tmp_path}/a.py:f")
    with pytest.raises(UsageError, match=r"b.py has no function f"):
        parse_rewards(f"{tmp_path}/b.py:f")


def raises(completions):
    raise KeyError("level")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, r"reward bad: raised KeyError\('level'\)"),
        (lambda completions: [1.0], r"returned shape \[1\] for 2 completions"),
        (lambda completions: [1.0, float("nan")], "returned nan for completion 1"),
        (lambda completions: ["a", "b"], "not a list of floats"),
        (lambda completions: time.sleep(2), "no result after 0.2 s"),
    ],
)
def test_misbehaving_functions_are_named(function, message):
    with pytest.raises(UsageError, match=message):
        call_reward(Reward("bad", function), 0.2, {"completions": ["a", "b"]})


def test_extract_answer_prefers_tags_then_marks_then_boxes():
    assert extract_answer("#### 1 <answer>2</answer> 3") == "2"
    assert extract_answer(r"\boxed{5} then #### 6") == "6"
    assert extract_answer(r"7 \boxed{8} 9") == "8"
