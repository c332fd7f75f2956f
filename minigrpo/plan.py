"""`python -m minigrpo.plan`: what a run needs of every chip, found without one.

The very programs that `minigrpo.train` runs are compiled by the real TPU compiler for the topology; bytes are its own,
times are only what counted bytes and FLOPs imply. Nothing is measured. The exit code is 0 whether or not it fits.
"""

import dataclasses
import functools
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from minigrpo.build import DEFAULT_MODEL, Programs, check_lora, check_loss, check_quantize
from minigrpo.config import (
    DataOptions,
    LoraOptions,
    LossOptions,
    ModelOptions,
    OptimizerOptions,
    RolloutOptions,
    Settings,
    StepOptions,
    UsageError,
    parse_mesh,
    run_command,
)
from minigrpo.data.chat import load_tokenizer
from minigrpo.grpo import update as grpo
from minigrpo.grpo.batch import lay_out
from minigrpo.grpo.optimizer import TrainState, apply_gradients
from minigrpo.model.hub import placed
from minigrpo.model.lora import make_lora
from minigrpo.model.qwen import ModelConfig, abstract_params, join, parse_config, read_config, split_trained
from minigrpo.planning import gpu as budget
from minigrpo.planning import hlo, memory
from minigrpo.planning.cost import Counted, Phase, Work, bytes_on_chip
from minigrpo.planning.gpu import GpuPrograms, parse_card
from minigrpo.rollout.generator import RolloutPlan, decode_weights, least_pages, num_pages, rollout_program, spread
from minigrpo.runtime.chips import CHIPS, GIB, Chip
from minigrpo.runtime.mesh import arrange, by_sequence, check_divisible, replicated

FAMILIES = Path(__file__).parent / "builtin" / "families.json"


SECTIONS = (
    ModelOptions, LoraOptions, DataOptions, RolloutOptions, LossOptions, OptimizerOptions, StepOptions, PlanOptions,
)  # fmt: skip


# The pieces of a plan

NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Keeps the TPU library from looking for chips, and from complaining that there are none; any known type will do."""


def topology_devices(name: str) -> list[Any]:
    """Chips that are not there, for the compiler; UsageError for an unknown topology.

    Programs for them cannot be read back from jax's cache of compiled ones, so that is off from here on.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    os.environ |= NO_TPU
    options: dict[str, Any] = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    if re.fullmatch(r"\w+:1x1(x1)?", name):
        options["chips_per_host_bounds"] = (1, 1, 1)  # the library takes four chips for a host's
    try:
        return topologies.get_topology_desc(name, platform="tpu", **options).devices
    except Exception as error:  # the TPU library raises its own, unnamed kinds
        reason, example = str(error).splitlines()[0], "2x2x2" if name.startswith(("v4", "v5p")) else "2x4"
        raise UsageError(
            f"--topology={name}: not chips that the TPU compiler knows; use such as "
            f"{name.partition(':')[0]}:{example} ({reason})"
        ) from error


def topology_mesh(name: str, mesh_flag: str) -> Mesh:
    """A mesh of chips that are not there; UsageError for a mesh of another size."""
    fsdp, tp = parse_mesh(mesh_flag)
    devices = topology_devices(name)
    if len(devices) != fsdp * tp:
        raise UsageError(
            f"--mesh={mesh_flag}: {fsdp * tp} chips, but --topology={name} has {len(devices)}; "
            f"use --mesh={len(devices)},1 or another pair whose product is {len(devices)}"
        )
    return arrange(devices, fsdp, tp)


def known_model(name: str) -> tuple[ModelConfig, int]:
    """Config and number of real tokens of a folder's or a published model, without network."""
    if Path(name).is_dir():
        config = read_config(Path(name) / "config.json")
        return config, min(load_tokenizer(Path(name)).num_tokens, config.vocab_size)
    families = json.loads(FAMILIES.read_text())
    base = re.sub(r"-(Base|Instruct)$", "", name)
    if base not in families:
        raise UsageError(f"--model={name}: neither a folder nor one of {', '.join(families)}")
    return parse_config(families[base], str(FAMILIES)), families[base]["num_tokens"]


