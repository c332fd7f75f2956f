"""`python -m minigrpo.evaluate`: accuracy of a model's answers to held-out problems."""

import dataclasses
import json
import math
import sys
import time

import jax

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
    setup: Setup, params: Params, data: DataOptions, decoding: RolloutOptions, size: int, seed: int = 0
) -> dict[str, float]:
    """Share of the first `size` held-out problems that are answered rightly, one answer each."""
    problems = held_out(setup, data, size)
    rollout = setup.roller(decoding)(params, problems.tokens, list(range(len(problems))), 1, (seed, 0))
    pairs = zip(rollout.tokens, rollout.lengths, strict=True)
    texts = setup.tokenizer.decode([tokens[:length] for tokens, length in pairs])
    right = sum(same_answer(text, row["answer"]) for text, row in zip(texts, problems.rows, strict=True))
    return {"accuracy": right / len(problems), "problems": len(problems), "mean_length": float(rollout.lengths.mean())}


def main(settings: Settings) -> int:
    setup = set_up(settings, settings[EvalOptions].mesh)
    started = time.perf_counter()
    options = settings[EvalOptions]
    final = setup.settings.with_defaults({"temperature": 0.0})
    params = setup.load(options.seed)
    result = accuracy(setup, params, final[DataOptions], final[RolloutOptions], options.eval_size, options.seed)
    low, high = interval(result["accuracy"], int(result["problems"]))
    sys.stderr.write(
        f"{setup.settings[ModelOptions].model} on {setup.settings[DataOptions].dataset}: accuracy "
        f"{result['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}) of {result['problems']} problems\n"
    )
    extra = {"interval": [low, high], "seconds": time.perf_counter() - started, "platform": jax.default_backend()}
    sys.stdout.write(json.dumps(result | extra) + "\n")
    return 0


if __name__ == "__main__":
    run_command(
        "python -m minigrpo.evaluate", __doc__ or "", SECTIONS, main, "Here --temperature is 0 unless given: greedy."
    )
