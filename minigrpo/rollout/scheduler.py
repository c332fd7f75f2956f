"""Scheduling on the device: which completions hold a slot, and which pages of the KV cache they own.

Four verbs: `admit` a waiting completion into a slot, `extend` a running one by a page, `preempt` the youngest when
pages are short, `free` what has ended. A preempted completion keeps its tokens. When it is admitted again, it gets
pages for all of them, and the decode step fills these many tokens at a time before it samples on.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

WAITING, RUNNING, DONE = 0, 1, 2

FIRST_GUESS = 0.25
"""Expected length of completions, as a share of the limit, while none of them has ended."""


@dataclasses.dataclass(frozen=True)
class PageSpec:
    """Static sizes of the page pool and of the completions that share it."""

    page_size: int
    num_pages: int
    table_entries: int
    """Pages of the longest prompt and completion."""
    group: int
    """Completions per prompt."""
    max_tokens: int
    """Longest completion."""

    def pages(self, tokens: Int[Array, "*S"]) -> Int[Array, "*S"]:
        """Return the pages that `tokens` cached tokens fill."""
        return (tokens + self.page_size - 1) // self.page_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """Free pages: stack[:top], taken from the end. A page number >= the pool's size means no page."""

    stack: Any  # int32 [P]
    top: Any  # int32 scalar


def full_pool(num_pages: int, reserved: Int[Array, ""]) -> Pool:
    """Return a pool in which every page but the first `reserved` is free."""
    free = num_pages - reserved
    stack = jnp.arange(num_pages, dtype=jnp.int32) + reserved
    return Pool(stack=jnp.where(jnp.arange(num_pages) < free, stack, num_pages), top=jnp.int32(free))


def allocate(pool: Pool, wanted: Bool[Array, " N"]) -> tuple[Pool, Int[Array, " N"]]:
    """Take a page where one is wanted; the pool's size where none is. The pool must hold enough."""
    rank = jnp.cumsum(wanted) - 1
    pages = jnp.where(wanted, pool.stack[pool.top - 1 - rank], pool.stack.shape[0])
    return dataclasses.replace(pool, top=pool.top - wanted.sum()), pages


