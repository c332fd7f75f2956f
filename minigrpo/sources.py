"""What --model may name: a Hub id, a model folder, an adapter, a run folder, or one of a run's checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from minigrpo.checkpoint import read_params
from minigrpo.config import LoraOptions, UsageError
from minigrpo.lora import CONFIG_FILE, load_adapter, make_lora, read_adapter_config
from minigrpo.model import Lora, ModelConfig, Params, abstract_params, is_adapter, leaf_sharding, select
from minigrpo.tokenizer import read_json
from minigrpo.weights import find_checkpoint, load_params


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model's parts are."""

    base: str
    """Hub id or path of the model itself."""
    folder: Path
    """That model's folder: config, tokenizer and weights."""
    lora: Lora | None = None
    """The adapters it comes with."""
    adapter: Path | None = None
    """Folder of those adapters in PEFT's format."""
    step: Path | None = None
    """A run's checkpoint to take the trained parameters from."""


def find_source(name: str) -> Source:
    """Resolves --model; UsageError naming what is missing."""
    folder = Path(name)
    if (folder / CONFIG_FILE).is_file():
        lora, base = read_adapter_config(folder)
        return Source(base, find_checkpoint(base), lora, adapter=folder)
    if (folder / "flags.txt").is_file():
        return find_run(folder)
    if folder.parent.name == "checkpoints" and (folder.parent.parent / "flags.txt").is_file():
        return find_step(folder)
    return Source(name, find_checkpoint(name))


INHERITED = (
    "system_prompt", "prompt_column", "answer_column", "enable_thinking", "max_prompt_length", "max_completion_length",
    "page_size", "eval_dataset", "dataset",
)  # fmt: skip


def run_defaults(name: str) -> dict[str, Any]:
    """How the run that --model belongs to asked its questions; {} for a model of no run.

    A file that was trained on is no dataset to be evaluated on.
    """
    folder = Path(name)
    run = next((path for path in (folder, *list(folder.parents)[:2]) if (path / "flags.txt").is_file()), None)
    if run is None:
        return {}
    settings = read_json(run / "config.json")
    values = {field: settings[field] for field in INHERITED if field in settings}
    trained_on, named = values.pop("dataset", "auto"), values.pop("eval_dataset", "auto")
    if named != "auto" or not Path(trained_on).suffix:
        values["dataset"] = trained_on if named == "auto" else named
    return values


def find_run(folder: Path) -> Source:
    """A finished run's model."""
    final = folder / "final"
    if not final.is_dir():
        raise UsageError(f"--model={folder}: that run has no final model yet; name one of {folder}/checkpoints")
    return Source(str(final), final)


def find_step(folder: Path) -> Source:
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in folder.parent.glob("*"))) or "none"
        raise UsageError(f"--model={folder}: no such checkpoint; there are {there}")
    settings = read_json(folder.parent.parent / "config.json")
    own = {field.name: settings[field.name] for field in dataclasses.fields(LoraOptions)}
    base = find_source(settings["model"])
    return dataclasses.replace(base, lora=make_lora(LoraOptions(**own)) or base.lora, adapter=None, step=folder)


def placed(mesh: Mesh, shapes: Any) -> Any:
    """Shapes of parameters or state, laid out as training keeps them."""

    def place(path, leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf_sharding(mesh, path))

    return jax.tree_util.tree_map_with_path(place, shapes)


def load_base(source: Source, config: ModelConfig, mesh: Mesh, dtype: Any) -> Params:
    """The weights that stand in the model's own files, or in the checkpoint of a run that trained them."""
    plain = dataclasses.replace(config, lora=None, int8=False)
    if source.step and not source.lora:
        return read_params(source.step, placed(mesh, abstract_params(plain, dtype)[1]))
    return load_params(source.folder, plain, mesh, dtype)


def load_adapters(source: Source, config: ModelConfig, mesh: Mesh) -> Params:
    """The float32 adapters that a source comes with; {} for none."""
    if not source.lora:
        return {}
    if source.step:
        return read_params(source.step, placed(mesh, select(abstract_params(config)[1], is_adapter)))
    assert source.adapter
    return load_adapter(source.adapter, config, mesh)
