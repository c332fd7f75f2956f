"""Sources that --model may name: a Hub id, a model folder, an adapter, a run folder, or one of a run's checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from minigrpo.config import DataOptions, LoraOptions, RolloutOptions, RunOptions, UsageError, read_json
from minigrpo.model.lora import CONFIG_FILE, load_adapter, make_lora, read_adapter_config
from minigrpo.model.params import Lora, ModelConfig, Params, is_adapter, leaf_sharding, select
from minigrpo.model.qwen import abstract_params
from minigrpo.model.weights import find_checkpoint, load_params
from minigrpo.remote import is_url, local_copy


@dataclasses.dataclass(frozen=True)
class Source:
    """Places of a model's parts."""

    base: str
    """Hub id or path of the model itself."""
    folder: Path
    """That model's folder: config, tokenizer and weights."""
    lora: Lora | None = None
    """The adapters it comes with."""
    adapter: Path | None = None
    """Folder of those adapters in PEFT's format."""
    adapter_step: Path | None = None
    """Or a run's checkpoint that holds them."""
    base_step: Path | None = None
    """A run's checkpoint that holds the base's weights, instead of the folder."""

    @property
    def tokenizer_folder(self) -> Path:
        """Return the folder of the tokenizer: the adapter's, if it brings one, or the model's."""
        return self.adapter if self.adapter and (self.adapter / "tokenizer.json").is_file() else self.folder


def find_source(name: str, base_model: str = "auto", given: str = "") -> Source:
    """Resolve --model, and --base_model where it names an adapter; UsageError naming what is missing.

    Errors begin with `given`, or else with --model and the name.
    """
    folder = local_copy("model", name)
    adapted = (folder / CONFIG_FILE).is_file()
    if adapted:
        lora, written = read_adapter_config(folder)
        base = find_base(folder, written, base_model)
        return dataclasses.replace(base, lora=lora, adapter=folder)
    if folder.parent.name == "checkpoints" and (folder.parent.parent / "flags.txt").is_file():
        return find_step(folder, base_model)
    if base_model != "auto":
        raise UsageError(f"--base_model={base_model}: --model={name} is no folder of adapters; leave --base_model out")
    if (folder / "flags.txt").is_file():
        return find_run(folder)
    return Source(name, find_checkpoint(str(folder) if is_url(name) else name, given))


def find_base(adapter: Path, written: str, base_model: str) -> Source:
    """Return the model under adapters: --base_model, or the one that they were trained on."""
    if base_model == "auto" and not written:
        raise UsageError(f"--model={adapter}: its {CONFIG_FILE} names no base_model_name_or_path; pass --base_model")
    base = written if base_model == "auto" else base_model
    cure = f"--model={adapter}: its base {base!r:.200} cannot be had; pass --base_model=FOLDER. It is"
    given = cure if base_model == "auto" else f"--base_model={base_model}"
    source = None if (local_copy("base_model", base) / CONFIG_FILE).is_file() else find_source(base, given=given)
    if source is None or source.lora:
        raise UsageError(f"--model={adapter}: its base {base} has adapters itself; merge them, or pass --base_model")
    return source


INHERITED = (
    "system_prompt", "prompt_column", "answer_column", "enable_thinking", "max_prompt_length", "max_completion_length",
    "page_size", "stop", "eval_dataset", "dataset",
)  # fmt: skip
ASKING = (DataOptions, RolloutOptions, RunOptions)


def run_of(folder: Path) -> Path | None:
    """Return the run that a folder is, or whose final/, adapter/ or checkpoint it is."""
    places = {"final": folder.parent, "adapter": folder.parent}
    places |= {folder.name: folder.parent.parent} if folder.parent.name == "checkpoints" else {}
    run = places.get(folder.name, folder)
    return run if folder.is_dir() and (run / "flags.txt").is_file() else None


def run_defaults(name: str) -> dict[str, Any]:
    """Return the settings with which the run of --model asked its questions; {} for a model without a run.

    A file that was trained on is no dataset to be evaluated on.
    """
    run = run_of(local_copy("model", name))
    settings = read_json(run / "config.json") if run else {}
    kinds = {field.name: type(field.default) for section in ASKING for field in dataclasses.fields(section)}
    values = {field: settings[field] for field in INHERITED if isinstance(settings.get(field), kinds[field])}
    trained_on, named = values.pop("dataset", "auto"), values.pop("eval_dataset", "auto")
    if named != "auto" or not Path(trained_on).suffix:
        values["dataset"] = trained_on if named == "auto" else named
    return values


def find_run(folder: Path) -> Source:
    """Return a finished run's model; UsageError for one that has none yet."""
    final = folder / "final"
    if not final.is_dir():
        raise UsageError(f"--model={folder}: that run has no final model yet; name one of {folder}/checkpoints")
    return Source(str(final), final)


def find_step(folder: Path, base_model: str) -> Source:
    """Return a run's checkpoint, with the model that the run began from under its adapters."""
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in folder.parent.glob("*"))) or "none"
        raise UsageError(f"--model={folder}: no such checkpoint; there are {there}")
    settings = read_json(folder.parent.parent / "config.json")
    own = {field.name: settings.get(field.name, field.default) for field in dataclasses.fields(LoraOptions)}
    began = str(settings.get("model")) if base_model == "auto" else base_model
    recorded = str(settings.get("base_model", "auto")) if base_model == "auto" else "auto"
    cure = f"--model={folder}: the model {began!r:.200} that its run began from cannot be had; pass --base_model. It is"
    base = find_source(began, recorded, given=cure if base_model == "auto" else f"--base_model={base_model}")
    lora = make_lora(LoraOptions(**own)) or base.lora
    if lora is None:
        return dataclasses.replace(base, base=str(folder), base_step=folder)
    return dataclasses.replace(base, lora=lora, adapter=None, adapter_step=folder)


def placed(mesh: Mesh, shapes: Any) -> Any:
    """Return shapes of parameters or state, laid out as training keeps them."""

    def place(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf_sharding(mesh, path))

    return jax.tree_util.tree_map_with_path(place, shapes)


def read_step(step: Path, shapes: Any) -> Any:
    """Read the weights of a run's checkpoint; only here is orbax imported, which takes 0.2 s and 24 MB."""
    from minigrpo.runtime.checkpoint import read_params

    return read_params(step, shapes)


def load_base(source: Source, config: ModelConfig, mesh: Mesh, dtype: Any) -> Params:
    """Load the weights in the model's own files, or in the checkpoint of a run that trained them."""
    plain = dataclasses.replace(config, lora=None, int8=False)
    if source.base_step:
        weights: Params = read_step(source.base_step, placed(mesh, abstract_params(plain, dtype)))
        return weights
    return load_params(source.folder, plain, mesh, dtype)


def load_adapters(source: Source, config: ModelConfig, mesh: Mesh) -> Params:
    """Load the float32 adapters that a source comes with; {} for none."""
    if not source.lora:
        return {}
    if source.adapter_step:
        adapters: Params = read_step(source.adapter_step, placed(mesh, select(abstract_params(config), is_adapter)))
        return adapters
    assert source.adapter
    return load_adapter(source.adapter, config, mesh)
