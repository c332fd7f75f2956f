"""Float64 NumPy oracle of paged attention, written from the definition, one sequence and head at a time."""

import numpy as np


def paged_attention(q, pages, layer, lengths, page_table):
    """q [B,N,H], pages [L,P,S,2*K*H], lengths [B], page_table [B,M] -> [B,N,H] in float64."""
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
