"""From settings to a model on a mesh: what every command does first."""

import dataclasses
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

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
)
from minigrpo.data.chat import Tokenizer, load_tokenizer
from minigrpo.grpo import losses
from minigrpo.grpo import update as grpo
from minigrpo.grpo.logprobs import Head, Tiles
from minigrpo.grpo.optimizer import make_optimizer
from minigrpo.model.attention import copying_pays
from minigrpo.model.hub import Source, find_source, load_adapters, load_base
from minigrpo.model.lora import make_lora, merge, quantize, random_adapters, save_adapter
from minigrpo.model.qwen import Lora, ModelConfig, Params, abstract_params, join, read_config
from minigrpo.model.weights import export, random_params
from minigrpo.rollout.generator import Roller
from minigrpo.runtime.chips import GIB, memory_of_kind
from minigrpo.runtime.mesh import Layout, check_divisible, make_mesh, start_platform

TINY = "builtin:tiny"
Recipes = Mapping[str, Mapping[str, Any]]

RECIPES: dict[str, dict[str, Any]] = {
    TINY: {
        "max_prompt_length": 128,
        "max_completion_length": 96,
        "page_size": 16,
        "remat": "attention",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
    }
}
"""Defaults that a built-in model carries for every command; explicit flags win."""

CPU_LOGITS = 8 << 20
"""Bytes of logits that one virtual CPU device holds in the backward pass."""

DEFAULT_MODEL = "Qwen/Qwen3-1.7B"

PROGRAMS, PROGRAM_BYTES = "jax_compilation_cache_dir", 4 << 30
"""jax's setting for the folder of compiled programs, and what it may hold; the least recently used ones go."""

TORN = 60
"""Seconds after which jax has written a program's time stamp too, or never will."""


def check_loss(loss: LossOptions, rollout: RolloutOptions) -> None:
    """UsageError for a loss that cannot mean what it says; one line for what is merely doubtful."""
    if rollout.temperature == 0:
        raise UsageError(
            "--temperature=0: greedy completions of a group are all equal and teach nothing; use 0.9 or so"
        )
    if rollout.top_k or rollout.top_p < 1 or rollout.min_p:
        if loss.rollout_correction != "none":
            raise UsageError(
                f"--rollout_correction={loss.rollout_correction}: recorded log-probs are those before --top_k, --top_p "
                "and --min_p, so it would not correct what these do; turn one of them off"
            )
        sys.stderr.write(
            "note: top_k, top_p and min_p sample from another distribution than is trained, which biases it\n"
        )
    if loss.importance_sampling_level == "sequence" and loss.loss_type != "grpo":
        sys.stderr.write(
            f"note: --importance_sampling_level=sequence with --loss_type={loss.loss_type} weighs whole completions by "
            "their length; GSPO's own loss is --loss_type=grpo\n"
        )


def check_lora(settings: Settings, config: ModelConfig) -> None:
    """UsageError for settings that adapters would give another meaning."""
    loss = settings[LossOptions]
    if not config.lora:
        return
    if loss.sync_ref_steps and loss.ref_mixup_alpha < 1:
        raise UsageError(
            f"--ref_mixup_alpha={loss.ref_mixup_alpha}: a mix of adapters is no mix of weights; use 1 with LoRA"
        )
    if loss.rollout_correction != "none" and config.lora.dropout and settings[StepOptions].updates_per_step == 1:
        raise UsageError(
            f"--rollout_correction={loss.rollout_correction}: would correct --lora_dropout={config.lora.dropout} too; "
            "set one of them to none or 0"
        )
    if settings[StepOptions].packing and "packing" in settings.explicit and config.lora.dropout:
        raise UsageError(f"--packing=true: not with --lora_dropout={config.lora.dropout}; leave one of them out")
    if settings[StepOptions].share_prompts == "true" and config.lora.dropout:
        raise UsageError(f"--share_prompts=true: not with --lora_dropout={config.lora.dropout}; leave one of them out")


def check_quantize(config: ModelConfig) -> None:
    """UsageError for a model in training that has nothing to train."""
    if config.int8 and not config.lora:
        raise UsageError("--quantize=int8: whole numbers cannot be trained; add --lora_rank=16 or leave it out")


