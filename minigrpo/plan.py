"""`python -m minigrpo.plan`: what a run needs of every chip, found without one.

The very programs that `minigrpo.train` runs are compiled by the real TPU compiler for the topology; bytes are its own,
times are only what counted bytes and FLOPs imply. Nothing is measured. The exit code is 0 whether or not it fits.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from minigrpo.build import (
    DEFAULT_MODEL,
    check_lora,
    check_loss,
    check_quantize,
    grpo_update_spec,
    make_generator,
    offloads_optimizer,
)
from minigrpo.command_line import run_named
from minigrpo.commands import COMMANDS
from minigrpo.config import MODEL_DEFAULTS, TINY, RolloutOptions, Settings, UsageError, parse_mesh
from minigrpo.data.chat import load_tokenizer
from minigrpo.evaluate import QUEUE_SLOTS, greedy_options, prompts_per_rollout
from minigrpo.grpo.batch import Batch, PackedBatch, PackingSpec, pack
from minigrpo.grpo.optimizer import TrainState, apply_gradients
from minigrpo.grpo.update import UpdateSpec, batch_logprobs, gradients
from minigrpo.kernels import gpu as gpu_kernels
from minigrpo.kernels.backend import backend_for
from minigrpo.model.hub import placed
from minigrpo.model.hub_config import check_lengths, parse_config, read_config
from minigrpo.model.lora import make_lora
from minigrpo.model.params import ModelConfig, join, split_trainable
from minigrpo.model.qwen import abstract_params
from minigrpo.model.weights import BUILTIN
from minigrpo.planning import hlo, memory
from minigrpo.planning.cost import Counted, Phase, Work
from minigrpo.planning.memory import abstract_share_bytes
from minigrpo.planning.run_spec import RunSpec
from minigrpo.rollout.generator import RolloutSpec, deal_prompts, decode_weights, no_start, rollout_program
from minigrpo.runtime.chips import CHIPS, GIB, Chip
from minigrpo.runtime.mesh import arrange, by_sequence, check_divisible, replicated
from minigrpo.runtime.progress import Progress

FAMILIES = Path(__file__).parent / "builtin" / "families.json"

SECTIONS = COMMANDS["plan"].sections

GPU = "gpu"


# The pieces of a plan

NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Keeps the TPU library from looking for chips, and from complaining that there are none; any known type will do."""


def topology_devices(name: str, slices: int = 1) -> list[Any]:
    """Return abstract chips for the compiler, of all slices; UsageError for an unknown topology.

    Programs for them cannot be read back from jax's cache of compiled ones, so that is off from here on.
    """
    if not importlib.util.find_spec("libtpu"):
        raise UsageError(f"--topology={name}: needs the TPU compiler; pip install libtpu")
    jax.config.update("jax_enable_compilation_cache", False)
    os.environ |= NO_TPU
    options: dict[str, Any] = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    if slices > 1:
        options["num_slices"] = slices
    if re.fullmatch(r"\w+:1x1(x1)?", name):
        options["chips_per_host_bounds"] = (1, 1, 1)  # the library takes four chips for a host's
    try:
        return topologies.get_topology_desc(name, platform="tpu", **options).devices
    except Exception as error:  # the TPU library raises its own, unnamed kinds
        reason, example = str(error).splitlines()[0], "2x2x2" if name.startswith(("v4", "v5p")) else "2x4"
        raise UsageError(
            f"--topology={name}: unknown to the TPU compiler; try {name.partition(':')[0]}:{example} ({reason})"
        ) from error


def topology_mesh(name: str, mesh_flag: str, slices: int = 1) -> Mesh:
    """Return a mesh of abstract chips; UsageError for a mesh of another size than each slice."""
    fsdp, tp = parse_mesh(mesh_flag)
    devices = topology_devices(name, slices)
    each = len(devices) // slices
    if each != fsdp * tp:
        raise UsageError(
            f"--mesh={mesh_flag}: {fsdp * tp} chips, but --topology={name} has {each}; "
            f"use --mesh={each},1 or another pair whose product is {each}"
        )
    return arrange(devices, fsdp, tp)


