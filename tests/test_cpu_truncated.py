"""Truncated sampling is trained as it was sampled: kept sets, log-probs and gradients against float64."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import forward, make_generator, make_update_spec, mesh_of, place

torch = pytest.importorskip("torch")
warpers = pytest.importorskip("transformers.generation.logits_process")

from minigrpo.config import RolloutOptions
from minigrpo.grpo.batch import Batch, PackingSpec, pack, put_batch, restore_order
from minigrpo.grpo.logprobs import LMHead, token_logprobs
from minigrpo.grpo.update import batch_logprobs
from minigrpo.kernels.backend import HeadTiles
from minigrpo.rollout.generator import Start
from minigrpo.rollout.sampling import Sampler, sample

DIM, VOCAB, REAL, TEMPERATURE = 16, 88, 83, 0.8

LIMITS = {"top_k": (0, 7), "top_p": (1.0, 0.8), "min_p": (0.0, 0.05)}
COMBINATIONS = [dict(zip(LIMITS, values, strict=True)) for values in itertools.product(*LIMITS.values())][1:]
EXTREMES = [
    {"top_k": 1},
    {"top_k": 10_000},
    {"top_p": 1e-9},
    {"top_p": 0.999},
    {"min_p": 1.0},
    {"min_p": 1e-9},
    {"top_k": 2, "top_p": 0.5, "min_p": 0.9},
]


def name_of(options):
    return ",".join(f"{name}={value}" for name, value in options.items())


def by_transformers(logits, options):
    """True where transformers' warpers, in their order, keep a token; `logits` are scaled, float64."""
    scores, asked = torch.tensor(logits), {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    if asked["top_k"]:
        scores = warpers.TopKLogitsWarper(asked["top_k"])(None, scores)
    if asked["top_p"] < 1:
        scores = warpers.TopPLogitsWarper(asked["top_p"])(None, scores)
    if asked["min_p"]:
        scores = warpers.MinPLogitsWarper(asked["min_p"])(None, scores)
    return torch.isfinite(scores).numpy()


def log_softmax(x, kept=True):
    """In float64 over the kept entries."""
    x = np.where(kept, x, -np.inf).astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


# The sampler


@pytest.mark.parametrize("options", COMBINATIONS + EXTREMES, ids=name_of)
@pytest.mark.parametrize("vocab", [REAL, 3000])
def test_the_recorded_cutoff_mass_and_logprob_are_of_the_set_that_transformers_keeps(options, vocab):
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=(60, vocab)) * np.linspace(0.3, 6, 60)[:, None]
    logits = np.concatenate([logits, np.full((60, 5), -np.inf)], axis=1).astype(np.float32)
    sampler = Sampler(temperature=TEMPERATURE, **options)
    tokens, logprobs, kept = sample(sampler, jnp.asarray(logits), jnp.asarray(rng.random(60, np.float32)))
    scaled, rows = (logits / np.float32(TEMPERATURE)).astype(np.float64), np.arange(60)
    whole, wanted = log_softmax(scaled), by_transformers(scaled, options) & np.isfinite(logits)
    got = whole >= np.asarray(kept.cutoff)[:, None]
    np.testing.assert_array_equal(got & (whole > -80), wanted & (whole > -80))
    np.testing.assert_allclose(kept.mass, np.where(wanted, np.exp(whole), 0).sum(axis=1), rtol=2e-6)
    np.testing.assert_allclose(logprobs, log_softmax(scaled, wanted)[rows, np.asarray(tokens)], rtol=1e-5, atol=2e-6)
    assert wanted[rows, np.asarray(tokens)].all()


def test_the_cutoff_is_midway_between_the_least_kept_and_the_likeliest_dropped():
    probs = np.array([[0.5, 0.05, 0.3, 0.15]])
    _, _, kept = sample(Sampler(top_k=2), jnp.asarray(np.log(probs), jnp.float32), jnp.zeros(1))
    assert float(kept.cutoff[0]) == pytest.approx((np.log(0.3) + np.log(0.15)) / 2, rel=1e-6)
    assert float(kept.mass[0]) == pytest.approx(0.8, rel=1e-6)