def virtual_mesh(mesh_flag: str) -> Mesh:
    """Virtual CPU devices that stand for cards."""
    fsdp, tp = parse_mesh(mesh_flag)
    jax.config.update("jax_num_cpu_devices", fsdp * tp)
    return arrange(jax.devices(), fsdp, tp)


def make_programs(settings: Settings) -> tuple[Programs, Chip]:
    """What `train` would run on the topology, and the chip it is made of."""
    options, wanted = settings[ModelOptions], settings[PlanOptions]
    name = DEFAULT_MODEL if options.model == "auto" else options.model
    dtype = "bfloat16" if options.compute_dtype == "auto" else options.compute_dtype
    on_gpu = wanted.topology.startswith("gpu:")
    chip = parse_card(wanted.topology) if on_gpu else find_chip(wanted.topology)
    config, num_tokens = known_model(name)
    config = dataclasses.replace(config, lora=make_lora(settings[LoraOptions]), int8=options.quantize == "int8")
    mesh = virtual_mesh(wanted.mesh) if on_gpu else topology_mesh(wanted.topology, wanted.mesh)
    check_divisible(config.sizes, mesh)
    check_loss(settings[LossOptions], settings[RolloutOptions])
    check_lora(settings, config)
    check_quantize(config)
    if dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    parts = settings, config, abstract_params(config)[0], mesh, jnp.dtype(dtype), num_tokens, (num_tokens - 1,)
    return GpuPrograms(*parts, int(chip.hbm_gib)) if on_gpu else Programs(*parts), chip


def find_chip(topology: str) -> Chip:
    """The table's chip; UsageError for an unknown one."""
    kind = topology.partition(":")[0]
    if kind not in CHIPS:
        raise UsageError(
            f"--topology={topology}: must be one of {', '.join(CHIPS)} and its chips, such as v6e:2x4, or gpu:80GB"
        )
    return CHIPS[kind]


def placed_params(programs: Programs, dtype: Any) -> tuple[Any, Any]:
    """What is trained, in float32, and what is not, in `dtype`."""
    trained = split_trained(programs.config, abstract_params(programs.config)[1])[0]
    frozen = split_trained(programs.config, abstract_params(programs.config, dtype)[1])[1]
    return placed(programs.mesh, trained), placed(programs.mesh, frozen)


def placed_state(programs: Programs, trainer: grpo.Trainer) -> TrainState:
    def make(params):
        return TrainState(params, trainer.optimizer.init(params), jnp.int32(0))

    return placed(programs.mesh, jax.eval_shape(make, placed_params(programs, programs.dtype)[0]))


def placed_reference(programs: Programs) -> Any:
    """The reference: the model in the compute dtype, or the base with adapters that change nothing."""
    if programs.config.lora:
        return join(*placed_params(programs, programs.dtype))
    return placed(programs.mesh, abstract_params(programs.config, programs.dtype)[1])


def placed_batch(programs: Programs, trainer: grpo.Trainer, rows: int) -> grpo.Batch:
    """A batch of `rows` sequences as training lays it out, of the shapes it has when all are of full length.

    They share no prompt, so that their tokens are the most there can be.
    """
    prompt = programs.settings[DataOptions].max_prompt_length
    completion = programs.settings[RolloutOptions].max_completion_length
    full = grpo.Batch(
        tokens=np.tile(np.arange(rows, dtype=np.int32)[:, None], prompt + completion),
        prompt_lengths=np.full(rows, prompt, np.int32),
        completions=np.ones((rows, completion), np.int32),
        completion_lengths=np.full(rows, completion, np.int32),
        advantages=np.zeros(rows, np.float32),
        rollout_logprobs=np.zeros((rows, completion), np.float32),
    )
    batch = lay_out(programs.mesh, full, trainer.parts, programs.arrangement)
    sharding = by_sequence(programs.mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)


def compile_phase(programs: Programs, counted: Counted, function: Any, *arguments: Any) -> Phase:
    """Compiles a program for the mesh's chips. One that cannot fit still says how much it wanted."""
    started = time.perf_counter()
    try:
        with jax.sharding.use_abstract_mesh(programs.mesh.abstract_mesh):
            compiled = function.lower(*arguments).compile()
        used, traffic = hlo.memory_of(compiled), hlo.collectives(compiled.as_text(), counted.turns)
    except jax.errors.JaxRuntimeError as error:
        used, traffic = hlo.Memory(0, hlo.memory_wanted(error), 0, 0), {}
    return Phase(used, counted.resident, traffic, time.perf_counter() - started, counted.flops, counted.moved)