def known_model(name: str) -> tuple[ModelConfig, int]:
    """Return config and number of real tokens of a folder's, a built-in or a published model, without network."""
    folder = BUILTIN.get(name, Path(name))
    if folder.is_dir():
        config = read_config(folder / "config.json")
        return config, min(load_tokenizer(folder).num_tokens, config.vocab_size)
    families = json.loads(FAMILIES.read_text())
    base = re.sub(r"-(Base|Instruct)$", "", name)
    if base not in families:
        raise UsageError(f"--model={name}: neither a folder nor one of {', '.join([TINY, *families])}")
    return parse_config(families[base], str(FAMILIES)), families[base]["num_tokens"]


def virtual_mesh(mesh_flag: str) -> Mesh:
    """Return a mesh of virtual CPU devices in place of cards."""
    fsdp, tp = parse_mesh(mesh_flag)
    with contextlib.suppress(RuntimeError):  # jax has started, with as many devices as its mesh has
        jax.config.update("jax_num_cpu_devices", fsdp * tp)
    return arrange(jax.devices()[: fsdp * tp], fsdp, tp)


def parse_card(topology: str) -> Chip:
    """Parse 'gpu:80GB' into a card of 80 GiB whose speed is not known; UsageError for another form."""
    found = re.fullmatch(r"gpu:([1-9]\d{0,3})GB", topology)
    if not found:
        raise UsageError(f"--topology={topology}: a GPU is written with its memory: gpu:80GB")
    return Chip("GPU", float(found[1]), 0.0, 0.0, 0.0)


def find_chip(topology: str) -> Chip:
    """Return the chip of a topology; UsageError for an unknown one."""
    kind = topology.partition(":")[0]
    if kind == GPU:
        return parse_card(topology)
    if kind not in CHIPS:
        raise UsageError(f"--topology={topology}: unknown; try v6e:2x4, another of {', '.join(CHIPS)}, or gpu:80GB")
    return CHIPS[kind]


