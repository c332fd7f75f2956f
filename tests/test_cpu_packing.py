"""Sequences that share rows: the layout, attention within segments, and the same log-probs and update as without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, place
from test_cpu_grpo import assert_close, host_batch, make_trainer

from minigrpo import grpo
from minigrpo.attention import attend_sequence, splash_attention
from minigrpo.config import LossOptions
from minigrpo.optimizer import init_state
from minigrpo.packing import MOST_IN_A_ROW, pack, place_batch, rows_per_part


def random_batch(seed, rows, limits=(24, 40)):
    """Sequences of all sizes, a few of them without a completion."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(1 / rng.integers(2, 30), rows), limits[1])
    lengths[rng.random(rows) < 0.1] = 0
    lengths[0] = max(1, lengths[0])
    prompts = [rng.integers(1, 200, rng.integers(1, limits[0] + 1)).tolist() for _ in range(rows)]
    return grpo.assemble(prompts, rng.integers(1, 200, (rows, limits[1])).astype(np.int32), lengths, limits)


def unpack(batch, devices, parts):
    """The packed sequences as (tokens, completion), read back slowly; asserts that padding is nothing."""
    packed, most = batch.packed, batch.completions.shape[1]
    rows, slots = len(batch.tokens) // (devices * parts), len(batch.completion_lengths) // (devices * parts)
    found = []
    for slot, length in enumerate(batch.completion_lengths):
        if length:
            row, start = divmod(int(packed.starts[slot]), most)
            row += slot // slots * rows
            last = packed.scored[row, start : start + length]
            segment = packed.segments[row, last[0]]
            assert segment > 0
            own = np.flatnonzero(packed.segments[row] == segment)
            np.testing.assert_array_equal(own, np.arange(own[0], own[0] + len(own)))
            np.testing.assert_array_equal(packed.positions[row, own], np.arange(len(own)))
            np.testing.assert_array_equal(last, own[-length - 1 : -1])
            np.testing.assert_array_equal(batch.tokens[row, last + 1], packed.targets[row, start : start + length])
            np.testing.assert_array_equal(packed.targets[row, start : start + length], batch.completions[slot, :length])
            assert len(own) == batch.prompt_lengths[slot] + length
            found.append(tuple(batch.tokens[row, own].tolist()) + (int(length),))
    return sorted(found)


