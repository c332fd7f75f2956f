"""Counted cycles of the TPU kernel: `python bench/kernel_cycles.py`. No TPU needed, nothing timed; last line JSON.

The kernel is compiled by the real TPU compiler, which writes its final schedule down. One bundle is one cycle, stalls
aside. A block of the cache is free when its bundles take no longer than its bytes take to arrive from HBM.
"""

import dataclasses
import json
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from minigrpo.command_line import run_command
from minigrpo.config import Options, Settings, UsageError, option
from minigrpo.kernels.paged_attention import tpu
from minigrpo.plan import find_chip, topology_devices

BUNDLE = re.compile(r"^\s*0x[0-9a-f]+\s+([A-Z]{2})?\s*:\s*(>*)\s*(\{\})?", re.MULTILINE)
"""A line of the schedule: LB where a loop's body starts, a mark for each loop around it, {} if empty and unmarked."""


@dataclasses.dataclass(frozen=True)
class BenchOptions(Options):
    """Kernel"""

    topology: str = option("v6e:2x2", "TPU generation and chips; the kernel runs on one")
    heads: int = option(16, "query heads", low=1)
    kv_heads: int = option(8, "key-value heads", low=1)
    head_dim: int = option(128, "head size", low=1)
    page_size: int = option(64, "tokens per page", low=1)
    tokens: int = option(2304, "tokens of every sequence", low=1)
    sequences: int = option(64, "sequences", low=1)
    block_bytes: int = option(0, "keys and values per block; 0 is what tuned.json has for the chip", low=0)
    dtype: str = option("bfloat16", "of queries and pages", choices=("bfloat16", "float32"))


@dataclasses.dataclass(frozen=True)
class KernelSettings(Settings):
    """The flags of this bench."""

    kernel: BenchOptions = BenchOptions()


def compile_kernel(options: BenchOptions, tuning: tpu.Tuning) -> None:
    """Compile the kernel for one chip."""
    mesh = Mesh(np.array(topology_devices(options.topology)[:1]), ("x",))

    def shape(sizes: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    entries = -(-options.tokens // options.page_size)
    width, dtype = 2 * options.kv_heads * options.head_dim, jnp.dtype(options.dtype)
    arguments = (
        shape((options.sequences, options.heads, options.head_dim), dtype),
        shape((2, options.sequences * entries, options.page_size, width), dtype),
        shape((), np.int32),
        shape((options.sequences,), np.int32),
        shape((options.sequences, entries), np.int32),
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(lambda *args: tpu.tuned_attention(*args, tuning)).lower(*arguments).compile()


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Bundles of the schedule: per sequence, with what is done once per call; per block; and per page of it."""

    sequence: int
    block: int
    fetch: int
    wait: int
    clear: int


def read_schedule(text: str) -> Cycles:
    """Find the schedule's loops: over sequences, in it last over blocks, in that over pages three times."""
    depths: list[int] = []
    starts: dict[int, list[int]] = {1: [], 2: [], 3: []}
    for label, marks, empty in BUNDLE.findall(text):
        if label == "LB":
            starts[len(marks)].append(len(depths))
        depths.append(depths[-1] if empty and depths else len(marks))
    first = starts[2][-1]
    last = max(index for index, depth in enumerate(depths) if depth >= 2)
    fetch, wait, clear = (length_of_loop(depths, start) for start in starts[3] if start > first)
    block = last + 1 - first - fetch - wait - clear
    outside = len([depth for depth in depths if depth >= 1]) - (last + 1 - first)
    return Cycles(outside, block, fetch, wait, clear)


def length_of_loop(depths: list[int], start: int) -> int:
    """Count the bundles from an innermost loop's start on that are as deep as it."""
    return next(length for length in range(len(depths)) if depths[start + length] < depths[start])


def counted_cycles(options: BenchOptions, pages: int, cycles: Cycles) -> tuple[int, int]:
    """Count the cycles of computing one sequence, and one block that is full with `pages` pages."""
    entries = -(-options.tokens // options.page_size)
    blocks = -(-entries // pages)
    full = cycles.block + pages * (cycles.fetch + cycles.wait)
    whole = cycles.sequence + blocks * cycles.block + entries * (cycles.fetch + cycles.wait)
    cleared = blocks * pages - options.tokens // options.page_size
    return whole + cleared * cycles.clear, full


def read_cycles(options: BenchOptions) -> tuple[tpu.Tuning, Cycles]:
    """Compile the kernel and read its schedule -> the tuning that it was compiled with, and its cycles."""
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        regex = "--xla_jf_dump_llo_pass_label_regex=.*packed-bundles-post-ra.*"
        os.environ["LIBTPU_INIT_ARGS"] = f"{dump} {regex}"
        tuning = tpu.read_tuning(topology_devices(options.topology)[0].device_kind)
        if options.block_bytes:
            tuning = dataclasses.replace(tuning, block_bytes=options.block_bytes)
        compile_kernel(options, tuning)
        schedule = next(pathlib.Path(folder).glob("*paged_attention*-01-packed-bundles-post-ra.txt"))
        return tuning, read_schedule(schedule.read_text())


def main(settings: KernelSettings) -> int:
    """Count the kernel's cycles and compare them with those its bytes take."""
    options = settings.kernel
    jax.config.update("jax_platforms", "cpu")
    if options.heads % options.kv_heads:
        raise UsageError(f"--heads={options.heads}: must be a multiple of --kv_heads={options.kv_heads}")
    chip = find_chip(options.topology)
    if not chip.tflops:
        raise UsageError(f"--topology={options.topology}: the kernel is the TPU's; use such as v6e:2x2")
    tuning, cycles = read_cycles(options)
    row_bytes = 2 * options.kv_heads * options.head_dim * jnp.dtype(options.dtype).itemsize
    page_bytes = options.page_size * row_bytes
    pages = tpu.pages_per_block(tuning, page_bytes, -(-options.tokens // options.page_size))
    computed, full = counted_cycles(options, pages, cycles)
    per_byte = chip.clock / chip.bandwidth
    sequence_bytes = options.tokens * row_bytes
    arriving, first = sequence_bytes * per_byte, min(sequence_bytes, pages * page_bytes) * per_byte
    limit = options.sequences * arriving
    counted = options.sequences * max(arriving, computed) + first
    report = {
        "bench": "kernel_cycles",
        "jax": jax.__version__,
        **dataclasses.asdict(options),
        "tuning": dataclasses.asdict(tuning),
        "cycles_per_full_block": full,
        "hbm_cycles_per_full_block": round(pages * page_bytes * per_byte),
        "cycles_per_sequence": computed,
        "hbm_cycles_per_sequence": round(arriving),
        "limit_microseconds": round(limit / chip.clock / 1e3, 1),
        "counted_microseconds": round(counted / chip.clock / 1e3, 1),
        "share_of_limit": round(limit / counted, 4),
    }
    sys.stderr.write(
        f"limit: {limit / chip.clock / 1e3:.0f} us to read the cache at {chip.bandwidth:g} GB/s\n"
        f"ours:  a full block is {full} cycles of work while {report['hbm_cycles_per_full_block']} pass as it arrives; "
        f"counted {report['counted_microseconds']} us, {report['share_of_limit']:.1%} of the limit\n"
    )
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    run_command("python bench/kernel_cycles.py", __doc__ or "", ("kernel",), main, kind=KernelSettings)
