"""Diagnoses of a run: answers to common questions, drawn from its metrics and settings."""

from collections.abc import Callable
from typing import Any

Rows = list[dict[str, Any]]
Check = Callable[[dict[str, Any], Rows], str | None]
"""(settings, metrics of all steps) -> a finding, or None when there is nothing to say."""

RECENT = 10
"""Steps that a finding about the run's present state looks at."""

MISMATCH = {"float32": 1e-3, "bfloat16": 0.05}
"""Mean difference of the sampler's and the trainer's log-probs that rounding in this dtype does not explain."""


def recent(rows: Rows, name: str) -> float:
    """Average a metric over the last steps; 0 when it is missing."""
    values = [row[name] for row in rows[-RECENT:] if row.get(name) is not None]
    return sum(values) / len(values) if values else 0.0


def loss_is_zero(settings: dict[str, Any], rows: Rows) -> str | None:
    """Explain a loss of 0 in on-policy training."""
    once = settings.get("num_iterations") == 1 and settings.get("num_minibatches", 1) == 1
    on_policy = settings.get("loss_type") == "grpo" and settings.get("beta") == 0 and once
    if not on_policy or not all(abs(row["loss"]) <= 1e-3 for row in rows):
        return None
    return (
        "The loss is about 0 in every step, and that is right: on-policy, the ratio is 1 and a group's advantages add "
        f"up to 0. Its gradient is not 0 (norm {recent(rows, 'grad_norm'):.3g}); watch the reward."
    )


def no_reward(settings: dict[str, Any], rows: Rows) -> str | None:
    """Report that no completion ever got a reward."""
    if not any("reward" in row for row in rows) or any(row.get("reward") or row.get("reward_std") for row in rows):
        return None
    return (
        "Every completion of every step got reward 0, so nothing was learned. Read the samples: does the model "
        "know the answer format (python -m minigrpo.sft teaches it)? Is --reward right? Is --answer_column right?"
    )


def one_reward_is_zero(settings: dict[str, Any], rows: Rows) -> str | None:
    """Report reward functions that were always 0 while others were not."""
    names = [name for name in rows[0] if name.startswith("rewards/") and name.endswith("/mean")]
    dead = [name.split("/")[1] for name in names if not any(row.get(name) for row in rows)]
    if not dead or len(dead) == len(names):
        return None
    return f"Reward {', '.join(dead)} was 0 in every step while others were not: it may not match what is asked for."


def cut_off(settings: dict[str, Any], rows: Rows) -> str | None:
    """Report a large share of completions cut at the length limit."""
    share = recent(rows, "completions/clipped_ratio")
    if share < 0.3:
        return None
    return (
        f"{share:.0%} of recent completions were cut at --max_completion_length={settings.get('max_completion_length')}"
        ": raise it, or shorten answers with --overlong_buffer; if nearly all are cut, check that the model ends its "
        "turns with an end token of its generation_config.json."
    )


def no_contrast(settings: dict[str, Any], rows: Rows) -> str | None:
    """Report a large share of groups whose completions all got the same reward."""
    share = recent(rows, "frac_reward_zero_std")
    if share < 0.5:
        return None
    return (
        f"In {share:.0%} of recent groups all completions got the same reward, which teaches nothing: the problems are "
        "too easy or too hard. More --num_generations, a higher --temperature, other data, or "
        "--zero_std_groups=resample."
    )


def warming_up(settings: dict[str, Any], rows: Rows) -> str | None:
    """Report that the learning rate is still rising."""
    peak = settings.get("learning_rate", 0)
    rising = len(rows) > 1 and rows[-1]["learning_rate"] > rows[-2]["learning_rate"]
    if not rising or rows[-1]["learning_rate"] >= peak:
        return None
    return (
        f"The learning rate is still warming up ({rows[-1]['learning_rate']:.2g} of {peak:.2g}): little can have "
        "changed yet. --warmup_ratio is a share of all steps."
    )


def samplers_apart(settings: dict[str, Any], rows: Rows) -> str | None:
    """Report log-probs of sampler and trainer that differ by more than rounding."""
    apart = recent(rows, "sampling/sampling_logp_difference/mean")
    if settings.get("lora_dropout") or apart < MISMATCH.get(settings.get("compute_dtype", ""), MISMATCH["bfloat16"]):
        return None
    return (
        f"Sampler and trainer differ by {apart:.2g} nats per token on average, more than rounding explains: "
        "--rollout_correction=token weighs it out; if it grows, please report it."
    )


def skipped(settings: dict[str, Any], rows: Rows) -> str | None:
    """Report updates that were skipped for a loss or gradient that was not finite."""
    count = sum(row.get("skipped_updates", 0) for row in rows)
    return (
        f"{count:.0f} updates were skipped because loss or gradient was not finite: lower --learning_rate."
        if count
        else None
    )


def always_clipped(settings: dict[str, Any], rows: Rows) -> str | None:
    """Report a gradient that is clipped in nearly every step."""
    limit = settings.get("max_grad_norm", float("inf"))
    share = sum(row["grad_norm"] > limit for row in rows) / len(rows)
    if share < 0.9 or len(rows) < RECENT:
        return None
    return (
        f"The gradient was clipped in {share:.0%} of the steps (--max_grad_norm={limit:g}, norm "
        f"{recent(rows, 'grad_norm'):.2g} lately): steps differ in direction only, their size is set by the clip."
    )


def collapsed(settings: dict[str, Any], rows: Rows) -> str | None:
    """Report a collapse of the entropy."""
    first, last = recent(rows[:RECENT], "entropy"), recent(rows, "entropy")
    if len(rows) < 2 * RECENT or last > 0.2 * first:
        return None
    return (
        f"Entropy fell from {first:.2g} to {last:.2g} nats per token: completions of a group become nearly equal. "
        "A higher --epsilon_high, --temperature or --beta, or a lower --learning_rate."
    )


def far_from_reference(settings: dict[str, Any], rows: Rows) -> str | None:
    """Report a policy far from its reference."""
    apart = recent(rows, "kl")
    if not settings.get("beta") or apart < 1:
        return None
    return f"The policy is {apart:.2g} nats per token from its reference: a higher --beta or lower --learning_rate."


CHECKS: tuple[Check, ...] = (
    no_reward, one_reward_is_zero, cut_off, no_contrast, warming_up, loss_is_zero, samplers_apart, skipped,
    always_clipped, collapsed, far_from_reference,
)  # fmt: skip


SUPERVISED: tuple[Check, ...] = (warming_up, skipped, always_clipped)
"""Of supervised training, which samples nothing."""


def diagnose(settings: dict[str, Any], rows: Rows) -> list[str]:
    """List every finding, the gravest first; one line that says so when there is none."""
    checks = CHECKS if "reward" in rows[0] else SUPERVISED
    findings = [finding for check in checks if (finding := check(settings, rows))]
    return findings or ["Nothing unusual in this run's numbers."]
