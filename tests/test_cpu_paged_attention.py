"""Paged attention against a float64 oracle, with poison wherever nothing may be read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from minigrpo.kernels import reference
from minigrpo.kernels.backend import backend_for
from minigrpo.kernels.paged_attention import cpu, gpu, tpu, xla

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


def split_rows(rows, dim):
    """Keys and values [..., K, H] of token rows k0 v0 k1 v1 ..."""
    pairs = rows.reshape(*rows.shape[:-1], -1, 2, dim)
    return pairs[..., 0, :], pairs[..., 1, :]


def lay_out(cache, pages, dim):
    """The same pages in a cache's own layout."""
    layers, count, page_size, width = pages.shape
    own = cache.empty_pages(layers, count, page_size, width // (2 * dim), dim, pages.dtype)
    for layer in range(layers):
        own = cache.fill_pages(own, jnp.int32(layer), jnp.arange(count)[:, None], *split_rows(pages[layer], dim))
    return own


def cache_here(page_size, dim, dtype):
    return backend_for(jax.devices()[0]).paged_cache(page_size, dim, dtype)


def attend_here(q, pages, *rest):
    """On this machine, with the same pages laid out for it."""
    cache = cache_here(pages.shape[2], q.shape[2], pages.dtype)
    return cache.paged_attention(q, lay_out(cache, pages, q.shape[2]), *rest)


def attend_xla(q, pages, *rest):
    """In plain XLA, whatever the size of the heads."""
    return xla.CACHE.paged_attention(q, lay_out(xla.CACHE, pages, q.shape[2]), *rest)


def attend_pallas(q, pages, *rest):
    return tpu.tuned_attention(q, pages, *rest, block_of_two_pages(pages), interpret=True)


def attend_emulated(q, pages, *rest):
    return tpu.tuned_attention(q, pages, *rest, block_of_two_pages(pages), interpret=pltpu.InterpretParams())


def attend_hopper(q, pages, *rest):
    """The GPU kernel, emulated."""
    own = lay_out(gpu.CACHE, pages, q.shape[2])
    return gpu.tuned_attention(q, own, *rest, gpu.Tuning(), interpret=plgpu.InterpretGPUParams())


def check(attend, heads, kv_heads, dim, page_size, dtype, extra=()):
    rng = np.random.default_rng(heads * page_size)
    lengths = [1, page_size - 1, page_size, page_size + 1, 0, 5 * page_size + 3, *extra]
    q, pages, layer, lengths, table = make_case(rng, lengths, heads, kv_heads, dim, page_size, dtype)
    got = attend(q, pages, jnp.int32(layer), jnp.asarray(lengths), jnp.asarray(table))
    want = reference.paged_attention(q.astype(np.float32), pages.astype(np.float32), layer, lengths, table)
    assert got.dtype == q.dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 8, 128), (14, 2, 64), (12, 2, 128)])
@pytest.mark.parametrize("page_size", [8, 24, 128])
def test_xla_equals_oracle(dtype, heads, kv_heads, dim, page_size):
    check(attend_here, heads, kv_heads, dim, page_size, dtype, extra=(131,))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 32), (4, 2, 16), (6, 2, 20)])
@pytest.mark.parametrize("page_size", [4, 24, 64])
def test_small_heads_on_the_cpu_equal_oracle(dtype, heads, kv_heads, dim, page_size):
    check(attend_here, heads, kv_heads, dim, page_size, dtype, extra=(131,))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page_size"), [(16, 8, 128, 64), (14, 2, 64, 8), (12, 2, 128, 16), (4, 2, 128, 16)]
)
@pytest.mark.parametrize("attend", [attend_pallas, attend_emulated])
def test_the_tpu_kernel_equals_oracle(attend, heads, kv_heads, dim, page_size, dtype):
    check(attend, heads, kv_heads, dim, page_size, dtype)


emulated_hopper = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="jax before 0.11 has no emulation of the GPU kernel"
)


@emulated_hopper
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page_size"),
    [(16, 8, 128, 64), (14, 2, 64, 8), (12, 2, 128, 16), (18, 2, 64, 32), (4, 2, 128, 128)],
)
def test_the_gpu_kernel_equals_oracle(heads, kv_heads, dim, page_size):
    check(attend_hopper, heads, kv_heads, dim, page_size, jnp.bfloat16, extra=(131,))


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
def test_a_fault_in_the_kernel_is_seen(fault, monkeypatch, traced_anew):
    """The check above fails when the kernel is broken: in emulation, a copy not waited for has not arrived."""
    monkeypatch.setattr(tpu, *FAULTS[fault])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(attend_emulated, 4, 2, 128, 16, np.float32)


original_block = gpu.attend_block

HOPPER_FAULTS = {
    "no zero-fill": ("zero_past", lambda *args: None),
    "length off by one": (
        "attend_block",
        lambda walk, *rest: original_block(dataclasses.replace(walk, length=walk.length - 1), *rest),
    ),
    "wrong scale": ("LOG2E", 1.05 * gpu.LOG2E),
    "wrong page": ("page_of", lambda walk, first: walk.table[walk.row, 0]),
}


@emulated_hopper
@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", HOPPER_FAULTS)
def test_a_fault_in_the_gpu_kernel_is_seen(fault, monkeypatch, traced_anew):
    monkeypatch.setattr(gpu, *HOPPER_FAULTS[fault])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(attend_hopper, 4, 2, 128, 16, jnp.bfloat16)


