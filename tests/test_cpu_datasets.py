"""Every kind of file and every shape of row, with the datasets library and json as oracles."""

import bz2
import doctest
import gzip
import json
import lzma
import pathlib

import numpy as np
import pytest
import tokenizers
from conftest import ROOT

from minigrpo.config import DataOptions, RunOptions, UsageError
from minigrpo.data import columns, files
from minigrpo.data import datasets as data
from minigrpo.data.chat import Tokenizer, load_tokenizer
from minigrpo.data.datasets import (
    Dataset,
    PromptSet,
    held_out_options,
    load_completions,
    load_dataset,
    read_prompts,
    tokenize,
    tokenize_completions,
)
from minigrpo.data.recorded import load_recorded, read_recorded
from minigrpo.data.rows import Ragged

hf = pytest.importorskip("datasets")
BUILTIN = ROOT / "minigrpo" / "builtin"
USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
PARTS = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]
IMAGE = [{"type": "image_url", "image_url": "x.png"}]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BUILTIN)


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """The library converts files to Arrow in its cache; every test has one of its own."""
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(tmp_path, *rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path, answer_required=True, **options):
    return load_dataset(DataOptions(dataset=path, **options), "train", answer_required)


def gsm8k(shared, count):
    lines = (shared / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


# Files


def write_readme(folder, table):
    """A folder of two configs over Parquet, as openai/gsm8k is on the Hub."""
    text = "---\nconfigs:\n"
    for config in ("main", "socratic"):
        (folder / config).mkdir(parents=True)
        text += f"- config_name: {config}\n  data_files:\n"
        for split in ("train", "test"):
            table.to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
            text += f"  - {{split: {split}, path: {config}/{split}-*}}\n"
    (folder / "README.md").write_text(text + "---\n")


def write_arrow(path, table):
    import pyarrow

    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.data.table.schema) as writer:
        writer.write_table(table.data.table)


LINES = "\n".join
WRITERS = {
    "rows.jsonl": lambda path, rows, _: path.write_text(LINES(map(json.dumps, rows))),
    "windows.jsonl": lambda path, rows, _: path.write_bytes(
        b"\xef\xbb\xbf" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    ),
    "lines.json": lambda path, rows, _: path.write_text(LINES(map(json.dumps, rows))),
    "rows.jsonl.gz": lambda path, rows, _: path.write_bytes(gzip.compress(LINES(map(json.dumps, rows)).encode())),
    "rows.jsonl.bz2": lambda path, rows, _: path.write_bytes(bz2.compress(LINES(map(json.dumps, rows)).encode())),
    "rows.jsonl.xz": lambda path, rows, _: path.write_bytes(lzma.compress(LINES(map(json.dumps, rows)).encode())),
    "array.json": lambda path, rows, _: path.write_text(json.dumps(rows)),
    "bom.json": lambda path, rows, _: path.write_text(json.dumps(rows), encoding="utf-8-sig"),
    "bom_data.json": lambda path, rows, _: path.write_text(json.dumps({"data": rows}), encoding="utf-8-sig"),
    "joined.jsonl": lambda path, rows, _: path.write_text(
        LINES("\ufeff" * (i % 7 == 0) + json.dumps(row) for i, row in enumerate(rows)), encoding="utf-8"
    ),
    "pretty.json": lambda path, rows, _: path.write_text("\n" + json.dumps(rows, indent=2)),
    "data.json": lambda path, rows, _: path.write_text(json.dumps({"data": rows})),
    "pretty_data.json": lambda path, rows, _: path.write_text(json.dumps({"version": 1, "data": rows}, indent=1)),
    "rows.csv": lambda path, _, table: table.to_csv(path),
    "indexed.csv": lambda path, _, table: table.to_pandas().to_csv(path),
    "rows.csv.gz": lambda path, _, table: path.write_bytes(gzip.compress(table.to_pandas().to_csv().encode())),
    "bom.csv": lambda path, _, table: table.to_pandas().to_csv(path, encoding="utf-8-sig"),
    "rows.tsv": lambda path, _, table: table.to_csv(path, sep="\t"),
    "rows.parquet": lambda path, _, table: table.to_parquet(path),
    "noname": lambda path, _, table: table.to_parquet(path),
    "rows.arrow": lambda path, _, table: write_arrow(path, table),
    "saved": lambda path, _, table: table.save_to_disk(path),
    "splits": lambda path, _, table: hf.DatasetDict(train=table, test=table.select([0])).save_to_disk(path),
    "hub": lambda path, _, table: write_readme(path, table),
}
"""Name of a file or folder -> what writes the rows there."""