def choose_tiles(mesh: Mesh) -> Tiles:
    """How the log-probs are computed in parts on this platform."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return Tiles(rows=1024, vocab=2048, backward_bytes=CPU_LOGITS) if on_cpu else Tiles()


@dataclasses.dataclass(frozen=True)
class Programs:
    """Everything that a run's device programs are made of."""

    settings: Settings
    config: ModelConfig
    graph: nnx.GraphDef
    mesh: Mesh
    dtype: Any
    num_tokens: int
    """Real tokens, of which the head may have more rows."""
    stop_tokens: tuple[int, ...]

    @property
    def layout(self) -> Layout:
        return Layout(self.dtype, self.mesh)

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    @property
    def device_memory(self) -> int:
        """An accelerator's bytes; the table's where it is there, so that a run decides as its plan did."""
        device = self.mesh.devices.flat[0]
        known = memory_of_kind(device.device_kind)
        return known or (device.memory_stats() or {}).get("bytes_limit", 16 * GIB)

    def head(self, temperature: float) -> Head:
        return Head(self.mesh, self.num_tokens, temperature, choose_tiles(self.mesh))

    def roller(
        self, options: RolloutOptions, watch: Callable[[Any, Any, Any], None] | None = None, pool_limit: int = 0
    ) -> Roller:
        return Roller(
            self.config,
            self.mesh,
            self.dtype,
            options,
            self.num_tokens,
            self.stop_tokens,
            watch,
            pool_limit,
            spread_cpu=True,
        )

    def trainer(self, total_updates: int, parts: int) -> grpo.Trainer:
        """GRPO's scoring and updating as the settings want it."""
        loss, rollout = self.settings[LossOptions], self.settings[RolloutOptions]
        return grpo.Trainer(
            graph=self.graph,
            head=self.head(rollout.temperature),
            layout=self.layout,
            remat=self.settings[OptimizerOptions].remat,
            optimizer=make_optimizer(self.settings[OptimizerOptions], total_updates),
            objective=functools.partial(grpo.policy_loss, loss),
            weigh=functools.partial(losses.token_weights, loss.loss_type, max_tokens=rollout.max_completion_length),
            parts=parts,
            dropout_seed=self.settings[StepOptions].seed if self.config.lora and self.config.lora.dropout else None,
        )

    @property
    def arrangement(self) -> str:
        """How sequences lie in the update; a row each under dropout, which has a key per row."""
        steps = self.settings[StepOptions]
        if not steps.packing or (self.config.lora and self.config.lora.dropout):
            return "apart"
        share = {"auto": copying_pays(self.platform), "true": True, "false": False}[steps.share_prompts]
        return "sheets" if share else "rows"

    @property
    def trained_dtype(self) -> Any:
        """Of the base weights in training: float32 when they are trained themselves."""
        return self.dtype if self.config.lora else jnp.dtype("float32")


@dataclasses.dataclass(frozen=True)
class Setup(Programs):
    """A model's programs, files and tokenizer; its weights are loaded by `load`."""

    source: Source
    tokenizer: Tokenizer

    @property
    def plain_config(self) -> ModelConfig:
        """The model without adapters or int8."""
        return dataclasses.replace(self.config, lora=None, int8=False)

    def load_plain(self, seed: int, dtype: Any) -> Params:
        """The base's weights, or random ones with --init=random, on the mesh."""
        if self.settings[ModelOptions].init == "random":
            return random_params(self.plain_config, self.mesh, seed, dtype)
        return load_base(self.source, self.config, self.mesh, dtype)

    def load(self, seed: int = 0, dtype: Any = jnp.float32) -> Params:
        """The base's weights as `dtype`, or int8 with --quantize, and the adapters, old or new, in float32."""
        base = self.load_plain(seed, dtype)
        if self.config.int8:
            base = quantize(self.config, base, self.mesh)
        if self.config.lora is None:
            return base
        brought = load_adapters(self.source, self.config, self.mesh)
        return join(base, brought or random_adapters(self.config, self.mesh, seed))

    def export(self, folder: Path, adapter: Path, trained: Params, frozen: Params) -> None:
        """The trained model as a Hub folder, and its adapters, if there are any, as one of PEFT's."""
        if self.config.lora:
            save_adapter(adapter, trained, self.config.lora, self.source.base)
        base = load_base(self.source, self.config, self.mesh, self.dtype) if self.config.int8 else frozen
        whole = merge(self.config, join(trained, base))
        export(folder, self.source.folder, whole, self.config, self.stop_tokens)


