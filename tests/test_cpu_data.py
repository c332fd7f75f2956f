"""Datasets, prompts, tokenizers and chat templates."""

import re

import pytest
from conftest import ROOT

from minigrpo.config import DataOptions, UsageError
from minigrpo.data.chat import load_tokenizer
from minigrpo.data.datasets import Dataset, arithmetic, batch_numbers, chat, load_dataset, tokenize

BUILTIN = ROOT / "minigrpo" / "builtin"


def write_lines(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def read(path, **options):
    return load_dataset(DataOptions(dataset=path, **options), "train")


def solve(prompt):
    """The answer of a generated problem, worked out from its sentences alone."""
    total = None
    for sentence in prompt.split(". "):
        numbers = [int(n) for n in re.findall(r"\d+", sentence)]
        if not numbers:
            continue
        if total is None:
            total = numbers[0]
        elif re.search(r"times as many|turns every", sentence):
            total *= numbers[0]
        elif re.search(r"loses|sells|leaves| to [A-Z]", sentence):
            total -= numbers[0]
        else:
            total += numbers[0]
    return total


def test_arithmetic_answers_are_right_and_splits_apart():
    train, test = arithmetic.problems("train", 3000), arithmetic.problems("test", 600)
    for row in train + test:
        assert str(solve(row["prompt"])) == row["answer"]
        assert row["completion"].endswith(f"<answer>\n{row['answer']}\n</answer>")
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    warm_up = arithmetic.problems("train", 20_000, arithmetic.SFT_START)
    assert not {row["prompt"] for row in warm_up} & {row["prompt"] for row in test}
    assert {row["completion"].count("=") for row in train} == {1, 2, 3}
    assert len({row["prompt"] for row in train}) > 2950
    assert arithmetic.problems("train", 3, 5) == train[5:8]


def test_gsm8k_columns_are_found(shared):
    dataset = read(str(shared / "gsm8k" / "train.jsonl"))
    assert len(dataset.rows) == 7473
    assert dataset.rows[0]["prompt"].startswith("Natalia sold clips") and dataset.rows[0]["answer"].endswith("#### 72")


def test_columns_can_be_named(tmp_path):
    path = write_lines(tmp_path, '{"ask": "1+1?", "gold": 2, "level": "easy"}')
    row = read(path, prompt_column="ask", answer_column="gold").rows[0]
    assert row == {"ask": "1+1?", "gold": 2, "level": "easy", "prompt": "1+1?", "answer": "2"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "a", "answer": "1"}', "{broken"], r"rows.jsonl:2: not JSON"),
        (['{"prompt": "a", "answer": "1"}', "[1, 2]"], r"rows.jsonl:2: a line must be a JSON object, not list"),
        ([""], "the file has no rows"),
        (['{"text": "a"}'], "no column prompt or question or problem; its columns are text"),
        (['{"prompt": "a", "answer": "1"}', '{"prompt": "b"}'], "row 2 has no column 'answer'"),
    ],
)
def test_bad_files_are_named(tmp_path, lines, message):
    with pytest.raises(UsageError, match=message):
        read(write_lines(tmp_path, *lines))


def test_missing_files_and_datasets_are_named():
    with pytest.raises(UsageError, match=r"--dataset=nowhere.jsonl: cannot be read"):
        read("nowhere.jsonl")
    with pytest.raises(UsageError, match="no such built-in dataset"):
        read("builtin:chess")


def test_long_prompts_are_dropped_and_counted():
    tokenizer = load_tokenizer(BUILTIN)
    dataset = Dataset("x", [{"prompt": "Anna has 3 apples."}, {"prompt": "Anna has 3 apples. " * 50}], "")
    kept = tokenize(dataset, tokenizer, DataOptions(max_prompt_length=40))
    assert len(kept) == 1 and kept.dropped == 1
    with pytest.raises(UsageError, match="--max_prompt_length=3: every prompt of x is longer; the shortest has"):
        tokenize(dataset, tokenizer, DataOptions(max_prompt_length=3))


def test_every_epoch_shows_each_row_once_in_a_new_order():
    epochs = [[i for step in range(5) for i in batch_numbers(10, 2, 5 * epoch + step, 3)] for epoch in range(2)]
    assert sorted(epochs[0]) == list(range(10)) and sorted(epochs[1]) == list(range(10, 20))
    assert [number - 10 for number in epochs[1]] != epochs[0]
    assert batch_numbers(10, 2, 7, 3) == batch_numbers(10, 2, 7, 3) != batch_numbers(10, 2, 7, 4)
    across = batch_numbers(3, 4, 0, 0)
    assert sorted(across[:3]) == [0, 1, 2] and across[3] in (3, 4, 5)


def test_system_prompts():
    assert chat("hi", "be brief")[0] == {"role": "system", "content": "be brief"}
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "hi"}]
    assert chat(own, "be brief") == own and len(chat("hi", "")) == 1
