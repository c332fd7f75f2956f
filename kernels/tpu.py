"""TPU chips."""

from .backend import Backend
from .causal_attention import tpu as causal_attention
from .paged_attention import tpu as paged_attention


def backend(device_kind: str, compute_capability: str) -> Backend:
    """Return a chip's table. By counted cycles the copies of shared prefixes cost more than they save there."""
    cache = paged_attention.cache(paged_attention.read_tuning(device_kind))
    return Backend(
        causal_attention=causal_attention.attend,
        paged_cache=lambda page_size, head_dim, dtype: cache,
        unroll_layers=False,
        micro_batch_tokens=4096,
        share_prefixes=False,
    )