@pytest.fixture(scope="module")
def forty(shared_rows, tokenizer):
    """Forty real rows, and the tokens of their prompts by the tokenizers library alone."""
    texts = [tokenizer.render([{"role": "user", "content": row["question"]}]) for row in shared_rows]
    return shared_rows, [tokenizer.hub.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.fixture(scope="module")
def shared_rows():
    folder = ROOT.parent / "shared" / "data"
    if not folder.exists():
        pytest.skip(f"needs real data in {folder}")
    return gsm8k(folder, 40)


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows_from_every_kind_of_file_have_the_same_tokens(tmp_path, forty, tokenizer, name):
    rows, want = forty
    WRITERS[name](tmp_path / name, rows, hf.Dataset.from_list(rows))
    config = {"dataset_config": "main"} if name == "hub" else {}
    options = DataOptions(dataset=str(tmp_path / name), max_prompt_length=4000, system_prompt="", **config)
    prompts = tokenize(load_dataset(options, "train"), tokenizer, options)
    assert prompts.tokens[:] == want
    assert [(row["question"], row["answer"]) for row in prompts.rows] == [tuple(row.values()) for row in rows]


def test_splits_and_configs_are_chosen_by_name(tmp_path, shared_rows):
    table = hf.Dataset.from_list(shared_rows)
    hf.DatasetDict(train=table, cot=table.select(range(3))).save_to_disk(tmp_path / "saved")
    write_readme(tmp_path / "hub", table)
    assert len(read(str(tmp_path / "saved"), dataset_split="cot").rows) == 3
    assert len(read(str(tmp_path / "hub"), dataset_config="socratic", dataset_split="test[:7]").rows) == 7
    for options, message in [
        ({"dataset": "saved", "dataset_split": "val"}, "no split 'val', only train, cot; see --dataset_split"),
        ({"dataset": "hub"}, r"available configs: \['main', 'socratic'\].*see --dataset_config"),
        (
            {"dataset": "hub", "dataset_config": "x"},
            r"'x' not found. Available: \['main', 'socratic'\]; see --dataset_c",
        ),
        ({"dataset": "hub", "dataset_config": "main", "dataset_split": "x"}, r"\['train', 'test'\].*; see --dataset_s"),
    ]:
        with pytest.raises(UsageError, match=message) as caught:
            read(str(tmp_path / options.pop("dataset")), **options)
        assert "\n" not in str(caught.value)


def test_held_out_prompts_have_their_own_dataset_config_and_split(tmp_path):
    own = DataOptions(dataset="user/set", dataset_config="main", dataset_split="train[:90%]")
    same = held_out_options(own, RunOptions(eval_split="train[90%:]"))
    assert (same.dataset, same.dataset_config, same.dataset_split) == ("user/set", "main", "train[90%:]")
    other = held_out_options(own, RunOptions(eval_dataset="user/test"))
    assert (other.dataset, other.dataset_config, other.dataset_split) == ("user/test", "auto", "auto")
    with pytest.raises(UsageError, match="has no test split; name one with --eval_dataset"):
        held_out_options(DataOptions(dataset=write(tmp_path, {})), RunOptions(eval_steps=1))


@pytest.mark.parametrize("name", ["rows.jsonl", "array.json", "rows.csv", "rows.parquet"])
def test_text_that_looks_like_something_else_stays_text(tmp_path, name):
    rows = [
        {"prompt": text, "answer": "007"} for text in ("NA", "null", "1e5", "2020-01-01", "a\r\nb", 'say "x", y', "ß €")
    ]
    WRITERS[name](tmp_path / name, rows, hf.Dataset.from_list(rows))
    assert [(row["prompt"], row["answer"]) for row in read(str(tmp_path / name)).rows] == [
        (row["prompt"], "007") for row in rows
    ]


def nested(depth, name="answer"):
    return f'{{"prompt": "a", "{name}": {"[" * depth}1{"]" * depth}}}'.encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("deep.jsonl", nested(5_000), r"deep.jsonl:1: nested deeper than 100 levels"),
        ("deep.jsonl", nested(100_000), r"deep.jsonl:1: nested deeper than 100 levels"),
        ("deep.jsonl", b'{"a": 1}\n' + nested(500, "x"), r"deep.jsonl:2: nested deeper than 100 levels"),
        ("deep.json", b"[" + nested(500, "x") + b"]", r"row 1: nested deeper than 100 levels"),
        ("deep.json", b"[" * 100_000 + b"]" * 100_000, r"deep.json: nested deeper than 100 levels"),
        ("digits.jsonl", b'{"prompt": ' + b"1" * 5_000 + b"}", r"digits.jsonl:1: not JSON"),
        ("half.jsonl", b'{"prompt": "a\\ud800"}', r"half.jsonl:1: holds half of a surrogate pair"),
        ("half.json", b'[{"a\\udc00": "a"}]', r"row 1: holds half of a surrogate pair"),
        (
            "utf16.jsonl",
            '{"prompt": "a"}'.encode("utf-16"),
            r"utf16.jsonl:1: not UTF-8 text .*; save the file as UTF-8",
        ),
        ("numbers.json", b"[1, 2]", r"row 1: a row must be a JSON object, not int"),
        ("string.jsonl", b'"abc"', r"string.jsonl:1: a line must be a JSON object, not str"),
        ("broken.json", b'{"a":\n1, "prompt":\n', r"broken.json:1: not JSON"),
        ("broken.json", b'[{"a": 1}', r"broken.json: not JSON"),
        ("empty.json", b"[]", r"the file has no rows"),
        ("empty.jsonl", b"\n\n", r"the file has no rows"),
        ("empty.csv", b"", r"--dataset=.*empty.csv: cannot be loaded"),
        ("cut.jsonl.gz", gzip.compress(b'{"prompt": "a"}', mtime=0)[:-9], r"--dataset=.*cut.jsonl.gz: cannot be read"),
        ("noise.xz", b"\xfd7zXZ\x00noise", r"--dataset=.*noise.xz: cannot be read"),
        ("noise.parquet", b"PAR1 noise", r"--dataset=.*noise.parquet: cannot be loaded"),
        ("noise.arrow", b"noise", r"--dataset=.*noise.arrow: cannot be loaded"),
        ("wide.csv", b"prompt,answer\na,b,c\n", r"wide.csv: cannot be loaded .*loss of data"),
        ("late.csv", b"prompt,answer\na,b\na,b,c\n", r"late.csv: cannot be loaded .*Expected 2 fields in line 3"),
        ("open.csv", b'prompt,answer\n"a', r"open.csv: cannot be loaded"),
        ("utf16.csv", "prompt,answer\na,b\n".encode("utf-16"), r"utf16.csv: cannot be read .*utf-8"),
        ("short.csv", b"prompt,answer\na\n", r"row 1 has nothing as 'answer'"),
        ("chat.csv", b"prompt,answer\n\"[{'role': 'user'}]\",1\n", r"row 1 has messages written as text in 'prompt'"),
    ],
)
def test_files_that_cannot_be_read_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read(str(tmp_path / name))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["none.jsonl", "none.csv", "none.parquet", "no/such"])
def test_what_is_not_there_is_named(tmp_path, name):
    with pytest.raises(UsageError, match=f"--dataset=.*{name}: (cannot be|no such file or folder)"):
        read(str(tmp_path / name))


