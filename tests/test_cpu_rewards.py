"""Rewards: answers as people write them, hostile completions, and functions that misbehave."""

import asyncio
import contextlib
import copy
import decimal
import functools
import itertools
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from minigrpo.config import UsageError
from minigrpo.data import rewards
from minigrpo.data.calls import Reward, TrainerState, call_reward
from minigrpo.data.grading import same_answer
from minigrpo.data.rewards import check_columns, parse_rewards, score_completions

GOOD = "<reasoning>\n6 * 7 = 42\n</reasoning>\n<answer>\n42\n</answer>"


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
    size = int(10 ** rng.uniform(1, 4.5))
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


def test_ten_thousand_hostile_completions_cost_about_a_millisecond_each():
    rng = np.random.default_rng(0)
    seconds, texts = [], [hostile_text(rng) for _ in range(10_000)]
    for function in (rewards.correctness, rewards.strict_format, rewards.tag_count):
        assert np.isfinite(function(completions=texts[:1000], answer=["42"] * 1000)).all()
    for text in texts:
        started = time.process_time()
        assert np.isfinite(rewards.answer(completions=[text], answer=["42"])).all()
        seconds.append(time.process_time() - started)
    assert np.median(seconds) < 2e-3  # 0.3 ms of them without the checks of annotations that tests switch on


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


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<answer>18</answer>", 2.0),
        ("<answer>\n18\n</answer>", 2.0),
        ("<answer>18.0</answer>", 1.5),
        ("<answer>$18</answer>", 1.5),
        ("#### 18", 1.5),
        (r"\boxed{18}", 1.5),
        ("it is 18", 1.5),
        ("<answer>19</answer>", 0.0),
    ],
)
def test_correctness_tells_the_reference_itself_from_other_forms_of_it(completion, score):
    assert rewards.correctness(completions=[completion], answer=["work\n#### 18"]) == [score]


def test_scores_of_none_do_not_apply():
    parsed = [
        Reward("some", lambda completions: [None, 1.0, None]),
        Reward("other", lambda completions: [2.0, 3.0, None]),
    ]
    scores = score_completions(parsed, 5.0, {"completions": ["a", "b", "c"]})
    np.testing.assert_array_equal(scores.by_function["some"], [np.nan, 1.0, np.nan])
    np.testing.assert_array_equal(scores.rewards, [2.0, 4.0, np.nan])


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
    scores = score_completions(parsed, 5.0, arguments)
    np.testing.assert_allclose(scores.by_function["brevity"], [len(GOOD) + 10, 21])
    np.testing.assert_allclose(scores.rewards, [1.0 + len(GOOD) + 10, 21])


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


# TRL's own calls


class Recorded:
    """What TRL's trainer, without its model, hands to reward functions."""

    def __init__(self, functions):
        self.accelerator = SimpleNamespace(device="cpu")
        self.reward_funcs, self.reward_processing_classes = functions, [None] * len(functions)
        self.reward_func_names = [function.__name__ for function in functions]
        self.state, self.environments = TrainerState(global_step=3, max_steps=9, epoch=0.5), None
        self.metrics, self.extra = {}, {}
        self._log_metric = lambda name, value: self.metrics.setdefault(name, []).append(value)
        self._log_completion_extra = lambda name, values: self.extra.setdefault(name, []).extend(values)


ROWS = [
    ("What is 2?", {"answer": "2", "level": 1, "meta": {"tags": ["a"]}}),
    ([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], {"answer": "2", "level": 1}),
    ([{"role": "user", "content": "u"}], {"answer": "2", "completion": "of the dataset", "solution": None}),
]


