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

from minigrpo.build import Build, build, make_generator
from minigrpo.command_line import run_named
from minigrpo.commands import COMMANDS
from minigrpo.config import DataOptions, RolloutOptions, Settings, UsageError
from minigrpo.data.chat import Tokenizer
from minigrpo.data.datasets import PromptSet, load_dataset, tokenize
from minigrpo.data.grading import Extract, extract_answer, marked_answer, most_common, same_answer
from minigrpo.door import make_callable
from minigrpo.model.hub import run_defaults
from minigrpo.model.params import Params
from minigrpo.planning.memory import device_share_bytes, pool_limit
from minigrpo.rollout.stop import end_at_stops
from minigrpo.runtime.progress import Progress
from minigrpo.runtime.run_folder import write_lines
from minigrpo.runtime.workers import WORKERS, joined

QUEUE, QUEUE_SLOTS = 2, 64
"""PromptSet prefilled per slot, and the slots that are counted with where --slots is auto."""

Z95 = 1.96
"""Standard errors on either side of a 95 % interval."""


SECTIONS = COMMANDS["evaluate"].sections


def held_out(tokenizer: Tokenizer, options: DataOptions, size: int) -> PromptSet:
    """Read and tokenize the first `size` rows of the test split."""
    dataset = load_dataset(options, "test")
    dataset = dataclasses.replace(dataset, rows=dataset.rows[:size])
    return tokenize(dataset, tokenizer, options)


def interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share of `count` trials (Wilson 1927, eq. 1)."""
    centre = share + Z95**2 / (2 * count)
    half = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    return (centre - half) / (1 + Z95**2 / count), (centre + half) / (1 + Z95**2 / count)


def greedy_options(options: RolloutOptions) -> RolloutOptions:
    """Return options for greedy answers, with all of the distribution and the pool that memory allows."""
    return dataclasses.replace(options, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, pool_pages=0)


def prompts_per_rollout(problems: int, slots: int, devices: int) -> int:
    """Return the number of prompts in each of the equal rollouts, QUEUE times the slots at most."""
    rounds = -(-problems // (QUEUE * slots * devices))
    return -(-problems // rounds)


def ask(
    built: Build,
    params: Params,
    problems: PromptSet,
    decoding: RolloutOptions,
    samples: int,
    seed: int,
    resident: int,
    progress: Progress | None = None,
) -> tuple[list[str], Int[np.ndarray, " B"]]:
    """Sample `samples` answers to every problem, those of one problem adjacent -> texts and lengths in tokens.

    They are asked in rollouts of equal size, the last one filled up with the first problem, so that one program serves
    all. `resident` bytes stay on each device meanwhile.
    """
    spec = built.spec
    generator = make_generator(spec, decoding, pool_limit(spec, resident))
    size = prompts_per_rollout(len(problems), decoding.slot_limit or QUEUE_SLOTS, spec.mesh.size)
    answers: list[list[int]] = []
    for start in range(0, len(problems), size):
        own = list(range(start, min(start + size, len(problems))))
        filled = own + [0] * (size - len(own))
        if progress:
            progress.phase("evaluation", f"{start} of {len(problems)} problems answered")
        rollout = generator(params, [problems.tokens[i] for i in filled], filled, samples, (seed, 0))
        rollout = end_at_stops(rollout, decoding.stop_texts, built.tokenizer.decode)
        answers += rollout.completions[: len(own) * samples]
    return built.tokenizer.decode(answers), np.array([len(row) for row in answers])


@dataclasses.dataclass(frozen=True)
class Grades:
    """Marks of P problems' K answers, True for right ones."""

    flexible: Bool[np.ndarray, "P K"]
    """The answer may be anywhere in the text."""
    strict: Bool[np.ndarray, "P K"]
    """In <answer> tags, after #### or in a box."""
    majority: Bool[np.ndarray, " P"]
    """The answer given most often, the first of several."""


def grade(texts: list[str], problems: PromptSet) -> Grades:
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
    """Estimate the chance that one of k answers is right from all of them (arXiv:2107.03374, eq. 1)."""
    total, wrong = right.shape[1], (~right).sum(axis=1)
    return float(np.mean([1 - math.comb(int(n), k) / math.comb(total, k) for n in wrong]))


