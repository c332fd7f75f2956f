"""`python -m minigrpo.evaluate`: accuracy of a model's answers to held-out problems, and their rewards."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from minigrpo.build import Build, build, grpo_update_spec, make_generator
from minigrpo.command_line import run_named
from minigrpo.commands import COMMANDS
from minigrpo.config import DataOptions, RolloutOptions, Settings, UsageError
from minigrpo.data.calls import Reward, TrainerState, lacking
from minigrpo.data.chat import Tokenizer
from minigrpo.data.datasets import PromptSet, load_dataset, named_rows, tokenize
from minigrpo.data.grading import Extract, extract_answer, marked_answer, most_common, same_answer
from minigrpo.data.recorded import is_recorded, load_recorded, recorded_problems
from minigrpo.data.rewards import check_columns, parse_rewards, score_completions
from minigrpo.door import make_callable
from minigrpo.grpo.batch import Batch, PackedBatch
from minigrpo.grpo.experience import Experience, batch_of, reward_arguments
from minigrpo.grpo.offline import hold_out, margins
from minigrpo.grpo.update import batch_logprobs
from minigrpo.model.hub import run_defaults
from minigrpo.model.params import Params
from minigrpo.planning.memory import device_share_bytes, packing_spec, pool_limit
from minigrpo.reporting.significance import Z95, estimate, interval
from minigrpo.rollout.stop import end_at_stops
from minigrpo.runtime.mesh import fetch
from minigrpo.runtime.progress import Progress
from minigrpo.runtime.run_folder import write_lines
from minigrpo.runtime.session import Measured
from minigrpo.runtime.workers import WORKERS, joined

QUEUE, QUEUE_SLOTS = 2, 64
"""PromptSet prefilled per slot, and the slots that are counted with where --slots is auto."""

SCORED_SEQUENCES = 32
"""Responses on file that are scored at once, about."""


SECTIONS = COMMANDS["evaluate"].sections


def held_out(tokenizer: Tokenizer, options: DataOptions, size: int, answer_required: bool = True) -> PromptSet:
    """Read and tokenize the first `size` rows of the test split."""
    dataset = load_dataset(options, "test", answer_required)
    dataset = dataclasses.replace(dataset, rows=dataset.rows[:size])
    return tokenize(dataset, tokenizer, options)


def read_answers(rewards: Sequence[Reward]) -> bool:
    """Tell whether a reward function must be given reference answers."""
    return any("answer" in lacking(reward.function, ()) for reward in rewards)


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
) -> tuple[list[str], list[list[int]]]:
    """Sample `samples` answers to every problem, those of one problem adjacent -> texts and tokens.

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
    return built.tokenizer.decode(answers), answers


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


def has_answers(problems: PromptSet) -> bool:
    """Tell whether every row has a reference answer in text."""
    return all(isinstance(row.get("answer"), str) for row in problems.rows)


