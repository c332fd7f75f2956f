"""Stop texts end completions where a search token by token finds them; --stop's forms; the repetition penalty."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from minigrpo import train
from minigrpo.build import check_loss
from minigrpo.command_line import parse_flags
from minigrpo.config import RolloutOptions, UsageError
from minigrpo.data.chat import load_tokenizer
from minigrpo.rollout.generator import Rollout
from minigrpo.rollout.sampling import KeptSet, penalise
from minigrpo.rollout.stop import end_at_stops, find_stops

STOPS = ("\n\n", "Question:", "é", "0 a", "#")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "minigrpo" / "builtin")


def texts():
    """Stops at the start, at the end, twice, within a token, over many tokens, of several bytes, and none at all."""
    rng = np.random.default_rng(0)
    pieces = ["Ann has 20 apples", "\n", "\n\n", "Question", ":", "é", "è", "漢字", " 7", "#", "##", "<answer>", "🙂"]
    made = ["".join(rng.choice(pieces, rng.integers(1, 9))) for _ in range(120)]
    return [*made, "#", "", "Question:", "no stop", "x\n\nQuestion: y", "Questio", "n" * 40 + "é"]


def first_by_search(tokenizer, tokens):
    """The fewest tokens whose text holds a stop, trying each number; None if there is none."""
    counts = range(len(tokens) + 1)
    return next((n for n in counts if any(stop in tokenizer.decode([tokens[:n]])[0] for stop in STOPS)), None)


def test_the_end_is_where_a_search_token_by_token_finds_it(tokenizer):
    completions = [tokenizer.hub.encode(text).ids for text in texts()]
    found, lengths = find_stops(completions, STOPS, tokenizer.decode)
    want = [first_by_search(tokenizer, tokens) for tokens in completions]
    assert found.tolist() == [end is not None for end in want]
    assert lengths.tolist() == [len(c) if end is None else end for c, end in zip(completions, want, strict=True)]
    assert 20 < found.sum() < len(found) - 20 and len(set(lengths[found].tolist())) > 5


def test_what_was_sampled_after_the_end_is_gone(tokenizer):
    """Tokens, log-probs and kept sets; a completion that ran into the limit has ended all the same."""
    rows = [tokenizer.hub.encode(text).ids for text in ("4 # 5", "4 and 5", "#")]
    tokens, lengths = np.zeros((3, 12), np.int32), np.array([len(row) for row in rows], np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    numbers = np.where(np.arange(12) < lengths[:, None], -1.5, 0).astype(np.float32)
    numbers[:, 1] = -np.inf
    rollout = Rollout(tokens, numbers, lengths, np.array([False, False, True]), KeptSet(numbers, numbers))
    cut = end_at_stops(rollout, ("#",), tokenizer.decode)
    assert tokenizer.decode(cut.completions) == ["4 #", "4 and 5", "#"] and cut.stopped.tolist() == [True, False, True]
    assert cut.lengths[0] < lengths[0] and cut.lengths[1:].tolist() == lengths[1:].tolist()
    past = np.arange(12) >= cut.lengths[:, None]
    for array in (cut.tokens, cut.logprobs, cut.kept.cutoff, cut.kept.mass):
        assert not array[past].any()
    np.testing.assert_array_equal(cut.logprobs[~past], numbers[~past])
    assert end_at_stops(rollout, (), tokenizer.decode) is rollout


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("", ()),
        ("###", ("###",)),
        (r"\n\n", ("\n\n",)),
        ('["Q:", "a, b"]', ("Q:", "a, b")),
        (r'["\n", "]"]', ("\n", "]")),
        ('["[end]"]', ("[end]",)),
        ('{"a"}', ('{"a"}',)),
    ],
)
def test_forms_of_stop(given, want):
    assert parse_flags([f"--stop={given}"], train.SECTIONS).rollout.stop_texts == want


@pytest.mark.parametrize("given", ["[end]", "[", "[]", '[""]', "[1]", '["a", null]', '[["a"]]'])
def test_another_form_of_stop_is_one_clear_line(given):
    with pytest.raises(UsageError) as caught:
        RolloutOptions(stop=given)
    assert f"--stop={given}: must be one text, or a JSON list of them" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_repetition_penalty_is_not_trained_with():
    settings = parse_flags(["--repetition_penalty=1.1"], train.SECTIONS)
    with pytest.raises(UsageError, match=r"--repetition_penalty=1\.1: would sample from another distribution"):
        check_loss(settings)


def test_the_penalty_is_transformers():
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(0)
    logits, seen = rng.normal(size=(20, 30)).astype(np.float32), rng.integers(0, 30, (20, 12)).astype(np.int32)
    logits[:, 25:] = -np.inf
    seen %= 25
    for penalty in (1.3, 0.7):
        theirs = warpers.RepetitionPenaltyLogitsProcessor(penalty)
        want = theirs(torch.tensor(seen).long(), torch.tensor(logits)).numpy()
        padded = np.concatenate([seen, np.full((20, 3), 30, np.int32)], axis=1)  # 30 is no token
        np.testing.assert_allclose(penalise(penalty, jnp.asarray(logits), jnp.asarray(padded)), want, rtol=1e-6)