def resolve(settings: Settings, recipes: Recipes) -> Settings:
    """Settings with every "auto" that depends on the platform or the model decided, and the model's recipes applied."""
    on_cpu = jax.default_backend() == "cpu"
    model = settings[ModelOptions].model
    model = (TINY if on_cpu else DEFAULT_MODEL) if model == "auto" else model
    dtype = settings[ModelOptions].compute_dtype
    values = {"model": model, "compute_dtype": ("float32" if on_cpu else "bfloat16") if dtype == "auto" else dtype}
    recipe = {**RECIPES.get(model, {}), **recipes.get(model, {})}
    if "num_epochs" in settings.explicit:
        recipe.pop("max_steps", None)
    settings = settings.with_defaults(recipe)
    if DataOptions in settings.sections and settings[DataOptions].dataset == "auto":
        values["dataset"] = "builtin:arithmetic" if model == TINY else "gsm8k"
    return settings.with_values(values)


def choose_lora(settings: Settings, source: Source) -> Lora | None:
    """The flags' adapters or those that the model comes with; UsageError when there are both."""
    wanted = make_lora(settings[LoraOptions]) if LoraOptions in settings.sections else None
    unused = settings.explicit & {"lora_alpha", "lora_dropout", "lora_targets"}
    if unused and not wanted and "lora_rank" not in settings.explicit:
        raise UsageError(f"--{min(unused)}: means nothing without --lora_rank, such as --lora_rank=16")
    if wanted and settings[ModelOptions].init == "random":
        raise UsageError("--init=random: adapters need a base that can be loaded again; leave --lora_rank or it out")
    if wanted and source.lora:
        raise UsageError(
            f"--lora_rank={wanted.rank}: --model={settings[ModelOptions].model} brings adapters of rank "
            f"{source.lora.rank}, which are trained on; leave --lora_rank out"
        )
    return wanted or source.lora


def programs_folder() -> Path:
    """Where compiled programs are kept if nothing else is said (XDG base directories); OSError if they cannot be."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (given if given.is_absolute() else Path.home() / ".cache") / "minigrpo" / "programs"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return folder


def drop_torn_programs(folder: Path) -> None:
    """Deletes what a process was killed while writing: jax would neither replace it nor, then, keep any other."""
    for program in folder.glob("*-cache"):
        stamped = program.with_name(program.name.removesuffix("-cache") + "-atime").exists()
        if not stamped and time.time() - program.stat().st_mtime > TORN:
            program.unlink()


def keep_programs() -> None:
    """Has jax keep compiled programs between runs, where it was not told a folder; one line if they cannot be kept."""
    named, wanted = (getattr(jax.config, name) for name in (PROGRAMS, "jax_enable_compilation_cache"))
    if named or not wanted:
        return
    try:
        folder = programs_folder()
        drop_torn_programs(folder)
    except (OSError, RuntimeError) as error:
        sys.stderr.write(f"compiled programs are not kept: {error}; JAX_COMPILATION_CACHE_DIR names another folder\n")
        return
    jax.config.update(PROGRAMS, str(folder))
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", PROGRAM_BYTES)


def set_up(settings: Settings, mesh_flag: str, recipes: Recipes = MappingProxyType({})) -> Setup:
    """Starts the platform, finds the checkpoint and reads everything but its weights.

    `recipes` are the command's own defaults by model name.
    """
    keep_programs()
    start_platform(mesh_flag)
    mesh = make_mesh(mesh_flag)
    settings = resolve(settings, recipes)
    options = settings[ModelOptions]
    source = find_source(options.model)
    folder = source.folder
    config = read_config(folder / "config.json")
    config = dataclasses.replace(config, lora=choose_lora(settings, source), int8=options.quantize == "int8")
    check_divisible(config.sizes, mesh)
    thinking = DataOptions in settings.sections and settings[DataOptions].enable_thinking
    tokenizer = load_tokenizer(folder, thinking)
    unknown = [token for token in tokenizer.stop_tokens if token >= config.vocab_size]
    if unknown:
        raise UsageError(f"{folder}: end token {unknown[0]} is outside the model's {config.vocab_size} vocabulary rows")
    if options.compute_dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    return Setup(
        settings=settings,
        config=config,
        graph=abstract_params(config)[0],
        mesh=mesh,
        dtype=jnp.dtype(options.compute_dtype),
        num_tokens=min(tokenizer.num_tokens, config.vocab_size),
        stop_tokens=tokenizer.stop_tokens,
        source=source,
        tokenizer=tokenizer,
    )
