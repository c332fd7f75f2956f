"""Plain XLA: any device without a file of its own."""

from .backend import Backend
from .causal_attention import xla as causal_attention
from .paged_attention import xla as paged_attention


def backend(device_kind: str, compute_capability: str) -> Backend:
    """Return the table of a device that only XLA knows."""
    return Backend(
        causal_attention=causal_attention.attend, paged_cache=lambda page_size, head_dim, dtype: paged_attention.CACHE
    )
