"""The grader: right endings in every form that models write, wrong ones that look right, and work bounded for each."""

import doctest
import json
import os
import time

import math_verify
import numpy as np
import pytest

from minigrpo import evaluate
from minigrpo.config import UsageError
from minigrpo.data import grading, rewards, symbolic
from minigrpo.data.datasets import PromptSet
from minigrpo.data.grading import extract_answer, marked_answer, most_common, same_answer, take_undecided
from minigrpo.data.rows import Ragged

RIGHT = [
    (r"\boxed{18}", "18"),
    (r"so we get \boxed{18}.", "18"),
    (r"\boxed{1{,}000}", "1000"),
    (r"\boxed{18\text{ dollars}}", "18"),
    (r"\boxed{18\,\text{dollars}}", "18"),
    (r"\boxed{42^\circ}", "42"),
    (r"\boxed{42^{\circ}}", "42"),
    (r"\boxed{42 \mathrm{~cm}^{2}}", "42"),
    (r"\boxed{\$1,000}", "1000"),
    (r"\boxed{\textbf{18}}", "18"),
    (r"\boxed{x = 18}", "18"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{-\frac{1}{2}}", "-0.5"),
    (r"\boxed{\dfrac12}", r"\frac{1}{2}"),
    (r"\boxed{x^2+2x+1}", "(x+1)^2"),
    (r"\boxed{2(5-\sqrt5)}", r"10 - 2\sqrt{5}"),
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}"),
    (r"\boxed{10^{3}}", "1000"),
    (r"\boxed{2\sqrt{5}\text{ cm}}", r"2\sqrt5"),
    (r"\boxed {7}", "7"),
    (r"\fbox{7}", "7"),
    ("#### $18$", "18"),
    (r"#### \(18\)", "18"),
    (r"#### \[18\]", "18"),
    ("#### $$18$$", "18"),
    ("#### **18**", "18"),
    ("#### `18`", "18"),
    ("#### ```18```", "18"),
    ("#### __18__", "18"),
    ("#### **$18**", "18"),
    ("#### +3", "3"),
    ("#### \u22123", "-3"),
    ("#### \u20133", "-3"),
    ("#### 25 km/h", "25"),
    ("#### 42 cm^2", "42"),
    ("#### 42 cm\u00b2", "42"),
    ("#### 42 square feet", "42"),
    ("#### \u20ac20", "20"),
    ("#### 20 \u20ac", "20"),
    ("#### \u00a320", "20"),
    ("#### 20 USD", "20"),
    ("#### US$20", "20"),
    ("#### 18 (eighteen)", "18"),
    ("#### 18 dollars (USD)", "18"),
    ("#### 18m", "18"),
    ("#### 18 m", "18"),
    ("#### 1 000 000", "1000000"),
    ("#### 1\u202f000\u202f000", "1,000,000"),
    ("#### 1,00,000", "100000"),
    ("#### 5 million", "5000000"),
    ("#### 2 1/2", "2.5"),
    (r"#### 2\frac{1}{2}", "2.5"),
    ("#### 2\u00bd hours", "2.5"),
    ("#### 1/2", "0.5"),
    ("#### 0.5", "1/2"),
    ("#### 0.333333", "1/3"),
    ("#### 18.00", "18"),
    ("#### 18.", "18"),
    ("#### .5", "0.50"),
    ("#### 18 percent", "18"),
    ("#### 18 %", "18%"),
    ("#### 50%", "0.5"),
    ("#### 1.5 x 10^3", "1500"),
    (r"#### 1.5 \times 10^{3}", "1500"),
    ("#### 1.5e3 meters", "1500"),
    ("#### The answer is 18", "18"),
    ("#### Answer: 18", "18"),
    ("#### x = 18", "18"),
    ("#### 6 * 3 = 18", "18"),
    ("#### She makes $18 per day", "18"),
    ("#### approximately 18", "18"),
    ("#### 18 dollars/day", "18"),
    ("#### 18 more apples", "18"),
    ("#### (18)", "18"),
    ("#### 18<|im_end|>", "18"),
    ("#### -$5", "-5"),
    ("#### 72 clips", "work\n#### 72"),
    ("<answer>50%</answer>", "50"),
    ("<answer>\n**18**\n</answer>", "18"),
    ("<answer>$18</answer>", "18"),
    ("<answer>x^2+1</answer>", "1 + x^2"),
    ("<answer> Paris </answer>", "paris"),
    (r"<answer>\text{Paris}</answer>", "Paris"),
    ("<answer>10:30</answer>", "10:30"),
    ("<answer>(A)</answer>", "A"),
    ("<answer>1, 2, 3</answer>", "1,2,3"),
    ("<answer>x = 12kg</answer>", "12"),
    ("The total is $1,234.50.", "1234.5"),
    ("it is 7.00 dollars", "7"),
    ("So it is 1/2.", "0.5"),
    (r"Thus the answer is $\frac{1}{2}$.", "0.5"),
    (r"Thus we have \(x = 18\).", "18"),
    ("Costs are $5 and $18", "18"),
    ("10-5 is not it, 3-5 neither; 5-18 gives 13", "13"),
    ("#### Step 1: add\n2 + 2 = 4\n#### Step 2: done\n" + r"\boxed{4}", "4"),
    ("revenue is 5 million.", "5,000,000"),
]