def test_equals_at_the_limit_are_kept_together():
    """Two of the three likeliest are asked for; the second and the third are equal."""
    logits = jnp.array([[1.0, 3.0, 2.0, 2.0, -1.0]])
    _, _, kept = sample(Sampler(top_k=2), logits, jnp.zeros(1))
    np.testing.assert_array_equal(log_softmax(np.asarray(logits)) >= float(kept.cutoff[0]), [[0, 1, 1, 1, 0]])


def test_where_nothing_is_left_out_nothing_is_recorded():
    for sampler in (Sampler(), Sampler(temperature=0.0, top_k=3)):
        assert sample(sampler, jnp.ones((1, 4)), jnp.zeros(1))[2] is None
    _, _, kept = sample(Sampler(top_k=4), jnp.array([[1.0, 2.0, 3.0, 4.0, -jnp.inf]]), jnp.zeros(1))
    assert float(kept.cutoff[0]) == -np.inf and float(kept.mass[0]) == 1


# The trainer's log-probs


ROWS = 48
KINDS = ("all", "some", "few", "target alone", "target below", "nobody else", "tie")


def head_case():
    """Rows with cut-offs of every kind, and which tokens each keeps, found in float64."""
    rng = np.random.default_rng(3)
    hidden, weights = rng.normal(size=(ROWS, DIM)).astype(np.float32), rng.normal(size=(VOCAB, DIM)) / 2
    weights = weights.astype(np.float32)
    weights[50] = weights[20]  # equal logits in every row, on different devices
    scaled = (hidden.astype(np.float64) @ weights.T.astype(np.float64) / TEMPERATURE)[:, :REAL]
    whole = log_softmax(scaled)
    targets, cutoffs, kept = np.zeros(ROWS, np.int32), np.zeros(ROWS), np.zeros((ROWS, REAL), bool)
    for row in range(ROWS):
        order, kind = np.argsort(-whole[row], kind="stable"), KINDS[row % len(KINDS)]
        count = {"all": REAL, "few": 2, "target alone": 1, "nobody else": 0}.get(kind, 20)
        if kind == "tie":  # the cut-off is between the two equals and the token after them
            count = int(np.flatnonzero(np.isin(order, (20, 50))).max()) + 1
            assert abs(whole[row, 20] - whole[row, 50]) < 1e-12
        around = np.concatenate([[np.inf], whole[row, order], [-np.inf]])[count : count + 2]
        cutoffs[row] = 0.0 if count == 0 else around.mean()
        below = kind in ("target below", "nobody else")
        targets[row] = order[rng.integers(count, REAL) if below else rng.integers(0, count)]
        kept[row, order[:count]] = True
        kept[row, targets[row]] = True
    return hidden, weights, targets, cutoffs.astype(np.float32), kept


def torch_head(hidden, weights, targets, kept, cotangent):
    """Log-probs, entropy and gradients by autograd in float64, the kept set a constant mask."""
    h, w = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (hidden, weights))
    logits = (h @ w.T / TEMPERATURE)[:, :REAL].masked_fill(~torch.tensor(kept), -torch.inf)
    logprobs = torch.log_softmax(logits, dim=1)
    picked = logprobs[torch.arange(ROWS), torch.tensor(targets).long()]
    (picked * torch.tensor(cotangent)).sum().backward()
    entropy = torch.special.entr(logprobs.detach().exp()).sum(dim=1)
    return [x.detach().numpy() for x in (picked, entropy, h.grad, w.grad)]


