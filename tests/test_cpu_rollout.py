"""Rollouts: independence of every scheduling choice, agreement with the trainer, stop tokens, small pools."""

import dataclasses
import functools
import mmap
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, mesh_of

from minigrpo.build import Programs
from minigrpo.config import LossOptions, RolloutOptions, UsageError, parse_flags
from minigrpo.grpo import losses
from minigrpo.grpo import update as grpo
from minigrpo.grpo.logprobs import Head
from minigrpo.model.attention import attend_on, causal_attention
from minigrpo.model.qwen import PROJECTIONS, Fused, abstract_params, product, silu, unembed
from minigrpo.rollout import generator as rollout_module
from minigrpo.rollout.generator import (
    CACHED_BYTES,
    LEAST_BATCH,
    WIDE_VECTORS,
    Roller,
    batch_sizes,
    shared_by_host,
    spread,
)
from minigrpo.runtime import mesh as sharding
from minigrpo.runtime.mesh import Layout, by_sequence, put, replicated

REAL = 250
STOPS = (5, 9)
OPTIONS = RolloutOptions(max_completion_length=24, temperature=1.0, page_size=8, slots=16)


def some_prompts(count=6):
    rng = np.random.default_rng(0)
    lengths = [1, 7, 8, 9, 17, 30, 16, 2][:count]
    return [rng.integers(10, REAL, length).tolist() for length in lengths]


def make_roller(config, options=OPTIONS, mesh=(1, 1), stops=STOPS, **more):
    return Roller(config, mesh_of(*mesh), jnp.dtype("float32"), options, REAL, stops, **more)


def roll(
    config, params, options=OPTIONS, mesh=(1, 1), prompts=None, ids=None, group=4, stops=STOPS, seed=(7, 0), **more
):
    prompts = some_prompts() if prompts is None else prompts
    ids = list(range(len(prompts))) if ids is None else ids
    roller = make_roller(config, options, mesh, stops, **more)
    return roller(jax.tree.map(jnp.asarray, params), prompts, ids, group, seed)


@pytest.fixture(scope="module")
def plain(tiny_config, tiny_params):
    return roll(tiny_config, tiny_params)


def assert_same(got, want):
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "mesh"),
    [
        ({"slots": 4}, (1, 1)),
        ({"slots": 64}, (1, 1)),
        ({"slots": 1}, (1, 1)),
        ({"page_size": 16}, (1, 1)),
        ({"page_size": 64}, (1, 1)),
        ({"pool_pages": 28}, (1, 1)),
        ({"pool_pages": 36, "slots": 3}, (1, 1)),
        ({}, (4, 1)),
        ({}, (4, 2)),
        ({"slots": 2, "page_size": 4}, (2, 1)),
    ],
)
def test_scheduling_changes_no_completion(tiny_config, tiny_params, plain, changes, mesh):
    assert_same(roll(tiny_config, tiny_params, dataclasses.replace(OPTIONS, **changes), mesh), plain)


def test_scheduling_changes_no_truncated_completion(tiny_config, tiny_params):
    options = dataclasses.replace(OPTIONS, top_k=20, top_p=0.9)
    want = roll(tiny_config, tiny_params, options)
    for changes, mesh in (({"slots": 3, "page_size": 16}, (1, 1)), ({"slots": 64}, (4, 1))):
        assert_same(roll(tiny_config, tiny_params, dataclasses.replace(options, **changes), mesh), want)


def test_the_batch_around_a_prompt_changes_nothing(tiny_config, tiny_params, plain):
    """A prompt keeps its completions alone, in another order, and in a larger group."""
    prompts = some_prompts()
    alone = roll(tiny_config, tiny_params, prompts=[prompts[4], prompts[1]], ids=[4, 1])
    np.testing.assert_array_equal(alone.tokens[:4], plain.tokens[16:20])
    np.testing.assert_array_equal(alone.tokens[4:], plain.tokens[4:8])
    larger = roll(tiny_config, tiny_params, group=8)
    np.testing.assert_array_equal(larger.tokens[8:12], plain.tokens[4:8])


def test_seed_and_step_change_completions(tiny_config, tiny_params, plain):
    for seed in ((8, 0), (7, 1)):
        assert (roll(tiny_config, tiny_params, seed=seed).tokens != plain.tokens).any()
    assert len({tuple(row) for row in plain.tokens}) > 20


