"""Advantages, losses and the update against formulas written out in float64, over meshes and accumulation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_update_spec, mesh_of, place

from minigrpo.config import LossOptions, OptimizerOptions, Settings, UsageError
from minigrpo.grpo import losses
from minigrpo.grpo.advantages import group_advantages, normalised_separately
from minigrpo.grpo.batch import Batch, PackingSpec, pack, pad_batch, put_batch, restore_order
from minigrpo.grpo.optimizer import apply_gradients, decayed, init_state, learning_rate, make_optimizer
from minigrpo.grpo.update import batch_logprobs, gradients, update
from minigrpo.kernels.backend import backend_for
from minigrpo.model.qwen import ComputeSpec, abstract_params
from minigrpo.planning.memory import device_share_bytes, saved_bytes
from minigrpo.planning.run_spec import RunSpec
from minigrpo.runtime.mesh import HOST_MEMORY

REAL = 250
LENGTHS = np.array([5, 1, 8, 3, 8, 2, 7, 4], np.int32)


PROMPTS = [np.random.default_rng(9).integers(0, REAL, n).tolist() for n in (3, 6, 1, 4, 9, 2, 5, 8)]


def host_batch(seed=0, old=False, ref=False):
    """Completions of PROMPTS, one each."""
    rng = np.random.default_rng(seed)
    shape = (8, 8)
    return Batch(
        completions=rng.integers(0, REAL, shape).astype(np.int32) * (np.arange(8) < LENGTHS[:, None]),
        completion_lengths=LENGTHS,
        advantages=rng.normal(size=8).astype(np.float32),
        rollout_logprobs=rng.normal(-5, 1, shape).astype(np.float32),
        old_logprobs=rng.normal(-5.5, 0.3, shape).astype(np.float32) if old else None,
        ref_logprobs=rng.normal(-5.5, 0.3, shape).astype(np.float32) if ref else None,
    )


def place_batch(mesh, batch, prompts=PROMPTS, rows=8, limits=(16, 16), **more):
    """The batch packed for a mesh; each sequence in its own row unless told otherwise."""
    spec = PackingSpec(mesh.size, rows, *limits, **{"sequences_per_row": 1} | more)
    return put_batch(mesh, pack(spec, prompts, batch))


def run_update(spec, params, packed, updates=0):
    """Loss and metrics, and the gradients: the change of one plain SGD step."""
    mesh = spec.head.mesh
    state = init_state(spec.optimizer, jax.tree.map(jnp.copy, place(params, mesh)), mesh)
    new, metrics, _ = update(spec, dataclasses.replace(state, updates=jnp.int32(updates)), packed, {})
    grads = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, new.params)
    return {name: float(value) for name, value in metrics.items()}, grads


def one_update(config, params, mesh=(1, 1), batch=None, packing=None, **more):
    device_mesh = mesh_of(*mesh)
    packed = place_batch(device_mesh, batch or host_batch(), **packing or {})
    return run_update(make_update_spec(config, device_mesh, **more), params, packed)


def assert_close(got, want, relative=1e-5):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() <= relative * np.abs(b).max() + 1e-7, path


def test_advantages_by_group_batch_and_none():
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 2.0, 5.0, 2.0, 2.0])
    centred = np.array([0.5, -0.5, -0.5, 0.5, -0.75, 2.25, -0.75, -0.75])
    groups = np.repeat([np.std(rewards[:4], ddof=1), np.std(rewards[4:], ddof=1)], 4)
    np.testing.assert_allclose(group_advantages(rewards, 4, "group"), centred / (groups + 1e-4), rtol=1e-6)
    np.testing.assert_allclose(group_advantages(rewards, 4, "batch"), centred / (rewards.std(ddof=1) + 1e-4), rtol=1e-6)
    np.testing.assert_allclose(group_advantages(rewards, 4, "none"), centred, rtol=1e-6)
    assert (group_advantages(np.ones(4), 4, "group") == 0).all()


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "cispo", "dr_grpo"])
def test_token_weights(loss_type):
    mask = np.arange(8) < np.append(LENGTHS[:7], 0)[:, None]
    counted = jnp.asarray(mask, jnp.float32)
    got = np.asarray(losses.token_weights(loss_type, counted, jnp.int32(7), max_tokens=16), np.float64)
    lengths = mask.sum(axis=1, keepdims=True)
    want = {
        "grpo": mask / np.maximum(lengths, 1) / 7,
        "bnpo": mask / mask.sum(),
        "dapo": mask / mask.sum(),
        "cispo": mask / mask.sum(),
        "dr_grpo": mask / (7 * 16),
    }[loss_type]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def oracle_loss(batch, logprobs, frozen, options, weights):
    """The loss in float64, a completion at a time; what has no gradient is taken at `frozen` instead of `logprobs`."""
    total = 0.0
    for b, length in enumerate(batch.completion_lengths):
        now, base, old, ref, sampled, weight = (
            np.asarray(x[b, :length], np.float64)
            for x in (logprobs, frozen, batch.old_logprobs, batch.ref_logprobs, batch.rollout_logprobs, weights)
        )
        advantage = float(batch.advantages[b])
        gain, constant, mismatch = now - old, base - old, old - sampled
        if options.get("importance_sampling_level") == "sequence":
            gain, constant = np.full(length, gain.mean()), np.full(length, constant.mean())
        ratio, low = np.exp(gain), options.get("epsilon", 0.2)
        high = options.get("epsilon_high") or low
        if options.get("loss_type") == "cispo":
            loss = -np.minimum(np.exp(constant), high) * advantage * now
        else:
            bounded = np.minimum(ratio, options.get("delta") or np.inf)
            loss = -np.minimum(bounded * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)
        cap = options.get("rollout_correction_cap", 2.0)
        loss = (
            loss
            * {
                "none": 1.0,
                "token": np.minimum(np.exp(mismatch), cap),
                "sequence": np.minimum(np.exp(mismatch.sum()), cap),
            }[options.get("rollout_correction", "none")]
        )
        kl = (now - ref) ** 2 / 2 if options.get("kl_estimator") == "k2" else np.exp(ref - now) - (ref - now) - 1
        kl = kl * ratio if options.get("kl_bias_correction") else kl
        total += (weight * (loss + options["beta"] * kl)).sum()
    return total


def slopes(function, at, step=1e-6):
    """Central differences of a scalar function of an array."""
    out = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        shift = np.zeros_like(at)
        shift[index] = step
        out[index] = (function(at + shift) - function(at - shift)) / (2 * step)
    return out


VARIANTS = [
    {"beta": 0.0},
    {"beta": 0.04, "epsilon_high": 0.28},
    {"beta": 0.04, "delta": 1.5},
    {"beta": 0.0, "loss_type": "cispo", "epsilon_high": 1.3},
    {"beta": 0.04, "loss_type": "dr_grpo", "kl_estimator": "k2"},
    {"beta": 0.04, "loss_type": "dapo", "kl_bias_correction": True},
    {"beta": 0.04, "importance_sampling_level": "sequence", "epsilon": 0.1, "kl_bias_correction": True},
    {"beta": 0.0, "importance_sampling_level": "sequence", "loss_type": "cispo", "epsilon_high": 1.1},
    {"beta": 0.02, "rollout_correction": "token", "rollout_correction_cap": 1.5},
    {"beta": 0.02, "rollout_correction": "sequence"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_policy_loss_and_gradient_equal_the_formulas(variant):
    batch = host_batch(1, old=True, ref=True)
    rng = np.random.default_rng(5)
    start = batch.old_logprobs + rng.normal(0, 0.4, batch.old_logprobs.shape)
    batch = dataclasses.replace(
        batch, rollout_logprobs=batch.old_logprobs + rng.normal(0, 0.3, start.shape).astype(np.float32)
    )
    options = LossOptions(**variant)
    logprobs = jnp.asarray(start, jnp.float32)
    weights = losses.token_weights(options.loss_type, jnp.asarray(batch.loss_mask), jnp.int32(8), 16)
    device_batch = jax.tree.map(jnp.asarray, batch)

    def ours(x):
        return losses.policy_loss(options, device_batch, weights, x, jnp.zeros_like(x))[0]

    at = np.asarray(logprobs, np.float64)
    loss, grad = jax.value_and_grad(ours)(logprobs)
    np.testing.assert_allclose(loss, oracle_loss(batch, at, at, variant, weights), rtol=1e-5, atol=1e-7)
    want = slopes(lambda x: oracle_loss(batch, x, at, variant, weights), at)
    assert np.abs(want).max() > 1e-3
    np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-7)


def test_clipped_tokens_are_counted():
    batch = host_batch(1, old=True, ref=True)
    rng = np.random.default_rng(5)
    logprobs = jnp.asarray(batch.old_logprobs + rng.normal(0, 0.4, batch.old_logprobs.shape), jnp.float32)
    ratio, mask = np.exp(np.asarray(logprobs) - batch.old_logprobs), np.asarray(batch.completion_mask)
    positive = batch.advantages[:, None] > 0
    device_batch = jax.tree.map(jnp.asarray, batch)
    for variant, low, high in [({}, 0.8, 1.2), ({"loss_type": "cispo", "epsilon_high": 1.3}, 0.0, 1.3)]:
        sums = losses.policy_loss(LossOptions(**variant), device_batch, jnp.asarray(mask / 8), logprobs, logprobs)[1][
            "sums"
        ]
        assert int(sums["clip_ratio/high_mean"]) == ((ratio > high) & positive & mask).sum() > 0
        assert int(sums["clip_ratio/low_mean"]) == ((ratio < low) & ~positive & mask).sum()


def test_excluded_completions_stay_in_the_denominator():
    batch = dataclasses.replace(host_batch(), loss_excluded=np.arange(8) == 2)
    got = losses.token_weights("grpo", jnp.asarray(batch.loss_mask), jnp.int32(8), 16)
    want = np.asarray(batch.completion_mask) / LENGTHS[:, None] / 8
    want[2] = 0
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_rloo_advantages_leave_each_completion_out_of_its_own_baseline():
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 2.0, 5.0, 2.0, 2.0])
    want = [1 - 1 / 3, -2 / 3, -2 / 3, 1 - 1 / 3, -1, 3, -1, -1]
    np.testing.assert_allclose(group_advantages(rewards, 4, "none", "rloo"), want, rtol=1e-6)


def test_separately_normalised_rewards_weigh_the_same_at_any_scale():
    right = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    brief = np.array([1.0, 2.0, 3.0, 4.0, 4.0, 3.0, 2.0, 1.0])
    weights = {"right": 1.0, "brief": 0.5}
    got = normalised_separately({"right": right, "brief": brief}, weights, 4)
    large = normalised_separately({"right": right, "brief": 1000 * brief}, weights, 4)
    np.testing.assert_allclose(got, large, atol=2e-4)
    own = [
        w
        * (x.reshape(2, 4) - x.reshape(2, 4).mean(1, keepdims=True))
        / (x.reshape(2, 4).std(1, ddof=1)[:, None] + 1e-4)
        for x, w in ((right, 1.0), (brief, 0.5))
    ]
    total = sum(own).reshape(-1)
    np.testing.assert_allclose(got, (total - total.mean()) / (total.std(ddof=1) + 1e-4), rtol=1e-5)


def test_a_completion_counts_if_any_function_scores_it():
    """One function is for the first group alone, another for some of the second; the last completion has no score."""
    nan = np.nan
    scores = {
        "first": np.array([1.0, 0.0, 0.0, 4.0, nan, nan, nan, nan]),
        "some": np.array([nan, nan, nan, nan, 2.0, nan, 5.0, nan]),
        "both": np.array([3.0, 1.0, 2.0, 2.0, 0.0, 7.0, 1.0, nan]),
    }
    weights = {"first": 1.0, "some": 2.0, "both": 0.5}
    total = [0.0] * 8
    for name, values in scores.items():
        for group in (range(4), range(4, 8)):
            scored = [i for i in group if values[i] == values[i]]
            if len(scored) > 1:
                own = np.array([values[i] for i in scored])
                for i in scored:
                    total[i] += weights[name] * (values[i] - own.mean()) / (own.std(ddof=1) + 1e-4)
    counted = np.array(total[:7])
    want = [*((counted - counted.mean()) / (counted.std(ddof=1) + 1e-4)), 0.0]
    np.testing.assert_allclose(normalised_separately(scores, weights, 4), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"kl_estimator": "k1"}, "--kl_estimator=k1: as a loss its expected gradient is zero"),
        ({"loss_type": "cispo"}, "--loss_type=cispo: needs --epsilon_high"),
    ],
)
def test_losses_that_mean_nothing_are_refused(variant, message):
    with pytest.raises(UsageError, match=message):
        LossOptions(**variant)


def test_first_update_has_ratio_one_and_clips_nothing(tiny_config, tiny_params):
    """On-policy the loss is minus the weighted advantages, exactly, and no token is clipped."""
    batch = host_batch()
    metrics, _ = one_update(tiny_config, tiny_params, batch=batch)
    np.testing.assert_allclose(metrics["loss"], -batch.advantages.mean(), rtol=1e-6)
    assert [metrics[f"clip_ratio/{name}_mean"] for name in ("low", "high", "region")] == [0, 0, 0]
    assert metrics["kl"] == 0


@pytest.fixture(scope="module")
def single(tiny_config, tiny_params):
    return one_update(tiny_config, tiny_params, batch=host_batch(2, old=True, ref=True))


@pytest.mark.parametrize("mesh", [(4, 2), (2, 4), (8, 1), (1, 2)])
def test_meshes_give_the_same_loss_and_gradients(tiny_config, tiny_params, single, mesh):
    metrics, grads = one_update(tiny_config, tiny_params, mesh, host_batch(2, old=True, ref=True))
    for name, value in metrics.items():
        assert value == pytest.approx(single[0][name], rel=1e-5, abs=1e-7), name
    assert_close(grads, single[1])


@pytest.mark.parametrize(("rows", "mesh", "count"), [(4, (1, 1), 2), (2, (1, 1), 4), (1, (2, 2), 2), (3, (1, 1), 3)])
def test_accumulation_gives_the_same_update(tiny_config, tiny_params, single, rows, mesh, count):
    """In so many micro-batches, the last of three not full."""
    batch, spec = host_batch(2, old=True, ref=True), make_update_spec(tiny_config, mesh_of(*mesh))
    packed = place_batch(mesh_of(*mesh), batch, rows=rows)
    assert int(packed.micro_batches) == count == packed.tokens.shape[1]
    metrics, grads = run_update(spec, tiny_params, packed)
    for name, value in metrics.items():
        assert value == pytest.approx(single[0][name], rel=1e-5, abs=1e-7), name
    assert_close(grads, single[1])


@pytest.mark.parametrize(("rows", "mesh"), [(3, (1, 1)), (1, (2, 2))])
def test_every_tokens_numbers_come_back_by_completion(tiny_config, tiny_params, rows, mesh):
    device_mesh, batch, loss = mesh_of(*mesh), host_batch(2, old=True, ref=True), LossOptions(epsilon=0.3)
    spec, params = make_update_spec(tiny_config, device_mesh, loss=loss), place(tiny_params, device_mesh)
    packed = place_batch(device_mesh, batch, rows=rows)
    _, _, metrics, tokens = gradients(spec, params, jnp.int32(0), packed, {})
    found = {name: restore_order(packed, np.asarray(values), 8) for name, values in tokens.items()}
    mask = np.arange(8) < LENGTHS[:, None]
    scored = restore_order(packed, np.asarray(batch_logprobs(spec, params, packed)), 8)
    np.testing.assert_allclose(found["policy_logprobs"][mask], scored[mask], rtol=1e-5, atol=1e-6)
    assert found["entropy"][mask].mean() == pytest.approx(float(metrics["entropy"]), rel=1e-5)
    ratio, sign = np.exp(scored - batch.old_logprobs), np.sign(batch.advantages)[:, None]
    clipped = ((ratio > 1.3) & (sign > 0)) * 1 - ((ratio < 0.7) & (sign < 0)) * 1
    np.testing.assert_array_equal(found["clipped"][mask], clipped[mask])
    assert {-1, 1} <= set(clipped[mask])


@pytest.mark.parametrize("remat", ["none", "dots", "mlp", "attention"])
def test_remat_policies_change_memory_not_numbers(tiny_config, tiny_params, single, remat):
    assert_close(
        one_update(tiny_config, tiny_params, batch=host_batch(2, old=True, ref=True), remat=remat)[1], single[1]
    )


def test_remat_policies_keep_as_much_as_they_say(tiny_config, tiny_params):
    mesh = mesh_of(1, 1)
    config = dataclasses.replace(tiny_config, num_hidden_layers=32)  # so that they are most of the scratch
    spec = PackingSpec(1, 64, 16, 16, sequences_per_row=1)
    prompts, batch = pad_batch(PROMPTS, host_batch(), 64)
    packed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), pack(spec, prompts, batch))

    def scratch(remat):
        spec = make_update_spec(config, mesh, remat=remat)
        lowered = gradients.lower(spec, abstract_params(config), jnp.int32(0), packed, {})
        return lowered.compile().memory_analysis().temp_size_in_bytes

    kept = {remat: scratch(remat) for remat in ("none", "mlp", "attention", "full")}
    assert kept["full"] < kept["attention"] < kept["mlp"] < 0.5 * kept["none"]
    inner = 2 * 4 * config.num_hidden_layers * config.intermediate_size * packed.tokens.size
    assert kept["mlp"] - kept["attention"] == pytest.approx(inner, rel=0.1)


def test_saved_bytes_are_those_that_the_policy_names(tiny_config):
    def saved(remat):
        settings = dataclasses.replace(Settings(), optimizer=OptimizerOptions(remat=remat))
        backend, dtype = backend_for(jax.devices()[0]), jnp.dtype("float32")
        return saved_bytes(RunSpec(settings, tiny_config, mesh_of(1, 1), backend, "cpu", 1 << 30, dtype, 200, (0,)), 10)

    numbers = 10 * 4 * tiny_config.num_hidden_layers
    assert saved("full") == numbers * tiny_config.hidden_size
    assert saved("attention") - saved("full") == numbers * tiny_config.num_attention_heads * tiny_config.head_dim
    assert saved("mlp") - saved("attention") == numbers * 2 * tiny_config.intermediate_size


def test_non_finite_gradients_skip_the_update(tiny_config, tiny_params):
    batch = host_batch()
    batch.advantages[2] = np.inf
    metrics, grads = one_update(tiny_config, tiny_params, batch=batch)
    assert metrics["skipped_updates"] == 1
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(("share", "kept"), [(0.25, 0.25), (4.0, 1.0)])
def test_gradients_are_clipped_to_the_norm_and_the_norm_is_logged(tiny_params, single, share, kept):
    """AdamW's first moment is (1 - b1) times the clipped gradient."""
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(single[1])))
    assert single[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    optimizer = make_optimizer(OptimizerOptions(max_grad_norm=share * norm, adam_b1=0.75), 10)
    grads, params = (jax.tree.map(jnp.asarray, tree) for tree in (single[1], tiny_params))
    _, state = optimizer.update(grads, optimizer.init(params), params)
    moment = jax.tree.map(np.asarray, optax.tree.get(state, "mu"))
    assert_close(moment, jax.tree.map(lambda g: 0.25 * kept * np.asarray(g), single[1]), 1e-4)


def test_gradients_of_zero_are_not_clipped():
    zeros, optimizer = {"up": jnp.zeros((1, 3, 3))}, make_optimizer(OptimizerOptions(weight_decay=0.0), 10)
    assert (optimizer.update(zeros, optimizer.init(zeros), zeros)[0]["up"] == 0).all()


def test_gradients_are_laid_out_like_weights_and_other_lengths_compile_nothing(tiny_config, tiny_params):
    mesh, traced = mesh_of(2, 2), []
    optimizer = optax.stateless(lambda grads, _: traced.append(grads) or grads)
    spec, placed = make_update_spec(tiny_config, mesh, optimizer=optimizer), place(tiny_params, mesh)
    state, traces, objective = init_state(optimizer, jax.tree.map(jnp.copy, placed), mesh), [], spec.objective
    spec = dataclasses.replace(spec, objective=lambda *part: traces.append(part) or objective(*part))
    first = 0
    for lengths in (LENGTHS, np.ones(8, np.int32), np.array([8, 0, 0, 0, 3, 0, 0, 0], np.int32)):
        packed = place_batch(mesh, dataclasses.replace(host_batch(), completion_lengths=lengths), rows=1)
        grads = gradients(spec, state.params, state.updates, packed, {})[1]
        first = first or len(traces)
        for grad, weight in zip(jax.tree.leaves(grads), jax.tree.leaves(placed), strict=True):
            assert grad.sharding.is_equivalent_to(weight.sharding, weight.ndim)
        old = jax.tree.leaves(state.params)
        state, _, _ = update(spec, state, packed, {})
        assert all(leaf.is_deleted() for leaf in old)
        assert len(traced) == 1 and len(traces) == first


def memory_kinds(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def test_moments_in_the_hosts_memory_change_no_number(tiny_config, tiny_params):
    mesh, optimizer = mesh_of(2, 2), make_optimizer(OptimizerOptions(learning_rate=1e-3), 10)
    packed, found = place_batch(mesh, host_batch()), []
    for offloaded in (False, True):
        spec = make_update_spec(tiny_config, mesh, optimizer=optimizer)
        spec = dataclasses.replace(spec, offload_optimizer=offloaded)
        placed = jax.tree.map(jnp.copy, place(tiny_params, mesh))
        state = init_state(optimizer, placed, mesh, offloaded=offloaded)
        for _ in range(3):
            assert (memory_kinds(optax.tree.get(state.opt_state, "mu")["embed"]) == {HOST_MEMORY}) == offloaded
            assert HOST_MEMORY not in memory_kinds(state.params)
            before = jax.tree.leaves(state.opt_state)
            state, metrics, _ = update(spec, state, packed, {})
            assert all(leaf.is_deleted() for leaf in before if leaf.ndim > 2)
        share = device_share_bytes(state)
        assert (share < 1.1 * device_share_bytes(state.params)) == offloaded
        found.append(jax.tree.map(np.asarray, (state, metrics)))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize(("loss", "grad"), [(np.nan, 1.0), (np.inf, 1.0), (1.0, np.nan), (1.0, -np.inf), (1.0, 1e30)])
def test_a_loss_or_a_gradient_that_is_not_finite_changes_nothing(tiny_params, loss, grad):
    mesh, optimizer = mesh_of(1, 1), make_optimizer(OptimizerOptions(), 10)
    state = init_state(optimizer, place(tiny_params, mesh), mesh)
    before = jax.tree.map(np.array, state)
    grads = jax.tree.map(lambda w: jnp.full(w.shape, grad), state.params)
    schedule = optax.constant_schedule(1.0)
    after, metrics = apply_gradients(optimizer, schedule, state, jnp.float32(loss), grads)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert metrics["skipped_updates"] == 1


def test_learning_rate_schedule():
    options = OptimizerOptions(learning_rate=1.0, warmup_ratio=0.2)
    rates = [float(learning_rate(options, 10)(step)) for step in range(10)]
    np.testing.assert_allclose(rates[:3], [1 / 3, 2 / 3, 1.0], rtol=1e-6)
    assert rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[-1] < 0.05
    np.testing.assert_allclose(rates[5], 0.5 * (1 + np.cos(np.pi * 3 / 8)), rtol=1e-6)
    constant = OptimizerOptions(learning_rate=1.0, warmup_ratio=0.0, lr_schedule="constant")
    assert [float(learning_rate(constant, 5)(step)) for step in range(5)] == [1.0] * 5


def test_weight_decay_spares_norms_and_biases(tiny_config):
    qwen2 = dataclasses.replace(tiny_config, model_type="qwen2", tie_word_embeddings=False)
    mask = decayed(abstract_params(qwen2))
    assert mask["embed"] and mask["head"] and mask["layers"]["attention"]["o"] and mask["layers"]["mlp"]["down"]
    spared = [mask["final_norm"], mask["layers"]["attn_norm"], mask["layers"]["attention"]["q_bias"]]
    assert not any(spared)


def test_adamw_step_equals_the_formula():
    options = OptimizerOptions(learning_rate=0.1, warmup_ratio=0.0, max_grad_norm=1e9, weight_decay=0.5)
    params = {"up": jnp.array([[[2.0, -1.0]]]), "final_norm": jnp.array([3.0])}
    grads = {"up": jnp.array([[[0.3, -0.2]]]), "final_norm": jnp.array([0.1])}
    optimizer = make_optimizer(options, 4)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    sign = np.array([0.3, -0.2]) / (np.abs([0.3, -0.2]) + 1e-8)
    np.testing.assert_allclose(updates["up"][0, 0], -0.1 * (sign + 0.5 * np.array([2.0, -1.0])), rtol=1e-5)
    np.testing.assert_allclose(updates["final_norm"], [-0.1], rtol=1e-5)


def test_the_learning_rate_logged_is_the_one_applied(tiny_config, tiny_params):
    options, mesh = OptimizerOptions(learning_rate=1e-3, warmup_ratio=0.5), mesh_of(1, 1)
    schedule = learning_rate(options, 4)
    spec = make_update_spec(tiny_config, mesh, optimizer=optax.sgd(schedule))
    spec = dataclasses.replace(spec, schedule=schedule)
    packed = place_batch(mesh, host_batch())
    state = init_state(spec.optimizer, jax.tree.map(jnp.copy, place(tiny_params, mesh)), mesh)
    for step in range(3):
        grads = gradients(spec, state.params, state.updates, packed, {})[1]
        before = np.asarray(state.params["final_norm"])
        state, metrics, _ = update(spec, state, packed, {})
        moved = before - np.asarray(state.params["final_norm"])
        assert metrics["learning_rate"] == schedule(step)
        np.testing.assert_allclose(moved, metrics["learning_rate"] * grads["final_norm"], rtol=1e-3, atol=1e-7)


def test_batches_of_fewer_prompts_are_filled_with_empty_completions():
    fields = np.array([[7, 8], [9, 0]], np.int32), np.array([2, 1], np.int32), np.ones(2, np.float32)
    prompts, padded = pad_batch([[1, 2, 3]], Batch(*fields), 3)
    assert prompts == [[1, 2, 3], [0], [0]] and padded.completion_lengths.tolist() == [2, 1, 0, 0, 0, 0]
    assert padded.completions.tolist() == [[7, 8], [9, 0], *[[0, 0]] * 4] and padded.old_logprobs is None


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "cispo"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_dtype_of_a_gradient_is_promoted_by_chance(tiny_config, tiny_params, loss_type, dtype):
    level = "token" if loss_type == "cispo" else "sequence"
    loss = LossOptions(
        loss_type=loss_type, beta=0.1, importance_sampling_level=level, rollout_correction=level, epsilon_high=5.0
    )
    mesh = mesh_of(2, 1)
    spec = make_update_spec(tiny_config, mesh, loss=loss)
    spec = dataclasses.replace(spec, compute=ComputeSpec(jnp.dtype(dtype), mesh))
    packed = place_batch(mesh, host_batch(old=True, ref=True), sequences_per_row=2)
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(functools.partial(gradients, spec), place(tiny_params, mesh), jnp.int32(0), packed, {})
        jax.eval_shape(functools.partial(batch_logprobs, spec), place(tiny_params, mesh), packed)