@pytest.mark.parametrize("mesh", [(1, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize(
    "tiles", [HeadTiles(), HeadTiles(5, 7, 3), HeadTiles(1, 3, 1), HeadTiles(48, 88, 48), HeadTiles(7, 87, 47)]
)
def test_logprobs_and_gradients_are_torchs_over_the_kept_tokens(mesh, tiles):
    hidden, weights, targets, cutoffs, kept = head_case()
    cotangent = np.random.default_rng(5).normal(size=ROWS).astype(np.float32)
    head = LMHead(mesh_of(*mesh), REAL, TEMPERATURE, tiles)

    def total(hidden, weights):
        logprobs, entropy = token_logprobs(head, hidden, weights, jnp.asarray(targets), jnp.asarray(cutoffs))
        return (logprobs * cotangent).sum(), (logprobs, entropy)

    arrays = jnp.asarray(hidden), jnp.asarray(weights)
    grads, (logprobs, entropy) = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(*arrays)
    for got, want in zip(
        (logprobs, entropy, *grads), torch_head(hidden, weights, targets, kept, cotangent), strict=True
    ):
        assert np.abs(np.asarray(got) - want).max() <= 2e-6 * np.abs(want).max()


def test_a_target_of_no_probability_is_its_own_kept_set():
    """Its exponential underflows; the log-prob is 0 all the same, and so is the gradient."""
    hidden, weights = jnp.ones((8, 1)), jnp.array([[200.0], [0.0], [199.0]])
    head, targets = LMHead(mesh_of(1, 1), 3, 1.0, HeadTiles(8, 2, 8)), jnp.ones(8, jnp.int32)

    def total(hidden):
        logprobs, entropy = token_logprobs(head, hidden, weights, targets, jnp.zeros(8))
        return logprobs.sum(), (logprobs, entropy)

    grad, (logprobs, entropy) = jax.grad(total, has_aux=True)(hidden)
    assert not np.asarray(logprobs).any() and not np.asarray(entropy).any() and not np.asarray(grad).any()


def test_no_array_of_rows_by_vocabulary_exists():
    rows, vocab, dim = 16384, 32768, 8
    head, number = LMHead(mesh_of(1, 1), vocab, 1.0, HeadTiles()), jnp.float32
    sizes = ((rows, dim), number), ((vocab, dim), number), ((rows,), jnp.int32), ((rows,), number)
    grad = jax.jit(jax.grad(lambda *x: token_logprobs(head, *x)[0].sum(), argnums=(0, 1)))
    compiled = grad.lower(*(jax.ShapeDtypeStruct(*size) for size in sizes)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * vocab * 4 / 4


# Sampler and trainer together


@pytest.mark.parametrize("options", COMBINATIONS + EXTREMES, ids=name_of)
def test_the_head_gives_a_sampled_token_the_logprob_it_was_sampled_with(options):
    """The trainer's sum is in other chunks, over other devices."""
    rng = np.random.default_rng(7)
    hidden = jnp.asarray(rng.normal(size=(512, DIM)) * np.linspace(0.1, 2, 512)[:, None], jnp.float32)
    weights = jnp.asarray(rng.normal(size=(VOCAB, DIM)), jnp.float32)
    logits = jnp.where(jnp.arange(VOCAB) < REAL, hidden @ weights.T, -jnp.inf)
    sampler = Sampler(temperature=TEMPERATURE, **options)
    tokens, recorded, kept = sample(sampler, logits, jnp.asarray(rng.random(512, np.float32)))
    head = LMHead(mesh_of(4, 2), REAL, TEMPERATURE, HeadTiles(5, 7, 3))
    scored, _ = jax.jit(lambda *x: token_logprobs(head, *x))(hidden, weights, tokens, kept.cutoff)
    np.testing.assert_allclose(scored, recorded, atol=5e-5)
    assert (np.asarray(recorded) <= 1e-6).all()


OPTIONS = RolloutOptions(max_completion_length=24, temperature=0.8, page_size=8, slots="16", **COMBINATIONS[-1])
PROMPTS = [np.random.default_rng(0).integers(10, 250, length).tolist() for length in (1, 7, 8, 9, 17, 30)]


def roll(config, params, options=OPTIONS, mesh=(1, 1), start=None):
    generator = make_generator(config, options, mesh)
    return generator(jax.tree.map(jnp.asarray, params), PROMPTS, list(range(6)), 4, (7, 0), start)


@pytest.fixture(scope="module")
def plain(tiny_config, tiny_params):
    return roll(tiny_config, tiny_params)


def batch_of_rollout(rollout, **more):
    return Batch(rollout.tokens, rollout.lengths, np.zeros(24, np.float32), cutoffs=rollout.kept.cutoff, **more)


def score(config, params, batch, mesh, **packing):
    """The trainer's log-probs [B, C] of a packed batch."""
    device_mesh = mesh_of(*mesh)
    spec = make_update_spec(config, device_mesh, temperature=0.8)
    packed = put_batch(device_mesh, pack(PackingSpec(device_mesh.size, 2, 32, 24, group=4, **packing), PROMPTS, batch))
    return restore_order(packed, np.asarray(batch_logprobs(spec, place(params, device_mesh), packed)), 24)


def worst(rollout, scored):
    mask = np.arange(24) < rollout.lengths[:, None]
    assert mask.sum() > 100
    return np.abs(scored - rollout.logprobs)[mask].max()


@pytest.mark.parametrize(
    ("mesh", "packing"),
    [((1, 1), {"sequences_per_row": 1}), ((1, 1), {"share_prefixes": True}), ((4, 2), {"share_prefixes": True})],
    ids=str,
)
def test_trained_logprobs_equal_the_rollouts(tiny_config, tiny_params, plain, mesh, packing):
    assert plain.preempted == 0
    assert worst(plain, score(tiny_config, tiny_params, batch_of_rollout(plain), mesh, **packing)) < 1e-4


@pytest.mark.parametrize("options", [{"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.05}], ids=name_of)
def test_trained_logprobs_equal_the_rollouts_of_each_truncation_alone(tiny_config, tiny_params, options):
    options = dataclasses.replace(OPTIONS, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0} | options)
    rollout = roll(tiny_config, tiny_params, options)
    assert 0 < rollout.kept.mass[:, 0].min() < 1 and rollout.kept.mass.max() < 1.000002
    assert worst(rollout, score(tiny_config, tiny_params, batch_of_rollout(rollout), (1, 1))) < 1e-4


def test_a_preempted_completion_keeps_its_cutoffs(tiny_config, tiny_params, plain):
    small = roll(tiny_config, tiny_params, dataclasses.replace(OPTIONS, pool_pages=32))
    assert small.preempted > 0
    np.testing.assert_array_equal(small.tokens, plain.tokens)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-4), small.kept, plain.kept)


def test_a_continued_completion_keeps_its_cutoffs(tiny_config, tiny_params, plain):
    lengths = np.minimum(plain.lengths, 5).astype(np.int32)
    mask = np.arange(24) < lengths[:, None]
    kept = jax.tree.map(lambda x: np.where(mask, x, np.float32(0)), plain.kept)
    start = Start(plain.tokens * mask, plain.logprobs * mask, lengths, kept)
    continued = roll(tiny_config, tiny_params, start=start)
    np.testing.assert_array_equal(continued.tokens, plain.tokens)
    np.testing.assert_array_equal(continued.kept.cutoff, plain.kept.cutoff)


# Old and reference policies


def test_another_policy_is_scored_over_the_tokens_that_its_own_logprobs_keep(tiny_config, tiny_params, plain):
    """And the sampled one, against whole sequences in float64."""
    rng = np.random.default_rng(2)
    other = jax.tree.map(lambda w: w * (1 + 0.2 * rng.normal(size=w.shape)).astype(np.float32), tiny_params)
    scored = score(tiny_config, other, batch_of_rollout(plain), (1, 1))
    below, sequences = 0, np.zeros((24, 54), np.int32)
    for row, length in enumerate(plain.lengths):
        prompt = PROMPTS[row // 4]
        sequences[row, : len(prompt) + length] = [*prompt, *plain.tokens[row, :length]]
    every = np.asarray(forward(tiny_config, other, sequences), np.float64)[:, :, :250] / 0.8
    for row, length in enumerate(plain.lengths):
        first, own = len(PROMPTS[row // 4]) - 1, plain.tokens[row, :length]
        logits = every[row, first : first + length]
        whole, target = log_softmax(logits), np.arange(250) == own[:, None]
        reached = whole >= plain.kept.cutoff[row, :length, None]
        below += (~reached & target).sum()
        want = log_softmax(logits, reached | target)[np.arange(length), own]
        np.testing.assert_allclose(scored[row, :length], want, atol=1e-4)
    assert below > 5