@pytest.mark.parametrize("page_size", [2, 4, 16, 48, 64, 256])
@pytest.mark.parametrize("dim", [16, 64])
def test_plain_xla_equals_oracle_with_heads_of_any_size(page_size, dim):
    """In pages of several pieces, and with several pages in a block."""
    check(attend_xla, 4, 2, dim, page_size, np.float32, extra=(131,))


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (8, 4, 32), (4, 4, 32)])
@pytest.mark.parametrize("page_size", [4, 8, 16, 24, 64, 128])
def test_small_heads_are_read_where_they_lie(heads, kv_heads, dim, page_size):
    """No copy of the pool, nor of the keys: less is allocated than the keys that one turn reads."""
    cache, lengths = cache_here(page_size, dim, jnp.float32), jax.ShapeDtypeStruct((16,), jnp.int32)
    pages = jax.eval_shape(lambda: cache.empty_pages(2, 8192 // page_size, page_size, kv_heads, dim, jnp.float32))
    table = jax.ShapeDtypeStruct((16, 192 // page_size), jnp.int32)
    attend, q = jax.jit(cache.paged_attention), jax.ShapeDtypeStruct((16, heads, dim), jnp.float32)
    scratch = attend.lower(q, pages, jnp.int32(1), lengths, table).compile().memory_analysis().temp_size_in_bytes
    assert cache is cpu.CACHE and scratch < 4 * 16 * cpu.BLOCK_TOKENS * kv_heads * dim


def test_large_heads_are_gathered_on_the_cpu():
    assert cache_here(16, 64, jnp.float32) is xla.CACHE and cache_here(16, 32, jnp.bfloat16) is cpu.CACHE


@pytest.mark.parametrize("dim", [16, 64])
def test_large_scores_do_not_overflow(dim):
    rng = np.random.default_rng(0)
    q, pages, layer, lengths, table = make_case(rng, [40], 4, 2, dim, 8, np.float32)
    got = attend_here(300 * q, pages, jnp.int32(layer), jnp.asarray(lengths), jnp.asarray(table))
    want = reference.paged_attention(300 * np.asarray(q), pages, layer, lengths, table)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_tpu_page_holds_token_rows_of_key_and_value_pairs():
    pages = jnp.zeros((2, 3, *tpu.page_shape(4, 2, 4)))
    k, v = np.arange(16.0).reshape(2, 2, 4), -np.arange(16.0).reshape(2, 2, 4)
    out = tpu.append_rows(pages, jnp.int32(1), jnp.array([2, 3]), jnp.array([1, 0]), jnp.asarray(k), jnp.asarray(v))
    want = np.zeros((2, 3, 4, 16))
    want[1, 2, 1] = np.concatenate([k[0, 0], v[0, 0], k[0, 1], v[0, 1]])
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("path", [cpu, gpu, tpu, xla])
@pytest.mark.parametrize("page_size", [8, 24])
@pytest.mark.parametrize("dim", [4, 20])
def test_appending_tokens_and_filling_pages_are_the_same(path, page_size, dim):
    """And neither writes anything where there is no page, or in another layer."""
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(2, 2 * page_size, 2, dim)), jnp.float32) for _ in "kv")
    table = jnp.array([[3, 5], [0, 2]])  # of pages 0 to 4
    empty = jnp.zeros((2, 5, *path.page_shape(page_size, 2, dim)))
    filled = path.fill_pages(empty, jnp.int32(1), table, k, v)

    def append(pages, token):
        page = table[:, token // page_size]
        return path.append_rows(pages, jnp.int32(1), page, jnp.full(2, token % page_size), k[:, token], v[:, token])

    appended = functools.reduce(append, range(2 * page_size), empty)
    np.testing.assert_array_equal(appended, filled)
    written = np.concatenate([np.concatenate([x[0, :page_size], *x[1:]]).ravel() for x in (k, v)])
    np.testing.assert_array_equal(np.sort(filled[1, jnp.array([3, 0, 2])].ravel()), np.sort(written))
    assert not np.asarray(filled[0]).any() and not np.asarray(filled[1, jnp.array([1, 4])]).any()


def test_more_queries_than_the_gpu_kernel_takes_are_refused():
    pages = jnp.zeros((1, 1, *gpu.page_shape(64, 1, 64)), jnp.bfloat16)
    q, one = jnp.zeros((1, 65, 64), jnp.bfloat16), jnp.ones(1, jnp.int32)
    with pytest.raises(ValueError, match="65 query heads for 1 kv heads: at most 64 for each"):
        gpu.CACHE.paged_attention(q, pages, jnp.int32(0), one, jnp.zeros((1, 1), jnp.int32))


CACHES = {"cpu": cpu.CACHE, "gpu": gpu.CACHE, "tpu": tpu.cache(tpu.Tuning()), "xla": xla.CACHE}


@pytest.mark.parametrize("name", CACHES)
def test_pages_of_other_heads_are_refused(name):
    """Both those whose size is no whole number of heads, and those of as many as the queries cannot share."""
    assert tpu.kv_heads(jnp.zeros((1, 1, 4, 24)), 16) == xla.kv_heads(jnp.zeros((1, 1, 2, 2, 24)), 16) == 0
    assert gpu.kv_heads(jnp.zeros((1, 1, 2, 2, 4, 24)), 16) == 0
    cache, one, table = CACHES[name], jnp.ones(1, jnp.int32), jnp.zeros((1, 1), jnp.int32)
    for kv_heads, dim in ((3, 16), (2, 24)):
        pages = cache.empty_pages(1, 1, 4, kv_heads, dim, jnp.float32)
        with pytest.raises(ValueError, match="do not hold kv heads that 4 query heads of 16 can share"):
            cache.paged_attention(jnp.zeros((1, 4, 16)), pages, jnp.int32(0), one, table)