def answer_questions(
    built: Build,
    params: Params,
    problems: PromptSet,
    decoding: RolloutOptions,
    samples: int,
    scoring: "Scoring",
    resident: int,
    progress: Progress | None = None,
) -> Measured:
    """Ask `samples` answers to every problem and measure them: against the reference answers, and by rewards.

    "dropped" problems were too long to ask. `resident` bytes stay on each device meanwhile.
    """
    texts, tokens = ask(built, params, problems, decoding, samples, scoring.seed, resident, progress)
    if progress:
        progress.phase("grading")
    rows = [row for row in problems.rows for _ in range(samples)]
    answers: list[dict[str, Any]] = [
        {"prompt": row["prompt"], "answer": row.get("answer"), "completion": text}
        for row, text in zip(rows, texts, strict=True)
    ]
    values: dict[str, float] = {}
    if has_answers(problems):
        grades = grade(texts, problems)
        values |= figures(grades)
        marks = zip(answers, grades.flexible.reshape(-1), grades.strict.reshape(-1), strict=True)
        for answer, right, strict in marks:
            answer |= {"right": bool(right), "strictly_right": bool(strict)}
    values |= WORKERS.first(lambda: scoring.score(problems, texts, tokens, answers))
    length = float(np.mean([len(row) for row in tokens]))
    return Measured(values | {"problems": len(problems), "dropped": problems.dropped, "mean_length": length}, answers)


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Reward functions for held-out answers."""

    rewards: tuple[Reward, ...] = ()
    timeout: float = 60.0
    seed: int = 0
    """Of sampling the answers."""
    state: TrainerState | None = None

    def score(
        self, problems: PromptSet, texts: list[str], tokens: list[list[int]], answers: list[dict[str, Any]]
    ) -> dict[str, float]:
        """Score answers -> {"reward", "rewards/NAME"} and what the functions logged; adds "reward" to every answer."""
        if not self.rewards:
            return {}
        arguments = reward_arguments(list(problems.rows), len(texts) // len(problems), texts, tokens)
        scores = score_completions(list(self.rewards), self.timeout, arguments, self.state)
        for at, answer in enumerate(answers):
            parts = {name: number(own[at]) for name, own in scores.by_function.items()}
            answer |= {"reward": number(scores.rewards[at]), "rewards": parts}
        means = {f"rewards/{name}": mean_of(own) for name, own in scores.by_function.items()}
        return scores.metrics | {"reward": mean_of(scores.rewards)} | means


def number(value: float) -> float | None:
    """Return a score; None for NaN, where no function applies."""
    return None if math.isnan(value) else float(value)


def mean_of(scores: np.ndarray) -> float:
    """Average scores that are not NaN; 0 for none."""
    known = scores[~np.isnan(scores)]
    return float(known.mean()) if len(known) else 0.0


Evaluated = tuple[dict[str, Any], list[dict[str, Any]]]
"""A model's figures with their interval, and a line for every answer."""


def evaluate(
    built: Build,
    problems: PromptSet,
    decoding: RolloutOptions,
    progress: Progress,
    params: Params | None = None,
    rewards: tuple[Reward, ...] = (),
) -> Evaluated:
    """Evaluate one model on problems that it is asked, loading its weights if None."""
    options, started = built.settings.evaluate, time.perf_counter()
    if params is None:
        progress.phase("loading", built.settings.model.model)
        params = built.load(options.seed)
    scoring, resident = Scoring(rewards, seed=options.seed), device_share_bytes(params)
    samples = options.num_generations
    measured = answer_questions(built, params, problems, decoding, samples, scoring, resident, progress)
    return in_figures(built, measured, started)


def in_figures(built: Build, measured: Measured, started: float) -> Evaluated:
    """Return a model's results under its name, and the seconds since `started`."""
    name = built.settings.model.model
    result = {"model": name, **with_interval(measured), "seconds": time.perf_counter() - started}
    return result, [{"model": name} | row for row in measured.answers]


# Responses on file


