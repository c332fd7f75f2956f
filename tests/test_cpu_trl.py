"""The loss beside TRL's own, on the same random numbers, for every variant that both have."""

import collections
import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from minigrpo.config import LossOptions
from minigrpo.grpo import losses
from minigrpo.grpo.batch import Batch

B, C = 6, 9
LIMIT = 12


def random_batch(seed=0):
    """Ragged completions, ratios on both sides of every clip, one completion that was cut off."""
    rng = np.random.default_rng(seed)
    lengths = np.array([9, 1, 4, 7, 2, 9])
    old = rng.normal(-2, 0.7, (B, C))
    return {
        "lengths": lengths,
        "logprobs": old + rng.normal(0, 0.5, (B, C)),
        "old": old,
        "ref": old + rng.normal(0, 0.4, (B, C)),
        "sampled": old + rng.normal(0, 0.6, (B, C)),
        "advantages": rng.normal(0, 1.5, B),
        "cut": np.array([False, False, True, False, False, False]),
    }


def ours(options, data):
    """Loss, its gradient with respect to the log-probs, and the metrics."""
    lengths = jnp.asarray(data["lengths"])
    batch = Batch(
        completions=jnp.zeros((B, C), jnp.int32),
        completion_lengths=lengths,
        advantages=jnp.asarray(data["advantages"]),
        rollout_logprobs=jnp.asarray(data["sampled"]),
        old_logprobs=jnp.asarray(data["old"]),
        ref_logprobs=jnp.asarray(data["ref"]) if options.beta else None,
        loss_excluded=jnp.asarray(data["cut"]) if options.mask_truncated_completions else None,
    )
    weights = losses.token_weights(options.loss_type, batch.loss_mask, jnp.int32(B), LIMIT)

    def loss(logprobs):
        return losses.policy_loss(options, batch, weights, logprobs, jnp.zeros((B, C)))

    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(data["logprobs"]))
    return float(value), np.asarray(gradient), {name: float(x) / lengths.sum() for name, x in aux["sums"].items()}


class Alone:
    """What TRL's trainer asks of accelerate, for one process."""

    num_processes = 1
    sync_gradients = True

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x


def theirs(options, data):
    from trl import GRPOTrainer

    mask = torch.arange(C) < torch.tensor(data["lengths"])[:, None]
    if options.mask_truncated_completions:
        mask &= ~torch.tensor(data["cut"])[:, None]
    logprobs = torch.tensor(data["logprobs"], requires_grad=True)
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros(B, C), None),
        _entropy_bonus_enabled=False,
        _metrics={"train": collections.defaultdict(list)},
        accelerator=Alone(),
        args=types.SimpleNamespace(
            delta=options.delta, use_bias_correction_kl=options.kl_bias_correction, steps_per_generation=1
        ),
        aux_loss_enabled=False,
        beta=options.beta,
        current_gradient_accumulation_steps=1,
        epsilon_high=losses.upper_clip(options),
        epsilon_low=options.epsilon,
        importance_sampling_level=options.importance_sampling_level,
        loss_type=options.loss_type,
        max_completion_length=LIMIT,
        model=types.SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=options.rollout_correction == "token",
        vllm_importance_sampling_correction=True,
    )
    mismatch = torch.tensor(data["old"] - data["sampled"])
    inputs = {
        "prompt_ids": torch.zeros(B, 1),
        "prompt_mask": torch.ones(B, 1),
        "completion_ids": torch.zeros(B, C),
        "completion_mask": mask.double(),
        "advantages": torch.tensor(data["advantages"]),
        "old_per_token_logps": torch.tensor(data["old"]),
        "ref_per_token_logps": torch.tensor(data["ref"]),
        "importance_sampling_ratio": torch.exp(mismatch).clamp(max=options.rollout_correction_cap),
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.item(), logprobs.grad.numpy(), {name: values[0] for name, values in trainer._metrics["train"].items()}


VARIANTS = [
    LossOptions(
        loss_type=kind, beta=beta, epsilon_high=5.0 if kind == "cispo" else high, importance_sampling_level=level
    )
    for kind, beta, high, level in itertools.product(
        ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"), (0.0, 0.1), (None, 0.28), ("token", "sequence")
    )
] + [
    LossOptions(beta=0.0, delta=1.5),
    LossOptions(beta=0.1, kl_bias_correction=True),
    LossOptions(beta=0.1, rollout_correction="token", rollout_correction_cap=1.3),
    LossOptions(beta=0.1, mask_truncated_completions=True),
    LossOptions(loss_type="dapo", beta=0.1, mask_truncated_completions=True),
    LossOptions(loss_type="dr_grpo", beta=0.0, mask_truncated_completions=True),
]


def name_of(options):
    changed = [
        f"{key}={value}" for key, value in dataclasses.asdict(options).items() if value != getattr(LossOptions(), key)
    ]
    return ",".join(changed) or "default"


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_loss_gradient_and_metrics_are_trls(options):
    data = random_batch()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # doubles meet float32 masks
        value, gradient, metrics = ours(options, data)
    wanted, wanted_gradient, wanted_metrics = theirs(options, data)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-5, atol=1e-9)
    if options.importance_sampling_level == "token" and not options.mask_truncated_completions:
        for name in {"kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"} & set(
            wanted_metrics
        ):
            np.testing.assert_allclose(metrics[name], wanted_metrics[name], rtol=1e-5, err_msg=name)