WRONG = [
    ("#### not 5", "5"),
    ("#### half of 10", "10"),
    ("#### less than 5", "5"),
    ("#### more than 5", "5"),
    ("#### at least 5", "5"),
    ("#### 5 at most", "5"),
    ("#### 5 million", "5"),
    ("#### 5 thousand", "5"),
    ("#### 5k", "5"),
    ("#### 1,2,3", "123"),
    ("#### 1, 2, 3", "123"),
    ("#### 1 2 3", "123"),
    ("#### 1,2", "12"),
    ("#### 5 or 6", "5"),
    ("#### 4 or 42", "42"),
    ("#### 5 and 6", "5"),
    ("#### between 4 and 5", "5"),
    ("#### the answer is not 5", "5"),
    ("#### it isn't 5", "5"),
    ("#### no more than 5", "5"),
    ("#### twice 5", "5"),
    ("#### 5 squared", "5"),
    ("#### 5!", "5"),
    ("#### 3x", "3"),
    ("#### 3xy", "3"),
    ("#### 5 pi", "5"),
    (r"#### 5\pi", "5"),
    ("#### 5x^2", "5"),
    ("#### 2x = 10", "10"),
    ("#### x < 5", "5"),
    ("#### x > 5", "5"),
    (r"#### \pm 5", "5"),
    ("#### 2**3", "23"),
    ("#### 3-5", "5"),
    ("#### 5/0", "5"),
    ("#### 1/2", "12"),
    ("#### 2 1/2", "21/2"),
    ("#### 10:30", "1030"),
    ("#### 5.5.5", "5.5"),
    ("#### 4.2", "42"),
    ("#### 3,5", "35"),
    ("#### -42", "42"),
    ("#### square root of 25", "25"),
    ("#### 5 is wrong", "5"),
    (r"\boxed{\text{not }5}", "5"),
    (r"\boxed{5\text{ or }6}", "5"),
    (r"\boxed{\frac{1}{3}}", "0.33"),
    (r"\boxed{x^2}", "x"),
    (r"\boxed{}", "5"),
    ("The answer is 5 million.", "5"),
    ("The answer is not 5.", "5"),
    ("It must be less than 5", "5"),
    ("It is half of 10", "10"),
    ("<answer></answer> 42", "42"),
    ("<answer>3x</answer>", "3y"),
    ("<answer>1/3</answer>", "#### 1/2"),
    ("#### 7\n#### 8", "7"),
    ("", "42"),
    ("no number at all", "42"),
]


@pytest.mark.parametrize(("completion", "reference"), RIGHT)
def test_a_right_ending_is_right_in_every_form(completion, reference):
    assert same_answer(completion, reference)


@pytest.mark.parametrize(("completion", "reference"), WRONG)
def test_a_wrong_ending_is_wrong(completion, reference):
    assert not same_answer(completion, reference)


@pytest.mark.parametrize("text", ["#### 5", "nothing", "The answer is 7", r"\\boxed{5", "<answer>7"])
def test_the_strict_form_reads_marked_answers_only(text):
    assert (marked_answer(text) is None) == ("####" not in text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 1 <answer>2</answer> 3", "2"),
        (r"\boxed{5} then #### 6", "6"),
        (r"7 \boxed{8} 9", "8"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("about 42.", "42"),
        ("#### Step 1\n" + r"\boxed{3}", "3"),
        (r"so it is $\frac{x}{2}$.", r"\frac{x}{2}"),
        ("we pay $5, she $6", "$6"),
        ("none", None),
    ],
)
def test_the_final_answer_is_found_by_its_marks(text, answer):
    assert extract_answer(text) == answer


def test_every_mark_of_real_solutions_is_given(shared):
    path = shared / "scored" / "gsm8k_scored.jsonl"
    if not path.exists():
        pytest.skip("needs shared/data/scored")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = (shared / "gsm8k" / "test.jsonl").read_text().splitlines()
    references = {row["question"]: row["answer"] for row in map(json.loads, lines)}
    pairs = [
        (same_answer(response, references[row["prompt"]]), score > 0.5)
        for row in rows
        for response, score in zip(row["responses"], row["scores"], strict=True)
    ]
    assert len(pairs) == 2640
    assert all(ours == marked for ours, marked in pairs)


TOWERS = [rf"\boxed{{{base}^{{{middle}^{{{top}}}}}}}" for base in (7, 8, 9) for middle in (9, 8) for top in (9, 8)]


def test_towers_of_powers_take_nothing_from_the_answers_after_them():
    right = [rf"\boxed{{\frac{{{k}}}{{{2 * k + 1}}}n}}" for k in range(1, 6)]
    wanted = ["x"] * len(TOWERS) + [rf"\frac{{{3 * k}}}{{{6 * k + 3}}}n" for k in range(1, 6)]
    take_undecided()
    scores = rewards.math_answer(completions=TOWERS + right, answer=wanted)
    assert scores == [0.0] * len(TOWERS) + [1.0] * 5
    assert take_undecided() == len(TOWERS) and take_undecided() == 0