@pytest.mark.parametrize("flag", ["dataset_split", "dataset_config"])
def test_configs_and_splits_of_what_has_none_are_refused(tmp_path, flag):
    table = hf.Dataset.from_list([{"prompt": "a", "answer": "1"}])
    table.save_to_disk(tmp_path / "saved")
    for name in (write(tmp_path, {"prompt": "a", "answer": "1"}), str(tmp_path / "saved"), "builtin:arithmetic"):
        with pytest.raises(UsageError, match=f"--{flag}=x: .* has no {flag[8:]}s; leave it out"):
            read(name, **{flag: "x"})


def test_rows_and_files_of_json_have_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE", 2**20)
    monkeypatch.setattr(files, "LONGEST_DOCUMENT", 2**20)
    row = {"prompt": "x" * 2**20, "answer": "1"}
    with pytest.raises(UsageError, match=r"rows.jsonl:2: the line is longer than 1 MiB"):
        read(write(tmp_path, {"prompt": "a", "answer": "1"}, row))
    (tmp_path / "array.json").write_text(json.dumps([row]))
    with pytest.raises(UsageError, match=r"array.json: is longer than 1 MiB; save it as JSON Lines"):
        read(str(tmp_path / "array.json"))


def test_columns_of_images_are_refused_by_name(tmp_path):
    table = hf.Dataset.from_dict({"prompt": ["a"], "answer": ["1"], "photo": [None]})
    table.cast_column("photo", hf.Image()).save_to_disk(tmp_path / "saved")
    with pytest.raises(UsageError, match="column 'photo' holds images"):
        read(str(tmp_path / "saved"))


# Columns


def pairs(dataset):
    return [(row["prompt"], row.get("answer")) for row in dataset.rows]


OPENR1 = {
    "problem": "2 + 2?",
    "solution": "It is 4.",
    "answer": "4",
    "messages": [USER, {**ANSWER, "content": "clear"}],
}
VERL = {"data_source": "x", "prompt": [USER], "reward_model": {"style": "rule", "ground_truth": "4"}, "extra_info": {}}


