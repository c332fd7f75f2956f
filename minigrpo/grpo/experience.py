"""A step's completions and their rewards: sampled from the policy, or read from a file."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from minigrpo.build import Setup
from minigrpo.config import DataOptions, LossOptions, RewardOptions, RolloutOptions, StepOptions
from minigrpo.data.datasets import Prompts, batch_numbers
from minigrpo.data.rewards import Reward, score_completions
from minigrpo.grpo import update as grpo
from minigrpo.grpo.batch import place_batch
from minigrpo.grpo.optimizer import TrainState
from minigrpo.model.qwen import Params, join
from minigrpo.rollout.generator import Roller, Rollout
from minigrpo.runtime.mesh import launch


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run is made of besides its state."""

    setup: Setup
    data: Prompts
    rewards: list[Reward]
    roller: Roller
    trainer: grpo.Trainer
    frozen: Params
    """The weights that are not trained: the base under adapters, {} otherwise."""
    reference: Params | None
    """What is trained as it was at the start, when the loss asks for it and it never moves."""
    total_steps: int

    def options(self, section: type) -> Any:
        return self.setup.settings[section]

    @property
    def group(self) -> int:
        return self.options(StepOptions).num_generations

    def whole(self, trained: Params) -> Params:
        return join(trained, self.frozen)


@dataclasses.dataclass(frozen=True)
class Experience:
    """P prompts with a group of G completions each; row p*G+g of every [B] array is the g-th of prompt p."""

    indices: list[int]
    """Rows of the data, one per prompt."""
    rollout: Rollout
    texts: list[str]
    rewards: Float[np.ndarray, "B"]
    """NaN where there is no completion, or no function that applies."""
    parts: dict[str, Float[np.ndarray, "B"]]
    """Each reward function's own scores."""
    used: Bool[np.ndarray, "P"]
    """Groups that are trained on."""
    seconds: dict[str, float]
    """Of the rollout and of the reward functions, for the metrics."""


def step_numbers(job: Job, step: int) -> list[int]:
    """What the step trains on, by epoch * count + row."""
    options = job.options(StepOptions)
    return batch_numbers(len(job.data), options.batch_size, step, options.seed)


# Sampled


def sampled(job: Job, state: TrainState, step: int) -> Experience:
    """Completions of the step's prompts and their rewards; groups without contrast kept, left out or replaced."""
    numbers = step_numbers(job, step)
    first = sample_groups(job, state, [number % len(job.data) for number in numbers], numbers, step)
    return GROUP_RULES[job.options(LossOptions).zero_std_groups](job, state, step, first)


def sample_groups(job: Job, state: TrainState, indices: list[int], names: list[int], step: int) -> Experience:
    """A rollout with its rewards; `names` are the prompts' names for the random numbers."""
    prompts = [job.data.tokens[i] for i in indices]
    seed = job.options(StepOptions).seed, step
    started = time.perf_counter()
    rollout = job.roller(job.whole(state.params), prompts, names, job.group, seed)
    sampled = time.perf_counter()
    rewards, parts, texts = reward(job, rollout, indices)
    seconds = {"time/rollout": sampled - started, "time/reward": time.perf_counter() - sampled}
    return Experience(indices, rollout, texts, rewards, parts, np.ones(len(indices), bool), seconds)


def reward(job: Job, rollout: Rollout, indices: list[int]) -> tuple[np.ndarray, dict[str, np.ndarray], list[str]]:
    """Weighted rewards [B], each function's scores, and the completions as text."""
    rows = [job.data.rows[i] for i in indices for _ in range(job.group)]
    ids = rollout.completions
    texts = job.setup.tokenizer.decode(ids)
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}
    arguments = columns | {"prompts": columns["prompt"], "completions": texts, "completion_ids": ids}
    return *score_completions(job.rewards, job.options(RewardOptions).reward_timeout, arguments), texts


def varied(job: Job, experience: Experience) -> Bool[np.ndarray, "P"]:
    """Groups in which the first reward function, which is to be the one for accuracy, does not score all alike."""
    return differ(experience.parts[job.rewards[0].name].reshape(-1, job.group))


def differ(scores: Float[np.ndarray, "P G"]) -> Bool[np.ndarray, "P"]:
    """Groups with two different scores; NaN is none."""
    return np.array([len(set(group[~np.isnan(group)].tolist())) > 1 for group in scores])


def keep_groups(job: Job, state: TrainState, step: int, experience: Experience) -> Experience:
    return experience


def skip_groups(job: Job, state: TrainState, step: int, experience: Experience) -> Experience:
    return dataclasses.replace(experience, used=varied(job, experience))


def resample_groups(job: Job, state: TrainState, step: int, experience: Experience) -> Experience:
    """Groups without contrast are replaced by those of other prompts (DAPO, arXiv:2503.14476, section 3.2)."""
    size = job.options(StepOptions).batch_size
    for turn in range(job.options(LossOptions).max_resamples):
        if varied(job, experience).sum() >= size:
            break
        rng = np.random.default_rng([job.options(StepOptions).seed, step, turn])
        indices = rng.choice(len(job.data), size, replace=size > len(job.data)).tolist()
        names = [-1 - turn * size - place for place in range(size)]  # below 0: never the name of an ordinary prompt
        experience = concatenate(experience, sample_groups(job, state, indices, names, step))
    order = np.argsort(~varied(job, experience), kind="stable")[:size]
    return skip_groups(job, state, step, take_groups(experience, order, job.group))


