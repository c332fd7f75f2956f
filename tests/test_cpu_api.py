"""The Python door: arguments are the flags, errors one line, rows and functions as they are; the notebook runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import minigrpo
from minigrpo import api
from minigrpo.config import UsageError
from minigrpo.data.rewards import parse_rewards


def brevity(completions, **kwargs):
    return [-len(text) / 100 for text in completions]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"learning_rat": 1e-3}, "learning_rat: no such argument; did you mean learning_rate?"),
        ({"lr": 1e-3}, "lr: no such argument; use learning_rate"),
        ({"reward_funcs": [len]}, "reward_funcs: no such argument; use rewards=[function, ...]"),
        ({"train_dataset": []}, "train_dataset: no such argument; use dataset=rows"),
        ({"max_steps": "many"}, "--max_steps='many': must be a whole number"),
        ({"beta": -1.0}, "--beta=-1.0"),
        ({"slots": 0}, "--slots"),
        ({"dataset": []}, "dataset: holds no rows"),
        ({"rewards": ["corectness"]}, "--reward=corectness: no such reward; did you mean correctness?"),
        ({"rewards": [(brevity, float("nan"))]}, "the weight must be finite"),
        ({"mesh": (3, 0)}, "--mesh=3,0"),
    ],
)
def test_bad_arguments_are_one_line(flags, said, tmp_path):
    with pytest.raises(UsageError) as raised:
        minigrpo.train(model="builtin:tiny", output_dir=tmp_path / "run", **flags)
    assert said in str(raised.value) and "\n" not in str(raised.value)


UNTYPED = {
    "train(dataset=5)": "dataset: 5 is neither a name nor a list of rows",
    "train(dataset=['a', 'b'])": "dataset: row 1: 'a' is no dict",
    "train(dataset=[None])": "dataset: row 1: None is no dict",
    "train(dataset={'prompt': ['a']})": "dataset: a dict of prompt; give a list of rows",
    "train(dataset=[{'prompt': b'a'}])": "dataset: row 1: {'prompt': b'a'} is no dict of texts",
    "train(dataset=[{('a', 'b'): 1}])": "dataset: row 1",
    "train(dataset=[{'prompt': chr(0xD83D)}])": "dataset: row 1: holds half of a surrogate pair",
    "train(eval_dataset=[3])": "eval_dataset: row 1: 3 is no dict",
    "train(rewards=[('correctness', 1, 2)])": "rewards: ('correctness', 1, 2) is neither a name",
    "train(rewards=5)": "rewards: 5 is neither a name",
    "train(rewards=[])": "rewards: None is neither",
    "train(on_step=5)": "on_step: 5 is no function",
    "train(max_steps=1e9)": "--max_steps=1000000000.0: must be a whole number",
    "train(batch_size=2**40)": "--batch_size",
    "train(resume=True, output_dir=None)": "output_dir: name the run to continue",
    "tiny.generate(5)": "prompts: 5 is neither a text nor a list of messages",
    "tiny.generate(['a?', None])": "prompts: None is neither",
    "tiny.generate('a?', num_generations=0)": "--num_generations=0: must be at least 1",
    "tiny.generate('a?', num_generations='2')": "--num_generations='2': must be a whole number",
    "tiny.generate('a?', seed=2**40)": "--seed=1099511627776: must be at most",
}
"""Calls with values that no type checker would let pass -> the one line of their UsageError."""

CALLS = """
import json, sys
import minigrpo
from minigrpo import train
from minigrpo.api import Model