@pytest.mark.parametrize(
    ("row", "options", "want"),
    [
        (OPENR1, {"prompt_column": "problem", "answer_column": "answer"}, ("2 + 2?", "4")),
        (OPENR1, {"prompt_column": "problem", "answer_column": "solution"}, ("2 + 2?", "It is 4.")),
        (OPENR1, {"answer_column": "solution"}, ("2 + 2?", "It is 4.")),
        (OPENR1, {"prompt_column": "messages"}, ([USER], "4")),
        (OPENR1, {"prompt_column": "messages", "answer_column": "messages"}, ([USER], "clear")),
        (OPENR1, {}, ("2 + 2?", "4")),
        (VERL, {}, ([USER], "4")),
        (VERL, {"answer_column": "reward_model.ground_truth"}, ([USER], "4")),
        ({"a": {"b": {"c": "x"}}, "d.e": 5}, {"prompt_column": "a.b.c", "answer_column": "d.e"}, ("x", "5")),
        *(({"question": "x", name: "4"}, {}, ("x", "4")) for name in ("ground_truth", "final_answer", "target")),
        ({"prompt": "x", "answer": 4}, {}, ("x", "4")),
        ({"prompt": "x", "answer": 4.5}, {}, ("x", "4.5")),
        ({"prompt": "x", "answer": [ANSWER]}, {}, ("x", "4")),
        ({"messages": [USER, ANSWER]}, {}, ([USER], "4")),
        ({"messages": [USER], "answer": "4"}, {}, ([USER], "4")),
        ({"prompt": [{"role": "user", "content": PARTS, "name": None}], "answer": "4"}, {}, ([USER], "4")),
        ({"instruction": "Add.", "input": "2 + 2", "output": "4"}, {}, ("Add.\n2 + 2", "4")),
        ({"instruction": "Add 2 + 2.", "input": "", "output": "4"}, {}, ("Add 2 + 2.", "4")),
        ({"instruction": "Add.", "input": "2 + 2", "output": "4"}, {"prompt_column": "instruction"}, ("Add.", "4")),
        (
            {"instruction": "a", "output": "4", "system": "s", "history": [["q", "r"]]},
            {},
            (
                [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "r"},
                    {"role": "user", "content": "a"},
                ],
                "4",
            ),
        ),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, {}, ([USER], "4")),
        (
            {"conversations": [{"from": "human", "value": "2 + 2?", "role": None, "content": None}], "answer": 4},
            {},
            ([USER], "4"),
        ),
        ({"conversations": [USER, ANSWER], "system": "s"}, {}, ([{"role": "system", "content": "s"}, USER], "4")),
    ],
)
@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.parquet"])
def test_columns_are_the_named_ones_then_the_usual_ones(tmp_path, row, options, want, kind):
    if kind == "rows.parquet" and not (row.get("extra_info") is None and "d.e" not in row):
        row = {key: value for key, value in row.items() if value != {}}
    WRITERS[kind](tmp_path / kind, [row], hf.Dataset.from_list([row]))
    assert pairs(read(str(tmp_path / kind), **options)) == [want]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "x", "answer": None}, {}, "row 2 has nothing as 'answer'; an answer is text or a number"),
        ({"prompt": "x", "answer": " "}, {}, "row 2 has str ' ' as 'answer'"),
        ({"prompt": "x", "answer": ["4"]}, {}, r"row 2 has list \['4'\] as 'answer'"),
        ({"prompt": "x", "answer": float("nan")}, {}, "row 2 has float nan as 'answer'"),
        ({"prompt": "x", "answer": {"a": 1}}, {}, "row 2 has dict {'a': 1} as 'answer'"),
        ({"prompt": "x"}, {}, "row 2 has no column 'answer'"),
        ({"prompt": "x", "answer": "4", "a": {}}, {"answer_column": "a.b"}, "row 2 has no column 'a.b'"),
        ({"prompt": None, "answer": "4"}, {}, "row 2 has nothing as 'prompt'; a prompt is text or a list of messages"),
        ({"prompt": "\n", "answer": "4"}, {}, "row 2 has str .* as 'prompt'"),
        ({"prompt": 5, "answer": "4"}, {}, "row 2 has int 5 as 'prompt'"),
        ({"prompt": USER, "answer": "4"}, {}, "row 2 has dict .* as 'prompt'"),
        ({"prompt": [], "answer": "4"}, {}, "row 2 has an empty list of messages"),
        ({"prompt": ["x"], "answer": "4"}, {}, "row 2 has str 'x' as message 1; a message has a role and content"),
        ({"prompt": [USER, {"content": "x"}], "answer": "4"}, {}, "row 2 has no role in message 2"),
        ({"prompt": [{"role": "user"}], "answer": "4"}, {}, "row 2 has nothing as the content of message 1"),
        ({"prompt": [{"role": "user", "content": IMAGE}], "answer": "4"}, {}, "row 2 has 'image_url' in message 1"),
        ({"prompt": [{"role": "user", "content": ["x"]}], "answer": "4"}, {}, "row 2 has .* in message 1"),
        ({"prompt": [{**ANSWER, "tool_calls": [{}]}], "answer": "4"}, {}, "row 2 has tool calls in message 1"),
        ({"prompt": "x", "answer": "4", "tools": ["f"]}, {}, "row 2 has tools in 'tools'.*remove the column"),
        ({"prompt": "x", "answer": "4", "images": ["a.png"]}, {}, "row 2 has images in 'images'"),
    ],
)
def test_cells_that_cannot_be_what_they_are_asked_to_be_are_refused_with_their_row(tmp_path, row, options, message):
    path = write(tmp_path, {"prompt": "a", "answer": "1", "a": {"b": "1"}}, row)
    with pytest.raises(UsageError, match=f"--dataset={path}: {message}") as caught:
        read(path, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER]}, "row 1 has no answer in 'messages': its last message is not the assistant's"),
        ({"messages": [ANSWER]}, "row 1 has no messages before the answer"),
        ({"conversations": []}, "row 1 has an empty list of messages"),
        ({"instruction": "a", "input": 5, "output": "b"}, "row 1 has .*'instruction'; with 'input', it must be text"),
        ({"instruction": "a", "history": ["x"], "output": "b"}, "row 1 has str 'x' in 'history'"),
        ({"instruction": "a", "system": 5, "output": "b"}, "row 1 has int 5 as 'system'"),
        ({"a": {"b": 1}, "c": 2}, "no column prompt or question or problem; its columns are a.b, c"),
        ({"prompt": "a", "b": 1}, "no column answer or .* or reward_model.ground_truth.*; its columns are prompt, b"),
        ({"prompt": "a", "responses": ["x"], "scores": [1]}, "holds responses; --offline trains on them"),
    ],
)
def test_shapes_that_lack_something_are_refused(tmp_path, row, message):
    with pytest.raises(UsageError, match=message):
        read(write(tmp_path, row))


