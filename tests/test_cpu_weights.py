"""Checkpoints: strict reading with every fault named, sharded reading, atomic writing."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT, mesh_of
from safetensors.numpy import load_file, save_file

from minigrpo.config import UsageError
from minigrpo.model import weights
from minigrpo.model.hub_config import read_config
from minigrpo.model.qwen import init_params
from minigrpo.model.weights import export, find_checkpoint, load_params, random_params, write_tensors
from minigrpo.runtime import mesh as mesh_module

BUILTIN = ROOT / "minigrpo" / "builtin"


@pytest.fixture
def folder(tiny_config, tiny_params, tmp_path):
    export(tmp_path / "model", BUILTIN, tiny_params, tiny_config, (1, 2), np.float32)
    return tmp_path / "model"


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def load(folder, mesh=(1, 1)):
    return load_params(folder, read_config(folder / "config.json"), mesh_of(*mesh))


@pytest.mark.parametrize("mesh", [(1, 1), (4, 2), (2, 4), (8, 1)])
def test_round_trip_on_any_mesh(folder, tiny_config, tiny_params, mesh):
    assert read_config(folder / "config.json") == tiny_config
    loaded = load(folder, mesh)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), loaded, tiny_params)
    assert loaded["layers"]["mlp"]["up"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tp")


def test_each_device_reads_only_its_slice(folder, monkeypatch):
    """No slice read may be larger than the parameter's shard, one layer at a time."""
    read = []
    original = weights.read_layer
    monkeypatch.setattr(weights, "read_layer", lambda *args: read.append(original(*args)) or read[-1])
    loaded = load(folder, (4, 2))
    largest = max(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(loaded))
    assert max(part.nbytes for part in read) <= largest


def test_every_fault_is_named_at_once(folder):
    def damage(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros(3, np.float32)
        tensors["model.norm.weight"] = np.zeros(5, np.float32)

    rewrite(folder, damage)
    save_file({"model.embed_tokens.weight": np.zeros((264, 32), np.float32)}, folder / "more.safetensors")
    with pytest.raises(UsageError) as caught:
        load(folder)
    text = str(caught.value)
    assert text.count("\n") == 0 and "4 faults" in text
    for part in (
        "missing model.layers.1.mlp.up_proj.weight",
        "unexpected model.layers.9.mlp.up_proj.weight",
        "model.norm.weight has shape [5], not [32]",
        "model.embed_tokens.weight is in both model.safetensors and more.safetensors",
    ):
        assert part in text


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"\xff" * 64 + b[64:], lambda b: b""])
def test_torn_files_are_named(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match=r"model\.safetensors: not a complete safetensors file"):
        load(folder)


def test_a_tied_head_may_be_stored_too(folder, tiny_params):
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), load(folder), tiny_params)


def test_bfloat16_files_are_read_exactly(tiny_config, tiny_params, tmp_path):
    export(tmp_path / "half", BUILTIN, tiny_params, tiny_config, (1,), ml_dtypes.bfloat16)
    want = np.asarray(tiny_params["embed"]).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(load(tmp_path / "half")["embed"], want)


def test_large_models_are_split_with_an_index(tiny_config, tiny_params, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    export(tmp_path / "big", BUILTIN, tiny_params, tiny_config, (1,), np.float32)
    files = sorted(path.name for path in (tmp_path / "big").glob("*.safetensors"))
    index = json.loads((tmp_path / "big" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(files) > 2 and set(index.values()) == set(files) and f"-of-{len(files):05d}" in files[0]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), load(tmp_path / "big"), tiny_params)


def test_a_failed_export_leaves_the_previous_one(folder, tiny_config, tiny_params, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(UsageError, match="No space"):
        export(folder, BUILTIN, init_params(tiny_config, jax.random.key(9)), tiny_config, (1,), np.float32)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("builtin:huge", "no such built-in model"),
        ("./nowhere", "neither a folder here nor a Hub id"),
        ("Qwen/NotInTheCache", "not in the Hub cache"),
    ],
)
def test_checkpoints_that_cannot_be_found(name, message):
    with pytest.raises(UsageError, match=message):
        find_checkpoint(name)


def test_random_weights_are_the_same_numbers_in_every_dtype(tiny_config):
    mesh = mesh_of(2, 1)
    whole, half = (random_params(tiny_config, mesh, 3, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(half), strict=True):
        np.testing.assert_array_equal(a.astype(jnp.bfloat16), b)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"none/x.safetensors: cannot be written"):
        write_tensors(tmp_path / "none" / "x.safetensors", {"a": np.zeros(2)})


# Which files count, and what they hold


