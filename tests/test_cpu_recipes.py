"""The shipped recipes, started at toy size: every one builds a run, and two of them train."""

import json

import pytest

from minigrpo import train
from minigrpo.build import build
from minigrpo.command_line import parse_flags
from minigrpo.config import TRAIN_DEFAULTS
from minigrpo.config_files import shipped_recipes

TOY = (
    "--model=builtin:tiny", "--mesh=1,1", "--dataset=builtin:arithmetic", "--max_steps=1", "--batch_size=2",
    "--num_generations=2", "--max_completion_length=32", "--page_size=16", "--eval_steps=0", "--keep_best=",
    "--report_to=none",
)  # fmt: skip


def toy_settings(name, folder):
    """The recipe with flags over it; responses on file where it trains on them."""
    rows = [
        {"prompt": f"What is {a} plus {a}?", "responses": [f"#### {2 * a}", "#### 1"], "scores": [1.0, 0.0]}
        for a in range(3, 9)
    ]
    scored = folder / "scored.jsonl"
    scored.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [f"--dataset={scored}"] if name == "lora-scored-responses" else []
    return parse_flags([f"--config={name}", *TOY, *own, f"--output_dir={folder}/run"], train.SECTIONS)


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_builds_a_run_at_toy_size(tmp_path, name):
    settings = toy_settings(name, tmp_path)
    built = build(settings, settings.run.mesh, TRAIN_DEFAULTS)
    run, state = train.make_run(built)
    assert run.total_steps == 1 and run.data_size > 0 and state.params
    kept, given = built.settings, settings.as_dict()
    assert {name: kept.as_dict()[name] for name in settings.explicit} == {
        name: given[name] for name in settings.explicit
    }
    if settings.lora.lora_rank:
        assert built.spec.config.lora.targets == ("q", "k", "v", "o") and built.spec.config.int8
        assert not kept.steps.packing


@pytest.mark.parametrize("name", ["tunix-gsm8k", "lora-scored-responses"])
def test_a_recipe_trains(tmp_path, name):
    assert train.main(toy_settings(name, tmp_path)) == 0
    run = tmp_path / "run"
    warned = "note: --warmup_steps is more than the run's 1" in (run / "train.log").read_text()
    assert warned == (name == "lora-scored-responses")
    step = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    parts = {"answer", "think_format"} if name == "tunix-gsm8k" else set()
    assert (
        step["step"] == 1 and {part for part in ("answer", "think_format") if f"rewards/{part}/mean" in step} == parts
    )
    assert (run / "final" / "model.safetensors").exists()
    again = parse_flags([f"--config={run}/config.json", "--resume"], train.SECTIONS)
    assert again.as_dict() | {"resume": False} == json.loads((run / "config.json").read_text())
    train.check_home(train.with_run_settings(again), train.RunHome(run))
    build(again, again.run.mesh, TRAIN_DEFAULTS)