@pytest.mark.parametrize(("prompt", "columns"), ROWS)
def test_functions_receive_what_trl_hands_them(prompt, columns, monkeypatch):
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    monkeypatch.setattr(grpo_trainer, "gather", lambda tensor: tensor)
    monkeypatch.setattr(grpo_trainer, "profiling_context", lambda *_: contextlib.nullcontext())
    received, texts, ids = [], ["a", "bc"], [[1], [2, 3]]

    def mine(completions, **given):
        given["log_metric"]("length", 1.5)
        given["log_extra"]("seen", ["x", "y"])
        received.append({"completions": completions} | given)
        return [0.75, 0.25]

    trainer = Recorded([mine])
    completions = [[{"role": "assistant", "content": t}] for t in texts] if isinstance(prompt, list) else texts
    inputs = [{"prompt": prompt} | columns] * 2
    theirs = grpo_trainer.GRPOTrainer._calculate_rewards.__wrapped__(trainer, inputs, [prompt] * 2, completions, ids)
    arguments = {name: [value] * 2 for name, value in columns.items()} | {"prompt": [prompt] * 2}
    arguments |= {"prompts": [prompt] * 2, "completions": texts, "completion_ids": ids}
    ours = score_completions([Reward("mine", mine)], 5.0, arguments, trainer.state)
    for name in ("log_metric", "log_extra"):
        assert callable(received[0].pop(name)) and callable(received[1].pop(name))
    assert received[0] == received[1]
    np.testing.assert_array_equal(ours.by_function["mine"], theirs[:, 0].numpy())
    assert ours.metrics == {name: np.mean(values) for name, values in trainer.metrics.items()}
    assert ours.extra == trainer.extra


def test_the_rewards_that_trl_ships_run_as_they_are():
    shipped = pytest.importorskip("trl.rewards")
    prompt = [{"role": "user", "content": "u"}]
    texts = ["<think>\nx\n</think>\n" + r"\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}"]
    arguments = {"prompts": [prompt] * 2, "completions": texts, "solution": [r"\frac{1}{3}"] * 2}
    parsed = [Reward("accuracy", shipped.accuracy_reward), Reward("format", shipped.think_format_reward)]
    scores = score_completions(parsed, 60.0, arguments)
    np.testing.assert_array_equal(scores.rewards, [2.0, 0.0])
    assert list(scores.extra) == ["solution", "gold_parsed", "answer_parsed"]


def test_libraries_that_need_the_main_thread_have_it_and_other_threads_work_too():
    def alarmed(completions):
        signal.alarm(1)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.alarm(0)
        return [1.0] * len(completions)

    arguments = {"completions": ["a"]}
    assert call_reward(Reward("alarmed", alarmed), 5.0, arguments).tolist() == [1.0]
    lengths = Reward("lengths", lambda completions: map(len, completions))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(call_reward, lengths, 5.0, arguments).result().tolist() == [1.0]
        slow = Reward("slow", lambda completions: time.sleep(2))
        with pytest.raises(UsageError, match=r"reward slow: no result after 0.2 s"):
            pool.submit(call_reward, slow, 0.2, arguments).result()


def test_built_in_rewards_read_messages_and_take_any_time():
    message = [{"role": "assistant", "content": GOOD}]
    for name, function in rewards.BUILTIN.items():
        assert function(completions=[message], answer=["42"]) == function(completions=[GOOD], answer=["42"]), name
    (reward,) = parse_rewards("answer")
    assert call_reward(reward, 0.0, {"completions": [GOOD], "answer": ["42"]}).tolist() == [3.0]


def test_changes_that_a_function_makes_are_seen_by_nobody_else():
    def vandal(prompts, completions, completion_ids, meta, **_):
        completions[0] = prompts[0][0]["content"] = meta[0]["tags"][0] = "changed"
        completion_ids[0].append(7)
        meta[1]["tags"].clear()
        return [0.0, 0.0]

    def witness(prompts, completions, completion_ids, meta, **_):
        assert "changed" not in repr((prompts, completions, meta)) and completion_ids == [[1], [2]]
        return [1.0, len(meta[1]["tags"])]

    shared_row = {"tags": ["a"]}
    arguments = {"prompts": [[{"role": "user", "content": "u"}]] * 2, "completions": ["x", "y"]}
    arguments |= {"completion_ids": [[1], [2]], "meta": [shared_row, shared_row]}
    before = copy.deepcopy(arguments)
    scores = score_completions([Reward("vandal", vandal), Reward("witness", witness)], 5.0, arguments)
    np.testing.assert_array_equal(scores.by_function["witness"], [1.0, 1.0])
    assert arguments == before


