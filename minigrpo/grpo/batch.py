"""Short sequences side by side, so that they do not pay for the longest one's length, and shared prompts once.

The sequences are dealt out to devices, and each device's to rows, longest first. Rows are computed in parts of equal
size, from the first on; parts that stay empty are not computed. On "sheets" the layers see no rows, only attention and
the head do: the tokens of a part's rows lie there end to end, and a prompt that several of its sequences have, once.
None of it changes a number but by the order of sums.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from minigrpo.grpo.update import Batch, Packed, bucket, pad_rows
from minigrpo.model.attention import Rows, any_place
from minigrpo.runtime.mesh import by_sequence, put

MOST_IN_A_ROW = 8
"""Sequences that share a row, at most."""

MOST_LINES, LINE_MULTIPLE = 16, 16
"""A sheet has at most so many lines, of one length, a multiple of the second: so few sizes are ever compiled."""

ROW_COST = 0.25
"""What a place in a row costs, in attention and in the head, of what a token of a sheet costs in the layers."""


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


def sequences_in(rows: list[Row]) -> list[int]:
    return [sequence for row in rows for sequence in row.sequences]


def deal(batch: Batch, devices: int, share: bool) -> list[list[Row]]:
    """Each device's rows, dealt sequence by sequence; to `share` prompts, by groups, halves ..., as costs least."""

    def cost(shares):
        tokens, rows = max(tokens_of(batch, sequences_in(rows)) for rows in shares), max(map(len, shares))
        return tokens + ROW_COST * rows * batch.tokens.shape[1]

    largest = max(map(len, same_prompt(batch)), default=1) if share else 1
    dealt = [deal_pieces(batch, devices, largest >> halvings) for halvings in range(largest.bit_length())]
    return min(([fill_rows(batch, sequences) for sequences in shares] for shares in dealt), key=cost)


def fill_rows(batch: Batch, sequences: list[int]) -> list[Row]:
    """First fit, longest first: each goes into the first row that has room for its tokens and for its completion."""
    width, most = batch.tokens.shape[1], batch.completions.shape[1]
    sizes = batch.prompt_lengths + batch.completion_lengths
    rows: list[Row] = []
    for sequence in sorted(sequences, key=lambda i: -sizes[i]):
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
    segments: Int[np.ndarray, "r T"]
    places: Int[np.ndarray, "r T"] | None
    """The token that stands in each place; None where tokens lie as they stand."""

    def write(self, batch: Batch, rows: list[Row], prompts: dict[bytes, int]) -> list[int]:
        """Puts the rows' sequences side by side -> where each one's completion starts among the scored.

        `prompts` are the shared ones, and where they begin.
        """
        at, done, starts = sum(prompt_tokens(batch, prompts)), 0, []
        for number, row in enumerate(rows):
            begin = number * self.segments.shape[1]
            for segment, sequence in enumerate(row.sequences, 1):
                prompt, completion = int(batch.prompt_lengths[sequence]), int(batch.completion_lengths[sequence])
                span, scores = slice(begin, begin + prompt + completion), slice(done, done + completion)
                own = np.arange(span.start, span.stop)
                if self.places is not None:
                    own, at = lay_end_to_end(prompts.get(prompt_of(batch, sequence)), prompt, completion, at)
                    self.places.reshape(-1)[span] = own
                self.segments.reshape(-1)[span] = segment
                self.tokens[own], self.positions[own] = batch.tokens[sequence, : len(own)], np.arange(len(own))
                self.scored[scores] = np.arange(span.start + prompt - 1, span.stop - 1)
                self.targets[scores] = batch.completions[sequence, :completion]
                starts.append(done)
                begin, done = span.stop, scores.stop
        return starts