def plan_spec(settings: Settings) -> RunSpec:
    """Return the spec of the run that `train` would make on the topology."""
    options, wanted = settings.model, settings.plan
    chip, name = find_chip(wanted.topology), DEFAULT_MODEL if options.model == "auto" else options.model
    on_gpu = wanted.topology.startswith(GPU)
    config, num_tokens = known_model(name)
    config = dataclasses.replace(config, lora=make_lora(settings.lora), int8=options.quantize == "int8")
    mesh = virtual_mesh(wanted.mesh) if on_gpu else topology_mesh(wanted.topology, wanted.mesh, wanted.slices)
    check_divisible(config.sizes, mesh)
    check_lengths(config, settings.data.max_prompt_length, settings.rollout.max_completion_length)
    check_loss(settings)
    check_lora(settings, config)
    check_quantize(config)
    dtype = "bfloat16" if options.compute_dtype == "auto" else options.compute_dtype
    if dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    return RunSpec(
        settings=settings,
        config=config,
        mesh=mesh,
        backend=gpu_kernels.backend(GPU, "") if on_gpu else backend_for(mesh.devices.flat[0]),
        platform=GPU if on_gpu else "tpu",
        device_bytes=int(chip.hbm_gib * GIB),
        dtype=jnp.dtype(dtype),
        num_tokens=num_tokens,
        stop_tokens=(num_tokens - 1,),
    )


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Abstract arrays of a run, laid out as training keeps them."""

    spec: RunSpec
    update_spec: UpdateSpec
    packing: PackingSpec

    @functools.cached_property
    def trainable(self) -> Any:
        """Return trainable parameters, in float32."""
        return placed(self.spec.mesh, split_trainable(self.spec.config, abstract_params(self.spec.config))[0])

    @functools.cached_property
    def frozen(self) -> Any:
        """Return frozen parameters, in the compute dtype."""
        shapes = abstract_params(self.spec.config, self.spec.dtype)
        return placed(self.spec.mesh, split_trainable(self.spec.config, shapes)[1])

    @functools.cached_property
    def state(self) -> TrainState:
        """Return the state of training."""

        def make(params: Any) -> TrainState:
            return TrainState(params, self.update_spec.optimizer.init(params), jnp.int32(0))

        state: TrainState = placed(self.spec.mesh, jax.eval_shape(make, self.trainable))
        return state

    @property
    def reference(self) -> tuple[UpdateSpec, Any]:
        """Return the programs and weights of the reference: another copy, or the base without adapters."""
        config = dataclasses.replace(self.spec.config, lora=None)
        if self.spec.config.lora:
            model = dataclasses.replace(self.update_spec.model, config=config)
            return dataclasses.replace(self.update_spec, model=model), self.frozen
        return self.update_spec, placed(self.spec.mesh, abstract_params(config, self.spec.dtype))

    @functools.cached_property
    def held(self) -> memory.Resident:
        """Return the bytes that a chip holds from step to step."""
        return memory.count_resident(self.spec, offloaded=self.update_spec.offload_optimizer)

    @functools.cached_property
    def batch(self) -> PackedBatch:
        """Return a batch of an update; all batches have its shapes."""
        steps, data, rollout = self.spec.settings.steps, self.spec.settings.data, self.spec.settings.rollout
        count, limit = self.spec.update_sequences, rollout.max_completion_length
        logprobs = np.zeros((count, limit), np.float32)
        batch = Batch(
            np.ones((count, limit), np.int32),
            np.ones(count, np.int32),
            np.zeros(count, np.float32),
            logprobs,
            cutoffs=logprobs if truncates(self.spec, rollout) else None,
        )
        prompts = [[0] * data.max_prompt_length] * (count // steps.num_generations)
        packed = pack(self.packing, prompts, batch)
        split, whole = by_sequence(self.spec.mesh), replicated(self.spec.mesh)

        def shape(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split if x.ndim else whole)

        shaped: PackedBatch = jax.tree.map(shape, packed)
        return shaped


def truncates(spec: RunSpec, options: RolloutOptions) -> bool:
    """Tell if sampling with these options leaves tokens out."""
    return make_generator(spec, options).spec.sampler.truncates


def make_shapes(spec: RunSpec) -> Shapes:
    """Return the abstract arrays of a run's spec."""
    steps = spec.settings.steps
    packing = memory.packing_spec(spec, spec.update_sequences, steps.num_generations)
    return Shapes(spec, grpo_update_spec(spec, max(1, steps.max_steps)), packing)


def compile_phase(spec: RunSpec, counted: Counted, function: Any, *arguments: Any) -> Phase:
    """Compile a program for the mesh's chips. A program that cannot fit still reports the memory it needs."""
    started = time.perf_counter()
    try:
        with jax.sharding.use_abstract_mesh(spec.mesh.abstract_mesh):
            compiled = function.lower(*arguments).compile()
        used, traffic = hlo.memory_of(compiled), hlo.collectives(compiled.as_text(), counted.turns)
    except jax.errors.JaxRuntimeError as error:
        used, traffic = hlo.Memory(0, hlo.memory_wanted(error), 0, 0), {}
    return Phase(used, counted.resident, traffic, time.perf_counter() - started, counted.flops, counted.moved)


def count_phase(counted: Counted, *arguments: Any) -> Phase:
    """Count a program's bytes by arithmetic."""
    shapes = [leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.ShapeDtypeStruct)]
    used = hlo.Memory(abstract_share_bytes(shapes), counted.scratch, 0, 0)
    return Phase(used, counted.resident, {}, 0.0, counted.flops, counted.moved)


def measure(spec: RunSpec, counted: Counted, function: Any, *arguments: Any) -> Phase:
    """Compile a phase, or count it for GPUs."""
    if spec.platform == GPU:
        return count_phase(counted, *arguments)
    return compile_phase(spec, counted, function, *arguments)


# The phases


