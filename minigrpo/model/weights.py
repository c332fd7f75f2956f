"""Safetensors <-> sharded parameters by one table, strict both ways; checkpoint folders and Hub ids."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minigrpo.config import UsageError
from minigrpo.data.json_file import read_object
from minigrpo.model.hub_config import ARCHITECTURES
from minigrpo.model.params import (
    DIMS,
    PROJECTIONS,
    ModelConfig,
    Params,
    layer_dims,
    leaf_name,
    leaf_sharding,
    shardings_of,
)
from minigrpo.model.qwen import abstract_params, init_params
from minigrpo.runtime.files import disk_error
from minigrpo.runtime.mesh import collect
from minigrpo.runtime.workers import WORKERS

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
)
"""What an exported model, and a folder of adapters, keep of the checkpoint they came from."""

INDEX_FILE = "model.safetensors.index.json"
NUMBERS = ("F64", "F32", "F16", "BF16")
"""Kinds of numbers that weights are read from, as safetensors calls them."""
LEFTOVER = re.compile(r"rotary_emb\.inv_freq$")
"""Tensors that older versions of transformers wrote and newer ones ignore."""
FAULTS_NAMED = 8
"""Faults of a checkpoint that an error names; the others are counted."""

BUILTIN = {"builtin:tiny": Path(__file__).parent.parent / "builtin"}
SHARD_BYTES = 1 << 29
"""Largest safetensors file written."""

HUB_NAMES = {
    "embed": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "final_norm": "model.norm.weight",
    "attn_norm": "model.layers.{}.input_layernorm.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
}
"""Parameter name -> its tensor's name in a Hugging Face checkpoint, {} being the layer."""

for matrix in PROJECTIONS:
    hub_matrix = "base_model.model." + HUB_NAMES[matrix].removesuffix(".weight")
    HUB_NAMES |= {f"{matrix}_lora_{side.lower()}": f"{hub_matrix}.lora_{side}.weight" for side in "AB"}

MATRIX_DIMS = {
    "embed": ("V", "D"),
    "head": ("V", "D"),
    "q": ("NH", "D"),
    "k": ("KH", "D"),
    "v": ("KH", "D"),
    "o": ("D", "NH"),
    "gate": ("F", "D"),
    "up": ("F", "D"),
    "down": ("D", "F"),
}
"""Dims of a Hub matrix [out, in], each side's dims being flattened; every other tensor is a vector."""

for matrix, (ins, outs) in PROJECTIONS.items():
    MATRIX_DIMS |= {f"{matrix}_lora_a": ("R", ins), f"{matrix}_lora_b": (outs, "R")}


def hub_dims(name: str) -> tuple[str, ...]:
    """Return our dims of one layer's parameter as the checkpoint arranges them, one string per dim of its tensor."""
    return MATRIX_DIMS.get(name, (layer_dims(name),))


# Finding a checkpoint


def find_checkpoint(name: str, given: str = "") -> Path:
    """Return the local folder of a built-in, local or Hub model, downloaded into the Hub cache if need be.

    UsageError that begins with `given`, or else with --model and the name.
    """
    given = given or f"--model={name}"
    if name.startswith("builtin:"):
        if name not in BUILTIN:
            raise UsageError(f"{given}: no such built-in model; there is {', '.join(BUILTIN)}")
        return BUILTIN[name]
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UsageError(f"{given}: neither a folder here nor a Hub id of the form OWNER/NAME")
    return download(name, given)


def download(name: str, given: str) -> Path:
    """Return the folder of a Hub model in the Hub cache; UsageError that begins with `given`."""
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja"]))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UsageError(f"{given}: no such model on the Hub, or HF_TOKEN may not read it") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UsageError(f"{given}: not in the Hub cache, and the Hub cannot be reached; pass a folder") from error


# Reading


