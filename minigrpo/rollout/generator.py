"""Prompts -> completions: prefill once per prompt, then one device program decodes every completion.

Each device works through its own completions with no collective: weights are gathered once per rollout, prompts are
prefilled once and their full pages shared by the group, and inside one while loop finished slots give their pages back
and take the next waiting completion. A completion's random numbers depend on (key, prompt id, index in group,
position) alone, so neither slots, page size, pool size nor the batch around it change it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from minigrpo.config import RolloutOptions, UsageError
from minigrpo.kernels.paged_attention import append_rows, empty_pages, fill_pages, paged_attention
from minigrpo.model.attention import causal_attention
from minigrpo.model.lora import merge
from minigrpo.model.qwen import (
    PROJECTIONS,
    UNFUSED,
    Angles,
    EachLayer,
    Fused,
    ModelConfig,
    Params,
    Qwen,
    abstract_params,
    layer_dims,
    leaf_name,
    rope_angles,
    unchanged,
    unembed,
)
from minigrpo.rollout import scheduler as cache
from minigrpo.rollout.sampling import Sampler, sample
from minigrpo.runtime.mesh import (
    DATA,
    Layout,
    by_sequence,
    in_dtype,
    known_options,
    launch,
    put,
    replicated,
    worker_mesh,
)

WAITING, RUNNING, DONE = 0, 1, 2
PREFILL_ROWS = 8
"""Prompts prefilled at a time on one device."""
TAIL_SHRINK = 4
"""When no completion waits, the batch shrinks by this factor each time the running ones fit. Every size is compiled."""
LEAST_BATCH, GPU_LEAST_BATCH = 4, 64
"""No batch is split into fewer, or shrunk by half or less: each size is compiled, on a GPU with its layers unrolled."""
CPU_PARTS = 8
"""Parts that the CPU computes a matrix's outputs in, where they divide them."""
CACHED_BYTES = 24 << 20
"""Weights that a CPU's caches hold, measured with 32 MB of them: a device per core decodes these faster than one."""
WIDE_VECTORS = {"xla_cpu_prefer_vector_width": 512}
"""XLA on the CPU prefers vectors of 256 bits; attention's sums gain by 512 where the machine has them."""