def counted(numbers: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """0, 1 ... for each run of equal ones among sorted numbers."""
    return np.arange(len(numbers)) - np.searchsorted(numbers, numbers)


def find_places(
    places: Int[np.ndarray, "r T"],
    segments: Int[np.ndarray, "r T"],
    first: Int[np.ndarray, "M"],
    others: Int[np.ndarray, "Q E"],
) -> None:
    """Inverts `places`: writes where each token stands."""
    used = np.flatnonzero(segments)
    used = used[np.argsort(places.reshape(-1)[used], kind="stable")]
    token = places.reshape(-1)[used]
    copy = counted(token)
    first[token[copy == 0]] = used[copy == 0]
    others[token[copy > 0], copy[copy > 0] - 1] = used[copy > 0]


def in_turn(rows: Rows) -> Int[np.ndarray, "S M"]:
    """One of each token's places, of a shared one's each in turn, so that rows share the queries of their prompts."""
    chosen, nowhere = rows.first.copy(), rows.segments.size // len(rows.first)
    copies = 1 + (rows.others < nowhere).sum(axis=2)
    copy = np.arange(copies.shape[1]) % copies
    other = np.take_along_axis(rows.others, np.maximum(copy - 1, 0)[:, :, None], axis=2)[:, :, 0]
    chosen[:, : copies.shape[1]] = np.where(copy > 0, other, chosen[:, : copies.shape[1]])
    return chosen


def with_queries(rows: Rows, anywhere: bool) -> Rows:
    """Rows with a query for every token: in the token's first place, or `anywhere`, so that a row has few queries."""
    (sheets, tokens), (count, width) = rows.first.shape, rows.segments.shape
    own, stands = count // sheets, in_turn(rows) if anywhere else rows.first
    sheet, token = np.nonzero(stands < own * width)
    stands = sheet * own * width + stands[sheet, token]  # in all rows, end to end
    order = np.argsort(stands)
    sheet, token = sheet[order], token[order]
    row, place = np.divmod(stands[order], width)
    number = counted(row) if anywhere else place
    most = bucket(int(number.max(initial=0)) + 1, width) if anywhere else width
    query_tokens = np.full((count, most), tokens, np.int32)
    query_places = np.zeros((count, most), np.int32)
    query_numbers = np.full((sheets, tokens), own * most, np.int32)
    query_tokens[row, number] = token
    query_places[row, number] = place
    query_numbers[sheet, token] = row % own * most + number
    return dataclasses.replace(rows, query_tokens=query_tokens, query_places=query_places, query_numbers=query_numbers)


def lay_end_to_end(shared: int | None, prompt: int, completion: int, at: int) -> tuple[Int[np.ndarray, "n"], int]:
    """Where a sequence's tokens lie if its own begin `at`, and where the next begin; `shared` is its prompt's place."""
    if shared is None:
        return np.arange(at, at + prompt + completion), at + prompt + completion
    own = np.arange(at, at + completion)
    return np.concatenate([np.arange(shared, shared + prompt), own]), at + completion


def in_lines(tokens: int, line: int) -> int:
    """Tokens of as many whole lines as are needed, at least one."""
    return max(1, -(-tokens // line)) * line


def in_parts(rows: list[Row], size: int, parts: int) -> list[list[Row]]:
    """Rows in the first parts, no more than these need; long sequences and short ones in each alike."""
    used = -(-len(rows) // size)
    return [rows[part::used] if part < used else [] for part in range(parts)]


def power_of_two(least: int) -> int:
    """The first that is not below `least`."""
    return 1 << (least - 1).bit_length()


def sheet_sizes(
    batch: Batch, sheets: list[list[int]], prompts: list[dict[bytes, int]], size: int
) -> tuple[int, int, int, int]:
    """Tokens of a line, and M, Q and E of `Rows`, for sheets of these sequences and shared prompts, of `size` rows."""
    line = -(-size * batch.tokens.shape[1] // (MOST_LINES * LINE_MULTIPLE)) * LINE_MULTIPLE
    held = in_lines(max(tokens_of(batch, sequences) for sequences in sheets), line)
    copied = in_lines(max(sum(prompt_tokens(batch, shared)) for shared in prompts), line)
    members = min(max(map(len, same_prompt(batch)), default=1), MOST_IN_A_ROW * size)
    return line, held, min(held, line * power_of_two(copied // line)), max(1, power_of_two(members) - 1)


def pack(batch: Batch, devices: int, parts: int, share: bool) -> Batch:
    """A batch on the host with its sequences side by side, all in the order of devices, of parts, and of rows."""
    shares = deal(batch, devices, share)
    own, (width, most) = -(-len(batch.tokens) // devices), (x.shape[1] for x in (batch.tokens, batch.completions))
    size = rows_per_part(max(map(len, shares)), -(-own // parts), parts)
    sheets = [part for rows in shares for part in in_parts(rows, size, parts)]
    sequences = [sequences_in(rows) for rows in sheets]
    prompts = [shared_prompts(batch, one) if share else {} for one in sequences]
    line, held, copied, copies = sheet_sizes(batch, sequences, prompts, size) if share else (width, size * width, 0, 0)

    def blank(*shape, fill=0):
        return np.full((len(sheets), *shape), fill, np.int32)

    tokens, positions, segments = blank(held), blank(held), blank(size, width)
    scored, targets = blank(size * most), blank(size * most)
    order = blank(min(MOST_IN_A_ROW * size, own), fill=len(batch.tokens))
    starts, rows = np.zeros_like(order), Rows(segments.reshape(-1, width))
    if share:
        nowhere = size * width
        places, first, others = blank(size, width), blank(held, fill=nowhere), blank(copied, copies, fill=nowhere)
        rows = Rows(rows.segments, places.reshape(-1, width), first, others)
    for i, (in_sheet, shared) in enumerate(zip(sheets, prompts, strict=True)):
        sheet = Sheet(tokens[i], positions[i], scored[i], targets[i], segments[i], places[i] if share else None)
        done = sheet.write(batch, in_sheet, shared)
        order[i, : len(done)], starts[i, : len(done)] = sequences[i], done
        if share:
            find_places(places[i], segments[i], first[i], others[i])
    with_empty = pad_rows(batch, len(batch.tokens) + 1)  # the last row stands where a part has fewer sequences
    moved = jax.tree.map(lambda x: x[order.reshape(-1)], with_empty)
    packed = Packed(positions.reshape(-1, line), rows, scored, targets, starts.reshape(-1))
    return dataclasses.replace(moved, tokens=tokens.reshape(-1, line), packed=packed)


ARRANGEMENTS: dict[str, Callable[[Batch, int, int], Batch]] = {
    "apart": lambda batch, devices, parts: pad_rows(batch, devices * parts),
    "rows": functools.partial(pack, share=False),
    "sheets": functools.partial(pack, share=True),
}
"""How an update's sequences lie: a row each, several in a row, or on sheets with shared prompts once."""


def lay_out(mesh: Mesh, batch: Batch, parts: int, arrangement: str) -> Batch:
    """A host's batch as the mesh computes it in `parts`."""
    laid_out = ARRANGEMENTS[arrangement](batch, mesh.size, parts)
    packed = laid_out.packed
    if packed is None or packed.rows.tokens is None:
        return laid_out
    rows = with_queries(packed.rows, any_place(mesh.devices.flat[0].platform))
    return dataclasses.replace(laid_out, packed=dataclasses.replace(packed, rows=rows))


def place_batch(mesh: Mesh, batch: Batch, parts: int, arrangement: str) -> Batch:
    """The same on the mesh."""
    return put(mesh, lay_out(mesh, batch, parts, arrangement), by_sequence(mesh))