class Broken(Exception):
    def __repr__(self):
        raise RuntimeError("no repr")

    __str__ = __repr__


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions: fail(Broken()), r"raised Broken \(its repr fails\) at .*test_cpu_rewards.py:\d+$"),
        (lambda completions: fail(ValueError("x" * 10**6)), r"raised ValueError\('x+\.\.\. at .*test_cpu_rewards"),
        (lambda completions: fail(SystemExit(3)), r"raised SystemExit\(3\) at"),
        (lambda completions: fail(GeneratorExit()), r"raised GeneratorExit\(\) at"),
        (lambda completions, level: [1.0], "needs 'level', which no column of the dataset gives; has completions"),
        (lambda completions: [Broken(), 1.0], r"Broken \(its repr fails\) for completion 0, not a list of floats"),
        (lambda completions: [1.0] * 10**6, r"returned shape \[1000000\] for 2 completions"),
        (lambda completions: itertools.count(), r"returned shape \[3\] for 2 completions"),
        (lambda completions: (fail(KeyError(c)) for c in completions), r"raised KeyError\('a'\) at"),
        (lambda completions: 1.0, "returned 1.0, not a list of floats"),
        (lambda completions: None, "returned None, not a list of floats"),
        (lambda completions: "ab", "returned 'ab', not a list of floats"),
        (lambda completions: {"a": 1.0, "b": 2.0}, "not a list of floats"),
        (lambda completions: {1.0, 2.0}, "not a list of floats"),
        (lambda completions: frozenset([1.0, 2.0]), "not a list of floats"),
        (lambda completions: [1e39, 0.0], r"returned 1e.39 for completion 0; scores must be finite, 1e.09 at most"),
        (lambda completions: ["1", "2"], "returned '1' for completion 0, not a list of floats"),
        (lambda completions: [1j, 2j], "returned 1j for completion 0"),
        (lambda completions: [[1.0], [2.0]], r"returned \[1.0\] for completion 0"),
        (lambda completions: np.ones((2, 1)), r"returned \[1.0\] for completion 0"),
        (lambda completions: [10**400, 1], "for completion 0, not a list of floats"),
        (lambda completions: [1.0, float("inf")], "returned inf for completion 1; scores must be finite"),
        (lambda completions, log_extra: log_extra("c", [1]), r"ValueError\(\"log_extra\('c'\) needs 2 values"),
        (lambda completions, log_metric: log_metric("c", "x"), r"raised ValueError\("),
    ],
)
def test_whatever_a_function_does_is_one_line(function, message):
    arguments = {"completions": ["a", "b"]}
    with pytest.raises(UsageError, match=message) as raised:
        score_completions([Reward("bad", function)], 5.0, arguments)
    assert str(raised.value).startswith("reward bad: ")
    assert len(str(raised.value)) < 600 and "\n" not in str(raised.value)


def test_numbers_of_every_library_are_scores():
    torch = pytest.importorskip("torch")
    grown = torch.tensor([1.0, 2.0], requires_grad=True)
    for scores in (
        *(grown, list(grown), grown.to(torch.bfloat16), np.float32([1, 2]), iter([1, 2]), (n for n in (1, 2))),
        *([True, 2], [np.float64(1), np.int8(2)], [decimal.Decimal(1), 2], (1, 2), [np.array(1.0), torch.tensor(2)]),
    ):
        values = call_reward(Reward("r", lambda completions, scores=scores: scores), 5.0, {"completions": ["a", "b"]})
        assert values.tolist() == [1.0, 2.0] or values.tolist() == [1.0, 2]


def test_a_function_that_swallows_its_interruption_ends_all_the_same():
    def stubborn(completions):
        with contextlib.suppress(BaseException):
            time.sleep(5)
        time.sleep(5)

    with pytest.raises(UsageError, match="no result after 0.1 s"):
        call_reward(Reward("stubborn", stubborn), 0.1, {"completions": ["a"]})


def test_a_regular_expression_without_end_is_interrupted():
    hopeless = Reward("hopeless", lambda completions: [bool(re.match(r"(a|a)*b", "a" * 60))])
    with pytest.raises(UsageError, match="no result after 0.3 s"):
        call_reward(hopeless, 0.3, {"completions": ["a"]})


# Files and modules


def write_package(folder):
    (folder / "rewards").mkdir()
    (folder / "rewards" / "helper_mod.py").write_text("def score(text):\n    return len(text) / 1\n")
    (folder / "rewards" / "mine.py").write_text(
        "from helper_mod import score\n\n\ndef r(completions, **_):\n    return [score(t) for t in completions]\n\n\n"
        "def late(completions, **_):\n    import late_helper\n\n    return [late_helper.ONE] * len(completions)\n\n\n"
        "def bad(completions, **_):\n    return [score(None)]\n"
    )
    (folder / "rewards" / "late_helper.py").write_text("ONE = 1.0\n")


