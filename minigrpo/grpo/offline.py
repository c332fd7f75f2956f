"""GRPO on responses that are on file, with scores: the same loss, without sampling."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from minigrpo.data.datasets import PromptSet, batch_numbers
from minigrpo.grpo.batch import Batch, PackedBatch, PackingSpec, pack, pad_batch, put_batch, restore_order
from minigrpo.grpo.experience import Experience
from minigrpo.model.params import Params
from minigrpo.rollout.generator import Rollout
from minigrpo.runtime.mesh import fetch

SCORE = "score"
"""Name under which a file's scores are reported."""


def recorded_experience(
    data: PromptSet, batch_size: int, group: int, seed: int, params: Params, step: int
) -> Experience:
    """Take the step's prompts with up to `group` of their responses, drawn anew every epoch; `params` go unused."""
    uids = batch_numbers(len(data), batch_size, step, seed)
    return take_responses(data, [uid % len(data) for uid in uids], group, [seed, *uids[:1]])


def take_responses(data: PromptSet, indices: Sequence[int], group: int, seed: list[int]) -> Experience:
    """Take some prompts with up to `group` of their responses, drawn by `seed`."""
    rng, chosen = np.random.default_rng(seed), [data.rows[i] for i in indices]
    total = len(indices) * group
    width = max(len(ids) for row in chosen for ids in row["response_tokens"])
    tokens, lengths = np.zeros((total, width), np.int32), np.zeros(total, np.int32)
    scores, texts = np.full(total, np.nan), [""] * total
    for number, row in enumerate(chosen):
        for member, choice in enumerate(rng.permutation(len(row["scores"]))[:group]):
            at, ids = number * group + member, row["response_tokens"][choice]
            tokens[at, : len(ids)], lengths[at] = ids, len(ids)
            scores[at], texts[at] = row["scores"][choice], row["responses"][choice]
    rollout = Rollout(tokens, None, lengths, lengths > 0)
    prompts, everyone = [data.tokens[i] for i in indices], np.ones(len(indices), bool)
    return Experience(prompts, chosen, rollout, texts, scores, {SCORE: scores}, everyone, {})


# Validation


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out responses, --batch_size prompts at a time, and the batches that score them."""

    experiences: list[Experience]
    batches: list[PackedBatch]
    advantages: Float[np.ndarray, " B"]

    @property
    def scores(self) -> Float[np.ndarray, " B"]:
        """Return the scores on file, NaN where there is no response."""
        return np.concatenate([experience.rewards for experience in self.experiences])

    def mean_logprobs(self, score: Callable[[PackedBatch], np.ndarray]) -> Float[np.ndarray, " B"]:
        """Return every response's mean log-prob per token; `score` gives a batch's log-probs."""
        means = []
        for experience, batch in zip(self.experiences, self.batches, strict=True):
            lengths = experience.rollout.lengths
            packed = int(fetch(batch.order).max()) + 1  # prompts without responses fill the last batch up
            logprobs = restore_order(batch, np.asarray(score(batch), np.float64), packed)[: len(lengths)]
            mask = np.arange(logprobs.shape[1]) < lengths[:, None]
            means.append(np.where(mask, logprobs, 0).sum(axis=1) / np.maximum(lengths, 1))
        return np.concatenate(means)


def hold_out(
    mesh: Mesh, packing: PackingSpec, data: PromptSet, group: int, size: int, to_batch: Callable[[Experience], Batch]
) -> HeldOut:
    """Pack up to `group` responses of every prompt onto the mesh, `size` prompts at a time."""
    starts = range(0, len(data), size)
    experiences = [take_responses(data, range(at, min(at + size, len(data))), group, [0, at]) for at in starts]
    batches = [to_batch(experience) for experience in experiences]
    packed = [
        put_batch(mesh, pack(packing, *pad_batch(experience.prompts, batch, size)))
        for experience, batch in zip(experiences, batches, strict=True)
    ]
    return HeldOut(experiences, packed, np.concatenate([batch.advantages for batch in batches]))


def margins(logprobs: Float[np.ndarray, "P G"], scores: Float[np.ndarray, "P G"]) -> Float[np.ndarray, " P"]:
    """Return how much likelier, per token, the better responses of each prompt are than its worse ones.

    Better and worse are above and below the prompt's mean score; NaN for prompts without both.
    """
    middle = np.array([row[~np.isnan(row)].mean() for row in scores])[:, None]
    better, worse = scores > middle, scores < middle
    both = better.any(axis=1) & worse.any(axis=1)
    means = [np.where(mask, logprobs, 0).sum(axis=1) / np.maximum(mask.sum(axis=1), 1) for mask in (better, worse)]
    return np.where(both, means[0] - means[1], np.nan)


def margin(logprobs: Float[np.ndarray, "P G"], scores: Float[np.ndarray, "P G"]) -> float:
    """Average `margins` over the prompts with better and worse responses; 0 where there is none."""
    known = margins(logprobs, scores)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else 0.0


def validate(
    held: HeldOut, before: Float[np.ndarray, " B"], now: Float[np.ndarray, " B"], group: int
) -> dict[str, float]:
    """Return the margin, and GSPO's unclipped loss against the mean log-probs `before` training."""
    scores = held.scores
    present = ~np.isnan(scores)
    loss = -(held.advantages * np.exp(now - before))[present].mean()
    ragged = scores.reshape(-1, group)
    return {"margin": margin(now.reshape(ragged.shape), ragged), "loss": float(loss), "prompts": float(len(ragged))}
