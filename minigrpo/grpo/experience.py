"""A step's experience: completions sampled from the policy with their rewards, and the batches made of them."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from minigrpo.config import RewardOptions
from minigrpo.data.calls import Reward, TrainerState
from minigrpo.data.datasets import PromptSet, batch_numbers
from minigrpo.data.grading import take_undecided
from minigrpo.data.rewards import Scores, score_completions
from minigrpo.data.rows import Row
from minigrpo.grpo.advantages import normalised_separately, ragged_advantages
from minigrpo.grpo.batch import Batch
from minigrpo.model.params import Params
from minigrpo.rollout.generator import Generator, Rollout
from minigrpo.rollout.stop import end_at_stops
from minigrpo.runtime.workers import WORKERS

UNDECIDED = "rewards/undecided"
"""Metric of answers that the grader could not decide on."""


@dataclasses.dataclass(frozen=True)
class Experience:
    """P prompts with a group of G completions each; row p*G+g of every [B] array is the g-th of prompt p.

    Example of one prompt with G = 2: prompts [[5, 6]], rows [{"prompt": "2 + 2?", "answer": "4"}], texts ["4", "5"],
    rewards [1.0, 0.0], components {"answer": [1.0, 0.0]}, group_mask [True].
    """

    prompts: list[list[int]]
    """Token ids."""
    rows: list[Row]
    """The dataset's row of every prompt."""
    rollout: Rollout
    texts: list[str]
    rewards: Float[np.ndarray, " B"]
    """NaN where there is no completion, or no function that applies."""
    components: dict[str, Float[np.ndarray, " B"]]
    """Each reward function's own scores."""
    group_mask: Bool[np.ndarray, " P"]
    """Groups that are trained on."""
    seconds: dict[str, float]
    """Of the rollout and of the reward functions, for the metrics."""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    """Metrics that the reward functions logged."""
    extra: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    """Columns that they logged, an entry per completion."""

    @property
    def group(self) -> int:
        """Return the number of completions per prompt."""
        return len(self.texts) // len(self.prompts)


# Sampling


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
    """Everything static about collecting experience by sampling."""

    data: PromptSet
    generator: Generator
    decode: Callable[[list[list[int]]], list[str]]
    """Token ids of completions -> their texts."""
    rewards: Sequence[Reward]
    reward_timeout: float
    batch_size: int
    group: int
    seed: int
    total_steps: int
    stops: tuple[str, ...] = ()
    """Texts that end a completion."""
    zero_std_groups: str = "keep"
    max_resamples: int = 3


def sample_experience(spec: SamplingSpec, params: Params, step: int) -> Experience:
    """Sample the step's completions and score them; groups without contrast are kept, skipped or resampled."""
    uids = batch_numbers(len(spec.data), spec.batch_size, step, spec.seed)
    first = sample_groups(spec, params, [uid % len(spec.data) for uid in uids], uids, step)
    if spec.zero_std_groups == "keep":
        return first
    if spec.zero_std_groups == "resample":
        first = resample_groups(spec, params, step, first)
    return dataclasses.replace(first, group_mask=has_contrast(first))


def sample_groups(spec: SamplingSpec, params: Params, indices: list[int], uids: list[int], step: int) -> Experience:
    """Sample completions of some rows of the data with their rewards; `uids` name the prompts for random numbers."""
    prompts, rows = [spec.data.tokens[i] for i in indices], [spec.data.rows[i] for i in indices]
    started = time.perf_counter()
    rollout = spec.generator(params, prompts, uids, spec.group, (spec.seed, step))
    rollout = end_at_stops(rollout, spec.stops, spec.decode)
    sampled = time.perf_counter()
    texts = spec.decode(rollout.completions)
    scores = score_shared(spec, rows, texts, rollout.completions, step)
    return Experience(
        prompts=prompts,
        rows=rows,
        rollout=rollout,
        texts=texts,
        rewards=scores.rewards,
        components=scores.by_function,
        group_mask=np.ones(len(indices), bool),
        seconds={"time/rollout": sampled - started, "time/reward": time.perf_counter() - sampled},
        metrics=scores.metrics,
        extra=scores.extra,
    )