def give_back(pool: Pool, pages: Int[Array, " N"], returned: Bool[Array, " N"]) -> Pool:
    """Push pages[returned] back on the stack."""
    targets = jnp.where(returned, pool.top + jnp.cumsum(returned) - 1, pool.stack.shape[0])
    return Pool(stack=pool.stack.at[targets].set(pages, mode="drop"), top=pool.top + returned.sum())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts of one device. A length of 0 is padding and decodes nothing."""

    tokens: Any  # int32 [P, T]
    lengths: Any  # int32 [P]
    uids: Any  # int32 [P], names for the random numbers
    first_member: Any  # int32 [P], the number in its group of the prompt's first completion here


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Completions being decoded. Example of one: completion 5, cached 130, shared 2, page_table [7, 9, 31, P, ...]."""

    completion: Any  # int32 [S], the number of completions where the slot is empty
    cached: Any  # int32 [S], tokens in the cache, prompt included
    shared: Any  # int32 [S], leading pages that belong to the prompt
    page_table: Any  # int32 [S, M]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """State of one device's rollout of B completions in S slots.

    Example of three completions in two slots after two steps, the first having ended with stop token 2: status
    [RUNNING, RUNNING, WAITING], tokens [[8, 2, 0], [9, 4, 0], [0, 0, 0]], lengths [2, 2, 0], ended [True, False],
    scheduled False, counts [2, 4, 0, 0].
    """

    pages: Any  # float [L, P, ...], laid out as the backend's attention reads them
    pool: Pool
    slots: Slots
    status: Any  # int32 [B]
    tokens: Any  # int32 [B, C]
    logprobs: Any  # float [B, C]
    lengths: Any  # int32 [B], tokens sampled
    ended: Any  # bool [S], slots whose completion ended with the last token and has not left yet
    scheduled: Any  # bool scalar, true right after `schedule`, before the next decode step
    counts: Any  # int32 [4], see COUNTS
    kept: Any = None  # KeptSet of [B, C], None where sampling leaves nothing out


COUNTS = ("steps", "busy", "preempted", "refilled")
"""Decode steps, their sum of slots that sampled, preemptions, and tokens whose keys and values were computed again."""


def running(state: State) -> Bool[Array, " S"]:
    """Tell which slots hold a completion."""
    return state.slots.completion < state.status.shape[0]


def known_tokens(spec: PageSpec, prompts: PromptBatch, state: State) -> Int[Array, " S"]:
    """Return every slot's tokens, prompt and sampled ones. The last is not in the cache: it is decoded next."""
    completion = jnp.minimum(state.slots.completion, state.status.shape[0] - 1)
    return prompts.lengths[completion // spec.group] + state.lengths[completion]


def expected_length(spec: PageSpec, state: State) -> Float[Array, ""]:
    """Estimate a completion's length by those that have ended, weighed with a first guess."""
    done = state.status == DONE
    known, count = jnp.where(done, state.lengths, 0).sum(), done.sum() + 1
    return (known.astype(jnp.float32) + FIRST_GUESS * spec.max_tokens) / count.astype(jnp.float32)


def reserved_pages(spec: PageSpec, prompts: PromptBatch, state: State) -> Int[Array, ""]:
    """Return the pages by which running completions are expected to grow."""
    completion = jnp.minimum(state.slots.completion, state.status.shape[0] - 1)
    length = state.lengths[completion]
    likely = jnp.maximum(expected_length(spec, state), 1.25 * length.astype(jnp.float32)).astype(jnp.int32)
    tokens = prompts.lengths[completion // spec.group] + jnp.clip(likely, length + 1, spec.max_tokens)
    growth = spec.pages(tokens) - spec.pages(state.slots.cached)
    return jnp.where(running(state), jnp.maximum(growth, 1), 0).sum()


def next_waiting(state: State) -> Int[Array, ""]:
    """Return the first waiting completion."""
    return jnp.argmax(state.status == WAITING)


def wanted_entries(spec: PageSpec, prompts: PromptBatch, state: State, index: Array) -> Bool[Array, " M"]:
    """Mark the page-table entries that a completion owns on admission: past the prompt's full pages, for all tokens."""
    cached = prompts.lengths[index // spec.group] - 1
    entries = jnp.arange(spec.table_entries)
    return (entries >= cached // spec.page_size) & (entries < spec.pages(cached + state.lengths[index]))


def can_admit(spec: PageSpec, prompts: PromptBatch, state: State) -> Bool[Array, ""]:
    """Tell if a slot is empty, a completion waits, and pages remain after everybody's expected growth."""
    active = running(state)

    def has_room() -> Array:
        index = next_waiting(state)
        own = wanted_entries(spec, prompts, state, index).sum()
        remaining = jnp.maximum(expected_length(spec, state).astype(jnp.int32) - state.lengths[index], 1)
        needed = own + spec.pages(remaining) + reserved_pages(spec, prompts, state)
        return (state.pool.top >= needed) | ~active.any()

    return jax.lax.cond(~active.all() & (state.status == WAITING).any(), has_room, lambda: jnp.bool(False))


def admit(spec: PageSpec, prompts: PromptBatch, prompt_table: Int[Array, "P M"], state: State) -> State:
    """Put the first waiting completion into an empty slot, with its own copy of the prompt's last, partial page."""
    index, slot = next_waiting(state), jnp.argmin(running(state))
    prompt = index // spec.group
    cached = prompts.lengths[prompt] - 1
    shared = cached // spec.page_size
    wanted = wanted_entries(spec, prompts, state, index)
    pool, own = allocate(state.pool, wanted)
    source = state.pages[:, jnp.minimum(prompt_table[prompt, shared], spec.num_pages - 1)]
    target = jnp.where(cached % spec.page_size > 0, own[shared], spec.num_pages)
    fresh = Slots(
        completion=index, cached=cached, shared=shared, page_table=jnp.where(wanted, own, prompt_table[prompt])
    )
    return dataclasses.replace(
        state,
        pages=state.pages.at[:, target].set(source, mode="drop"),
        pool=pool,
        slots=jax.tree.map(lambda all_slots, one: all_slots.at[slot].set(one), state.slots, fresh),
        status=state.status.at[index].set(RUNNING),
    )


def owned_entries(spec: PageSpec, state: State) -> Bool[Array, "S M"]:
    """Mark the page-table entries that slots own: past the prompt's, as far as pages were given."""
    entries = jnp.arange(spec.table_entries)[None]
    given = state.slots.page_table < spec.num_pages
    return running(state)[:, None] & (entries >= state.slots.shared[:, None]) & given


def free(spec: PageSpec, state: State, leaving: Bool[Array, " S"], status: int) -> State:
    """Empty the `leaving` slots, return their own pages and set their completions' status."""
    slots, total = state.slots, state.status.shape[0]
    owned = owned_entries(spec, state) & leaving[:, None]
    return dataclasses.replace(
        state,
        pool=give_back(state.pool, slots.page_table.reshape(-1), owned.reshape(-1)),
        slots=dataclasses.replace(slots, completion=jnp.where(leaving, total, slots.completion)),
        status=state.status.at[jnp.where(leaving, slots.completion, total)].set(status, mode="drop"),
    )


def needs_page(spec: PageSpec, state: State) -> Bool[Array, " S"]:
    """Tell which slots are about to write into a page that they do not have."""
    entry = jnp.minimum(state.slots.cached // spec.page_size, spec.table_entries - 1)
    page = jnp.take_along_axis(state.slots.page_table, entry[:, None], axis=1)[:, 0]
    return running(state) & (page >= spec.num_pages)


def is_short(spec: PageSpec, state: State) -> Bool[Array, ""]:
    """Tell if more slots are about to start a page than pages are left."""
    return needs_page(spec, state).sum() > state.pool.top


def preempt(spec: PageSpec, state: State) -> State:
    """Take the youngest completion's slot and pages; it waits with the tokens that it has so far.

    The oldest unfinished completion is never preempted and its pages always fit, so every completion ends.
    """
    youngest = jnp.argmax(jnp.where(running(state), state.slots.completion, -1))
    state = dataclasses.replace(state, counts=state.counts.at[COUNTS.index("preempted")].add(1))
    return free(spec, state, jnp.arange(len(state.slots.completion)) == youngest, WAITING)


def schedule(spec: PageSpec, prompts: PromptBatch, prompt_table: Int[Array, "P M"], state: State) -> State:
    """Free slots that ended, admit waiting completions that fit, and preempt the youngest while pages are short."""
    state = free(spec, state, state.ended, DONE)
    fits, put = functools.partial(can_admit, spec, prompts), functools.partial(admit, spec, prompts, prompt_table)
    state = jax.lax.while_loop(fits, put, state)
    state = jax.lax.while_loop(functools.partial(is_short, spec), functools.partial(preempt, spec), state)
    return dataclasses.replace(state, ended=jnp.zeros_like(state.ended), scheduled=jnp.bool(True))


def can_decode(spec: PageSpec, prompts: PromptBatch, state: State) -> Bool[Array, ""]:
    """Tell if no completion is about to leave, enter or be preempted: the one question between two decode steps.

    Right after `schedule` a step is always taken, so that each turn of the outer loop decodes at least one token, even
    where the last free page makes the next admission or preemption due at once.
    """
    return state.scheduled | ~(state.ended.any() | can_admit(spec, prompts, state) | is_short(spec, state))


def extend(spec: PageSpec, state: State) -> State:
    """Give a page to every slot about to start one."""
    wanted = needs_page(spec, state)
    pool, page = allocate(state.pool, wanted)
    slots = state.slots
    entry = jnp.where(wanted, slots.cached // spec.page_size, spec.table_entries)
    table = slots.page_table.at[jnp.arange(len(entry)), entry].set(page, mode="drop")
    return dataclasses.replace(state, pool=pool, slots=dataclasses.replace(slots, page_table=table))


def shrink(state: State, size: int) -> State:
    """Keep `size` slots, the running ones first. None has `ended` here: `schedule` saw to that."""
    order = jnp.argsort(~running(state), stable=True)[:size]
    return dataclasses.replace(state, slots=jax.tree.map(lambda x: x[order], state.slots), ended=state.ended[order])
