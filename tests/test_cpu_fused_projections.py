"""The fused projections of a decoding step on Hopper GPUs: emulated, against float64 oracles and in the model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_generator
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from minigrpo.config import RolloutOptions
from minigrpo.kernels import backend, fused_projections, gpu, reference
from minigrpo.kernels.backend import UNFUSED, DecodeShape, FusedProjections
from minigrpo.kernels.causal_attention import xla
from minigrpo.model.params import Lora
from minigrpo.model.qwen import ComputeSpec, LayerContext, Qwen, init_params, rope_angles
from minigrpo.rollout import generator

BF16, THETA, EPS = jnp.dtype("bfloat16"), 1e4, 1e-6
emulated = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="jax before 0.11 has no emulation of the GPU's kernels"
)


def emulation():
    return plgpu.InterpretGPUParams(detect_races=True)


def draw(*shapes):
    """Numbers that bfloat16 holds."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), BF16) for shape in shapes]


def assert_near(got, want, bound=2**-8):
    """As a share of the whole array's norm, by default half of bfloat16's last place."""
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) < bound * np.linalg.norm(want)


def check_gated(rows, depth, width, interpret=None):
    x, gate, up = draw((rows, depth), (depth, width), (depth, width))
    assert_near(fused_projections.gated(x, gate, up, interpret), reference.gated(x, gate, up))


def check_heads(rows, depth, heads, kv_heads, interpret=None):
    shapes = (heads, depth, 128), (kv_heads, depth, 128), (kv_heads, depth, 128), (128,), (128,)
    x, q, k, v, *norms = draw((rows, depth), *shapes)
    positions = np.arange(rows) * 7
    angles = tuple(table[0, :, 0] for table in rope_angles(jnp.asarray(positions)[None], 128, THETA))
    got = fused_projections.heads(x, (q, k, v), tuple(norms), angles, EPS, interpret)
    for out, weights, scale in zip(got, (q, k), norms, strict=False):
        want = [reference.head(x, own, scale, positions, THETA, EPS) for own in np.asarray(weights)]
        assert_near(out, np.stack(want, axis=1))
    assert_near(got[2], np.einsum("BD,KDH->BKH", *(np.asarray(array, np.float64) for array in (x, v))))


@emulated
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("rows", "depth", "width"), [(64, 128, 64), (64, 1280, 192), (5, 512, 128), (1, 640, 64)])
def test_gated_products_equal_oracle(rows, depth, width):
    check_gated(rows, depth, width, emulation())


@emulated
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("rows", "depth", "heads", "kv_heads"), [(64, 128, 4, 2), (64, 1280, 2, 1), (5, 512, 7, 1)])
def test_heads_equal_oracle(rows, depth, heads, kv_heads):
    check_heads(rows, depth, heads, kv_heads, emulation())


original_products = fused_projections.two_products

FAULTS = {
    "tiles swapped": (fused_projections, "two_products", lambda *operands: original_products(*operands)[::-1]),
    "a block left out": (
        fused_projections,
        "two_products",
        lambda x, *operands: original_products(x.at[:, pl.ds(0, 512)], *operands),
    ),
    "no norm": (fused_projections, "norm_and_turn", lambda first, second, scale, cos, sin, eps: (first, second)),
    "no wait": (plgpu, "barrier_wait", lambda *barrier: None),
}


@emulated
@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_seen(fault, monkeypatch, traced_anew):
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
        check_heads(64, 640, 2, 1, emulation())


