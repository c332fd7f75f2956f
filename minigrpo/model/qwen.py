"""Qwen3 and Qwen2.5 in Flax NNX: tokens -> hidden states, and hidden states -> logits.

The letters of every einsum and of every parameter's `DIMS` entry are the project's:
B sequences, T query tokens, D embed, F mlp, V vocab, N query heads, K kv heads, H head dim, L layers.
The model receives its attention as an argument and knows nothing of masks, pages or kernels.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Num

from minigrpo.kernels.backend import UNFUSED, FusedProjections
from minigrpo.model.params import (
    DIMS,
    PROJECTIONS,
    Lora,
    ModelConfig,
    Params,
    is_adapter,
    layer_dims,
    leaf_name,
    select,
    shardings_of,
    to_int8,
)
from minigrpo.model.rope import attention_factor, inverse_frequencies
from minigrpo.runtime.mesh import FSDP, TP, by_sequence, data_spec, replicated

MLP = "mlp"
"""Name of the MLP's two inner projections in rematerialisation policies."""

Attend = Callable[..., tuple[Array, Any]]
"""attend(layer, q [B,T,N,H], k [B,T,K,H], v [B,T,K,H], carry) -> (out [B,T,N,H], carry).

The carry is the cache of keys and values while prompts are prefilled and tokens decoded, None in training."""

Angles = tuple[Array, Array]
"""cos and sin [B, T, 1, H/2] of every position's rotary angles."""


def unchanged(x: Any) -> Any:
    """Return x."""
    return x