def test_prompts_alone_are_enough_where_no_reward_asks_for_answers(tmp_path):
    path = write(tmp_path, {"prompt": "a", "tests": ["x"]}, {"prompt": "b"})
    assert list(read(path, answer_required=False).rows) == [
        {"prompt": "a", "tests": ["x"]},
        {"prompt": "b"},
    ]
    with pytest.raises(UsageError, match="--answer_column=auto: the dataset has no column"):
        read(path)
    with pytest.raises(UsageError, match="--answer_column=gold: the dataset has no column gold"):
        read(path, answer_required=False, answer_column="gold")
    rows = [{"prompt": "a", "gold": [1, 2]}, {"prompt": "b", "gold": 3}, {"prompt": "c"}]
    own = read(write(tmp_path, *rows), answer_required=False, answer_column="gold")
    assert [row["answer"] for row in own.rows] == [[1, 2], "3", None]
    chats = read(write(tmp_path, {"messages": [USER]}, {"messages": [USER, ANSWER]}), answer_required=False)
    assert pairs(chats) == [([USER], None), ([USER], "4")]


def test_named_prompts_of_responses_on_file_are_sampled_anew(tmp_path):
    path = write(tmp_path, {"prompt": "a", "chosen": "x", "rejected": "y"})
    assert pairs(read(path, answer_required=False, prompt_column="prompt")) == [("a", None)]


# Supervised rows and prompts of generate


@pytest.mark.parametrize(
    ("row", "options", "want"),
    [
        ({"prompt": "2 + 2?", "completion": "4"}, {}, ("2 + 2?", "4")),
        ({"prompt": [USER], "completion": [ANSWER]}, {}, ([USER], "4")),
        ({"messages": [USER, ANSWER]}, {}, ([USER], "4")),
        ({"prompt": "2 + 2?", "prompt_id": 1, "messages": [USER, ANSWER]}, {}, ([USER], "4")),
        ({"prompt": "a", "completion": "b", "messages": [USER, ANSWER]}, {}, ("a", "b")),
        ({"messages": [USER, ANSWER, USER, ANSWER]}, {}, ([USER, ANSWER, USER], "4")),
        ({"instruction": "Add.", "input": "2 + 2", "output": "4"}, {}, ("Add.\n2 + 2", "4")),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, {}, ([USER], "4")),
        ({"question": "2 + 2?", "answer": "#### 4"}, {}, ("2 + 2?", "#### 4")),
        (OPENR1, {"answer_column": "solution"}, ("2 + 2?", "It is 4.")),
        ({"q": {"text": "a"}, "r": {"text": "b"}}, {"prompt_column": "q.text", "answer_column": "r.text"}, ("a", "b")),
    ],
)
def test_supervised_rows(tmp_path, row, options, want):
    dataset = load_completions(DataOptions(dataset=write(tmp_path, row), **options), 1)
    assert [(row["prompt"], row["completion"]) for row in dataset.rows] == [want]
    assert dataset.system_prompt == ""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": [ANSWER, USER, ANSWER]}, "row 1 has a completion of several turns"),
        ({"prompt": "a", "completion": [USER]}, "row 1 has no answer in 'completion'"),
        ({"prompt": "a", "completion": 5}, "row 1 has int 5 as 'completion'; a completion is text or a list"),
        ({"prompt": [{"role": "user", "content": IMAGE}], "completion": "a"}, "row 1 has 'image_url' in message 1"),
        ({"text": "a"}, "--answer_column=auto: the dataset has no column completion or response"),
    ],
)
def test_supervised_rows_that_cannot_be_used(tmp_path, row, message):
    with pytest.raises(UsageError, match=message):
        load_completions(DataOptions(dataset=write(tmp_path, row)), 1)