@pytest.fixture
def clean_path(monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield
    for name in [name for name in sys.modules if name.startswith(("helper_mod", "late_helper", "rewards", "reward_"))]:
        del sys.modules[name]


@pytest.mark.parametrize("source", ["rewards/mine.py", "{}/rewards/mine.py"])
def test_a_reward_file_imports_its_neighbours_from_any_folder(tmp_path, monkeypatch, clean_path, source):
    write_package(tmp_path)
    (tmp_path / "helper_mod.py").write_text("raise RuntimeError('the wrong one')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    path = source.format(tmp_path)
    parsed = parse_rewards(f"{path}:r, {path}:late*2")
    assert score_completions(parsed, 5.0, {"completions": ["abc", ""]}).rewards.tolist() == [5.0, 2.0]
    with pytest.raises(UsageError, match=r"raised TypeError\(.*\) at .*rewards/helper_mod.py:2$"):
        call_reward(parse_rewards(f"{path}:bad")[0], 5.0, {"completions": ["a"]})


def test_a_module_is_named_by_dots(tmp_path, monkeypatch, clean_path):
    write_package(tmp_path)
    (tmp_path / "rewards" / "__init__.py").write_text("")
    (tmp_path / "rewards" / "more.py").write_text("def two(completions, **_):\n    return [2.0] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    (reward,) = parse_rewards("rewards.more:two*0.5")
    assert (reward.name, reward.weight) == ("two", 0.5)
    assert call_reward(reward, 5.0, {"completions": ["a"]}).tolist() == [2.0]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("corectness", "did you mean correctness[?]"),
        ("acuracy", "did you mean answer[?]"),
        ("accuracy_reward", "did you mean math_answer[?]"),
        ("xmlcount_reward_func", "did you mean tag_count[?]"),
        ("", "--reward=: no such reward"),
        ("answer,", "--reward=: no such reward"),
        ("answer*", "the weight '' is not a number"),
        ("answer*nan", "the weight must be finite"),
        ("answer*1*2", "the weight '1[*]2' is not a number"),
        ("no.such.module:f", "no module no.such.module; a file is named PATH.py:f"),
        ("json:lods", "json has no function lods; did you mean loads[?]"),
        ("a/b:f", "there is no Python file a/b"),
        ("tests:", "has no function"),
    ],
)
def test_flags_that_name_no_reward_say_what_is_near(flag, message):
    with pytest.raises(UsageError, match=message) as raised:
        parse_rewards(flag)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\ndef f(:\n", r"SyntaxError\(.* at .*r.py:2$"),
        ("x = '\0'\n", r"failed: (ValueError|SyntaxError)\((?!.*minigrpo).*"),
        ("raise BaseException(5)\n", r"BaseException\(5\) at .*r.py:1$"),
        ("raise GeneratorExit\n", r"GeneratorExit\(\) at .*r.py:1$"),
        ("\n\nraise KeyError('x' * 10**6)\n", r"KeyError\('x+\.\.\. at .*r.py:3$"),
        ("import sys\nsys.exit(3)\n", r"SystemExit\(3\) at .*r.py:2$"),
        ("import no_such_neighbour\n", r"ModuleNotFoundError\(.*no_such_neighbour.*\) at .*r.py:1$"),
    ],
)
def test_a_file_that_cannot_be_imported_is_named_with_its_line(tmp_path, clean_path, text, message):
    (tmp_path / "r.py").write_text(text)
    with pytest.raises(UsageError, match=message) as raised:
        parse_rewards(f"{tmp_path}/r.py:f")
    assert len(str(raised.value)) < 700


def test_columns_that_a_reward_needs_are_known_before_anything_is_sampled():
    own = Reward("own", lambda completions, trainer_state, log_metric, level, hint="": [])
    check_columns([own, *parse_rewards("think_format")], ["prompt", "level"])
    with pytest.raises(UsageError, match="reward own: needs 'level'"):
        check_columns([own], ["prompt"])
    with pytest.raises(UsageError, match="reward answer: needs 'answer'"):
        check_columns(parse_rewards("answer"), ["prompt", "level"])
