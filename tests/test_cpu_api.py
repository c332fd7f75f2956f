"""The Python door: arguments are the flags, errors one line, rows and functions as they are; the notebook runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
