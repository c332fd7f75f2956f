"""A model's shape, its parameters by name and dims, and which of them are trained."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from minigrpo.model.rope import RopeScaling
from minigrpo.runtime.mesh import spec_of

LARGEST_INT8 = 127

DIMS = {
    "embed": "VD",
    "head": "VD",
    "final_norm": "D",
    "attn_norm": "LD",
    "mlp_norm": "LD",
    "q": "LNDH",
    "k": "LKDH",
    "v": "LKDH",
    "o": "LNHD",
    "q_bias": "LNH",
    "k_bias": "LKH",
    "v_bias": "LKH",
    "q_norm": "LH",
    "k_norm": "LH",
    "gate": "LDF",
    "up": "LDF",
    "down": "LFD",
    "embed_scale": "V",
    "head_scale": "V",
}
"""Parameter name -> its dims, one letter each; R is the rank of an adapter."""

PROJECTIONS = {
    "q": ("D", "NH"),
    "k": ("D", "KH"),
    "v": ("D", "KH"),
    "o": ("NH", "D"),
    "gate": ("D", "F"),
    "up": ("D", "F"),
    "down": ("F", "D"),
}
"""A layer's matrices -> dims of what goes in and of what comes out."""

DIMS |= {f"{name}_lora_a": f"L{dims[0]}R" for name, dims in PROJECTIONS.items()}
DIMS |= {f"{name}_lora_b": f"LR{dims[1]}" for name, dims in PROJECTIONS.items()}
DIMS |= {f"{name}_scale": f"L{dims[1]}" for name, dims in PROJECTIONS.items()}

Params = dict[str, Any]
"""A nested dict of arrays: the ends by name, and "layers", stacked on a leading dim or, for decoding, a list."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters of rank `rank` beside the `targets`: W x + alpha/rank * B A x (arXiv:2106.09685, section 4.1)."""

    rank: int
    alpha: float
    dropout: float
    """Share of A's inputs that training zeroes."""
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Return the factor of B A x."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, as its checkpoint's config.json states it, and the settings that a run adds."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope_scaling: RopeScaling | None = None
    lora: Lora | None = None
    int8: bool = False
    """Matrices are held as int8 with a scale per output."""

    @property
    def qk_norm(self) -> bool:
        """Tell if queries and keys are normed."""
        return self.model_type == "qwen3"

    @property
    def qkv_bias(self) -> bool:
        """Tell if queries, keys and values have biases."""
        return self.model_type == "qwen2"

    @property
    def sizes(self) -> dict[str, int]:
        """Return the size of every dim letter."""
        return {
            "V": self.vocab_size,
            "D": self.hidden_size,
            "F": self.intermediate_size,
            "L": self.num_hidden_layers,
            "N": self.num_attention_heads,
            "K": self.num_key_value_heads,
            "H": self.head_dim,
            "R": self.lora.rank if self.lora else 1,
        }

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter, stacked over layers."""
        return tuple(self.sizes[letter] for letter in DIMS[name])

    @property
    def decoded(self) -> "ModelConfig":
        """Return the model as it is decoded: adapters are merged into their matrices, unless these are int8."""
        return self if self.int8 else dataclasses.replace(self, lora=None)

    def quantized(self, name: str) -> bool:
        """Tell if a parameter is held in int8."""
        return self.int8 and (name in PROJECTIONS or name in ("embed", "head"))


def layer_dims(name: str) -> str:
    """Return the dims of one layer's parameter."""
    return DIMS[name].replace("L", "")


def select(params: Params, keep: Callable[[str], bool]) -> Params:
    """Return the part of a tree whose leaves' own names `keep` accepts."""
    parts = {name: select(value, keep) for name, value in params.items() if isinstance(value, dict)}
    leaves = {name: value for name, value in params.items() if not isinstance(value, dict) and keep(name)}
    return {name: value for name, value in parts.items() if value} | leaves


def join(params: Params, more: Params) -> Params:
    """Merge two parts of a tree."""
    both = {name: join(params[name], more[name]) for name in params.keys() & more.keys()}
    return params | more | both


def is_adapter(name: str) -> bool:
    """Tell an adapter's parameter by its name."""
    return name.endswith(("lora_a", "lora_b"))


def split_trainable(config: ModelConfig, params: Params) -> tuple[Params, Params]:
    """Split into trainable and frozen parameters: adapters and their base, or all weights and {}."""
    if config.lora is None:
        return params, {}
    return select(params, is_adapter), select(params, lambda name: not is_adapter(name))


def leaf_name(path: tuple[Any, ...]) -> str:
    """Return the parameter's own name, its key in DIMS, from a jax tree path."""
    return path[-1].key


def leaf_sharding(mesh: Mesh, path: tuple[Any, ...]) -> NamedSharding:
    """Return the sharding of a leaf of parameters or state: its path's last parameter's, or replicated."""
    name = path[-1].key if path and isinstance(path[-1], jax.tree_util.DictKey) else ""
    return NamedSharding(mesh, spec_of(DIMS.get(name, "")))


def shardings_of(mesh: Mesh, tree: Any) -> Any:
    """Return `leaf_sharding` of every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaf_sharding(mesh, path), tree)


# Adapters and int8


def merge_adapters(config: ModelConfig, params: Params) -> Params:
    """Add every adapter into its matrix; the sum is taken in float32."""
    merged: Params = {}
    for name, value in params.items():
        if isinstance(value, dict):
            merged[name] = merge_adapters(config, value)
        elif config.lora and f"{name}_lora_a" in params:
            ins, outs = PROJECTIONS[name]
            a, b = (params[f"{name}_lora_{side}"].astype(jnp.float32) for side in "ab")
            change = config.lora.scale * jnp.einsum(f"L{ins}R,LR{outs}->{DIMS[name]}", a, b)
            merged[name] = (value + change).astype(value.dtype)
        elif not is_adapter(name):
            merged[name] = value
    return merged


def absmax_int8(name: str, weights: Array) -> tuple[Array, Array]:
    """Round to int8 with a scale per output, by its largest weight (arXiv:2208.07339, section 2.1)."""
    inputs = PROJECTIONS[name][0] if name in PROJECTIONS else "D"
    axes = tuple(DIMS[name].index(letter) for letter in inputs)
    largest = jnp.abs(weights).max(axis=axes, keepdims=True).astype(jnp.float32)
    scale = jnp.where(largest > 0, largest, 1) / LARGEST_INT8
    return jnp.round(weights.astype(jnp.float32) / scale).astype(jnp.int8), jnp.squeeze(scale, axes).astype(
        weights.dtype
    )


def to_int8(config: ModelConfig, params: Params) -> Params:
    """Round the base's matrices to int8."""
    quantized: Params = {}
    for name, value in params.items():
        if isinstance(value, dict):
            quantized[name] = to_int8(config, value)
        elif config.quantized(name):
            quantized[name], quantized[f"{name}_scale"] = absmax_int8(name, value)
        else:
            quantized[name] = value
    return quantized
