"""Adapters (LoRA) and int8 matrices: making, merging, and PEFT's file format."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from minigrpo.config import LARGEST_RANK, LoraOptions, UsageError
from minigrpo.data.json_file import read_object
from minigrpo.model.params import PROJECTIONS, Lora, ModelConfig, Params
from minigrpo.model.qwen import adapter_shapes
from minigrpo.model.weights import BUILTIN, HUB_NAMES, copy_tokenizer, hub_tensors, load_tree, take_part, write_tensors
from minigrpo.runtime.workers import WORKERS

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

HUB_MATRICES = {name: HUB_NAMES[name].split(".")[-2] for name in PROJECTIONS}
"""Matrix -> its module's name in PEFT: q -> q_proj."""

LARGEST_ALPHA = 1e6
"""Beyond any adapter's; larger ones and NaN are refused."""


def make_lora(options: LoraOptions) -> Lora | None:
    """Return the flags' adapters; None when --lora_rank is 0. UsageError for a target that is no matrix.

    PEFT's names, such as q_proj and all-linear, serve too.
    """
    if not options.lora_rank:
        return None
    targets = tuple(name.strip().removesuffix("_proj") for name in options.lora_targets.split(","))
    targets = tuple(PROJECTIONS) if targets in (("all",), ("all-linear",)) else tuple(dict.fromkeys(targets))
    wrong = [name for name in targets if name not in PROJECTIONS]
    if wrong:
        known = ", ".join(PROJECTIONS)
        raise UsageError(f"--lora_targets={options.lora_targets}: {wrong[0]!r} is not one of {known}; all goes alone")
    return Lora(options.lora_rank, options.lora_alpha, options.lora_dropout, targets)


# PEFT's files


def adapter_json(lora: Lora, base: str) -> dict[str, Any]:
    """Return adapter_config.json as peft writes it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lasting_name(base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [HUB_MATRICES[name] for name in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def lasting_name(base: str) -> str:
    """Return a model's name that holds in every folder: an absolute path, or a Hub id as it is."""
    folder = BUILTIN.get(base, Path(base))
    return str(folder.resolve()) if folder.is_dir() else base


def save_adapter(
    folder: Path, adapters: Params, lora: Lora, base: str, source: Path | None = None, chat_template: str | None = None
) -> None:
    """Write a folder that peft loads; it appears under its name only when complete. `base` is a Hub id or path.

    The tokenizer files of the folder `source` go along, with `chat_template` in place of theirs if given. Of several
    workers, the first writes.
    """
    if not WORKERS.writes:
        return take_part(adapters, np.float32)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_tensors(partial / WEIGHTS_FILE, dict(hub_tensors(adapters, np.float32)))
    (partial / CONFIG_FILE).write_text(json.dumps(adapter_json(lora, base), indent=2) + "\n")
    if source is not None:
        copy_tokenizer(source, partial, chat_template)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "lora_alpha", "lora_dropout",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "runtime_config", "target_modules",
    "task_type", "use_rslora",
})  # fmt: skip
"""Settings of PEFT that are read here, or that change nothing by themselves."""

NEUTRAL = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal", "eva"), "revision": ("main",)}
"""Settings of PEFT -> values that change nothing, besides null, false and empty ones; others of init_lora_weights
change the base itself."""


def read_adapter_config(folder: Path) -> tuple[Lora, str]:
    """Return an adapter folder's settings and its base model, "" if it names none.

    UsageError naming the setting that is not understood: any that says something and is not listed here.
    """
    path = folder / CONFIG_FILE
    raw = read_object(path, {})
    if raw.get("peft_type") != "LORA":
        raise UsageError(f"{path}: peft_type {raw.get('peft_type')!r:.60} is not supported; only LORA is")
    for name, value in raw.items():
        if name not in HARMLESS and value and value not in NEUTRAL.get(name, ()):
            raise UsageError(
                f"{path}: {name}={value!r:.60} is not supported; merge the adapter into its base with peft"
            )
    base = raw.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise UsageError(f"{path}: base_model_name_or_path is {base!r:.60}; it must be a Hub id or a folder")
    return Lora(*adapter_numbers(path, raw), read_targets(folder, raw)), base or ""


def adapter_numbers(path: Path, raw: dict[str, Any]) -> tuple[int, float, float]:
    """Return rank, alpha and dropout; UsageError for impossible values."""
    rank, alpha, dropout = raw.get("r"), raw.get("lora_alpha"), raw.get("lora_dropout") or 0
    numbers = type(rank) is int and all(type(value) in (int, float) for value in (alpha, dropout))
    if not numbers or not isinstance(raw.get("use_rslora") or False, bool):
        raise UsageError(
            f"{path}: r, lora_alpha or lora_dropout is missing or no number, or use_rslora is not true or false"
        )
    assert isinstance(rank, int) and isinstance(alpha, int | float) and isinstance(dropout, int | float)
    if not 1 <= rank <= LARGEST_RANK or not abs(alpha) < LARGEST_ALPHA or not 0 <= dropout < 1:
        raise UsageError(f"{path}: r={rank!r:.20}, lora_alpha={alpha!r:.20}, lora_dropout={dropout!r:.20} cannot be")
    root = rank**0.5 if raw.get("use_rslora") else 1.0  # there, alpha is divided by the rank's root (arXiv:2312.03732)
    return rank, float(alpha) * root, float(dropout)


def read_targets(folder: Path, raw: dict[str, Any]) -> tuple[str, ...]:
    """Return the matrices that have adapters.

    Names and full paths of modules say so themselves. For a regular expression, all-linear and exclusions the tensors
    in the file do; `load_adapter` refuses a file that has them for some layers only.
    """
    path, modules = folder / CONFIG_FILE, raw.get("target_modules")
    known = {module: name for name, module in HUB_MATRICES.items()}
    if modules == "all-linear" and not raw.get("exclude_modules"):
        return tuple(PROJECTIONS)
    if (isinstance(modules, str) and modules) or raw.get("exclude_modules"):
        modules = sorted({name.split(".lora_")[0].split(".")[-1] for name in tensor_names(folder)})
    if not isinstance(modules, list) or not modules or not all(isinstance(module, str) for module in modules):
        raise UsageError(
            f"{path}: target_modules is {modules!r:.60}; it must be a list of modules or a regular expression"
        )
    matrices = [module.split(".")[-1] for module in modules]
    wrong = next((module for module, matrix in zip(modules, matrices, strict=True) if matrix not in known), None)
    if wrong is not None:
        raise UsageError(f"{path}: target module {wrong!r:.60} is not supported; there are {', '.join(known)}")
    return tuple(sorted({known[matrix] for matrix in matrices}, key=list(PROJECTIONS).index))


def tensor_names(folder: Path) -> list[str]:
    """Return the names of an adapter's tensors; UsageError where its file is missing or torn."""
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="numpy") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: not a complete safetensors file ({error})") from error


def load_adapter(folder: Path, config: ModelConfig, mesh: Mesh) -> Params:
    """Load a PEFT folder's float32 adapters onto the mesh."""
    return load_tree(folder, adapter_shapes(config), config, mesh, np.float32)
