"""GRPO on responses that are on file, with scores: the same loss, without sampling."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from minigrpo.data.datasets import PromptSet, batch_numbers
from minigrpo.grpo.batch import PackedBatch, restore_order
from minigrpo.grpo.experience import Experience
from minigrpo.model.params import Params
from minigrpo.rollout.generator import Rollout

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

    def mean_logprobs(self, score: Callable[[PackedBatch], np.ndarray]) -> Float[np.ndarray, " B"]:
        """Return every response's mean log-prob per token; `score` gives a batch's log-probs."""
        means = []
        for experience, batch in zip(self.experiences, self.batches, strict=True):
            lengths = experience.rollout.lengths
            logprobs = restore_order(batch, np.asarray(score(batch), np.float64), len(lengths))
            mask = np.arange(logprobs.shape[1]) < lengths[:, None]
            means.append(np.where(mask, logprobs, 0).sum(axis=1) / np.maximum(lengths, 1))
        return np.concatenate(means)


def margin(logprobs: Float[np.ndarray, "P G"], scores: Float[np.ndarray, "P G"]) -> float:
    """Return how much likelier, per token, the better responses of a prompt are than its worse ones, over all prompts.

    Better and worse are above and below the prompt's mean score; prompts without both do not count.
    """
    middle = np.array([row[~np.isnan(row)].mean() for row in scores])[:, None]
    better, worse = scores > middle, scores < middle
    both = better.any(axis=1) & worse.any(axis=1)
    if not both.any():
        return 0.0
    means = [np.where(mask, logprobs, 0)[both].sum(axis=1) / mask[both].sum(axis=1) for mask in (better, worse)]
    return float((means[0] - means[1]).mean())


def validate(
    held: HeldOut, before: Float[np.ndarray, " B"], now: Float[np.ndarray, " B"], group: int
) -> dict[str, float]:
    """Return the margin, and GSPO's unclipped loss against the mean log-probs `before` training."""
    scores = np.concatenate([experience.rewards for experience in held.experiences])
    present = ~np.isnan(scores)
    loss = -(held.advantages * np.exp(now - before))[present].mean()
    ragged = scores.reshape(-1, group)
    return {"margin": margin(now.reshape(ragged.shape), ragged), "loss": float(loss), "prompts": float(len(ragged))}