def test_completions_end_at_stop_tokens(plain):
    assert plain.stopped.any() and not plain.stopped.all()
    for tokens, length, stopped in zip(plain.tokens, plain.lengths, plain.stopped, strict=True):
        ends = np.isin(tokens[:length], STOPS)
        assert not ends[:-1].any() and ends[-1] == stopped
        assert length == OPTIONS.max_completion_length or stopped
        assert (tokens[length:] == 0).all() and (tokens < REAL).all()


def test_small_pools_are_busier_not_wrong(tiny_config, tiny_params, plain):
    small = roll(tiny_config, tiny_params, dataclasses.replace(OPTIONS, pool_pages=28))
    assert_same(small, plain)
    assert small.decode_steps > plain.decode_steps


def steps_by_the_rules(prompts, lengths, group, options):
    """Decoding steps until completions of these lengths are done, one completion and page at a time."""
    size, slots = options.page_size, min(options.slots, len(lengths))
    cached = [len(prompts[index // group]) - 1 for index in range(len(lengths))]
    free = options.pool_pages - sum(-(-(len(prompt) - 1) // size) for prompt in prompts)
    left, running, steps = set(range(len(lengths))), {}, 0  # running: completion -> its tokens in the cache

    def own(index, tokens):
        return -(-tokens // size) - cached[index] // size

    while left:
        slots = min(n for n in batch_sizes(slots, 4) if n >= min(len(left), slots))
        while len(running) < slots and left - running.keys() and (free > len(running) or not running):
            index = min(left - running.keys())
            running[index] = cached[index]
            free -= own(index, cached[index])
        while sum(tokens % size == 0 for tokens in running.values()) > free:
            index = max(running)
            free += own(index, running.pop(index))
        for index in running:
            free -= running[index] % size == 0
            running[index] += 1
        steps += 1
        for index in [index for index in running if running[index] == cached[index] + lengths[index]]:
            free += own(index, running.pop(index))
            left.remove(index)
    return steps


@pytest.mark.parametrize(
    "changes",
    [
        {"page_size": 2, "pool_pages": 104, "slots": 64},
        {"page_size": 2, "pool_pages": 110, "slots": 64},
        {"page_size": 4, "pool_pages": 60, "slots": 7},
        {"pool_pages": 28},
        {"pool_pages": 200, "slots": 5},
    ],
)
def test_slots_and_pages_are_handed_on_at_once(tiny_config, tiny_params, changes):
    options = dataclasses.replace(OPTIONS, **changes)
    rollout = roll(tiny_config, tiny_params, options)
    assert rollout.decode_steps == steps_by_the_rules(some_prompts(), rollout.lengths.tolist(), 4, options)


def test_the_kernels_of_a_device_get_every_token(tiny_config, tiny_params, plain, monkeypatch, traced_anew):
    seen = []

    def gated(x, gate, up):
        seen.append(x.shape)
        return silu(x @ gate) * (x @ up)

    monkeypatch.setattr(rollout_module, "fused", lambda device, model, dtype, rows: Fused(gated=gated))
    assert_same(roll(tiny_config, tiny_params), plain)
    assert set(seen) == {(16, 32), (4, 32)}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_product_by_parts_is_the_product(tiny_config, name):
    """Of all kinds of matrices; some of their outputs 8 parts divide, others not."""
    config = dataclasses.replace(tiny_config, hidden_size=36, num_attention_heads=6, num_key_value_heads=3, head_dim=2)
    sizes = [config.sizes[dim] for dim in PROJECTIONS[name][0]]
    x = jax.random.normal(jax.random.key(0), (5, 1, *sizes))
    weights = jax.random.normal(jax.random.key(1), config.shape(name)[1:])
    got = rollout_module.product_by_parts(name, x, weights)
    np.testing.assert_allclose(got, product(name, x, weights), rtol=1e-5, atol=1e-5)


def test_a_pool_too_small_for_one_completion_is_refused(tiny_config, tiny_params):
    with pytest.raises(UsageError, match=r"--pool_pages=5: at least 28 pages of 8 tokens"):
        roll(tiny_config, tiny_params, dataclasses.replace(OPTIONS, pool_pages=5))


def test_a_group_has_its_prompt_prefilled_and_held_once(tiny_config, tiny_params, monkeypatch):
    """64 prompts x 8: the layers see every prompt once, and a pool of one copy of each serves all eight."""
    prefilled = []

    def counting(platform, q, k, v):
        jax.debug.callback(lambda _: prefilled.append(q.shape[0]), q[0, 0, 0, 0])
        return causal_attention(platform, q, k, v)

    monkeypatch.setattr(rollout_module, "causal_attention", counting)
    prompts = np.random.default_rng(0).integers(10, REAL, (64, 33)).tolist()
    once, own = 64 * 5, 2  # pages of 8: five for a prompt of 33, up to two for 8 tokens more
    options = dataclasses.replace(OPTIONS, max_completion_length=8, pool_pages=once + 4 * own, temperature=0.0)
    rollout = roll(tiny_config, tiny_params, options, prompts=prompts, group=8)
    jax.effects_barrier()
    assert sum(prefilled) == 64 * tiny_config.num_hidden_layers
    assert len(rollout.tokens) == 512
    eight = rollout.tokens.reshape(64, 8, -1)
    assert (eight == eight[:, :1]).all() and len({tuple(row) for row in eight[:, 0]}) > 32


@pytest.mark.parametrize("mesh", [(1, 1), (4, 2)])
def test_rollout_logprobs_equal_the_trainers(tiny_config, tiny_params, mesh):
    """The sampler decodes through paged attention; the trainer scores whole sequences. They agree to 1e-4."""
    options = dataclasses.replace(OPTIONS, temperature=0.8)
    rollout = roll(tiny_config, tiny_params, options, mesh)
    prompts = [prompt for prompt in some_prompts() for _ in range(4)]
    device_mesh = mesh_of(*mesh)
    batch = grpo.assemble(prompts, rollout.tokens, rollout.lengths, (32, 24))
    trainer = grpo.Trainer(
        graph=abstract_params(tiny_config)[0],
        head=Head(device_mesh, REAL, 0.8),
        layout=Layout(jnp.dtype("float32"), device_mesh),
        remat="full",
        optimizer=optax.sgd(1.0),
        objective=functools.partial(grpo.policy_loss, LossOptions()),
        weigh=losses.weights_grpo,
        parts=1,
    )
    device_batch = put(device_mesh, grpo.pad_rows(batch, device_mesh.size), by_sequence(device_mesh))
    scored = grpo.batch_logprobs(trainer, jax.tree.map(jnp.asarray, tiny_params), device_batch)
    width = batch.completions.shape[1]
    mask = np.arange(width) < rollout.lengths[:, None]
    difference = np.abs(np.asarray(scored)[: len(prompts)] - rollout.logprobs[:, :width])[mask]
    assert difference.max() < 1e-4 and mask.sum() > 100


def test_greedy_equals_repeated_full_forward(tiny_config, tiny_params):
    """Decoding token by token picks what recomputing the whole sequence would."""
    from flax import nnx

    options = dataclasses.replace(OPTIONS, temperature=0.0)
    rollout = roll(tiny_config, tiny_params, options, group=2, stops=(263,))
    model = nnx.merge(abstract_params(tiny_config)[0], jax.tree.map(jnp.asarray, tiny_params))
    for row, prompt in enumerate(some_prompts()):
        np.testing.assert_array_equal(rollout.tokens[2 * row], rollout.tokens[2 * row + 1])
        sequence = jnp.array([prompt + rollout.tokens[2 * row].tolist()])
        positions = jnp.arange(sequence.shape[1])[None]
        hidden, _ = model(sequence, positions, attend_on(mesh_of(1, 1)))
        best = np.asarray(unembed(hidden, model.head_weights())[0, :, :REAL].argmax(axis=-1))
        np.testing.assert_array_equal(best[len(prompt) - 1 : -1], rollout.tokens[2 * row])


@pytest.mark.parametrize(
    ("tracing", "compiling", "events"),
    [
        (-1.0, -1.0, ["trim", "compile", "trim", "huge", "run"]),
        (-1.0, 60.0, ["trim", "compile", "huge", "run"]),
        (60.0, -1.0, ["compile", "trim", "huge", "run"]),
        (60.0, 60.0, ["compile", "run"]),
    ],
)
def test_memory_is_given_back_around_compiling_and_had_again_in_huge_pages(tracing, compiling, events, monkeypatch):
    seen = []
    library = types.SimpleNamespace(malloc_trim=lambda pad: seen.append("trim"))
    monkeypatch.setattr(sharding, "LONG_TRACE", tracing)
    monkeypatch.setattr(sharding, "LONG_COMPILE", compiling)
    monkeypatch.setattr(sharding, "take_huge_pages", lambda size: seen.append("huge"))
    monkeypatch.setattr(sharding.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(sharding.sys, "platform", "linux")

    class Program:
        def lower(self, x):
            return types.SimpleNamespace(compile=lambda: seen.append("compile"))

        def __call__(self, x):
            seen.append("run")
            return 2 * x

    assert sharding.launch(Program(), 3.0) == 6.0
    assert seen == events


def test_a_program_is_compiled_once():
    traced = []
    double = jax.jit(lambda x: traced.append(x) or 2 * x)
    assert [float(sharding.launch(double, x)) for x in (1.0, 3.0)] == [2.0, 6.0]
    assert len(traced) == 1


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages to ask for")
@pytest.mark.parametrize("block", [0, 40960, 40976, 45055])
def test_huge_pages_are_asked_for_inside_the_block_only(block, monkeypatch):
    advised, freed = [], []
    library = types.SimpleNamespace(
        malloc=lambda size: block,
        madvise=lambda at, size, advice: advised.append((at.value, size.value)),
        free=lambda at: freed.append(at.value),
    )
    monkeypatch.setattr(sharding.ctypes, "CDLL", lambda name: library)
    sharding.take_huge_pages(1 << 20)
    assert freed == [block] * bool(block) and len(advised) == bool(block)
    for at, size in advised:
        left = block + (1 << 20) - (at + size)
        assert at % mmap.PAGESIZE == 0 and at >= block and 0 <= left < 2 * mmap.PAGESIZE


def test_the_compiler_is_told_what_it_knows_and_no_flag_says(monkeypatch, capsys):
    """When the first line fails, XLA has lost the option: find out what widens vectors now."""
    assert sharding.known_options(WIDE_VECTORS) == WIDE_VECTORS
    assert sharding.known_options({"xla_cpu_no_such_option": 1} | WIDE_VECTORS) == WIDE_VECTORS
    assert capsys.readouterr().err.startswith("xla_cpu_no_such_option: ")
    with pytest.raises(jax.errors.JaxRuntimeError, match="not a valid"):
        sharding.known_options(dict.fromkeys(WIDE_VECTORS, "wide"))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=128")
    assert sharding.known_options(WIDE_VECTORS) == {}


def test_rollouts_are_compiled_with_these_options(tiny_config, tiny_params, monkeypatch):
    monkeypatch.setattr(rollout_module, "known_options", lambda options: {"xla_cpu_no_such_option": 1})
    monkeypatch.setattr(rollout_module, "rollout_program", rollout_module.rollout_program.__wrapped__)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_cpu_no_such_option"):
        roll(tiny_config, tiny_params)


FAULTS = """
import ctypes, resource
from minigrpo.runtime import mesh as sharding
sharding.keep_freed_memory()
library, size = ctypes.CDLL(None), 1 << 28
library.prctl(41, 1, 0, 0, 0)  # no huge pages, which systems hand out or do not
library.malloc.restype = ctypes.c_void_p
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(library.malloc(ctypes.c_size_t(size)))
    ctypes.memset(block, 1, size)
    library.free(block)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sharding.of_c_library("mallopt"), reason="keeps memory by the GNU C library's malloc")
def test_memory_once_freed_is_had_again_without_asking_the_system():
    result = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True)
    first, second = map(int, result.stdout.split())
    assert first > 3000 and second < 500, result.stderr  # pages


HUGE_PAGES = """
import ctypes, pathlib
from minigrpo.runtime import mesh as sharding
sharding.keep_freed_memory()
sharding.take_huge_pages(sharding.HUGE_PAGES)
library, size = ctypes.CDLL(None), sharding.HUGE_PAGES * 3 // 4
library.malloc.restype = ctypes.c_void_p
at, inside = library.malloc(ctypes.c_size_t(size)) + size // 2, False
for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
    first = line.split()[0]
    if "-" in first:
        begin, end = (int(bound, 16) for bound in first.split("-"))
        inside = begin <= at < end
    elif first == "VmFlags:" and inside:
        print("hg" in line.split())
"""


@pytest.mark.skipif(
    not pathlib.Path("/sys/kernel/mm/transparent_hugepage").exists() or not sharding.of_c_library("malloc_trim"),
    reason="this system has no huge pages, or not the GNU C library's malloc",
)
def test_what_malloc_takes_next_may_come_in_huge_pages():
    result = subprocess.run([sys.executable, "-c", HUGE_PAGES], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == ["True"], result.stderr


def test_small_models_are_decoded_on_a_device_per_core(tiny_config, tiny_params, plain, monkeypatch):
    used = []
    real = rollout_module.worker_mesh
    monkeypatch.setattr(rollout_module, "worker_mesh", lambda *args: used.append(real(*args)) or used[-1])
    got = roll(tiny_config, tiny_params, spread_cpu=True)
    assert_same(got, plain)
    assert [mesh.size for mesh in used] == [6] and got.decode_steps < plain.decode_steps  # of 24 completions, 4 each
    each = got.lengths.reshape(6, 4)
    assert got.occupancy == pytest.approx(each.sum() / (4 * each.max(axis=1).sum()))
    roll(tiny_config, tiny_params)
    roll(tiny_config, tiny_params, dataclasses.replace(OPTIONS, pool_pages=28), spread_cpu=True)
    assert len(used) == 1


@pytest.mark.parametrize(
    ("mesh", "weight_bytes", "completions", "devices"),
    [
        ((1, 1), CACHED_BYTES, 2 * LEAST_BATCH, 2),
        ((1, 1), CACHED_BYTES, 2 * LEAST_BATCH - 1, 1),
        ((1, 1), CACHED_BYTES, 1000, 8),
        ((1, 1), CACHED_BYTES, 1, 1),
        ((1, 1), CACHED_BYTES + 1, 1000, 1),
        ((2, 1), 1, 1000, 2),
    ],
)
def test_devices_that_rollouts_are_spread_over(tiny_config, mesh, weight_bytes, completions, devices):
    assert make_roller(tiny_config, mesh=mesh, spread_cpu=True).mesh_for(weight_bytes, completions).size == devices


def test_runs_spread_the_rollouts_of_small_models(tiny_config):
    graph = abstract_params(tiny_config)[0]
    programs = Programs(parse_flags([], ()), tiny_config, graph, mesh_of(1, 1), jnp.float32, REAL, STOPS)
    assert programs.roller(OPTIONS).mesh_for(1, 2 * LEAST_BATCH).size == 2


START = """
import os, sys
if sys.argv[1] == "one":
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import jax
from minigrpo import generate
from minigrpo.runtime import mesh as sharding
sharding.start_platform("auto")
print(sharding.make_mesh("auto").size, len(jax.devices()), int("orbax" in sys.modules))
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are counted by what Linux allows")
@pytest.mark.parametrize(
    ("cores", "told", "devices"),
    [
        ("all", {}, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0)),
        ("one", {}, 1),
        ("all", {"JAX_NUM_CPU_DEVICES": "3"}, 3),
        ("one", {"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
    ],
)
def test_a_mesh_of_one_cpu_device_has_others_beside_it(cores, told, devices):
    """And orbax, which takes time and memory, is not imported where no checkpoint is read."""
    said = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    environment = (
        {name: value for name, value in os.environ.items() if name not in said} | {"JAX_PLATFORMS": "cpu"} | told
    )
    command = [sys.executable, "-c", START, cores]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.stdout.split() == ["1", str(devices), "0"], result.stderr


def test_virtual_devices_read_the_same_weights():
    def places(x):
        return {shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards}

    x, mesh = np.arange(4096.0, dtype=np.float32).reshape(64, 64), mesh_of(4, 1)
    apart = jax.jit(lambda x: x + 1, out_shardings=replicated(mesh))(x)
    shared = shared_by_host(mesh, {"w": apart})["w"]
    assert len(places(apart)) == 4 and len(places(shared)) == 1
    assert shared.is_fully_replicated and len(shared.addressable_shards) == 4
    np.testing.assert_array_equal(shared, x + 1)


def test_groups_split_over_devices_or_rows_are_added():
    rows, group = spread([[1], [2, 3]], [40, 41], 8, 8, 4)
    assert group == 2 and rows.lengths.tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    assert rows.ids.tolist() == [40] * 4 + [41] * 4 and rows.first_in_group.tolist() == [0, 2, 4, 6] * 2
    rows, group = spread([[1], [2, 3], [4]], [0, 1, 2], 3, 2, 4)
    assert group == 3 and rows.lengths.tolist() == [1, 2, 1, 0]


def test_the_batch_shrinks_in_the_tail():
    assert batch_sizes(64, 4) == [64, 16, 4] and batch_sizes(3, 4) == [3] and batch_sizes(10, 4) == [10, 4]
    assert batch_sizes(8, 4) == [8] and batch_sizes(32, 4) == [32, 8] and batch_sizes(18, 4) == [18, 5]
    assert batch_sizes(64, 64) == [64] and batch_sizes(200, 64) == [200, 64]