def look_up(table: Float[Array, "v d"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Embed one device's tokens from a table sharded over both mesh axes, inside shard_map.

    Tokens move to the table, not the table to the tokens: each device looks up all tokens in its own rows and columns,
    `tp` peers add up their rows, and `fsdp` peers exchange columns for sequences.
    """
    everyone = jax.lax.all_gather(jax.lax.all_gather(tokens, TP), FSDP)  # [fsdp, tp, B, T]
    local = everyone - jax.lax.axis_index(TP) * table.shape[0]
    here = (local >= 0) & (local < table.shape[0])
    rows = jnp.where(here[..., None], table[jnp.where(here, local, 0)], 0)
    rows = jax.lax.psum_scatter(rows, TP, scatter_dimension=1)
    return jax.lax.all_to_all(rows, FSDP, split_axis=0, concat_axis=3, tiled=True)[0]


def cast_weights(params: Params, dtype: Any) -> Params:
    """Cast weights to the compute dtype; int8 ones keep theirs."""
    return jax.tree.map(lambda w: w if w.dtype == jnp.int8 else w.astype(dtype), params)


@dataclasses.dataclass(frozen=True)
class ComputeSpec:
    """The dtype of a forward pass, and the mesh it is laid out on (None: inside one device).

    On a mesh, activations are sharded by sequence over every device and each layer's weights are gathered for use: at
    these model sizes that moves fewer bytes than tensor-parallel layers
    (BUILD_NOTES.md#data-parallel-activations-or-tensor-parallel-layers).
    """

    dtype: Any = jnp.float32
    mesh: Mesh | None = None

    def weights(self, layer: Params) -> Params:
        """Cast and gather one layer's stored weights."""
        cast = cast_weights(layer, self.dtype)
        return cast if self.mesh is None else jax.lax.with_sharding_constraint(cast, replicated(self.mesh))

    def activations(self, x: Array) -> Array:
        """Shard activations by sequence."""
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, by_sequence(self.mesh))

    def embed(self, table: Num[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look up tokens in the embedding."""
        if self.mesh is None or self.mesh.size == 1:
            return table.at[tokens].get(mode="promise_in_bounds", wrap_negative_indices=False).astype(self.dtype)
        rows, split = data_spec(self.mesh), PartitionSpec(TP, FSDP)
        run = jax.shard_map(look_up, mesh=self.mesh, in_specs=(split, rows), out_specs=rows, check_vma=False)
        return run(table.astype(self.dtype), tokens)


ONE_DEVICE = ComputeSpec()


@dataclasses.dataclass(frozen=True)
class LayerContext:
    """Everything that a layer is given besides its weights, its input and the carry of `attend`."""

    attend: Attend
    compute: ComputeSpec = ONE_DEVICE
    angles: Angles | None = None
    """Rotary angles of the positions; computed from these if None."""
    dropout: Array | None = None
    """A key per sequence for the dropout of adapters; None is no dropout."""
    fused: FusedProjections = UNFUSED
    """Kernels for T = 1, where weights are neither int8 nor adapted."""
    remat: Callable[[Callable[..., Any]], Callable[..., Any]] = unchanged
    """Wraps the layer, as jax.checkpoint does."""


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """Compute x / rms(x) * scale over the last dim, in float32 (arXiv:1910.07467)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1)) * normed).astype(x.dtype)


def rope_angles(positions: Int[Array, "B T"], config: ModelConfig) -> Angles:
    """Return cos and sin [B, T, 1, H/2] of the rotary angles at `positions`, float32 (arXiv:2104.09864)."""
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    factor = attention_factor(config.rope_scaling)
    return factor * jnp.cos(angles), factor * jnp.sin(angles)


def apply_rope(x: Float[Array, "B T N H"], angles: Angles) -> Float[Array, "B T N H"]:
    """Rotate the two halves of each head by `angles`, computing in float32."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def fold_all(keys: Array, data: int | Array) -> Array:
    """Fold `data` into every key."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def drop_out(x: Float[Array, "B T *D"], keys: Array, rate: float) -> Float[Array, "B T *D"]:
    """Zero a share of each sequence's entries and scale up the others (Srivastava et al. 2014)."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def parameter(config: ModelConfig, name: str) -> nnx.Param[Array]:
    """Declare one layer's parameter."""
    return nnx.Param(jnp.zeros(config.shape(name)[1:], jnp.int8 if config.quantized(name) else jnp.float32))


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
        """Return a parameter's array."""
        return getattr(self, name)[...]

    def project(self, name: str, x: Array, context: LayerContext) -> Array:
        """Apply the matrix `name` to x [B,T,...], scale and adapter included."""
        ins, outs = PROJECTIONS[name]
        dims = layer_dims(name)
        out = jnp.einsum(f"BT{ins},{dims}->BT{outs}", x, self.array(name).astype(x.dtype))
        if self.config.int8:
            out = out * self.array(f"{name}_scale")[None, None]
        if self.config.lora and name in self.config.lora.targets:
            out = out + self.adapt(self.config.lora, name, x, context.dropout)
        return out

    def adapt(self, lora: Lora, name: str, x: Array, dropout: Array | None) -> Array:
        """Compute the adapter's share of the matrix `name`."""
        ins, outs = PROJECTIONS[name]
        if dropout is not None:
            x = drop_out(x, fold_all(dropout, list(PROJECTIONS).index(name)), lora.dropout)
        inner = jnp.einsum(f"BT{ins},{ins}R->BTR", x, self.array(f"{name}_lora_a"))
        return lora.scale * jnp.einsum(f"BTR,R{outs}->BT{outs}", inner, self.array(f"{name}_lora_b"))


class Attention(Projections):
    """Grouped-query attention."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, ("q", "k", "v", "o"))
        if config.qkv_bias:
            self.q_bias, self.k_bias, self.v_bias = (parameter(config, f"{name}_bias") for name in ("q", "k", "v"))
        if config.qk_norm:
            self.q_norm, self.k_norm = parameter(config, "q_norm"), parameter(config, "k_norm")

    def heads(self, x: Array, context: LayerContext) -> tuple[Array, Array, Array]:
        """Project x [B,T,D] to q [B,T,N,H], k [B,T,K,H] and v [B,T,K,H], biased or normed, then rotated."""
        q, k, v = (self.project(name, x, context) for name in ("q", "k", "v"))
        if self.config.qkv_bias:
            q, k, v = q + self.q_bias[None, None], k + self.k_bias[None, None], v + self.v_bias[None, None]
        if self.config.qk_norm:
            q = rms_norm(q, self.q_norm[...], self.config.rms_norm_eps)
            k = rms_norm(k, self.k_norm[...], self.config.rms_norm_eps)
        assert context.angles
        return apply_rope(q, context.angles), apply_rope(k, context.angles), v

    def fused_heads(self, x: Array, context: LayerContext) -> tuple[Array, Array, Array]:
        """Compute `heads` of one token per sequence by the fused kernel."""
        assert context.fused.heads and context.angles
        weights, norms = (tuple(map(self.array, names)) for names in (("q", "k", "v"), ("q_norm", "k_norm")))
        angles = tuple(table[:, 0, 0] for table in context.angles)
        q, k, v = context.fused.heads(x[:, 0], weights, norms, angles, self.config.rms_norm_eps)
        return q[:, None], k[:, None], v[:, None]

    def __call__(self, x: Array, layer: Array, carry: Any, context: LayerContext) -> tuple[Array, Any]:
        """Attend from x [B, T, D] -> output [B, T, D], and the carry as `context.attend` left it."""
        heads = self.fused_heads if context.fused.heads else self.heads
        out, carry = context.attend(layer, *heads(x, context), carry)
        return self.project("o", out, context), carry


class Mlp(Projections):
    """SwiGLU feed-forward (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, ("gate", "up", "down"))

    def __call__(self, x: Float[Array, "B T D"], context: LayerContext) -> Float[Array, "B T D"]:
        """Compute down(silu(gate(x)) * up(x))."""
        if context.fused.gated:
            gated = context.fused.gated(x[:, 0], self.array("gate"), self.array("up"))[:, None]
        else:
            gate, up = (checkpoint_name(self.project(name, x, context), MLP) for name in ("gate", "up"))
            gated = jax.nn.silu(gate) * up
        return self.project("down", gated, context)


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.attn_norm = parameter(config, "attn_norm")
        self.mlp_norm = parameter(config, "mlp_norm")
        self.attention = Attention(config)
        self.mlp = Mlp(config)

    def __call__(self, x: Array, layer: Array, carry: Any, context: LayerContext) -> tuple[Array, Any]:
        """Apply attention and MLP, each normed before and added to x -> x and the carry."""
        normed = rms_norm(x, self.attn_norm[...], self.config.rms_norm_eps)
        out, carry = self.attention(normed, layer, carry, context)
        x = x + out
        return x + self.mlp(rms_norm(x, self.mlp_norm[...], self.config.rms_norm_eps), context), carry


@functools.cache
def abstract_block(config: ModelConfig) -> tuple[nnx.GraphDef[Any], Params]:
    """Return the graph of a block and the shapes of one layer's parameters."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Block(config)))
    return graph, nnx.to_pure_dict(state)


@dataclasses.dataclass(frozen=True)
class Qwen:
    """Decoder-only Qwen3 or Qwen2.5, as functions of its parameters.

    A layer's weights enter its NNX block inside the loop over layers, which is the only place where parameters cross
    into NNX.
    """

    config: ModelConfig

    def __call__(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        context: LayerContext,
        carry: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Return the hidden states after the final norm, and the carry as `context.attend` left it."""
        if context.angles is None:
            angles = rope_angles(positions, self.config)
            context = dataclasses.replace(context, angles=angles)
        x = context.compute.embed(params["embed"], tokens)
        if self.config.int8:
            x = x * params["embed_scale"][tokens][..., None].astype(x.dtype)
        x, carry = self.run_layers(params["layers"], context.compute.activations(x), carry, context)
        return rms_norm(x, params["final_norm"], self.config.rms_norm_eps), carry

    def run_layers(
        self, layers: Params | list[Params], x: Array, carry: Any, context: LayerContext
    ) -> tuple[Array, Any]:
        """Scan over stacked layers, or run a list of them one after the other."""
        graph, _ = abstract_block(self.config)

        def step(state: tuple[Array, Any], scanned: tuple[Array, Params]) -> tuple[tuple[Array, Any], None]:
            (x, carry), (layer, weights) = state, scanned
            block = nnx.merge(graph, context.compute.weights(weights))
            keys = None if context.dropout is None else fold_all(context.dropout, layer)
            x, carry = block(x, layer, carry, dataclasses.replace(context, dropout=keys))
            return (context.compute.activations(x), carry), None

        step, state = context.remat(step), (x, carry)
        if not isinstance(layers, list):
            return jax.lax.scan(step, state, (jnp.arange(self.config.num_hidden_layers), layers))[0]
        for layer, weights in enumerate(layers):
            state, _ = step(state, (jnp.int32(layer), weights))
        return state

    def head(self, params: Params) -> Float[Array, "V D"]:
        """Return the LM head, which is the embedding itself when the two are tied."""
        name = "embed" if self.config.tie_word_embeddings else "head"
        if not self.config.int8:
            return params[name]
        scale = params[f"{name}_scale"]
        return params[name].astype(scale.dtype) * scale[:, None]


def unembed(hidden: Float[Array, "*B D"], head: Float[Array, "V D"]) -> Float[Array, "*B V"]:
    """Compute logits in float32."""
    return jnp.einsum("...D,VD->...V", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """Return the shapes of all parameters, `dtype` but for int8 ones; nothing is allocated."""
    tables = ["embed"] if config.tie_word_embeddings else ["embed", "head"]
    ends = [*tables, *(f"{name}_scale" for name in tables if config.int8), "final_norm"]

    def shape(name: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(config.shape(name), jnp.int8 if config.quantized(name) else dtype)

    layers = jax.tree_util.tree_map_with_path(lambda path, _: shape(leaf_name(path)), abstract_block(config)[1])
    return {name: shape(name) for name in ends} | {"layers": layers}


def init_params(config: ModelConfig, key: Array) -> Params:
    """Draw random float32 weights: norms 1, biases 0, the rest normal(0, 0.02), residual outputs scaled by 1/sqrt(2L).

    Adapters start as PEFT's do: A uniform within 1/sqrt(inputs), B zero.
    """

    def init(path: tuple[Any, ...], leaf: Any) -> Array:
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

    return jax.tree_util.tree_map_with_path(init, abstract_params(config))


def adapter_shapes(config: ModelConfig) -> Params:
    """Return the shapes of the adapters alone."""
    return select(abstract_params(config), is_adapter)


def random_adapters(config: ModelConfig, mesh: Mesh, seed: int) -> Params:
    """Draw fresh float32 adapters, which change nothing yet, on the mesh."""

    def draw_adapters() -> Params:
        return select(init_params(config, jax.random.key(seed)), is_adapter)

    drawn: Params = jax.jit(draw_adapters, out_shardings=shardings_of(mesh, adapter_shapes(config)))()
    return drawn


def quantize(config: ModelConfig, params: Params, mesh: Mesh) -> Params:
    """Round the base's matrices to int8 with scales, laid out on the mesh."""

    def round_to_int8(params: Params) -> Params:
        return to_int8(config, params)

    shardings = shardings_of(mesh, jax.eval_shape(round_to_int8, params))
    rounded: Params = jax.jit(round_to_int8, out_shardings=shardings)(params)
    return rounded