def test_completions_are_tokenized_with_their_end_and_bounded(tmp_path, tokenizer):
    rows = [{"prompt": "a", "completion": text} for text in ("four", "long " * 40, "")] + [
        {"prompt": "long " * 500, "completion": "four"}
    ]
    options = DataOptions(dataset=write(tmp_path, *rows))
    prompts, completions = tokenize_completions(load_completions(options, 1), tokenizer, options, 20, 7)
    assert completions[:] == [[*tokenizer.hub.encode("four").ids, 7], [7]] and prompts.dropped == 2
    assert [row["completion"] for row in prompts.rows] == ["four", ""] and len(prompts.tokens) == len(prompts) == 2
    with pytest.raises(UsageError, match="--max_completion_length=0: every completion of"):
        tokenize_completions(load_completions(options, 1), tokenizer, options, 0, 7)


def test_prompts_of_generate_are_lines_or_rows(tmp_path):
    (tmp_path / "asked.txt").write_text("one\n\ntwo\n", encoding="utf-8-sig")
    assert read_prompts(tmp_path / "asked.txt", DataOptions()) == ["one", "two"]
    path = write(tmp_path, {"prompt": "a", "responses": ["x"], "scores": [1]}, {"prompt": [USER]})
    assert read_prompts(pathlib.Path(path), DataOptions()) == ["a", [USER]]
    path = write(tmp_path, {"prompt": "a"}, {"prompt": 5})
    with pytest.raises(UsageError, match=f"--prompts={path}: row 2 has int 5 as 'prompt'"):
        read_prompts(pathlib.Path(path), DataOptions())
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UsageError, match="--prompts=.*empty.txt: the file has no prompts"):
        read_prompts(tmp_path / "empty.txt", DataOptions())


# Responses on file


def recorded(tmp_path, *rows, name="rows.jsonl", **options):
    WRITERS[name](tmp_path / name, rows, hf.Dataset.from_list(list(rows)) if name != "rows.jsonl" else None)
    dataset = read_recorded(DataOptions(dataset=str(tmp_path / name), **options))
    return [(row["prompt"], row["responses"], row["scores"]) for row in dataset.rows]


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ({"question": "a", "responses": [[ANSWER], "y"], "scores": [True, 0]}, ("a", ["4", "y"], [1.0, 0.0])),
        (
            {"prompt": "a", "chosen": "x", "rejected": "y", "score_chosen": 8.5, "score_rejected": 8},
            ("a", ["x", "y"], [8.5, 8]),
        ),
        (
            {"prompt": "a", "chosen": "x", "rejected": "y", "chosen_score": 2, "rejected_score": 1},
            ("a", ["x", "y"], [2, 1]),
        ),
        ({"prompt": "a", "chosen": "x", "rejected": "y", "score_chosen": None}, ("a", ["x", "y"], [1, 0])),
        (
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "5"}]},
            ([USER], ["4", "5"], [1, 0]),
        ),
        ({"prompt": None, "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, ([USER], ["4", "4"], [1, 0])),
        (
            {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
            ([USER], ["4"], [1]),
        ),
        ({"prompt": "a", "response": "x", "score": 0.5}, ("a", ["x"], [0.5])),
        ({"prompt": [USER], "completion": [ANSWER], "label": True}, ([USER], ["4"], [1.0])),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_shapes_of_responses_on_file(tmp_path, row, want, name):
    if name == "rows.parquet" and isinstance(row.get("responses"), list):
        row = {**row, "responses": ["4", "y"], "scores": [1.0, 0.0]}
    assert recorded(tmp_path, row, name=name) == [want]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv"])
def test_flat_rows_are_grouped_by_prompt(tmp_path, name):
    rows = [{"prompt": p, "response": r, "score": s} for p, r, s in (("b", "1", 0.5), ("a", "2", 1), ("b", "3", -1.0))]
    assert recorded(tmp_path, *rows, name=name) == [("b", ["1", "3"], [0.5, -1.0]), ("a", ["2"], [1.0])]


def test_held_out_responses_are_of_their_own_split(tmp_path, tokenizer):
    table = hf.Dataset.from_list([{"prompt": f"{i}", "chosen": "x", "rejected": "y"} for i in range(3)])
    hf.DatasetDict(train=table, test=table.select([2]), test_prefs=table.select([1])).save_to_disk(tmp_path / "saved")
    for split, given, want in (("train", "auto", ["0", "1"]), ("test", "auto", ["2"]), ("test", "test_prefs", ["1"])):
        options = DataOptions(dataset=str(tmp_path / "saved"), dataset_split=given)
        held = load_recorded(tokenizer, options, 50, 3, split, most=2)
        assert [row["prompt"] for row in held.rows] == want


def test_the_named_prompt_column_holds_for_responses_on_file(tmp_path):
    row = {"ask": {"text": "b"}, "chosen": [USER, ANSWER], "rejected": "y"}
    for other in ({}, {"prompt": "a"}):
        assert recorded(tmp_path, row | other, prompt_column="ask.text")[0][0] == "b"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "responses": ["x"], "scores": [1, 2]}, "row 2 has 1 responses and 2 scores"),
        ({"prompt": "a", "responses": "x", "scores": [1]}, "row 2 needs a list of responses and as many scores"),
        ({"prompt": "a", "responses": [], "scores": []}, "row 2 needs a list of responses"),
        ({"prompt": "a", "responses": ["x"], "scores": ["good"]}, "row 2 has str 'good' as a score"),
        ({"prompt": "a", "responses": ["x"], "scores": [1e300]}, "row 2 has float 1e.300 as a score"),
        ({"prompt": "a", "responses": [5], "scores": [1]}, "row 2 has int 5 as 'responses'"),
        ({"prompt": "a", "chosen": "x", "rejected": "y", "score_chosen": 1}, "row 2 has nothing as a score"),
        ({"prompt": "a", "chosen": "x", "rejected": None}, "row 2 has nothing as 'rejected'"),
        ({"chosen": "x", "rejected": "y"}, "row 2 has no prompt before its responses"),
        ({"prompt": "a"}, "row 2 has no responses, chosen or messages; its columns are prompt"),
        ({"prompt": "a", "response": "x", "score": 1}, "row 2 .* rows of one response each are not mixed with others"),
    ],
)
def test_responses_on_file_that_cannot_be_used_are_named_by_row(tmp_path, row, message):
    with pytest.raises(UsageError, match=message):
        recorded(tmp_path, {"prompt": "a", "responses": ["x"], "scores": [1]}, row)


