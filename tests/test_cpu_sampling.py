"""Sampling: distributions against NumPy, the CDF's edges, truncation, recorded log-probs."""

import jax.numpy as jnp
import numpy as np
import pytest

from minigrpo.rollout.sampling import Sampler, invert_cdf, sample, truncate


def softmax(x):
    e = np.exp(np.asarray(x, np.float64) - np.max(x, axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("vocab", [5, 512, 1500])
def test_inverse_cdf_equals_searchsorted(vocab):
    rng = np.random.default_rng(vocab)
    probs = rng.random((200, vocab)).astype(np.float32) * (rng.random((200, vocab)) < 0.3)
    probs[:, vocab // 2] = 0.5
    uniforms = rng.random(200).astype(np.float32)
    got = np.asarray(invert_cdf(jnp.asarray(probs), jnp.asarray(uniforms)))
    cdf = np.cumsum(probs.astype(np.float64), axis=1)
    target = uniforms * cdf[:, -1]
    assert (probs[np.arange(200), got] > 0).all()
    slack = 1e-5 * cdf[:, -1]
    assert (cdf[np.arange(200), got] >= target - slack).all()
    assert (cdf[np.arange(200), got] - probs[np.arange(200), got] <= target + slack).all()


def test_extreme_uniforms_hit_real_tokens():
    probs = np.zeros((3, 1100), np.float32)
    probs[:, [7, 900]] = [1e-30, 1.0]
    probs[2, [7, 900]] = [1.0, 1e-30]
    got = invert_cdf(jnp.asarray(probs), jnp.array([0.0, 1 - 2.0**-24, 1 - 2.0**-24]))
    assert got.tolist() == [7, 900, 7]


def test_samples_follow_the_softmax():
    rng = np.random.default_rng(0)
    logits = np.tile(rng.normal(size=40).astype(np.float32) * 2, (40_000, 1))
    tokens, *_ = sample(Sampler(temperature=0.7), jnp.asarray(logits), jnp.asarray(rng.random(40_000, np.float32)))
    expected = 40_000 * softmax(logits[0] / 0.7)
    counts = np.bincount(np.asarray(tokens), minlength=40)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 72.1  # 0.1 % point of chi-square with 39 degrees of freedom


def test_recorded_logprobs_are_temperature_scaled_over_all_tokens():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(64, 30)).astype(np.float32)
    logits[:, 25:] = -np.inf
    sampler = Sampler(temperature=0.5)
    tokens, logprobs, _ = sample(sampler, jnp.asarray(logits), jnp.asarray(rng.random(64, np.float32)))
    want = np.log(softmax(logits / 0.5)[np.arange(64), np.asarray(tokens)])
    np.testing.assert_allclose(logprobs, want, rtol=1e-5, atol=1e-6)
    assert (np.asarray(tokens) < 25).all()


def test_greedy_takes_the_maximum():
    logits = jnp.array([[0.0, 3.0, 1.0], [2.0, -1.0, 1.0]])
    tokens, logprobs, _ = sample(Sampler(temperature=0.0), logits, jnp.zeros(2))
    assert tokens.tolist() == [1, 0]
    np.testing.assert_allclose(logprobs, np.log(softmax(logits))[[0, 1], [1, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("sampler", "kept"),
    [
        (Sampler(top_k=2), [0, 2]),
        (Sampler(top_p=0.6), [0, 2]),
        (Sampler(top_p=0.5), [0]),
        (Sampler(min_p=0.4), [0, 2]),
        (Sampler(top_k=3, top_p=0.85), [0, 2, 3]),
        (Sampler(top_k=2, top_p=0.6), [0]),
        (Sampler(top_k=3, min_p=0.4), [0, 2]),
        (Sampler(top_p=0.96, min_p=0.4), [0, 2]),
        (Sampler(), [0, 1, 2, 3]),
    ],
)
def test_truncation_keeps(sampler, kept):
    probs = np.array([[0.5, 0.05, 0.3, 0.15]], np.float32)
    out = np.asarray(truncate(sampler, jnp.asarray(probs / 0.5)))
    assert np.flatnonzero(out[0]).tolist() == kept


def many_probs(vocab, rows=20):
    """Relative to each row's maximum, some of them 0, some equal; sharp rows and flat ones."""
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=(rows, vocab)) * np.linspace(0.1, 6, rows)[:, None]
    probs = np.exp(logits - logits.max(axis=1, keepdims=True)).astype(np.float32)
    probs[:, : vocab // 8] = probs[:, vocab // 8 : 2 * (vocab // 8)]
    return probs * (rng.random((rows, vocab)) < 0.9)


@pytest.mark.parametrize("vocab", [40, 1500, 20_000])
@pytest.mark.parametrize("k", [1, 2, 20, 50, 10_000])
def test_top_k_keeps_the_k_largest_and_their_equals(vocab, k):
    probs = many_probs(vocab)
    limit = np.sort(probs, axis=1)[:, ::-1][:, min(k, vocab) - 1, None]
    got = np.asarray(truncate(Sampler(top_k=k), jnp.asarray(probs)))
    np.testing.assert_array_equal(got, np.where(probs >= limit, probs, 0))


@pytest.mark.parametrize("vocab", [40, 1500, 20_000])
@pytest.mark.parametrize("k", [0, 3, 50])
@pytest.mark.parametrize("p", [0.001, 0.3, 0.95, 0.9999])
def test_top_p_keeps_the_fewest_that_hold_the_mass(vocab, k, p):
    """The likeliest of what top-k keeps, equals together: with the least likely of them they hold p, without it not."""
    probs = many_probs(vocab)
    whole = np.asarray(truncate(Sampler(top_k=k), jnp.asarray(probs)), np.float64)
    got = np.asarray(truncate(Sampler(top_k=k, top_p=p), jnp.asarray(probs)), np.float64)
    least = np.where(got > 0, got, np.inf).min(axis=1, keepdims=True)
    np.testing.assert_array_equal(got, np.where(whole >= least, whole, 0))
    share, without = got.sum(axis=1), np.where(got > least, got, 0).sum(axis=1)
    assert (share >= p * whole.sum(axis=1) * (1 - 1e-6)).all()
    assert (without < p * whole.sum(axis=1) * (1 + 1e-6)).all()


def test_limits_are_found_to_the_last_bit():
    """Of neighbouring float32 the larger alone is kept; a mass that underflows to 0 keeps the likeliest token."""
    probs = jnp.array([[0.5, np.nextafter(np.float32(0.5), np.float32(1)), 1.0, 0.25]], jnp.float32)
    for sampler, kept in ((Sampler(top_k=2), [1, 2]), (Sampler(top_p=0.66), [1, 2]), (Sampler(top_p=1e-46), [2])):
        assert np.flatnonzero(truncate(sampler, probs)[0]).tolist() == kept
