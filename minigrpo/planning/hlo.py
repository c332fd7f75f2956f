"""Bytes per chip of a compiled program, and its collectives with their number of runs."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

ITEM_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
}
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"

COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(", re.MULTILINE)
COLLECTIVE = re.compile(rf" = (\S.*?) ({KINDS})(-start)?\(")
SENT = re.compile(r" = \((\S+), u32\[\][^\n]* send\([^\n]*_xla_megascale_transfer_type=\"(\w+)\"")
"""What leaves a slice: the TPU compiler makes it sends to hosts, which exchange it over the data-centre network."""
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
WHILE = re.compile(r"while\([^\n]*condition=%([\w.\-]+), body=%([\w.\-]+)")
CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
CONSTANT_LIMIT = re.compile(r"ROOT [^\n]*compare\([^,]*, %([\w.\-]+)\), direction=LT")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip, as the compiler assigned them."""

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    """Of the outputs, those that take over an argument's place."""

    @property
    def total(self) -> int:
        """Return the bytes that the program needs at once."""
        return self.arguments + self.temporaries + self.outputs - self.aliased


def memory_of(compiled: Any) -> Memory:
    """Read the memory analysis of a jax Compiled."""
    stats = compiled.memory_analysis()
    return Memory(
        stats.argument_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
    )


WANTED = re.compile(r"(?:Used|\() ?([\d.]+)([KMG])")
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def memory_wanted(error: Exception) -> int:
    """Return the bytes of HBM that a program which does not fit would take, from the compiler's error.

    Errors about anything else, a kernel's own memory included, are raised again.
    """
    wanted = WANTED.search(str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error).lower() or not wanted:
        raise error
    return int(float(wanted[1]) * UNITS[wanted[2]])


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind on one chip."""

    runs: int = 0
    bytes: int = 0
    """Of their results, over all runs that are known by count."""
    runs_in_open_loops: int = 0
    """Collectives inside loops whose length is decided at run time."""
    bytes_in_open_loops: int = 0
    """Of their results, counted once each."""


def result_bytes(shapes: str, started: bool = False) -> int:
    """Count the bytes of the arrays in a result type like '(bf16[8,128]{1,0}, f32[])'.

    A started operation's type holds its operands too, so only its largest array counts.
    """
    arrays = ARRAY.findall(re.sub(r"\{[^}]*\}", "", shapes))
    sizes = [ITEM_BYTES[kind] * math.prod(int(size) for size in dims.split(",") if size) for kind, dims in arrays]
    return max(sizes) if started else sum(sizes)


def loop_length(condition: str) -> int | None:
    """Return the constant that a while loop's counter is compared with; None when there is no such constant."""
    limit = CONSTANT_LIMIT.search(condition)
    constant = limit and re.search(rf"%{re.escape(limit[1])} = s32\[\]\S* constant\((\d+)\)", condition)
    return int(constant[1]) if constant else None


def executed(text: str, open_turns: int | None = None) -> Iterator[tuple[str, int, bool]]:
    """Yield every called computation, once per call: its text, how often it runs, and if in an open loop.

    An open loop's length is decided at run time; it counts as `open_turns` if that is given, and else as one turn.
    """
    _, *pieces = COMPUTATION.split(text)
    starts, names, texts = pieces[::3], pieces[1::3], pieces[2::3]
    bodies = dict(zip(names, texts, strict=True))

    def walk(name: str, times: int, is_open: bool) -> Iterator[tuple[str, int, bool]]:
        body = bodies.get(name, "")
        yield body, times, is_open
        for condition, inner in WHILE.findall(body):
            length = loop_length(bodies.get(condition, "")) or open_turns
            yield from walk(inner, times * (1 if length is None else length), is_open or length is None)
        branches = [part.strip().lstrip("%") for group in BRANCHES.findall(body) for part in group.split(",")]
        for called in [*CALLED.findall(body), *branches]:
            yield from walk(called, times, is_open)

    yield from walk(next(name for name, start in zip(names, starts, strict=True) if start), 1, False)


def collectives(text: str, open_turns: int | None = None) -> dict[str, Traffic]:
    """Sum the traffic of each kind of collective in the optimised HLO of a program -> {kind: traffic}.

    `open_turns` is the number of turns of every loop whose length is decided at run time; without it their traffic is
    listed separately. Kinds that leave a slice end with " over DCN", the data-centre network.
    """
    found: dict[str, Traffic] = collections.defaultdict(Traffic)
    for body, times, is_open in executed(text, open_turns):
        inside = [(kind, result_bytes(shapes, bool(started))) for shapes, kind, started in COLLECTIVE.findall(body)]
        outside = [(over_dcn(kind), result_bytes(shapes)) for shapes, kind in SENT.findall(body)]
        for kind, size in inside + outside:
            if is_open:
                found[kind].runs_in_open_loops += 1
                found[kind].bytes_in_open_loops += size
            else:
                found[kind].runs += times
                found[kind].bytes += times * size
    return dict(found)


def over_dcn(kind: str) -> str:
    """Return the name of a kind of collective that leaves a slice.

    >>> over_dcn("ALL_REDUCE")
    'all-reduce over DCN'
    """
    return kind.lower().replace("_", "-") + " over DCN"


def estimated_cycles(text: str) -> int:
    """Sum the TPU compiler's estimates for a program's operations, run one after the other, loops at full length.

    Collectives and plain copies have no estimate; of conditionals all branches count.
    """
    return sum(
        times * sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', body))) for body, times, _ in executed(text)
    )