@pytest.mark.parametrize(
    "bomb",
    ["9!!!", "((9!)!)!", "((9^{999})^{999})^{999}", r"\prod_{k=1}^{10^8} k", r"\binom{10^9}{10^8}", "0.1^{9999999}"]
    + [r"\lfloor e^{10^{9}} \rfloor", "(x+y+z+1)^{40}", "x" + "+x" * 200],
)
def test_what_would_cost_too_much_is_undecided_and_counted_each_time(bomb):
    take_undecided()
    used = os.times().children_user
    assert rewards.answer(completions=[rf"\boxed{{{bomb}}}"] * 2, answer=["(x+y+z+2)^{40}"] * 2) == [0.0, 0.0]
    assert take_undecided() == 2
    assert os.times().children_user - used < symbolic.CPU_SECONDS


def test_a_process_that_was_ended_is_started_again(monkeypatch):
    process = symbolic.Process()
    assert process.ask("x+1", "1+x") == "true"
    process.child.kill()
    assert process.ask("x+1", "x+2") == "false"
    monkeypatch.setattr(process, "exchange", lambda pair: "")
    assert process.ask("x+1", "1+x") == "undecided"
    process.stop()
    monkeypatch.undo()
    monkeypatch.setattr(symbolic.sys, "executable", "/bin/false")
    with pytest.raises(UsageError, match="pip install 'math-verify"):
        process.ask("x+1", "1+x")


def test_verdicts_depend_on_no_clock(monkeypatch):
    def stopped(*_):
        raise AssertionError("the grader looked at a clock")

    symbolic.verdict.cache_clear()
    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, stopped)
    assert same_answer(r"\boxed{(x+1)^2}", "x^2+2x+1")


def test_a_platform_without_forks_and_limits_compares_too(monkeypatch):
    monkeypatch.delattr(os, "fork")
    monkeypatch.setitem(__import__("sys").modules, "resource", None)
    monkeypatch.setattr(symbolic, "count_calls", lambda: None)
    symbolic.limit_resources()
    assert symbolic.judge("x+x", "2x") == "true" and symbolic.judge("9^{9^{9}}", "x") == "undecided"


MATHS = [
    (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2"),
    ("x^2-1", "(x-1)(x+1)"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("(1,2)", "(2,1)"),
    (r"\frac{\pi}{4}", r"\frac{\pi}{2}"),
    ("3+4i", "4i+3"),
    ("a+b", "a-b"),
    (r"\sqrt{50}", r"5\sqrt{2}"),
]


@pytest.mark.parametrize(("given", "wanted"), MATHS)
def test_expressions_are_equal_where_the_library_says_so(given, wanted):
    left, right = (math_verify.parse(f"${side}$", parsing_timeout=None) for side in (given, wanted))
    assert same_answer(rf"\boxed{{{given}}}", wanted) == math_verify.verify(right, left, timeout_seconds=None)


def test_evaluate_and_the_rewards_give_the_same_marks():
    table = [pair for pair in RIGHT + WRONG if marked_answer(pair[0])]
    texts, wanted = zip(*table, strict=True)
    tokens = Ragged()
    for _ in wanted:
        tokens.append([1])
    problems = PromptSet([{"prompt": "", "answer": answer} for answer in wanted], tokens, 0)
    grades = evaluate.grade(list(texts), problems)
    marks = np.array(rewards.math_answer(completions=texts, answer=wanted), bool)
    np.testing.assert_array_equal(grades.flexible[:, 0], marks)
    np.testing.assert_array_equal(grades.strict[:, 0], marks)
    np.testing.assert_array_equal(np.array(rewards.answer(completions=texts, answer=wanted)), 3.0 * marks)


def test_the_majority_counts_equal_answers_in_every_form():
    texts = ["#### 3", r"\boxed{\frac12}", "nothing", "#### 0.5", "#### 3.0", "#### 1/2"]
    assert most_common(texts) == texts[1]
    assert most_common(["nothing", "none"]) == "nothing"
    assert most_common([r"\boxed{x}", r"\boxed{(x+1)^2}", r"\boxed{x^2+2x+1}"]) == r"\boxed{(x+1)^2}"


HOSTILE = [
    "1 1/" * 5000, r"\(1" * 7000, "$1 " * 7000, "not " * 5000 + "5", "1," * 10_000, "-" * 10**6 + "5.",
    "5" + "aaaa" * 90 + "^", "5" + " a/" * 120, "5 " + "m*" * 190 + "!", "a is " * 78 + "5", "Ab" * 190 + "=5",
    "**a" * 120, r"\text{" * 60, "(" * 390, "1_" * 190, "x=" * 190, "5 " + "ab.'-" * 70 + "!",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_answers_cost_little(text):
    started = time.process_time()
    for completion in (text, f"<answer>{text}</answer>"):
        assert not same_answer(completion, "42")
    assert time.process_time() - started < 0.5


def test_worked_examples_of_the_grader():
    result = doctest.testmod(grading)
    assert result.attempted > 3 and result.failed == 0
