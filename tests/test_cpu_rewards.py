"""Rewards: answers as people write them, hostile completions, and functions that misbehave."""

import asyncio
import functools
import json
import time

import numpy as np
import pytest

from minigrpo.config import UsageError
from minigrpo.data import rewards
from minigrpo.data.rewards import Reward, call_reward, extract_answer, parse_rewards, same_answer, score_completions

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


def hostile_text(rng):
    """One of many kinds of text meant to hurt a parser."""
    size = int(10 ** rng.uniform(1, 6))
    kinds = (
        lambda: "9" * size,
        lambda: "{" * size + "}" * size,
        lambda: "<answer>" * (size // 8) + "4" + "</answer>" * (size // 9),
        lambda: "\\boxed{" * (size // 7) + "1",
        lambda: "".join(map(chr, rng.integers(0xD000, 0xE000, min(size, 500)))),
        lambda: "\u202e\u2066" * (size // 2) + "#### -$1," + "0" * 40,
        lambda: "<reasoning>\n" * (size // 12) + "</reasoning>\n<answer>\n" * (size // 25),
        lambda: "1e" + "9" * min(size, 300),
        lambda: "-" * size + "5.",
        lambda: "#### " * (size // 5),
    )
    return kinds[rng.integers(len(kinds))]()


def test_ten_thousand_hostile_completions_cost_under_a_millisecond_each():
    rng = np.random.default_rng(0)
    seconds, texts = [], [hostile_text(rng) for _ in range(10_000)]
    for function in (rewards.correctness, rewards.strict_format, rewards.tag_count):
        assert np.isfinite(function(completions=texts[:1000], answer=["42"] * 1000)).all()
    for text in texts:
        started = time.perf_counter()
        assert np.isfinite(rewards.answer(completions=[text], answer=["42"])).all()
        seconds.append(time.perf_counter() - started)
    assert np.median(seconds) < 1e-3


def test_math_answers_are_compared_symbolically():
    pairs = [
        (r"\boxed{\frac{1}{2}}", "1/2", 1.0),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1.0),
        (r"\boxed{x^2}", "x", 0.0),
        ("#### 18", "$18.00", 1.0),
        ("no answer", "4", 0.0),
    ]
    texts, wanted, scores = zip(*pairs, strict=True)
    assert rewards.math_answer(completions=texts, answer=wanted) == list(scores)


def test_an_expression_that_cannot_be_compared_in_time_is_not_equal():
    bomb = r"\boxed{9^{9^{9^{9}}}}"
    started = time.perf_counter()
    assert rewards.math_answer(completions=[bomb, r"\boxed{\frac{2}{4}}"], answer=["x", "1/2"]) == [0.0, 1.0]
    assert time.perf_counter() - started < 20


def test_scores_of_none_do_not_apply():
    parsed = [
        Reward("some", lambda completions: [None, 1.0, None]),
        Reward("other", lambda completions: [2.0, 3.0, None]),
    ]
    total, parts = score_completions(parsed, 5.0, {"completions": ["a", "b", "c"]})
    np.testing.assert_array_equal(parts["some"], [np.nan, 1.0, np.nan])
    np.testing.assert_array_equal(total, [2.0, 4.0, np.nan])


def test_coroutines_are_awaited_and_timed():
    async def slow(completions, seconds=0.01):
        await asyncio.sleep(seconds)
        return [len(text) for text in completions]

    np.testing.assert_array_equal(call_reward(Reward("slow", slow), 5.0, {"completions": ["a", "bcd"]}), [1, 3])
    with pytest.raises(UsageError, match="reward slow: no result after 0.2 s"):
        call_reward(Reward("slow", functools.partial(slow, seconds=3)), 0.2, {"completions": ["a"]})


def test_the_overlong_penalty_grows_over_the_buffer():
    (reward,) = rewards.overlong_rewards(4, 0.5, 10)
    ids = [[0] * size for size in (1, 6, 8, 10)]
    assert reward.weight == 0.5
    assert reward.function(completions=[""] * 4, completion_ids=ids) == [0.0, 0.0, -0.5, -1.0]
    with pytest.raises(UsageError, match="--overlong_buffer=20"):
        rewards.overlong_rewards(20, 1.0, 10)


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


def test_a_reward_file_may_define_dataclasses(tmp_path):
    (tmp_path / "r.py").write_text(
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int = 1\n"
        "def f(completions, **_):\n    return [float(A().x)] * len(completions)\n"
    )
    assert parse_rewards(f"{tmp_path}/r.py:f")[0].function(completions=["a", "b"]) == [1.0, 1.0]


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
