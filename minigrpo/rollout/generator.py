"""Prompts -> completions: prefill once per prompt, then one device program decodes every completion.

Each device works through its own completions with no collective: weights are gathered once per rollout, prompts are
prefilled once and their full pages shared by the group, and inside one while loop ended completions give their pages
back and waiting ones take their slots. A completion's random numbers depend on (key, prompt uid, member, position)
alone, so neither slots, page size, pool size nor the batch around it change it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from minigrpo.config import RolloutOptions, UsageError
from minigrpo.kernels.backend import UNFUSED, Backend, DecodeShape, FusedProjections, PagedCache
from minigrpo.model.params import ModelConfig, Params, merge_adapters
from minigrpo.model.qwen import (
    Angles,
    ComputeSpec,
    LayerContext,
    Qwen,
    cast_weights,
    rope_angles,
    unembed,
)
from minigrpo.rollout.sampling import KeptSet, Sampler, penalise, sample
from minigrpo.rollout.scheduler import (
    COUNTS,
    DONE,
    WAITING,
    PageSpec,
    PromptBatch,
    Slots,
    State,
    can_decode,
    extend,
    full_pool,
    known_tokens,
    running,
    schedule,
    shrink,
)
from minigrpo.runtime.mesh import by_sequence, data_spec, fetch, put, replicated

PREFILL_ROWS = 8
"""Rows of prompts prefilled at a time on one device."""

TAIL_SHRINK = 4
"""When no completion waits, the batch shrinks by this factor each time the running ones fit. Every size is compiled."""


@dataclasses.dataclass(frozen=True)
class DecodeLayout:
    """Layout of the policy's weights for decoding, whatever is sampled from them."""

    policy: ModelConfig
    """The model that is trained."""
    mesh: Mesh
    dtype: Any
    unroll_layers: bool


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
    """Everything static about a rollout program."""

    policy: ModelConfig
    """The model that is trained."""
    mesh: Mesh
    backend: Backend
    dtype: Any
    sampler: Sampler
    num_tokens: int
    """Real tokens, of which the head may have more rows."""
    stop_tokens: tuple[int, ...]
    prompt_tokens: int
    """Longest prompt."""
    max_tokens: int
    """Longest completion."""
    page_size: int
    slots: int = 0
    """Most completions decoded at once per device; 0 is as many as memory allows."""
    pool_pages: int = 0
    """Pages of a device's pool; 0 is enough for every slot at full length, within `pool_limit`."""
    pool_limit: int = 0
    """Most pages of a pool whose size no flag gives; 0 is no limit."""
    on_token: Callable[[Any, Any, Any], None] | None = None
    """Called while decoding with each slot's completion, position and token."""

    @property
    def layout(self) -> DecodeLayout:
        """Return the layout of the weights."""
        return DecodeLayout(self.policy, self.mesh, self.dtype, self.backend.unroll_layers)

    @property
    def model(self) -> ModelConfig:
        """Return the policy as it is decoded."""
        return self.policy.decoded

    @property
    def cache(self) -> PagedCache:
        """Return this backend's KV cache for such pages."""
        return self.backend.paged_cache(self.page_size, self.policy.head_dim, self.dtype)

    @property
    def prompt_width(self) -> int:
        """Return the positions of a row of prompts: whole pages."""
        return -(-self.prompt_tokens // self.page_size) * self.page_size

    @property
    def completion_pages(self) -> int:
        """Return the most pages of a completion besides the shared ones: its own, and its copy of the prompt's last."""
        return -(-self.max_tokens // self.page_size) + 1

    def least_pages(self, prompts: int) -> int:
        """Return the fewest pages of a device with `prompts` prompts: the prompts' and one completion's."""
        return prompts * (self.prompt_width // self.page_size) + self.completion_pages

    @property
    def table_entries(self) -> int:
        """Return the pages of the longest prompt and completion."""
        return -(-(self.prompt_width + self.max_tokens) // self.page_size)

    def slot_count(self, prompts: int, group: int) -> int:
        """Return the slots of a device: as asked, or for all its completions as far as pool and page tables allow."""
        total, asked = prompts * group, self.slots
        if asked:
            return min(asked, total)
        pages = self.pool_pages or self.pool_limit
        half_full = -(-self.completion_pages // 2)
        by_pool = (pages - prompts * (self.prompt_width // self.page_size)) // half_full if pages else total
        by_table = self.cache.table_bytes // (4 * self.table_entries) if self.cache.table_bytes else total
        return max(1, min(total, by_pool, by_table))

    def num_pages(self, prompts: int, group: int) -> int:
        """Return the pages of a device's pool; UsageError when it cannot hold even one completion."""
        least = self.least_pages(prompts)
        wanted = least + (self.slot_count(prompts, group) - 1) * self.completion_pages
        given = self.pool_pages or min(wanted, self.pool_limit or wanted)
        if given < least:
            size = self.pool_pages or f"{given}, what memory leaves"
            cure = "" if self.pool_pages else "; take fewer prompts at once, or add --offload_optimizer=true"
            raise UsageError(
                f"--pool_pages={size}: at least {least} pages of {self.page_size} tokens are needed per device, "
                f"{least - self.completion_pages} for its prompts and {self.completion_pages} for one completion{cure}"
            )
        return given

    def check_cache(self, slots: int) -> None:
        """Raise UsageError for pages and page tables that the backend's attention cannot take."""
        cache, model = self.cache, self.model
        page = math.prod(cache.page_shape(self.page_size, model.num_key_value_heads, model.head_dim))
        if cache.page_bytes and page * self.dtype.itemsize > cache.page_bytes:
            most = self.page_size * cache.page_bytes // (page * self.dtype.itemsize)
            raise UsageError(f"--page_size={self.page_size}: a page is too large for the kernel; use at most {most}")
        if cache.table_bytes and 4 * slots * self.table_entries > cache.table_bytes:
            tokens = self.prompt_width + self.max_tokens
            fitting = 1 << math.ceil(math.log2(4 * slots * tokens / cache.table_bytes))
            raise UsageError(
                f"--page_size={self.page_size}: the page table of {slots} slots x {self.table_entries} pages is more "
                f"than the {cache.table_bytes >> 10} KiB of scalar memory; use --page_size={fitting} or fewer --slots"
            )

    def page_spec(self, prompts: int, group: int) -> PageSpec:
        """Return the sizes of one device's page pool."""
        self.check_cache(self.slot_count(prompts, group))
        return PageSpec(self.page_size, self.num_pages(prompts, group), self.table_entries, group, self.max_tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillRows:
    """Prompts packed into rows of whole pages, on one device. The first `chunks` chunks of rows are in use.

    Example of one row, with pages of 2 tokens: prompts 0 (5 6 7) and 1 (8 9), without their last tokens, are tokens
    5 6 8 0, position_ids 0 1 0 0, segment_ids 1 1 2 0, prompt 0 1, entry 0 0.
    """

    tokens: Any  # int32 [X, T]
    position_ids: Any  # int32 [X, T]
    segment_ids: Any  # int32 [X, T], 0 is padding
    prompt: Any  # int32 [X, M], the prompt that fills each page; the number of prompts if none
    entry: Any  # int32 [X, M], the page's number within its prompt
    chunks: Any  # int32 [1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Start:
    """Tokens that completions begin with, [B, C] each: all lengths are 0 unless completions are continued."""

    tokens: Any  # int32 [B, C]
    logprobs: Any  # float [B, C]
    lengths: Any  # int32 [B]
    kept: Any = None  # KeptSet of [B, C], as the sampler records them


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Completions of P prompts, G each, on the host; row p*G+g is the g-th of prompt p. NumPy arrays.

    Example of one row: tokens [8, 2, 0, 0], logprobs [-0.3, -0.1, 0, 0], lengths 2, stopped True.
    """

    tokens: Int[np.ndarray, "B C"]
    logprobs: Float[np.ndarray, "B C"] | None
    """As the trainer defines them: of the temperature-scaled softmax over the kept tokens; None for those on file."""
    lengths: Int[np.ndarray, " B"]
    stopped: Bool[np.ndarray, " B"]
    """True where the completion ended with a stop token or text, part of it, rather than at the length limit."""
    kept: KeptSet | None = None
    """What truncated sampling kept, [B, C]; None where every real token could be sampled."""
    decode_steps: int = 0
    occupancy: float = 0.0
    """Mean share of slots that were decoding."""
    preempted: int = 0
    refilled: int = 0
    """Tokens whose keys and values were computed again after a preemption."""
    sampled: int = 0
    """Tokens of all completions, those of groups that were replaced later included."""

    @property
    def completions(self) -> list[list[int]]:
        """Return each completion's own tokens."""
        return [row[:length].tolist() for row, length in zip(self.tokens, self.lengths, strict=True)]


# Prefill


def prompt_pages(spec: PageSpec, prompts: PromptBatch) -> tuple[Int[Array, "P M"], Int[Array, ""]]:
    """Return the page table of every prompt, from page 0 on, and the number of pages they take.

    A prompt's last token is not prefilled: it is the first token that every completion decodes.
    """
    needed = spec.pages(jnp.maximum(prompts.lengths - 1, 0))
    starts = jnp.cumsum(needed) - needed
    entries = jnp.arange(spec.table_entries)[None]
    return jnp.where(entries < needed[:, None], starts[:, None] + entries, spec.num_pages), needed.sum()


def prefill(
    spec: RolloutSpec, weights: Params, rows: PrefillRows, prompt_table: Int[Array, "P M"], pages: Array
) -> Array:
    """Write keys and values of every prompt into its pages, PREFILL_ROWS packed rows at a time."""
    size, num_pages = min(PREFILL_ROWS, len(rows.tokens)), pages.shape[1]
    padded = jnp.pad(prompt_table, ((0, 1), (0, 0)), constant_values=num_pages)

    def fill(index: Array, pages: Array) -> Array:
        chunk = dataclasses.replace(rows, chunks=None)
        chunk = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size), chunk)
        targets = padded[chunk.prompt, chunk.entry]

        def attend(layer: Array, q: Array, k: Array, v: Array, pages: Array) -> tuple[Array, Array]:
            out = spec.backend.causal_attention(q, k, v, chunk.segment_ids)
            return out, spec.cache.fill_pages(pages, layer, targets, k, v)

        context = LayerContext(attend, ComputeSpec(spec.dtype))
        return Qwen(spec.model)(weights, chunk.tokens, chunk.position_ids, context, pages)[1]

    if len(rows.tokens) == size:  # around a loop XLA would keep q and k of all layers in a second layout
        return fill(jnp.int32(0), pages)
    return jax.lax.fori_loop(0, rows.chunks[0], fill, pages)


# Decoding


@dataclasses.dataclass(frozen=True)
class DecodeRows:
    """The tokens of one decode step: one of every slot or, to refill a slot, several of that one.

    Example of two slots: slot 0 1, position 130 57, token 8 11, valid True True, samples True. While slot 1 is refilled
    from position 40 on: slot 1 1, position 40 41, token 7 3, valid True True, samples False.
    """

    slot: Any  # int32 [S]
    position: Any  # int32 [S]
    token: Any  # int32 [S]
    valid: Any  # bool [S]
    samples: Any  # bool scalar, false while a slot is refilled


def choose_rows(spec: PageSpec, prompts: PromptBatch, state: State) -> DecodeRows:
    """Choose the step's tokens: each running slot's last one, or the next tokens of one slot whose cache is behind.

    Row i is slot i's, until a preempted completion comes back without its cache: then all rows replay its tokens.
    """
    slots, lane = state.slots, jnp.arange(len(state.slots.completion))
    behind = running(state) & (slots.cached + 1 < known_tokens(spec, prompts, state))
    refill, refilled_slot = behind.any(), jnp.argmax(behind)
    slot = jnp.where(refill, refilled_slot, lane)
    position = slots.cached[slot] + jnp.where(refill, lane, 0)
    valid = running(state)[slot] & (~refill | (position + 1 < known_tokens(spec, prompts, state)[slot]))
    completion = jnp.minimum(slots.completion[slot], len(state.status) - 1)
    prompt = completion // spec.group
    sampled = position - prompts.lengths[prompt]
    last = prompts.tokens[prompt, jnp.clip(position, 0, prompts.tokens.shape[1] - 1)]
    token = jnp.where(sampled < 0, last, state.tokens[completion, jnp.clip(sampled, 0, spec.max_tokens - 1)])
    return DecodeRows(slot, position, token, valid, ~refill)


def fused_projections(spec: RolloutSpec, rows: int) -> FusedProjections:
    """Return the backend's fused kernels for plain matrices; none where these are int8 or adapted."""
    model = spec.model
    if model.int8 or model.lora:
        return UNFUSED
    sizes = (model.hidden_size, model.intermediate_size, model.head_dim, model.qk_norm)
    return spec.backend.fused_projections(DecodeShape(rows, *sizes, spec.dtype))


def seen_tokens(spec: PageSpec, prompts: PromptBatch, state: State, nothing: int) -> Int[Array, "S N"]:
    """Return every slot's tokens, prompt and sampled ones, and `nothing` where there is none."""
    completion = jnp.minimum(state.slots.completion, len(state.status) - 1)
    prompt = completion // spec.group

    def existing(tokens: Array, lengths: Array) -> Array:
        return jnp.where(jnp.arange(tokens.shape[1])[None] < lengths[:, None], tokens, nothing)

    asked = existing(prompts.tokens[prompt], prompts.lengths[prompt])
    return jnp.concatenate([asked, existing(state.tokens[completion], state.lengths[completion])], axis=1)


def real_logits(spec: RolloutSpec, logits: Float[Array, "S V"], seen: Int[Array, "S N"] | None) -> Float[Array, "S V"]:
    """Set logits of rows that are no tokens to -inf, and penalise tokens `seen`."""
    if logits.shape[1] > spec.num_tokens:
        logits = jnp.where(jnp.arange(logits.shape[1])[None] < spec.num_tokens, logits, -jnp.inf)
    return logits if seen is None else penalise(spec.sampler.repetition_penalty, logits, seen)


def next_tokens(
    spec: RolloutSpec,
    weights: Params,
    angles: Angles,
    rows: DecodeRows,
    state: State,
    uniforms: Float[Array, " S"],
    seen: Int[Array, "S N"] | None,
) -> tuple[Array, Int[Array, " S"], Float[Array, " S"], KeptSet | None]:
    """Feed the step's tokens through the model -> pages, sampled tokens, their log-probs and kept sets.

    Tokens `seen` are penalised. `angles` is a table for every position: XLA would otherwise compute them anew for every
    layer and head.
    """
    page_table = state.slots.page_table[rows.slot]
    page = jnp.take_along_axis(page_table, rows.position[:, None] // spec.page_size, axis=1)[:, 0]
    page = jnp.where(rows.valid, page, state.pages.shape[1])
    lengths = jnp.where(rows.valid, rows.position + 1, 0)
    # Every layer reads these; without the barrier XLA computes them again inside each layer's kernels.
    page_table, page, lengths = jax.lax.optimization_barrier((page_table, page, lengths))

    def attend(layer: Array, q: Array, k: Array, v: Array, pages: Array) -> tuple[Array, Array]:
        pages = spec.cache.append_rows(pages, layer, page, rows.position % spec.page_size, k[:, 0], v[:, 0])
        return spec.cache.paged_attention(q[:, 0], pages, layer, lengths, page_table)[:, None], pages

    context = LayerContext(
        attend=attend,
        compute=ComputeSpec(spec.dtype),
        angles=jax.tree.map(lambda table: table[0, rows.position, None], angles),
        fused=fused_projections(spec, len(rows.slot)),
    )
    model = Qwen(spec.model)
    hidden, pages = model(weights, rows.token[:, None], rows.position[:, None], context, state.pages)
    logits = real_logits(spec, unembed(hidden[:, 0], model.head(weights)), seen)
    return pages, *sample(spec.sampler, logits, uniforms)


def decode(
    spec: RolloutSpec,
    page_spec: PageSpec,
    weights: Params,
    angles: Angles,
    prompts: PromptBatch,
    uniforms: Float[Array, "B C"],
    state: State,
) -> State:
    """Decode one token of every running slot, or fill the cache of one that was preempted."""
    state = extend(page_spec, state)
    rows, slots, total = choose_rows(page_spec, prompts, state), state.slots, len(state.status)
    sampling = running(state) & rows.samples
    completion = jnp.where(sampling, slots.completion, total)
    index = jnp.minimum(completion, total - 1)
    count = state.lengths[index]
    penalised = spec.sampler.repetition_penalty != 1
    seen = seen_tokens(page_spec, prompts, state, spec.model.vocab_size) if penalised else None
    pages, tokens, logprobs, kept = next_tokens(spec, weights, angles, rows, state, uniforms[index, count], seen)
    if spec.on_token:
        jax.debug.callback(spec.on_token, completion, count, tokens)
    filled = jnp.zeros_like(slots.cached).at[rows.slot].add(rows.valid.astype(jnp.int32))
    stopped = jnp.isin(tokens, jnp.array(spec.stop_tokens)) | (count + 1 == spec.max_tokens)
    refilled = jnp.where(rows.samples, 0, rows.valid.sum())
    return dataclasses.replace(
        state,
        pages=pages,
        slots=dataclasses.replace(slots, cached=slots.cached + filled),
        tokens=state.tokens.at[completion, count].set(tokens, mode="drop"),
        logprobs=state.logprobs.at[completion, count].set(logprobs, mode="drop"),
        lengths=state.lengths.at[completion].set(count + 1, mode="drop"),
        ended=state.ended | (sampling & stopped),
        scheduled=jnp.bool(False),
        counts=state.counts + jnp.stack([jnp.int32(1), sampling.sum(), jnp.int32(0), refilled]),
        kept=jax.tree.map(lambda all_kept, new: all_kept.at[completion, count].set(new, mode="drop"), state.kept, kept),
    )


def batch_sizes(slots: int, least: int) -> list[int]:
    """Return the sizes of the decoding batch, at first and in the tail: each is less than half of the one before.

    >>> batch_sizes(64, 4), batch_sizes(32, 4)
    ([64, 16, 4], [32, 8])
    """
    sizes = [slots]
    while sizes[-1] > 2 * least:
        sizes.append(max(least, -(-sizes[-1] // TAIL_SHRINK)))
    return sizes


def more_left_than(count: int, state: State) -> Bool[Array, ""]:
    """Tell if more completions than `count` are not done."""
    return (state.status != DONE).sum() > count


def decode_all(
    spec: RolloutSpec,
    page_spec: PageSpec,
    weights: Params,
    prompts: PromptBatch,
    uniforms: Float[Array, "B C"],
    prompt_table: Int[Array, "P M"],
    state: State,
) -> State:
    """Decode until every completion is done, in a batch that shrinks once fewer are left than it holds."""
    positions = jnp.arange(page_spec.table_entries * spec.page_size)
    angles = rope_angles(positions[None], spec.model)
    sizes = batch_sizes(len(state.slots.completion), spec.backend.least_batch)

    def step(state: State) -> State:
        return decode(spec, page_spec, weights, angles, prompts, uniforms, state)

    def turn(more_left: Callable[[State], Array], state: State) -> State:
        state = schedule(page_spec, prompts, prompt_table, state)
        return jax.lax.while_loop(lambda s: can_decode(page_spec, prompts, s) & more_left(s), step, state)

    for size, following in zip(sizes, sizes[1:] + [0], strict=True):
        more_left = functools.partial(more_left_than, following)
        state = jax.lax.while_loop(more_left, functools.partial(turn, more_left), shrink(state, size))
    return state


def initial_state(spec: RolloutSpec, page_spec: PageSpec, prompts: PromptBatch, start: Start, taken: Array) -> State:
    """Return a state with every slot empty and `taken` pages given to prompts, which are yet to be prefilled."""
    total = len(start.lengths)
    slots, model = spec.slot_count(total // page_spec.group, page_spec.group), spec.model
    zeros = jnp.zeros(slots, jnp.int32)
    last = jnp.take_along_axis(start.tokens, jnp.maximum(start.lengths - 1, 0)[:, None], axis=1)[:, 0]
    ended = jnp.isin(last, jnp.array(spec.stop_tokens)) & (start.lengths > 0) | (start.lengths == spec.max_tokens)
    waits = (jnp.repeat(prompts.lengths, page_spec.group) > 0) & ~ended
    sizes = (model.num_hidden_layers, page_spec.num_pages, spec.page_size, model.num_key_value_heads, model.head_dim)
    return State(
        pages=spec.cache.empty_pages(*sizes, spec.dtype),
        pool=full_pool(page_spec.num_pages, taken),
        slots=Slots(
            zeros + total, zeros, zeros, jnp.full((slots, page_spec.table_entries), page_spec.num_pages, jnp.int32)
        ),
        status=jnp.where(waits, WAITING, DONE),
        tokens=start.tokens,
        logprobs=start.logprobs,
        lengths=start.lengths,
        ended=jnp.zeros(slots, bool),
        scheduled=jnp.bool(False),
        counts=jnp.zeros(len(COUNTS), jnp.int32),
        kept=start.kept,
    )


def all_uniforms(spec: PageSpec, prompts: PromptBatch, key: Array) -> Float[Array, "B C"]:
    """Draw the random number of every token, which depends on the prompt's uid, the member and the position alone."""
    members = prompts.first_member[:, None] + jnp.arange(spec.group)[None]

    def one(uid: Array, member: Array, position: Array) -> Array:
        return jax.random.uniform(functools.reduce(jax.random.fold_in, (uid, member, position), key))

    of_positions = jax.vmap(one, in_axes=(None, None, 0))
    of_members = jax.vmap(of_positions, in_axes=(None, 0, None))
    of_prompts = jax.vmap(of_members, in_axes=(0, 0, None))
    return of_prompts(prompts.uids, members, jnp.arange(spec.max_tokens)).reshape(-1, spec.max_tokens)


def run_device(
    spec: RolloutSpec, weights: Params, prompts: PromptBatch, rows: PrefillRows, start: Start, key: Array
) -> tuple[Array, Array, Array, Array, KeptSet | None]:
    """Run one device's whole rollout -> tokens, log-probs, lengths, counts [1, 4], and kept sets."""
    count = len(prompts.lengths)
    page_spec = spec.page_spec(count, len(start.lengths) // count)
    prompt_table, taken = prompt_pages(page_spec, prompts)
    state = initial_state(spec, page_spec, prompts, start, taken)
    state = dataclasses.replace(state, pages=prefill(spec, weights, rows, prompt_table, state.pages))
    uniforms = all_uniforms(page_spec, prompts, key)
    state = decode_all(spec, page_spec, weights, prompts, uniforms, prompt_table, state)
    return state.tokens, state.logprobs, state.lengths, state.counts[None], state.kept


def run_mesh(
    spec: RolloutSpec, weights: Params, prompts: PromptBatch, rows: PrefillRows, start: Start, seed: Int[Array, "2"]
) -> tuple[Array, Array, Array, Array, KeptSet | None]:
    """Run every device's rollout of its share of the prompts."""
    key = jax.random.fold_in(jax.random.key(seed[0]), seed[1])
    own, whole = data_spec(spec.mesh), PartitionSpec()
    generate = jax.shard_map(
        functools.partial(run_device, spec),
        mesh=spec.mesh,
        in_specs=(whole, own, own, own, whole),
        out_specs=own,
        check_vma=False,
    )
    return jax.lax.with_sharding_constraint(generate(weights, prompts, rows, start, key), replicated(spec.mesh))


@functools.cache
def rollout_program(backend: Backend) -> jax.stages.Wrapped:
    """Return the jitted `run_mesh` with the backend's compiler options."""
    return jax.jit(run_mesh, static_argnums=0, compiler_options=dict(backend.compiler_options) or None)


# The policy as it is decoded


@functools.partial(jax.jit, static_argnums=0)
def decode_weights(layout: DecodeLayout, params: Params) -> Params:
    """Lay the policy out for decoding: in the compute dtype, whole on every device, its layers as the backend wants.

    Layers are gathered one after the other, so that one layer's temporaries are there at a time.
    """
    weights = params if layout.policy.decoded == layout.policy else merge_adapters(layout.policy, params)

    def gather(tree: Params) -> Params:
        return jax.lax.with_sharding_constraint(cast_weights(tree, layout.dtype), replicated(layout.mesh))

    layers = weights["layers"]
    if layout.unroll_layers:
        count = range(layout.policy.num_hidden_layers)
        gathered: Any = [gather(jax.tree.map(lambda w, layer=layer: w[layer], layers)) for layer in count]
    else:
        gathered = jax.lax.with_sharding_constraint(jax.lax.map(gather, layers), replicated(layout.mesh))
    ends = {name: value for name, value in weights.items() if name != "layers"}
    return gather(ends) | {"layers": gathered}


def is_decodable(layout: DecodeLayout, params: Params) -> bool:
    """Tell if the policy is laid out for decoding as it is."""
    if layout.unroll_layers or layout.policy.decoded != layout.policy:
        return False
    return all(x.dtype == layout.dtype and x.is_fully_replicated for x in jax.tree.leaves(params))


# The host's side


def split_groups(prompts: int, group: int, devices: int) -> tuple[int, int]:
    """Return the parts that groups are split into and the entries of all devices, by which every device has as many.

    A split prompt is an entry of its own for every part; where no split is even, empty entries fill up.

    >>> split_groups(12, 8, 8), split_groups(9, 8, 8), split_groups(9, 5, 8)
    ((2, 24), (8, 72), (1, 16))
    """
    splits = [k for k in range(1, group + 1) if group % k == 0]
    split = next((k for k in splits if prompts * k % devices == 0), 1)
    return split, prompts * split + (-prompts * split) % devices


def deal_prompts(
    spec: RolloutSpec, prompts: list[list[int]], uids: list[int], group: int
) -> tuple[PromptBatch, PrefillRows, int]:
    """Deal prompts to devices -> prompts, the rows they are prefilled in, and the completions of an entry."""
    devices = spec.mesh.size
    split, count = split_groups(len(prompts), group, devices)
    tokens = np.zeros((count, spec.prompt_width), np.int32)
    lengths, names, first = (np.zeros(count, np.int32) for _ in range(3))
    for row in range(len(prompts) * split):
        prompt = prompts[row // split]
        tokens[row, : len(prompt)] = prompt
        lengths[row], names[row], first[row] = len(prompt), uids[row // split], row % split * (group // split)
    batch = PromptBatch(tokens, lengths, names, first)
    rows = [
        pack_prompts(spec, *device)
        for device in zip(np.split(tokens, devices), np.split(lengths, devices), strict=True)
    ]
    return batch, jax.tree.map(lambda *parts: np.concatenate(parts), *rows), group // split


def pack_prompts(spec: RolloutSpec, tokens: Int[np.ndarray, "P T"], lengths: Int[np.ndarray, " P"]) -> PrefillRows:
    """Pack one device's prompts, without their last tokens, into rows of whole pages: first fit, longest first."""
    page, width = spec.page_size, spec.prompt_width
    chunk = min(PREFILL_ROWS, len(lengths))
    count = -(-len(lengths) // chunk) * chunk
    packed, positions, segments = (np.zeros((count, width), np.int32) for _ in range(3))
    prompt, entry = np.full((count, width // page), len(lengths), np.int32), np.zeros((count, width // page), np.int32)
    used = np.zeros(count, np.int64)
    for one in np.argsort(-lengths, kind="stable"):
        cached = max(0, int(lengths[one]) - 1)
        pages = -(-cached // page)
        row = int(np.argmax(used + pages * page <= width))
        at, first = int(used[row]), int(used[row]) // page
        packed[row, at : at + cached], positions[row, at : at + cached] = tokens[one, :cached], np.arange(cached)
        segments[row, at : at + cached] = 1 + first
        prompt[row, first : first + pages], entry[row, first : first + pages] = one, np.arange(pages)
        used[row] += pages * page
    chunks = np.array([-(-np.count_nonzero(used) // chunk)], np.int32)
    return PrefillRows(packed, positions, segments, prompt, entry, chunks)


def no_start(spec: RolloutSpec, total: int) -> Start:
    """Return the start of completions that have no tokens yet."""
    zeros = np.zeros((total, spec.max_tokens), np.int32)
    numbers = zeros.astype(np.float32)
    kept = KeptSet(numbers, numbers) if spec.sampler.truncates else None
    return Start(zeros, numbers, np.zeros(total, np.int32), kept)


def make_rollout(spec: RolloutSpec, total: int, slots: int, outs: tuple[Any, ...]) -> Rollout:
    """Collect a program's results of the first `total` completions."""
    tokens, logprobs, lengths, kept = jax.tree.map(lambda x: x[:total], (*outs[:3], outs[4]))
    last = np.take_along_axis(tokens, np.maximum(lengths[:, None] - 1, 0), axis=1)[:, 0]
    counts = dict(zip(COUNTS, outs[3].T, strict=True))
    return Rollout(
        tokens=tokens,
        logprobs=logprobs,
        lengths=lengths,
        stopped=np.isin(last, spec.stop_tokens),
        kept=kept,
        decode_steps=int(counts["steps"].max()),
        occupancy=float(counts["busy"].sum() / max(1, counts["steps"].sum() * slots)),
        preempted=int(counts["preempted"].sum()),
        refilled=int(counts["refilled"].sum()),
        sampled=int(lengths.sum()),
    )


@dataclasses.dataclass(frozen=True)
class Generator:
    """Generates completions with one spec; its program is compiled once for every number of prompts."""

    spec: RolloutSpec

    def __call__(
        self,
        params: Params,
        prompts: list[list[int]],
        uids: list[int],
        group: int,
        seed: tuple[int, int],
        start: Start | None = None,
    ) -> Rollout:
        """Sample `group` completions of each prompt (token ids, at least one each).

        `seed` is the run's seed and the step; `uids` name the prompts: together they fix the random numbers. `start`
        has tokens [P*group, C] that completions continue from.
        """
        spec, total = self.spec, len(prompts) * group
        weights = params if is_decodable(spec.layout, params) else decode_weights(spec.layout, params)
        batch, rows, row_group = deal_prompts(spec, prompts, uids, group)
        count = len(batch.lengths) * row_group
        given = no_start(spec, count)
        if start is not None:
            given = jax.tree.map(lambda blank, own: np.concatenate([own, blank[total:]]), given, start)
        inputs = put((batch, rows, given), by_sequence(spec.mesh))
        key = put(np.array(seed, np.int32), replicated(spec.mesh))
        outs = rollout_program(spec.backend)(spec, weights, *inputs, key)
        slots = spec.slot_count(len(batch.lengths) // spec.mesh.size, row_group)
        return make_rollout(spec, total, slots, jax.tree.map(fetch, outs))


def rollout_spec(
    config: ModelConfig,
    mesh: Mesh,
    backend: Backend,
    dtype: Any,
    options: RolloutOptions,
    prompt_tokens: int,
    num_tokens: int,
    stop_tokens: tuple[int, ...],
) -> RolloutSpec:
    """Return the spec of a rollout with these options."""
    return RolloutSpec(
        policy=config,
        mesh=mesh,
        backend=backend,
        dtype=jnp.dtype(dtype),
        sampler=Sampler(options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty),
        num_tokens=num_tokens,
        stop_tokens=stop_tokens,
        prompt_tokens=prompt_tokens,
        max_tokens=options.max_completion_length,
        page_size=options.page_size,
        slots=options.slot_limit,
        pool_pages=options.pool_pages,
    )
