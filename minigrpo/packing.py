"""Short sequences side by side, so that they do not pay for the longest one's length, and shared prompts once.

The sequences are dealt out to devices, and each device's to rows, largest first. Rows are computed in parts of equal
size, from the first on; parts that stay empty are not computed. On "sheets" only attention sees rows: the tokens of a
part's rows lie there end to end, and a prompt that several of its sequences have, once. None of it changes a number but
by the order of sums.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from minigrpo.attention import Rows
from minigrpo.grpo import Batch, Packed, pad_rows
from minigrpo.sharding import by_sequence, put

MOST_IN_A_ROW = 8
"""Sequences that share a row, at most."""

MOST_LINES, LINE_MULTIPLE = 16, 16
"""A sheet has at most so many lines, of one length, a multiple of the second: so few sizes are ever compiled."""


@dataclasses.dataclass
class Row:
    """A row being filled."""

    sequences: list[int] = dataclasses.field(default_factory=list)
    tokens: int = 0
    completions: int = 0
    """Of its tokens, those of completions."""


def prompt_of(batch: Batch, sequence: int) -> bytes:
    """What sequences with the same prompt have in common."""
    return batch.tokens[sequence, : batch.prompt_lengths[sequence]].tobytes()


def same_prompt(batch: Batch) -> list[list[int]]:
    """The sequences that have completions, by their prompts."""
    groups = collections.defaultdict(list)
    for sequence in np.flatnonzero(batch.completion_lengths).tolist():
        groups[prompt_of(batch, sequence)].append(sequence)
    return list(groups.values())


def prompt_tokens(batch: Batch, prompts: Iterable[bytes]) -> list[int]:
    return [len(prompt) // batch.tokens.itemsize for prompt in prompts]


def tokens_of(batch: Batch, sequences: list[int]) -> int:
    """Tokens of a sheet of these sequences."""
    prompts = {prompt_of(batch, sequence) for sequence in sequences}
    return sum(prompt_tokens(batch, prompts)) + int(batch.completion_lengths[sequences].sum())


def shared_prompts(batch: Batch, sequences: list[int]) -> dict[bytes, int]:
    """Where on a sheet each prompt that several of its sequences have begins: they come first, end to end."""
    counts = collections.Counter(prompt_of(batch, sequence) for sequence in sequences)
    shared = [prompt for prompt, count in counts.items() if count > 1]
    ends = np.cumsum([0, *prompt_tokens(batch, shared)]).tolist()
    return dict(zip(shared, ends, strict=False))


def deal_pieces(batch: Batch, devices: int, size: int) -> list[list[int]]:
    """Each device's sequences where groups are dealt in pieces of `size`.

    Largest piece first, each to the device with fewest tokens of those with room for it; one for which none has room is
    dealt one by one.
    """
    groups = [sorted(group, key=lambda i: -batch.completion_lengths[i]) for group in same_prompt(batch)]
    pieces = [group[start : start + size] for group in groups for start in range(0, len(group), size)]
    queue = collections.deque(sorted(pieces, key=lambda piece: -tokens_of(batch, piece)))
    shares: list[list[int]] = [[] for _ in range(devices)]
    rooms, loads = np.full(devices, -(-len(batch.completion_lengths) // devices)), np.zeros(devices)
    while queue:
        piece = queue.popleft()
        if (rooms >= len(piece)).any():
            device = int(np.argmin(np.where(rooms >= len(piece), loads, np.inf)))
            shares[device] += piece
            rooms[device] -= len(piece)
            loads[device] += tokens_of(batch, piece)
        else:
            queue.extend([sequence] for sequence in piece)
    return shares


def deal(batch: Batch, devices: int, share: bool) -> list[list[int]]:
    """Each device's sequences, one by one.

    Or, to `share` prompts, by groups, their halves, quarters ..., whichever leaves the fullest with fewest tokens.
    """
    largest = max(map(len, same_prompt(batch)), default=1) if share else 1
    dealt = [deal_pieces(batch, devices, largest >> halvings) for halvings in range(largest.bit_length())]
    return min(dealt, key=lambda shares: max(tokens_of(batch, share) for share in shares))


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
    """The arrays of one device's part, being written; see `Packed` and `Rows`."""

    tokens: Int[np.ndarray, "M"]
    positions: Int[np.ndarray, "M"]
    scored: Int[np.ndarray, "C"]
    targets: Int[np.ndarray, "C"]
    places: Int[np.ndarray, "r T"]
    segments: Int[np.ndarray, "r T"]
    first: Int[np.ndarray, "M"]
    others: Int[np.ndarray, "Q E"]

    def write(self, batch: Batch, rows: list[Row], prompts: dict[bytes, int] | None) -> list[int]:
        """Puts the rows' sequences side by side -> where each one's completion starts among the scored.

        `prompts` are the shared ones; None has tokens lie on the sheet as they stand in the rows.
        """
        at, done, starts = sum(prompt_tokens(batch, prompts or ())), 0, []
        for number, row in enumerate(rows):
            begin, at = 0, at if prompts is not None else number * self.places.shape[1]
            for segment, sequence in enumerate(row.sequences, 1):
                prompt, completion = int(batch.prompt_lengths[sequence]), int(batch.completion_lengths[sequence])
                shared = (prompts or {}).get(prompt_of(batch, sequence))
                own = np.arange(at, at + completion + (prompt if shared is None else 0))
                at += len(own)
                own = own if shared is None else np.concatenate([np.arange(shared, shared + prompt), own])
                span, scores = slice(begin, begin + len(own)), slice(done, done + completion)
                self.places[number, span], self.segments[number, span] = own, segment
                self.tokens[own], self.positions[own] = batch.tokens[sequence, : len(own)], np.arange(len(own))
                self.scored[scores], self.targets[scores] = (
                    own[prompt - 1 : -1],
                    batch.completions[sequence, :completion],
                )
                starts.append(done)
                begin, done = span.stop, scores.stop
        self.find_places()
        return starts

    def find_places(self) -> None:
        """Inverts `places`."""
        used = np.flatnonzero(self.segments)
        used = used[np.argsort(self.places.reshape(-1)[used], kind="stable")]
        token = self.places.reshape(-1)[used]
        number = np.arange(len(token))
        copy = number - np.searchsorted(token, token)  # 0 for the first place of a token
        self.first[token[copy == 0]] = used[copy == 0]
        self.others[token[copy > 0], copy[copy > 0] - 1] = used[copy > 0]