@pytest.mark.parametrize("devices,parts", [(1, 1), (1, 4), (4, 1), (2, 3), (8, 2)])
@pytest.mark.parametrize("seed", range(6))
def test_every_sequence_is_laid_out_once(devices, parts, seed):
    rows = [8, 13, 32, 64, 100, 5][seed]
    batch = random_batch(seed, rows)
    packed = pack(batch, devices, parts)
    want = [
        tuple(batch.tokens[i, : batch.prompt_lengths[i] + length].tolist()) + (int(length),)
        for i, length in enumerate(batch.completion_lengths)
        if length
    ]
    assert unpack(packed, devices, parts) == sorted(want)
    assert max(packed.packed.segments.max(axis=1)) <= MOST_IN_A_ROW
    assert len(packed.tokens) <= -(-rows // (devices * parts)) * devices * parts


def test_short_sequences_take_fewer_rows_and_long_ones_no_more():
    short = grpo.assemble([[1, 2]] * 64, np.full((64, 40), 3, np.int32), np.array([40] + [6] * 63), (24, 40))
    packed = pack(short, 1, 1)
    assert len(packed.tokens) == 16  # 63 in rows of 64 tokens, 40 of them completions: six a row, and one by itself
    full = grpo.assemble([[1] * 24] * 64, np.full((64, 40), 3, np.int32), np.full(64, 40), (24, 40))
    assert pack(full, 8, 2).tokens.shape == full.tokens.shape
    lengths = pack(short, 2, 4).completion_lengths.reshape(2, 4, -1)
    assert (lengths[:, :1] > 0).any() and not (lengths[:, 1:] > 0).any(axis=(0, 2)).all()


def test_a_batch_without_completions_has_nothing_to_compute():
    batch = grpo.assemble([[1, 2], [3]], np.zeros((2, 40), np.int32), np.array([0, 0]), (24, 40))
    packed = pack(batch, 2, 2)
    assert not packed.packed.segments.any() and not packed.completion_lengths.any()


def test_parts_are_few_and_rows_too():
    assert [rows_per_part(rows, 16, 16) for rows in (1, 9, 16, 17, 33)] == [1, 4, 16, 4, 8]
    assert rows_per_part(33, 64, 1) == 64 and rows_per_part(30, 64, 1) == 32


def test_attention_stays_within_segments():
    rng = np.random.default_rng(0)
    sizes = (70, 200, 37)
    q, k, v = (jnp.asarray(rng.normal(size=(320, heads, 16)), jnp.float32) for heads in (4, 2, 2))
    segments = jnp.asarray(np.repeat([1, 2, 3, 0], (*sizes, 320 - sum(sizes))))
    got = attend_sequence(q, k, v, segments)
    start = 0
    for size in sizes:
        own = slice(start, start + size)
        np.testing.assert_allclose(got[own], attend_sequence(q[own], k[own], v[own]), atol=2e-6)
        start += size
    kv = (jnp.repeat(x, 2, axis=1)[None] for x in (k, v))
    kernel = splash_attention(q[None], *kv, segments[None], interpret=True)[0]
    np.testing.assert_allclose(kernel[:start], got[:start], atol=2e-5)


LOSSES = {
    "grpo": LossOptions(loss_type="grpo"),
    "gspo": LossOptions(importance_sampling_level="sequence", beta=0.05),
    "left_out": LossOptions(mask_truncated_completions=True),
}


@pytest.mark.parametrize(
    "mesh,parts,loss",
    [((1, 1), 1, "gspo"), ((1, 1), 2, "grpo"), ((1, 1), 4, "left_out"), ((2, 1), 2, "gspo"), ((4, 2), 1, "grpo")],
)
def test_packing_gives_the_same_update(tiny_config, tiny_params, mesh, parts, loss):
    batch, device_mesh = host_batch(old=True, ref=True), mesh_of(*mesh)
    if loss == "left_out":
        batch = dataclasses.replace(batch, left_out=np.arange(8) % 3 == 0)
    trainer = make_trainer(tiny_config, device_mesh, parts=parts, loss=LOSSES[loss])
    results = []
    for packing in (False, True):
        placed = place_batch(device_mesh, batch, parts, packing)
        state = init_state(trainer.optimizer, jax.tree.map(jnp.copy, place(tiny_params, device_mesh)), device_mesh)
        new, metrics = grpo.update(trainer, state, placed, {})
        grads = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), tiny_params, new.params)
        results.append((grads, {name: float(value) for name, value in metrics.items()}))
    assert_close(results[1][0], results[0][0], 1e-5)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("mesh,parts", [((1, 1), 2), ((4, 2), 1)])
def test_packed_logprobs_are_those_of_the_sequences_by_themselves(tiny_config, tiny_params, mesh, parts):
    batch, device_mesh = host_batch(), mesh_of(*mesh)
    trainer, params = make_trainer(tiny_config, device_mesh, parts=parts), place(tiny_params, device_mesh)
    found = []
    for packing in (False, True):
        placed = place_batch(device_mesh, batch, parts, packing)
        logprobs = np.asarray(grpo.batch_logprobs(trainer, params, placed))
        lengths, names = np.asarray(placed.completion_lengths), np.asarray(placed.advantages)
        found.append({float(names[row]): logprobs[row, : lengths[row]] for row in np.flatnonzero(lengths)})
    assert set(found[0]) == set(found[1]) and len(found[0]) == 8
    for name, logprobs in found[0].items():
        np.testing.assert_allclose(found[1][name], logprobs, rtol=1e-5)
