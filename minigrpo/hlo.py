"""What a compiled program says of itself: bytes per chip, and collectives with how often they run."""

import collections
import dataclasses
import math
import re
from typing import Any

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"

COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(", re.MULTILINE)
COLLECTIVE = re.compile(rf" = (\S.*?) ({KINDS})(?:-start)?\(")
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
        return self.arguments + self.temporaries + self.outputs - self.aliased


def memory_of(compiled: Any) -> Memory:
    """The memory analysis of a jax Compiled."""
    stats = compiled.memory_analysis()
    return Memory(
        stats.argument_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
    )


WANTED = re.compile(r"([\d.]+)([KMG])\b")
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def memory_wanted(error: Exception) -> int:
    """Bytes that a program which does not fit would take, from the compiler's error; other errors are raised again."""
    sizes = WANTED.findall(str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or not sizes:
        raise error
    return int(float(sizes[0][0]) * UNITS[sizes[0][1]])


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind on one chip."""

    runs: int = 0
    bytes: int = 0
    """Of their results, over all runs that are known by count."""
    runs_in_open_loops: int = 0
    """Collectives inside loops whose length is decided at run time."""


def result_bytes(shapes: str) -> int:
    """Bytes of the arrays in a result type such as '(bf16[8,128]{1,0}, f32[])'; the largest for a started operation."""
    return sum(
        ITEM_BYTES[kind] * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes in ARRAY.findall(re.sub(r"\{[^}]*\}", "", shapes))
        if kind in ITEM_BYTES
    )


def loop_length(condition: str) -> int | None:
    """The constant that a while loop's counter is compared with; None when there is no such constant."""
    limit = CONSTANT_LIMIT.search(condition)
    constant = limit and re.search(rf"%{re.escape(limit[1])} = s32\[\]\S* constant\((\d+)\)", condition)
    return int(constant[1]) if constant else None


def collectives(text: str) -> dict[str, Traffic]:
    """Kind -> its traffic, from the optimised HLO of a program."""
    _, *pieces = COMPUTATION.split(text)
    starts, names, texts = pieces[::3], pieces[1::3], pieces[2::3]
    bodies = dict(zip(names, texts, strict=True))
    entry = next(name for name, start in zip(names, starts, strict=True) if start)
    found: dict[str, Traffic] = collections.defaultdict(Traffic)

    def walk(name: str, times: int, is_open: bool) -> None:
        body = bodies.get(name, "")
        for shapes, kind in COLLECTIVE.findall(body):
            if is_open:
                found[kind].runs_in_open_loops += 1
            else:
                found[kind].runs += times
                found[kind].bytes += times * result_bytes(shapes)
        for condition, inner in WHILE.findall(body):
            length = loop_length(bodies.get(condition, ""))
            walk(inner, times * (length or 1), is_open or length is None)
        branches = [part.strip().lstrip("%") for group in BRANCHES.findall(body) for part in group.split(",")]
        for called in [*CALLED.findall(body), *branches]:
            walk(called, times, is_open)

    walk(entry, 1, False)
    return dict(found)
