"""Memory and time of log-probs with gradients, full logits against ours: `python bench/logprob_memory.py`.

On this machine, each in processes of its own, in turn; and with --topology compiled for one TPU mesh, where bytes are
the compiler's and times the cycles that it estimates, without collectives and copies. Last line JSON.
"""

import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from minigrpo.command_line import run_command
from minigrpo.config import Options, Settings, option, parse_mesh
from minigrpo.grpo.logprobs import LMHead, token_logprobs
from minigrpo.kernels.backend import backend_for
from minigrpo.plan import topology_mesh
from minigrpo.planning import hlo
from minigrpo.runtime.chips import CHIPS
from minigrpo.runtime.mesh import FSDP, TP, by_sequence, make_mesh, start_platform

VARIANTS = ("naive", "ours")


@dataclasses.dataclass(frozen=True)
class BenchOptions(Options):
    """Log-probs"""

    tokens: int = option(2048, "tokens scored per device", low=1)
    vocab: int = option(151936, "vocabulary rows", low=16)
    hidden: int = option(256, "embedding size", low=8)
    repeats: int = option(3, "processes of each variant; the median counts", low=1)
    topology: str = option("none", "TPU generation and chips to compile for instead of measuring, such as v6e:2x4")
    mesh: str = option("1,1", "FSDP,TP mesh")
    variant: str = option("both", "measure one variant in this process", choices=("both", *VARIANTS))


@dataclasses.dataclass(frozen=True)
class LogprobSettings(Settings):
    """The flags of this bench."""

    logprobs: BenchOptions = BenchOptions()


def make_head(options: BenchOptions, mesh: Mesh) -> LMHead:
    """Return the head with the tiles of the mesh's devices."""
    return LMHead(mesh, options.vocab, 1.0, backend_for(mesh.devices.flat[0]).head_tiles)


def naive_logprobs(head: LMHead, hidden: Array, weights: Array, targets: Array) -> tuple[Array, Array]:
    """Compute log-probs from the whole logits: sequences over all devices, the vocabulary over tp."""
    logits = jnp.einsum("MD,VD->MV", hidden, weights.astype(hidden.dtype), preferred_element_type=jnp.float32)
    logits = jax.lax.with_sharding_constraint(logits, NamedSharding(head.mesh, PartitionSpec(FSDP, TP)))
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), targets[:, None], axis=-1)
    return chosen[:, 0], jnp.zeros(len(targets))


def programs(variant: str, head: LMHead) -> tuple[Any, Any]:
    """Return the variant's forward pass and its gradients, jitted."""
    function: Callable[..., Any] = token_logprobs if variant == "ours" else naive_logprobs

    def loss(hidden: Array, weights: Array, targets: Array) -> Array:
        total: Array = function(head, hidden, weights, targets)[0].sum()
        return total

    return jax.jit(lambda *args: function(head, *args)[0]), jax.jit(jax.grad(loss, argnums=(0, 1)))