class Checkpoint:
    """The tensors of a folder's safetensors files, opened once and read by slice.

    model.safetensors.index.json says which files count, where there is one; without it all of them do.
    """

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        self.folder = folder
        self.handles: dict[Path, Any] = {}
        index = read_index(folder)
        paths = sorted({folder / file for file in index.values()}) or sorted(folder.glob("*.safetensors"))
        if not paths:
            raise UsageError(f"{folder}: no .safetensors file; --init=random starts without weights")
        files: dict[str, list[Path]] = {name: [] for name in index}
        for path in paths:
            self.handles[path] = stack.enter_context(open_tensors(path))
            for name in self.handles[path].keys():
                files.setdefault(name, []).append(path)
        self.files = {
            name: self.counted(name, found, index) for name, found in files.items() if not LEFTOVER.search(name)
        }

    def counted(self, name: str, found: list[Path], index: dict[str, str]) -> list[Path]:
        """Return the files that a tensor is to be read from: the one that the index names, or all that hold it."""
        return [path for path in found if path.name == index[name]] if name in index else found

    def slice_of(self, name: str) -> Any:
        """Return a tensor of the checkpoint as a slice that is read lazily."""
        return self.handles[self.files[name][0]].get_slice(name)


def open_tensors(path: Path) -> Any:
    """Open a safetensors file; UsageError naming one that is missing or torn."""
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError as error:
        raise UsageError(f"{path}: not there, though {INDEX_FILE} names it; copy it, or mend the index") from error
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: not a complete safetensors file ({error})") from error


def read_index(folder: Path) -> dict[str, str]:
    """Return tensor -> file as model.safetensors.index.json has it, {} without one; UsageError for nonsense in it."""
    path = folder / INDEX_FILE
    if not path.exists():
        return {}
    index = read_object(path).get("weight_map")
    files = index.values() if isinstance(index, dict) else [None]
    wrong = [file for file in files if not isinstance(file, str) or Path(file).name != file or not file]
    if wrong or not index:
        raise UsageError(f"{path}: weight_map must give every tensor the name of a file beside it; it is {index!r:.80}")
    assert isinstance(index, dict)
    return index


def expected_tensors(shapes: Params, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return every tensor name that a checkpoint of these parameters must hold, with its shape."""
    tensors = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(shapes):
        name = leaf_name(path)
        layers = range(config.num_hidden_layers) if "L" in DIMS[name] else [0]
        for layer in layers:
            tensors[HUB_NAMES[name].format(layer)] = hub_shape(name, config)
    return tensors


def hub_shape(name: str, config: ModelConfig) -> tuple[int, ...]:
    """Return the shape in the checkpoint of one layer's parameter."""
    return tuple(math.prod(config.sizes[letter] for letter in side) for side in hub_dims(name))


def check_tensors(checkpoint: Checkpoint, shapes: Params, config: ModelConfig) -> None:
    """Raise a UsageError naming missing, unexpected, duplicate, misshapen and quantized tensors, and their number."""
    expected = expected_tensors(shapes, config)
    found = checkpoint.files
    tied = {HUB_NAMES["head"]} if config.tie_word_embeddings else set()
    faults = [f"missing {name}" for name in expected if not found.get(name)]
    faults += [f"unexpected {name}" for name in found if name not in expected and name not in tied]
    for name in found:
        faults += tensor_faults(checkpoint, name, expected.get(name))
    if faults:
        more = f"; and {len(faults) - FAULTS_NAMED} more" if len(faults) > FAULTS_NAMED else ""
        named = "; ".join(faults[:FAULTS_NAMED])
        raise UsageError(
            f"{checkpoint.folder}: {len(faults)} fault{'s' * (len(faults) > 1)} in its tensors: {named}{more}"
        )


def tensor_faults(checkpoint: Checkpoint, name: str, shape: tuple[int, ...] | None) -> Iterator[str]:
    """Yield the faults of one tensor, of a `shape` if it is expected at all."""
    paths = checkpoint.files[name]
    if len(paths) > 1:
        yield f"{name} is in both {' and '.join(path.name for path in paths)}"
    if shape is None or not paths:
        return
    tensor = checkpoint.slice_of(name)
    if tuple(tensor.get_shape()) != shape:
        yield f"{name} has shape {list(tensor.get_shape())}, not {list(shape)}"
    if tensor.get_dtype() not in NUMBERS:
        yield f"{name} holds {tensor.get_dtype()}, not {', '.join(NUMBERS)} (is the checkpoint quantized?)"


def read_part(
    checkpoint: Checkpoint, config: ModelConfig, name: str, index: tuple[slice, ...], dtype: Any
) -> np.ndarray:
    """Read the part `index` of one of our parameters, from the matching slice of each tensor alone.

    UsageError naming a tensor that holds NaN or infinite numbers.
    """
    shape = config.shape(name)
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]

    def read(layer: int, bounds: list[tuple[int, int]]) -> np.ndarray:
        tensor = HUB_NAMES[name].format(layer)
        part = read_layer(checkpoint.slice_of(tensor), name, config, bounds)
        if not np.isfinite(part).all():
            raise UsageError(f"{checkpoint.files[tensor][0]}: {tensor} holds NaN or infinite weights; copy it anew")
        return part

    if "L" not in DIMS[name]:
        return read(0, bounds).astype(dtype)
    out = np.empty([end - start for start, end in bounds], dtype)
    for row, layer in enumerate(range(*bounds[0])):
        out[row] = read(layer, bounds[1:])
    return out


