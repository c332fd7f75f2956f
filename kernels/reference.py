"""Float64 NumPy oracles of the kernels, written from the definitions, one sequence and head at a time."""

from typing import Any

import numpy as np
from jaxtyping import Float


def paged_attention(q: Any, pages: Any, layer: Any, lengths: Any, page_table: Any) -> Float[np.ndarray, "B N H"]:
    """Attend in float64: q [B,N,H], pages [L,P,S,2*K*H], lengths [B], page_table [B,M] -> [B,N,H]."""
    q, pages = np.asarray(q, np.float64), np.asarray(pages, np.float64)
    out = np.zeros_like(q)
    num_heads, dim = q.shape[1:]
    page_size, width = pages.shape[2:]
    queries_per_kv = num_heads // (width // (2 * dim))
    for b, length in enumerate(lengths):
        tokens = [pages[layer, page_table[b, t // page_size], t % page_size] for t in range(length)]
        for n in range(num_heads if length else 0):
            base = (n // queries_per_kv) * 2 * dim
            keys = np.stack([row[base : base + dim] for row in tokens])
            values = np.stack([row[base + dim : base + 2 * dim] for row in tokens])
            scores = keys @ q[b, n] / dim**0.5
            weights = np.exp(scores - scores.max())
            out[b, n] = weights @ values / weights.sum()
    return out


def gated(x: Any, gate: Any, up: Any) -> Float[np.ndarray, "B F"]:
    """Compute silu(x gate) * (x up) [B,F] in float64 from x [B,D], gate and up [D,F]."""
    x, gate, up = (np.asarray(array, np.float64) for array in (x, gate, up))
    through = x @ gate
    return through / (1 + np.exp(-through)) * (x @ up)


def head(x: Any, weights: Any, scale: Any, positions: Any, theta: float, eps: float) -> Float[np.ndarray, "B H"]:
    """Multiply x [B,D] with weights [D,H], RMS-norm by scale [H], rotate to positions [B] -> [B,H] in float64."""
    x, weights, scale = (np.asarray(array, np.float64) for array in (x, weights, scale))
    out = x @ weights
    half = weights.shape[1] // 2
    for row, position in zip(out, positions, strict=True):
        row *= scale / np.sqrt(np.mean(row**2) + eps)
        turned = [(row[i] + 1j * row[i + half]) * np.exp(1j * position * theta ** (-i / half)) for i in range(half)]
        row[:] = np.concatenate([np.real(turned), np.imag(turned)])
    return out
