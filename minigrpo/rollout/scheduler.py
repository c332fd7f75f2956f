"""The paged KV cache's book-keeping on device: a stack of free pages and the page table of every slot.

Four verbs: can pages be had (`free_pages`), `take` them, `give_back`, and `own_pages`, which says whose they are.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """Free pages: stack[:top], taken from the end. A page number >= the pool's size stands for no page."""

    stack: Any  # int32 [P]
    top: Any  # int32 scalar


def full_pool(num_pages: int, reserved: Int[Array, ""]) -> Pool:
    """Every page but the first `reserved` is free."""
    free = num_pages - reserved
    stack = jnp.arange(num_pages, dtype=jnp.int32) + reserved
    return Pool(stack=jnp.where(jnp.arange(num_pages) < free, stack, num_pages), top=jnp.int32(free))


def take(pool: Pool, wanted: Bool[Array, "B"]) -> tuple[Pool, Int[Array, "B"]]:
    """One page for every slot that wants one; no page (the pool's size) for the others. The pool must hold enough."""
    rank = jnp.cumsum(wanted) - 1
    pages = jnp.where(wanted, pool.stack[pool.top - 1 - rank], pool.stack.shape[0])
    return dataclasses.replace(pool, top=pool.top - wanted.sum()), pages


def give_back(pool: Pool, pages: Int[Array, "N"], returned: Bool[Array, "N"]) -> Pool:
    """Pushes pages[returned] back on the stack."""
    places = jnp.where(returned, pool.top + jnp.cumsum(returned) - 1, pool.stack.shape[0])
    return Pool(stack=pool.stack.at[places].set(pages, mode="drop"), top=pool.top + returned.sum())


def own_pages(shared: Int[Array, "B"], lengths: Int[Array, "B"], page_size: int, max_pages: int) -> Bool[Array, "B M"]:
    """Which page-table entries are a slot's own: past its `shared` prompt pages, up to its length in tokens."""
    entries = jnp.arange(max_pages)
    used = (lengths + page_size - 1) // page_size
    return (entries >= shared[:, None]) & (entries < used[:, None])