tiny = Model(None, None)
said = {}
for call in json.load(sys.stdin):
    try:
        eval(call)
    except Exception as error:
        said[call] = [type(error).__name__, str(error)]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Of a process that checks no annotations."""
    done = subprocess.run(
        [sys.executable, "-c", CALLS], input=json.dumps(list(UNTYPED)), capture_output=True, text=True,
        cwd=tmp_path_factory.mktemp("calls"), env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("call", UNTYPED)
def test_values_of_other_types_are_one_line(said, call):
    kind, text = said[call]
    assert kind == "UsageError" and UNTYPED[call] in text and "\n" not in text, text


def test_rewards_may_come_alone_and_pairs_as_lists():
    assert api.as_rewards("correctness") == "correctness" and api.as_rewards(brevity) == "python:brevity"
    assert api.as_rewards([("correctness", 2), brevity]) == "correctness*2,python:brevity"
    assert api.as_rewards((brevity, 0.5)) == "python:brevity*0.5"


def test_rows_of_other_libraries_are_rows(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"prompt": ["a?", "b?"], "answer": [1, 2], "level": [np.float32(0.5), None]})
    texts = [api.row_text("", row) for row in api.row_list(table, "dataset")]
    assert [json.loads(text) for text in texts] == [
        {"prompt": "a?", "answer": 1, "level": 0.5}, {"prompt": "b?", "answer": 2, "level": None},
    ]  # fmt: skip
    numbers = api.row_text("", {"prompt": "a?", "answer": np.int64(1), "ids": np.arange(2)})
    assert json.loads(numbers) == {"prompt": "a?", "answer": 1, "ids": [0, 1]}


@pytest.mark.slow
def test_a_loaded_model_answers_texts_and_chats_and_ends_at_stops():
    def load(stop):
        return api.load("builtin:tiny", temperature=0.0, max_completion_length=32, mesh=(1, 1), stop=stop)

    chat, tiny = [{"role": "user", "content": "What is 2 + 3?"}], load(None)
    alone = tiny.generate(chat)
    assert isinstance(alone, str) and alone and tiny.generate([chat, chat]) == [alone, alone]
    assert tiny.generate([]) == [] and len(tiny.generate(["a?"], num_generations=2)[0]) == 2
    stopped = load([alone[3:6], "END"])
    assert stopped.build.settings.rollout.stop_texts == (alone[3:6], "END")
    ended = stopped.generate(chat)
    assert alone.startswith(ended) and len(ended) < len(alone)


def test_flags_are_written_as_python_values():
    settings = api.settings_of(
        ("rollout", "steps", "run"), {"mesh": (4, 2), "slots": 8, "max_steps": 3, "top_k": None} | {}
    )
    assert settings.run.mesh == "4,2" and settings.rollout.slots == "8" and settings.steps.max_steps == 3
    assert settings.explicit == {"mesh", "slots", "max_steps"}


def test_functions_are_rewards_by_their_names_and_weights():
    flag = ",".join(api.as_reward(reward) for reward in ["correctness", brevity, ("integer", 0.5)])
    assert [(reward.name, reward.weight) for reward in parse_rewards(flag)] == [
        ("correctness", 1.0), ("brevity", 1.0), ("integer", 0.5),
    ]  # fmt: skip
    assert parse_rewards(api.as_reward((brevity, 2)))[0].function is brevity

    def other(completions, **kwargs):
        return [1.0] * len(completions)

    other.__name__ = "brevity"
    assert parse_rewards(api.as_reward(other))[0].function is other
    with pytest.raises(UsageError, match="is a function of a Python program"):
        parse_rewards("python:unheard_of")


def test_rows_become_a_file_of_their_digest(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = [{"prompt": "2 + 2? \u00e4", "answer": "4"}]
    first, again = api.as_dataset(rows), api.as_dataset(iter(rows))
    assert first == again != api.as_dataset([{"prompt": "x"}])
    assert [json.loads(line) for line in Path(first).read_text().splitlines()] == rows
    assert api.as_dataset("gsm8k") == "gsm8k" and api.as_dataset(tmp_path) == str(tmp_path)


def test_commands_are_modules_that_may_be_called():
    import minigrpo.evaluate
    import minigrpo.generate
    import minigrpo.train

    assert all(callable(getattr(minigrpo, name)) for name in ("train", "generate", "evaluate", "load"))
    assert minigrpo.train.SECTIONS and minigrpo.train.__name__ == "minigrpo.train"
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        minigrpo.trainer  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    program = (
        "import sys, minigrpo; print([name for name in ('jax', 'numpy', 'datasets', 'flax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def run_program(folder, program):
    (folder / "notebook.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "notebook.py"], capture_output=True, text=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_notebook_runs_as_it_stands(tmp_path):
    """With an own reward, own rows, a callback, answers and an evaluation."""
    cells = json.loads((ROOT / "minigrpo/docs/quickstart.ipynb").read_text())["cells"]
    program = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    more = """
assert len(run.metrics) == 4 == len(rewards)
assert set(run.metrics[0]) >= {"rewards/correctness/mean", "rewards/brevity/mean"}
assert [row["step"] for row in run.evaluations] == [0, 4]
assert run.save("copy").joinpath("config.json").exists()
"""
    assert "report.html" in run_program(tmp_path, program + more)


def test_several_runs_in_one_process(tmp_path):
    """The second is another run, the third goes on with it."""
    program = """
import minigrpo

def brevity(completions, **kwargs):
    return [-len(text) / 200 for text in completions]

rows = [{"prompt": f"What is {a} + {a}?", "answer": str(a + a)} for a in range(2, 18)]
small = {"model": "builtin:tiny", "batch_size": 8, "num_generations": 4, "dataset": rows, "rewards": [brevity]}
first = minigrpo.train(max_steps=1, **small)
second = minigrpo.train(max_steps=1, output_dir="second", seed=1, **small)
assert len(first.metrics) == len(second.metrics) == 1 and first.folder != second.folder
assert first.metrics[0]["reward"] != second.metrics[0]["reward"]
more = minigrpo.train(resume=True, output_dir=second.folder, max_steps=2, rewards=[brevity])
assert [row["step"] for row in more.metrics] == [1, 2]
"""
    run_program(tmp_path, program)