def count_phase(programs: Programs, counted: Counted, function: Any, *arguments: Any) -> Phase:
    """The same by arithmetic."""
    shapes = [leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.ShapeDtypeStruct)]
    used = hlo.Memory(bytes_on_chip(shapes), counted.scratch, 0, 0)
    return Phase(used, counted.resident, {}, 0.0, counted.flops, counted.moved)


def measure(programs: Programs, counted: Counted, function: Any, *arguments: Any) -> Phase:
    how = count_phase if isinstance(programs, GpuPrograms) else compile_phase
    return how(programs, counted, function, *arguments)


# The phases


@dataclasses.dataclass(frozen=True)
class Resident:
    """Bytes of one chip that a run holds from step to step."""

    trained: int
    moments: int
    frozen: int
    reference: int
    """What the reference needs besides the frozen weights."""

    @property
    def total(self) -> int:
        return self.trained + self.moments + self.frozen + self.reference


def count_resident(programs: Programs, trainer: grpo.Trainer) -> Resident:
    trained, frozen = (bytes_on_chip(tree) for tree in placed_params(programs, programs.dtype))
    moments = bytes_on_chip(placed_state(programs, trainer)) - trained
    has_reference = programs.settings[LossOptions].beta > 0
    reference = bytes_on_chip(placed_reference(programs)) - frozen if has_reference else 0
    return Resident(trained, moments, frozen, reference)


def prompt_rows(programs: Programs, resident: Resident) -> tuple[RolloutPlan, Any]:
    """The rollout's plan and its prompts as `Roller` would make them, at full length."""
    data, steps = programs.settings[DataOptions], programs.settings[StepOptions]
    options = programs.settings[RolloutOptions]
    plan = programs.roller(options, pool_limit=memory.pool_limit(programs, resident.total)).plan
    width = -(-data.max_prompt_length // plan.page_size) * plan.page_size
    prompts = [[0] * data.max_prompt_length] * steps.batch_size
    rows, group = spread(prompts, list(range(len(prompts))), steps.num_generations, programs.mesh.size, width)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_sequence(programs.mesh)), rows)
    least = least_pages(plan, own_rows(placed))  # a plan for too little memory says so, instead of ending
    return dataclasses.replace(plan, group=group, pool_limit=plan.pool_limit and max(plan.pool_limit, least)), placed


def own_rows(prompts: Any) -> Any:
    """One chip's share of the prompts."""
    return jax.tree.map(lambda x: np.zeros(x.sharding.shard_shape(x.shape), x.dtype), prompts)


def cache_bytes(programs: Programs, resident: Resident) -> int:
    """Bytes of one chip's page pool."""
    plan, prompts = prompt_rows(programs, resident)
    return num_pages(plan, own_rows(prompts)) * memory.page_bytes(programs, plan.page_size)


def pool_pages(programs: Programs, resident: Resident) -> int:
    """Pages that training gives a chip's pool at most: --pool_pages, or what `memory.pool_limit` allows."""
    given = programs.settings[RolloutOptions].pool_pages
    return given or memory.pool_limit(programs, resident.total)


def result_bytes(programs: Programs, completions: int) -> int:
    """Bytes on a chip of what a rollout ends with: every completion's tokens and log-probs, on every chip.

    A chip also has its own completions' during the rollout, with a random number per token.
    """
    tokens = completions * programs.settings[RolloutOptions].max_completion_length
    return 8 * tokens + 12 * tokens // programs.mesh.size


def decoded_shapes(programs: Programs, plan: RolloutPlan) -> Any:
    """The policy as it is decoded, whole on every chip."""
    shapes = jax.eval_shape(functools.partial(decode_weights, plan), join(*placed_params(programs, programs.dtype)))
    whole = replicated(programs.mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)


