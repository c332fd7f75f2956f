"""The CPU, on which the package is tested and tried."""

from typing import Any

from .backend import Backend, HeadTiles, PagedCache
from .causal_attention import xla as causal_attention
from .paged_attention import cpu, xla


def paged_cache(page_size: int, head_dim: int, dtype: Any) -> PagedCache:
    """Read small heads in place; gather larger ones."""
    return cpu.CACHE if head_dim <= cpu.MOST_HEAD_DIM else xla.CACHE


def backend(device_kind: str, compute_capability: str) -> Backend:
    """Return the CPU's table.

    XLA prefers vectors of 256 bits; with 512, where the machine has them, rollouts take 8 to 13 % less.
    """
    return Backend(
        causal_attention=causal_attention.attend,
        paged_cache=paged_cache,
        head_tiles=HeadTiles(rows=1024, vocab=2048, backward_rows=512),
        least_batch=16,
        micro_batch_tokens=2048,
        compiler_options=(("xla_cpu_prefer_vector_width", 512),),
    )