def split(folder):
    """The folder's tensors in two files with an index, as large checkpoints are."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    weight_map = {name: file for file, own in files.items() for name in own}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_the_index_says_which_files_count(folder, tiny_params):
    """As transformers: leftovers of other formats and of an older save are beside, some of them torn."""
    weight_map = split(folder)
    save_file({"model.norm.weight": np.zeros(32, np.float32)}, folder / "consolidated.safetensors")
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"torn")
    loaded = load(folder)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), loaded, tiny_params)
    twice = load_file(folder / "model-00001-of-00002.safetensors") | {"model.norm.weight": np.zeros(32, np.float32)}
    save_file(twice, folder / "model-00001-of-00002.safetensors")
    assert weight_map["model.norm.weight"] == "model-00002-of-00002.safetensors"
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), load(folder), tiny_params)


def test_a_whole_file_with_its_index_and_another_format_beside(folder, tiny_params):
    names = list(load_file(folder / "model.safetensors"))
    write_index(folder, dict.fromkeys(names, "model.safetensors"))
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), load(folder), tiny_params)


@pytest.mark.parametrize(
    "value", [None, [], {}, "x", 5, {"a": 5}, {"a": "../b.safetensors"}, {"a": "/etc/b"}, {"a": ""}]
)
def test_an_index_that_is_none_is_one_line(folder, value):
    write_index(folder, value)
    with pytest.raises(UsageError, match=r"index.json: weight_map must give every tensor the name of a file") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_files_and_tensors_that_the_index_names_in_vain_are_named(folder):
    weight_map = split(folder)
    write_index(folder, weight_map | {"model.norm.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(UsageError, match=r"1 fault in its tensors: missing model.norm.weight"):
        load(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model-00002-of-00002.safetensors: not there, though .*index.json names it"):
        load(folder)


def test_leftovers_of_older_versions_are_ignored(folder, tiny_params):
    names = ["model.rotary_emb.inv_freq", *(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(9))]
    rewrite(folder, lambda t: t.update({name: np.zeros(8, np.int16) for name in names}))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), load(folder), tiny_params)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_no_numbers_are_named(folder, name, value, dtype):
    def spoil(tensors):
        tensors[name] = tensors[name].astype(dtype)
        tensors[name].flat[-1] = value

    rewrite(folder, spoil)
    with pytest.raises(UsageError, match=f"model.safetensors: {name} holds NaN or infinite weights") as caught:
        load(folder, (2, 1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [np.int16, np.int8, np.uint8, np.int64, np.bool_, ml_dtypes.float8_e4m3fn])
def test_weights_of_another_kind_are_named(folder, dtype):
    name = "model.layers.0.mlp.gate_proj.weight"
    rewrite(folder, lambda t: t.update({name: np.ones((64, 32), np.int8).astype(dtype)}))
    with pytest.raises(UsageError, match=f"1 fault in its tensors: {name} holds [A-Z0-9_]+, not F64, F32, F16, BF16"):
        load(folder)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_floats_are_read(folder, tiny_params, dtype):
    rewrite(folder, lambda t: t.update({name: value.astype(dtype) for name, value in t.items()}))
    want = np.asarray(tiny_params["embed"]).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(load(folder)["embed"], want)


def test_many_faults_are_counted_and_the_first_are_named(folder):
    extra = {f"model.layers.{i}.self_attn.q_proj.weight_scale_inv": np.zeros(1, np.float32) for i in range(5000)}
    rewrite(folder, lambda t: t.update(extra))
    with pytest.raises(UsageError, match=r"5000 faults in its tensors: .*; and 4992 more") as caught:
        load(folder)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_an_exported_model_keeps_the_template_that_the_run_was_given(tiny_config, tiny_params, tmp_path):
    text = "{{ messages[0].content }}\n"
    export(tmp_path / "own", BUILTIN, tiny_params, tiny_config, (1,), np.float32, chat_template=text)
    assert (tmp_path / "own" / "chat_template.jinja").read_bytes() == text.encode()
    export(tmp_path / "plain", BUILTIN, tiny_params, tiny_config, (1,), np.float32)
    assert not (tmp_path / "plain" / "chat_template.jinja").exists()
    assert (tmp_path / "plain" / "tokenizer.json").exists()


def test_an_exported_model_names_every_end_where_others_look(tiny_config, tiny_params, tmp_path):
    """vLLM and transformers stop by generation_config.json, which a base's names one end only in."""
    source = tmp_path / "base"
    source.mkdir()
    (source / "generation_config.json").write_text('{"eos_token_id": 1, "top_k": 20}')
    export(tmp_path / "model", source, tiny_params, tiny_config, (1, 2), np.float32)
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text()) == {
        "eos_token_id": [1, 2],
        "top_k": 20,
    }


def test_errors_begin_with_the_flag_that_was_given():
    with pytest.raises(UsageError, match=r"^--base_model=./nowhere: neither a folder here"):
        find_checkpoint("./nowhere", "--base_model=./nowhere")


@pytest.mark.parametrize("spec", [("tp", "fsdp"), ("fsdp", None), (None, "tp"), (("fsdp", "tp"),)])
@pytest.mark.parametrize("most", [1, 400, 10**6])
def test_arrays_are_collected_in_pieces(spec, most, monkeypatch):
    """Pieces that divide the rows of a device's part, that do not, and one row alone."""
    monkeypatch.setattr(mesh_module, "PIECE_BYTES", most)
    x = np.arange(56 * 12, dtype=np.float32).reshape(56, 12)
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh_of(4, 2), jax.sharding.PartitionSpec(*spec)))
    np.testing.assert_array_equal(mesh_module.collect_pieces(placed), x)