def read_layer(tensor: Any, name: str, config: ModelConfig, bounds: list[tuple[int, int]]) -> np.ndarray:
    """Read one layer's part: the flattened rows and columns that cover it, with our dims in our order."""
    dims = layer_dims(name)
    of_dim = dict(zip(dims, bounds, strict=True))
    part: np.ndarray = tensor[tuple(slice(*flat_bounds(side, config, of_dim)) for side in hub_dims(name))]
    letters = "".join(hub_dims(name))
    sizes = [of_dim[letter][1] - of_dim[letter][0] for letter in letters]
    return part.reshape(sizes).transpose([letters.index(letter) for letter in dims])


def flat_bounds(side: str, config: ModelConfig, of_dim: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Return start and end in the flattened dims of a part that is whole in all dims but the first."""
    inner = math.prod(config.sizes[letter] for letter in side[1:])
    start, end = of_dim[side[0]]
    return start * inner, end * inner


def load_params(folder: Path, config: ModelConfig, mesh: Mesh, dtype: Any = np.float32) -> Params:
    """Load the folder's weights as parameters laid out on the mesh; each device reads only its own slice."""
    return load_tree(folder, abstract_params(config), config, mesh, dtype)


def load_tree(folder: Path, shapes: Params, config: ModelConfig, mesh: Mesh, dtype: Any) -> Params:
    """Load the parameters that `shapes` holds from a folder that holds these and no others."""
    with contextlib.ExitStack() as stack:
        checkpoint = Checkpoint(folder, stack)
        check_tensors(checkpoint, shapes, config)

        def load(path: tuple[Any, ...], leaf: Any) -> jax.Array:
            name = leaf_name(path)

            def read(index: Any) -> np.ndarray:
                return read_part(checkpoint, config, name, index, dtype)

            return jax.make_array_from_callback(leaf.shape, leaf_sharding(mesh, path), read)

        loaded: Params = jax.tree_util.tree_map_with_path(load, shapes)
        return loaded


def random_params(config: ModelConfig, mesh: Mesh, seed: int, dtype: Any = np.float32) -> Params:
    """Make random weights on the mesh, in place."""
    shapes = abstract_params(config)
    shardings = shardings_of(mesh, shapes)

    def draw_weights() -> Params:
        drawn: Params = init_params(config, jax.random.key(seed))
        same: Params = jax.tree.map(lambda w: w.astype(dtype), drawn)  # the same numbers whatever the dtype
        return same

    made: Params = jax.jit(draw_weights, out_shardings=shardings)()
    return made


# Writing


def hub_tensors(params: Params, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and value of every tensor of the checkpoint, one at a time on worker 0's host; none on the others."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = leaf_name(path)
        dims, sides = layer_dims(name), hub_dims(name)
        order = [dims.index(letter) for letter in "".join(sides)]
        for layer in range(leaf.shape[0]) if "L" in DIMS[name] else [None]:
            value = collect((leaf if layer is None else leaf[layer]).astype(dtype))  # cast first: half as much to move
            if value is None:
                continue
            sizes = dict(zip(dims, value.shape, strict=True))
            shape = [math.prod(sizes[letter] for letter in side) for side in sides]
            value = value.transpose(order).reshape(shape)
            yield HUB_NAMES[name].format(layer), np.ascontiguousarray(value)


def take_part(params: Params, dtype: Any) -> None:
    """Give worker 0, which writes, this process's parts of every tensor."""
    for _ in hub_tensors(params, dtype):
        continue


def config_json(config: ModelConfig, stop_tokens: tuple[int, ...], dtype: Any) -> dict[str, Any]:
    """Return the config.json that transformers, vLLM and SGLang read."""
    own = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("lora", "int8")}
    scaling = own.pop("rope_scaling", None)
    if scaling:
        named = {name: value for name, value in scaling.items() if value is not None}
        own["rope_scaling"] = {"rope_type": "yarn", **named}
    return own | {
        "architectures": [ARCHITECTURES[config.model_type]],
        "attention_bias": config.qkv_bias,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "torch_dtype": np.dtype(dtype).name,
        "use_sliding_window": False,
        "eos_token_id": stop_tokens[0] if len(stop_tokens) == 1 else list(stop_tokens),
    }


def shards(params: Params, dtype: Any) -> Iterator[dict[str, np.ndarray]]:
    """Yield the checkpoint's tensors in groups of at most SHARD_BYTES."""
    group: dict[str, np.ndarray] = {}
    for name, value in hub_tensors(params, dtype):
        if group and sum(v.nbytes for v in group.values()) + value.nbytes > SHARD_BYTES:
            yield group
            group = {}
        group[name] = value
    yield group


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file that everyone may read; UsageError naming it when it cannot be written."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    except (SafetensorError, OSError) as error:
        raise disk_error(path, error, sum(array.nbytes for array in tensors.values())) from error


def export(
    folder: Path,
    source: Path,
    params: Params,
    config: ModelConfig,
    stop_tokens: tuple[int, ...],
    dtype: Any = ml_dtypes.bfloat16,
    chat_template: str | None = None,
) -> None:
    """Write a Hub-format model folder; it appears under its name only when complete. Of several workers, the first.

    `source` is the folder whose tokenizer files go along; `chat_template` is the text of another template.
    """
    if not WORKERS.writes:
        return take_part(params, dtype)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    index: dict[str, str] = {}
    size = 0
    for number, group in enumerate(shards(params, dtype), 1):
        file = f"model-{number:05d}.safetensors"
        write_tensors(partial / file, group)
        index |= dict.fromkeys(group, file)
        size += sum(value.nbytes for value in group.values())
        group.clear()  # before the next one is collected
    name_files(partial, index, size)
    (partial / "config.json").write_text(json.dumps(config_json(config, stop_tokens, dtype), indent=2) + "\n")
    copy_tokenizer(source, partial, chat_template)
    write_ends(partial / "generation_config.json", stop_tokens)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def write_ends(path: Path, stop_tokens: tuple[int, ...]) -> None:
    """Name every end token in a generation_config.json, which other programs stop by before config.json."""
    settings = read_object(path, {}) | {"eos_token_id": list(stop_tokens)}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def copy_tokenizer(source: Path, folder: Path, chat_template: str | None) -> None:
    """Copy the tokenizer's files, and write a chat template that a run was given by --chat_template."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8", newline="")


def name_files(folder: Path, index: dict[str, str], size: int) -> None:
    """Give the numbered files, of `size` bytes, their Hub names: model.safetensors, or model-i-of-n with an index."""
    files = sorted(set(index.values()))
    if len(files) == 1:
        (folder / files[0]).rename(folder / "model.safetensors")
        return
    names = {file: file.replace(".safetensors", f"-of-{len(files):05d}.safetensors") for file in files}
    for file, name in names.items():
        (folder / file).rename(folder / name)
    weight_map = {tensor: names[file] for tensor, file in index.items()}
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2)
    (folder / INDEX_FILE).write_text(text + "\n")
