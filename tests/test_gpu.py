"""What only a GPU can show: its kernels against float64 oracles, and a rollout through them. Skipped without one.

`JAX_PLATFORMS=cuda pytest -n 0 tests/test_gpu.py`; the kernel's own checks are in test_cpu_paged_attention.py.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import forward, make_generator
from test_cpu_attention import oracle, oracle_gradients
from test_cpu_fused_projections import check_gated, check_heads
from test_cpu_paged_attention import attend_here, cache_here, check

from minigrpo.config import RolloutOptions
from minigrpo.kernels.backend import backend_for
from minigrpo.kernels.paged_attention import gpu
from minigrpo.model.qwen import ComputeSpec, init_params

pytestmark = pytest.mark.skipif(jax.devices()[0].platform != "gpu", reason="needs a GPU")
BF16 = jnp.dtype("bfloat16")


hopper = pytest.mark.skipif(
    not str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9."), reason="the kernels are for Hopper"
)


@hopper
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 8, 128), (14, 2, 64), (12, 2, 128), (18, 2, 64)])
@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128])
def test_the_hopper_kernel_equals_oracle(heads, kv_heads, dim, page_size):
    assert cache_here(page_size, dim, BF16) is gpu.CACHE
    check(attend_here, heads, kv_heads, dim, page_size, jnp.bfloat16, extra=(131, *range(1, 2305, 256)))


@hopper
@pytest.mark.parametrize(("rows", "depth", "width"), [(64, 2048, 6144), (64, 128, 64), (5, 896, 4864)])
def test_gated_projections_equal_oracle(rows, depth, width):
    check_gated(rows, depth, width)


@hopper
@pytest.mark.parametrize(("rows", "depth", "heads", "kv_heads"), [(64, 2048, 16, 8), (5, 1024, 7, 1)])
def test_heads_equal_oracle(rows, depth, heads, kv_heads):
    check_heads(rows, depth, heads, kv_heads)


def assert_near(got, want, bound=1e-2):
    """As a share of the whole array's norm, as bfloat16 rounds each of its numbers by up to 0.4 %."""
    got = np.asarray(got, np.float64)
    assert np.linalg.norm(got - want) < bound * np.linalg.norm(want)


@pytest.mark.parametrize(("length", "heads", "kv_heads", "dim"), [(128, 4, 2, 64), (100, 6, 2, 128), (301, 2, 1, 64)])
@pytest.mark.parametrize("pieces", [1, 3])
def test_fused_attention_and_its_gradients(length, heads, kv_heads, dim, pieces):
    """By segments too."""
    rng = np.random.default_rng(length)
    shapes = (1, length, heads, dim), (1, length, kv_heads, dim), (1, length, kv_heads, dim), (1, length, heads, dim)
    q, k, v, cotangent = (np.asarray(jnp.asarray(rng.normal(size=shape), BF16), np.float64) for shape in shapes)
    edges = np.linspace(0, length, pieces + 1).astype(int)
    segments = np.searchsorted(edges[1:], np.arange(length), side="right")[None]
    ids = None if pieces == 1 else jnp.asarray(segments, jnp.int32)
    arguments = [jnp.asarray(x, BF16) for x in (q, k, v)]
    got, pull = jax.vjp(lambda *x: backend_for(jax.devices()[0]).causal_attention(*x, ids), *arguments)
    grads = pull(jnp.asarray(cotangent, BF16))
    for start, end in itertools.pairwise(edges):
        own = [x[:, start:end] for x in (q, k, v, cotangent)]
        assert_near(got[:, start:end], oracle(*own[:3]))
        for ours, want in zip(grads, oracle_gradients(*own), strict=True):
            assert_near(ours[:, start:end], want, 2e-2)


@pytest.fixture(scope="module", params=[(32, 64), (128, 128)])
def hopper_config(tiny_config, request):
    """Without and with the kernels that fuse projections."""
    hidden, dim = request.param
    return dataclasses.replace(tiny_config, hidden_size=hidden, head_dim=dim)


def test_a_rollout_in_bfloat16_is_what_the_whole_sequence_gives(hopper_config):
    """Recorded log-probs are those of a forward pass over the whole sequence, however the cache is cut.

    Matrices are larger than at initialisation, where attention hardly matters to the log-probs, but no larger than
    bfloat16 allows: on the CPU, without a kernel, it is off by up to 0.025 here, and a silu 5 % too large by 0.08.
    """
    drawn, times = init_params(hopper_config, jax.random.key(0)), 8 * math.sqrt(32 / hopper_config.hidden_size)
    params = jax.tree.map(lambda w: (w if w.ndim < 2 or (w == 1).all() else times * w).astype(BF16), drawn)
    prompts = [list(range(10, 10 + length)) for length in (1, 8, 30, 65)]
    for changes in ({}, {"page_size": 8, "slots": "4"}, {"pool_pages": 40, "page_size": 16}):
        options = dataclasses.replace(RolloutOptions(max_completion_length=80, temperature=1.0), **changes)
        sizes = {"prompt_tokens": 80, "num_tokens": hopper_config.vocab_size, "dtype": BF16}
        generator = make_generator(hopper_config, options, stops=(1,), **sizes)
        rollout = generator(params, prompts, [0, 1, 2, 3], 4, (7, 0))
        rows = [prompt for prompt in prompts for _ in range(4)]
        tokens = np.zeros((16, 160), np.int32)
        for row, (prompt, completion) in enumerate(zip(rows, rollout.completions, strict=True)):
            tokens[row, : len(prompt) + len(completion)] = prompt + completion
        logits = forward(hopper_config, params, tokens, compute=ComputeSpec(BF16))
        whole = np.asarray(jax.nn.log_softmax(logits))
        for row, (prompt, completion) in enumerate(zip(rows, rollout.completions, strict=True)):
            places = len(prompt) - 1 + np.arange(len(completion))
            want = whole[row, places, np.array(completion)]
            np.testing.assert_allclose(rollout.logprobs[row, : len(completion)], want, atol=0.05)