def arguments(options: BenchOptions, mesh: Mesh, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return abstract hidden states, weights and targets, laid out as in training."""
    rows = by_sequence(mesh)
    count = options.tokens * mesh.size
    return (
        jax.ShapeDtypeStruct((count, options.hidden), dtype, sharding=rows),
        jax.ShapeDtypeStruct(
            (options.vocab, options.hidden), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(TP, FSDP))
        ),
        jax.ShapeDtypeStruct((count,), jnp.int32, sharding=rows),
    )


def forget_peak() -> None:
    """Make the kernel's record of this process's peak start over (proc(5))."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def status_bytes(name: str) -> int:
    """Read a size from /proc/self/status: VmRSS now, VmHWM the peak."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(options: BenchOptions) -> dict[str, float]:
    """Measure seconds of forward plus backward, and the bytes that the process grew by, in this process."""
    start_platform(options.mesh)
    mesh = make_mesh(options.mesh)
    jax.config.update("jax_default_matmul_precision", "highest")
    gradients = programs(options.variant, make_head(options, mesh))[1]
    shapes = arguments(options, mesh, jnp.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    values = (
        jax.device_put(jax.random.normal(keys[0], shapes[0].shape), shapes[0].sharding),
        jax.device_put(jax.random.normal(keys[1], shapes[1].shape) * 0.02, shapes[1].sharding),
        jax.device_put(jax.random.randint(keys[2], shapes[2].shape, 0, options.vocab), shapes[2].sharding),
    )
    compiled = gradients.lower(*values).compile()
    forget_peak()
    before = status_bytes("VmRSS")
    jax.block_until_ready(compiled(*values))
    started = time.perf_counter()
    jax.block_until_ready(compiled(*values))
    return {
        "seconds": time.perf_counter() - started,
        "grown_bytes": status_bytes("VmHWM") - before,
        "temporaries": hlo.memory_of(compiled).temporaries,
    }


def in_turn(options: BenchOptions) -> dict[str, Any]:
    """Return medians of both variants, each process after one of the other."""
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    given = {name: value for name, value in dataclasses.asdict(options).items() if name != "variant"}
    for _ in range(options.repeats):
        for variant in VARIANTS:
            flags = [f"--{name}={value}" for name, value in given.items()]
            command = [sys.executable, __file__, f"--variant={variant}", *flags]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[variant].append(json.loads(output.splitlines()[-1]))
    return {
        variant: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for variant, runs in found.items()
    }


def counted(mesh: Mesh, program: Any, shapes: tuple[Any, ...]) -> tuple[int, int | None]:
    """Count bytes of temporaries and cycles per chip; for a program that does not fit, all wanted bytes and None."""
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            done = program.lower(*shapes).compile()
    except jax.errors.JaxRuntimeError as error:
        return hlo.memory_wanted(error), None
    return hlo.memory_of(done).temporaries, hlo.estimated_cycles(done.as_text())


def compiled_for(options: BenchOptions) -> dict[str, Any]:
    """Count scratch and milliseconds per chip of forward and of gradients, for both variants."""
    mesh = topology_mesh(options.topology, options.mesh)
    head = make_head(options, mesh)
    shapes = arguments(options, mesh, jnp.bfloat16)
    clock = CHIPS[options.topology.split(":")[0]].clock * 1e6
    report: dict[str, dict[str, Any]] = {}
    for variant in VARIANTS:
        report[variant] = {}
        for name, program in zip(("forward", "gradients"), programs(variant, head), strict=True):
            scratch, cycles = counted(mesh, program, shapes)
            milliseconds = None if cycles is None else round(cycles / clock, 1)
            report[variant] |= {f"{name}_gib": round(scratch / 2**30, 3), f"{name}_ms": milliseconds}
            took = "does not fit" if milliseconds is None else f"{milliseconds} ms counted"
            sys.stderr.write(f"{variant}, {name}: {scratch / 2**30:.2f} GiB of scratch, {took}\n")
    return report


def main(settings: LogprobSettings) -> int:
    """Measure both variants here, or count them for a TPU."""
    options = settings.logprobs
    if options.variant != "both":
        sys.stdout.write(json.dumps(measure(options)) + "\n")
        return 0
    parse_mesh(options.mesh)
    report: dict[str, Any] = {"bench": "logprob_memory", "jax": jax.__version__, **dataclasses.asdict(options)}
    least = 4 * options.tokens * options.vocab
    sys.stderr.write(f"full logits of {options.tokens} tokens: {least / 1e9:.2f} GB in float32 on each device\n")
    if options.topology != "none":
        jax.config.update("jax_platforms", "cpu")
        report |= compiled_for(options)
    else:
        found = in_turn(options)
        ratio = {
            "memory_ratio": found["naive"]["grown_bytes"] / found["ours"]["grown_bytes"],
            "time_ratio": found["ours"]["seconds"] / found["naive"]["seconds"],
        }
        report |= found | {name: round(value, 3) for name, value in ratio.items()}
        sys.stderr.write(
            f"ours takes 1/{report['memory_ratio']:.1f} of the memory and {report['time_ratio']:.2f} of the time\n"
        )
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    run_command("python bench/logprob_memory.py", __doc__ or "", ("logprobs",), main, kind=LogprobSettings)
