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

from minigrpo import grpo, hlo, memory
from minigrpo.chips import CHIPS, GIB, Chip
from minigrpo.config import (
    DataOptions,
    LoraOptions,
    LossOptions,
    ModelOptions,
    OptimizerOptions,
    Options,
    RolloutOptions,
    Settings,
    StepOptions,
    UsageError,
    option,
    parse_mesh,
    run_command,
)
from minigrpo.lora import make_lora
from minigrpo.model import ModelConfig, abstract_params, join, parse_config, read_config, split_trained
from minigrpo.optimizer import TrainState
from minigrpo.rollout import RolloutPlan, decode_weights, num_pages, run_mesh, spread
from minigrpo.sharding import DATA, by_sequence, check_divisible, replicated
from minigrpo.sources import placed
from minigrpo.start import DEFAULT_MODEL, Programs, check_loss
from minigrpo.tokenizer import load_tokenizer

FAMILIES = Path(__file__).parent / "builtin" / "families.json"


@dataclasses.dataclass(frozen=True)
class PlanOptions(Options):
    """Plan"""

    topology: str = option("v6e:2x4", "TPU generation and chips, such as v6e:2x4, v5e:4x4, v5p:2x2x1")
    mesh: str = option("4,2", "FSDP,TP mesh")


SECTIONS = (
    ModelOptions, LoraOptions, DataOptions, RolloutOptions, LossOptions, OptimizerOptions, StepOptions, PlanOptions,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Phase:
    """One program of a step on one chip."""

    memory: hlo.Memory
    resident: int
    """Bytes that stay on the chip meanwhile and are no argument of the program."""
    traffic: dict[str, hlo.Traffic]
    compile_seconds: float
    flops: float
    bytes: float

    @property
    def total(self) -> int:
        return self.memory.total + self.resident


# The pieces of a plan


def topology_devices(name: str) -> list[Any]:
    """Chips that are not there, for the compiler; UsageError for an unknown topology."""
    if name.partition(":")[0] not in CHIPS:
        raise UsageError(f"--topology={name}: must be one of {', '.join(CHIPS)} and its chips, such as v6e:2x4")
    whole_chips = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        return topologies.get_topology_desc(name, platform="tpu", **whole_chips).devices
    except Exception as error:  # the TPU library raises its own, unnamed kinds
        raise UsageError(f"--topology={name}: {str(error).splitlines()[0]}") from error


def topology_mesh(name: str, mesh_flag: str) -> Mesh:
    """A mesh of chips that are not there; UsageError for a mesh of another size."""
    fsdp, tp = parse_mesh(mesh_flag)
    devices = topology_devices(name)
    if len(devices) != fsdp * tp:
        raise UsageError(
            f"--mesh={mesh_flag}: {fsdp * tp} chips, but --topology={name} has {len(devices)}; "
            f"use --mesh={len(devices)},1 or another pair whose product is {len(devices)}"
        )
    return jax.make_mesh((fsdp, tp), DATA, devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * 2)


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


def make_programs(settings: Settings) -> Programs:
    options = settings[ModelOptions]
    name = DEFAULT_MODEL if options.model == "auto" else options.model
    dtype = "bfloat16" if options.compute_dtype == "auto" else options.compute_dtype
    config, num_tokens = known_model(name)
    config = dataclasses.replace(config, lora=make_lora(settings[LoraOptions]), int8=options.quantize == "int8")
    mesh = topology_mesh(settings[PlanOptions].topology, settings[PlanOptions].mesh)
    check_divisible(config.sizes, mesh)
    check_loss(settings[LossOptions], settings[RolloutOptions])
    if dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    graph = abstract_params(config)[0]
    return Programs(settings, config, graph, mesh, jnp.dtype(dtype), num_tokens, (num_tokens - 1,))


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
    """A full batch of `rows` sequences and the padding that training adds, all at full length, to be scored."""
    rows += -rows % (programs.mesh.size * trainer.parts)
    prompt = programs.settings[DataOptions].max_prompt_length
    completion = programs.settings[RolloutOptions].max_completion_length

    def place(dtype, *sizes):
        return jax.ShapeDtypeStruct((rows, *sizes), dtype, sharding=by_sequence(programs.mesh))

    return grpo.Batch(
        tokens=place(np.int32, prompt + completion),
        prompt_lengths=place(np.int32),
        completions=place(np.int32, completion),
        completion_lengths=place(np.int32),
        advantages=place(np.float32),
        rollout_logprobs=place(np.float32, completion),
    )


def bytes_on_chip(tree: Any) -> int:
    """Bytes of one chip's share of abstract arrays."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compile_phase(mesh: Mesh, resident: int, flops: float, moved: float, function: Any, *arguments: Any) -> Phase:
    """Compiles a program for the mesh's chips. One that cannot fit still says how much it wanted."""
    started = time.perf_counter()
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            compiled = function.lower(*arguments).compile()
        used, traffic = hlo.memory_of(compiled), hlo.collectives(compiled.as_text())
    except jax.errors.JaxRuntimeError as error:
        used, traffic = hlo.Memory(0, hlo.memory_wanted(error), 0, 0), {}
    return Phase(used, resident, traffic, time.perf_counter() - started, flops, moved)


# Work counted by hand


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs and bytes of a step's parts over all chips, counted from shapes."""

    config: ModelConfig
    prompts: int
    group: int
    prompt: int
    completion: int

    @property
    def layer_weights(self) -> int:
        c = self.config
        attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
        return c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)

    @property
    def head_weights(self) -> int:
        return self.config.vocab_size * self.config.hidden_size

    @property
    def weights(self) -> int:
        return self.layer_weights + self.head_weights

    @property
    def kv_row(self) -> int:
        """Key and value numbers of one token."""
        return 2 * self.config.num_hidden_layers * self.config.num_key_value_heads * self.config.head_dim

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    def attention_flops(self, tokens: int) -> float:
        """Causal attention of one sequence."""
        c = self.config
        return 2.0 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * tokens * tokens

    def score_flops(self) -> tuple[float, float, float]:
        """One forward pass: matrix products of the layers, of the head, and attention."""
        length = self.prompt + self.completion
        return (
            2.0 * self.layer_weights * self.rows * length,
            2.0 * self.head_weights * self.rows * self.completion,
            self.rows * self.attention_flops(length),
        )

    def update_flops(self, remat: str) -> float:
        """Forward, backward (twice the forward; attention 2.5 times) and what is recomputed."""
        layers, head, attention = self.score_flops()
        again = {"none": 0, "dots": 0, "attention": 1, "full": 1}[remat]
        return layers * (3 + again) + head * 4 + attention * (3.5 + (remat in ("dots", "full")))

    def rollout_flops(self) -> float:
        """Prefill once per prompt; decoding token by token."""
        before, whole = self.attention_flops(self.prompt), self.attention_flops(self.prompt + self.completion)
        decode = 2.0 * self.rows * self.completion * self.weights
        prefill = self.prompts * (2.0 * self.prompt * self.layer_weights + before)
        return decode + self.rows * (whole - before) + prefill

    def rollout_bytes(self, chips: int, slots: int, item: int) -> float:
        """Of one chip: its weights once per step, and every token's context once."""
        own = -(-self.rows // chips)
        steps = -(-own // slots) * self.completion
        context = own * self.completion * (self.prompt + self.completion / 2)
        return item * (steps * self.weights + self.kv_row * context)


# The phases


def prompt_rows(programs: Programs) -> tuple[RolloutPlan, Any]:
    """The rollout's plan and its prompts as `Roller` would make them, at full length."""
    data, steps = programs.settings[DataOptions], programs.settings[StepOptions]
    plan = programs.roller(programs.settings[RolloutOptions]).plan
    width = -(-data.max_prompt_length // plan.page_size) * plan.page_size
    prompts = [[0] * data.max_prompt_length] * steps.batch_size
    rows, group = spread(prompts, list(range(len(prompts))), steps.num_generations, programs.mesh.size, width)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_sequence(programs.mesh)), rows)
    return dataclasses.replace(plan, group=group), placed


def cache_bytes(programs: Programs) -> int:
    """Bytes of one chip's page pool."""
    plan, prompts = prompt_rows(programs)
    own = jax.tree.map(lambda x: np.zeros(x.sharding.shard_shape(x.shape), x.dtype), prompts)
    row = 2 * plan.model.num_key_value_heads * plan.model.head_dim * plan.model.num_hidden_layers
    return num_pages(plan, own) * plan.page_size * row * jnp.dtype(plan.dtype).itemsize


def plan_weights(programs: Programs, work: Work, resident: int) -> Phase:
    """Laying the policy out for decoding."""
    plan = prompt_rows(programs)[0]
    moved = work.weights * (programs.trained_dtype.itemsize / programs.mesh.size + programs.dtype.itemsize)
    params = join(*placed_params(programs, programs.dtype))
    return compile_phase(programs.mesh, resident, 0.0, moved, decode_weights, plan, params)


def plan_rollout(programs: Programs, work: Work, resident: int) -> Phase:
    """Prefill and decoding of the step's completions."""
    plan, prompts = prompt_rows(programs)
    whole = replicated(programs.mesh)
    params = jax.eval_shape(functools.partial(decode_weights, plan), join(*placed_params(programs, programs.dtype)))
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), params)
    seed = jax.ShapeDtypeStruct((2,), np.int32, sharding=whole)
    chips = programs.mesh.size
    moved = work.rollout_bytes(chips, min(plan.slots, -(-work.rows // chips)), programs.dtype.itemsize)
    flops = work.rollout_flops() / chips
    return compile_phase(programs.mesh, resident, flops, moved, run_mesh, plan, weights, prompts, seed)


def plan_scoring(programs: Programs, trainer: grpo.Trainer, work: Work, resident: int, params: Any) -> Phase:
    """Log-probs under `params`: of the reference, or of the policy that sampled."""
    batch = placed_batch(programs, trainer, work.rows)
    moved = trainer.parts * work.weights * programs.dtype.itemsize
    flops = sum(work.score_flops()) / programs.mesh.size
    return compile_phase(programs.mesh, resident, flops, moved, grpo.batch_logprobs, trainer, params, batch)


def plan_update(programs: Programs, trainer: grpo.Trainer, work: Work, resident: int) -> Phase:
    """One optimizer step."""
    batch = placed_batch(programs, trainer, work.rows)
    scored = batch.rollout_logprobs
    if programs.settings[LossOptions].beta > 0:
        batch = dataclasses.replace(batch, ref_logprobs=scored)
    if programs.settings[StepOptions].updates_per_step > 1:
        batch = dataclasses.replace(batch, old_logprobs=scored)
    state, frozen = placed_state(programs, trainer), placed_params(programs, programs.dtype)[1]
    weights = work.weights * programs.dtype.itemsize
    saved = work.rows / programs.mesh.size * memory.saved_bytes(programs, work.prompt + work.completion)
    moved = 3 * trainer.parts * weights + 2 * saved + 2 * bytes_on_chip(state)
    flops = work.update_flops(trainer.remat) / programs.mesh.size
    return compile_phase(programs.mesh, resident, flops, moved, grpo.update, trainer, state, batch, frozen)


def make_plan(programs: Programs) -> dict[str, Phase]:
    """Every phase of a training step, each compiled."""
    settings = programs.settings
    steps = settings[StepOptions]
    prompt, completion = settings[DataOptions].max_prompt_length, settings[RolloutOptions].max_completion_length
    work = Work(programs.config, steps.batch_size, steps.num_generations, prompt, completion)
    trainer = programs.trainer(max(1, steps.max_steps), memory.choose_parts(programs, work.rows))
    trained, frozen = placed_params(programs, programs.dtype)
    state, base = bytes_on_chip(placed_state(programs, trainer)), bytes_on_chip(frozen)
    moments = state - bytes_on_chip(trained)
    has_reference = settings[LossOptions].beta > 0
    own = bytes_on_chip(placed_reference(programs)) - base if has_reference else 0
    phases = {
        "weights": plan_weights(programs, work, moments + own),
        "rollout": plan_rollout(programs, work, state + base + own),
    }
    if steps.updates_per_step > 1:
        phases["old_policy"] = plan_scoring(programs, trainer, work, moments + own, join(trained, frozen))
    if has_reference:
        phases["reference"] = plan_scoring(programs, trainer, work, state, placed_reference(programs))
    return phases | {"update": plan_update(programs, trainer, work, own)}


# What is said of it


def roofline_seconds(phase: Phase, chip: Chip) -> float:
    return max(phase.flops / chip.tflops / 1e12, phase.bytes / chip.bandwidth / 1e9)


def describe(name: str, phase: Phase, chip: Chip) -> str:
    parts = phase.memory
    if not parts.arguments:
        return f"{name:<10} {phase.total / GIB:6.2f} GiB of {chip.hbm_gib:g}: the compiler refuses it\n"
    moved = "; ".join(f"{kind} {t.bytes / 1e9:.2f} GB in {t.runs}" for kind, t in phase.traffic.items() if t.runs)
    inside = sum(t.runs_in_open_loops for t in phase.traffic.values())
    return (
        f"{name:<10} {phase.total / GIB:6.2f} GiB of {chip.hbm_gib:g}: resident {phase.resident / GIB:.2f}, "
        f"arguments {parts.arguments / GIB:.2f}, temporaries {parts.temporaries / GIB:.2f}, "
        f"outputs {(parts.outputs - parts.aliased) / GIB:.2f}\n"
        f"           {phase.flops / 1e12:.1f} TFLOP, {phase.bytes / 1e9:.1f} GB: about "
        f"{roofline_seconds(phase, chip):.3f} s at the chip's limits; collectives: {moved or 'none'}"
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


def largest_batch(programs: Programs, phases: dict[str, Phase], chip: Chip) -> int:
    """Prompts per step whose update would fit in one part, extrapolated from the compiled one by `activation_bytes`.

    In more parts the update takes more prompts; the rollout's memory does not grow past --slots completions per chip.
    """
    steps = programs.settings[StepOptions]
    length = programs.settings[DataOptions].max_prompt_length
    length += programs.settings[RolloutOptions].max_completion_length
    parts = memory.choose_parts(programs, steps.batch_size * steps.num_generations)
    own = steps.batch_size * steps.num_generations / programs.mesh.size / parts
    spare = chip.hbm_gib * GIB - phases["update"].total
    most = own + spare / memory.activation_bytes(programs, length)
    return max(0, int(most * programs.mesh.size // steps.num_generations))


def main(settings: Settings) -> int:
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    jax.config.update("jax_platforms", "cpu")
    programs = make_programs(settings)
    options, steps = settings[PlanOptions], settings[StepOptions]
    chip = CHIPS[options.topology.partition(":")[0]]
    parts = memory.choose_parts(programs, steps.batch_size * steps.num_generations)
    sys.stderr.write(
        f"{options.topology} as fsdp,tp={options.mesh}: {programs.mesh.size} chips of {chip.hbm_gib:g} GiB; "
        f"{steps.batch_size} prompts x {steps.num_generations}, update in {parts} parts; "
        f"page pool {cache_bytes(programs) / GIB:.2f} GiB per chip\n"
    )
    phases = make_plan(programs)
    for name, phase in phases.items():
        sys.stderr.write(describe(name, phase, chip))
    fits = all(phase.total <= chip.hbm_gib * GIB for phase in phases.values())
    sys.stderr.write(f"it {'fits' if fits else 'does NOT fit'}\n")
    report = {
        "topology": options.topology,
        "mesh": options.mesh,
        "jax": jax.__version__,
        "fits": fits,
        "gradient_accumulation_steps": parts,
        "largest_batch": largest_batch(programs, phases, chip),
        "phases": {name: figures(phase, chip) for name, phase in phases.items()},
    }
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    run_command("python -m minigrpo.plan", __doc__ or "", SECTIONS, main)