def score_responses(built: Build, data: PromptSet) -> Measured:
    """Measure how much likelier a model finds the better of the responses on file."""
    settings, spec = built.settings, built.spec
    temperature = settings.rollout.temperature or 1.0
    rollout = dataclasses.replace(settings.rollout, temperature=temperature)
    spec = dataclasses.replace(spec, settings=dataclasses.replace(settings, rollout=rollout))
    group = max(len(row["responses"]) for row in data.rows)
    size = max(1, SCORED_SEQUENCES // group)
    packing = packing_spec(spec, size * group, group)
    limit, params = rollout.max_completion_length, built.load(settings.evaluate.seed)

    def without_advantages(experience: Experience) -> Batch:
        return batch_of(experience, np.zeros(len(experience.texts), np.float32), limit)

    held = hold_out(spec.mesh, packing, data, group, size, without_advantages)
    update_spec = grpo_update_spec(spec, 1)

    def score(batch: PackedBatch) -> np.ndarray:
        return fetch(batch_logprobs(update_spec, params, batch))

    found = margins(held.mean_logprobs(score).reshape(-1, group), held.scores.reshape(-1, group))
    known = found[~np.isnan(found)]
    values = {"margin": mean_of(found), "prompts": float(len(data)), "compared": float(len(known))}
    return Measured(values | {"dropped": float(data.dropped)}, margin_rows(data, found))


def margin_rows(data: PromptSet, found: np.ndarray) -> list[dict[str, Any]]:
    """Return a row for every prompt whose responses can be compared."""
    pairs = zip(data.rows, found, strict=True)
    return [{"prompt": row["prompt"], "margin": float(own)} for row, own in pairs if not np.isnan(own)]


# The command


def with_interval(measured: Measured) -> dict[str, Any]:
    """Return the figures with a 95 % interval: Wilson's of the accuracy, else by the standard error of the answers."""
    values: dict[str, Any] = dict(measured.values)
    if "accuracy" in values:
        return values | {"interval": interval(values["accuracy"], int(values["problems"]))}
    name = "margin" if "margin" in values else "reward"
    known = estimate([row[name] for row in measured.answers if row[name] is not None] or [0.0])
    half = 0.0 if math.isnan(known.error) else Z95 * known.error
    return values | {"interval": (known.mean - half, known.mean + half)}


def report(result: dict[str, Any], dataset: str) -> None:
    """Print one model's figures for a person to read."""
    low, high = result["interval"]
    several = "".join(f", {name} {result[name]:.1%}" for name in result if "@" in name)
    rewards = "".join(f", {name} {result[name]:.3f}" for name in result if name.startswith("reward"))
    if "accuracy" in result:
        found = f"accuracy {result['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}), "
        found += f"strictly {result['strict_accuracy']:.1%}{several}{rewards}, of {result['problems']} problems"
    elif "margin" in result:
        found = f"margin {result['margin']:.4f} nats per token (95 % interval {low:.4f} to {high:.4f}) of better over "
        found += f"worse responses, of {result['compared']:.0f} prompts with both"
    else:
        found = f"reward {result['reward']:.3f} (95 % interval {low:.3f} to {high:.3f}){rewards}, "
        found += f"of {result['problems']} prompts without reference answers"
    sys.stderr.write(f"{result['model']} on {dataset}: {found}, {result['dropped']:.0f} dropped as too long\n")


def check_output(output: str) -> None:
    """Raise UsageError, before any work, for a file that cannot be written or already exists."""
    path = Path(output)
    if output and path.exists():
        raise UsageError(f"--output={output}: is there already; name a new file")
    if output and not path.parent.is_dir():
        raise UsageError(f"--output={output}: there is no folder {path.parent}")
    if output:
        try:
            path.touch()
            path.unlink()
        except OSError as error:
            raise UsageError(f"--output={output}: cannot be written ({error.strerror})") from error


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
    rewards = tuple(parse_rewards(options.reward)) if options.reward else ()
    results, answers = [], []
    for built in builds:
        result, lines = measure_model(built, rewards, progress)
        report(result, built.settings.data.dataset)
        results.append(result)
        answers += lines
    if options.output and WORKERS.writes:
        write_lines(Path(options.output), answers)
    last = results[0] | ({"base": results[1]} if options.base else {}) | {"platform": jax.default_backend()}
    progress.phase("")
    sys.stdout.write(json.dumps(last) + "\n")
    return 0


def measure_model(built: Build, rewards: tuple[Reward, ...], progress: Progress) -> Evaluated:
    """Ask a model the problems; where there are only responses on file, compare those."""
    greedy = {"temperature": 0.0} if built.settings.evaluate.num_generations == 1 else {}
    settings, started = built.settings.with_defaults(greedy), time.perf_counter()
    data, size = settings.data, settings.evaluate.eval_size
    if not data.dataset.startswith("builtin:") and is_recorded(named_rows(data, "test")[0]):
        dataset = None if data.offline else recorded_problems(data, "test")
        if dataset is None:
            if rewards:
                raise UsageError(
                    f"--reward={settings.evaluate.reward}: {data.dataset} has no answers to ask for; "
                    "its responses are compared by their own scores"
                )
            limit, end = settings.rollout.max_completion_length, built.tokenizer.end_of_turn
            progress.phase("evaluation")
            responses = load_recorded(built.tokenizer, data, limit, end, "test", size)
            return in_figures(built, score_responses(built, responses), started)
        problems = tokenize(dataclasses.replace(dataset, rows=dataset.rows[:size]), built.tokenizer, data)
    else:
        problems = held_out(built.tokenizer, data, size, not rewards or read_answers(rewards))
    check_columns(list(rewards), problems.rows[0])
    return evaluate(built, problems, settings.rollout, progress, rewards=rewards)


make_callable(__name__)

if __name__ == "__main__":
    run_named("evaluate", main)
