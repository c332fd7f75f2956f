"""Matmuls of a decoding step, and the operations after them, as Pallas Mosaic kernels for Hopper GPUs.

Few rows meet large matrices, so the bound is the bandwidth at which weights arrive. One warpgroup makes two tiles of 64
columns that belong together: the same columns of gate and up, or the halves of a head, which rope mixes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from .hopper import IN_TILES, ROWS, TILE_LANES, load

COLUMNS = TILE_LANES
"""Columns of one matmul."""

DEPTH, BUFFERS = 128, 4
"""Terms summed at a time, and the number of such operand blocks that fit in shared memory: 192 KB."""


def takes(rows: int, depth: int, dtype: Any) -> bool:
    """Tell if the kernels are for matmuls of `rows` tokens that each sum over `depth` numbers."""
    return rows <= ROWS and depth % DEPTH == 0 and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Blocks of the operands in shared memory: some arriving, one being multiplied."""

    x: Any  # [BUFFERS, ROWS, DEPTH]
    first: Any  # [BUFFERS, DEPTH, COLUMNS]
    second: Any
    arrived: Any
    """A barrier per block."""


def two_products(x: Any, ring: Ring, fetch_weights: Callable[[Any, Any, Any, Any], None]) -> tuple[Array, Array]:
    """Multiply x [ROWS, D] with two tiles of weights -> float32 [ROWS, COLUMNS] each.

    fetch_weights(depth, first, second, arrived) starts the copies of the tiles' rows `depth` to where they go.
    """
    steps = x.shape[1] // DEPTH

    def fetch(step: Array) -> None:
        at, depth = jax.lax.rem(step, BUFFERS), pl.ds(step * DEPTH, DEPTH)
        fetch_weights(depth, ring.first.at[at], ring.second.at[at], ring.arrived.at[at])
        plgpu.copy_gmem_to_smem(x.at[:, depth], ring.x.at[at], ring.arrived.at[at])

    for step in range(min(BUFFERS, steps)):
        fetch(jnp.int32(step))

    def multiply(first: Any, second: Any) -> tuple[Array, Array]:
        def turn(step: Array, _: tuple[()]) -> tuple[()]:
            at = jax.lax.rem(step, BUFFERS)
            plgpu.barrier_wait(ring.arrived.at[at])
            plgpu.wgmma(first, ring.x.at[at], ring.first.at[at])
            plgpu.wgmma(second, ring.x.at[at], ring.second.at[at])
            plgpu.wgmma_wait(2)  # the turn before has read its block
            pl.when((step > 0) & (step - 1 + BUFFERS < steps))(lambda: fetch(step - 1 + BUFFERS))
            return ()

        jax.lax.fori_loop(0, steps, turn, ())
        return first[...], second[...]

    return pl.run_scoped(multiply, *[plgpu.ACC((ROWS, COLUMNS), jnp.float32)] * 2)