def plan_weights(programs: Programs, work: Work, resident: Resident) -> Phase:
    """Laying the policy out for decoding."""
    plan = prompt_rows(programs, resident)[0]
    moved = work.weights * (programs.trained_dtype.itemsize / programs.mesh.size + programs.dtype.itemsize)
    params = join(*placed_params(programs, programs.dtype))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(decoded_shapes(programs, plan)))
    counted = Counted(resident.moments + resident.reference, 0.0, moved, whole)
    return measure(programs, counted, decode_weights, plan, params)


def plan_rollout(programs: Programs, work: Work, resident: Resident) -> Phase:
    """Prefill and decoding of the step's completions."""
    plan, prompts = prompt_rows(programs, resident)
    seed = jax.ShapeDtypeStruct((2,), np.int32, sharding=replicated(programs.mesh))
    chips = programs.mesh.size
    slots = min(plan.slots, -(-work.rows // chips))
    moved = work.rollout_bytes(chips, slots, programs.dtype.itemsize)
    scratch = budget.rollout_scratch(programs, slots, cache_bytes(programs, resident))
    scratch += result_bytes(programs, work.rows)
    counted = Counted(resident.total, work.rollout_flops() / chips, moved, scratch)
    program = rollout_program(plan.device.platform)
    return measure(programs, counted, program, plan, decoded_shapes(programs, plan), prompts, seed)


def plan_scoring(programs: Programs, trainer: grpo.Trainer, work: Work, resident: int, params: Any) -> Phase:
    """Log-probs under `params`: of the reference, or of the policy that sampled."""
    batch = placed_batch(programs, trainer, work.rows)
    moved = trainer.parts * work.weights * programs.dtype.itemsize
    flops = sum(work.score_flops()) / programs.mesh.size
    counted = Counted(resident, flops, moved, budget.scoring_scratch(programs, work, trainer.parts), trainer.parts)
    return measure(programs, counted, grpo.batch_logprobs, trainer, params, batch)


def plan_update(programs: Programs, trainer: grpo.Trainer, work: Work, resident: int) -> Phase:
    """The gradient of an update's loss."""
    batch = placed_batch(programs, trainer, work.rows)
    scored = batch.rollout_logprobs
    if programs.settings[LossOptions].beta > 0:
        batch = dataclasses.replace(batch, ref_logprobs=scored)
    if programs.settings[StepOptions].updates_per_step > 1:
        batch = dataclasses.replace(batch, old_logprobs=scored)
    state, frozen = placed_state(programs, trainer), placed_params(programs, programs.dtype)[1]
    weights = work.weights * programs.dtype.itemsize
    saved = work.rows / programs.mesh.size * memory.saved_bytes(programs, work.prompt + work.completion)
    moved = 3 * trainer.parts * weights + 2 * saved + bytes_on_chip(state.params)
    flops = work.update_flops(trainer.remat) / programs.mesh.size
    scratch = budget.update_scratch(programs, work, trainer.parts, bytes_on_chip(state.params))
    counted = Counted(resident, flops, moved, scratch, trainer.parts)
    return measure(programs, counted, grpo.gradients, trainer, state.params, state.updates, batch, frozen)


def plan_optimizer(programs: Programs, trainer: grpo.Trainer, resident: int) -> Phase:
    """What the optimizer makes of the gradient."""
    state = placed_state(programs, trainer)
    scalar = jax.ShapeDtypeStruct((), np.float32, sharding=replicated(programs.mesh))
    moved = 2 * bytes_on_chip(state) + bytes_on_chip(state.params)
    counted = Counted(resident, 0.0, moved, 0)  # element by element, which takes next to no scratch
    return measure(programs, counted, apply_gradients, trainer.optimizer, state, scalar, state.params)


def make_plan(programs: Programs) -> dict[str, Phase]:
    """Every phase of a training step, each compiled."""
    settings = programs.settings
    steps = settings[StepOptions]
    prompt, completion = settings[DataOptions].max_prompt_length, settings[RolloutOptions].max_completion_length
    work = Work(programs.config, steps.batch_size, steps.num_generations, prompt, completion)
    trainer = programs.trainer(max(1, steps.max_steps), memory.choose_parts(programs))
    share = dataclasses.replace(work, prompts=steps.batch_size // steps.num_minibatches)
    held = count_resident(programs, trainer)
    phases = {"weights": plan_weights(programs, work, held), "rollout": plan_rollout(programs, work, held)}
    others = held.moments + held.reference
    if steps.updates_per_step > 1:
        policy = join(*placed_params(programs, programs.dtype))
        phases["old_policy"] = plan_scoring(programs, trainer, share, others, policy)
    if held.reference or (programs.config.lora and settings[LossOptions].beta):
        others = held.trained + held.moments
        phases["reference"] = plan_scoring(programs, trainer, share, others, placed_reference(programs))
    phases["update"] = plan_update(programs, trainer, share, held.moments + held.reference)
    return phases | {"optimizer": plan_optimizer(programs, trainer, held.frozen + held.reference)}


# What is said of it


def roofline_seconds(phase: Phase, chip: Chip) -> float:
    """0 for a card whose speed is not known."""
    return 0.0 if not chip.tflops else max(phase.flops / chip.tflops / 1e12, phase.bytes / chip.bandwidth / 1e9)


def describe(name: str, phase: Phase, chip: Chip) -> str:
    parts = phase.memory
    if not parts.arguments:
        return f"{name:<10} {phase.total / GIB:6.2f} GiB of {chip.hbm_gib:g}: the compiler refuses it\n"
    moved = "; ".join(f"{kind} {t.bytes / 1e9:.2f} GB in {t.runs}" for kind, t in phase.traffic.items() if t.runs)
    inside = sum(t.runs_in_open_loops for t in phase.traffic.values())
    text = (
        f"{name:<10} {phase.total / GIB:6.2f} GiB of {chip.hbm_gib:g}: resident {phase.resident / GIB:.2f}, "
        f"arguments {parts.arguments / GIB:.2f}, temporaries {parts.temporaries / GIB:.2f}, "
        f"outputs {(parts.outputs - parts.aliased) / GIB:.2f}\n"
        f"           {phase.flops / 1e12:.1f} TFLOP, {phase.bytes / 1e9:.1f} GB"
    )
    if not chip.tflops:
        return text + "\n"
    return (
        f"{text}: about {roofline_seconds(phase, chip):.3f} s at the chip's limits; collectives: {moved or 'none'}"
        f"{f', and {inside} in open loops' if inside else ''}; compiled in {phase.compile_seconds:.0f} s\n"
    )


def figures(phase: Phase, chip: Chip) -> dict[str, Any]:
    return {
        "hbm_gib": round(phase.total / GIB, 3),
        "resident_gib": round(phase.resident / GIB, 3),
        "arguments_gib": round(phase.memory.arguments / GIB, 3),
        "temporaries_gib": round(phase.memory.temporaries / GIB, 3),
        "tflop": round(phase.flops / 1e12, 2),
        "gbytes": round(phase.bytes / 1e9, 2),
        "roofline_seconds": round(roofline_seconds(phase, chip), 4),
        "collective_gbytes": {kind: round(t.bytes / 1e9, 3) for kind, t in phase.traffic.items()},
        "collectives_in_open_loops": sum(t.runs_in_open_loops for t in phase.traffic.values()),
        "compile_seconds": round(phase.compile_seconds, 1),
    }


GPU_NOTE = (
    "counted by arithmetic, not compiled; up to 90 % of a card is taken to be usable, for which "
    "XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 has to be set\n"
)


def usable(chip: Chip) -> float:
    """GiB that programs may fill: the table's TPUs state usable memory already."""
    return chip.hbm_gib if chip.tflops else memory.FULL * chip.hbm_gib


def most_in_one_part(programs: Programs, update: Phase, chip: Chip) -> int:
    """Sequences per chip whose update would fit in one part, extrapolated from the compiled one."""
    own = -(-memory.update_rows(programs) // (programs.mesh.size * memory.choose_parts(programs)))
    spare = usable(chip) * GIB - update.total
    return max(0, own + int(spare // memory.activation_bytes(programs, memory.longest(programs))))


def most_in_rollout(programs: Programs, resident: Resident, rollout: Phase, chip: Chip) -> int:
    """Prompts that the pool holds once, beside one completion per chip, extrapolated from the compiled rollout."""
    plan, prompts = prompt_rows(programs, resident)
    steps = programs.settings[StepOptions]
    pages = pool_pages(programs, resident)
    each = -(-prompts.tokens.shape[1] // plan.page_size)
    by_pool = (pages - plan.own_pages()) // each * programs.mesh.size
    grown = pages * memory.page_bytes(programs, plan.page_size) - cache_bytes(programs, resident)
    spare = usable(chip) * GIB - rollout.total - grown
    by_results = steps.batch_size + int(spare // result_bytes(programs, steps.num_generations))
    return max(0, min(by_pool, by_results))


def largest_batch(programs: Programs, in_rollout: int, in_one_part: int) -> int:
    """Prompts per step that fit, a multiple of the chips and minibatches where it is as many.

    Fewer to a chip are spread unevenly, and minibatches are equal.

    An update in as many parts as --gradient_accumulation_steps=auto chooses fits if the largest part it chooses does.
    """
    steps, chips = programs.settings[StepOptions], programs.mesh.size
    auto = steps.gradient_accumulation_steps == "auto"
    parts = 1 if auto else memory.choose_parts(programs)
    in_update = in_one_part * parts * chips // steps.num_generations * steps.num_minibatches
    if auto and in_one_part >= memory.sequences_per_part(programs):
        in_update = in_rollout
    largest = min(in_rollout, in_update)
    even = math.lcm(chips, steps.num_minibatches)
    return largest - largest % even if largest >= even else largest


def verdict(programs: Programs, phases: dict[str, Phase], resident: Resident, chip: Chip) -> dict[str, Any]:
    """Whether the step fits, and the most prompts that would: at all, and in one part of the update."""
    plan, prompts = prompt_rows(programs, resident)
    served = pool_pages(programs, resident) >= least_pages(plan, own_rows(prompts))
    fitting = {name: phase.total <= usable(chip) * GIB for name, phase in phases.items()}
    in_one_part = most_in_one_part(programs, phases["update"], chip)
    in_rollout = most_in_rollout(programs, resident, phases["rollout"], chip)
    steps, fits = programs.settings[StepOptions], served and all(fitting.values())
    largest = largest_batch(programs, in_rollout, in_one_part) if fitting["weights"] else 0
    largest = max(largest, steps.batch_size) if fits else largest
    together = in_one_part * programs.mesh.size // steps.num_generations * steps.num_minibatches
    return {
        "fits": fits,
        "largest_batch": largest,
        "largest_batch_in_one_part": min(largest, together),
    }


def main(settings: Settings) -> int:
    jax.config.update("jax_platforms", "cpu")
    programs, chip = make_programs(settings)
    options, steps = settings[PlanOptions], settings[StepOptions]
    parts = memory.choose_parts(programs)
    held = count_resident(programs, programs.trainer(1, parts))
    sys.stderr.write(
        f"{options.topology} as fsdp,tp={options.mesh}: {programs.mesh.size} chips of {chip.hbm_gib:g} GiB; "
        f"{steps.batch_size} prompts x {steps.num_generations}, update in {parts} part{'s' * (parts > 1)}; "
        f"page pool {cache_bytes(programs, held) / GIB:.2f} GiB per chip\n"
    )
    phases = make_plan(programs)
    for name, phase in phases.items():
        sys.stderr.write(describe(name, phase, chip))
    found = verdict(programs, phases, held, chip)
    if not chip.tflops:
        sys.stderr.write(GPU_NOTE)
    sys.stderr.write(
        f"it {'fits' if found['fits'] else 'does NOT fit'}; about {found['largest_batch']} prompts would at most, "
        f"{found['largest_batch_in_one_part']} with the update in one part\n"
    )
    report = {
        "topology": options.topology,
        "mesh": options.mesh,
        "jax": jax.__version__,
        "counted_by": "arithmetic" if isinstance(programs, GpuPrograms) else "compiler",
        **found,
        "gradient_accumulation_steps": parts,
        "phases": {name: figures(phase, chip) for name, phase in phases.items()},
    }
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    run_command("python -m minigrpo.plan", __doc__ or "", SECTIONS, main)
