"""Causal attention on NVIDIA GPUs by cuDNN, where it has one for the dtype and head size."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from . import ATTENTION, xla


def takes(head_dim: int, itemsize: int) -> bool:
    """Tell if cuDNN has an attention for such numbers, on Ampere and newer."""
    return itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attend by cuDNN, in 16 bits, padded at the end to an even length, which its masks need."""
    length, odd = q.shape[1], q.shape[1] % 2
    q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))
    ids = None if segments is None else jnp.pad(segments, ((0, 0), (0, odd)))
    mask = None if ids is None else ids[:, None, :, None] == ids[:, None, None]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")
    return checkpoint_name(out[:, :length], ATTENTION)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attend causally in every row, within its segments."""
    fused = takes(q.shape[3], q.dtype.itemsize)
    return cudnn_attention(q, k, v, segments) if fused else xla.attend(q, k, v, segments)
