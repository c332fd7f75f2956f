"""Packing: every sequence once, in arrays of fixed shapes, and the same log-probs and update as without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import forward, make_update_spec, mesh_of, place
from test_cpu_grpo import REAL, assert_close, host_batch, place_batch, run_update

from minigrpo.config import LossOptions, Settings, StepOptions
from minigrpo.grpo.batch import (
    SEQUENCES_PER_ROW,
    Batch,
    Lengths,
    PackingSpec,
    arrange,
    pack,
    pad_batch,
    restore_order,
)
from minigrpo.grpo.update import batch_logprobs
from minigrpo.kernels.backend import backend_for
from minigrpo.model.attention import expand, query_tokens
from minigrpo.model.params import Lora
from minigrpo.planning.memory import packing_spec
from minigrpo.planning.run_spec import RunSpec

LIMITS = 24, 40


def make_batch(prompt_lengths, completion_lengths, seed=0):
    """Prompts, and completions named by their advantage, all tokens at random."""
    rng, lengths = np.random.default_rng(seed), np.array(completion_lengths, np.int32)
    prompts = [rng.integers(1, 200, length).tolist() for length in prompt_lengths]
    completions = rng.integers(1, 200, (len(lengths), LIMITS[1])).astype(np.int32)
    completions *= np.arange(LIMITS[1]) < lengths[:, None]
    return prompts, Batch(completions, lengths, np.arange(len(lengths), dtype=np.float32))


def random_batch(seed, rows, group):
    """Sequences of all sizes, a few of them without a completion."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(1 / rng.integers(2, 30), rows), LIMITS[1])
    lengths[rng.random(rows) < 0.1] = 0
    return make_batch(rng.integers(1, LIMITS[0] + 1, rows // group), lengths, seed)


def whole_sequences(prompts, batch, group):
    """Number in the batch -> tokens, of sequences that have a completion."""
    rows = enumerate(zip(batch.completions, batch.completion_lengths, strict=True))
    return {i: prompts[i // group] + tokens[:length].tolist() for i, (tokens, length) in rows if length}


def taken(packed, *index):
    """One device's micro-batch."""
    return jax.tree.map(lambda x: x[index], dataclasses.replace(packed, micro_batches=None))


def row_segments(part, width):
    """Segment ids of the rows, which are all ones where each row holds one sequence."""
    rows = len(part.order) if part.segment_ids is None else len(part.segment_ids)
    return np.ones((rows, width), np.int32) if part.segment_ids is None else part.segment_ids


def read_part(part, count, width):
    """A micro-batch's sequences, read back slowly -> number in the batch -> tokens."""
    tokens, positions = part.tokens.reshape(-1), part.position_ids.reshape(-1)
    segments, found = row_segments(part, width), {}
    spans = set()
    for start, number, length, name, completion in zip(
        part.starts,
        part.order,
        part.batch.completion_lengths,
        part.batch.advantages,
        part.batch.completions,
        strict=True,
    ):
        if not length:
            assert number == count
            continue
        assert number not in found and name == number
        scored = part.loss_positions[start : start + length]
        np.testing.assert_array_equal(scored, np.arange(scored[0], scored[0] + length))
        row, last = divmod(int(scored[-1]) + 1, width)
        own = np.flatnonzero(segments[row] == segments[row, last])
        own = own[own <= last] if part.segment_ids is None else own
        np.testing.assert_array_equal(own, np.arange(own[0], last + 1))
        assert segments[row, last] > 0 and own[0] + row * width <= scored[0]
        spans.add((row, int(segments[row, last])))
        places = own + row * width
        places = places if part.shared_prefix is None else part.shared_prefix.tokens.reshape(-1)[places]
        np.testing.assert_array_equal(positions[places], np.arange(len(own)))
        np.testing.assert_array_equal(part.targets[start : start + length], completion[:length])
        np.testing.assert_array_equal(tokens[places[-length:]], completion[:length])
        found[int(number)] = tokens[places].tolist()
    if part.segment_ids is not None:
        named = {(row, int(segment)) for row, ids in enumerate(segments) for segment in set(ids.tolist()) - {0}}
        assert named == spans
    assert len(spans) == len(found)
    return found


def read_back(spec, packed, count):
    """All sequences; asserts that none is there twice, and that micro-batches past those in use are empty."""
    found = {}
    for device, number in np.ndindex(packed.order.shape[:2]):
        own = read_part(taken(packed, device, number), count, spec.row_tokens)
        assert not own.keys() & found.keys() and not (own and number >= packed.micro_batches)
        found |= own
    return found


def check_spec(spec, prompts, batch):
    count = len(batch.completion_lengths)
    packed = pack(spec, prompts, batch)
    assert read_back(spec, packed, count) == whole_sequences(prompts, batch, spec.group)
    assert 1 <= packed.micro_batches <= spec.micro_batches(count) == packed.tokens.shape[1]
    if packed.segment_ids is not None:
        assert packed.segment_ids.max() <= spec.sequences_per_row
    return packed


LAYOUTS = [(1, 64, 1), (1, 16, 4), (4, 3, 8), (2, 5, 2), (8, 2, 4), (1, 1, 16), (3, 2, 16)]
KINDS = {"apart": (1, False), "packed": (SEQUENCES_PER_ROW, False), "shared": (SEQUENCES_PER_ROW, True)}
KINDS["pairs"] = 2, True


def spec_of_kind(kind, devices, rows, group):
    most, share = KINDS[kind]
    return PackingSpec(devices, rows, *LIMITS, group, sequences_per_row=most, share_prefixes=share)


@pytest.mark.parametrize(("devices", "rows", "group"), LAYOUTS)
@pytest.mark.parametrize("count", [16, 48])
@pytest.mark.parametrize("kind", KINDS)
def test_every_sequence_is_packed_once(devices, rows, group, count, kind):
    for seed in range(4):
        check_spec(spec_of_kind(kind, devices, rows, group), *random_batch(seed, count, group))


HARD = {
    "full length": (24, [40] * 48),
    "of one token": (1, [1] * 48),
    "tiny completions of long prompts": (24, [1] * 48),
    "long completions of tiny prompts": (1, [40] * 48),
    "one long among tiny ones": (24, [40] + [1] * 47),
    "long and tiny by turns": (12, [40, 1] * 24),
    "just more than half a row": (12, [21] * 48),
    "one group alone": (24, [40] * 16 + [0] * 32),
    "one completion": (24, [0] * 47 + [40]),
    "none": (24, [0] * 48),
}


@pytest.mark.parametrize("lengths", HARD)
@pytest.mark.parametrize("kind", ["packed", "shared", "pairs"])
def test_no_lengths_exceed_what_the_arrays_hold(lengths, kind):
    """And whatever they are, the arrays' shapes are the same."""
    for devices, rows, group in LAYOUTS:
        spec = spec_of_kind(kind, devices, rows, group)
        prompt, completions = HARD[lengths]
        packed = check_spec(spec, *make_batch([prompt] * (48 // group), completions))
        usual = pack(spec, *random_batch(1, 48, group))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), packed) == jax.tree.map(lambda x: (x.shape, x.dtype), usual)


@pytest.mark.parametrize("share", [False, True])
def test_at_most_so_many_sequences_are_in_a_row(share):
    """Nine would fit where eight may, and seventeen where sixteen may."""
    spec = PackingSpec(1, 2, *LIMITS, group=9, sequences_per_row=8, share_prefixes=share)
    packed = check_spec(spec, *make_batch([1], [1] * 9))
    assert packed.segment_ids[0, 0].max(axis=1).tolist() == [8, 1] and packed.micro_batches == 1
    spec = PackingSpec(1, 2, 2, 48, group=17, share_prefixes=share)
    packed = check_spec(spec, *make_batch([1], [1] * 17))
    assert packed.segment_ids[0, 0].max(axis=1).tolist() == [16, 1] and packed.micro_batches == 1


def test_the_example_of_a_packed_batch():
    """A row, a micro-batch of one, with the positions whose successors are scored."""
    batch = Batch(np.array([[8, 2, 0], [9, 2, 0]], np.int32), np.array([2, 2], np.int32), np.zeros(2, np.float32))
    packed = taken(pack(PackingSpec(1, 1, 3, 4), [[5, 6], [7]], batch), 0, 0)
    assert packed.tokens.tolist() == [[5, 6, 8, 2, 7, 9, 2]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2, 2]]
    assert packed.loss_positions.tolist() == [1, 2, 4, 5] and packed.targets.tolist() == [8, 2, 9, 2]
    assert packed.starts.tolist() == [0, 2] and packed.order.tolist() == [0, 1]


@pytest.mark.parametrize(("devices", "rows", "group"), LAYOUTS)
@pytest.mark.parametrize("most", [2, SEQUENCES_PER_ROW])
def test_a_micro_batch_holds_each_prompt_once_and_knows_every_copy(devices, rows, group, most):
    """`first` and `copies` invert the rows' tokens; every token is a query once."""
    spec = PackingSpec(devices, rows, *LIMITS, group, sequences_per_row=most, share_prefixes=True)
    prompts, batch = random_batch(3, 96, group)
    packed = pack(spec, prompts, batch)
    for device, number in np.ndindex(packed.order.shape[:2]):
        part = taken(packed, device, number)
        tokens, ids = part.shared_prefix.tokens.reshape(-1), part.segment_ids.reshape(-1)
        there = [(int(tokens[place]), place) for place in np.flatnonzero(ids)]
        first, copies = part.shared_prefix.first, part.shared_prefix.copies
        told = [(token, place) for token, place in enumerate(first) if place < len(ids)]
        told += [(token, place) for token, others in enumerate(copies) for place in others if place < len(ids)]
        assert sorted(told) == sorted(there)
        numbers = part.order[part.batch.completion_lengths > 0].tolist()
        once = sum(len(prompts[one]) for one in {number // group for number in numbers})
        assert len({token for token, _ in there}) == once + batch.completion_lengths[numbers].sum()
        alone = dataclasses.replace(part.shared_prefix, first=first[None], copies=copies[None])
        queries = np.asarray(query_tokens(jax.tree.map(jnp.asarray, alone)))
        asked = queries[queries < spec.packed_tokens]
        assert sorted(asked.tolist()) == sorted({token for token, _ in there})


def test_the_gradient_of_expanded_tokens_is_the_sum_over_their_copies():
    spec = PackingSpec(1, 4, *LIMITS, 8, share_prefixes=True)
    part = taken(pack(spec, *random_batch(5, 32, 8)), 0, 0)
    shared = dataclasses.replace(
        part.shared_prefix, first=part.shared_prefix.first[None], copies=part.shared_prefix.copies[None]
    )
    rng, used = np.random.default_rng(0), part.segment_ids > 0
    x, cotangent = rng.normal(size=(spec.packed_tokens, 2, 3)), rng.normal(size=(*used.shape, 2, 3))
    got, pull = jax.vjp(lambda x: expand(x, jax.tree.map(jnp.asarray, shared)), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(np.asarray(got)[used], x[shared.tokens[used]], rtol=1e-6)
    want = np.zeros(x.shape)
    for at in zip(*np.nonzero(used), strict=True):
        want[shared.tokens[at]] += cotangent[at]
    np.testing.assert_allclose(pull(jnp.asarray(cotangent, jnp.float32))[0], want, rtol=1e-5, atol=1e-5)


# How much is packed


def test_groups_stay_together_where_devices_are_few():
    full = make_batch([24] * 8, [40] * 64)
    for devices, tokens in ((1, 8 * 24 + 64 * 40), (8, 24 + 8 * 40)):  # every prompt once
        spec = PackingSpec(devices, 64 // devices, *LIMITS, 8, share_prefixes=True)
        packed = check_spec(spec, *full)
        assert packed.micro_batches == 1 and packed.tokens.shape[-1] == tokens


def device_tokens(devices, lengths, group):
    """Packed tokens of every device, and its groups."""
    spec = PackingSpec(devices, 64, *LIMITS, group, share_prefixes=True)
    sizes = Lengths(np.ones(len(lengths), int), np.array(lengths), group)
    dealt = arrange(spec, sizes)
    groups = [len(set().union(*(one.members for one in own))) for own in dealt]
    return sorted(sum(one.tokens for one in own) for own in dealt), sorted(groups)


def test_groups_are_dealt_largest_first_and_in_pieces_where_whole_ones_leave_devices_uneven():
    assert device_tokens(2, [8, 8, 7, 7, 6, 6, 5, 5], 2)[0] == [28, 28]
    assert device_tokens(4, [40] * 24, 8)[1] == [2, 2, 2, 2]  # three groups; each device has room for six of 24


@pytest.mark.parametrize("share", [False, True])
def test_short_sequences_take_fewer_micro_batches(share):
    """63 of six completion tokens: a micro-batch of four rows has room for the scores of 26."""
    spec = PackingSpec(1, 4, *LIMITS, 64, share_prefixes=share)
    short, full = make_batch([2], [40] + [6] * 63), make_batch([24], [40] * 64)
    longest = check_spec(spec, *full).micro_batches
    assert longest == (22 if share else 16)  # of four rows, or of 161 packed tokens: four sequences, or three
    assert check_spec(spec, *short).micro_batches == 3


def test_a_batch_without_completions_has_nothing_to_compute():
    spec = PackingSpec(2, 2, *LIMITS, 4, share_prefixes=True)
    packed = check_spec(spec, *make_batch([2] * 4, [0] * 16))
    assert packed.micro_batches == 1 and not packed.segment_ids.any()
    assert not packed.batch.completion_lengths.any()


def test_a_short_batch_has_the_shapes_of_a_full_one():
    spec = PackingSpec(2, 2, *LIMITS, 4, share_prefixes=True)
    full, short = random_batch(0, 32, 4), random_batch(1, 12, 4)
    padded = check_spec(spec, *pad_batch(*short, 8))
    assert jax.tree.map(np.shape, padded) == jax.tree.map(np.shape, pack(spec, *full))
    assert read_back(spec, padded, 32) == whole_sequences(*short, 4)


@pytest.mark.parametrize(
    ("steps", "group", "dropout", "expected"),
    [
        ({}, 8, 0.0, (SEQUENCES_PER_ROW, True)),
        ({}, 1, 0.0, (SEQUENCES_PER_ROW, False)),
        ({"share_prompts": "false"}, 8, 0.0, (SEQUENCES_PER_ROW, False)),
        ({"packing": False}, 8, 0.0, (1, False)),
        ({}, 8, 0.1, (1, False)),
    ],
)
def test_sequences_are_arranged_as_flags_and_backend_ask(tiny_config, steps, group, dropout, expected):
    config = dataclasses.replace(tiny_config, lora=Lora(4, 8.0, dropout, ("q",)))
    backend, settings = backend_for(jax.devices()[0]), dataclasses.replace(Settings(), steps=StepOptions(**steps))
    for share in (True, False):
        own = dataclasses.replace(backend, share_prefixes=share)
        run = RunSpec(settings, config, mesh_of(1, 1), own, "cpu", 1 << 30, jnp.dtype("float32"), 200, (0,))
        spec = packing_spec(run, 64, group)
        assert (spec.sequences_per_row, spec.share_prefixes) == (expected[0], share and expected[1])
        assert 1 <= spec.rows <= 64
    if settings.steps.packing:
        forced = dataclasses.replace(settings, steps=dataclasses.replace(settings.steps, share_prompts="true"))
        spec = packing_spec(dataclasses.replace(run, settings=forced), 64, group)
        assert spec.share_prefixes == (group > 1 and expected[0] > 1)


# The same numbers

LOSSES = {
    "grpo": LossOptions(loss_type="grpo"),
    "gspo": LossOptions(importance_sampling_level="sequence", beta=0.05),
    "excluded": LossOptions(mask_truncated_completions=True),
}
TWO_PROMPTS = [[7, 8, 9, 10, 11], [12, 13, 14]]
PACKINGS = {
    "apart": {},
    "packed": {"sequences_per_row": SEQUENCES_PER_ROW},
    "shared": {"sequences_per_row": SEQUENCES_PER_ROW, "share_prefixes": True},
}


def grouped_batch(loss="grpo", old=False, ref=False):
    """Two groups of four, one completion of which is missing."""
    batch = host_batch(old=old, ref=ref)
    lengths = batch.completion_lengths.copy()
    lengths[5] = 0
    excluded = np.arange(8) % 3 == 0 if loss == "excluded" else None
    return dataclasses.replace(batch, completion_lengths=lengths, loss_excluded=excluded)


@pytest.fixture(scope="module")
def alone(tiny_config, tiny_params):
    """The update by sequences in rows of their own, on one device in one micro-batch, for every loss."""
    mesh = mesh_of(1, 1)
    packed = {name: grouped_batch(name, old=True, ref=True) for name in LOSSES}
    packed = {name: place_batch(mesh, batch, TWO_PROMPTS, limits=(8, 8), group=4) for name, batch in packed.items()}
    specs = {name: make_update_spec(tiny_config, mesh, loss=loss) for name, loss in LOSSES.items()}
    return {name: run_update(spec, tiny_params, packed[name]) for name, spec in specs.items()}


@pytest.mark.parametrize(
    ("mesh", "rows", "loss"),
    [((1, 1), 8, "gspo"), ((1, 1), 2, "grpo"), ((1, 1), 3, "excluded"), ((2, 1), 2, "gspo"), ((4, 2), 1, "grpo")],
)
@pytest.mark.parametrize("packing", ["packed", "shared"])
def test_packing_gives_the_same_update(tiny_config, tiny_params, alone, mesh, rows, loss, packing):
    batch, device_mesh = grouped_batch(loss, old=True, ref=True), mesh_of(*mesh)
    packed = place_batch(device_mesh, batch, TWO_PROMPTS, rows, (8, 8), group=4, **PACKINGS[packing])
    metrics, grads = run_update(make_update_spec(tiny_config, device_mesh, loss=LOSSES[loss]), tiny_params, packed)
    assert_close(grads, alone[loss][1], 1e-5)
    assert metrics == pytest.approx(alone[loss][0], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("mesh", "rows"), [((1, 1), 2), ((2, 1), 2), ((4, 2), 1)])
@pytest.mark.parametrize("packing", PACKINGS)
def test_logprobs_are_those_of_whole_sequences(tiny_config, tiny_params, mesh, rows, packing):
    """By a plain forward pass over one sequence at a time."""
    batch, device_mesh = grouped_batch(), mesh_of(*mesh)
    packed = place_batch(device_mesh, batch, TWO_PROMPTS, rows, (8, 8), group=4, **PACKINGS[packing])
    spec = make_update_spec(tiny_config, device_mesh, temperature=0.8)
    scored = restore_order(packed, np.asarray(batch_logprobs(spec, place(tiny_params, device_mesh), packed)), 8)
    tokens = np.zeros((8, 16), np.int32)
    for row, length in enumerate(batch.completion_lengths):
        sequence = TWO_PROMPTS[row // 4] + batch.completions[row, :length].tolist()
        tokens[row, : len(sequence)] = sequence
    logits = np.asarray(forward(tiny_config, tiny_params, tokens), np.float64)[..., :REAL] / 0.8
    want = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for row, length in enumerate(batch.completion_lengths):
        places = len(TWO_PROMPTS[row // 4]) - 1 + np.arange(length)
        picked = want[row, places, batch.completions[row, :length]]
        np.testing.assert_allclose(scored[row, :length], picked, rtol=1e-5, atol=1e-5)