@dataclasses.dataclass(frozen=True)
class RolloutPlan:
    """Everything static about a rollout program."""

    policy: ModelConfig
    """The model that is trained."""
    model: ModelConfig
    """The same as it is decoded."""
    graph: nnx.GraphDef
    mesh: Mesh
    dtype: Any
    sampler: Sampler
    num_tokens: int
    stop_tokens: tuple[int, ...]
    group: int
    """Completions per prompt row on one device."""
    max_tokens: int
    page_size: int
    slots: int
    pool_pages: int
    pool_limit: int = 0
    """Most pages of a pool whose size no flag gives; 0 is no limit."""
    watch: Callable[[Any, Any, Any], None] | None = None
    """Is told, while decoding: each slot's completion, position and token."""

    @property
    def device(self) -> jax.Device:
        return self.mesh.devices.flat[0]

    @property
    def on_cpu(self) -> bool:
        return self.device.platform == "cpu"

    @property
    def layers_apart(self) -> bool:
        """Whether layers are unrolled over weights of their own: a scan would copy each layer's, but not on TPU."""
        return self.device.platform != "tpu"

    def max_pages(self, prompt_width: int) -> int:
        """Entries of a page table: pages of the longest prompt and completion."""
        return -(-(prompt_width + self.max_tokens) // self.page_size)

    def own_pages(self) -> int:
        """Pages one completion may need besides its prompt's shared ones."""
        return -(-self.max_tokens // self.page_size) + 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """One device's prompts. ids name them for the random numbers; a length of 0 is padding and decodes nothing."""

    tokens: Any  # int32 [P, T]
    lengths: Any  # int32 [P]
    ids: Any  # int32 [P]
    first_in_group: Any  # int32 [P]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The completions being decoded. `completion` is the number of completions where the slot is empty."""

    completion: Any  # int32 [S]
    token: Any  # int32 [S]
    length: Any  # int32 [S]
    """Tokens in the cache, which is also the position of `token`."""
    shared: Any  # int32 [S]
    """Leading page-table entries that belong to the prompt."""
    table: Any  # int32 [S, M]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """One device's rollout in progress."""

    pages: Any  # float [L, P, ...], laid out as the platform's attention reads them
    pool: cache.Pool
    slots: Slots
    status: Any  # int32 [B]
    tokens: Any  # int32 [B, C]
    logprobs: Any  # float [B, C]
    lengths: Any  # int32 [B]
    ended: Any  # bool [S]
    """Slots whose completion ended with the last token and has not left yet."""
    scheduled: Any  # bool scalar
    """Whether nothing was decoded since completions last left and took slots."""
    steps: Any  # int32 scalar
    busy: Any  # int32 scalar
    """Sum over steps of slots that were decoding."""


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Completions of P prompts, G each, on the host; row p*G+g is the g-th of prompt p. NumPy arrays."""

    tokens: Int[np.ndarray, "B C"]
    logprobs: Float[np.ndarray, "B C"] | None
    """As the trainer defines them: of the temperature-scaled softmax over all real tokens; None for those on file."""
    lengths: Int[np.ndarray, "B"]
    stopped: Bool[np.ndarray, "B"]
    """Whether the completion ended with a stop token (which is part of it) rather than at the length limit."""
    decode_steps: int
    occupancy: float
    """Mean share of slots that were decoding."""

    @property
    def completions(self) -> list[list[int]]:
        """Each completion's own tokens."""
        return [row[:length].tolist() for row, length in zip(self.tokens, self.lengths, strict=True)]


def update(state: State, **fields: Any) -> State:
    return dataclasses.replace(state, **fields)


def running(state: State) -> Bool[Array, "S"]:
    return state.slots.completion < state.status.shape[0]


# Prefill


def prompt_tables(plan: RolloutPlan, prompts: Prompts) -> tuple[Int[Array, "P M"], Int[Array, ""]]:
    """Page table of every prompt, packed from page 0 on, and the number of pages they take.

    A prompt's last token is not prefilled: it is the first token every completion decodes.
    """
    needed = (jnp.maximum(prompts.lengths - 1, 0) + plan.page_size - 1) // plan.page_size
    starts = jnp.cumsum(needed) - needed
    entries = jnp.arange(plan.max_pages(prompts.tokens.shape[1]))
    return jnp.where(entries < needed[:, None], starts[:, None] + entries, num_pages(plan, prompts)), needed.sum()


def least_pages(plan: RolloutPlan, prompts: Prompts) -> int:
    """Pages that one device cannot do without: those of its prompts and of one completion."""
    rows, width = prompts.tokens.shape
    return rows * -(-width // plan.page_size) + plan.own_pages()


def num_pages(plan: RolloutPlan, prompts: Prompts) -> int:
    """Pages of one device's pool; UsageError when it cannot hold even one completion."""
    least, slots = least_pages(plan, prompts), min(plan.slots, prompts.tokens.shape[0] * plan.group)
    wanted = least + (slots - 1) * plan.own_pages()
    given = plan.pool_pages or min(wanted, plan.pool_limit or wanted)
    if given < least:
        size = plan.pool_pages or f"{given}, what memory leaves"
        raise UsageError(
            f"--pool_pages={size}: at least {least} pages of {plan.page_size} tokens are needed per device, "
            f"{least - plan.own_pages()} for its prompts and {plan.own_pages()} for one completion"
        )
    return given


def prefill(
    plan: RolloutPlan, model: Qwen, each_layer: EachLayer, prompts: Prompts, table: Array, pages: Array
) -> Array:
    """Writes keys and values of every prompt into its pages, PREFILL_ROWS prompts at a time."""
    rows, width = prompts.tokens.shape
    chunk = min(PREFILL_ROWS, rows)
    entries = -(-width // plan.page_size)
    padded = jnp.pad(prompts.tokens, ((0, -rows % chunk), (0, entries * plan.page_size - width)))
    targets = jnp.pad(table[:, :entries], ((0, -rows % chunk), (0, 0)), constant_values=pages.shape[1])
    positions = jnp.broadcast_to(jnp.arange(padded.shape[1]), (chunk, padded.shape[1]))

    def fill(pages, chunked):
        tokens, targets = chunked

        def attend(layer, q, k, v, pages):
            out = causal_attention(plan.device.platform, q, k, v)
            return out, fill_pages(plan.device, pages, layer, targets, k, v)

        return model(tokens, positions, attend, pages, Layout(plan.dtype), each_layer=each_layer)[1], None

    chunks = jax.tree.map(lambda x: x.reshape(-1, chunk, x.shape[1]), (padded, targets))
    return jax.lax.scan(fill, pages, chunks)[0]


# Scheduling


def can_admit(state: State) -> Bool[Array, ""]:
    """A slot is empty, a completion waits, and a page is left for it beside one for every running slot."""
    active = running(state)
    room = (state.pool.top > active.sum()) | ~active.any()
    return ~active.all() & (state.status == WAITING).any() & room


def admit(plan: RolloutPlan, prompts: Prompts, table: Array, state: State) -> State:
    """Puts the first waiting completion into an empty slot, with its own copy of the prompt's last, partial page."""
    index = jnp.argmax(state.status == WAITING)
    slot = jnp.argmin(running(state))
    prompt = index // plan.group
    cached = prompts.lengths[prompt] - 1
    shared = cached // plan.page_size
    pool, page = cache.take(state.pool, (cached % plan.page_size > 0)[None])
    source = state.pages[:, jnp.minimum(table[prompt, shared], state.pages.shape[1] - 1)]
    fresh = Slots(
        completion=index,
        token=prompts.tokens[prompt, cached],
        length=cached,
        shared=shared,
        table=table[prompt].at[shared].set(page[0]),
    )
    return update(
        state,
        pages=state.pages.at[:, page[0]].set(source, mode="drop"),
        pool=pool,
        slots=jax.tree.map(lambda all_slots, one: all_slots.at[slot].set(one), state.slots, fresh),
        status=state.status.at[index].set(RUNNING),
    )


def release(plan: RolloutPlan, state: State, leaving: Bool[Array, "S"], status: int) -> State:
    """Empties the `leaving` slots, returns their own pages and sets their completions' status."""
    slots, total = state.slots, state.status.shape[0]
    own = cache.own_pages(slots.shared, slots.length, plan.page_size, slots.table.shape[1]) & leaving[:, None]
    return update(
        state,
        pool=cache.give_back(state.pool, slots.table.reshape(-1), own.reshape(-1)),
        slots=dataclasses.replace(slots, completion=jnp.where(leaving, total, slots.completion)),
        status=state.status.at[jnp.where(leaving, slots.completion, total)].set(status, mode="drop"),
    )


def needs_page(plan: RolloutPlan, state: State) -> Bool[Array, "S"]:
    return running(state) & (state.slots.length % plan.page_size == 0)


def is_short(plan: RolloutPlan, state: State) -> Bool[Array, ""]:
    """More slots are about to start a page than pages are left."""
    return needs_page(plan, state).sum() > state.pool.top


def evict(plan: RolloutPlan, state: State) -> State:
    """Sends the youngest completion back, to start over later.

    The oldest unfinished completion is never sent back and its pages always fit, so every completion ends.
    """
    youngest = jnp.where(running(state), state.slots.completion, -1)
    return release(plan, state, jnp.arange(youngest.shape[0]) == jnp.argmax(youngest), WAITING)


def schedule(plan: RolloutPlan, prompts: Prompts, table: Array, state: State) -> State:
    """Completions that ended leave their slots, waiting ones take them, and while pages are short the youngest go."""
    state = release(plan, state, state.ended, DONE)
    state = jax.lax.while_loop(can_admit, functools.partial(admit, plan, prompts, table), state)
    state = jax.lax.while_loop(functools.partial(is_short, plan), functools.partial(evict, plan), state)
    return update(state, ended=jnp.zeros_like(state.ended), scheduled=jnp.bool(True))


def can_decode(plan: RolloutPlan, state: State) -> Bool[Array, ""]:
    """Nobody's turn has come to leave, enter or make room: the one question between two tokens."""
    return state.scheduled | ~(state.ended.any() | can_admit(state) | is_short(plan, state))


def extend(plan: RolloutPlan, state: State) -> State:
    """Gives a page to every slot about to start one."""
    wanted = needs_page(plan, state)
    pool, page = cache.take(state.pool, wanted)
    slots = state.slots
    entry = jnp.where(wanted, slots.length // plan.page_size, slots.table.shape[1])
    table = slots.table.at[jnp.arange(entry.shape[0]), entry].set(page, mode="drop")
    return update(state, pool=pool, slots=dataclasses.replace(slots, table=table))


# Decoding


def by_parts(x: Float[Array, "S D"], matrix: Float[Array, "V D"]) -> Float[Array, "S V"]:
    """x times the matrix in float32, with the matrix as first operand, which XLA on the CPU reads faster for few rows.

    Without parts it would exchange the operands.
    """
    parts = matrix.reshape(math.gcd(len(matrix), CPU_PARTS), -1, matrix.shape[1]).astype(x.dtype)
    out = jnp.einsum("SD,PVD->PSV", x, parts, preferred_element_type=jnp.float32)
    return out.swapaxes(0, 1).reshape(len(x), -1)


def product_by_parts(name: str, x: Array, weights: Array) -> Array:
    """As `product`, x [B,1,...] being one token a sequence."""
    turned = jnp.einsum(f"{layer_dims(name)}->{dims_read(name)}", weights)
    outs = turned.shape[: len(PROJECTIONS[name][1])]
    out = by_parts(x.reshape(len(x), -1), turned.reshape(math.prod(outs), -1))
    return out.astype(x.dtype).reshape(len(x), 1, *outs)


def fused(device: Any, model: ModelConfig, dtype: Any, rows: int) -> Fused:
    """What decodes so many rows on a device; kernels are imported where they may be, as that takes time."""
    if device.platform == "cpu":
        return Fused(product=product_by_parts)
    if device.platform != "gpu" or model.int8 or model.lora:
        return UNFUSED
    from minigrpo.kernels import fused_products

    if not fused_products.fits(device, rows, model.hidden_size, dtype):
        return UNFUSED
    whole_tiles = model.intermediate_size % fused_products.COLUMNS == 0
    halves = model.qk_norm and model.head_dim == 2 * fused_products.COLUMNS
    return Fused(fused_products.gated if whole_tiles else None, fused_products.heads if halves else None)


def next_tokens(
    plan: RolloutPlan, model: Qwen, each_layer: EachLayer, angles: Angles, state: State, uniforms: Array
) -> tuple[Array, Array, Array]:
    """Feeds every slot's token through the model -> pages, sampled tokens [S] and their log-probs [S].

    `angles` are those of every position: a table, as XLA on the CPU would work them out anew for every layer and head.
    """
    slots, active = state.slots, running(state)
    rows = jnp.arange(slots.token.shape[0])
    page = jnp.where(active, slots.table[rows, slots.length // plan.page_size], state.pages.shape[1])
    lengths = jnp.where(active, slots.length + 1, 0)

    def attend(layer, q, k, v, pages):
        pages = append_rows(plan.device, pages, layer, page, slots.length % plan.page_size, k[:, 0], v[:, 0])
        return paged_attention(plan.device, q[:, 0], pages, layer, lengths, slots.table)[:, None], pages

    hidden, pages = model(
        slots.token[:, None],
        slots.length[:, None],
        attend,
        state.pages,
        Layout(plan.dtype),
        each_layer=each_layer,
        angles=jax.tree.map(lambda table: table[0, slots.length, None], angles),
        fused=fused(plan.device, plan.model, plan.dtype, len(rows)),
    )
    logits = (by_parts if plan.on_cpu else unembed)(hidden[:, 0], model.head_weights())
    if logits.shape[1] > plan.num_tokens:
        logits = jnp.where(jnp.arange(logits.shape[1]) < plan.num_tokens, logits, -jnp.inf)
    return pages, *sample(plan.sampler, logits, uniforms)


def decode(
    plan: RolloutPlan,
    model: Qwen,
    each_layer: EachLayer,
    angles: Angles,
    prompts: Prompts,
    uniforms: Array,
    state: State,
) -> State:
    """One token for every running slot."""
    slots, active = state.slots, running(state)
    index = jnp.where(active, slots.completion, 0)
    count = slots.length + 1 - prompts.lengths[index // plan.group]
    pages, tokens, logprobs = next_tokens(plan, model, each_layer, angles, state, uniforms[index, count])
    if plan.watch:
        jax.debug.callback(plan.watch, slots.completion, count, tokens)
    at = (slots.completion, count)
    return update(
        state,
        pages=pages,
        slots=dataclasses.replace(slots, token=tokens, length=slots.length + active),
        tokens=state.tokens.at[at].set(tokens, mode="drop"),
        logprobs=state.logprobs.at[at].set(logprobs, mode="drop"),
        lengths=state.lengths.at[slots.completion].set(count + 1, mode="drop"),
        ended=active & (jnp.isin(tokens, jnp.array(plan.stop_tokens)) | (count + 1 == plan.max_tokens)),
        scheduled=jnp.bool(False),
        steps=state.steps + 1,
        busy=state.busy + active.sum(),
    )


def shrink(state: State, size: int) -> State:
    """Keeps `size` slots, the running ones first. Nobody has `ended` here: `schedule` saw to that."""
    order = jnp.argsort(~running(state), stable=True)[:size]
    return update(state, slots=jax.tree.map(lambda x: x[order], state.slots), ended=state.ended[order])


def batch_sizes(slots: int, least: int) -> list[int]:
    """64, 4 -> [64, 16, 4]: the batch's size at first and in the tail; 32, 4 -> [32, 8], as half of 8 saves little."""
    sizes = [slots]
    while sizes[-1] > 2 * least:
        sizes.append(max(least, -(-sizes[-1] // TAIL_SHRINK)))
    return sizes


def more_left_than(count: int, state: State) -> Bool[Array, ""]:
    return (state.status != DONE).sum() > count


def one_by_one(
    restore: Callable[[Params], Params], layers: list[Params], step: Callable, carry: Any, _: Any
) -> tuple[Any, None]:
    """`each_layer` over weights that are apart already; the stacked ones go unused."""
    for index, weights in enumerate(layers):
        carry = step(carry, (jnp.int32(index), restore(weights)))[0]
    return carry, None


def dims_read(name: str) -> str:
    """Dims of a layer's matrix as the CPU decodes with it: those that its product sums over last."""
    return "".join(reversed(PROJECTIONS[name]))


def laid_out(weights: Params, before: Callable[[str], str], after: Callable[[str], str]) -> Params:
    """One layer's weights with each matrix's dims in the order `after` its name in place of `before`."""

    def turn(path, w):
        name = leaf_name(path)
        return jnp.einsum(f"{before(name)}->{after(name)}", w) if name in PROJECTIONS else w

    return jax.tree_util.tree_map_with_path(turn, weights)


def decoder(plan: RolloutPlan, weights: Params) -> tuple[Qwen, EachLayer]:
    """The model of a rollout, and how it runs its layers."""
    if not plan.layers_apart:
        return nnx.merge(plan.graph, weights), jax.lax.scan
    restore = functools.partial(laid_out, before=dims_read, after=layer_dims) if plan.on_cpu else unchanged
    shapes = abstract_params(plan.model, plan.dtype)[1]["layers"]
    unread = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    model = nnx.merge(plan.graph, weights | {"layers": unread})
    return model, functools.partial(one_by_one, restore, weights["layers"])


def decode_all(
    plan: RolloutPlan,
    model: Qwen,
    each_layer: EachLayer,
    prompts: Prompts,
    uniforms: Array,
    table: Array,
    state: State,
) -> State:
    """Decodes until every completion is done, in a batch that shrinks once fewer are left than it holds."""
    positions = jnp.arange(plan.max_pages(prompts.tokens.shape[1]) * plan.page_size)
    angles = rope_angles(positions[None], plan.model.head_dim, plan.model.rope_theta)

    least = GPU_LEAST_BATCH if plan.device.platform == "gpu" else LEAST_BATCH
    sizes = batch_sizes(state.slots.token.shape[0], least)

    def step(state):
        return decode(plan, model, each_layer, angles, prompts, uniforms, extend(plan, state))

    def turn(more_left, state):
        state = schedule(plan, prompts, table, state)
        return jax.lax.while_loop(lambda s: can_decode(plan, s) & more_left(s), step, state)

    for size, following in zip(sizes, sizes[1:] + [0], strict=True):
        more_left = functools.partial(more_left_than, following)
        state = jax.lax.while_loop(more_left, functools.partial(turn, more_left), shrink(state, size))
    return state


def start(plan: RolloutPlan, model: Qwen, each_layer: EachLayer, prompts: Prompts) -> tuple[State, Array]:
    """The state after prefill, with every slot empty, and the prompts' page tables."""
    rows, width = prompts.tokens.shape
    total, slots = rows * plan.group, min(plan.slots, rows * plan.group)
    table, taken = prompt_tables(plan, prompts)
    size = num_pages(plan, prompts)
    layers, kv_heads, head_dim = plan.model.num_hidden_layers, plan.model.num_key_value_heads, plan.model.head_dim
    pages = empty_pages(plan.device, layers, size, plan.page_size, kv_heads, head_dim, plan.dtype)
    pages = prefill(plan, model, each_layer, prompts, table, pages)
    zeros = jnp.zeros(slots, jnp.int32)
    empty = Slots(zeros + total, zeros, zeros, zeros, jnp.full((slots, plan.max_pages(width)), size, jnp.int32))
    state = State(
        pages=pages,
        pool=cache.full_pool(size, taken),
        slots=empty,
        status=jnp.where(jnp.repeat(prompts.lengths, plan.group) > 0, WAITING, DONE),
        tokens=jnp.zeros((total, plan.max_tokens), jnp.int32),
        logprobs=jnp.zeros((total, plan.max_tokens), jnp.float32),
        lengths=jnp.zeros(total, jnp.int32),
        ended=jnp.zeros(slots, bool),
        scheduled=jnp.bool(False),
        steps=jnp.int32(0),
        busy=jnp.int32(0),
    )
    return state, table


def all_uniforms(plan: RolloutPlan, prompts: Prompts, key: Array) -> Float[Array, "B C"]:
    """The random number of every token, which depends on nothing but the prompt's id, the member and the position."""
    members = prompts.first_in_group[:, None] + jnp.arange(plan.group)

    def one(prompt, member, position):
        return jax.random.uniform(functools.reduce(jax.random.fold_in, (prompt, member, position), key))

    of_positions = jax.vmap(one, in_axes=(None, None, 0))
    of_members = jax.vmap(of_positions, in_axes=(None, 0, None))
    of_prompts = jax.vmap(of_members, in_axes=(0, 0, None))
    return of_prompts(prompts.ids, members, jnp.arange(plan.max_tokens)).reshape(-1, plan.max_tokens)


def run_device(plan: RolloutPlan, weights: Params, prompts: Prompts, key: Array):
    """One device's whole rollout -> tokens, log-probs, lengths, and [steps, busy] counts."""
    model, each_layer = decoder(plan, weights)
    state, table = start(plan, model, each_layer, prompts)
    state = decode_all(plan, model, each_layer, prompts, all_uniforms(plan, prompts, key), table, state)
    return state.tokens, state.logprobs, state.lengths, jnp.stack([state.steps, state.busy])[None]


def decode_config(config: ModelConfig) -> ModelConfig:
    """What is decoded: adapters are merged into their matrices, unless these are int8."""
    return config if config.int8 else dataclasses.replace(config, lora=None)


@functools.partial(jax.jit, static_argnums=0)
def decode_weights(plan: RolloutPlan, params: Params) -> Params:
    """The policy laid out for decoding: in the compute dtype, whole on every device, its layers apart off the TPU."""
    weights = in_dtype(params if plan.model == plan.policy else merge(plan.policy, params), plan.dtype)
    if plan.layers_apart:
        prepare = functools.partial(laid_out, before=layer_dims, after=dims_read) if plan.on_cpu else unchanged
        layers = range(plan.model.num_hidden_layers)
        apart = [prepare(jax.tree.map(lambda w, index=index: w[index], weights["layers"])) for index in layers]
        weights = weights | {"layers": apart}
    return jax.lax.with_sharding_constraint(weights, replicated(plan.mesh))


def as_decoded(plan: RolloutPlan, params: Params) -> bool:
    """Whether the policy is laid out for decoding as it is."""
    if plan.layers_apart or plan.model != plan.policy:
        return False
    return all(x.dtype == plan.dtype and x.is_fully_replicated for x in jax.tree.leaves(params))


def shared_by_host(mesh: Mesh, weights: Params) -> Params:
    """Replicated arrays of virtual CPU devices -> the same in one place, which caches hold once.

    NumPy shows an array's own memory, and so does an array made of that.
    """
    return put(mesh, jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), weights), replicated(mesh))


def run_mesh(plan: RolloutPlan, weights: Params, prompts: Prompts, seed: Int[Array, "2"]):
    """Every device's rollout of its share of the prompts."""
    key = jax.random.fold_in(jax.random.key(seed[0]), seed[1])
    rows, whole = PartitionSpec(DATA), PartitionSpec()
    roll = jax.shard_map(
        functools.partial(run_device, plan),
        mesh=plan.mesh,
        in_specs=(whole, rows, whole),
        out_specs=rows,
        check_vma=False,
    )
    return jax.lax.with_sharding_constraint(roll(weights, prompts, key), replicated(plan.mesh))


@functools.cache
def rollout_program(platform: str) -> jax.stages.Wrapped:
    """`run_mesh` as a platform that has been started compiles it; one per process, as it keeps its programs."""
    options = known_options(WIDE_VECTORS) if platform == "cpu" else None
    return jax.jit(run_mesh, static_argnums=0, compiler_options=options)


def spread(prompts: list[list[int]], ids: list[int], group: int, devices: int, width: int) -> tuple[Prompts, int]:
    """Rows that the devices divide, by splitting groups or adding empty prompts, and the group each row then has."""
    splits = [k for k in range(1, group + 1) if group % k == 0]
    split = next((k for k in splits if len(prompts) * k % devices == 0), 1)
    rows = len(prompts) * split + (-len(prompts) * split) % devices
    tokens = np.zeros((rows, width), np.int32)
    lengths, names, first = (np.zeros(rows, np.int32) for _ in range(3))
    for row in range(len(prompts) * split):
        prompt = prompts[row // split]
        tokens[row, : len(prompt)] = prompt
        lengths[row], names[row], first[row] = len(prompt), ids[row // split], row % split * (group // split)
    return Prompts(tokens, lengths, names, first), group // split


class Roller:
    """Generates completions with one set of settings; programs are compiled once per shape.

    With `spread_cpu`, a mesh of one CPU device has completions of small models decoded on the virtual devices beside it
    too, LEAST_BATCH or more on each, unless the pool's size is given, which is a device's.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        dtype: Any,
        options: RolloutOptions,
        num_tokens: int,
        stop_tokens: tuple[int, ...],
        watch: Callable[[Any, Any, Any], None] | None = None,
        pool_limit: int = 0,
        spread_cpu: bool = False,
    ):
        self.spread_cpu = spread_cpu
        model = decode_config(config)
        self.plan = RolloutPlan(
            policy=config,
            model=model,
            graph=abstract_params(model)[0],
            mesh=mesh,
            dtype=dtype,
            sampler=Sampler(options.temperature, options.top_k, options.top_p, options.min_p),
            num_tokens=num_tokens,
            stop_tokens=stop_tokens,
            group=1,
            max_tokens=options.max_completion_length,
            page_size=options.page_size,
            slots=options.slots,
            pool_pages=options.pool_pages,
            pool_limit=pool_limit,
            watch=watch,
        )

    def mesh_for(self, weight_bytes: int, completions: int) -> Mesh:
        """Where so many completions are decoded with weights of this size."""
        spread_out = self.spread_cpu and weight_bytes <= CACHED_BYTES and not self.plan.pool_pages
        return worker_mesh(self.plan.mesh, completions // LEAST_BATCH) if spread_out else self.plan.mesh

    def __call__(
        self, params: Params, prompts: list[list[int]], ids: list[int], group: int, seed: tuple[int, int]
    ) -> Rollout:
        """`group` completions of each prompt (token ids, at least one each).

        `seed` is the run's seed and the step; `ids` name the prompts: together they fix the random numbers.
        """
        weights = params if as_decoded(self.plan, params) else decode_weights(self.plan, params)
        mesh = self.mesh_for(sum(x.nbytes for x in jax.tree.leaves(weights)), len(prompts) * group)
        weights = shared_by_host(mesh, weights) if self.plan.on_cpu and mesh.size > 1 else weights
        width = -(-max(map(len, prompts)) // self.plan.page_size) * self.plan.page_size
        rows, row_group = spread(prompts, ids, group, mesh.size, width)
        plan = dataclasses.replace(self.plan, group=row_group, mesh=mesh)
        device_rows = put(mesh, rows, by_sequence(mesh))
        seed_rows = put(mesh, np.array(seed, np.int32), replicated(mesh))
        outs = launch(rollout_program(plan.device.platform), plan, weights, device_rows, seed_rows)
        tokens, logprobs, lengths, counts = map(np.asarray, outs)
        total = len(prompts) * group
        tokens, logprobs, lengths = tokens[:total], logprobs[:total], lengths[:total]
        last = np.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
        slots = min(plan.slots, rows.tokens.shape[0] * row_group // mesh.size)
        return Rollout(
            tokens=tokens,
            logprobs=logprobs,
            lengths=lengths,
            stopped=np.isin(last, plan.stop_tokens),
            decode_steps=int(counts[:, 0].max()),
            occupancy=float(counts[:, 1].sum() / max(1, counts[:, 0].sum() * slots)),
        )
