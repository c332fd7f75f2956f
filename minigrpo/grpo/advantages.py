"""Advantages from rewards: pure functions on the host, callable without a run."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

ADVANTAGE_EPSILON = 1e-4
"""Added to the std that advantages are divided by."""


def group_mean(rewards: Float[np.ndarray, "P G"]) -> Float[np.ndarray, "P G"]:
    """Return the group's mean (arXiv:2402.03300)."""
    return np.broadcast_to(rewards.mean(axis=1, keepdims=True), rewards.shape)


def mean_of_others(rewards: Float[np.ndarray, "P G"]) -> Float[np.ndarray, "P G"]:
    """Return the mean of the group's other members: leave-one-out (RLOO, arXiv:2402.14740)."""
    return (rewards.sum(axis=1, keepdims=True) - rewards) / (rewards.shape[1] - 1)


BASELINES = {"group": group_mean, "rloo": mean_of_others}


def group_advantages(
    rewards: Float[np.ndarray, " B"], group: int, scale: str, baseline: str = "group"
) -> Float[np.ndarray, " B"]:
    """Subtract the baseline from rewards and divide by the std of the group, of the batch, or by 1.

    The std is the unbiased one plus 1e-4. Completions of one group are adjacent.

    >>> group_advantages(np.array([1.0, 0.0, 5.0, 5.0]), 2, "none").tolist()
    [0.5, -0.5, 0.0, 0.0]
    """
    grouped = rewards.reshape(-1, group)
    centred = (grouped - BASELINES[baseline](grouped)).reshape(-1)
    divisors: dict[str, Callable[[], np.ndarray | float]] = {
        "group": lambda: np.repeat(grouped.std(axis=1, ddof=1), group) + ADVANTAGE_EPSILON,
        "batch": lambda: rewards.std(ddof=1) + ADVANTAGE_EPSILON,
        "none": lambda: 1.0,
    }
    return (centred / divisors[scale]()).astype(np.float32)


def ragged_advantages(
    rewards: Float[np.ndarray, " B"], group: int, scale: str, baseline: str = "group", lone: float = 0.0
) -> Float[np.ndarray, " B"]:
    """Compute `group_advantages` of groups that are not all full; NaN is no completion, or no reward, and gives 0.

    A group of one has nothing to be compared with: its advantage is `lone` times its reward, before the scaling
    by the batch.
    """
    present = ~np.isnan(rewards)
    if present.all():
        return group_advantages(rewards, group, scale, baseline)
    result = np.zeros(len(rewards), np.float32)
    for start in range(0, len(rewards), group):
        rows = start + np.flatnonzero(present[start : start + group])
        own, inside = rewards[rows], "group" if scale == "group" else "none"
        result[rows] = group_advantages(own, len(own), inside, baseline) if len(own) > 1 else lone * own
    by_batch = scale == "batch" and present.sum() > 1
    return (result / (rewards[present].std(ddof=1) + ADVANTAGE_EPSILON if by_batch else 1.0)).astype(np.float32)


def normalised_separately(
    components: dict[str, Float[np.ndarray, " B"]], weights: dict[str, float], group: int
) -> Float[np.ndarray, " B"]:
    """Sum every reward function's own weighted advantages, so that none drowns another (GDPO, arXiv:2601.05242).

    The sum is normalised once more over the batch.
    """
    own = [weights[name] * ragged_advantages(scores, group, "group") for name, scores in components.items()]
    total = np.stack(own).sum(axis=0, dtype=np.float64)
    present = ~np.isnan(np.stack(list(components.values()))).all(axis=0)
    if present.sum() < 2:
        return np.zeros(len(total), np.float32)
    centred = np.where(present, total - total[present].mean(), 0)
    return (centred / (total[present].std(ddof=1) + ADVANTAGE_EPSILON)).astype(np.float32)
