"""`python -m minigrpo.evaluate`: accuracy of a model's answers to held-out problems."""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from minigrpo.build import Setup, set_up
from minigrpo.config import (
    LARGEST_SEED,
    DataOptions,
    ModelOptions,
    Options,
    RolloutOptions,
    Settings,
    UsageError,
    option,
    run_command,
)
from minigrpo.data.datasets import Prompts, load_dataset, tokenize
from minigrpo.data.grading import Extract, extract_answer, marked_answer, most_common, same_answer
from minigrpo.model.hub import run_defaults
from minigrpo.model.qwen import Params
from minigrpo.planning.memory import held_bytes, pool_limit
from minigrpo.runtime.run_folder import write_lines

QUEUE = 2
"""Prompts prefilled per slot."""

Z95 = 1.96
"""Standard errors on either side of a 95 % interval."""


@dataclasses.dataclass(frozen=True)
class EvalOptions(Options):
    """Evaluation"""

    mesh: str = option("auto", "FSDP,TP mesh; auto is every device as fsdp, and 1,1 on CPU")
    eval_size: int = option(500, "held-out problems answered", low=1)
    num_generations: int = option(1, "answers per problem; several give pass@k and the majority's accuracy", low=1)
    base: str = option("", "another model to be asked the same, such as the one that training started from")
    output: str = option("", "JSONL file that every answer is written to")
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


