"""Rollouts: independence of every scheduling choice, agreement with the trainer, stop tokens, small pools."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import forward, make_generator, make_update_spec, mesh_of

from minigrpo.config import RolloutOptions, UsageError
from minigrpo.grpo.batch import Batch, PackingSpec, pack, put_batch, restore_order
from minigrpo.grpo.update import batch_logprobs
from minigrpo.kernels.backend import FusedProjections, backend_for
from minigrpo.rollout import generator as generator_module
from minigrpo.rollout.generator import Start, batch_sizes, deal_prompts, decode_weights, run_mesh

REAL = 250
STOPS = (5, 9)
OPTIONS = RolloutOptions(max_completion_length=24, temperature=1.0, page_size=8, slots="16")


def some_prompts(count=6):
    rng = np.random.default_rng(0)
    lengths = [1, 7, 8, 9, 17, 30, 16, 2][:count]
    return [rng.integers(10, REAL, length).tolist() for length in lengths]


def roll(
    config, params, options=OPTIONS, mesh=(1, 1), prompts=None, uids=None, group=4, stops=STOPS, seed=(7, 0), **more
):
    prompts = some_prompts() if prompts is None else prompts
    uids = list(range(len(prompts))) if uids is None else uids
    start, longest = more.pop("start", None), max(map(len, prompts))
    generator = make_generator(config, options, mesh, stops, prompt_tokens=max(32, longest), **more)
    return generator(jax.tree.map(jnp.asarray, params), prompts, uids, group, seed, start)


@pytest.fixture(scope="module")
def plain(tiny_config, tiny_params):
    return roll(tiny_config, tiny_params)


def assert_same(got, want):
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "mesh"),
    [
        ({"slots": "4"}, (1, 1)),
        ({"slots": "auto"}, (1, 1)),
        ({"slots": "1"}, (1, 1)),
        ({"page_size": 16}, (1, 1)),
        ({"pool_pages": 28}, (1, 1)),
        ({"pool_pages": 36, "slots": "3"}, (1, 1)),
        ({}, (4, 2)),
        ({"slots": "2", "page_size": 4}, (2, 1)),
    ],
)
def test_scheduling_changes_no_completion(tiny_config, tiny_params, plain, changes, mesh):
    assert_same(roll(tiny_config, tiny_params, dataclasses.replace(OPTIONS, **changes), mesh), plain)


def test_scheduling_changes_no_truncated_completion(tiny_config, tiny_params):
    options = dataclasses.replace(OPTIONS, top_k=20, top_p=0.9)
    want = roll(tiny_config, tiny_params, options)
    for changes, mesh in (({"slots": "3", "page_size": 16}, (1, 1)), ({"slots": "64"}, (4, 1))):
        assert_same(roll(tiny_config, tiny_params, dataclasses.replace(options, **changes), mesh), want)


def test_the_batch_around_a_prompt_changes_nothing(tiny_config, tiny_params, plain):
    """A prompt keeps its completions alone, in another order, and in a larger group."""
    prompts = some_prompts()
    alone = roll(tiny_config, tiny_params, prompts=[prompts[4], prompts[1]], uids=[4, 1])
    np.testing.assert_array_equal(alone.tokens[:4], plain.tokens[16:20])
    np.testing.assert_array_equal(alone.tokens[4:], plain.tokens[4:8])
    larger = roll(tiny_config, tiny_params, group=8)
    np.testing.assert_array_equal(larger.tokens[8:12], plain.tokens[4:8])


def test_seed_and_step_change_completions(tiny_config, tiny_params, plain):
    for seed in ((8, 0), (7, 1)):
        assert (roll(tiny_config, tiny_params, seed=seed).tokens != plain.tokens).any()
    assert len({tuple(row) for row in plain.tokens}) > 20


def test_completions_end_at_stop_tokens(plain):
    assert plain.stopped.any() and not plain.stopped.all()
    for tokens, length, stopped in zip(plain.tokens, plain.lengths, plain.stopped, strict=True):
        ends = np.isin(tokens[:length], STOPS)
        assert not ends[:-1].any() and ends[-1] == stopped
        assert length == OPTIONS.max_completion_length or stopped
        assert (tokens[length:] == 0).all() and (tokens < REAL).all()


def test_every_position_has_its_own_random_number(tiny_config, tiny_params):
    """With a flat distribution the tokens of a completion are as different as independent draws."""
    flat = jax.tree.map(lambda w: 0 * w, tiny_params)
    rollout = roll(tiny_config, flat, stops=(263,))
    assert min(len(set(row)) for row in rollout.tokens) > 16  # of 24; one number for all positions would give 1
    assert len({tuple(row) for row in rollout.tokens}) == 24


def test_a_preempted_completion_keeps_its_tokens(tiny_config, tiny_params, plain):
    small = roll(tiny_config, tiny_params, dataclasses.replace(OPTIONS, pool_pages=32))
    assert_same(small, plain)
    assert small.preempted > 0 < small.refilled and plain.preempted == plain.refilled == 0
    assert small.refilled < 0.5 * plain.lengths.sum()


@pytest.mark.parametrize("kept", [0, 1, 5, 23])
def test_completions_continue_from_given_tokens(tiny_config, tiny_params, plain, kept):
    """And sample what they would have without a stop."""
    lengths = np.minimum(plain.lengths, kept).astype(np.int32)
    mask = np.arange(plain.tokens.shape[1]) < lengths[:, None]
    start = Start(plain.tokens * mask, plain.logprobs * mask, lengths)
    assert_same(roll(tiny_config, tiny_params, start=start), plain)
    continued = roll(tiny_config, tiny_params, dataclasses.replace(OPTIONS, slots="3", page_size=4), start=start)
    assert_same(continued, plain)


def test_prompts_share_rows_of_prefill(tiny_config):
    """Seven short prompts and one of full length take two rows of whole pages."""
    spec = make_generator(tiny_config, OPTIONS, prompt_tokens=64).spec
    prompts = [[1] * 5] * 7 + [[2] * 64]
    _, rows, _ = deal_prompts(dataclasses.replace(spec, prompt_tokens=64), prompts, list(range(8)), 1)
    used = (rows.segment_ids > 0).sum(axis=1)
    assert used[used > 0].tolist() == [63, 28] and rows.chunks.tolist() == [1]


@pytest.mark.parametrize("slots", [3, 5, 7, 16])
def test_slots_are_handed_on_at_once(tiny_config, tiny_params, plain, slots):
    """Each completion takes the first slot that becomes free, in order; the count is by hand."""
    options = dataclasses.replace(OPTIONS, slots=str(slots))
    rollout, busy, waiting, steps = roll(tiny_config, tiny_params, options), [], plain.lengths.tolist(), 0
    while busy or waiting:
        while waiting and len(busy) < slots:
            busy.append(waiting.pop(0))
        busy, steps = [left - 1 for left in busy if left > 1], steps + 1
    assert rollout.decode_steps == steps
    assert rollout.occupancy == pytest.approx(plain.lengths.sum() / (steps * slots))


def simulate(lengths, prompt, page, pool, slots):
    """Preemptions and refilled tokens of a device rollout with these lengths, by the scheduler itself."""
    from minigrpo.rollout import scheduler

    total, limit = len(lengths), 64
    entries = -(-(prompt + limit) // page)
    spec = scheduler.PageSpec(page, pool, entries, 1, limit)
    prompts = scheduler.PromptBatch(
        jnp.zeros((total, prompt), jnp.int32), jnp.full(total, prompt), jnp.arange(total), jnp.zeros(total, jnp.int32)
    )
    zeros = jnp.zeros(slots, jnp.int32)
    empty = scheduler.Slots(zeros + total, zeros, zeros, jnp.full((slots, entries), pool, jnp.int32))
    per_prompt = -(-(prompt - 1) // page)
    columns = jnp.arange(entries)[None]
    table = jnp.where(columns < per_prompt, jnp.arange(total)[:, None] * per_prompt + columns, pool)
    state = scheduler.State(
        jnp.zeros((1, pool, 1)),
        scheduler.full_pool(pool, jnp.int32(total * per_prompt)),
        empty,
        jnp.zeros(total, jnp.int32),
        *(jnp.zeros((total, limit), dtype) for dtype in (jnp.int32, jnp.float32)),
        jnp.zeros(total, jnp.int32),
        jnp.zeros(slots, bool),
        jnp.bool(False),
        jnp.zeros(4, jnp.int32),
    )
    wanted = jnp.asarray(lengths)

    @jax.jit
    def step(state):
        state = scheduler.extend(spec, scheduler.schedule(spec, prompts, table, state))
        rows = generator_module.choose_rows(spec, prompts, state)
        sampling = scheduler.running(state) & rows.samples
        completion = jnp.where(sampling, state.slots.completion, total)
        count = state.lengths[jnp.minimum(completion, total - 1)] + 1
        filled = jnp.zeros_like(state.slots.cached).at[rows.slot].add(rows.valid.astype(jnp.int32))
        refilled = jnp.where(rows.samples, 0, rows.valid.sum())
        return dataclasses.replace(
            state,
            slots=dataclasses.replace(state.slots, cached=state.slots.cached + filled),
            lengths=state.lengths.at[completion].set(count, mode="drop"),
            ended=sampling & (count == wanted[jnp.minimum(completion, total - 1)]),
            counts=state.counts + jnp.stack([1, sampling.sum(), 0, refilled]),
        )

    for _ in range(20 * sum(lengths)):
        if (np.asarray(state.status) == scheduler.DONE).sum() + np.asarray(state.ended).sum() == total:
            break
        state = step(state)
    np.testing.assert_array_equal(state.lengths, lengths)
    return dict(zip(scheduler.COUNTS, np.asarray(state.counts).tolist(), strict=True))


@pytest.mark.parametrize(("share", "most"), [(0.25, 0.05), (0.1, 0.5)])
def test_a_short_pool_costs_little(share, most):
    """Lengths are lognormal with a mean of a sixth of the limit, as 350 of 2,048 tokens."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(64 / 6) - 0.32, 0.8, 48), 1, 64).astype(int)
    prompt, page, slots = 5, 4, 32
    worst = 48 + slots * (64 // page + 1)
    counts = simulate(lengths.tolist(), prompt, page, 48 + int(share * (worst - 48)), slots)
    assert counts["refilled"] <= most * lengths.sum()


def test_the_fused_kernels_of_a_backend_get_every_token(tiny_config, tiny_params, plain):
    seen = []

    def gated(x, gate, up):
        seen.append(x.shape)
        return jax.nn.silu(x @ gate) * (x @ up)

    backend = dataclasses.replace(
        backend_for(jax.devices()[0]), least_batch=4, fused_projections=lambda shape: FusedProjections(gated=gated)
    )
    assert_same(roll(tiny_config, tiny_params, backend=backend), plain)
    assert set(seen) == {(16, 32), (4, 32)}


def test_a_pool_too_small_for_one_completion_is_refused(tiny_config, tiny_params):
    with pytest.raises(UsageError, match=r"--pool_pages=5: at least 28 pages of 8 tokens"):
        roll(tiny_config, tiny_params, dataclasses.replace(OPTIONS, pool_pages=5))


def test_a_group_has_its_prompt_held_once(tiny_config, tiny_params):
    """64 prompts x 8: a pool of one copy of each prompt serves all eight completions."""
    prompts = np.random.default_rng(0).integers(10, REAL, (64, 33)).tolist()
    once, own = 64 * 5, 2  # pages of 8: five for a prompt of 33, up to two for 8 tokens more
    options = dataclasses.replace(OPTIONS, max_completion_length=8, pool_pages=once + 4 * own, temperature=0.0)
    rollout = roll(tiny_config, tiny_params, options, prompts=prompts, group=8)
    assert len(rollout.tokens) == 512
    eight = rollout.tokens.reshape(64, 8, -1)
    assert (eight == eight[:, :1]).all() and len({tuple(row) for row in eight[:, 0]}) > 32


@pytest.mark.parametrize("mesh", [(1, 1), (4, 2)])
def test_rollout_logprobs_equal_the_trainers(tiny_config, tiny_params, mesh):
    """The sampler decodes through paged attention; the trainer scores whole sequences. They agree to 1e-4."""
    options = dataclasses.replace(OPTIONS, temperature=0.8)
    rollout = roll(tiny_config, tiny_params, options, mesh)
    device_mesh = mesh_of(*mesh)
    spec = make_update_spec(tiny_config, device_mesh, temperature=0.8)
    batch = Batch(rollout.tokens, rollout.lengths, np.zeros(24, np.float32))
    packed = put_batch(device_mesh, pack(PackingSpec(device_mesh.size, 2, 32, 24, group=4), some_prompts(), batch))
    scored = batch_logprobs(spec, jax.tree.map(jnp.asarray, tiny_params), packed)
    mask = np.arange(24) < rollout.lengths[:, None]
    difference = np.abs(restore_order(packed, np.asarray(scored), 24) - rollout.logprobs)[mask]
    assert difference.max() < 1e-4 and mask.sum() > 100


def test_greedy_equals_repeated_full_forward(tiny_config, tiny_params):
    """Decoding token by token picks what recomputing the whole sequence would."""
    options = dataclasses.replace(OPTIONS, temperature=0.0)
    rollout = roll(tiny_config, tiny_params, options, group=2, stops=(263,))
    for row, prompt in enumerate(some_prompts()):
        np.testing.assert_array_equal(rollout.tokens[2 * row], rollout.tokens[2 * row + 1])
        logits = forward(tiny_config, tiny_params, [prompt + rollout.tokens[2 * row].tolist()])
        best = np.asarray(logits[0, :, :REAL].argmax(axis=-1))
        np.testing.assert_array_equal(best[len(prompt) - 1 : -1], rollout.tokens[2 * row])


def test_a_repetition_penalty_sees_prompt_and_completion(tiny_config, tiny_params):
    """Greedily, in slots that are handed on, against whole sequences penalised token by token."""
    options = dataclasses.replace(OPTIONS, temperature=0.0, repetition_penalty=1.7, slots="3")
    rollout = roll(tiny_config, tiny_params, options, group=1, stops=(263,))
    sequences = np.zeros((6, 54), np.int32)
    for row, prompt in enumerate(some_prompts()):
        sequences[row, : len(prompt) + 24] = [*prompt, *rollout.tokens[row]]
    logits, changed = np.array(forward(tiny_config, tiny_params, sequences)[:, :, :REAL]), 0
    for row, prompt in enumerate(some_prompts()):
        for at in range(len(prompt) - 1, len(prompt) + 23):
            own, seen = logits[row, at].copy(), np.unique(sequences[row, : at + 1])
            own[seen] = np.where(own[seen] < 0, own[seen] * 1.7, own[seen] / 1.7)
            assert own.argmax() == sequences[row, at + 1]
            changed += own.argmax() != logits[row, at].argmax()
    assert changed > 10


@pytest.mark.parametrize(("devices", "group"), [(8, 8), (2, 3)])
def test_groups_split_over_devices_or_prompts_are_added(tiny_config, devices, group):
    spec = make_generator(tiny_config, OPTIONS, (devices, 1), prompt_tokens=4).spec
    if devices == 8:
        prompts, _, each = deal_prompts(spec, [[1], [2, 3]], [40, 41], group)
        assert each == 2 and prompts.lengths.tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
        assert prompts.uids.tolist() == [40] * 4 + [41] * 4 and prompts.first_member.tolist() == [0, 2, 4, 6] * 2
    else:
        prompts, _, each = deal_prompts(spec, [[1], [2, 3], [4]], [0, 1, 2], group)
        assert each == 3 and prompts.lengths.tolist() == [1, 2, 1, 0]


def test_the_batch_shrinks_in_the_tail():
    assert batch_sizes(64, 4) == [64, 16, 4] and batch_sizes(3, 4) == [3] and batch_sizes(10, 4) == [10, 4]
    assert batch_sizes(8, 4) == [8] and batch_sizes(32, 4) == [32, 8] and batch_sizes(18, 4) == [18, 5]
    assert batch_sizes(64, 64) == [64] and batch_sizes(200, 64) == [200, 64]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"top_k": 7, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}])
def test_no_dtype_of_a_rollout_is_promoted_by_chance(tiny_config, tiny_params, dtype, changes):
    options = dataclasses.replace(OPTIONS, **changes)
    spec = make_generator(tiny_config, options, (2, 1), STOPS, dtype=dtype).spec
    batch, rows, group = deal_prompts(spec, some_prompts(), list(range(6)), 4)
    start = generator_module.no_start(spec, len(batch.lengths) * group)
    with jax.numpy_dtype_promotion("strict"):
        weights = jax.eval_shape(functools.partial(decode_weights, spec.layout), tiny_params)
        jax.eval_shape(functools.partial(run_mesh, spec), weights, batch, rows, start, np.zeros(2, np.int32))
