"""From settings to a model on a mesh: the first thing that every command does."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from minigrpo.config import (
    MODEL_DEFAULTS,
    TINY,
    LossOptions,
    Options,
    RewardOptions,
    RolloutOptions,
    Settings,
    UsageError,
)
from minigrpo.data.chat import Tokenizer, brings_template, load_tokenizer
from minigrpo.grpo import losses
from minigrpo.grpo.batch import PackingSpec
from minigrpo.grpo.logprobs import LMHead
from minigrpo.grpo.optimizer import learning_rate, make_optimizer
from minigrpo.grpo.update import Objective, UpdateSpec
from minigrpo.kernels.backend import backend_for
from minigrpo.model.hub import Source, find_source, load_adapters, load_base
from minigrpo.model.hub_config import check_lengths, read_config
from minigrpo.model.lora import make_lora, save_adapter
from minigrpo.model.params import Lora, ModelConfig, Params, join, merge_adapters
from minigrpo.model.qwen import quantize, random_adapters
from minigrpo.model.weights import export, random_params
from minigrpo.planning.memory import count_resident, pool_limit
from minigrpo.planning.run_spec import RunSpec
from minigrpo.rollout.generator import Generator, rollout_spec, split_groups
from minigrpo.runtime.chips import GIB, memory_of_kind
from minigrpo.runtime.files import fingerprint
from minigrpo.runtime.mesh import check_divisible, make_mesh, start_platform
from minigrpo.runtime.program_cache import keep_programs
from minigrpo.runtime.workers import WORKERS

Recipes = Mapping[str, Mapping[str, Any]]

DEFAULT_MODEL = "Qwen/Qwen3-1.7B"


# Refusals


def check_loss(settings: Settings) -> None:
    """Raise UsageError for loss settings that contradict each other; print a line for doubtful ones."""
    loss, rollout = settings.loss, settings.rollout
    if rollout.temperature == 0:
        raise UsageError(
            "--temperature=0: greedy completions of a group are all equal and teach nothing; use 0.9 or so"
        )
    if rollout.repetition_penalty != 1:
        raise UsageError(
            f"--repetition_penalty={rollout.repetition_penalty}: would sample from another distribution than is "
            "trained; leave it out here, generate and evaluate take it"
        )
    check_needed(settings)
    if loss.importance_sampling_level == "sequence" and loss.loss_type != "grpo":
        sys.stderr.write(
            f"note: --importance_sampling_level=sequence with --loss_type={loss.loss_type} weighs whole completions by "
            "their length; GSPO's own loss is --loss_type=grpo\n"
        )


def check_needed(settings: Settings) -> None:
    """Raise UsageError for a flag that only means something beside another one, which is not given."""
    loss, rewards = settings.loss, settings.rewards
    defaults = dataclasses.asdict(LossOptions()) | dataclasses.asdict(RewardOptions())
    needed = {
        "overlong_penalty": ("overlong_buffer", rewards.overlong_buffer > 0),
        "rollout_correction_cap": ("rollout_correction", loss.rollout_correction != "none"),
        "max_resamples": ("zero_std_groups=resample", loss.zero_std_groups == "resample"),
        "ref_mixup_alpha": ("sync_ref_steps", loss.sync_ref_steps > 0),
    }
    for name, (other, given) in needed.items():
        value = settings.as_dict().get(name, defaults[name])  # plan has not all of them
        if value != defaults[name] and not given:
            raise UsageError(f"--{name}={value}: means nothing without --{other}")


def check_lora(settings: Settings, config: ModelConfig) -> None:
    """Raise UsageError for settings that adapters would give another meaning."""
    loss = settings.loss
    if not config.lora:
        return
    if loss.sync_ref_steps and loss.ref_mixup_alpha < 1:
        raise UsageError(
            f"--ref_mixup_alpha={loss.ref_mixup_alpha}: a mix of adapters is no mix of weights; use 1 with LoRA"
        )
    if loss.rollout_correction != "none" and config.lora.dropout and settings.steps.updates_per_step == 1:
        raise UsageError(
            f"--rollout_correction={loss.rollout_correction}: would correct --lora_dropout={config.lora.dropout} too; "
            "set one of them to none or 0"
        )
    if settings.steps.packing and "packing" in settings.explicit and config.lora.dropout:
        raise UsageError(f"--packing=true: not with --lora_dropout={config.lora.dropout}; leave one of them out")
    if settings.steps.share_prompts == "true" and config.lora.dropout:
        raise UsageError(f"--share_prompts=true: not with --lora_dropout={config.lora.dropout}; leave one of them out")


def check_quantize(config: ModelConfig) -> None:
    """Raise UsageError for training a quantized model without adapters: nothing would be trained."""
    if config.int8 and not config.lora:
        raise UsageError("--quantize=int8: freezes the base weights; add --lora_rank=16, or remove the flag")


# The pieces of a run


def lm_head(spec: RunSpec, temperature: float) -> LMHead:
    """Return the LM head's spec."""
    return LMHead(spec.mesh, spec.num_tokens, temperature, spec.backend.head_tiles)


