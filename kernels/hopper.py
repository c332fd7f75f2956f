"""Constants and loads shared by the Pallas Mosaic kernels for Hopper GPUs."""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

ROWS, TILE_ROWS, TILE_LANES = 64, 8, 64
"""Rows of one tensor-core matmul, and the tiles that hold its 16-bit operands in shared memory."""

IN_TILES = plgpu.TilingTransform((TILE_ROWS, TILE_LANES)), plgpu.SwizzleTransform(2 * TILE_LANES)

WHOLE = ((),) if jax.__version_info__ < (0, 11) else ()
"""The index that jax 0.10 asks for beside the reference."""


def load(reference: Any, layout: Any) -> Array:
    """Load an array from device memory, spread over the threads as in `layout`."""
    return plgpu.load(reference, *WHOLE, layout=layout, optimized=False)
