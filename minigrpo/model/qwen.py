"""Qwen3 and Qwen2.5 in Flax NNX: tokens -> hidden states, and hidden states -> logits.

The letters of every einsum and of every parameter's `DIMS` entry are the project's:
B sequences, T query tokens, D embed, F mlp, V vocab, N query heads, K kv heads, H head dim, L layers.
The model receives its attention as an argument and knows nothing of masks, pages or kernels.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from minigrpo.config import UsageError
from minigrpo.runtime.mesh import ONE_DEVICE, Layout, in_order, spec_of

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

MLP = "mlp"
"""The name of the MLP's two inner products for rematerialisation policies."""

for matrix, (ins, outs) in PROJECTIONS.items():
    DIMS |= {f"{matrix}_lora_a": f"L{ins}R", f"{matrix}_lora_b": f"LR{outs}", f"{matrix}_scale": f"L{outs}"}

Params = dict[str, Any]
"""A nested dict of arrays, the pure form of the model's NNX state."""


@dataclasses.dataclass(frozen=True)
class Fused:
    """What computes one token of each sequence in place of products, or of these and what follows; None if nothing."""

    gated: Callable[..., Array] | None = None
    """gated(x [B,D], gate, up) -> silu(x gate) * (x up) [B,F]."""
    heads: Callable[..., tuple[Array, Array, Array]] | None = None
    """heads(x [B,D], (q, k, v), (q_norm, k_norm), (cos, sin) [B,H/2], eps) -> rotated q, k, and v [B,heads,H]."""
    product: Callable[[str, Array, Array], Array] | None = None
    """product(name, x [B,1,...], weights) -> what `product` gives, for the matrices that the kernels above leave."""


UNFUSED = Fused()

Attend = Callable[..., tuple[Array, Any]]
"""attend(layer, q [B,T,N,H], k [B,T,K,H], v [B,T,K,H], carry) -> (out [B,T,N,H], carry)."""

Angles = tuple[Array, Array]
"""cos and sin [B, T, 1, H/2] of every position's rotary angles."""