def figures(grades: Grades) -> dict[str, float]:
    """Compute the accuracy of single answers; with several, pass@k for powers of two and the majority's accuracy."""
    samples = grades.flexible.shape[1]
    more = [2**i for i in range(1, samples.bit_length())]
    several = {f"pass@{k}": pass_at(grades.flexible, k) for k in more}
    if samples > 1:
        several[f"majority@{samples}"] = float(grades.majority.mean())
    return {"accuracy": float(grades.flexible.mean()), "strict_accuracy": float(grades.strict.mean())} | several


def accuracy(
    built: Build, params: Params, problems: PromptSet, decoding: RolloutOptions, resident: int
) -> dict[str, float]:
    """Return the share of problems answered rightly, one answer each; "dropped" were too long to ask."""
    texts, lengths = ask(built, params, problems, decoding, 1, 0, resident)
    counts = {"problems": len(problems), "dropped": problems.dropped, "mean_length": float(lengths.mean())}
    return figures(grade(texts, problems)) | counts


def evaluate(
    built: Build, problems: PromptSet, decoding: RolloutOptions, progress: Progress, params: Params | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate one model, loading its weights if None -> its figures with their interval, a line for every answer."""
    options, name = built.settings.evaluate, built.settings.model.model
    started = time.perf_counter()
    if params is None:
        progress.phase("loading", name)
        params = built.load(options.seed)
    resident, samples = device_share_bytes(params), options.num_generations
    texts, lengths = ask(built, params, problems, decoding, samples, options.seed, resident, progress)
    progress.phase("grading")
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
    """Print one model's figures for a person to read."""
    low, high = result["interval"]
    several = "".join(f", {name} {result[name]:.1%}" for name in result if "@" in name)
    sys.stderr.write(
        f"{result['model']} on {dataset}: accuracy {result['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}), "
        f"strictly {result['strict_accuracy']:.1%}{several}, of {result['problems']} problems, "
        f"{result['dropped']} dropped as too long\n"
    )


def check_output(output: str) -> None:
    """Raise UsageError, before any work, for a file that cannot be written or already exists."""
    path = Path(output)
    if output and path.exists():
        raise UsageError(f"--output={output}: is there already; name a new file")
    if output and not path.parent.is_dir():
        raise UsageError(f"--output={output}: there is no folder {path.parent}")


def build_one(settings: Settings, model: str, asked: dict[str, Any]) -> Build:
    """Build the model or the base; errors name the base as such."""
    try:
        return build(settings.with_values({"model": model}), settings.evaluate.mesh, {model: asked})
    except UsageError as error:
        if model != settings.evaluate.base:
            raise
        raise UsageError(str(error).replace("--model=", "--base=")) from error


def main(settings: Settings) -> int:
    """Evaluate as the settings say; return the exit code."""
    with joined(settings), Progress() as progress:
        return run_evaluation(settings, progress)


def run_evaluation(settings: Settings, progress: Progress) -> int:
    """Evaluate the model, and the base beside it if one is named."""
    options = settings.evaluate
    models = [settings.model.model] + ([options.base] if options.base else [])
    check_output(options.output)
    progress.phase("loading")
    builds = [build_one(settings, model, run_defaults(models[0])) for model in models]
    results, answers = [], []
    for built in builds:
        greedy = {"temperature": 0.0} if options.num_generations == 1 else {}
        final = built.settings.with_defaults(greedy)
        problems = held_out(built.tokenizer, final.data, options.eval_size)
        result, lines = evaluate(built, problems, final.rollout, progress)
        report(result, final.data.dataset)
        results.append(result)
        answers += lines
    if options.output and WORKERS.writes:
        write_lines(Path(options.output), answers)
    last = results[0] | ({"base": results[1]} if options.base else {}) | {"platform": jax.default_backend()}
    progress.phase("")
    sys.stdout.write(json.dumps(last) + "\n")
    return 0


make_callable(__name__)

if __name__ == "__main__":
    run_named("evaluate", main)
