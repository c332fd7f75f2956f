"""Chunked log-probs and their gradients against an unchunked float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of

from minigrpo.grpo.logprobs import LMHead, logprobs_after, token_logprobs
from minigrpo.kernels.backend import HeadTiles

ROWS, DIM, VOCAB, REAL = 48, 16, 88, 83


def oracle(hidden, weights, targets, temperature, cotangent):
    """Log-probs, entropy and gradients of sum(cotangent * logprob), written out in float64."""
    h, w = hidden.astype(np.float64), weights.astype(np.float64)
    logits = (h @ w.T / temperature)[:, :REAL]
    logits -= logits.max(axis=1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    probs = np.exp(logprobs)
    grad_logits = np.zeros((ROWS, VOCAB))
    grad_logits[:, :REAL] = -cotangent[:, None] * probs / temperature
    grad_logits[np.arange(ROWS), targets] += cotangent / temperature
    picked = logprobs[np.arange(ROWS), targets]
    return picked, -(probs * logprobs).sum(axis=1), grad_logits @ w, grad_logits.T @ h


@pytest.mark.parametrize("mesh", [(1, 1), (4, 2), (2, 4), (8, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(
    "tiles",
    [
        HeadTiles(),
        HeadTiles(5, 7, 3),
        HeadTiles(6, 11, 4),
        HeadTiles(1, 3, 1),
        HeadTiles(48, 88, 48),
        HeadTiles(7, 87, 47),
    ],
)
def test_equals_oracle(mesh, tiles):
    rng = np.random.default_rng(3)
    hidden, weights = (
        rng.normal(size=(ROWS, DIM)),
        rng.normal(size=(VOCAB, DIM)) / 2,
    )  # logits as far apart as a model's
    hidden, weights = hidden.astype(np.float32), weights.astype(np.float32)
    hidden, weights = jnp.asarray(hidden), jnp.asarray(weights)
    targets, cotangent = rng.integers(0, REAL, ROWS), rng.normal(size=ROWS).astype(np.float32)
    targets[:8] = 0, 21, 22, 43, 44, 65, 66, REAL - 1  # the first and the last that a device holds
    head = LMHead(mesh_of(*mesh), REAL, 0.8, tiles)

    def total(hidden, weights):
        logprobs, entropy = token_logprobs(head, hidden, weights, jnp.asarray(targets, jnp.int32))
        return (logprobs * cotangent).sum(), (logprobs, entropy)

    grads, (logprobs, entropy) = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(hidden, weights)
    wanted = oracle(np.asarray(hidden), np.asarray(weights), targets, 0.8, cotangent)
    for got, want in zip((logprobs, entropy, *grads), wanted, strict=True):
        assert np.abs(np.asarray(got) - want).max() <= 1e-6 * np.abs(want).max()


@pytest.mark.parametrize("tiles", [HeadTiles(), HeadTiles(7, 11, 5)])
def test_bfloat16(tiles):
    """Matmuls of bfloat16 are not all there on the CPU; those that the passes need are, in one chunk and in several."""
    rng = np.random.default_rng(4)
    hidden, weights = (jnp.asarray(rng.normal(size=(size, DIM)), jnp.bfloat16) for size in (ROWS, VOCAB))
    targets, head = rng.integers(0, REAL, ROWS), LMHead(mesh_of(1, 1), REAL, 1.0, tiles)

    def total(hidden, weights):
        return token_logprobs(head, hidden, weights, jnp.asarray(targets, jnp.int32))[0].sum()

    grads = jax.jit(jax.grad(total, argnums=(0, 1)))(hidden, weights)
    exact = [np.asarray(x.astype(jnp.float32)) for x in (hidden, weights)]
    for got, want in zip(grads, oracle(*exact, targets, 1.0, np.ones(ROWS))[2:], strict=True):
        assert np.abs(np.asarray(got.astype(jnp.float32)) - want).max() <= 1e-2 * np.abs(want).max()


def test_padding_rows_get_no_probability_and_no_gradient():
    hidden = jnp.ones((8, DIM))
    weights = jnp.zeros((VOCAB, DIM)).at[REAL:].set(50.0)
    head = LMHead(mesh_of(1, 1), REAL, 1.0, HeadTiles())
    logprobs, entropy = token_logprobs(head, hidden, weights, jnp.zeros(8, jnp.int32))
    np.testing.assert_allclose(logprobs, -np.log(REAL), rtol=1e-6)
    np.testing.assert_allclose(entropy, np.log(REAL), rtol=1e-6)
    grad = jax.grad(lambda w: token_logprobs(head, hidden, w, jnp.zeros(8, jnp.int32))[0].sum())(weights)
    assert (np.asarray(grad)[REAL:] == 0).all() and (np.asarray(grad)[:REAL] != 0).any()


def test_no_array_of_rows_by_vocabulary_exists():
    """Neither pass may hold [rows, V]: the compiled program's scratch stays far below it."""
    rows, vocab, dim = 16384, 32768, 8
    head = LMHead(mesh_of(1, 1), vocab, 1.0, HeadTiles())
    shapes = [
        jax.ShapeDtypeStruct(s, t)
        for s, t in (((rows, dim), jnp.float32), ((vocab, dim), jnp.float32), ((rows,), jnp.int32))
    ]
    grad = jax.jit(jax.grad(lambda h, w, t: token_logprobs(head, h, w, t)[0].sum(), argnums=(0, 1)))
    scratch = grad.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert scratch < rows * vocab * 4 / 4


def test_successors_of_the_positions_given_are_scored():
    """Anywhere in a row, in any order, and the same position several times."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 9, DIM)).astype(np.float32)
    weights = rng.normal(size=(VOCAB, DIM)).astype(np.float32)
    targets = rng.integers(0, REAL, (2, 4)).astype(np.int32)
    before = np.array([[2, 3, 4, 5], [8, 0, 4, 4]], np.int32)
    head = LMHead(mesh_of(1, 1), REAL, 1.0, HeadTiles())
    got = logprobs_after(head, *(jnp.asarray(x) for x in (hidden, weights, before, targets)))
    for row in range(2):
        logits = (hidden[row, before[row]] @ weights.T)[:, :REAL].astype(np.float64)
        want = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(got[0][row], want[np.arange(4), targets[row]], rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(got[1][row], -(np.exp(want) * want).sum(axis=1), rtol=2e-6, atol=2e-6)
