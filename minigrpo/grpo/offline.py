"""GRPO on responses that are on file, with scores: the same loss, without sampling."""

import dataclasses
import sys
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from minigrpo.build import Setup
from minigrpo.config import DataOptions, RolloutOptions, StepOptions, UsageError
from minigrpo.data.datasets import Prompts, read_recorded, tokenize
from minigrpo.grpo import update as grpo
from minigrpo.grpo.batch import place_batch
from minigrpo.grpo.experience import Experience, Job, advantages, host_batch, step_numbers
from minigrpo.grpo.optimizer import TrainState
from minigrpo.model.qwen import Params
from minigrpo.rollout.generator import Rollout
from minigrpo.runtime.mesh import launch

SCORE = "score"
"""Name under which a file's scores are reported."""


def load_recorded(setup: Setup, options: DataOptions, most: int | None = None) -> Prompts:
    """Prompts whose rows hold "response_tokens", end token included; responses too long are dropped and counted.

    `most` rows are read, None being all.
    """
    dataset = read_recorded(options)
    dataset = dataclasses.replace(dataset, rows=dataset.rows[:most])
    data = tokenize(dataset, setup.tokenizer, options)
    limit = setup.settings[RolloutOptions].max_completion_length
    texts = [text for row in data.rows for text in row["responses"]]
    tokens = iter([ids + [setup.stop_tokens[-1]] for ids in setup.tokenizer.encode(texts)])
    rows = [short_responses(row, [next(tokens) for _ in row["responses"]], limit) for row in data.rows]
    kept = [i for i, row in enumerate(rows) if row["scores"]]
    if not kept:
        raise UsageError(f"--max_completion_length={limit}: every response of {dataset.name} is longer")
    left = sum(len(rows[i]["scores"]) for i in kept)
    sys.stderr.write(f"responses of {dataset.name}: {left}, {len(texts) - left} more dropped as too long\n")
    return Prompts([rows[i] for i in kept], [data.tokens[i] for i in kept], data.dropped + len(rows) - len(kept))


def short_responses(row: dict, tokens: list[list[int]], limit: int) -> dict:
    kept = [i for i, ids in enumerate(tokens) if len(ids) <= limit]
    own = {"response_tokens": [tokens[i] for i in kept], "scores": [float(row["scores"][i]) for i in kept]}
    return row | own | {"responses": [row["responses"][i] for i in kept]}


def recorded(job: Job, state: TrainState, step: int) -> Experience:
    """The step's prompts with up to --num_generations of their responses, drawn anew every epoch."""
    numbers = step_numbers(job, step)
    seed = job.options(StepOptions).seed
    return take_responses(job, job.data, [number % len(job.data) for number in numbers], [seed, *numbers[:1]])


def take_responses(job: Job, data: Prompts, indices: list[int], seed: list[int]) -> Experience:
    group, rng = job.group, np.random.default_rng(seed)
    rows = len(indices) * group
    width = max(len(ids) for i in indices for ids in data.rows[i]["response_tokens"])
    tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    scores, texts = np.full(rows, np.nan), [""] * rows
    for place, i in enumerate(indices):
        row = data.rows[i]
        for member, choice in enumerate(rng.permutation(len(row["scores"]))[:group]):
            at, ids = place * group + member, row["response_tokens"][choice]
            tokens[at, : len(ids)], lengths[at] = ids, len(ids)
            scores[at], texts[at] = row["scores"][choice], row["responses"][choice]
    rollout = Rollout(tokens, None, lengths, lengths > 0, decode_steps=0, occupancy=0.0)
    return Experience(indices, rollout, texts, scores, {SCORE: scores}, np.ones(len(indices), bool), {})


# Validation


def validation_batches(job: Job, data: Prompts) -> list[tuple[Experience, grpo.Batch]]:
    """All held-out prompts with their responses, --batch_size prompts at a time."""
    held, size = dataclasses.replace(job, data=data), job.options(StepOptions).batch_size
    batches = []
    for first in range(0, len(data), size):
        experience = take_responses(held, data, list(range(first, min(first + size, len(data)))), [0, first])
        batch = host_batch(held, experience, advantages(held, experience))
        batch = place_batch(job.setup.mesh, batch, job.trainer.parts, "apart")
        batches.append((experience, batch))
    return batches


def response_logprobs(job: Job, params: Params, batches: list[tuple[Experience, grpo.Batch]]) -> Float[np.ndarray, "B"]:
    """Every held-out response's mean log-prob per token."""
    means = []
    for experience, batch in batches:
        rows, lengths = len(experience.rewards), experience.rollout.lengths
        logprobs = np.asarray(launch(grpo.batch_logprobs, job.trainer, params, batch), np.float64)[:rows]
        mask = np.arange(logprobs.shape[1]) < lengths[:, None]
        means.append(np.where(mask, logprobs, 0).sum(axis=1) / np.maximum(lengths, 1))
    return np.concatenate(means)


def margin(logprobs: Float[np.ndarray, "P G"], scores: Float[np.ndarray, "P G"]) -> float:
    """How much likelier, per token, the better responses of a prompt are than its worse ones; mean over prompts.

    Better and worse are above and below the prompt's mean score; prompts without both are left out.
    """
    middle = np.array([row[~np.isnan(row)].mean() for row in scores])[:, None]
    better, worse = scores > middle, scores < middle
    both = better.any(axis=1) & worse.any(axis=1)
    if not both.any():
        return 0.0
    means = [np.where(mask, logprobs, 0)[both].sum(axis=1) / mask[both].sum(axis=1) for mask in (better, worse)]
    return float((means[0] - means[1]).mean())


def validator(job: Job, data: Prompts, start: Params) -> Callable[[Params], dict[str, float]]:
    """What --eval_steps reports: the margin, and GSPO's unclipped loss against the start."""
    batches = validation_batches(job, data)
    before = response_logprobs(job, start, batches)
    gains = np.concatenate([advantages(job, experience) for experience, _ in batches])
    scores = np.concatenate([experience.rewards for experience, _ in batches]).reshape(-1, job.group)
    present = ~np.isnan(scores.reshape(-1))

    def validate(params: Params) -> dict[str, float]:
        now = response_logprobs(job, params, batches)
        loss = -(gains * np.exp(now - before))[present].mean()
        return {"margin": margin(now.reshape(scores.shape), scores), "loss": float(loss), "prompts": float(len(data))}

    return validate
