"""Sequences that share rows: the layout, attention within segments, and the same log-probs and update as without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, place
from test_cpu_grpo import assert_close, host_batch, make_trainer

from minigrpo.build import Programs
from minigrpo.config import LossOptions, StepOptions, parse_flags
from minigrpo.grpo import batch as packing
from minigrpo.grpo import update as grpo
from minigrpo.grpo.batch import (
    ARRANGEMENTS,
    MOST_IN_A_ROW,
    deal,
    lay_out,
    pack,
    place_batch,
    rows_per_part,
    sequences_in,
    tokens_of,
    with_queries,
)
from minigrpo.grpo.optimizer import init_state
from minigrpo.model.attention import any_place, attend_sequence, splash_attention
from minigrpo.model.qwen import Lora, abstract_params


def random_batch(seed, rows, group, limits=(24, 40)):
    """Sequences of all sizes, `group` of them with the same prompt, a few of them without a completion."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(1 / rng.integers(2, 30), rows), limits[1])
    lengths[rng.random(rows) < 0.1] = 0
    lengths[0] = max(1, lengths[0])
    prompts = [rng.integers(1, 200, rng.integers(1, limits[0] + 1)).tolist() for _ in range(-(-rows // group))]
    completions = rng.integers(1, 200, (rows, limits[1])).astype(np.int32)
    return grpo.assemble([prompts[row // group] for row in range(rows)], completions, lengths, limits)


def unpack(batch, sheets):
    """The packed sequences as (tokens, completion), read back slowly; asserts that all else is nothing."""
    packed, found = batch.packed, []
    tokens, positions = (x.reshape(sheets, -1) for x in (batch.tokens, packed.positions))
    segments = packed.rows.segments.reshape(sheets, -1, packed.rows.segments.shape[1])
    as_they_lie = np.broadcast_to(np.arange(segments[0].size), (sheets, segments[0].size))
    places = (as_they_lie if packed.rows.tokens is None else packed.rows.tokens).reshape(sheets, -1)
    starts, lengths = (x.reshape(sheets, -1) for x in (packed.starts, batch.completion_lengths))
    completions = batch.completions.reshape(sheets, -1, batch.completions.shape[1])
    for sheet in range(sheets):
        sequences = {}  # a sequence's places in the sheet's rows, by the last of them
        for number, ids in enumerate(segments[sheet]):
            for segment in range(1, ids.max() + 1):
                where = np.flatnonzero(ids == segment)
                np.testing.assert_array_equal(where, np.arange(where[0], where[0] + len(where)))
                where = where + number * len(ids)
                np.testing.assert_array_equal(positions[sheet, places[sheet, where]], np.arange(len(where)))
                sequences[where[-1]] = where
        used = [(start, length, i) for i, (start, length) in enumerate(zip(starts[sheet], lengths[sheet], strict=True))]
        for start, length, slot in filter(lambda one: one[1], used):
            scored = slice(start, start + length)
            last, targets = packed.scored[sheet, scored], packed.targets[sheet, scored]
            where = sequences.pop(last[-1] + 1)
            np.testing.assert_array_equal(where[-length - 1 : -1], last)
            own = places[sheet, where]
            np.testing.assert_array_equal(tokens[sheet, own[-length:]], targets)
            np.testing.assert_array_equal(completions[sheet, slot, :length], targets)
            found.append(tuple(tokens[sheet, own].tolist()) + (int(length),))
        assert not sequences
    return sorted(found)


def sequences_of(batch):
    rows = zip(batch.tokens, batch.prompt_lengths, batch.completion_lengths, strict=True)
    return sorted((*tokens[: prompt + length].tolist(), int(length)) for tokens, prompt, length in rows if length)


LAYOUTS = [(1, 1, 1), (1, 4, 4), (4, 1, 8), (2, 3, 2), (8, 2, 4), (3, 2, 5)]


@pytest.mark.parametrize("devices,parts,group", LAYOUTS)
@pytest.mark.parametrize("rows", [8, 13, 32, 64, 100, 5])
@pytest.mark.parametrize("share", [False, True])
def test_every_sequence_is_laid_out_once(devices, parts, group, rows, share):
    batch = random_batch(rows, rows, group)
    packed = pack(batch, devices, parts, share)
    assert unpack(packed, devices * parts) == sequences_of(batch)
    assert packed.packed.rows.segments.max() <= MOST_IN_A_ROW
    assert len(packed.packed.rows.segments) <= -(-rows // (devices * parts)) * devices * parts


@pytest.mark.parametrize("devices,parts,group", LAYOUTS)
def test_a_sheet_holds_each_prompt_once_and_knows_where_each_token_stands(devices, parts, group):
    batch, sheets = random_batch(3, 64, group), devices * parts
    packed = pack(dataclasses.replace(batch, advantages=np.arange(64.0)), devices, parts, share=True)
    rows, on_sheets = (
        packed.packed.rows,
        [x.reshape(sheets, -1) for x in (packed.advantages, packed.completion_lengths)],
    )
    segments, places = (x.reshape(sheets, -1) for x in (rows.segments, rows.tokens))
    for sheet, (ids, tokens) in enumerate(zip(segments, places, strict=True)):
        standing = [(int(tokens[place]), place) for place in np.flatnonzero(ids)]
        told = [(token, place) for token, place in enumerate(rows.first[sheet]) if place < len(ids)]
        told += [
            (token, place) for token, others in enumerate(rows.others[sheet]) for place in others if place < len(ids)
        ]
        assert sorted(told) == sorted(standing)
        own = [int(row) for row, length in zip(*(x[sheet] for x in on_sheets), strict=True) if length]
        prompts = {tuple(batch.tokens[row, : batch.prompt_lengths[row]].tolist()) for row in own}
        assert len({token for token, _ in standing}) == sum(map(len, prompts)) + batch.completion_lengths[own].sum()


@pytest.mark.parametrize("anywhere", [False, True])
@pytest.mark.parametrize("devices,parts,group", LAYOUTS)
def test_every_token_is_a_query_once(devices, parts, group, anywhere):
    rows = with_queries(pack(random_batch(4, 64, group), devices, parts, share=True).packed.rows, anywhere)
    sheets, tokens = rows.query_numbers.shape
    width, most = rows.segments.shape[1], rows.query_tokens.shape[1]
    assert most == width or anywhere
    by_sheet = [
        x.reshape(sheets, -1, x.shape[1]) for x in (rows.segments, rows.tokens, rows.query_tokens, rows.query_places)
    ]
    for sheet, (segments, stands, asking, places) in enumerate(zip(*by_sheet, strict=True)):
        row, number = np.nonzero(asking < tokens)
        place, token = places[row, number], asking[row, number]
        assert (segments[row, place] > 0).all() and (stands[row, place] == token).all()
        assert sorted(token) == sorted(set(stands[segments > 0].tolist()))
        assert (rows.query_numbers[sheet, token] == row * most + number).all()
        assert (np.delete(rows.query_numbers[sheet], token) == asking.size).all()
        assert anywhere or (place == number).all()


def test_rows_share_the_queries_of_their_prompt():
    full = grpo.assemble([[1 + row // 8] * 24 for row in range(64)], np.full((64, 40), 3), np.full(64, 40), (24, 40))
    assert [any_place(platform) for platform in ("cpu", "gpu", "tpu")] == [True, False, False]
    rows = lay_out(mesh_of(1, 1), full, 1, "sheets").packed.rows
    assert ((rows.query_tokens < rows.query_numbers.shape[1]).sum(axis=1) == 40 + 24 // 8).all()
    assert rows.query_tokens.shape == (64, 48)  # 43, and a multiple of 16


@pytest.mark.parametrize(
    ("platform", "flags", "dropout", "arrangement"),
    [
        ("tpu", (), 0.0, "rows"),
        ("tpu", ("--share_prompts=true",), 0.0, "sheets"),
        ("gpu", (), 0.0, "sheets"),
        ("cpu", ("--share_prompts=false",), 0.0, "rows"),
        ("cpu", ("--packing=false",), 0.0, "apart"),
        ("gpu", (), 0.1, "apart"),
    ],
)
def test_sequences_are_arranged_as_flags_and_platform_ask(
    monkeypatch, tiny_config, platform, flags, dropout, arrangement
):
    monkeypatch.setattr(Programs, "platform", platform)
    config = dataclasses.replace(tiny_config, lora=Lora(4, 8.0, dropout, ("q",)))
    settings = parse_flags(list(flags), (StepOptions,))
    programs = Programs(settings, config, abstract_params(config)[0], mesh_of(1, 1), jnp.float32, 200, (0,))
    assert programs.arrangement == arrangement


def test_groups_stay_together_where_devices_are_few():
    prompts = [[row // 8 + 1] * 24 for row in range(64)]
    full = grpo.assemble(prompts, np.full((64, 40), 3, np.int32), np.full(64, 40), (24, 40))
    on_one, on_eight, apart = (pack(full, devices, 1, share=True) for devices in (1, 8, 64))
    assert on_one.tokens.size == 2816  # 8 prompts and 64 completions: 2,752 tokens, in lines of 256
    assert on_eight.tokens.size == 8 * 352  # a prompt and 8 completions each: 344 tokens, in lines of 32
    assert apart.tokens.size == 64 * 64


def pieces_batch(completions, group):
    """Groups with prompts of a token, and completions of these lengths."""
    prompts = [[1 + row // group] for row in range(len(completions))]
    return grpo.assemble(prompts, np.full((len(completions), 40), 3, np.int32), np.array(completions), (24, 40))


def test_groups_are_dealt_largest_first_and_in_parts_where_whole_ones_leave_devices_uneven():
    batch = pieces_batch([8, 8, 7, 7, 6, 6, 5, 5], group=2)
    assert sorted(tokens_of(batch, sequences_in(rows)) for rows in deal(batch, 2, share=True)) == [28, 28]
    batch = pieces_batch([40] * 24, group=8)  # three groups on four devices with room for six each
    assert sorted(len({i // 8 for i in sequences_in(rows)}) for rows in deal(batch, 4, share=True)) == [2, 2, 2, 2]


def test_few_shapes_are_ever_compiled():
    """26 in 50 batches, 7 of them in rows; with sheets of any size they would be 50."""
    rng, shapes = np.random.default_rng(0), {"rows": set(), "sheets": set()}
    for _ in range(50):
        prompts = [rng.integers(1, 200, rng.integers(32, 129)).tolist() for _ in range(8)]
        lengths = np.clip(rng.gamma(2, 40, 64), 1, 256).astype(np.int64)
        completions = rng.integers(1, 200, (64, 256)).astype(np.int32)
        batch = grpo.assemble([prompts[row // 8] for row in range(64)], completions, lengths, (128, 256))
        for name, found in shapes.items():
            found.add(tuple(x.shape for x in jax.tree.leaves(lay_out(mesh_of(8, 1), batch, 1, name))))
    assert len(shapes["sheets"]) <= 4 * len(shapes["rows"]) <= 32


@pytest.mark.parametrize("share", [False, True])
def test_short_sequences_take_fewer_rows_and_long_ones_no_more(share):
    short = grpo.assemble([[1, 2]] * 64, np.full((64, 40), 3, np.int32), np.array([40] + [6] * 63), (24, 40))
    rows = pack(short, 1, 1, share).packed.rows
    assert len(rows.segments) == 16  # 63 in rows of 64 tokens, 40 of them completions: six a row, and one by itself
    full = grpo.assemble([[1] * 24] * 64, np.full((64, 40), 3, np.int32), np.full(64, 40), (24, 40))
    assert pack(full, 8, 2, share).packed.rows.segments.shape == full.tokens.shape
    lengths = pack(short, 2, 4, share).completion_lengths.reshape(2, 4, -1)
    assert (lengths[:, :1] > 0).any() and not (lengths[:, 1:] > 0).any(axis=(0, 2)).all()


@pytest.mark.parametrize("share", [False, True])
def test_a_batch_without_completions_has_nothing_to_compute(share):
    batch = grpo.assemble([[1, 2], [3]], np.zeros((2, 40), np.int32), np.array([0, 0]), (24, 40))
    packed = pack(batch, 2, 2, share)
    assert not packed.packed.rows.segments.any() and not packed.completion_lengths.any()


def test_parts_are_few_and_rows_too():
    assert [rows_per_part(rows, 16, 16) for rows in (1, 9, 16, 17, 33)] == [1, 4, 16, 4, 8]
    assert rows_per_part(33, 64, 1) == 64 and rows_per_part(30, 64, 1) == 32


def test_attention_stays_within_segments():
    rng = np.random.default_rng(0)
    sizes = (70, 200, 37)
    q, k, v = (jnp.asarray(rng.normal(size=(320, heads, 16)), jnp.float32) for heads in (4, 2, 2))
    segments = jnp.asarray(np.repeat([1, 2, 3, 0], (*sizes, 320 - sum(sizes))))
    got = attend_sequence(q, k, v, segments)
    start = 0
    for size in sizes:
        own = slice(start, start + size)
        np.testing.assert_allclose(got[own], attend_sequence(q[own], k[own], v[own]), atol=2e-6)
        start += size
    for count in (90, 300):  # in one block of queries and in two
        places = jnp.asarray(np.sort(rng.permutation(320)[:count]))
        np.testing.assert_allclose(attend_sequence(q[places], k, v, segments, places), got[places], atol=2e-6)
    kv = (jnp.repeat(x, 2, axis=1)[None] for x in (k, v))
    kernel = splash_attention(q[None], *kv, segments[None], interpret=True)[0]
    np.testing.assert_allclose(kernel[:start], got[:start], atol=2e-5)


LOSSES = {
    "grpo": LossOptions(loss_type="grpo"),
    "gspo": LossOptions(importance_sampling_level="sequence", beta=0.05),
    "left_out": LossOptions(mask_truncated_completions=True),
}


def shared_batch(old=False, ref=False):
    """Two groups of three with a prompt each, and two sequences by themselves."""
    batch = host_batch(old=old, ref=ref)
    limits = batch.tokens.shape[1] - 8, 8
    prompts = [
        [7, 8, 9, 10, 11],
        [12, 13, 14],
        [7, 8, 9, 10, 11],
        [15],
        [12, 13, 14],
        [16, 17],
        [7, 8, 9, 10, 11],
        [12, 13, 14],
    ]
    again = grpo.assemble(prompts, batch.completions, batch.completion_lengths, limits)
    return dataclasses.replace(batch, tokens=again.tokens, prompt_lengths=again.prompt_lengths)


@pytest.mark.parametrize(
    "mesh,parts,loss",
    [((1, 1), 1, "gspo"), ((1, 1), 2, "grpo"), ((1, 1), 4, "left_out"), ((2, 1), 2, "gspo"), ((4, 2), 1, "grpo")],
)
@pytest.mark.parametrize("anywhere", [True, False])
def test_packing_gives_the_same_update(monkeypatch, tiny_config, tiny_params, mesh, parts, loss, anywhere):
    monkeypatch.setattr(packing, "any_place", lambda platform: anywhere)
    batch, device_mesh = shared_batch(old=True, ref=True), mesh_of(*mesh)
    if loss == "left_out":
        batch = dataclasses.replace(batch, left_out=np.arange(8) % 3 == 0)
    trainer = make_trainer(tiny_config, device_mesh, parts=parts, loss=LOSSES[loss])
    results = []
    for arrangement in ARRANGEMENTS:
        placed = place_batch(device_mesh, batch, parts, arrangement)
        state = init_state(trainer.optimizer, jax.tree.map(jnp.copy, place(tiny_params, device_mesh)), device_mesh)
        new, metrics = grpo.update(trainer, state, placed, {})
        grads = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), tiny_params, new.params)
        results.append((grads, {name: float(value) for name, value in metrics.items()}))
    for other in results[1:]:
        assert_close(other[0], results[0][0], 1e-5)
        assert other[1] == pytest.approx(results[0][1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("mesh,parts", [((1, 1), 2), ((4, 2), 1)])
def test_packed_logprobs_are_those_of_the_sequences_by_themselves(tiny_config, tiny_params, mesh, parts):
    batch, device_mesh = shared_batch(), mesh_of(*mesh)
    trainer, params = make_trainer(tiny_config, device_mesh, parts=parts), place(tiny_params, device_mesh)
    found = []
    for arrangement in ARRANGEMENTS:
        placed = place_batch(device_mesh, batch, parts, arrangement)
        logprobs = np.asarray(grpo.batch_logprobs(trainer, params, placed))
        lengths, names = np.asarray(placed.completion_lengths), np.asarray(placed.advantages)
        found.append({float(names[row]): logprobs[row, : lengths[row]] for row in np.flatnonzero(lengths)})
    assert len(found[0]) == 8 and all(set(other) == set(found[0]) for other in found)
    for name, logprobs in found[0].items():
        for other in found[1:]:
            np.testing.assert_allclose(other[name], logprobs, rtol=1e-5)