def sequences_in(rows: list[Row]) -> list[int]:
    return [sequence for row in rows for sequence in row.sequences]


def in_lines(tokens: int, line: int) -> int:
    """Tokens of as many whole lines as are needed, at least one."""
    return max(1, -(-tokens // line)) * line


def pack(batch: Batch, devices: int, parts: int, share: bool) -> Batch:
    """A batch on the host with its sequences side by side, all in the order of devices, of parts, and of rows."""
    shares = [fill_rows(batch, one) for one in deal(batch, devices, share)]
    own = -(-len(batch.tokens) // devices)
    size = rows_per_part(max(map(len, shares)), -(-own // parts), parts)
    of_sheets = [rows[part * size : (part + 1) * size] for rows in shares for part in range(parts)]
    prompts = [shared_prompts(batch, sequences_in(rows)) if share else None for rows in of_sheets]
    width, most, slots = batch.tokens.shape[1], batch.completions.shape[1], min(MOST_IN_A_ROW * size, own)
    places, line, held = size * width, width, size * width
    if share:
        line = -(-places // (MOST_LINES * LINE_MULTIPLE)) * LINE_MULTIPLE
        held = in_lines(max(tokens_of(batch, sequences_in(rows)) for rows in of_sheets), line)
    copied = in_lines(max(sum(prompt_tokens(batch, one or ())) for one in prompts), line)
    shapes = {
        "tokens": (held,),
        "positions": (held,),
        "scored": (size * most,),
        "targets": (size * most,),
        "places": (size, width),
        "segments": (size, width),
        "first": (held,),
        "others": (copied, max(1, max(map(len, same_prompt(batch)), default=1) - 1)),
    }
    nowhere = {"first": places, "others": places}
    arrays = {name: np.full((len(of_sheets), *shape), nowhere.get(name, 0), np.int32) for name, shape in shapes.items()}
    order = np.full((len(of_sheets), slots), len(batch.tokens))
    starts = np.zeros((len(of_sheets), slots), np.int32)
    for number, (rows, shared) in enumerate(zip(of_sheets, prompts, strict=True)):
        done = Sheet(**{name: x[number] for name, x in arrays.items()}).write(batch, rows, shared)
        order[number, : len(done)] = sequences_in(rows)
        starts[number, : len(done)] = done
    with_empty = pad_rows(batch, len(batch.tokens) + 1)  # the last row stands where a part has fewer sequences
    moved = jax.tree.map(lambda x: x[order.reshape(-1)], with_empty)
    tokens, positions = (arrays[name].reshape(-1, line) for name in ("tokens", "positions"))
    in_rows, segments = (arrays[name].reshape(-1, width) for name in ("places", "segments"))
    standing = Rows(segments, in_rows, arrays["first"], arrays["others"]) if share else Rows(segments)
    packed = Packed(positions, standing, arrays["scored"], arrays["targets"], starts.reshape(-1))
    return dataclasses.replace(moved, tokens=tokens, packed=packed)


ARRANGEMENTS: dict[str, Callable[[Batch, int, int], Batch]] = {
    "apart": lambda batch, devices, parts: pad_rows(batch, devices * parts),
    "rows": functools.partial(pack, share=False),
    "sheets": functools.partial(pack, share=True),
}
"""How an update's sequences lie: a row each, several in a row, or on sheets with shared prompts once."""


def place_batch(mesh: Mesh, batch: Batch, parts: int, arrangement: str) -> Batch:
    """A host's batch on the mesh as it is computed in `parts`."""
    return put(mesh, ARRANGEMENTS[arrangement](batch, mesh.size, parts), by_sequence(mesh))
