"""Stop texts: a completion ends with the token after which its text holds one; what was sampled later is dropped.

Texts have no one sequence of tokens, so they are looked for on the host, once the whole completions are there.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from minigrpo.rollout.generator import Rollout

Decode = Callable[[list[list[int]]], list[str]]
"""Token ids of completions -> their texts."""


def find_stops(
    completions: Sequence[Sequence[int]], stops: Sequence[str], decode: Decode
) -> tuple[Bool[np.ndarray, " B"], Int[np.ndarray, " B"]]:
    """Find which completions' texts hold any of `stops`, and the fewest tokens that do; all tokens of the others.

    More tokens never take a text away, so that number is bisected.
    """
    high = np.array([len(tokens) for tokens in completions], np.int32)

    def holds(rows: Int[np.ndarray, " R"], lengths: Int[np.ndarray, " R"]) -> Bool[np.ndarray, " R"]:
        texts = decode([list(completions[row][:length]) for row, length in zip(rows, lengths, strict=True)])
        return np.array([any(stop in text for stop in stops) for text in texts], bool)

    found, low = holds(np.arange(len(high)), high), np.zeros_like(high)
    while (rows := np.flatnonzero(found & (high - low > 1))).size:
        middle = (low[rows] + high[rows]) // 2
        inside = holds(rows, middle)
        high[rows], low[rows] = np.where(inside, middle, high[rows]), np.where(inside, low[rows], middle)
    return found, high


def end_at_stops(rollout: Rollout, stops: Sequence[str], decode: Decode) -> Rollout:
    """Cut completions after the token that completes the first of `stops` in their texts, which counts as their end."""
    if not stops:
        return rollout
    found, lengths = find_stops(rollout.completions, stops, decode)
    kept = np.arange(rollout.tokens.shape[1]) < lengths[:, None]

    def cut(x: Array | np.ndarray) -> np.ndarray:
        return np.where(kept, x, np.zeros_like(x))

    arrays = {name: jax.tree.map(cut, getattr(rollout, name)) for name in ("tokens", "logprobs", "kept")}
    return dataclasses.replace(rollout, lengths=lengths, stopped=rollout.stopped | found, **arrays)
