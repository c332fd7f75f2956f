"""`python -m minigrpo.evaluate`: accuracy of a model's answers to held-out problems."""

import dataclasses
import json
import math
import sys
import time

import jax
import numpy as np

from minigrpo.config import (
    LARGEST_SEED,
    DataOptions,
    ModelOptions,
    Options,
    RolloutOptions,
    Settings,
    option,
    run_command,
)
from minigrpo.data import Prompts, load_dataset, tokenize
from minigrpo.model import Params
from minigrpo.rewards import same_answer
from minigrpo.start import Setup, set_up

QUEUE = 2
"""Prompts prefilled per slot."""

Z95 = 1.96
"""Standard errors on either side of a 95 % interval."""


@dataclasses.dataclass(frozen=True)
class EvalOptions(Options):
    """Evaluation"""

    mesh: str = option("auto", "FSDP,TP mesh; auto is every device as fsdp, and 1,1 on CPU")
    eval_size: int = option(500, "held-out problems answered", low=1)
    seed: int = option(0, "seed of sampling and of random weights", low=0, high=LARGEST_SEED)


SECTIONS = (ModelOptions, DataOptions, RolloutOptions, EvalOptions)


def held_out(setup: Setup, options: DataOptions, size: int) -> Prompts:
    dataset = load_dataset(options, "test")
    dataset = dataclasses.replace(dataset, rows=dataset.rows[:size])
    return tokenize(dataset, setup.tokenizer, options)


def interval(share: float, count: int) -> tuple[float, float]:
    """95 % Wilson interval of a share of `count` trials (Wilson 1927, eq. 1)."""
    centre = share + Z95**2 / (2 * count)
    half = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    return (centre - half) / (1 + Z95**2 / count), (centre + half) / (1 + Z95**2 / count)


def accuracy(
    setup: Setup, params: Params, problems: Prompts, decoding: RolloutOptions, seed: int = 0
) -> dict[str, float]:
    """Share of the problems that are answered rightly, one answer each; "dropped" counts those too long to ask.

    They are asked in several rollouts, so that no device holds more prompts than QUEUE times its slots.
    """
    roller = setup.roller(decoding)
    rounds = -(-len(problems) // (QUEUE * decoding.slots * setup.mesh.size))
    answers: list[list[int]] = []
    for part in np.array_split(np.arange(len(problems)), rounds):
        rollout = roller(params, [problems.tokens[i] for i in part], part.tolist(), 1, (seed, 0))
        answers += [row[:length].tolist() for row, length in zip(rollout.tokens, rollout.lengths, strict=True)]
    pairs = zip(setup.tokenizer.decode(answers), problems.rows, strict=True)
    right = sum(same_answer(text, row["answer"]) for text, row in pairs)
    return {
        "accuracy": right / len(problems),
        "problems": len(problems),
        "dropped": problems.dropped,
        "mean_length": float(np.mean([len(row) for row in answers])),
    }


def main(settings: Settings) -> int:
    setup = set_up(settings, settings[EvalOptions].mesh)
    started = time.perf_counter()
    options = settings[EvalOptions]
    final = setup.settings.with_defaults({"temperature": 0.0})
    params = setup.load(options.seed)
    problems = held_out(setup, final[DataOptions], options.eval_size)
    result = accuracy(setup, params, problems, final[RolloutOptions], options.seed)
    low, high = interval(result["accuracy"], int(result["problems"]))
    sys.stderr.write(
        f"{setup.settings[ModelOptions].model} on {setup.settings[DataOptions].dataset}: accuracy "
        f"{result['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}) of {result['problems']} problems, "
        f"{result['dropped']} dropped as too long\n"
    )
    extra = {"interval": [low, high], "seconds": time.perf_counter() - started, "platform": jax.default_backend()}
    sys.stdout.write(json.dumps(result | extra) + "\n")
    return 0


if __name__ == "__main__":
    run_command(
        "python -m minigrpo.evaluate", __doc__ or "", SECTIONS, main, "Here --temperature is 0 unless given: greedy."
    )
