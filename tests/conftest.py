"""Eight virtual CPU devices, shape annotations checked, and small models written by transformers as ground truth."""

import os
import pathlib
import re
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
COMPILED = tempfile.TemporaryDirectory(prefix="minigrpo-compiled-")
"""Programs compiled by one test process and, in turn, its commands. The workers share none: jax writes in place."""
os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
if "JAX_PLATFORMS" not in os.environ:  # LLVM would take half of the time; `XLA_FLAGS= pytest` runs users' programs
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from jaxtyping import install_import_hook

install_import_hook("minigrpo", "beartype.beartype")

import jax
import numpy as np
import optax
import pytest

if jax.config.jax_platforms is None:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.devices()  # started here, as a command run in this process would start one device


def promoting(function):
    """Let optax promote dtypes: it mixes counts, which are int32, with floats."""

    def call(*args):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args)

    return call


optax.tree.bias_correction = promoting(optax.tree.bias_correction)
join_schedules = optax.join_schedules
optax.join_schedules = lambda *args: promoting(join_schedules(*args))

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


SLOW = {
    "test_cpu_api",
    "test_cpu_bucket",
    "test_cpu_commands",
    "test_cpu_compiles",
    "test_cpu_fused_projections",
    "test_cpu_grpo",
    "test_cpu_lora",
    "test_cpu_packing",
    "test_cpu_paged_attention",
    "test_cpu_recipes",
    "test_cpu_rollout",
    "test_cpu_sinks",
    "test_cpu_sft",
    "test_cpu_torch_step",
    "test_cpu_tpu",
    "test_cpu_train",
    "test_cpu_transformers",
    "test_cpu_truncated",
}
"""Files whose tests compile device programs; `-m "not slow"` leaves them out."""

LONG = SLOW | {"test_cpu_check", "test_cpu_workers"}
"""Files that run first, so that both processes end together."""


SOAK = {
    "test_cpu_api": "several_runs",
    "test_cpu_bucket": "killed|python_door|bucket_holds|a_part_of|checkpoint_in_a_|generate_ans|a_report_of|damaged",
    "test_cpu_commands": "keep_to_it|groups_without_contrast",
    "test_cpu_compiles": "one device|mesh",
    "test_cpu_faults": "a_short_table",
    "test_cpu_grpo": r"meshes_give.*mesh[13]",
    "test_cpu_packing": r"same_update\[\w+-mesh(0-8|4)",
    "test_cpu_paged_attention": r"small_heads_on_the_cpu.*\[(24|64)-4-2",
    "test_cpu_pods": "",
    "test_cpu_recipes": "a_recipe_trains",
    "test_cpu_report": "a_run_of_any_length",
    "test_cpu_rollout": r"changes_no_completion\[changes[04]",
    "test_cpu_sft": "adapters_are_trained|stopped",
    "test_cpu_tpu": r"largest_batch|small_model\[true|two_slices",
    "test_cpu_train": "another_loss|torn_checkpoint|final_model_evaluates|checkpoints_are_gone|reruns_itself|blew_up",
    "test_cpu_transformers": r"greedy_text_equal.*(True\)-16|False\)-4)",
    "test_cpu_workers": "a_worker_that_ends|a_random_reward|a_reward_that_fails",
}
"""Tests that repeat what others assert, as whole runs or in further cases; `-m soak` runs them alone."""


def pytest_collection_modifyitems(items):
    for item in items:
        soak = item.path.stem in SOAK and re.search(SOAK[item.path.stem], item.name)
        if soak:
            item.add_marker(pytest.mark.soak)
        if soak or item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.stem not in LONG)


def mesh_of(fsdp, tp):
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    return jax.sharding.Mesh(
        np.array(jax.devices()[: fsdp * tp]).reshape(fsdp, tp), ("fsdp", "tp"), axis_types=axis_types
    )


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Each program compiled for the CPU takes hundreds of memory maps; Linux gives a process 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture
def traced_anew():
    """For what is patched inside a kernel: programs traced before would be run again, and these by others later."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def shared():
    if not SHARED.exists():
        pytest.skip(f"needs real data in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def tiny_config():
    """Grouped heads 8/4, a vocabulary with padding rows, sizes that 8,1 and 2,4 divide."""
    from minigrpo.model.params import ModelConfig

    return ModelConfig(
        model_type="qwen3",
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )


@pytest.fixture(scope="session")
def tiny_params(tiny_config):
    """Random weights on the host, larger than at initialisation so that logits differ."""
    from minigrpo.model.qwen import init_params

    params = init_params(tiny_config, jax.random.key(0))
    return jax.tree.map(lambda w: np.asarray(w) if w.ndim < 2 or (w == 1).all() else 8 * np.asarray(w), params)


def place(params, mesh):
    """Parameters laid out on the mesh as training has them."""
    from minigrpo.model.params import DIMS, leaf_name
    from minigrpo.runtime.mesh import spec_of

    def put(path, leaf):
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec_of(DIMS[leaf_name(path)])))

    return jax.tree_util.tree_map_with_path(put, params)


def make_update_spec(config, mesh, optimizer=None, remat="full", loss=None, temperature=0.9, num_tokens=250, **more):
    """Scoring and updating of a small model; plain SGD unless told otherwise."""
    import functools

    import optax

    from minigrpo.config import LossOptions
    from minigrpo.grpo import losses
    from minigrpo.grpo.logprobs import LMHead
    from minigrpo.grpo.update import UpdateSpec
    from minigrpo.kernels.backend import backend_for
    from minigrpo.model.qwen import ComputeSpec, Qwen

    loss, backend = loss or LossOptions(), backend_for(jax.devices()[0])
    return UpdateSpec(
        model=Qwen(config),
        head=LMHead(mesh, num_tokens, temperature, backend.head_tiles),
        compute=ComputeSpec(jax.numpy.dtype("float32"), mesh),
        causal_attention=backend.causal_attention,
        optimizer=optimizer or optax.sgd(1.0),
        schedule=optax.constant_schedule(1.0),
        objective=functools.partial(losses.policy_loss, loss),
        token_weights=functools.partial(losses.token_weights, loss.loss_type, max_tokens=16),
        remat=remat,
        **more,
    )


def make_generator(
    config, options, mesh=(1, 1), stops=(5, 9), prompt_tokens=32, num_tokens=250, dtype="float32", **more
):
    """A generator of a small model."""
    import dataclasses

    from minigrpo.kernels.backend import backend_for
    from minigrpo.rollout.generator import Generator, rollout_spec

    backend = backend_for(jax.devices()[0])
    spec = rollout_spec(config, mesh_of(*mesh), backend, dtype, options, prompt_tokens, num_tokens, stops)
    return Generator(dataclasses.replace(spec, **more))


def forward(config, params, tokens, mesh=(1, 1), **more):
    """Logits [B, T, V] of whole sequences."""
    import jax.numpy as jnp

    from minigrpo.kernels.backend import backend_for
    from minigrpo.model.attention import attend_on
    from minigrpo.model.qwen import ComputeSpec, LayerContext, Qwen, unembed

    device_mesh, params = mesh_of(*mesh), jax.tree.map(jnp.asarray, params)
    attend = attend_on(device_mesh, backend_for(jax.devices()[0]).causal_attention)
    compute = more.pop("compute", ComputeSpec(jnp.dtype("float32"), device_mesh))
    context = LayerContext(attend, compute, **more)
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = Qwen(config)(params, tokens, positions, context)
    return unembed(hidden, Qwen(config).head(params))