def rollout_inputs(spec: RunSpec, options: RolloutOptions, prompts: int, group: int, resident: int) -> Any:
    """Return a rollout's spec, its group on a device, and its abstract inputs, as `Generator` would make them."""
    made = make_generator(spec, options, memory.pool_limit(spec, resident)).spec
    tokens = [[0] * spec.settings.data.max_prompt_length] * prompts
    batch, rows, row_group = deal_prompts(made, tokens, list(range(prompts)), group)
    start = no_start(made, len(batch.lengths) * row_group)
    own = len(batch.lengths) // spec.mesh.size
    least = made.least_pages(own)  # a plan for too little memory says so, instead of ending
    made = dataclasses.replace(made, pool_limit=made.pool_limit and max(made.pool_limit, least))
    split = by_sequence(spec.mesh)
    shaped = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), (batch, rows, start))
    return made, own, row_group, shaped


def result_bytes(spec: RunSpec, completions: int, options: RolloutOptions) -> int:
    """Count the bytes on a chip of a rollout's result: every completion's tokens and log-probs, on every chip.

    Truncated sampling has two more numbers per token. A chip also has its own completions' during the rollout, with a
    random number per token.
    """
    tokens = completions * options.max_completion_length
    kept = 8 if truncates(spec, options) else 0
    return (8 + kept) * tokens + (12 + kept) * tokens // spec.mesh.size


def decoded_shapes(shapes: Shapes, made: RolloutSpec) -> Any:
    """Return the policy as it is decoded, whole on every chip."""
    decoded = jax.eval_shape(functools.partial(decode_weights, made.layout), join(shapes.trainable, shapes.frozen))
    whole = replicated(shapes.spec.mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), decoded)


def plan_weights(shapes: Shapes, work: Work, held: memory.Resident) -> Phase:
    """Plan laying the policy out for decoding."""
    spec = shapes.spec
    made = make_generator(spec, spec.settings.rollout).spec
    moved = work.weights * (spec.base_dtype.itemsize / spec.mesh.size + spec.dtype.itemsize)
    params = join(shapes.trainable, shapes.frozen)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(decoded_shapes(shapes, made)))
    counted = Counted(held.moments + held.reference, 0.0, moved, whole)
    return measure(spec, counted, decode_weights, made.layout, params)


