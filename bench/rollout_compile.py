"""The rollout compiled for TPU chips: `python bench/rollout_compile.py`. No TPU needed, nothing timed; last line JSON.

For every topology and mesh the whole rollout program of `minigrpo.train` is compiled by the real TPU compiler, and for
the pool of the worst case also with half of it; the kernel's cycles are counted too (bench/kernel_cycles.py).
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench" / "peers")]

import jax
from environment import last_json

from minigrpo.command_line import run_command
from minigrpo.config import Options, PlanOptions, Settings, UsageError, option
from minigrpo.plan import SECTIONS, count_work, make_shapes, plan_rollout, plan_spec, rollout_inputs
from minigrpo.planning import memory
from minigrpo.planning.cost import Phase
from minigrpo.planning.run_spec import RunSpec
from minigrpo.runtime.chips import GIB

MIB = 1 << 20
JOB = {"model": "Qwen/Qwen3-1.7B", "batch_size": 32, "max_prompt_length": 256, "max_completion_length": 2048}
FOOTER = f"defaults here: {', '.join(f'--{name}={value}' for name, value in JOB.items())}"


@dataclasses.dataclass(frozen=True)
class BenchOptions(Options):
    """Layouts"""

    layouts: str = option("v6e:1x1=1,1;v6e:2x4=4,2;v6e:2x4=8,1;v6e:4x4=8,2", "topology=mesh, separated by ;")


@dataclasses.dataclass(frozen=True)
class CompileSettings(Settings):
    """The plan's settings but its one layout, and this bench's."""

    compiled: BenchOptions = BenchOptions()


def parse_layouts(flag: str) -> list[tuple[str, str]]:
    """Parse 'v6e:2x4=4,2;v6e:2x4=8,1' into pairs of topology and mesh."""
    pairs = [part.split("=") for part in flag.split(";")]
    if any(len(pair) != 2 or pair[0].startswith("gpu") for pair in pairs):
        raise UsageError(f"--layouts={flag}: must be TPU topology=mesh pairs separated by ;, such as v6e:2x4=4,2")
    return [(topology, mesh) for topology, mesh in pairs]


def spec_for(settings: CompileSettings, topology: str, mesh: str, pool_pages: int) -> RunSpec:
    """Return the spec of the run that `minigrpo.train` would make there."""
    layout = PlanOptions(topology=topology, mesh=mesh)
    pool = dataclasses.replace(settings.rollout, pool_pages=pool_pages)
    return plan_spec(dataclasses.replace(settings, plan=layout, rollout=pool))


def worst_case(spec: RunSpec) -> tuple[int, int]:
    """Return the fewest pages of a pool, and those with which every slot may reach its full length."""
    steps, held = spec.settings.steps, make_shapes(spec).held.total
    inputs = rollout_inputs(spec, spec.settings.rollout, steps.batch_size, steps.num_generations, held)
    made, prompts, group, _ = inputs
    least = made.least_pages(prompts)
    return least, least + (made.slot_count(prompts, group) - 1) * made.completion_pages


def compile_rollout(spec: RunSpec) -> Phase:
    """Compile the whole rollout program."""
    shapes, steps = make_shapes(spec), spec.settings.steps
    work = count_work(spec, steps.batch_size, steps.num_generations)
    return plan_rollout(shapes, work, shapes.held, spec.settings.rollout)


def describe(topology: str, mesh: str, pool: str, pool_bytes: int, phase: Phase) -> str:
    """Return a line of the table."""
    used = phase.memory
    return (
        f"{topology:<9} {mesh:<5} {pool:<5} {pool_bytes / GIB:>6.2f} {used.arguments / GIB:>9.3f} "
        f"{used.outputs / MIB:>8.2f} {used.aliased / MIB:>8.2f} {used.temporaries / GIB:>8.3f} "
        f"{(used.temporaries - pool_bytes) / MIB:>9.1f} {phase.total / GIB:>9.2f} "
        f"{sum(t.runs_in_open_loops for t in phase.traffic.values()):>9} "
        f"{sum(t.bytes_in_open_loops for t in phase.traffic.values()):>9} {phase.compile_seconds:>8.0f}\n"
    )


HEADER = (
    f"{'topology':<9} {'mesh':<5} {'pool':<5} {'':>6} {'arguments':>9} {'outputs':>8} {'aliased':>8} {'temp.':>8} "
    f"{'of it not':>9} {'with all':>9} {'in loop:':>9} {'bytes':>9} {'compile':>8}\n"
    f"{'per chip':<21} {'GiB':>6} {'GiB':>9} {'MiB':>8} {'MiB':>8} {'GiB':>8} {'pool, MiB':>9} {'held, GiB':>9} "
    f"{'collect.':>9} {'per turn':>9} {'s':>8}\n"
)


def figures(topology: str, mesh: str, pool: str, pool_bytes: int, phase: Phase) -> dict[str, Any]:
    """Return what the last line has of a rollout."""
    return {
        "topology": topology,
        "mesh": mesh,
        "pool": pool,
        "pool_bytes": pool_bytes,
        "memory_bytes": dataclasses.asdict(phase.memory),
        "all_held_gib": round(phase.total / GIB, 3),
        "collectives": {kind: dataclasses.asdict(traffic) for kind, traffic in phase.traffic.items()},
        "compile_seconds": round(phase.compile_seconds, 1),
    }


def kernel_cycles(settings: Settings, topology: str) -> dict[str, Any]:
    """Count the kernel's cycles in a process of its own, as the compiler must be asked for its schedule first."""
    tokens = settings.data.max_prompt_length + settings.rollout.max_completion_length
    flags = f"--topology={topology}", f"--page_size={settings.rollout.page_size}", f"--tokens={tokens}"
    return last_json(sys.executable, str(ROOT / "bench" / "kernel_cycles.py"), *flags)


def main(settings: CompileSettings) -> int:
    """Compile every layout, with the whole pool and with half of it."""
    jax.config.update("jax_platforms", "cpu")
    settings = settings.with_defaults(JOB)
    if settings.rollout.pool_pages:
        raise UsageError("--pool_pages: this bench takes the worst case's pages and half of them; leave it out")
    layouts = parse_layouts(settings.compiled.layouts)
    pools = [worst_case(spec_for(settings, *layout, 0)) for layout in layouts]  # all are tried before any compiles
    cycles = kernel_cycles(settings, layouts[0][0])
    sys.stderr.write(HEADER)
    rows = []
    for (topology, mesh), (least, most) in zip(layouts, pools, strict=True):
        for pool, pages in (("whole", most), ("half", max(least, most // 2))):
            spec = spec_for(settings, topology, mesh, pages)
            phase, pool_bytes = compile_rollout(spec), pages * memory.page_bytes(spec)
            sys.stderr.write(describe(topology, mesh, pool, pool_bytes, phase))
            rows.append(figures(topology, mesh, pool, pool_bytes, phase))
    report = {"bench": "rollout_compile", "jax": jax.__version__, "rollouts": rows, "kernel": cycles}
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    sections = (*(name for name in SECTIONS if name != "plan"), "compiled")
    run_command("python bench/rollout_compile.py", __doc__ or "", sections, main, FOOTER, CompileSettings)
