"""AdamW with warmup and clipping, and the state that training carries from step to step."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from minigrpo.config import OptimizerOptions
from minigrpo.model.params import Params, layer_dims, leaf_name, shardings_of
from minigrpo.runtime.mesh import DEVICE_MEMORY, HOST_MEMORY, move


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State that an update reads and replaces. Parameters and moments are float32."""

    params: Params
    opt_state: Any
    updates: Any  # int32 scalar
    """Updates applied; the learning rate is a function of it."""
    reference: Any = None
    """The reference of the KL penalty where --sync_ref_steps moves it; otherwise None."""


def learning_rate(options: OptimizerOptions, total: int, per_step: int = 1) -> optax.Schedule:
    """Return the schedule over `total` updates: the first update already moves, and the last still does.

    `per_step` updates make a step, which --warmup_steps counts.
    """
    peak, warmup = options.learning_rate, options.warmup_updates(total, per_step)
    after = {
        "warmup_cosine": optax.cosine_decay_schedule(peak, max(1, total - warmup)),
        "warmup_linear": optax.linear_schedule(peak, 0.0, max(1, total - warmup)),
        "constant": optax.constant_schedule(peak),
    }[options.lr_schedule]
    rising = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rising, after], [warmup])


def decayed(params: Params) -> Params:
    """Mark the parameters that weight decay applies to: matrices, not norms or biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(leaf_name(path)), params)


def is_matrix(name: str) -> bool:
    """Tell a matrix by its name."""
    return len(layer_dims(name)) > 1 and not name.endswith("bias")


def make_optimizer(options: OptimizerOptions, total: int, per_step: int = 1) -> optax.GradientTransformation:
    """Return clipping by global norm, then AdamW (arXiv:1711.05101)."""
    adamw = optax.adamw(
        learning_rate(options, total, per_step),
        b1=options.adam_b1,
        b2=options.adam_b2,
        weight_decay=options.weight_decay,
        mask=decayed,
    )
    return optax.chain(optax.clip_by_global_norm(options.max_grad_norm), adamw)


def like_params(mesh: Mesh, tree: Any) -> Any:
    """Lay out a tree of the parameters' shapes on the mesh as these are, inside jit."""
    return jax.lax.with_sharding_constraint(tree, shardings_of(mesh, tree))


def move_moments(state: TrainState, memory_kind: str) -> TrainState:
    """Move the moments of matrices to another memory of their devices, and delete those of `state`.

    Counters and the moments of norms and biases stay, as they take next to no memory.
    """

    def moved(path: tuple[Any, ...], x: Array) -> Array:
        named = isinstance(path[-1], jax.tree_util.DictKey)
        return move(x, memory_kind) if named and is_matrix(leaf_name(path)) else x

    opt_state = jax.block_until_ready(jax.tree_util.tree_map_with_path(moved, state.opt_state))
    for old, new in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(opt_state), strict=True):
        if old is not new:
            old.delete()
    return dataclasses.replace(state, opt_state=opt_state)


def offload(state: TrainState) -> TrainState:
    """Move the moments to the host's memory."""
    return move_moments(state, HOST_MEMORY)


def reload(state: TrainState) -> TrainState:
    """Move the moments back to the devices' own memory."""
    return move_moments(state, DEVICE_MEMORY)


def init_state(
    optimizer: optax.GradientTransformation,
    params: Params,
    mesh: Mesh,
    reference: Params | None = None,
    *,
    offloaded: bool = False,
) -> TrainState:
    """Return a fresh state; the moments are laid out on the mesh like the parameters, counters are replicated.

    Offloaded moments are in the host's memory.
    """

    def start(params: Params) -> tuple[Any, Array]:
        return optimizer.init(params), jnp.int32(0)

    shardings = shardings_of(mesh, jax.eval_shape(start, params))
    opt_state, updates = jax.jit(start, out_shardings=shardings)(params)
    state = TrainState(params, opt_state, updates, reference)
    return offload(state) if offloaded else state


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def apply_gradients(
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    loss: Float[Array, ""],
    grads: Params,
) -> tuple[TrainState, dict[str, Array]]:
    """Apply one update -> new state and its metrics. A non-finite loss or gradient changes nothing, and is counted."""
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    steps, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updated = TrainState(optax.apply_updates(state.params, steps), opt_state, state.updates + 1, state.reference)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    rate = jnp.asarray(schedule(state.updates), jnp.float32)
    return kept, {"grad_norm": norm, "learning_rate": rate, "skipped_updates": 1 - finite.astype(jnp.int32)}
