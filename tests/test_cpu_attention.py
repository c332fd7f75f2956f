"""Causal attention for training, every path against a float64 oracle: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigrpo.kernels.causal_attention import gpu, tpu, xla


def oracle(q, k, v):
    """Softmax attention of one query and head at a time."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        scores = k[b, : t + 1, n // group] @ q[b, t, n] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, : t + 1, n // group] / weights.sum()
    return out


def oracle_gradients(q, k, v, cotangent):
    """The same, differentiated by hand."""
    grads = [np.zeros(x.shape) for x in (q, k, v)]
    group, scale = q.shape[2] // k.shape[2], 1 / np.sqrt(q.shape[3])
    for b, t, n in np.ndindex(q.shape[:3]):
        keys, values, g = k[b, : t + 1, n // group], v[b, : t + 1, n // group], cotangent[b, t, n]
        scores = keys @ q[b, t, n] * scale
        probs = np.exp(scores - scores.max())
        probs /= probs.sum()
        into_scores = probs * (values @ g - probs @ (values @ g)) * scale
        grads[0][b, t, n] = into_scores @ keys
        grads[1][b, : t + 1, n // group] += np.outer(into_scores, q[b, t, n])
        grads[2][b, : t + 1, n // group] += np.outer(probs, g)
    return grads


PATHS = {"xla": xla.attend, "gpu in float32": gpu.attend, "tpu": functools.partial(tpu.attend, interpret=True)}


@pytest.mark.parametrize(("length", "heads", "kv_heads", "dim"), [(128, 4, 2, 64), (100, 6, 2, 32), (300, 2, 1, 16)])
@pytest.mark.parametrize("path", PATHS)
def test_attention_and_its_gradients(path, length, heads, kv_heads, dim):
    rng = np.random.default_rng(length)
    shapes = (2, length, heads, dim), (2, length, kv_heads, dim), (2, length, kv_heads, dim)
    q, k, v = (rng.normal(size=shape) for shape in shapes)
    cotangent = rng.normal(size=shapes[0])
    arguments = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    got, pull = jax.vjp(PATHS[path], *arguments)
    np.testing.assert_allclose(got, oracle(q, k, v), atol=2e-5)
    for ours, want in zip(pull(jnp.asarray(cotangent, jnp.float32)), oracle_gradients(q, k, v, cotangent), strict=True):
        np.testing.assert_allclose(ours, want, atol=1e-4)


@pytest.mark.parametrize("length", [200, 300])
def test_no_scores_are_kept_for_the_backward_pass(length):
    """Of one block of queries or of two."""
    q, k, v = (jax.random.normal(jax.random.key(heads), (length, heads, 16)) for heads in (4, 2, 2))
    kept = jax.tree.leaves(jax.vjp(xla.attend_sequence, q, k, v)[1])
    assert max(leaf.size for leaf in kept) < length * length


def scan_results(jaxpr):
    """Sizes of what the loops in a program return, those in others too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield from (var.aval.size for var in eqn.outvars)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from scan_results(inner)


def test_masks_are_not_made_for_all_rows_before_the_layers():
    """Four layers attend to eight rows, differentiated and rematerialised as in an update."""
    rows, length = 8, 96
    q = jax.random.normal(jax.random.key(0), (rows, length, 2, 4))
    segments = jnp.ones((rows, length), jnp.int32)

    @jax.checkpoint
    def layer(x, _):
        return xla.attend(x, x, x, segments), None

    program = jax.make_jaxpr(jax.grad(lambda q: jax.lax.scan(layer, q, length=4)[0].sum()))(q)
    sizes = list(scan_results(program.jaxpr))
    assert q.size in sizes and max(sizes) < rows * length * length


def test_half_precision_keeps_its_dtype_and_its_digits():
    q, k, v = (jax.random.normal(jax.random.key(heads), (40, heads, 16)) for heads in (4, 2, 2))
    short = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    want, wanted_grads = jax.vjp(xla.attend_sequence, *[x.astype(jnp.float32) for x in short])
    got, grads = jax.vjp(xla.attend_sequence, *short)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.02)
    cotangent = jnp.cos(want)
    pairs = zip(grads(cotangent.astype(jnp.bfloat16)), wanted_grads(cotangent), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=0.02 * float(jnp.abs(theirs).max()))


def scan_lengths(jaxpr):
    """Turns of the outermost loops of a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn.params["length"]
        else:
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from scan_lengths(inner)


@pytest.mark.parametrize(("count", "together"), [(5, 2), (6, 2), (4, 2), (7, 3), (3, 1), (6, 6)])
def test_few_rows_at_a_time(monkeypatch, count, together):
    """Values and gradients, with rows left over for the last turn and without."""
    rng = np.random.default_rng(count)
    q, k, v = (rng.normal(size=(count, 9, heads, 8)) for heads in (4, 2, 2))
    monkeypatch.setattr(xla, "SCORE_BYTES", (together + 1) * 4 * 4 * 9 * 9 - 1)  # not quite one row more
    arguments = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    turns = [] if together == count else [count // together]
    assert list(scan_lengths(jax.make_jaxpr(lambda *x: xla.attend(*x))(*arguments).jaxpr)) == turns
    got, pull = jax.vjp(xla.attend, *arguments)
    np.testing.assert_allclose(got, oracle(q, k, v), atol=2e-5)
    for ours, want in zip(pull(got), oracle_gradients(q, k, v, np.asarray(got, float)), strict=True):
        np.testing.assert_allclose(ours, want, atol=1e-4)


@pytest.mark.parametrize(("length", "turns"), [(40, []), (1000, [1, 4]), (4000, [6])])
def test_scores_of_a_block_of_queries_count(length, turns):
    """A row's are 4 heads x min(length, 256) queries x length keys x 4 bytes, in 16 MiB.

    All rows fit, or four of them and then the other two in four blocks of queries, or one.
    """
    shapes = [jax.ShapeDtypeStruct((6, length, heads, 8), jnp.float32) for heads in (4, 2, 2)]
    assert list(scan_lengths(jax.make_jaxpr(xla.attend)(*shapes).jaxpr)) == turns


@pytest.mark.parametrize("path", PATHS)
def test_attention_stays_within_segments(path):
    """Rows of several sequences, one of them longer than a block of queries, and padding: values and gradients."""
    rng, sizes = np.random.default_rng(0), ((70, 280, 37), (1, 2, 380))
    shapes = (2, 400, 4, 16), (2, 400, 2, 16), (2, 400, 2, 16)
    q, k, v = (rng.normal(size=shape) for shape in shapes)
    cotangent = rng.normal(size=shapes[0])
    segments = np.stack([np.repeat([1, 2, 3, 0], (*row, 400 - sum(row))) for row in sizes]).astype(np.int32)
    cotangent[segments == 0] = 0
    arguments = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    got, pull = jax.vjp(lambda *x: PATHS[path](*x, jnp.asarray(segments)), *arguments)
    grads = pull(jnp.asarray(cotangent, jnp.float32))
    for row, segment in np.ndindex(2, 3):
        own = slice(row, row + 1), segments[row] == segment + 1
        parts = [x[own[0]][:, own[1]] for x in (q, k, v, cotangent)]
        np.testing.assert_allclose(got[own[0]][:, own[1]], oracle(*parts[:3]), atol=2e-5)
        for ours, want in zip(grads, oracle_gradients(*parts), strict=True):
            np.testing.assert_allclose(ours[own[0]][:, own[1]], want, atol=1e-4)