def make_generator(
    spec: RunSpec,
    options: RolloutOptions,
    pool_limit: int = 0,
    on_token: Callable[[Any, Any, Any], None] | None = None,
) -> Generator:
    """Return a generator with these options; `pool_limit` is in pages, 0 is none."""
    prompt_tokens = spec.settings.data.max_prompt_length
    made = rollout_spec(
        spec.config, spec.mesh, spec.backend, spec.dtype, options, prompt_tokens, spec.num_tokens, spec.stop_tokens
    )
    return Generator(dataclasses.replace(made, pool_limit=pool_limit, on_token=on_token))


def grpo_loss(spec: RunSpec) -> tuple[Objective, Callable[..., Any]]:
    """Return the objective and the token weights of the settings' loss."""
    loss, limit = spec.settings.loss, spec.settings.rollout.max_completion_length
    weights = functools.partial(losses.token_weights, loss.loss_type, max_tokens=limit)
    return functools.partial(losses.policy_loss, loss), weights


LEAST_SLOTS = 8
"""Completions of full length that a rollout is to have room for before AdamW's moments make room."""


def offloads_optimizer(spec: RunSpec) -> bool:
    """Tell if AdamW's moments wait in the host's memory: as asked, or where a rollout would have too little room."""
    settings, steps = spec.settings, spec.settings.steps
    if settings.optimizer.offload_optimizer != "auto":
        return settings.optimizer.offload_optimizer == "true"
    if spec.platform == "cpu" or "sft" in settings.sections or settings.data.offline:
        return False
    made, resident = make_generator(spec, settings.rollout).spec, count_resident(spec, offloaded=False).total
    split, rows = split_groups(steps.batch_size, steps.num_generations, spec.mesh.size)
    own = rows // spec.mesh.size
    slots = min(LEAST_SLOTS, own * steps.num_generations // split)
    return pool_limit(spec, resident) < made.least_pages(own) + (slots - 1) * made.completion_pages


def make_update_spec(
    spec: RunSpec, total_updates: int, loss: tuple[Objective, Callable[..., Any]], temperature: float, seed: int
) -> UpdateSpec:
    """Return the spec of log-probs and updates under the settings; `loss` is an objective and its token weights."""
    options, per_step = spec.settings.optimizer, spec.settings.steps.updates_per_step
    return UpdateSpec(
        model=spec.model,
        head=lm_head(spec, temperature),
        compute=spec.compute,
        causal_attention=spec.backend.causal_attention,
        optimizer=make_optimizer(options, total_updates, per_step),
        schedule=learning_rate(options, total_updates, per_step),
        objective=loss[0],
        token_weights=loss[1],
        remat=options.remat,
        dropout_seed=seed if spec.dropout else None,
        offload_optimizer=offloads_optimizer(spec),
    )


def grpo_update_spec(spec: RunSpec, total_updates: int) -> UpdateSpec:
    """Return the spec of GRPO's log-probs and updates."""
    temperature, seed = spec.settings.rollout.temperature, spec.settings.steps.seed
    return make_update_spec(spec, total_updates, grpo_loss(spec), temperature, seed)


# A model with its files


@dataclasses.dataclass(frozen=True)
class Build:
    """A model's programs, files and tokenizer; its weights are loaded by `load`."""

    spec: RunSpec
    source: Source
    tokenizer: Tokenizer

    @property
    def settings(self) -> Settings:
        """Return the settings, every "auto" decided."""
        return self.spec.settings

    @property
    def own_template(self) -> str | None:
        """Return the chat template to be written with the model where its files bring none or another; else None."""
        given = self.settings.data.chat_template
        kept = given == "none" or (given == "auto" and brings_template(self.source.tokenizer_folder))
        return None if kept else self.tokenizer.template.source

    def load_base(self, seed: int, dtype: Any) -> Params:
        """Load the base's weights, or draw them with --init=random, on the mesh."""
        spec = self.spec
        if spec.settings.model.init == "random":
            plain = dataclasses.replace(spec.config, lora=None, int8=False)
            return random_params(plain, spec.mesh, seed, dtype)
        return load_base(self.source, spec.config, spec.mesh, dtype)

    def load(self, seed: int = 0, dtype: Any = jnp.float32) -> Params:
        """Load the base's weights as `dtype`, or int8 with --quantize, and the adapters, old or new, in float32."""
        spec, base = self.spec, self.load_base(seed, dtype)
        if spec.config.int8:
            base = quantize(spec.config, base, spec.mesh)
        if spec.config.lora is None:
            return base
        brought = load_adapters(self.source, spec.config, spec.mesh)
        return join(base, brought or random_adapters(spec.config, spec.mesh, seed))

    def export(self, folder: Path, adapter: Path, trainable: Params, frozen: Params) -> None:
        """Write the trained model as a Hub folder in the compute dtype, and its adapters, if any, as one of PEFT's.

        Where the base is a run's checkpoint, which PEFT cannot load, it is written beside them as a Hub folder, base/.
        """
        spec, files = self.spec, self.source.tokenizer_folder
        base = load_base(self.source, spec.config, spec.mesh, spec.dtype) if spec.config.int8 else frozen
        if spec.config.lora:
            name = self.source.base
            if self.source.base_step:
                name = str(folder.with_name("base"))
                export(Path(name), files, base, spec.config, spec.stop_tokens, spec.base_dtype, self.own_template)
            save_adapter(adapter, trainable, spec.config.lora, name, source=files, chat_template=self.own_template)
        whole = merge_adapters(spec.config, join(trainable, base))
        export(folder, files, whole, spec.config, spec.stop_tokens, spec.dtype, self.own_template)


def resolve(settings: Settings, recipes: Recipes) -> Settings:
    """Decide every "auto" that depends on the platform or the model, and apply the model's recipes."""
    on_cpu = jax.default_backend() == "cpu"
    model = settings.model.model
    model = (TINY if on_cpu else DEFAULT_MODEL) if model == "auto" else model
    dtype = settings.model.compute_dtype
    values = {"model": model, "compute_dtype": ("float32" if on_cpu else "bfloat16") if dtype == "auto" else dtype}
    recipe = {**MODEL_DEFAULTS.get(model, {}), **recipes.get(model, {})}
    if "num_epochs" in settings.explicit:
        recipe.pop("max_steps", None)
    if settings.data.dataset not in ("auto", "builtin:arithmetic"):
        recipe.pop("eval_steps", None)  # it may have no test split
    settings = settings.with_defaults(recipe)
    if settings.data.dataset == "auto":
        values["dataset"] = "builtin:arithmetic" if model == TINY else "gsm8k"
    return settings.with_values(values)


def choose_lora(settings: Settings, source: Source) -> Lora | None:
    """Return the flags' adapters or those that the model comes with; UsageError when there are both."""
    wanted = make_lora(settings.lora)
    unused = settings.explicit & {"lora_alpha", "lora_dropout", "lora_targets"}
    if unused and not wanted and "lora_rank" not in settings.explicit:
        raise UsageError(f"--{min(unused)}: means nothing without --lora_rank, such as --lora_rank=16")
    if wanted and settings.model.init == "random":
        raise UsageError("--init=random: adapters need a base that can be loaded again; leave --lora_rank or it out")
    if wanted and source.lora:
        raise UsageError(
            f"--lora_rank={wanted.rank}: --model={settings.model.model} brings adapters of rank "
            f"{source.lora.rank}, which are trained on; leave --lora_rank out"
        )
    return wanted or source.lora


def device_bytes(device: jax.Device) -> int:
    """Return a device's memory, from the table if it is in there, so that a run decides as its plan did."""
    known = memory_of_kind(device.device_kind)
    return known or (device.memory_stats() or {}).get("bytes_limit", 16 * GIB)


def build(settings: Settings, mesh_flag: str, recipes: Recipes = MappingProxyType({})) -> Build:
    """Start the platform, find the checkpoint and read everything but its weights.

    `recipes` are the command's own defaults by model name.
    """
    keep_programs()
    start_platform(mesh_flag)
    mesh = make_mesh(mesh_flag)
    settings = resolve(settings, recipes)
    source = find_source(settings.model.model, settings.model.base_model)
    if WORKERS.count > 1:
        WORKERS.equal({f"files of --model={settings.model.model} of digest": fingerprint(source.folder)})
    config = read_config(source.folder / "config.json")
    int8 = settings.model.quantize == "int8"
    config = dataclasses.replace(config, lora=choose_lora(settings, source), int8=int8)
    if config.lora and config.lora.dropout and settings.as_dict().get("share_prompts") != "true":
        settings = settings.with_defaults({"packing": False})  # which has a key per row
    check_divisible(config.sizes, mesh)
    limits = settings.sft if "sft" in settings.sections else settings.rollout
    check_lengths(config, settings.data.max_prompt_length, limits.max_completion_length)
    data = settings.data
    tokenizer = load_tokenizer(
        source.tokenizer_folder, data.enable_thinking, data.chat_template, data.keep_special_tokens, source.folder
    )
    check_ends(tokenizer, config, source.folder)
    if settings.model.compute_dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    device = mesh.local_devices[0]
    spec = RunSpec(
        settings=settings,
        config=config,
        mesh=mesh,
        backend=backend_for(device),
        platform=device.platform,
        device_bytes=min(WORKERS.gather(device_bytes(device))),
        dtype=jnp.dtype(settings.model.compute_dtype),
        num_tokens=min(tokenizer.num_tokens, config.vocab_size),
        stop_tokens=tokenizer.stop_tokens,
    )
    return Build(spec, source, tokenizer)


def check_ends(tokenizer: Tokenizer, config: ModelConfig, folder: Path) -> None:
    """Raise UsageError for an end token that the model does not have."""
    unknown = [token for token in tokenizer.stop_tokens if token >= config.vocab_size]
    if unknown:
        raise UsageError(f"{folder}: end token {unknown[0]} is outside the model's {config.vocab_size} vocabulary rows")


def setting_text(flag: str, value: Any) -> str:
    """Return a setting as one line shows it."""
    return f"{flag}={value}".replace("\n", "\\n")


def is_changed(options: Options, field: dataclasses.Field[Any]) -> bool:
    """Tell if a setting is not the flag's default."""
    return bool(getattr(options, field.name) != field.default)


def announce(built: Build, packing: PackingSpec, sequences: int, params: tuple[Params, Params], run: str) -> None:
    """Print every value used by a run, once, and where things go.

    `sequences` are those of an update, `params` the trained and the frozen weights.
    """
    changed: list[str] = []
    for name in built.settings.sections:
        options = getattr(built.settings, name)
        shown = {flag: setting_text(flag, value) for flag, value in dataclasses.asdict(options).items()}
        values = [text for flag, text in shown.items() if getattr(options, flag) is not None]
        sys.stderr.write(f"{(type(options).__doc__ or '').lower()}: {' '.join(values)}\n")
        changed += [shown[field.name] for field in dataclasses.fields(options) if is_changed(options, field)]
    sys.stderr.write(f"other than the defaults: {' '.join(changed) or 'nothing'}\n")
    mesh, most = built.spec.mesh, packing.micro_batches(sequences)
    devices, sizes = mesh.devices, " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    processes = f" of {WORKERS.count} workers" if WORKERS.count > 1 else ""
    sys.stderr.write(
        f"mesh: {sizes} of {devices.flat[0].device_kind} devices{processes}; "
        f"update in at most {most} micro-batch{'es' * (most > 1)} of {packing.rows} x {packing.row_tokens} tokens; "
        f"run folder {run}\n"
    )
    counts = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in params]
    sys.stderr.write(f"parameters: {counts[0]:,} trained, {counts[1]:,} frozen\n")
