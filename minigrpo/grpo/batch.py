"""Batches of sequences, and how they are packed into micro-batches of one fixed shape.

Sequences are dealt to devices, and each device's to rows of `row_tokens`, several in a row, marked by segment ids.
A micro-batch holds a fixed number of rows per device. How many micro-batches a batch needs is a number that the update
reads; the arrays have room for the worst case, so that their shapes never change. With shared prefixes the layers see
packed tokens instead of rows: a prompt is there once for all of its completions, and only attention and the LM head see
rows. Packing changes no number but by the order of sums.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from minigrpo.model.attention import SharedPrefixIndex
from minigrpo.runtime.mesh import by_sequence, fetch, put, replicated

SEQUENCES_PER_ROW = 16
"""Most sequences that share a row."""

PREFIX_DIVISOR = 4
"""Shared prompts take at most one in PREFIX_DIVISOR packed tokens, as each copy's gradient is gathered."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Completions to train on, and everything the loss reads of them. Entries of length 0 are padding.

    Example of one: completions [8, 2, 0], completion_lengths 2, advantages 0.7, rollout_logprobs [-0.1, -1.2, 0].
    """

    completions: Any  # int32 [..., C], end token included, 0 past the length
    completion_lengths: Any  # int32 [...]
    advantages: Any  # float [...]
    rollout_logprobs: Any = None  # float [..., C]
    """Recorded by the sampler; None for responses on file."""
    old_logprobs: Any = None  # float [..., C]
    """Of the policy that sampled, recomputed by the trainer; None when this update is the first on these samples."""
    ref_logprobs: Any = None  # float [..., C]
    loss_excluded: Any = None  # bool [...]
    """Completions that teach nothing, though the denominators of grpo and dr_grpo count them."""
    cutoffs: Any = None  # float [..., C]
    """Least log-probs that truncated sampling kept; None where it left nothing out, and in a PackedBatch."""

    @property
    def completion_mask(self) -> Bool[Array, "*B C"]:
        """Return True for every completion token."""
        lengths, shape = self.completion_lengths, self.completions.shape
        return jax.lax.broadcasted_iota(lengths.dtype, shape, len(shape) - 1) < lengths[..., None]

    @property
    def loss_mask(self) -> Float[Array, "*B C"]:
        """Return 1 for every token that is trained on."""
        kept = True if self.loss_excluded is None else ~self.loss_excluded[..., None]
        return (self.completion_mask & kept).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class PackingSpec:
    """The fixed shape of a micro-batch."""

    devices: int
    rows: int
    """Rows of a micro-batch on one device."""
    prompt_tokens: int
    """Longest prompt."""
    completion_tokens: int
    """Longest completion."""
    group: int = 1
    """Adjacent sequences with the same prompt."""
    sequences_per_row: int = SEQUENCES_PER_ROW
    share_prefixes: bool = False

    @property
    def row_tokens(self) -> int:
        """Return the positions of a row: a prompt and a completion of full length."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def packed_share(self) -> float:
        """Return packed tokens per row position at full length: less than 1 where a group shares its prompt."""
        shared = self.prompt_tokens + self.group * self.completion_tokens
        return shared / (self.group * self.row_tokens) if self.share_prefixes else 1.0

    @property
    def packed_tokens(self) -> int:
        """Return the tokens that the layers compute in a device's micro-batch."""
        return max(self.row_tokens, int(self.packed_share * self.rows * self.row_tokens))

    @property
    def full_sequences(self) -> int:
        """Return how many sequences of full length fit into a device's micro-batch."""
        return self.packed_tokens // self.row_tokens

    @property
    def prefix_tokens(self) -> int:
        """Return the most tokens of shared prompts in a device's micro-batch."""
        least = max(1, self.full_sequences // 2) * self.prompt_tokens
        return max(least, self.packed_tokens // PREFIX_DIVISOR)

    @property
    def loss_tokens(self) -> int:
        """Return the most completion tokens of a device's micro-batch: as many as there are at full length."""
        completions = self.completion_tokens * (self.group if self.share_prefixes else 1)
        return self.packed_tokens * completions // (self.prompt_tokens + completions)

    def sequences(self, count: int) -> int:
        """Return the most sequences of a device's micro-batch, in a batch of `count`."""
        return min(self.sequences_per_row * self.rows, -(-count // self.devices))

    def micro_batches(self, count: int) -> int:
        """Return how many micro-batches `count` sequences of full length need."""
        own = -(-count // self.devices)
        return -(-own // self.full_sequences)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """A batch packed into micro-batches. Arrays lead with [devices, micro-batches], of which the first are in use.

    Example, with rows of 7: prompts (5 6) and (7), completions (8 2) and (9 2) are one row: tokens 5 6 8 2 7 9 2,
    position_ids 0 1 2 3 0 1 2, segment_ids 1 1 1 1 2 2 2, loss_positions 1 2 4 5, targets 8 2 9 2, starts 0 2.
    """

    batch: Batch  # by completion, [A, M, K, ...]
    tokens: Any  # int32 [A, M, R, T], rows; with shared prefixes [A, M, 1, packed tokens]
    position_ids: Any  # int32, as tokens: positions in their own sequences
    segment_ids: Any  # int32 [A, M, R, T], a row's sequences from 1 on, 0 is padding; None with one in each row
    loss_positions: Any  # int32 [A, M, S], positions in the rows, end to end, whose successors are the targets
    targets: Any  # int32 [A, M, S], these successors
    starts: Any  # int32 [A, M, K], where a completion's targets start among the loss positions
    order: Any  # int32 [A, M, K], a completion's number in the batch that was packed; that batch's size is padding
    shared_prefix: Any  # SharedPrefixIndex of arrays [A, M, ...], or None
    micro_batches: Any  # int32 scalar
    cutoffs: Any = None  # float [A, M, S], the targets' cut-offs, or None


def micro_batch(packed: PackedBatch, index: Int[Array, ""] | int) -> PackedBatch:
    """Take one micro-batch: the devices' rows and completions end to end.

    Arrays that hold or go with positions among one device's rows keep the leading dim of devices.
    """
    by_device = jax.tree.map(lambda x: x[:, index], dataclasses.replace(packed, micro_batches=None))
    taken = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), by_device)
    by_target = {name: getattr(by_device, name) for name in ("loss_positions", "targets", "cutoffs")}
    taken = dataclasses.replace(taken, **by_target)
    if packed.shared_prefix is None:
        return taken
    shared = dataclasses.replace(by_device.shared_prefix, tokens=taken.shared_prefix.tokens)
    return dataclasses.replace(taken, shared_prefix=shared)


# Dealing sequences to devices and rows


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of every sequence's prompt and completion."""

    prompts: Int[np.ndarray, " B"]
    completions: Int[np.ndarray, " B"]
    group: int

    @property
    def totals(self) -> Int[np.ndarray, " B"]:
        """Return the tokens of whole sequences."""
        return self.prompts + self.completions

    def group_of(self, sequence: int) -> int:
        """Return the number of the sequence's group."""
        return sequence // self.group


@dataclasses.dataclass
class MicroBatch:
    """A device's micro-batch being filled, row by row."""

    rows: list[list[int]] = dataclasses.field(default_factory=list)
    free: list[int] = dataclasses.field(default_factory=list)
    """Positions left in each row."""
    members: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    """Sequences by group."""
    tokens: int = 0
    """Packed tokens, shared prompts once."""
    prefix_tokens: int = 0
    """Of these, shared prompts'."""
    loss_tokens: int = 0
    """Completion tokens."""

    def add(self, spec: PackingSpec, lengths: Lengths, sequence: int) -> bool:
        """Put the sequence into the first row with room -> False if there is none."""
        total, prompt = int(lengths.totals[sequence]), int(lengths.prompts[sequence])
        members = self.members[lengths.group_of(sequence)] if spec.share_prefixes else 0
        new_tokens, new_prefix = total - prompt * (members > 0), prompt * (members == 1)
        row = self.find_row(spec, total)
        fits = self.tokens + new_tokens <= spec.packed_tokens and self.prefix_tokens + new_prefix <= spec.prefix_tokens
        if not fits or self.loss_tokens + total - prompt > spec.loss_tokens or row == spec.rows:
            return False
        if row == len(self.rows):
            self.rows.append([])
            self.free.append(spec.row_tokens)
        self.rows[row].append(sequence)
        self.free[row] -= total
        self.members[lengths.group_of(sequence)] += 1
        self.tokens += new_tokens
        self.prefix_tokens += new_prefix
        self.loss_tokens += total - prompt
        return True

    def find_row(self, spec: PackingSpec, total: int) -> int:
        """Return the first row with `total` free positions; the number of rows if a new one is needed."""
        rows = zip(self.free, self.rows, strict=True)
        fits = (free >= total and len(row) < spec.sequences_per_row for free, row in rows)
        return next((number for number, fit in enumerate(fits) if fit), len(self.rows))


def fill_micro_batches(spec: PackingSpec, lengths: Lengths, sequences: Sequence[int]) -> list[MicroBatch]:
    """Pack a device's sequences, in the order given: first fit, beginning where the group's prompt already is."""
    filled: list[MicroBatch] = []
    for sequence in sequences:
        group = lengths.group_of(sequence)
        candidates = sorted(filled, key=lambda one: not one.members[group]) if spec.share_prefixes else filled
        if not any(one.add(spec, lengths, sequence) for one in candidates):
            filled.append(MicroBatch())
            filled[-1].add(spec, lengths, sequence)
    return filled


def pieces_of(lengths: Lengths, size: int) -> list[list[int]]:
    """Cut every group's sequences that have completions into pieces, longest first."""
    groups = collections.defaultdict(list)
    for sequence in np.flatnonzero(lengths.completions).tolist():
        groups[lengths.group_of(sequence)].append(sequence)
    ordered = [sorted(group, key=lambda i: -lengths.totals[i]) for group in groups.values()]
    pieces = [group[start : start + size] for group in ordered for start in range(0, len(group), size)]
    return sorted(pieces, key=lambda piece: -lengths.totals[piece].sum())


def deal(spec: PackingSpec, lengths: Lengths, size: int) -> list[list[int]]:
    """Deal pieces of groups to devices: largest first, each to the device with fewest tokens that has room for it.

    A piece for which none has room is dealt sequence by sequence.
    """
    queue = collections.deque(pieces_of(lengths, size))
    shares: list[list[int]] = [[] for _ in range(spec.devices)]
    room, load = np.full(spec.devices, -(-len(lengths.completions) // spec.devices)), np.zeros(spec.devices)
    while queue:
        piece = queue.popleft()
        if (room >= len(piece)).any():
            device = int(np.argmin(np.where(room >= len(piece), load, np.inf)))
            shares[device] += piece
            room[device] -= len(piece)
            load[device] += lengths.totals[piece].sum()
        else:
            queue.extend([sequence] for sequence in piece)
    return shares


def arrange(spec: PackingSpec, lengths: Lengths) -> list[list[MicroBatch]]:
    """Pack every device's sequences, dealt one by one or, with shared prefixes, in pieces of groups.

    Pieces are tried as whole groups, halves and so on down to single sequences. Those are kept that need the fewest
    micro-batches, then the fewest tokens on the busiest device.
    """
    sizes = [spec.group >> halvings for halvings in range(spec.group.bit_length())] if spec.share_prefixes else [1]
    packed = [[fill_micro_batches(spec, lengths, share) for share in deal(spec, lengths, size)] for size in sizes]

    def cost(devices: list[list[MicroBatch]]) -> tuple[int, int]:
        return max(map(len, devices)), max(sum(one.tokens for one in device) for device in devices)

    return min(packed, key=cost)


# Writing the arrays


Arrays = dict[str, Int[np.ndarray, "..."] | Float[np.ndarray, "..."]]
"""Arrays by their names in `PackedBatch`, and `token_at`."""


def allocate(spec: PackingSpec, count: int, truncated: bool) -> Arrays:
    """Return blank arrays for a batch of `count` sequences; those of truncated sampling have cut-offs.

    `token_at` has the number of the packed token at every position of the rows.
    """
    lead, sequences = (spec.devices, spec.micro_batches(count)), spec.sequences(count)
    shapes = {
        "tokens": (spec.packed_tokens,),
        "position_ids": (spec.packed_tokens,),
        "segment_ids": (spec.rows, spec.row_tokens),
        "token_at": (spec.rows, spec.row_tokens),
        "loss_positions": (spec.loss_tokens,),
        "targets": (spec.loss_tokens,),
        "starts": (sequences,),
        "order": (sequences,),
    }
    arrays: Arrays = {name: np.zeros((*lead, *shape), np.int32) for name, shape in shapes.items()}
    return arrays | ({"cutoffs": np.zeros((*lead, spec.loss_tokens), np.float32)} if truncated else {})


def place_prefixes(prompts: list[list[int]], filled: MicroBatch) -> dict[int, int]:
    """Return where the prompts of groups with several members begin among the packed tokens: first, end to end."""
    shared = [one for one, count in filled.members.items() if count > 1]
    starts = np.cumsum([0, *(len(prompts[one]) for one in shared)]).tolist()
    return dict(zip(shared, starts, strict=False))


def write_micro_batch(
    spec: PackingSpec,
    prompts: list[list[int]],
    batch: Batch,
    filled: MicroBatch,
    out: Arrays,
) -> None:
    """Write a device's micro-batch into its part of the arrays."""
    prefixes = place_prefixes(prompts, filled) if spec.share_prefixes else {}
    packed_end = sum(len(prompts[one]) for one in prefixes)
    targets = written = 0
    for number, row in enumerate(filled.rows):
        at = number * spec.row_tokens
        for segment, sequence in enumerate(row, 1):
            prompt, length = prompts[sequence // spec.group], int(batch.completion_lengths[sequence])
            total, completion = len(prompt) + length, batch.completions[sequence, :length]
            if not spec.share_prefixes:
                own = np.arange(at, at + total)
            else:
                prefix = prefixes.get(sequence // spec.group)
                new = total if prefix is None else length
                own = np.arange(packed_end, packed_end + new)
                own = own if prefix is None else np.concatenate([np.arange(prefix, prefix + len(prompt)), own])
                packed_end += new
            span, own_targets = slice(at, at + total), slice(targets, targets + length)
            out["token_at"].reshape(-1)[span], out["segment_ids"].reshape(-1)[span] = own, segment
            out["tokens"][own], out["position_ids"][own] = [*prompt, *completion], np.arange(total)
            out["loss_positions"][own_targets] = np.arange(at + len(prompt) - 1, at + total - 1)
            out["targets"][own_targets] = completion
            if "cutoffs" in out:
                out["cutoffs"][own_targets] = batch.cutoffs[sequence, :length]
            out["starts"][written], out["order"][written] = targets, sequence
            at, targets, written = at + total, targets + length, written + 1


def index_shared_prefixes(
    spec: PackingSpec, token_at: Int[np.ndarray, "A M R T"], segments: Int[np.ndarray, "A M R T"]
) -> SharedPrefixIndex:
    """Find every packed token's first position and further copies in the rows."""
    lead, nowhere = token_at.shape[:2], spec.rows * spec.row_tokens
    first = np.full((*lead, spec.packed_tokens), nowhere, np.int32)
    most = max(1, min(spec.group, spec.sequences_per_row * spec.rows) - 1)
    copies = np.full((*lead, spec.prefix_tokens, most), nowhere, np.int32)
    for index in np.ndindex(*lead):
        used = np.flatnonzero(segments[index])
        used = used[np.argsort(token_at[index].reshape(-1)[used], kind="stable")]
        token = token_at[index].reshape(-1)[used]
        copy = np.arange(len(token)) - np.searchsorted(token, token)
        first[index][token[copy == 0]] = used[copy == 0]
        copies[index][token[copy > 0], copy[copy > 0] - 1] = used[copy > 0]
    return SharedPrefixIndex(token_at, first, copies)


def take_in_order(batch: Batch, order: Int[np.ndarray, "A M K"]) -> Batch:
    """Arrange a batch's completions by micro-batch; one more entry than the batch has is padding."""
    return jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:1])])[order], batch)


def pack(spec: PackingSpec, prompts: list[list[int]], batch: Batch) -> PackedBatch:
    """Pack completions with their prompts, token ids of one prompt per group of `spec.group`, into micro-batches."""
    count = len(batch.completion_lengths)
    lengths = Lengths(np.repeat([len(prompt) for prompt in prompts], spec.group), batch.completion_lengths, spec.group)
    devices = arrange(spec, lengths)
    arrays: Any = allocate(spec, count, batch.cutoffs is not None)
    arrays["order"][:] = count
    for device, filled in enumerate(devices):
        for number, one in enumerate(filled):
            write_micro_batch(spec, prompts, batch, one, {name: x[device, number] for name, x in arrays.items()})
    token_at = arrays.pop("token_at")
    shared = index_shared_prefixes(spec, token_at, arrays["segment_ids"]) if spec.share_prefixes else None
    layout = (1, spec.packed_tokens) if spec.share_prefixes else (spec.rows, spec.row_tokens)
    for name in ("tokens", "position_ids"):
        arrays[name] = arrays[name].reshape(*arrays[name].shape[:2], *layout)
    segments: Int[np.ndarray, "A M R T"] | None = arrays.pop("segment_ids")
    used = np.int32(max(1, *map(len, devices)))
    in_order = take_in_order(dataclasses.replace(batch, cutoffs=None), arrays["order"])
    segments = segments if spec.sequences_per_row > 1 else None
    return PackedBatch(in_order, segment_ids=segments, shared_prefix=shared, micro_batches=used, **arrays)


def pad_batch(prompts: list[list[int]], batch: Batch, count: int) -> tuple[list[list[int]], Batch]:
    """Add prompts without completions until there are `count`, to reach the packed shape of a full batch."""
    group, missing = len(batch.completion_lengths) // len(prompts), count - len(prompts)

    def pad(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x, np.zeros((missing * group, *x.shape[1:]), x.dtype)])

    return prompts + [[0]] * missing, jax.tree.map(pad, batch)


def put_batch(mesh: Mesh, packed: PackedBatch) -> PackedBatch:
    """Move a packed batch onto the mesh, each device's micro-batches to it."""
    arrays = put(dataclasses.replace(packed, micro_batches=None), by_sequence(mesh))
    return dataclasses.replace(arrays, micro_batches=put(packed.micro_batches, replicated(mesh)))


def restore_order(packed: PackedBatch, values: Float[np.ndarray, "A M K C"], count: int) -> Float[np.ndarray, "B C"]:
    """Return values of the `count` completions that were packed, in the order they had before."""
    order = fetch(packed.order).reshape(-1)
    restored = np.zeros((count + 1, values.shape[-1]), values.dtype)
    restored[order] = values.reshape(-1, values.shape[-1])
    return restored[:count]
