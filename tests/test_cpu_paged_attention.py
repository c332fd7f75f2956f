"""Paged attention against a float64 oracle, with poison wherever nothing may be read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from minigrpo.kernels import reference
from minigrpo.kernels.paged_attention import append_rows, paged_attention, tpu

TOLERANCE = {np.float32: 2e-6, jnp.bfloat16: 1e-2}


def make_case(rng, lengths, heads, kv_heads, dim, page_size, dtype, layers=2, layer=1):
    """Random pages in random order; NaN in every slot past a length and in every unused page; absurd unused entries."""
    entries = -(-max(*lengths, 1) // page_size) + 2
    num_pages = len(lengths) * entries + 3
    pages = np.full((layers, num_pages, page_size, 2 * kv_heads * dim), np.nan, np.float32)
    table = rng.choice(np.array([-7, num_pages + 5, 2**30], np.int32), (len(lengths), entries))
    order = iter(rng.permutation(num_pages))
    for row, length in enumerate(lengths):
        for entry in range(-(-length // page_size)):
            table[row, entry] = next(order)
            used = min(page_size, length - entry * page_size)
            pages[layer, table[row, entry], :used] = rng.normal(size=(used, pages.shape[-1]))
    q = rng.normal(size=(len(lengths), heads, dim)).astype(np.float32)
    return jnp.asarray(q, dtype), jnp.asarray(pages, dtype), layer, np.array(lengths, np.int32), table


def block_of_two_pages(pages):
    """A tuning that makes the kernel walk several blocks through a ring of three buffers."""
    return tpu.Tuning(block_bytes=2 * pages[0, 0].nbytes, buffers=3)


def attend_xla(q, pages, *rest):
    return paged_attention(jax.devices()[0], q, pages, *rest)


def attend_pallas(q, pages, *rest):
    return tpu.paged_attention(q, pages, *rest, block_of_two_pages(pages), interpret=True)


def attend_emulated(q, pages, *rest):
    return tpu.paged_attention(q, pages, *rest, block_of_two_pages(pages), interpret=pltpu.InterpretParams())


def check(attend, heads, kv_heads, dim, page_size, dtype, extra=()):
    rng = np.random.default_rng(heads * page_size)
    lengths = [1, page_size - 1, page_size, page_size + 1, 0, 5 * page_size + 3, *extra]
    q, pages, layer, lengths, table = make_case(rng, lengths, heads, kv_heads, dim, page_size, dtype)
    got = attend(q, pages, jnp.int32(layer), jnp.asarray(lengths), jnp.asarray(table))
    want = reference.paged_attention(q.astype(np.float32), pages.astype(np.float32), layer, lengths, table)
    assert got.dtype == q.dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 8, 128), (14, 2, 64), (12, 2, 128), (4, 4, 32)])
@pytest.mark.parametrize("page_size", [8, 16, 64])
def test_xla_equals_oracle(dtype, heads, kv_heads, dim, page_size):
    check(attend_xla, heads, kv_heads, dim, page_size, dtype, extra=(131,))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page_size"), [(16, 8, 128, 64), (14, 2, 64, 8), (12, 2, 128, 16), (4, 2, 128, 16)]
)
@pytest.mark.parametrize("attend", [attend_pallas, attend_emulated])
def test_the_tpu_kernel_equals_oracle(attend, heads, kv_heads, dim, page_size, dtype):
    check(attend, heads, kv_heads, dim, page_size, dtype)


def without_waits(shape, refs, sequence, block, slot, do):
    return original_copies(shape, refs, sequence, block, slot, lambda copy: copy.start() if do is tpu.start else None)


original_copies, original_attend = tpu.page_copies, tpu.attend_block

FAULTS = {
    "no wait": ("page_copies", without_waits),
    "wrong slot": ("next_slot", lambda shape, slot: slot),
    "no zero-fill": ("fill_with_zeros", lambda *args: None),
    "length off by one": (
        "attend_block",
        lambda shape, refs, q, slot, valid, state: original_attend(shape, refs, q, slot, valid - 1, state),
    ),
    "wrong scale": (
        "attend_block",
        lambda shape, refs, q, *rest: original_attend(shape, refs, q * 1.05, *rest),
    ),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernel_is_seen(fault, monkeypatch):
    """The check above fails when the kernel is broken: in emulation, a copy not waited for has not arrived."""
    monkeypatch.setattr(tpu, *FAULTS[fault])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(attend_emulated, 4, 2, 128, 16, np.float32)


def test_large_scores_do_not_overflow():
    rng = np.random.default_rng(0)
    q, pages, layer, lengths, table = make_case(rng, [40], 4, 2, 16, 8, np.float32)
    got = attend_xla(300 * q, pages, jnp.int32(layer), jnp.asarray(lengths), jnp.asarray(table))
    want = reference.paged_attention(300 * np.asarray(q), pages, layer, lengths, table)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_append_writes_one_row_and_drops_rows_without_a_page():
    pages = jnp.zeros((2, 3, 4, 16))
    k, v = np.arange(16.0).reshape(2, 2, 4), -np.arange(16.0).reshape(2, 2, 4)
    out = append_rows(pages, jnp.int32(1), jnp.array([2, 3]), jnp.array([1, 0]), jnp.asarray(k), jnp.asarray(v))
    want = np.zeros(pages.shape)
    want[1, 2, 1] = np.concatenate([k[0, 0], v[0, 0], k[0, 1], v[0, 1]])
    np.testing.assert_array_equal(out, want)


def test_mismatched_width_is_refused():
    with pytest.raises(ValueError, match="width 24 do not hold kv heads"):
        attend_xla(
            jnp.zeros((1, 4, 16)),
            jnp.zeros((1, 1, 4, 24)),
            jnp.int32(0),
            jnp.ones(1, jnp.int32),
            jnp.zeros((1, 1), jnp.int32),
        )
