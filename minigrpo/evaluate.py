"""`python -m minigrpo.evaluate`: accuracy of a model's greedy answers on held-out problems."""

import dataclasses
import json
import math
import sys
import time

import jax

from minigrpo.config import (
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

Z95 = 1.96
"""Standard errors on either side of a 95 % interval."""


@dataclasses.dataclass(frozen=True)
class EvalOptions(Options):
    """Evaluation"""

    mesh: str = option("auto", "FSDP,TP mesh; auto is every device as fsdp, and 1,1 on CPU")
    eval_size: int = option(500, "held-out problems answered", low=1)
    seed: int = option(0, "seed of random weights", low=0)


SECTIONS = (ModelOptions, DataOptions, RolloutOptions, EvalOptions)


def held_out(setup: Setup, size: int) -> Prompts:
    dataset = load_dataset(setup.settings[DataOptions], "test")
    dataset = dataclasses.replace(dataset, rows=dataset.rows[:size])
    return tokenize(dataset, setup.tokenizer, setup.settings[DataOptions])


def interval(share: float, count: int) -> tuple[float, float]:
    """95 % Wilson interval of a share of `count` trials (Wilson 1927, eq. 1)."""
    centre = share + Z95**2 / (2 * count)
    half = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    return (centre - half) / (1 + Z95**2 / count), (centre + half) / (1 + Z95**2 / count)


def accuracy(setup: Setup, params: Params, size: int) -> dict[str, float]:
    """Share of the first `size` held-out problems whose greedy answer is right."""
    problems = held_out(setup, size)
    greedy = dataclasses.replace(setup.settings[RolloutOptions], temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
    rollout = setup.roller(greedy)(params, problems.tokens, list(range(len(problems))), 1, (0, 0))
    pairs = zip(rollout.tokens, rollout.lengths, strict=True)
    texts = setup.tokenizer.decode([tokens[:length] for tokens, length in pairs])
    right = sum(same_answer(text, row["answer"]) for text, row in zip(texts, problems.rows, strict=True))
    return {"accuracy": right / len(problems), "problems": len(problems), "mean_length": float(rollout.lengths.mean())}


def main(settings: Settings) -> int:
    setup = set_up(settings, settings[EvalOptions].mesh)
    started = time.perf_counter()
    result = accuracy(setup, setup.load(settings[EvalOptions].seed), settings[EvalOptions].eval_size)
    low, high = interval(result["accuracy"], int(result["problems"]))
    sys.stderr.write(
        f"{setup.settings[ModelOptions].model} on {setup.settings[DataOptions].dataset}: greedy accuracy "
        f"{result['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}) of {result['problems']} problems\n"
    )
    extra = {"interval": [low, high], "seconds": time.perf_counter() - started, "platform": jax.default_backend()}
    sys.stdout.write(json.dumps(result | extra) + "\n")
    return 0


if __name__ == "__main__":
    run_command("minigrpo.evaluate", __doc__ or "", SECTIONS, main)
