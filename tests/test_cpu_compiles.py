"""A run compiles each of its device programs once, whatever its lengths."""

import json
import re

import numpy as np
import pytest

from minigrpo import train
from minigrpo.command_line import parse_flags

MOST = {"gradients": 2, "batch_logprobs": 2, "run_mesh": 1, "apply_gradients": 1, "decode_weights": 1}
SMALL = [
    "--batch_size=4",
    "--num_generations=4",
    "--report_to=none",
    "--save_steps=0",
    "--max_completion_length=48",
    "--eval_steps=0",
]


def scored_file(folder):
    """Responses of 1 to 40 words."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": f"Count {n}." * int(rng.integers(1, 6)),
            "responses": ["one two three four " * int(rng.integers(1, 10)) for _ in range(4)],
            "scores": [1.0, 0.0, 0.5, 0.0],
        }
        for n in range(40)
    ]
    (folder / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--dataset={folder}/scored.jsonl"


EVALUATED = ["--max_steps=8", "--eval_steps=4", "--eval_size=150"]
CASES = {
    "one device": (["--mesh=1,1", "--max_steps=60"], 1),
    "mesh": (["--mesh=4,2", "--max_steps=12", "--beta=0.1", "--num_iterations=2", "--num_minibatches=2"], 1),
    "adapters, evaluated": (["--mesh=2,1", "--lora_rank=4", "--lora_dropout=0.1", "--beta=0.1", *EVALUATED], 2),
    "offline": (["--mesh=2,1", "--max_steps=12", "--offline", "--beta=0.1", "--learning_rate=1e-3"], 0),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_compiles_each_program_once(name, tmp_path, capsys, traced_anew):
    flags, rollouts = CASES[name]
    flags = [*flags, scored_file(tmp_path)] if name == "offline" else flags
    assert train.main(parse_flags([*SMALL, *flags, f"--output_dir={tmp_path}/run"], train.SECTIONS)) == 0
    said = re.search(r"^compiled: (.*)$", capsys.readouterr().err, re.M)[1]
    counts = {program: int(count) for program, count in (part.rsplit(" ", 1) for part in said.split(", "))}
    assert counts.pop("run_mesh", 0) == rollouts
    assert all(count <= MOST[program] for program, count in counts.items()), counts
    lengths = [
        json.loads(line)["completions/mean_length"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert max(lengths) > 1.2 * min(lengths)