def score_shared(spec: SamplingSpec, rows: list[Row], texts: list[str], ids: list[list[int]], step: int) -> Scores:
    """Score every completion on one worker, each its share of the groups, and give all workers all scores."""
    ends = [len(rows) * (number + 1) // WORKERS.count for number in range(WORKERS.count)]
    own = slice(ends[WORKERS.index - 1] if WORKERS.index else 0, ends[WORKERS.index])
    part = slice(own.start * spec.group, own.stop * spec.group)
    epoch = (step + 1) * spec.batch_size / len(spec.data)
    state = TrainerState(global_step=step, max_steps=spec.total_steps, epoch=epoch)
    arguments = reward_arguments(rows[own], spec.group, texts[part], ids[part])
    rewards = list(spec.rewards)
    none = Scores(np.zeros(0), {reward.name: np.zeros(0) for reward in rewards}, {}, {})
    scores = score_completions(rewards, spec.reward_timeout, arguments, state) if rows[own] else none
    return join_scores(WORKERS.gather(as_values(scores) | {"undecided": take_undecided()}))


def as_values(scores: Scores) -> dict[str, Any]:
    """Return scores as plain values, which workers can send each other."""
    by_function = {name: own.tolist() for name, own in scores.by_function.items()}
    return {"rewards": scores.rewards.tolist(), "by_function": by_function} | {
        "metrics": scores.metrics,
        "extra": scores.extra,
    }


def join_scores(parts: list[dict[str, Any]]) -> Scores:
    """Join the workers' scores; metrics that reward functions logged are averaged over the workers that have them."""
    rewards = np.concatenate([np.array(part["rewards"], np.float64) for part in parts])
    names = list(parts[0]["by_function"])
    by_function = {
        name: np.concatenate([np.array(part["by_function"][name], float) for part in parts]) for name in names
    }
    logged = dict.fromkeys(name for part in parts for name in part["metrics"])
    metrics = {name: float(np.mean([p["metrics"][name] for p in parts if name in p["metrics"]])) for name in logged}
    metrics[UNDECIDED] = float(sum(part["undecided"] for part in parts))
    columns = dict.fromkeys(name for part in parts for name in part["extra"])
    extra = {
        name: [value for part in parts for value in part["extra"].get(name, [None] * len(part["rewards"]))]
        for name in columns
    }
    return Scores(rewards, by_function, metrics, extra)


def reward_arguments(rows: list[Row], group: int, texts: list[str], ids: list[list[int]]) -> dict[str, Any]:
    """Return the arguments of reward functions: every column of the dataset, prompts and completions."""
    repeated = [row for row in rows for _ in range(group)]
    columns = {name: [row.get(name) for row in repeated] for name in dict.fromkeys(key for row in rows for key in row)}
    return columns | {"prompts": columns["prompt"], "completions": texts, "completion_ids": ids}


def has_contrast(experience: Experience) -> Bool[np.ndarray, " P"]:
    """Mark the groups in which the first reward function, the one for accuracy, gives two different scores."""
    scores = next(iter(experience.components.values())).reshape(-1, experience.group)
    return np.array([len(set(group[~np.isnan(group)].tolist())) > 1 for group in scores])


def resample_groups(spec: SamplingSpec, params: Params, step: int, experience: Experience) -> Experience:
    """Replace groups without contrast by those of other prompts (DAPO, arXiv:2503.14476, section 3.2)."""
    for turn in range(spec.max_resamples):
        if has_contrast(experience).sum() >= spec.batch_size:
            break
        rng = np.random.default_rng([spec.seed, step, turn])
        indices = rng.choice(len(spec.data), spec.batch_size, replace=spec.batch_size > len(spec.data)).tolist()
        first = -1 - turn * spec.batch_size
        uids = [first - place for place in range(spec.batch_size)]  # below 0: never an ordinary prompt's
        experience = concatenate(experience, sample_groups(spec, params, indices, uids, step))
    order = np.argsort(~has_contrast(experience), kind="stable")[: spec.batch_size]
    return take_groups(experience, order)


PER_COMPLETION = ("tokens", "logprobs", "lengths", "stopped", "kept")
"""A rollout's arrays with an entry per completion."""


def concatenate(first: Experience, second: Experience) -> Experience:
    """Join two experiences, group by group."""
    one, two = first.rollout, second.rollout

    def join(name: str) -> Any:
        return jax.tree.map(lambda *parts: np.concatenate(parts), getattr(one, name), getattr(two, name))

    rollout = dataclasses.replace(
        one,
        **{name: join(name) for name in PER_COMPLETION},
        decode_steps=one.decode_steps + two.decode_steps,
        occupancy=float(np.average([one.occupancy, two.occupancy], weights=[one.decode_steps, two.decode_steps])),
        preempted=one.preempted + two.preempted,
        refilled=one.refilled + two.refilled,
        sampled=one.sampled + two.sampled,
    )
    return Experience(
        prompts=first.prompts + second.prompts,
        rows=first.rows + second.rows,
        rollout=rollout,
        texts=first.texts + second.texts,
        rewards=np.concatenate([first.rewards, second.rewards]),
        components={name: np.concatenate([own, second.components[name]]) for name, own in first.components.items()},
        group_mask=np.concatenate([first.group_mask, second.group_mask]),
        seconds={name: value + second.seconds[name] for name, value in first.seconds.items()},
        metrics=join_metrics(first.metrics, second.metrics),
        extra=join_columns(first, second),
    )


def join_metrics(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    """Average what reward functions logged of two experiences; undecided answers are counted."""
    joined = first | second | {name: (first[name] + second[name]) / 2 for name in first.keys() & second.keys()}
    return joined | {UNDECIDED: first.get(UNDECIDED, 0.0) + second.get(UNDECIDED, 0.0)}


def join_columns(first: Experience, second: Experience) -> dict[str, list[Any]]:
    """Join the columns that reward functions logged, None where one of two experiences has none."""

    def column(one: Experience, name: str) -> list[Any]:
        return list(one.extra.get(name, [None] * len(one.texts)))

    return {name: column(first, name) + column(second, name) for name in first.extra | second.extra}


def take_groups(experience: Experience, groups: np.ndarray) -> Experience:
    """Take some of the groups, in the order given."""
    rows = (groups[:, None] * experience.group + np.arange(experience.group)).reshape(-1)
    rollout = experience.rollout
    taken = {name: jax.tree.map(lambda x: x[rows], getattr(rollout, name)) for name in PER_COMPLETION}
    return dataclasses.replace(
        experience,
        prompts=[experience.prompts[group] for group in groups],
        rows=[experience.rows[group] for group in groups],
        rollout=dataclasses.replace(rollout, **taken),
        texts=[experience.texts[row] for row in rows],
        rewards=experience.rewards[rows],
        components={name: scores[rows] for name, scores in experience.components.items()},
        group_mask=experience.group_mask[groups],
        extra={name: [column[row] for row in rows] for name, column in experience.extra.items()},
    )


# From experience to a batch


def advantages_of(
    experience: Experience, options: RewardOptions, weights: dict[str, float], lone: float = 0.0
) -> Float[np.ndarray, " B"]:
    """Compute the advantage of every completion over its group.

    `weights` are the reward functions'; `lone` times its reward is the advantage of a completion without others.
    """
    if options.normalize_rewards == "each":
        return normalised_separately(experience.components, weights, experience.group)
    return ragged_advantages(experience.rewards, experience.group, options.scale_rewards, options.baseline, lone)


def batch_of(
    experience: Experience, advantages: Float[np.ndarray, " B"], limit: int, exclude_truncated: bool = False
) -> Batch:
    """Return the step's completions, `limit` tokens wide; those of masked groups have length 0."""
    rollout, rows = experience.rollout, len(advantages)
    lengths = (rollout.lengths * np.repeat(experience.group_mask, experience.group)).astype(np.int32)

    def widen(x: np.ndarray) -> np.ndarray:
        wide = np.zeros((rows, limit), x.dtype)
        wide[:, : x.shape[1]] = x[:, :limit]
        return np.where(np.arange(limit) < lengths[:, None], wide, np.zeros_like(wide))

    return Batch(
        completions=widen(rollout.tokens),
        completion_lengths=lengths,
        advantages=advantages,
        rollout_logprobs=None if rollout.logprobs is None else widen(rollout.logprobs),
        loss_excluded=~rollout.stopped if exclude_truncated else None,
        cutoffs=None if rollout.kept is None else widen(rollout.kept.cutoff),
    )


def split_batch(batch: Batch, prompts: list[list[int]], count: int) -> list[tuple[Batch, list[list[int]]]]:
    """Split a batch into minibatches of equally many prompts; one without any completion is left out, but not all."""
    group = len(batch.completion_lengths) // len(prompts)
    shares = np.split(np.arange(len(prompts)), count)
    rows = [(share[:, None] * group + np.arange(group)).reshape(-1) for share in shares]
    used = [i for i, own in enumerate(rows) if batch.completion_lengths[own].any()] or [0]

    def take(own: np.ndarray) -> Batch:
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        return Batch(**{name: value if value is None else value[own] for name, value in fields.items()})

    return [(take(rows[i]), [prompts[p] for p in shares[i]]) for i in used]