def test_flat_rows_that_cannot_be_used_are_named_by_row(tmp_path):
    with pytest.raises(UsageError, match="row 2 has nothing as a score"):
        recorded(
            tmp_path, {"prompt": "a", "response": "x", "score": 1}, {"prompt": "a", "response": "x", "score": None}
        )


def test_real_scored_responses_are_all_there_without_a_system_prompt(shared, tokenizer, capsys):
    """Rows of shared/data/scored: none vanishes under a system prompt that nobody gave, and the line counts all."""
    path = shared / "scored" / "gsm8k_scored.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:48]]
    options = DataOptions(dataset=str(path), max_prompt_length=256)
    prompts = load_recorded(tokenizer, options, 4000, 3, most=48)
    plain = [tokenizer.render([{"role": "user", "content": row["prompt"]}]) for row in rows]
    short = [len(tokenizer.hub.encode(text, add_special_tokens=False).ids) <= 256 for text in plain]
    assert len(prompts) == sum(short) > 40 and prompts.dropped == 48 - sum(short)
    first = next(row for row, fits in zip(rows, short, strict=True) if fits)
    assert prompts.rows[0]["responses"] == first["responses"] and prompts.rows[0]["scores"] == first["scores"]
    want = [[*tokenizer.hub.encode(text).ids, 3] for text in first["responses"]]
    assert prompts.rows[0]["response_tokens"] == want
    line = (
        f"data: {4 * sum(short)} responses of {sum(short)} prompts; dropped as too long: {48 - sum(short)} prompts, 0"
    )
    assert line in capsys.readouterr().err
    under = load_recorded(tokenizer, DataOptions(dataset=str(path), system_prompt="Think. " * 20), 4000, 3, most=48)
    assert len(under) < len(prompts)


def test_prompts_and_responses_that_are_too_long_are_counted_separately(tmp_path, tokenizer, capsys):
    long = "long " * 100
    path = write(
        tmp_path,
        {"prompt": "a", "responses": [long, "x", "y"], "scores": [0, 1, 2]},
        {"prompt": "a", "responses": [long], "scores": [0]},
        {"prompt": long * 10, "responses": ["x"], "scores": [0]},
        {"prompt": "b", "responses": ["z"], "scores": [3]},
    )
    prompts = load_recorded(tokenizer, DataOptions(dataset=path), 50, 3)
    assert [row["scores"] for row in prompts.rows] == [[1, 2], [3]] and prompts.dropped == 2
    assert "data: 3 responses of 2 prompts; dropped as too long: 2 prompts, 2 responses\n" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--max_completion_length=1: every response of"):
        load_recorded(tokenizer, DataOptions(dataset=path), 1, 3)


# Bounds


class Counting(Tokenizer):
    """A tokenizer of one token a character that remembers how much it was given at once."""

    def __init__(self):
        object.__setattr__(self, "given", [])
        object.__setattr__(self, "hub", tokenizers.Tokenizer(tokenizers.models.BPE()))

    def render(self, messages):
        return messages[-1]["content"]

    def tokens_of(self, texts, add_special_tokens):
        self.given.append((len(texts), sum(map(len, texts))))
        return [[ord(char) for char in text] for text in texts]