def plan_rollout(shapes: Shapes, work: Work, held: memory.Resident, options: RolloutOptions) -> Phase:
    """Plan prefill and decoding of `work`'s completions."""
    spec, chips = shapes.spec, shapes.spec.mesh.size
    made, prompts, group, inputs = rollout_inputs(spec, options, work.prompts, work.group, held.total)
    seed = jax.ShapeDtypeStruct((2,), np.int32, sharding=replicated(spec.mesh))
    slots = made.slot_count(prompts, group)
    pool = made.num_pages(prompts, group) * memory.page_bytes(spec)
    scratch = memory.rollout_scratch(spec, slots, pool) + result_bytes(spec, work.rows, options)
    free = made.num_pages(prompts, group) - prompts * (made.prompt_width // made.page_size)
    served = max(1, min(slots, free // made.completion_pages))  # at full length the pool holds so many at once
    moved = work.rollout_bytes(chips, served, spec.dtype.itemsize)
    counted = Counted(held.total, work.rollout_flops() / chips, moved, scratch)
    return measure(spec, counted, rollout_program(spec.backend), made, decoded_shapes(shapes, made), *inputs, seed)


def plan_logprobs(shapes: Shapes, work: Work, resident: int, update_spec: UpdateSpec, params: Any) -> Phase:
    """Plan log-probs under `params`: of the reference, or of the policy that sampled."""
    spec, turns = shapes.spec, shapes.packing.micro_batches(work.rows)
    moved = float(turns * work.weights * spec.dtype.itemsize)
    scratch = memory.scoring_scratch(spec, work, shapes.packing)
    counted = Counted(resident, sum(work.score_flops()) / spec.mesh.size, moved, scratch, turns)
    return measure(spec, counted, batch_logprobs, update_spec, params, shapes.batch)


def plan_update(shapes: Shapes, work: Work, resident: int) -> Phase:
    """Plan the gradient of an update's loss."""
    spec, batch, turns = shapes.spec, shapes.batch.batch, shapes.packing.micro_batches(work.rows)
    extra = {
        "ref_logprobs": spec.settings.loss.beta > 0,
        "old_logprobs": spec.settings.steps.updates_per_step > 1,
    }
    batch = dataclasses.replace(batch, **{name: batch.rollout_logprobs for name, given in extra.items() if given})
    trainable = abstract_share_bytes(shapes.trainable)
    saved = work.rows / spec.mesh.size * memory.saved_bytes(spec, work.prompt + work.completion)
    moved = 3 * turns * work.weights * spec.dtype.itemsize + 2 * saved + trainable
    flops = work.update_flops(shapes.update_spec.remat) / spec.mesh.size
    counted = Counted(resident, flops, moved, memory.update_scratch(spec, work, shapes.packing, trainable), turns)
    packed = dataclasses.replace(shapes.batch, batch=batch)
    state = shapes.state
    return measure(spec, counted, gradients, shapes.update_spec, state.params, state.updates, packed, shapes.frozen)


def plan_optimizer(shapes: Shapes, resident: int) -> Phase:
    """Plan the optimizer's update of the parameters."""
    state, update_spec = shapes.state, shapes.update_spec
    scalar = jax.ShapeDtypeStruct((), np.float32, sharding=replicated(shapes.spec.mesh))
    moved = float(2 * abstract_share_bytes(state) + abstract_share_bytes(state.params))
    counted = Counted(resident, 0.0, moved, 0)  # element by element, which takes next to no scratch
    arguments = update_spec.optimizer, update_spec.schedule, state, scalar, state.params
    return measure(shapes.spec, counted, apply_gradients, *arguments)


def count_work(spec: RunSpec, prompts: int, group: int) -> Work:
    """Count the work of `prompts` prompts with `group` completions each, at full length."""
    settings = spec.settings
    return Work(spec.config, prompts, group, settings.data.max_prompt_length, settings.rollout.max_completion_length)


def plan_evaluation(shapes: Shapes, held: memory.Resident) -> Phase:
    """Plan the rollout of --eval_steps, which runs beside everything that training holds."""
    spec = shapes.spec
    samples, rollout = spec.settings.plan.eval_num_generations, spec.settings.rollout
    prompts = prompts_per_rollout(spec.settings.plan.eval_size, QUEUE_SLOTS, spec.mesh.size)
    options = greedy_options(rollout) if samples == 1 else rollout
    return plan_rollout(shapes, count_work(spec, prompts, samples), held, options)


def phases_of(shapes: Shapes) -> dict[str, Callable[[], Phase]]:
    """Return every phase of a training step by name, to be compiled one after the other."""
    spec, held, steps = shapes.spec, shapes.held, shapes.spec.settings.steps
    work = count_work(spec, steps.batch_size, steps.num_generations)
    share = count_work(spec, steps.batch_size // steps.num_minibatches, steps.num_generations)
    phases: dict[str, Callable[[], Phase]] = {
        "weights": lambda: plan_weights(shapes, work, held),
        "rollout": lambda: plan_rollout(shapes, work, held, spec.settings.rollout),
    }
    if steps.updates_per_step > 1:
        policy, others = join(shapes.trainable, shapes.frozen), held.moments + held.reference
        phases["old_policy"] = lambda: plan_logprobs(shapes, share, others, shapes.update_spec, policy)
    if spec.settings.loss.beta:
        others = held.trainable + held.moments
        phases["reference"] = lambda: plan_logprobs(shapes, share, others, *shapes.reference)
    phases["update"] = lambda: plan_update(shapes, share, held.moments + held.reference)
    phases["optimizer"] = lambda: plan_optimizer(shapes, held.frozen + held.reference)
    if spec.settings.plan.eval_steps:
        phases["evaluation"] = lambda: plan_evaluation(shapes, held)
    return phases


# The verdict


def roofline_seconds(phase: Phase, chip: Chip) -> float:
    """Return the seconds at the chip's limits; 0 for a card whose speed is not known."""
    return 0.0 if not chip.tflops else max(phase.flops / chip.tflops / 1e12, phase.bytes / chip.bandwidth / 1e9)


def describe(name: str, phase: Phase, chip: Chip) -> str:
    """Format a phase for the terminal."""
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
    """Return the figures of a phase for the last line."""
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
    "counted by arithmetic, not compiled; 90 % of a card is taken to be usable, as minigrpo sets "
    "XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 where it is unset\n"
)


def usable(chip: Chip) -> float:
    """Return the GiB that programs may fill: the table's TPUs state usable memory already."""
    return chip.hbm_gib if chip.tflops else memory.ROLLOUT_SHARE * chip.hbm_gib


def fits(phase: Phase, chip: Chip) -> bool:
    """Tell if a phase fits a chip."""
    return phase.total <= usable(chip) * GIB


def is_served(spec: RunSpec, shapes: Shapes) -> bool:
    """Tell if the page pool that memory leaves holds a step's prompts and one completion."""
    steps = spec.settings.steps
    made, prompts, _, _ = rollout_inputs(spec, spec.settings.rollout, steps.batch_size, steps.num_generations, 0)
    given = spec.settings.rollout.pool_pages or memory.pool_limit(spec, shapes.held.total)
    return not given or given >= made.least_pages(prompts)


def largest_batch(shapes: Shapes, phases: dict[str, Phase], chip: Chip) -> int:
    """Estimate the most prompts per step that fit, extrapolated from the compiled phases.

    The update takes as many micro-batches as needed, so the pool and the rollout's results are the bound.
    """
    spec, steps = shapes.spec, shapes.spec.settings.steps
    if not all(fits(phases[name], chip) for name in ("weights", "update", "optimizer")):
        return 0
    held = shapes.held.total
    made, _, _, _ = rollout_inputs(spec, spec.settings.rollout, steps.batch_size, steps.num_generations, held)
    pages = spec.settings.rollout.pool_pages or memory.pool_limit(spec, held)
    by_pool = (pages - made.completion_pages) // (made.prompt_width // made.page_size) * spec.mesh.size
    spare = usable(chip) * GIB - held - pages * memory.page_bytes(spec)
    by_results = int(spare // result_bytes(spec, steps.num_generations, spec.settings.rollout))
    largest = max(0, min(by_pool, by_results))
    even = math.lcm(spec.mesh.size, steps.num_minibatches)
    largest = largest - largest % even if largest >= even else largest
    return max(largest, steps.batch_size) if all(fits(phase, chip) for phase in phases.values()) else largest


CHANGES: tuple[dict[str, Any], ...] = (
    {"slots": "16"},
    {"offload_optimizer": "true"},
    {"beta": 0.0},
    {"beta": 0.0, "offload_optimizer": "true"},
    {"lora_rank": 16},
    {"lora_rank": 16, "quantize": "int8"},
)
"""Changes that are tried, the smallest first, when a run does not fit."""


def advice(spec: RunSpec, chip: Chip, failed: set[str]) -> str:
    """Return the smallest change that makes a run fit, each tried by a plan of its own."""
    offloaded = {"offload_optimizer": "true"} if offloads_optimizer(spec) else {}
    settings = spec.settings.with_values(offloaded)
    tried = [settings]
    for change in CHANGES:
        changed = settings.with_values(change)
        if changed in tried or ("slots" in change and failed - {"rollout", "evaluation"}):
            continue
        tried.append(changed)
        flags = " ".join(f"--{name}={value}" for name, value in change.items())
        sys.stderr.write(f"trying {flags}\n")
        try:
            shapes = make_shapes(plan_spec(changed))
            if is_served(shapes.spec, shapes) and all(fits(run(), chip) for run in phases_of(shapes).values()):
                return f"it fits with {flags}"
        except UsageError as error:
            sys.stderr.write(f"{flags}: {error}\n")
    flags = "--slots, --offload_optimizer, --beta=0, --lora_rank=16 and --quantize=int8"
    return f"nothing of {flags} is enough: take more chips"


def announce(shapes: Shapes, chip: Chip) -> None:
    """Print the plan's subject, before anything is compiled."""
    spec, steps, packing = shapes.spec, shapes.spec.settings.steps, shapes.packing
    made, prompts, group, _ = rollout_inputs(
        spec, spec.settings.rollout, steps.batch_size, steps.num_generations, shapes.held.total
    )
    pages = made.num_pages(prompts, group)
    slots = made.slot_count(prompts, group)
    worst = made.least_pages(prompts) + (prompts * group - 1) * made.completion_pages
    most = packing.micro_batches(spec.update_sequences)
    waiting = "; AdamW's moments wait in the host's memory" if shapes.update_spec.offload_optimizer else ""
    sys.stderr.write(
        f"{spec.settings.plan.topology} as fsdp,tp={spec.settings.plan.mesh}: {spec.mesh.size} chips of "
        f"{chip.hbm_gib:g} GiB; {steps.batch_size} prompts x {steps.num_generations}; update in at most {most} "
        f"micro-batches of {packing.rows} x {packing.row_tokens} tokens; {slots} slots and a page pool of "
        f"{pages * memory.page_bytes(spec) / GIB:.2f} GiB per chip"
        f"{'' if pages >= worst else f', {pages / worst:.0%} of the worst case: long completions wait their turn'}"
        f"{waiting}\n"
    )


Tell = Callable[[str], None]
"""Is told what is going on, for a status line."""


def untold(text: str) -> None:
    """Tell nobody."""


def verdict(spec: RunSpec, chip: Chip, tell: Tell = untold) -> dict[str, Any]:
    """Return whether a run fits, its largest batch, and the figures of every phase, each printed once it is known."""
    shapes = make_shapes(spec)
    announce(shapes, chip)
    phases = {}
    for name, run in phases_of(shapes).items():
        tell(f"compiling the {name} phase")
        phases[name] = run()
        sys.stderr.write(describe(name, phases[name], chip))
    failed = sorted(name for name, phase in phases.items() if not fits(phase, chip))
    return {
        "fits": is_served(spec, shapes) and not failed,
        "largest_batch": largest_batch(shapes, phases, chip),
        "too_large": failed,
        "micro_batches": shapes.packing.micro_batches(spec.update_sequences),
        "phases": {name: figures(phase, chip) for name, phase in phases.items()},
    }


def plan(settings: Settings, tell: Tell = untold) -> dict[str, Any]:
    """Plan a run for a topology, and look for a change with which it fits if it does not."""
    spec, chip = plan_spec(settings), find_chip(settings.plan.topology)
    found = verdict(spec, chip, tell)
    if not chip.tflops:
        sys.stderr.write(GPU_NOTE)
    fitting, largest = found["fits"], found["largest_batch"]
    said = f"it fits; the largest batch that would is about {largest:,} prompts" if fitting else "it does not fit"
    tell("looking for a change that fits")
    suggestion = "" if fitting else advice(spec, chip, set(found["too_large"]))
    sys.stderr.write(f"{said}{'; ' if suggestion else ''}{suggestion}\n")
    return subject(spec) | found | {"advice": suggestion}


def subject(spec: RunSpec) -> dict[str, str]:
    """Return what a plan is of, and who counted."""
    counted_by = "arithmetic" if spec.platform == GPU else "compiler"
    options = spec.settings.plan
    return {"topology": options.topology, "mesh": options.mesh, "jax": jax.__version__, "counted_by": counted_by}


def main(settings: Settings) -> int:
    """Plan as the settings say."""
    with Progress() as progress:
        return run_plan(settings, progress)


def run_plan(settings: Settings, progress: Progress) -> int:
    """Compile every phase, say what it needs and whether it fits, and end with one JSON line."""
    progress.phase("plan", "getting ready")
    jax.config.update("jax_platforms", "cpu")
    settings = settings.with_defaults(MODEL_DEFAULTS.get(settings.model.model, {}))
    report = plan(settings, functools.partial(progress.phase, "plan"))
    progress.phase("")
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    run_named("plan", main)
