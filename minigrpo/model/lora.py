"""Adapters (LoRA) and int8 matrices: making, merging, and PEFT's file format."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from minigrpo.config import LARGEST_RANK, LoraOptions, UsageError, read_json
from minigrpo.model.params import PROJECTIONS, Lora, ModelConfig, Params
from minigrpo.model.qwen import adapter_shapes
from minigrpo.model.weights import HUB_NAMES, hub_tensors, load_tree, write_tensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

HUB_MATRICES = {name: HUB_NAMES[name].split(".")[-2] for name in PROJECTIONS}
"""Matrix -> its module's name in PEFT: q -> q_proj."""


def make_lora(options: LoraOptions) -> Lora | None:
    """The flags' adapters; None when --lora_rank is 0. UsageError for a target that is no matrix."""
    if not options.lora_rank:
        return None
    targets = tuple(name.strip() for name in options.lora_targets.split(","))
    targets = tuple(PROJECTIONS) if targets == ("all",) else tuple(dict.fromkeys(targets))
    wrong = [name for name in targets if name not in PROJECTIONS]
    if wrong:
        known = ", ".join(PROJECTIONS)
        raise UsageError(f"--lora_targets={options.lora_targets}: {wrong[0]!r} is not one of {known}; all stands alone")
    return Lora(options.lora_rank, options.lora_alpha, options.lora_dropout, targets)


# PEFT's files


def adapter_json(lora: Lora, base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [HUB_MATRICES[name] for name in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def save_adapter(folder: Path, adapters: Params, lora: Lora, base: str) -> None:
    """Writes a folder that peft loads; it appears under its name only when complete. `base` is a Hub id or path."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_tensors(partial / WEIGHTS_FILE, dict(hub_tensors(adapters, np.float32)))
    (partial / CONFIG_FILE).write_text(json.dumps(adapter_json(lora, base), indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


UNSUPPORTED = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "trainable_token_indices": None,
}
"""Settings of PEFT that change the arithmetic -> the only value that is implemented."""


def read_adapter_config(folder: Path) -> tuple[Lora, str]:
    """An adapter folder's settings and its base model, "" if it names none; UsageError for what is not supported."""
    path = folder / CONFIG_FILE
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise UsageError(f"{path}: peft_type {raw.get('peft_type')!r} is not supported; only LORA is")
    for name, only in UNSUPPORTED.items():
        if raw.get(name) not in (None, only):
            raise UsageError(f"{path}: {name}={raw[name]!r} is not supported")
    try:
        rank, alpha, dropout = int(raw["r"]), float(raw["lora_alpha"]), float(raw.get("lora_dropout") or 0)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: r, lora_alpha or lora_dropout is missing or no number") from error
    if not 1 <= rank <= LARGEST_RANK or not math.isfinite(alpha) or not 0 <= dropout < 1:
        raise UsageError(f"{path}: r={rank}, lora_alpha={alpha}, lora_dropout={dropout} cannot be")
    if raw.get("use_rslora"):
        alpha *= rank**0.5  # there, alpha is divided by the root of the rank (arXiv:2312.03732)
    lora = Lora(rank, alpha, dropout, read_targets(path, raw.get("target_modules")))
    return lora, str(raw.get("base_model_name_or_path") or "")


def read_targets(path: Path, modules: Any) -> tuple[str, ...]:
    if modules == "all-linear":
        return tuple(PROJECTIONS)
    known = {module: name for name, module in HUB_MATRICES.items()}
    listed = isinstance(modules, list) and all(isinstance(module, str) for module in modules)
    wrong = [module for module in modules if module not in known] if listed else [modules]
    if wrong:
        raise UsageError(f"{path}: target module {wrong[0]!r} is not supported; there are {', '.join(known)}")
    return tuple(sorted((known[module] for module in modules), key=list(PROJECTIONS).index))


def load_adapter(folder: Path, config: ModelConfig, mesh: Mesh) -> Params:
    """A PEFT folder's float32 adapters on the mesh."""
    return load_tree(folder, adapter_shapes(config), config, mesh, np.float32)
