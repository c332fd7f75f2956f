"""Several short sequences in one row of a batch, so that they do not pay for the longest one's length.

The sequences are dealt out to devices, and each device's to rows, longest first. Rows are computed in parts of equal
size, from the first on; parts that stay empty are not computed. Packing changes no number but by the order of sums.
"""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from minigrpo.grpo import Batch, Packed, pad_rows
from minigrpo.sharding import by_sequence, put

MOST_IN_A_ROW = 8
"""Sequences that share a row, at most."""


@dataclasses.dataclass
class Row:
    """A row being filled."""

    sequences: list[int] = dataclasses.field(default_factory=list)
    tokens: int = 0
    completions: int = 0
    """Of its tokens, those of completions."""


def deal(sizes: Int[np.ndarray, "B"], devices: int) -> list[list[int]]:
    """Each device's sequences: longest first, each to the device with fewest tokens of those with room."""
    shares: list[list[int]] = [[] for _ in range(devices)]
    most, loads = -(-len(sizes) // devices), [0] * devices
    for sequence in np.argsort(-sizes, kind="stable"):
        free = (device for device in range(devices) if len(shares[device]) < most)
        device = min(free, key=loads.__getitem__)
        shares[device].append(int(sequence))
        loads[device] += int(sizes[sequence])
    return shares


def fill_rows(batch: Batch, sequences: list[int]) -> list[Row]:
    """First fit: every sequence goes into the first row that has room for its tokens and for its completion."""
    width, most = batch.tokens.shape[1], batch.completions.shape[1]
    rows: list[Row] = []
    for sequence in sequences:
        completion = int(batch.completion_lengths[sequence])
        tokens = int(batch.prompt_lengths[sequence]) + completion

        def has_room(row, tokens=tokens, completion=completion):
            fits = row.tokens + tokens <= width and row.completions + completion <= most
            return fits and len(row.sequences) < MOST_IN_A_ROW

        row = next(filter(has_room, rows), None)
        if row is None:
            row = Row()
            rows.append(row)
        row.sequences.append(sequence)
        row.tokens += tokens
        row.completions += completion
    return rows


def rows_per_part(rows: int, most: int, parts: int) -> int:
    """`most`, halved or not: what costs least to compute `rows` in no more than `parts`, a part costing a row more."""
    sizes = [most >> halvings for halvings in range(most.bit_length())]
    turns = {size: -(-rows // size) for size in sizes}
    return min((size for size in sizes if turns[size] <= parts), key=lambda size: turns[size] * (size + 1))


@dataclasses.dataclass
class Sheet:
    """One row's arrays, being written."""

    tokens: Int[np.ndarray, "T"]
    positions: Int[np.ndarray, "T"]
    segments: Int[np.ndarray, "T"]
    scored: Int[np.ndarray, "C"]
    targets: Int[np.ndarray, "C"]

    def write(self, batch: Batch, row: Row) -> list[int]:
        """Puts the row's sequences side by side -> where each one's completion starts among the scored."""
        at, done, starts = 0, 0, []
        for segment, sequence in enumerate(row.sequences, 1):
            prompt, completion = int(batch.prompt_lengths[sequence]), int(batch.completion_lengths[sequence])
            span, scores = slice(at, at + prompt + completion), slice(done, done + completion)
            self.tokens[span] = batch.tokens[sequence, : prompt + completion]
            self.positions[span] = np.arange(prompt + completion)
            self.segments[span] = segment
            self.scored[scores] = at + prompt - 1 + np.arange(completion)
            self.targets[scores] = batch.completions[sequence, :completion]
            starts.append(done)
            at, done = span.stop, scores.stop
        return starts


def pack(batch: Batch, devices: int, parts: int) -> Batch:
    """A batch on the host with its sequences side by side, all in the order of devices, of parts, and of rows."""
    used = np.flatnonzero(batch.completion_lengths)
    sizes = (batch.prompt_lengths + batch.completion_lengths)[used]
    shares = [fill_rows(batch, used[share].tolist()) for share in deal(sizes, devices)]
    own = -(-len(batch.tokens) // devices)
    size = rows_per_part(max(map(len, shares)), -(-own // parts), parts)
    slots = min(MOST_IN_A_ROW * size, own)
    width, most = batch.tokens.shape[1], batch.completions.shape[1]
    arrays = [np.zeros((devices, parts, size, length), np.int32) for length in (width, width, width, most, most)]
    order = np.full((devices, parts, slots), len(batch.tokens))
    starts = np.zeros((devices, parts, slots), np.int32)
    for device, rows in enumerate(shares):
        for part in range(-(-len(rows) // size)):
            here = rows[part * size : (part + 1) * size]
            done = [Sheet(*(x[device, part, i] for x in arrays)).write(batch, row) for i, row in enumerate(here)]
            sequences = [sequence for row in here for sequence in row.sequences]
            order[device, part, : len(sequences)] = sequences
            starts[device, part, : len(sequences)] = [i * most + at for i, row in enumerate(done) for at in row]
    tokens, positions, segments, scored, targets = (x.reshape(-1, x.shape[3]) for x in arrays)
    with_empty = pad_rows(batch, len(batch.tokens) + 1)  # the last row stands where a part has fewer sequences
    moved = jax.tree.map(lambda x: x[order.reshape(-1)], with_empty)
    packed = Packed(positions, segments, scored, targets, starts.reshape(-1))
    return dataclasses.replace(moved, tokens=tokens, packed=packed)


def lay_out(devices: int, batch: Batch, parts: int, packing: bool) -> Batch:
    """The batch, on the host, as it is computed in `parts` on the devices."""
    return pack(batch, devices, parts) if packing else pad_rows(batch, devices * parts)


def place_batch(mesh: Mesh, batch: Batch, parts: int, packing: bool) -> Batch:
    """The same on the mesh."""
    return put(mesh, lay_out(mesh.size, batch, parts, packing), by_sequence(mesh))