@pytest.mark.parametrize(("rows", "depth", "width"), [(65, 128, 64), (64, 192, 64), (64, 128, 96)])
def test_operands_that_would_be_read_in_part_are_refused(rows, depth, width):
    x, gate, head, norm, angle = draw((rows, depth), (depth, width), (1, depth, width), (width,), (rows, width // 2))
    of_heads = (head,) * 3, (norm,) * 2, (angle.astype(jnp.float32),) * 2, EPS
    for kernel, operands in ((fused_projections.gated, (gate, gate)), (fused_projections.heads, of_heads)):
        with pytest.raises(ValueError, match=rf"x \({rows}, {depth}\), .* at most 64 rows"):
            kernel(x, *operands)


@pytest.fixture(scope="module")
def wide_config(tiny_config):
    """Sizes that the kernels take."""
    return dataclasses.replace(tiny_config, hidden_size=128, head_dim=128, num_attention_heads=4, num_key_value_heads=2)


@emulated
@pytest.mark.timeout(120)
def test_a_model_with_its_kernels_equals_the_plain_one(wide_config):
    rng = np.random.default_rng(0)

    def larger(w):
        return jnp.asarray(rng.normal(size=w.shape) if (w == 1).all() else 4 * w, BF16)

    params = jax.tree.map(larger, init_params(wide_config, jax.random.key(0)))
    one_by_one = [jax.tree.map(lambda x, index=index: x[index], params["layers"]) for index in range(2)]
    params = params | {"layers": one_by_one}  # a list of layers is no scan, so that the carry may grow
    tokens, positions = jnp.arange(6)[:, None], 3 * jnp.arange(6)[:, None]

    def attend(layer, q, k, v, carry):
        return xla.attend(q, k, v), [*carry, q, k]

    def run(kernels):
        return Qwen(wide_config)(params, tokens, positions, LayerContext(attend, ComputeSpec(BF16), fused=kernels), [])

    both = fused_projections.gated, fused_projections.heads
    kernels = FusedProjections(*(functools.partial(kernel, interpret=emulation()) for kernel in both))
    plain, ours = run(UNFUSED), run(kernels)
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert_near(got, np.asarray(want, np.float64), 2**-6)


HOPPER, OLDER = ("gpu", "NVIDIA H100", "9.0"), ("gpu", "NVIDIA A100", "8.0")
CPU = ("cpu", "cpu", "")


@pytest.mark.parametrize(
    ("device", "changes", "dtype", "rows", "expected"),
    [
        (HOPPER, {}, BF16, 64, (True, True)),
        (HOPPER, {}, jnp.dtype("float16"), 64, (True, True)),
        (HOPPER, {}, BF16, 65, (False, False)),
        (HOPPER, {}, jnp.dtype("float32"), 64, (False, False)),
        (OLDER, {}, BF16, 64, (False, False)),
        (CPU, {}, BF16, 64, (False, False)),
        (HOPPER, {"hidden_size": 192}, BF16, 64, (False, False)),
        (HOPPER, {"intermediate_size": 96}, BF16, 64, (False, True)),
        (HOPPER, {"head_dim": 64}, BF16, 64, (True, False)),
        (HOPPER, {"model_type": "qwen2"}, BF16, 64, (True, False)),
        (HOPPER, {"int8": True}, BF16, 64, (False, False)),
        (HOPPER, {"lora": Lora(2, 4.0, 0.0, ("q",)), "int8": True}, BF16, 64, (False, False)),
        (HOPPER, {"lora": Lora(2, 4.0, 0.0, ("q",))}, BF16, 64, (True, True)),
    ],
)
def test_kernels_are_taken_where_they_fit(wide_config, device, changes, dtype, rows, expected):
    """Qwen2.5 has biases and no norms, for which there is no kernel of heads; adapters are merged before decoding."""
    config = dataclasses.replace(wide_config, **changes)
    spec = dataclasses.replace(make_generator(config, RolloutOptions()).spec, backend=backend._backend(*device))
    kernels = generator.fused_projections(dataclasses.replace(spec, dtype=dtype), rows)
    assert (kernels.gated is fused_projections.gated, kernels.heads is fused_projections.heads) == expected


def test_sizes_alone_decide_on_a_gpu():
    shape = DecodeShape(64, 128, 64, 128, True, BF16)
    assert gpu.fused_projections(True, shape).heads is fused_projections.heads
    assert gpu.fused_projections(False, shape) is UNFUSED