GROUP_RULES = {"keep": keep_groups, "skip": skip_groups, "resample": resample_groups}


ROWS = ("tokens", "logprobs", "lengths", "stopped")
"""A rollout's arrays with a row per completion."""


def concatenate(first: Experience, second: Experience) -> Experience:
    one, two = first.rollout, second.rollout
    rollout = dataclasses.replace(
        one,
        **{name: np.concatenate([getattr(one, name), getattr(two, name)]) for name in ROWS},
        decode_steps=one.decode_steps + two.decode_steps,
        occupancy=np.average([one.occupancy, two.occupancy], weights=[one.decode_steps, two.decode_steps]),
    )
    return Experience(
        indices=first.indices + second.indices,
        rollout=rollout,
        texts=first.texts + second.texts,
        rewards=np.concatenate([first.rewards, second.rewards]),
        parts={name: np.concatenate([scores, second.parts[name]]) for name, scores in first.parts.items()},
        used=np.concatenate([first.used, second.used]),
        seconds={name: value + second.seconds[name] for name, value in first.seconds.items()},
    )


def take_groups(experience: Experience, groups: np.ndarray, size: int) -> Experience:
    """Some of the groups, in the order given."""
    rows = (groups[:, None] * size + np.arange(size)).reshape(-1)
    rollout = experience.rollout
    return Experience(
        indices=[experience.indices[group] for group in groups],
        rollout=dataclasses.replace(rollout, **{name: getattr(rollout, name)[rows] for name in ROWS}),
        texts=[experience.texts[row] for row in rows],
        rewards=experience.rewards[rows],
        parts={name: scores[rows] for name, scores in experience.parts.items()},
        used=experience.used[groups],
        seconds=experience.seconds,
    )


# From experience to batches


def advantages(job: Job, experience: Experience) -> Float[np.ndarray, "B"]:
    """How much better than its group every completion is."""
    options = job.options(RewardOptions)
    if options.normalize_rewards == "each":
        weights = {reward.name: reward.weight for reward in job.rewards}
        return grpo.normalised_apart(experience.parts, weights, job.group)
    lone = 1.0 if job.options(DataOptions).offline else 0.0
    return grpo.ragged_advantages(experience.rewards, job.group, options.scale_rewards, options.baseline, lone)


def host_batch(job: Job, experience: Experience, advantages: np.ndarray) -> grpo.Batch:
    """All of the step's sequences; those of groups that are not used have no completion."""
    limits = job.options(DataOptions).max_prompt_length, job.options(RolloutOptions).max_completion_length
    rollout = experience.rollout
    lengths = rollout.lengths * np.repeat(experience.used, job.group)
    prompts = [job.data.tokens[i] for i in experience.indices for _ in range(job.group)]
    batch = grpo.assemble(prompts, rollout.tokens, lengths, limits)
    recorded = None if rollout.logprobs is None else rollout.logprobs[:, : batch.completions.shape[1]]
    left_out = ~rollout.stopped if job.options(LossOptions).mask_truncated_completions else None
    return dataclasses.replace(batch, advantages=advantages, rollout_logprobs=recorded, left_out=left_out)


def make_batches(job: Job, experience: Experience, advantages: np.ndarray, state: TrainState) -> list[grpo.Batch]:
    """The updates' inputs on the mesh, with old and reference log-probs where the loss needs them."""
    whole = host_batch(job, experience, advantages)
    shares = np.split(np.arange(len(whole.tokens)), job.options(StepOptions).num_minibatches)
    shares = [rows for rows in shares if whole.completion_lengths[rows].any()] or shares[:1]
    mesh, parts, how = job.setup.mesh, job.trainer.parts, job.setup.arrangement
    batches = [place_batch(mesh, jax.tree.map(lambda x, rows=rows: x[rows], whole), parts, how) for rows in shares]
    return jax.block_until_ready([score_batch(job, batch, state) for batch in batches])


def score_batch(job: Job, batch: grpo.Batch, state: TrainState) -> grpo.Batch:
    again = job.options(StepOptions).updates_per_step > 1
    old = launch(grpo.batch_logprobs, job.trainer, job.whole(state.params), batch) if again else None
    reference = job.reference if state.reference is None else state.reference
    ref = None if reference is None else launch(grpo.batch_logprobs, job.trainer, job.whole(reference), batch)
    return dataclasses.replace(batch, old_logprobs=old, ref_logprobs=ref)


@jax.jit
def mix(reference: Params, params: Params, share: Float[jax.Array, ""]) -> Params:
    """The reference moved towards the policy (TR-DPO, arXiv:2404.09656, eq. 3)."""
    return jax.tree.map(lambda old, new: ((1 - share) * old + share * new).astype(old.dtype), reference, params)


def move_reference(job: Job, state: TrainState, step: int) -> TrainState:
    """Every --sync_ref_steps the reference follows the policy."""
    options = job.options(LossOptions)
    if not options.sync_ref_steps or (step + 1) % options.sync_ref_steps:
        return state
    moved = mix(state.reference, state.params, jnp.float32(options.ref_mixup_alpha))
    return dataclasses.replace(state, reference=moved)
