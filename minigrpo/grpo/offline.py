"""GRPO on responses that are on file, with scores: the same loss, without sampling."""

import dataclasses
import sys
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from minigrpo.config import DataOptions, UsageError
from minigrpo.data.chat import Tokenizer
from minigrpo.data.datasets import Prompts, batch_numbers, read_recorded, tokenize
from minigrpo.grpo.batch import PackedBatch, restore_order
from minigrpo.grpo.experience import Experience
from minigrpo.model.params import Params
from minigrpo.rollout.generator import Rollout

SCORE = "score"
"""Name under which a file's scores are reported."""


def load_recorded(tokenizer: Tokenizer, options: DataOptions, limit: int, most: int | None = None) -> Prompts:
    """Prompts whose rows hold "response_tokens", end token included; responses too long are dropped and counted.

    `most` rows are read, None being all.
    """
    dataset = read_recorded(options)
    dataset = dataclasses.replace(dataset, rows=dataset.rows[:most])
    data = tokenize(dataset, tokenizer, options)
    texts = [text for row in data.rows for text in row["responses"]]
    tokens = iter([ids + [tokenizer.stop_tokens[-1]] for ids in tokenizer.encode(texts)])
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


def recorded_experience(data: Prompts, batch_size: int, group: int, seed: int, params: Params, step: int) -> Experience:
    """Take the step's prompts with up to `group` of their responses, drawn anew every epoch; `params` go unused."""
    uids = batch_numbers(len(data), batch_size, step, seed)
    return take_responses(data, [uid % len(data) for uid in uids], group, [seed, *uids[:1]])


def take_responses(data: Prompts, indices: Sequence[int], group: int, seed: list[int]) -> Experience:
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
    prompts, everyone = [list(data.tokens[i]) for i in indices], np.ones(len(indices), bool)
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
