"""Attention of training in the form the model calls: packed rows spread over the mesh, shared prefixes expanded."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from minigrpo.kernels.backend import CausalAttention
from minigrpo.model.qwen import Attend
from minigrpo.runtime.mesh import data_spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedPrefixIndex:
    """Index tables that expand prefix-shared packed tokens [S, M] into attention rows [R, T].

    S packed micro-batches hold M tokens each and own R / S rows. A shared prompt token appears in several rows as key
    and value, and once, in its first row, as query. Example: prompt (a b) shared by completions (c) and (d), packed
    as a b c d: rows a b c | a b d, tokens [[0, 1, 2], [0, 1, 3]], first [[0, 1, 2, 5]], copies [[[3], [4]]].
    """

    tokens: Any  # int32 [R, T], the packed token at each position of a row
    first: Any  # int32 [S, M], each token's first position in its rows laid end to end; past them if it has none
    copies: Any  # int32 [S, Q, E], further positions of the first Q tokens; past the rows where there are fewer


def gather_or_zero(x: Float[Array, "M N H"], index: Int[Array, "*P"]) -> Float[Array, "*P N H"]:
    """Gather entries of x; 0 past its end."""
    return x.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)


@jax.custom_vjp
def expand(x: Float[Array, "M N H"], shared: SharedPrefixIndex) -> Float[Array, "R T N H"]:
    """Copy one micro-batch's packed tokens into its rows. The backward pass gathers and sums each token's copies."""
    return x.at[shared.tokens].get(mode="promise_in_bounds", wrap_negative_indices=False)


def expand_forward(x: Array, shared: SharedPrefixIndex) -> tuple[Array, SharedPrefixIndex]:
    """Copy as `expand` -> its result, and the index tables for the backward pass."""
    return expand(x, shared), shared


def expand_backward(shared: SharedPrefixIndex, cotangent: Array) -> tuple[Array, None]:
    """Sum each packed token's gradients over its copies."""
    flat = cotangent.reshape(-1, *cotangent.shape[2:])
    grads, prefix = gather_or_zero(flat, shared.first[0]), shared.copies.shape[1]
    copies = gather_or_zero(flat, shared.copies[0]).sum(axis=1, dtype=jnp.float32)
    return jnp.concatenate([(grads[:prefix] + copies).astype(flat.dtype), grads[prefix:]]), None


expand.defvjp(expand_forward, expand_backward)


@jax.custom_vjp
def permute(x: Float[Array, "M N H"], index: Int[Array, "*P"], inverse: Int[Array, " M"]) -> Float[Array, "*P N H"]:
    """Gather entries of x, 0 past its end. Each entry goes to one place at most, `inverse`, so no scatter is needed."""
    return gather_or_zero(x, index)


def permute_forward(x: Array, index: Array, inverse: Array) -> tuple[Array, Array]:
    """Gather as `permute` -> its result, and the inverse for the backward pass."""
    return gather_or_zero(x, index), inverse


def permute_backward(inverse: Array, cotangent: Array) -> tuple[Array, None, None]:
    """Gather gradients back to the places of their entries."""
    return gather_or_zero(cotangent.reshape(-1, *cotangent.shape[-2:]), inverse), None, None


permute.defvjp(permute_forward, permute_backward)


def query_tokens(shared: SharedPrefixIndex) -> Int[Array, "R T"]:
    """Return the token whose query each row position holds: its own where it is the token's first, else none."""
    positions = jnp.arange(shared.tokens.size).reshape(shared.tokens.shape)
    return jnp.where(shared.first[0][shared.tokens] == positions, shared.tokens, shared.first.shape[1])


def attend_shared(
    causal_attention: CausalAttention,
    q: Float[Array, "1 M N H"],
    k: Float[Array, "1 M K H"],
    v: Float[Array, "1 M K H"],
    segments: Int[Array, "R T"],
    shared: SharedPrefixIndex,
) -> Float[Array, "1 M N H"]:
    """Attend in one packed micro-batch, every sequence in its row."""
    tokens, first = query_tokens(shared), shared.first[0]
    queries = permute(q[0], tokens, first)
    out = causal_attention(queries, expand(k[0], shared), expand(v[0], shared), segments)
    return permute(out.reshape(-1, *q.shape[2:]), first, tokens.reshape(-1))[None]


def on_devices(mesh: Mesh, local: Callable[..., Array], *arguments: Any) -> Array:
    """Run `local` on each device's own rows."""
    spec = data_spec(mesh)
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(*arguments)


def attend_on(
    mesh: Mesh,
    causal_attention: CausalAttention,
    segments: Int[Array, "R T"] | None = None,
    shared: SharedPrefixIndex | None = None,
) -> Attend:
    """Return causal attention as the model calls it, sharded by rows over the mesh.

    Rows hold one sequence each, or several marked by `segments`; with `shared`, packed tokens are expanded first.
    """
    local = causal_attention if shared is None else functools.partial(attend_shared, causal_attention)
    extra = (segments,) if shared is None else (segments, shared)

    def attend(layer: Array, q: Array, k: Array, v: Array, carry: Any) -> tuple[Array, Any]:
        return on_devices(mesh, local, q, k, v, *extra), carry

    return attend


def expand_hidden(mesh: Mesh, hidden: Float[Array, "S M D"], shared: SharedPrefixIndex | None) -> Float[Array, "R T D"]:
    """Expand the hidden states of packed tokens into their rows."""
    if shared is None:
        return hidden

    def local(x: Array, shared: SharedPrefixIndex) -> Array:
        return expand(x.reshape(-1, 1, x.shape[2]), shared)[:, :, 0]

    return on_devices(mesh, local, hidden, shared)