def ask(
    setup: Setup, params: Params, problems: Prompts, decoding: RolloutOptions, samples: int, seed: int
) -> tuple[list[str], Int[np.ndarray, "B"]]:
    """`samples` answers to every problem, those of one problem adjacent, and their lengths in tokens.

    They are asked in several rollouts, so that no device holds more prompts than QUEUE times its slots.
    """
    roller = setup.roller(decoding, pool_limit=pool_limit(setup, held_bytes(params)))
    rounds = -(-len(problems) // (QUEUE * decoding.slots * setup.mesh.size))
    answers: list[list[int]] = []
    for part in np.array_split(np.arange(len(problems)), rounds):
        rollout = roller(params, [problems.tokens[i] for i in part], part.tolist(), samples, (seed, 0))
        answers += rollout.completions
    return setup.tokenizer.decode(answers), np.array([len(row) for row in answers])


@dataclasses.dataclass(frozen=True)
class Grades:
    """Which of P problems' K answers are right."""

    flexible: Bool[np.ndarray, "P K"]
    """Wherever the answer stands."""
    strict: Bool[np.ndarray, "P K"]
    """In <answer> tags, after #### or in a box."""
    majority: Bool[np.ndarray, "P"]
    """The answer given most often, the first of several."""


def grade(texts: list[str], problems: Prompts) -> Grades:
    """Grade K answers to each of P problems, those of one problem adjacent, as the rewards do."""
    samples = len(texts) // len(problems)
    groups = [texts[i * samples : (i + 1) * samples] for i in range(len(problems))]
    wanted = [row["answer"] for row in problems.rows]

    def marks(extract: Extract) -> np.ndarray:
        pairs = zip(groups, wanted, strict=True)
        return np.array([[same_answer(text, answer, extract) for text in group] for group, answer in pairs])

    majority = [same_answer(most_common(group), answer) for group, answer in zip(groups, wanted, strict=True)]
    return Grades(marks(extract_answer), marks(marked_answer), np.array(majority))


def pass_at(right: Bool[np.ndarray, "P K"], k: int) -> float:
    """Chance that one of k answers is right, estimated from all of them (arXiv:2107.03374, eq. 1)."""
    total, wrong = right.shape[1], (~right).sum(axis=1)
    return float(np.mean([1 - math.comb(int(n), k) / math.comb(total, k) for n in wrong]))


def figures(grades: Grades) -> dict[str, float]:
    """Accuracy of single answers; with several, pass@k for powers of two and the majority's accuracy too."""
    samples = grades.flexible.shape[1]
    more = [2**i for i in range(1, samples.bit_length())]
    several = {f"pass@{k}": pass_at(grades.flexible, k) for k in more}
    if samples > 1:
        several[f"majority@{samples}"] = float(grades.majority.mean())
    return {"accuracy": float(grades.flexible.mean()), "strict_accuracy": float(grades.strict.mean())} | several


def accuracy(setup: Setup, params: Params, problems: Prompts, decoding: RolloutOptions) -> dict[str, float]:
    """Share of the problems that are answered rightly, one answer each; "dropped" counts those too long to ask."""
    texts, lengths = ask(setup, params, problems, decoding, 1, 0)
    counts = {"problems": len(problems), "dropped": problems.dropped, "mean_length": float(lengths.mean())}
    return figures(grade(texts, problems)) | counts


def evaluate(setup: Setup, problems: Prompts, decoding: RolloutOptions) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One model's figures with their interval, and a line for every answer."""
    options, name = setup.settings[EvalOptions], setup.settings[ModelOptions].model
    started = time.perf_counter()
    texts, lengths = ask(setup, setup.load(options.seed), problems, decoding, options.num_generations, options.seed)
    grades = grade(texts, problems)
    result: dict[str, Any] = {"model": name, **figures(grades), "problems": len(problems)}
    result |= {"interval": interval(result["accuracy"], len(problems)), "dropped": problems.dropped}
    result |= {"mean_length": float(lengths.mean()), "seconds": time.perf_counter() - started}
    rows = [problems.rows[i] for i in range(len(problems)) for _ in range(options.num_generations)]
    lines = [
        {"model": name, "prompt": row["prompt"], "answer": row["answer"], "completion": text}
        | {"right": bool(right), "strictly_right": bool(strict)}
        for row, text, right, strict in zip(
            rows, texts, grades.flexible.reshape(-1), grades.strict.reshape(-1), strict=True
        )
    ]
    return result, lines


def report(result: dict[str, Any], dataset: str) -> None:
    """What a person reads of one model's figures."""
    low, high = result["interval"]
    several = "".join(f", {name} {result[name]:.1%}" for name in result if "@" in name)
    sys.stderr.write(
        f"{result['model']} on {dataset}: accuracy {result['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}), "
        f"strictly {result['strict_accuracy']:.1%}{several}, of {result['problems']} problems, "
        f"{result['dropped']} dropped as too long\n"
    )


def check_output(output: str) -> None:
    """UsageError, before any work, for a file that cannot be written or is there already."""
    path = Path(output)
    if output and path.exists():
        raise UsageError(f"--output={output}: is there already; name a new file")
    if output and not path.parent.is_dir():
        raise UsageError(f"--output={output}: there is no folder {path.parent}")


def set_up_one(settings: Settings, model: str, asked: dict[str, Any]) -> Setup:
    """The model or the base, the latter named as such in errors."""
    try:
        return set_up(settings.with_values({"model": model}), settings[EvalOptions].mesh, {model: asked})
    except UsageError as error:
        if model != settings[EvalOptions].base:
            raise
        raise UsageError(str(error).replace("--model=", "--base=")) from error


def main(settings: Settings) -> int:
    options = settings[EvalOptions]
    models = [settings[ModelOptions].model] + ([options.base] if options.base else [])
    check_output(options.output)
    setups = [set_up_one(settings, model, run_defaults(models[0])) for model in models]
    results, answers = [], []
    for setup in setups:
        greedy = {"temperature": 0.0} if options.num_generations == 1 else {}
        final = setup.settings.with_defaults(greedy)
        problems = held_out(setup, final[DataOptions], options.eval_size)
        result, lines = evaluate(setup, problems, final[RolloutOptions])
        report(result, final[DataOptions].dataset)
        results.append(result)
        answers += lines
    if options.output:
        write_lines(Path(options.output), answers)
    last = results[0] | ({"base": results[1]} if options.base else {}) | {"platform": jax.default_backend()}
    sys.stdout.write(json.dumps(last) + "\n")
    return 0


FOOTER = """Here --temperature is 0 unless given, for a single answer: greedy.
--model and --base may also be a run folder, one of its checkpoints or an adapter; it is asked as that run asked."""

if __name__ == "__main__":
    run_command("python -m minigrpo.evaluate", __doc__ or "", SECTIONS, main, FOOTER)
