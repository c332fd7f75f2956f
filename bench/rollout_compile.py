"""The rollout compiled for TPU chips: `python bench/rollout_compile.py`. No TPU needed, nothing timed; last line JSON.

For every topology and mesh the whole rollout program of `minigrpo.train` is compiled by the real TPU compiler, and for
the pool of the worst case also with half of it; the kernel's cycles are counted too (bench/kernel_cycles.py).
"""

import dataclasses
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench" / "peers")]

import jax
from environment import last_json

from minigrpo.build import Programs
from minigrpo.config import DataOptions, Options, RolloutOptions, Settings, StepOptions, UsageError, option, run_command
from minigrpo.plan import SECTIONS, PlanOptions, count_resident, make_programs, own_rows, plan_rollout, prompt_rows
from minigrpo.planning import memory
from minigrpo.planning.cost import Phase, Work
from minigrpo.rollout.generator import least_pages
from minigrpo.runtime.chips import GIB

MIB = 1 << 20
JOB = {"model": "Qwen/Qwen3-1.7B", "batch_size": 32, "max_prompt_length": 256, "max_completion_length": 2048}
FOOTER = f"defaults here: {', '.join(f'--{name}={value}' for name, value in JOB.items())}"


@dataclasses.dataclass(frozen=True)
class BenchOptions(Options):
    """Layouts"""

    layouts: str = option("v6e:1x1=1,1;v6e:2x4=4,2;v6e:2x4=8,1;v6e:4x4=8,2", "topology=mesh, separated by ;")


def parse_layouts(flag: str) -> list[tuple[str, str]]:
    pairs = [part.split("=") for part in flag.split(";")]
    if any(len(pair) != 2 or pair[0].startswith("gpu") for pair in pairs):
        raise UsageError(f"--layouts={flag}: must be TPU topology=mesh pairs separated by ;, such as v6e:2x4=4,2")
    return [(topology, mesh) for topology, mesh in pairs]


def programs_for(settings: Settings, topology: str, mesh: str, pool_pages: int) -> Programs:
    """What `minigrpo.train` would run there."""
    layout = PlanOptions(topology=topology, mesh=mesh)
    pool = dataclasses.replace(settings[RolloutOptions], pool_pages=pool_pages)
    sections = dict(settings.sections) | {PlanOptions: layout, RolloutOptions: pool}
    return make_programs(Settings(sections, settings.explicit))[0]


def worst_case(programs: Programs) -> tuple[int, int]:
    """Fewest pages of a pool, and those with which every slot may reach its full length."""
    plan, prompts = prompt_rows(programs, count_resident(programs, programs.trainer(1, 1)))
    own = own_rows(prompts)
    least, slots = least_pages(plan, own), min(plan.slots, own.tokens.shape[0] * plan.group)
    return least, least + (slots - 1) * plan.own_pages()


def compile_rollout(programs: Programs) -> Phase:
    """The whole rollout program."""
    steps, data, rollout = (programs.settings[kind] for kind in (StepOptions, DataOptions, RolloutOptions))
    lengths = data.max_prompt_length, rollout.max_completion_length
    work = Work(programs.config, steps.batch_size, steps.num_generations, *lengths)
    held = count_resident(programs, programs.trainer(1, 1))
    return plan_rollout(programs, work, held)


def describe(topology: str, mesh: str, pool: str, pool_bytes: int, phase: Phase) -> str:
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


def figures(topology: str, mesh: str, pool: str, pool_bytes: int, phase: Phase) -> dict:
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


def kernel_cycles(settings: Settings, topology: str) -> dict:
    """Counted in a process of its own: the compiler writes its schedule down only if asked before it starts."""
    page_size = settings[RolloutOptions].page_size
    tokens = settings[DataOptions].max_prompt_length + settings[RolloutOptions].max_completion_length
    flags = f"--topology={topology}", f"--page_size={page_size}", f"--tokens={tokens}"
    return last_json(sys.executable, str(ROOT / "bench" / "kernel_cycles.py"), *flags)


def main(settings: Settings) -> int:
    jax.config.update("jax_platforms", "cpu")
    settings = settings.with_defaults(JOB)
    if settings[RolloutOptions].pool_pages:
        raise UsageError("--pool_pages: this bench takes the worst case's pages and half of them; leave it out")
    layouts = parse_layouts(settings[BenchOptions].layouts)
    pools = [worst_case(programs_for(settings, *layout, 0)) for layout in layouts]  # all are tried before any compiles
    cycles = kernel_cycles(settings, layouts[0][0])
    sys.stderr.write(HEADER)
    rows = []
    for (topology, mesh), (least, most) in zip(layouts, pools, strict=True):
        for pool, pages in (("whole", most), ("half", max(least, most // 2))):
            programs = programs_for(settings, topology, mesh, pages)
            phase = compile_rollout(programs)
            pool_bytes = pages * memory.page_bytes(programs, settings[RolloutOptions].page_size)
            sys.stderr.write(describe(topology, mesh, pool, pool_bytes, phase))
            rows.append(figures(topology, mesh, pool, pool_bytes, phase))
    report = {"bench": "rollout_compile", "jax": jax.__version__, "rollouts": rows, "kernel": cycles}
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    sections = (*(section for section in SECTIONS if section is not PlanOptions), BenchOptions)
    run_command("python bench/rollout_compile.py", __doc__ or "", sections, main, FOOTER)
