"""NVIDIA GPUs: kernels of our own on Hopper, cuDNN and XLA elsewhere."""

import functools
from typing import Any

from .backend import UNFUSED, Backend, DecodeShape, FusedProjections, PagedCache
from .causal_attention import gpu as causal_attention
from .paged_attention import xla

HOPPER = "9."
"""Beginning of the compute capability of H100 and H200."""


def paged_cache(on_hopper: bool, page_size: int, head_dim: int, dtype: Any) -> PagedCache:
    """Choose the Hopper kernel where it takes such pages. Its import takes a quarter of a second, hence inside."""
    from .paged_attention import gpu

    return gpu.CACHE if on_hopper and gpu.takes(page_size, head_dim, dtype) else xla.CACHE


def fused_projections(on_hopper: bool, shape: DecodeShape) -> FusedProjections:
    """Choose the fused kernels that take such sizes."""
    from . import fused_projections as fused

    if not on_hopper or not fused.takes(shape.rows, shape.hidden_size, shape.dtype):
        return UNFUSED
    whole_tiles = shape.intermediate_size % fused.COLUMNS == 0
    halves = shape.qk_norm and shape.head_dim == 2 * fused.COLUMNS
    return FusedProjections(fused.gated if whole_tiles else None, fused.heads if halves else None)


def backend(device_kind: str, compute_capability: str) -> Backend:
    """Return the table of a GPU of this compute capability."""
    on_hopper = compute_capability.startswith(HOPPER)
    return Backend(
        causal_attention=causal_attention.attend,
        paged_cache=functools.partial(paged_cache, on_hopper),
        fused_projections=functools.partial(fused_projections, on_hopper),
        least_batch=64,
    )
