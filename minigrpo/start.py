"""From settings to a model on a mesh: what every command does first."""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from minigrpo import grpo, losses
from minigrpo.config import (
    DataOptions,
    LossOptions,
    ModelOptions,
    OptimizerOptions,
    RolloutOptions,
    Settings,
    UsageError,
)
from minigrpo.logprobs import Head, Tiles
from minigrpo.model import ModelConfig, Params, abstract_params, read_config
from minigrpo.optimizer import make_optimizer
from minigrpo.rollout import Roller
from minigrpo.sharding import Layout, check_divisible, make_mesh, start_platform
from minigrpo.tokenizer import Tokenizer, load_tokenizer
from minigrpo.weights import find_checkpoint, load_params, random_params

TINY = "builtin:tiny"
Recipes = Mapping[str, Mapping[str, Any]]

RECIPES: dict[str, dict[str, Any]] = {
    TINY: {
        "max_prompt_length": 128,
        "max_completion_length": 96,
        "page_size": 16,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
    }
}
"""Defaults that a built-in model carries for every command; explicit flags win."""

CPU_CHUNK = 20 << 20
"""Bytes of logits that one virtual CPU device holds in the backward pass."""

DEFAULT_MODEL = "Qwen/Qwen3-1.7B"


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


def choose_tiles(mesh: Mesh, vocab: int) -> Tiles:
    """Sizes for an accelerator; the CPU's many virtual devices share one memory, so theirs are smaller."""
    if mesh.devices.flat[0].platform != "cpu":
        return Tiles()
    rows = max(1, CPU_CHUNK // (4 * vocab))
    return Tiles(backward_rows=min(Tiles.backward_rows, 2 ** (rows.bit_length() - 1)))


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

    def head(self, temperature: float) -> Head:
        return Head(self.mesh, self.num_tokens, temperature, choose_tiles(self.mesh, self.config.vocab_size))

    def roller(self, options: RolloutOptions) -> Roller:
        return Roller(self.config, self.graph, self.mesh, self.dtype, options, self.num_tokens, self.stop_tokens)

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
        )


@dataclasses.dataclass(frozen=True)
class Setup(Programs):
    """A model's programs, checkpoint folder and tokenizer; its weights are loaded by `load`."""

    folder: Path
    tokenizer: Tokenizer

    def load(self, seed: int = 0, dtype: Any = jnp.float32) -> Params:
        """The checkpoint's weights, or random ones with --init=random, on the mesh."""
        if self.settings[ModelOptions].init == "random":
            return random_params(self.config, self.mesh, seed, dtype)
        return load_params(self.folder, self.config, self.mesh, dtype)


def resolve(settings: Settings, recipes: Recipes) -> Settings:
    """Settings with every "auto" that depends on the platform or the model decided, and the model's recipes applied."""
    on_cpu = jax.default_backend() == "cpu"
    model = settings[ModelOptions].model
    model = (TINY if on_cpu else DEFAULT_MODEL) if model == "auto" else model
    dtype = settings[ModelOptions].compute_dtype
    values = {"model": model, "compute_dtype": ("float32" if on_cpu else "bfloat16") if dtype == "auto" else dtype}
    if DataOptions in settings.sections and settings[DataOptions].dataset == "auto":
        values["dataset"] = "builtin:arithmetic" if model == TINY else "gsm8k"
    recipe = {**RECIPES.get(model, {}), **recipes.get(model, {})}
    if "num_epochs" in settings.explicit:
        recipe.pop("max_steps", None)
    return settings.with_defaults(recipe).with_values(values)


def set_up(settings: Settings, mesh_flag: str, recipes: Recipes = MappingProxyType({})) -> Setup:
    """Starts the platform, finds the checkpoint and reads everything but its weights.

    `recipes` are the command's own defaults by model name.
    """
    start_platform(mesh_flag)
    mesh = make_mesh(mesh_flag)
    settings = resolve(settings, recipes)
    options = settings[ModelOptions]
    folder = find_checkpoint(options.model)
    config = read_config(folder / "config.json")
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
        folder=folder,
        tokenizer=tokenizer,
    )