def gated_kernel(x: Any, gate: Any, up: Any, out: Any, results: Any, *ring: Any) -> None:
    """Compute one tile of columns of silu(x gate) * (x up)."""
    columns = pl.ds(jax.lax.axis_index("tile") * COLUMNS, COLUMNS)

    def fetch(depth: Any, first: Any, second: Any, arrived: Any) -> None:
        plgpu.copy_gmem_to_smem(gate.at[depth, columns], first, arrived)
        plgpu.copy_gmem_to_smem(up.at[depth, columns], second, arrived)

    gates, ups = two_products(x, Ring(*ring), fetch)
    results[...] = (gates / (1 + jnp.exp(-gates)) * ups).astype(results.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(results, out.at[:, columns])
    plgpu.wait_smem_to_gmem(0)


def store_head(first: Array, second: Array, results: Any, out: Any, head: Any) -> None:
    """Store the two halves of a head of every row."""
    results[:, pl.ds(0, COLUMNS)] = first.astype(results.dtype)
    results[:, pl.ds(COLUMNS, COLUMNS)] = second.astype(results.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(results, out.at[:, head])


def norm_and_turn(first: Array, second: Array, scale: Any, cos: Any, sin: Any, eps: float) -> tuple[Array, Array]:
    """Apply RMS norm to a head, then rope, all in float32."""

    def half_scale(start: int) -> Array:
        columns = load(scale.at[pl.ds(start, COLUMNS)], plgpu.Layout.WGMMA.reduce(0))
        return jax.lax.broadcast_in_dim(columns.astype(jnp.float32), first.shape, [1])

    squares = jnp.square(first).sum(axis=1) + jnp.square(second).sum(axis=1)
    inverse = jax.lax.broadcast_in_dim(jax.lax.rsqrt(squares / (2 * COLUMNS) + eps), first.shape, [0])
    first, second = first * inverse * half_scale(0), second * inverse * half_scale(COLUMNS)
    cos, sin = (load(table, plgpu.Layout.WGMMA) for table in (cos, sin))
    return first * cos - second * sin, second * cos + first * sin


def heads_kernel(
    x: Any, q: Any, k: Any, v: Any, q_norm: Any, k_norm: Any, cos: Any, sin: Any, q_out: Any, k_out: Any, v_out: Any,
    results: Any, *ring: Any, eps: float,
) -> None:  # fmt: skip
    """Compute one head of every row: of the queries, keys or values."""
    head, (queries, keys) = jax.lax.axis_index("head"), (q.shape[0], k.shape[0])
    kinds = (
        (head < queries, head, q, q_out, q_norm),
        ((head >= queries) & (head < queries + keys), head - queries, k, k_out, k_norm),
        (head >= queries + keys, head - queries - keys, v, v_out, None),
    )

    def fetch(depth: Any, first: Any, second: Any, arrived: Any) -> None:
        def from_one(weights: Any, own: Any) -> None:
            for half, buffer in enumerate((first, second)):
                columns = pl.ds(half * COLUMNS, COLUMNS)
                plgpu.copy_gmem_to_smem(weights.at[own, depth, columns], buffer, arrived)

        for chosen, own, weights, _, _ in kinds:
            pl.when(chosen)(functools.partial(from_one, weights, own))

    sums = two_products(x, Ring(*ring), fetch)

    def store(own: Any, out: Any, scale: Any) -> None:
        halves = sums if scale is None else norm_and_turn(*sums, scale, cos, sin, eps)
        store_head(*halves, results, out, own)

    for chosen, own, _, out, scale in kinds:
        pl.when(chosen)(functools.partial(store, own, out, scale))
    plgpu.wait_smem_to_gmem(0)


def run(
    body: Callable[..., None], tiles: int, name: str, width: int, outs: Any, interpret: Any, x: Array, *operands: Array
) -> Any:
    """Run a kernel called `name` over `tiles` pairs of tiles; `width` is the number of columns that a tile stores."""

    def tiled(*shape: int) -> Any:
        return plgpu.SMEM(shape, x.dtype, transforms=IN_TILES)

    kernel = plgpu.kernel(
        body,
        out_type=outs,
        grid=(tiles,),
        grid_names=(name,),
        scratch_types=[
            tiled(ROWS, width),
            tiled(BUFFERS, ROWS, DEPTH),
            tiled(BUFFERS, DEPTH, COLUMNS),
            tiled(BUFFERS, DEPTH, COLUMNS),
            plgpu.Barrier(num_arrivals=3, num_barriers=BUFFERS),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return kernel(whole(x), *operands)


def check(x: Array, right: bool, columns: str) -> None:
    """Raise ValueError for operands of sizes that the kernels do not take; `right` tells if `columns` are valid."""
    rows, depth = x.shape
    if rows > ROWS or depth % DEPTH or not right:
        raise ValueError(f"x {x.shape}, {columns}: at most {ROWS} rows, and sums over a multiple of {DEPTH}")


def whole(x: Array) -> Array:
    """Pad x with rows of zeros up to ROWS."""
    return jnp.pad(x, ((0, ROWS - len(x)), *[(0, 0)] * (x.ndim - 1)))


@functools.partial(jax.jit, static_argnames="interpret")
def gated(
    x: Float[Array, "B D"], gate: Float[Array, "D F"], up: Float[Array, "D F"], interpret: Any = None
) -> Float[Array, "B F"]:
    """Compute silu(x gate) * (x up) (arXiv:2002.05202). `interpret` emulates the kernel, as in jax's Pallas.

    Raises ValueError for more than ROWS rows, a D that is no multiple of DEPTH, or an F that is none of COLUMNS.
    """
    width = gate.shape[1]
    check(x, width % COLUMNS == 0, f"{width} columns, which must be a multiple of {COLUMNS}")
    outs = jax.ShapeDtypeStruct((ROWS, width), x.dtype)
    return run(gated_kernel, width // COLUMNS, "tile", COLUMNS, outs, interpret, x, gate, up)[: len(x)]


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def heads(
    x: Float[Array, "B D"],
    weights: tuple[Float[Array, "N D H"], Float[Array, "K D H"], Float[Array, "K D H"]],
    norms: tuple[Float[Array, " H"], Float[Array, " H"]],
    angles: tuple[Float[Array, "B H/2"], Float[Array, "B H/2"]],
    eps: float,
    interpret: Any = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "B K H"], Float[Array, "B K H"]]:
    """Project to queries, keys and values; norm (arXiv:1910.07467) and rotate (arXiv:2104.09864) queries and keys.

    `norms` are the scales of queries and keys, `angles` the cosines and sines of the rows' positions, float32.
    Raises ValueError as `gated` does, and for heads of another size than 2 * COLUMNS.
    """
    dim = weights[0].shape[2]
    check(x, dim == 2 * COLUMNS, f"heads of {dim}, which must be {2 * COLUMNS}")
    outs = tuple(jax.ShapeDtypeStruct((ROWS, len(w), w.shape[2]), x.dtype) for w in weights)
    body = functools.partial(heads_kernel, eps=eps)
    tiles, width = sum(map(len, weights)), 2 * COLUMNS
    made = run(body, tiles, "head", width, outs, interpret, x, *weights, *norms, *map(whole, angles))
    return tuple(out[: len(x)] for out in made)