def test_texts_are_tokenized_in_bounded_chunks_with_a_line_of_progress(monkeypatch, capsys):
    monkeypatch.setattr(data, "PROGRESS_DELAY", 0.0)
    counting = Counting()
    rows = [{"prompt": f"{i:03}"} for i in range(5_000)]
    prompts = tokenize(Dataset("many", rows, ""), counting, DataOptions())
    assert max(rows for rows, _ in counting.given) == data.CHUNK_ROWS and len(prompts) == 5_000
    assert prompts.tokens[4_999] == [52, 57, 57, 57] and prompts.tokens[-5000] == [48, 48, 48]
    assert "tokenizing many:" in capsys.readouterr().err
    assert prompts.tokens.values.itemsize * len(prompts.tokens.values) < 20 * 5_000


def test_a_prompt_of_a_hundred_megabytes_is_dropped_without_being_tokenized_whole(tmp_path):
    path = write(tmp_path, {"prompt": "a", "answer": "1"}, {"prompt": "x" * 100_000_000, "answer": "1"})
    counting, options = Counting(), DataOptions(dataset=path, system_prompt="")
    prompts = tokenize(load_dataset(options, "train"), counting, options)
    assert len(prompts) == 1 and prompts.dropped == 1
    assert max(characters for _, characters in counting.given) <= data.PIECE


def test_a_long_prompt_of_few_tokens_is_kept(monkeypatch, tokenizer):
    """Only tokens count: pieces of a text are counted until there are too many, and these never are."""
    monkeypatch.setattr(data, "PIECE", 64)
    monkeypatch.setattr(data, "USUAL_CHARACTERS", 1)
    text = "Anna has 3 apples. " * 12
    count = len(tokenizer.encode([tokenizer.render([{"role": "user", "content": text}])])[0])
    assert len(text) > count > 64
    prompts = tokenize(Dataset("x", [{"prompt": text}], ""), tokenizer, DataOptions(max_prompt_length=count))
    assert len(prompts) == 1 and len(prompts.tokens[0]) == count


def test_rows_are_new_dictionaries_each_time_and_slices_are_views(tmp_path):
    rows = read(write(tmp_path, *({"prompt": f"{i}", "answer": "1", "x": [i]} for i in range(6)))).rows
    rows[2]["x"].append("changed")
    assert rows[2]["x"] == [2] and [row["prompt"] for row in rows[1:5][1:3]] == ["2", "3"] and len(rows[:99]) == 6
    assert rows[-1]["prompt"] == "5"
    with pytest.raises(IndexError):
        rows[6]


def test_ragged_lists_of_tokens():
    lists = [[1, 2], [], [3]]
    ragged = Ragged()
    for ids in lists:
        ragged.append(ids)
    assert ragged[:] == lists == list(ragged) and ragged.only(np.array([0, 2]))[:] == [[1, 2], [3]]
    kept = PromptSet([{"prompt": str(number)} for number in range(3)], ragged, 5).only(np.array([1, 2]))
    assert kept.dropped == 6 and len(kept) == 2 and list(kept.rows) == [{"prompt": "1"}, {"prompt": "2"}]


def test_worked_examples_of_columns():
    result = doctest.testmod(columns)
    assert result.attempted > 0 and result.failed == 0


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,prompt,answer\na,b,1\n")
    with pytest.raises(UsageError, match=r"^--dataset=.*rows.csv: has two columns 'prompt'; rename one of them$"):
        read(str(tmp_path / "rows.csv"))


def test_paths_of_nothing_are_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("data/trian", "./train", "rows.txt", "/data/mine"):
        with pytest.raises(UsageError, match=f"^--dataset={name}: no such file or folder$"):
            read(name)


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_tables_without_rows_say_so(tmp_path, name):
    if name.endswith("csv"):
        (tmp_path / name).write_text("prompt,answer\n")
    else:
        hf.Dataset.from_dict({"prompt": [], "answer": []}).to_parquet(tmp_path / name)
    with pytest.raises(UsageError, match=f"{name}: .*has no rows$"):
        read(str(tmp_path / name))


def test_a_row_that_gives_a_key_twice_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a?", "prompt": "b?", "answer": "1"}\n')
    with pytest.raises(UsageError, match="rows.jsonl:1: .*'prompt' is given twice"):
        read(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("role", ["usr", "tool", "hooman"])
def test_unknown_roles_are_refused(tmp_path, role):
    chat = [{"role": "user", "content": "a?"}, {"role": role, "content": "b"}, {"role": "assistant", "content": "1"}]
    with pytest.raises(UsageError, match=f"{role}|tool calls"):
        read(write(tmp_path, {"messages": chat}))


def test_responses_are_not_looked_for_in_generated_problems():
    with pytest.raises(UsageError, match="builtin:arithmetic: has no responses"):
        data.named_rows(DataOptions(dataset="builtin:arithmetic", offline=True), "train")