EachLayer = Callable[[Callable, Any, Any], tuple[Any, Any]]
"""each_layer(step, carry, (indices [L], stacked weights)) -> (carry, None), as jax.lax.scan."""


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
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, as its checkpoint's config.json states it, and what a run adds to it."""

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
    lora: Lora | None = None
    int8: bool = False
    """Matrices are held as int8 with a scale per output."""

    @property
    def qk_norm(self) -> bool:
        return self.model_type == "qwen3"

    @property
    def qkv_bias(self) -> bool:
        return self.model_type == "qwen2"

    @property
    def sizes(self) -> dict[str, int]:
        """Dim letter -> size."""
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
        return tuple(self.sizes[letter] for letter in DIMS[name])

    def quantized(self, name: str) -> bool:
        return self.int8 and (name in PROJECTIONS or name in ("embed", "head"))


ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def read_config(path: str | Path) -> ModelConfig:
    """Reads a Hugging Face config.json; raises UsageError naming the file and the offending field."""
    try:
        raw = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not a readable config.json ({error})") from error
    return parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], source: str) -> ModelConfig:
    """Turns the fields of a config.json into a ModelConfig; `source` names the file in errors."""
    if not isinstance(raw, dict):
        raise UsageError(f"{source}: not a model's config.json, which is a JSON object")
    kind = raw.get("model_type")
    if kind not in ARCHITECTURES:
        raise UsageError(f"{source}: model_type {kind!r} is not supported; use a qwen3 or qwen2 (Qwen2.5) checkpoint")
    refuse_variants(raw, source)
    rope = raw.get("rope_parameters") or {}
    try:
        config = ModelConfig(
            model_type=kind,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=raw["num_attention_heads"],
            num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            rope_theta=float(raw["rope_theta"] if "rope_theta" in raw else rope["rope_theta"]),
            rms_norm_eps=float(raw["rms_norm_eps"]),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            max_position_embeddings=raw.get("max_position_embeddings", 32768),
        )
    except KeyError as error:
        raise UsageError(f"{source}: field {error} is missing; it is needed for a {kind} model") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(f"{source}: a field has a value of the wrong kind ({error})") from error
    for letter, size in config.sizes.items():
        if not isinstance(size, int) or size < 1:
            raise UsageError(f"{source}: the size {letter} is {size!r}; it must be a whole number of at least 1")
    if config.num_attention_heads % config.num_key_value_heads:
        raise UsageError(
            f"{source}: num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    return config


def refuse_variants(raw: dict[str, Any], source: str) -> None:
    """Raises UsageError for config.json settings that would change the arithmetic and are not implemented."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise UsageError(f"{source}: rope type {rope_type!r} is not supported; only 'default' is")
    if raw.get("use_sliding_window"):
        raise UsageError(f"{source}: use_sliding_window=true is not supported; only full attention is")
    if raw.get("hidden_act", "silu") != "silu":
        raise UsageError(f"{source}: hidden_act {raw['hidden_act']!r} is not supported; only 'silu' is")
    if raw.get("model_type") == "qwen3" and raw.get("attention_bias"):
        raise UsageError(f"{source}: attention_bias=true is not supported for qwen3")


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """x / rms(x) * scale over the last dim, in float32 (arXiv:1910.07467)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (scale.astype(jnp.float32) * normed).astype(x.dtype)


def rope_angles(positions: Int[Array, "B T"], head_dim: int, theta: float) -> Angles:
    """cos and sin [B, T, 1, H/2] of the rotary angles at `positions`, float32 (arXiv:2104.09864)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Float[Array, "B T N H"], angles: Angles) -> Float[Array, "B T N H"]:
    """Rotates the two halves of each head by `angles`; in x's dtype, products in float32."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def parameter(config: ModelConfig, name: str) -> nnx.Param:
    return nnx.Param(jnp.zeros(config.shape(name), jnp.int8 if config.quantized(name) else jnp.float32))


def layer_dims(name: str) -> str:
    """Dims of one layer's parameter."""
    return DIMS[name].replace("L", "")


class Projections(nnx.Module):
    """Some of a layer's matrices, with scales where they are int8 and adapters where LoRA trains them."""

    def __init__(self, config: ModelConfig, names: tuple[str, ...]):
        self.config = config
        for name in names:
            setattr(self, name, parameter(config, name))
            if config.int8:
                setattr(self, f"{name}_scale", parameter(config, f"{name}_scale"))
            if config.lora and name in config.lora.targets:
                setattr(self, f"{name}_lora_a", parameter(config, f"{name}_lora_a"))
                setattr(self, f"{name}_lora_b", parameter(config, f"{name}_lora_b"))

    def array(self, name: str) -> Array:
        return getattr(self, name)[...]

    def project(self, name: str, x: Array, dropout: Array | None, fused: Fused) -> Array:
        """The matrix `name` applied to x [B,T,...], scale and adapter included; `dropout` holds a key per sequence."""
        out = (fused.product or product)(name, x, self.array(name).astype(x.dtype))
        if self.config.int8:
            out = out * self.array(f"{name}_scale")
        if self.config.lora and name in self.config.lora.targets:
            out = out + self.adapt(self.config.lora, name, x, dropout)
        return out

    def adapt(self, lora: Lora, name: str, x: Array, dropout: Array | None) -> Array:
        """What the adapter of the matrix `name` adds."""
        ins, outs = PROJECTIONS[name]
        if dropout is not None:
            x = drop_out(x, fold_all(dropout, list(PROJECTIONS).index(name)), lora.dropout)
        inner = jnp.einsum(f"BT{ins},{ins}R->BTR", x, self.array(f"{name}_lora_a"))
        return lora.scale * jnp.einsum(f"BTR,R{outs}->BT{outs}", inner, self.array(f"{name}_lora_b"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(name: str, x: Array, weights: Array) -> Array:
    """The matrix `name` applied to x [B,T,...].

    Sums run in the order of x's dims; an einsum would take them by their letters, for `o` across what is stored. The
    weights' gradient has the narrower of x and the cotangent as first operand, which XLA on the CPU lays out anew.
    """
    ins, _ = PROJECTIONS[name]
    summed = [2 + place for place in range(len(ins))], [layer_dims(name).index(dim) for dim in ins]
    return jnp.tensordot(x, weights, summed)


def product_forward(name, x, weights):
    return product(name, x, weights), (x, weights)


def product_backward(name, saved, cotangent):
    (x, weights), (ins, outs), dims = saved, PROJECTIONS[name], layer_dims(name)
    x_grad = jnp.einsum(f"BT{outs},{dims}->BT{ins}", cotangent, weights)
    if x.size > cotangent.size:
        return x_grad, in_order(jnp.einsum(f"BT{outs},BT{ins}->{outs}{ins}", cotangent, x), f"{outs}{ins}", dims)
    return x_grad, jnp.einsum(f"BT{ins},BT{outs}->{dims}", x, cotangent)


product.defvjp(product_forward, product_backward)


def fold_all(keys: Array, data: int | Array) -> Array:
    """Every key with `data` folded in."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def drop_out(x: Float[Array, "B T *D"], keys: Array, rate: float) -> Float[Array, "B T *D"]:
    """Zeroes a share of each sequence's entries and scales up the others (Srivastava et al. 2014)."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


class Attention(Projections):
    """Grouped-query attention of all layers (stacked on L), or of one once a layer is taken out."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, ("q", "k", "v", "o"))
        if config.qkv_bias:
            self.q_bias, self.k_bias, self.v_bias = (parameter(config, f"{name}_bias") for name in ("q", "k", "v"))
        if config.qk_norm:
            self.q_norm, self.k_norm = parameter(config, "q_norm"), parameter(config, "k_norm")

    def heads(self, x: Array, dropout: Array | None, fused: Fused) -> tuple[Array, Array, Array]:
        """x [B,T,D] -> q [B,T,N,H], k [B,T,K,H], v [B,T,K,H] with bias or norm, before rope."""
        q, k, v = (self.project(name, x, dropout, fused) for name in ("q", "k", "v"))
        if self.config.qkv_bias:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        if self.config.qk_norm:
            q = rms_norm(q, self.q_norm[...], self.config.rms_norm_eps)
            k = rms_norm(k, self.k_norm[...], self.config.rms_norm_eps)
        return q, k, v

    def rotated_heads(
        self, x: Array, angles: Angles, dropout: Array | None, fused: Fused
    ) -> tuple[Array, Array, Array]:
        """As `heads`, after rope."""
        q, k, v = self.heads(x, dropout, fused)
        return apply_rope(q, angles), apply_rope(k, angles), v

    def fused_heads(self, run: Callable, x: Array, angles: Angles) -> tuple[Array, Array, Array]:
        """The same by a kernel, of one token a sequence."""
        weights, norms = (tuple(map(self.array, names)) for names in (("q", "k", "v"), ("q_norm", "k_norm")))
        of_rows = tuple(table[:, 0, 0] for table in angles)
        q, k, v = run(x[:, 0], weights, norms, of_rows, self.config.rms_norm_eps)
        return q[:, None], k[:, None], v[:, None]

    def __call__(
        self, x: Array, angles: Angles, layer: Array, attend: Attend, carry: Any, dropout: Array | None, fused: Fused
    ):
        if fused.heads:
            q, k, v = self.fused_heads(fused.heads, x, angles)
        else:
            q, k, v = self.rotated_heads(x, angles, dropout, fused)
        out, carry = attend(layer, q, k, v, carry)
        return self.project("o", out, dropout, fused), carry


def silu(x: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """x * sigmoid(x), by tanh: one transcendental, which XLA on the CPU handles twice as fast as 1 / (1 + exp(-x))."""
    return x * (0.5 + 0.5 * jnp.tanh(0.5 * x))


class Mlp(Projections):
    """SwiGLU feed-forward (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, ("gate", "up", "down"))

    def __call__(self, x: Float[Array, "B T D"], dropout: Array | None, fused: Fused) -> Float[Array, "B T D"]:
        if fused.gated:
            gated = fused.gated(x[:, 0], self.array("gate"), self.array("up"))[:, None]
        else:
            gate, up = (checkpoint_name(self.project(name, x, dropout, fused), MLP) for name in ("gate", "up"))
            gated = silu(gate) * up
        return self.project("down", gated, dropout, fused)


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.attn_norm = parameter(config, "attn_norm")
        self.mlp_norm = parameter(config, "mlp_norm")
        self.attention = Attention(config)
        self.mlp = Mlp(config)

    def __call__(
        self, x: Array, angles: Angles, layer: Array, attend: Attend, carry: Any, dropout: Array | None, fused: Fused
    ):
        normed = rms_norm(x, self.attn_norm[...], self.config.rms_norm_eps)
        out, carry = self.attention(normed, angles, layer, attend, carry, dropout, fused)
        x = x + out
        return x + self.mlp(rms_norm(x, self.mlp_norm[...], self.config.rms_norm_eps), dropout, fused), carry


def unchanged(x):
    return x


class Qwen(nnx.Module):
    """Decoder-only Qwen3 or Qwen2.5; its layers are stacked on a leading dim and scanned."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.embed = parameter(config, "embed")
        self.layers = Block(config)
        self.final_norm = parameter(config, "final_norm")
        if not config.tie_word_embeddings:
            self.head = parameter(config, "head")
        if config.int8:
            self.embed_scale = parameter(config, "embed_scale")
        if config.int8 and not config.tie_word_embeddings:
            self.head_scale = parameter(config, "head_scale")

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Attend,
        carry: Any = None,
        layout: Layout = ONE_DEVICE,
        remat: Callable[[Callable], Callable] = unchanged,
        each_layer: EachLayer = jax.lax.scan,
        dropout: Array | None = None,
        angles: Angles | None = None,
        fused: Fused = UNFUSED,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Hidden states after the final norm, and what `attend` made of `carry`.

        `layout` says in which dtype and where on the mesh to compute; `remat` wraps the scanned layer, as
        jax.checkpoint does, and `each_layer` runs it over the layers, as jax.lax.scan does. `dropout` holds a key per
        sequence for the adapters' dropout, None being no dropout. `angles` are those of the positions, if known.
        `fused` is what kernels do where T is 1 and weights are neither int8 nor adapted.
        """
        angles = angles or rope_angles(positions, self.config.head_dim, self.config.rope_theta)
        graph, stacked = nnx.split(self.layers)

        def layer(state, scanned):
            (x, carry), (index, weights) = state, scanned
            block = nnx.merge(graph, layout.weights(weights))
            keys = None if dropout is None else fold_all(dropout, index)
            x, carry = block(x, angles, index, attend, carry, keys, fused)
            return (layout.activations(x), carry), None

        x = layout.embed(self.embed[...], tokens)
        if self.config.int8:
            x = x * self.embed_scale[...][tokens][..., None].astype(x.dtype)
        x = layout.activations(x)
        indices = jnp.arange(self.config.num_hidden_layers)
        (x, carry), _ = each_layer(remat(layer), (x, carry), (indices, nnx.to_pure_dict(stacked)))
        return rms_norm(x, self.final_norm[...], self.config.rms_norm_eps), carry

    def head_weights(self) -> Float[Array, "V D"]:
        """The output head, which is the embedding itself when the two are tied."""
        name = "embed" if self.config.tie_word_embeddings else "head"
        weights = getattr(self, name)[...]
        if not self.config.int8:
            return weights
        scale = getattr(self, f"{name}_scale")[...]
        return weights.astype(scale.dtype) * scale[:, None]


def unembed(hidden: Float[Array, "*B D"], head: Float[Array, "V D"]) -> Float[Array, "*B V"]:
    """Logits in float32."""
    return jnp.einsum("...D,VD->...V", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> tuple[nnx.GraphDef, Params]:
    """The model's graph and the shapes of its parameters, `dtype` but for int8 ones; nothing is allocated."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Qwen(config)))

    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype if x.dtype == jnp.int8 else dtype)

    return graph, jax.tree.map(shape, nnx.to_pure_dict(state))


def select(params: Params, keep: Callable[[str], bool]) -> Params:
    """The part of a tree whose leaves' own names `keep` accepts."""
    parts = {name: select(value, keep) for name, value in params.items() if isinstance(value, dict)}
    leaves = {name: value for name, value in params.items() if not isinstance(value, dict) and keep(name)}
    return {name: value for name, value in parts.items() if value} | leaves


def join(params: Params, more: Params) -> Params:
    """Two parts of a tree as one."""
    both = {name: join(params[name], more[name]) for name in params.keys() & more.keys()}
    return params | more | both


def is_adapter(name: str) -> bool:
    return name.endswith(("lora_a", "lora_b"))


def split_trained(config: ModelConfig, params: Params) -> tuple[Params, Params]:
    """What training changes, and what it does not: adapters and their base, or all weights and nothing."""
    if config.lora is None:
        return params, {}
    return select(params, is_adapter), select(params, lambda name: not is_adapter(name))


def leaf_name(path: tuple) -> str:
    """The parameter's own name, its key in DIMS, from a jax tree path."""
    return path[-1].key


def leaf_sharding(mesh: Mesh, path: tuple) -> NamedSharding:
    """Where a leaf of parameters or state lives: as the parameter that its path ends in, or else on every device."""
    name = path[-1].key if path and isinstance(path[-1], jax.tree_util.DictKey) else ""
    return NamedSharding(mesh, spec_of(DIMS.get(name, "")))


def shardings_of(mesh: Mesh, tree: Any) -> Any:
    """`leaf_sharding` of every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaf_sharding(mesh, path), tree)


def init_params(config: ModelConfig, key: Array) -> Params:
    """Random float32 weights: norms 1, biases 0, the rest normal(0, 0.02), residual outputs scaled by 1/sqrt(2L).

    Adapters start as PEFT's do: A uniform within 1/sqrt(inputs), B zero.
    """

    def init(path, leaf):
        name = leaf_name(path)
        if name.endswith("norm"):
            return jnp.ones(leaf.shape)
        if name.endswith(("bias", "lora_b")):
            return jnp.zeros(leaf.shape)
        if name.endswith("lora_a"):
            bound = 1 / math.sqrt(math.prod(leaf.shape[1:-1]))
            own = jax.random.fold_in(key, list(DIMS).index(name))
            return jax.random.uniform(own, leaf.shape, minval=-bound, maxval=bound)
        scale = 0.02 / math.sqrt(2 * config.num_hidden_layers) if name in ("o", "down") else 0.02
        return scale * jax.random.normal(jax.random.fold_in(key, list(DIMS).index(name)), leaf.shape)

    return jax.tree_util.tree_map_with_path(init, abstract_params(config)[1])
