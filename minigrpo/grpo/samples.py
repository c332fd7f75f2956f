"""Completions written to completions.jsonl: the whole group of a step's first prompt, one of each of the next."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from minigrpo.grpo.batch import PackedBatch, restore_order
from minigrpo.grpo.experience import Experience
from minigrpo.runtime.mesh import fetch

TOKEN_RECORDS = 20
"""Steps of a run, about, whose first group is written token by token."""

LONGEST_RECORD = 512
"""Tokens of a completion that are written one by one."""

Decode = Callable[[list[list[int]]], list[str]]


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Numbers of every token of a step's first minibatch, on the devices."""

    packed: PackedBatch
    update: dict[str, Float[Array, "A M K C"]]
    """The last update's own, as `minigrpo.grpo.losses.policy_loss` names them."""


def sample_rows(
    experience: Experience, advantages: Float[np.ndarray, " B"], step: int, count: int, tokens: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return rows of the first prompt's whole group, and of the first completion of the next `count` - 1 prompts.

    `step` is counted from 1; `tokens` are further columns of the first group, [] for none.
    """
    group = experience.group
    chosen = list(range(group)) + [prompt * group for prompt in range(1, min(count, len(experience.prompts)))]
    rows = [sample_row(experience, at, step) | {"advantage": as_json(float(advantages[at]))} for at in chosen if count]
    for row, own in zip(rows, tokens, strict=False):
        row |= own
    return [row for row in rows if row["length"]]


def sample_row(experience: Experience, at: int, step: int) -> dict[str, Any]:
    """Return what is known of one completion."""
    prompt, member = divmod(at, experience.group)
    row = experience.rows[prompt]
    return (
        {"step": step, "group": prompt, "member": member, "prompt": row["prompt"]}
        | ({"answer": row["answer"]} if "answer" in row else {})
        | {"completion": experience.texts[at], "reward": as_json(experience.rewards[at])}
        | {"length": int(experience.rollout.lengths[at]), "stopped": bool(experience.rollout.stopped[at])}
        | {"rewards": {name: as_json(scores[at]) for name, scores in experience.components.items()}}
        | {name: column[at] for name, column in experience.extra.items()}
    )


def as_json(value: float) -> float | None:
    """Replace NaN by None."""
    return None if np.isnan(value) else float(value)


# Token by token


def records_tokens(step: int, total: int) -> bool:
    """Tell whether the tokens of a step, counted from 1, are written: the first, the last, and some between."""
    return step in (1, total) or step % max(1, total // TOKEN_RECORDS) == 0


def token_columns(experience: Experience, decode: Decode, scores: TokenScores) -> list[dict[str, Any]]:
    """Return tokens and their numbers for each completion of the first prompt.

    "logprobs" are the sampler's, "old_logprobs" the trainer's before the step's first update where several follow,
    "policy_logprobs" the trainer's just before the last update, and "ref_logprobs" the reference's where there is one.
    """
    numbers = {"logprobs": experience.rollout.logprobs} | first_group_scores(experience, scores)
    columns = []
    for at in range(experience.group):
        length = min(int(experience.rollout.lengths[at]), LONGEST_RECORD)
        ids = experience.rollout.tokens[at, :length].tolist()
        kept = {name: rounded(values[at, :length]) for name, values in numbers.items() if values is not None}
        columns.append({"tokens": token_texts(decode, ids)} | kept)
    return columns


def rounded(values: np.ndarray) -> list[float | None]:
    """Return numbers with four decimals, None for those that are not finite."""
    return [round(float(value), 4) if np.isfinite(value) else None for value in values]


def first_group_scores(experience: Experience, scores: TokenScores) -> dict[str, Float[np.ndarray, "G C"]]:
    """Return the trainer's numbers of the first prompt's tokens; every process calls this at the same place."""
    if not experience.group_mask[0]:
        return {}
    packed = scores.packed
    columns = {name: getattr(packed.batch, name) for name in ("old_logprobs", "ref_logprobs")} | scores.update
    known = {name: fetch(values) for name, values in columns.items() if values is not None}
    count = int(fetch(packed.order).max()) + 1 if known else 0
    return {name: restore_order(packed, values, count)[: experience.group] for name, values in known.items()}


def token_texts(decode: Decode, ids: list[int]) -> list[str]:
    """Return the text of every token; a character of several tokens belongs to its last one."""
    texts, pending = [], list[int]()
    for token in ids:
        pending.append(token)
        text = decode([pending])[0]
        whole = not text.endswith("\ufffd") or len(pending) == 4
        texts.append(text if whole else "")
        pending = [] if whole else pending
    return texts
