"""Kinds of runs by two and four workers against one process, and workers lost at random moments: `-m soak`."""

import json
import random
import signal
import time

import pytest
from pod_runs import SMALL, alone, codes, errors, files_of, rows, same_metrics, same_weights, start

TINY = ("--model=builtin:tiny", "--batch_size=8", *SMALL[1:2], *SMALL[3:])

KINDS = {
    "full": (),
    "LoRA with dropout": ("--lora_rank=4", "--lora_dropout=0.1"),
    "responses on file": ("--offline", "--dataset=scored.jsonl"),
    "evaluation": ("--eval_steps=2", "--eval_size=8"),
    "moving reference": ("--beta=0.1", "--sync_ref_steps=2"),
    "several updates": ("--num_iterations=2", "--num_minibatches=2"),
    "resampling": ("--zero_std_groups=resample", "--reward=correctness"),
}

PODS = [pytest.param(2, "4,1", id="two"), pytest.param(4, "8,1", id="four"), pytest.param(2, "2,2", id="tp")]
"""Workers, and the mesh of all their devices."""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Compiled programs of all runs here."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def folder(tmp_path, programs):
    (tmp_path / "programs").symlink_to(programs)
    asked = [{"prompt": f"{a} + 2?", "completion": f"#### {a + 2}"} for a in range(24)]
    scored = [
        {"prompt": row["prompt"], "responses": ["no", row["completion"], "7", "x"], "scores": [0.0, 1.0, 0.2, 0.1]}
        for row in asked
    ]
    for name, lines in (("rows", asked), ("scored", scored)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "prompts.txt").write_text("".join(f"What is {a} + {a}?\n" for a in range(5)))
    return tmp_path


def finish(folder, count, module, *flags):
    pod = start(folder, count, module, *flags)
    assert codes(pod) == [0] * count, [errors(folder, i)[-3:] for i in range(count)]


@pytest.mark.parametrize(("count", "mesh"), PODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pod_trains_as_one_process_does(folder, count, mesh, kind):
    flags = [*TINY, *KINDS[kind], f"--mesh={mesh}"]
    alone(folder, "train", *flags, "--output_dir=one")
    finish(folder, count, "train", *flags, "--output_dir=pod")
    same_metrics(folder / "one", folder / "pod")
    same_weights(folder / "one/final", folder / "pod/final")
    assert files_of(folder / "pod") - files_of(folder / "one") == {f"train.worker-{i}.log" for i in range(1, count)}
    if kind == "evaluation":
        assert rows(folder / "one/evaluations.jsonl") == rows(folder / "pod/evaluations.jsonl")


@pytest.mark.parametrize(("count", "mesh"), PODS[:2])
def test_a_pod_trains_on_completions_as_one_process_does(folder, count, mesh):
    flags = ["--model=builtin:tiny", "--dataset=rows.jsonl", "--batch_size=8", "--max_steps=3", f"--mesh={mesh}"]
    alone(folder, "sft", *flags, "--output_dir=one")
    finish(folder, count, "sft", *flags, "--output_dir=pod")
    same_metrics(folder / "one", folder / "pod")
    same_weights(folder / "one/final", folder / "pod/final")


@pytest.mark.parametrize(("count", "mesh"), PODS[:2])
def test_a_pod_measures_and_answers_as_one_process_does(folder, count, mesh):
    measure = ["--model=builtin:tiny", "--eval_size=16", "--max_completion_length=32", f"--mesh={mesh}"]
    one = json.loads(alone(folder, "evaluate", *measure).splitlines()[-1])
    finish(folder, count, "evaluate", *measure)
    pod = json.loads((folder / "worker-0.stdout").read_text().splitlines()[-1])
    assert {name: value for name, value in pod.items() if "second" not in name} == {
        name: value for name, value in one.items() if "second" not in name
    }
    ask = ["--model=builtin:tiny", "--prompts=prompts.txt", "--max_completion_length=32", f"--mesh={mesh}"]
    said = alone(folder, "generate", *ask)
    finish(folder, count, "generate", *ask)
    assert (folder / "worker-0.stdout").read_text() == said != ""
    assert all((folder / f"worker-{i}.stdout").read_text() == "" for i in range(1, count))


LONG = (*TINY, "--mesh=4,1", "--max_steps=8", "--eval_steps=4", "--eval_size=8", "--start_timeout=45")
"""Within --start_timeout a worker waits for one that was lost before they met."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, programs):
    """A run left alone, and the seconds that a pod takes for it."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "programs").symlink_to(programs)
    alone(folder, "train", *LONG, "--output_dir=run")
    finish(folder, 4, "train", *LONG, "--start_timeout=300", "--output_dir=compiled")
    started = time.monotonic()
    finish(folder, 4, "train", *LONG, "--output_dir=timed")
    return folder / "run", time.monotonic() - started


@pytest.mark.parametrize("number", range(20))
def test_a_worker_lost_at_a_random_moment_costs_nothing(folder, whole, number):
    """Killed or told to stop; the rest ends within a minute, and four, two or one worker go on."""
    untouched, seconds = whole
    rng, count = random.Random(number), (4, 2)[number % 2]
    victim, sent = rng.randrange(count), (signal.SIGKILL, signal.SIGTERM)[number // 10]
    pod = start(folder, count, "train", *LONG, "--output_dir=run")
    time.sleep(rng.uniform(0.5, seconds))
    pod[victim].send_signal(sent)
    ended = codes(pod, 60)
    for i, code in enumerate(ended):
        never_met = code == 2 and "--start_timeout=45" in errors(folder, i)[-1]
        assert never_met or code in {0, 75, 143, -sent}, (ended, errors(folder, i)[-3:])
    assert "Traceback" not in "".join("\n".join(errors(folder, i)) for i in range(count))
    again = ["--resume"] if (folder / "run/config.json").exists() else []
    following = (4, 2, 1)[number % 3]
    (finish if following > 1 else lambda folder, count, *rest: alone(folder, *rest))(
        folder, following, "train", *LONG, *again, "--output_dir=run"
    )
    same_metrics(untouched, folder / "run")
    same_weights(untouched / "final", folder / "run/final")
