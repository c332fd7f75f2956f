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
from minigrpo.model.qwen import init_params, read_config
from minigrpo.model.weights import export, find_checkpoint, load_params, random_params, write_tensors

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
    with pytest.raises(OSError, match="No space"):
        export(folder, BUILTIN, init_params(tiny_config, jax.random.key(9)), tiny_config, (1,), np.float32)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"rope_theta": None, "rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn' is not supported"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple of num_key_value_heads 3"),
        ({"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ],
)
def test_configs_of_other_architectures_are_refused(folder, change, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match="config.json") as caught:
        read_config(path)
    assert message in str(caught.value)


def test_missing_config_fields_are_named(folder):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    del raw["rms_norm_eps"]
    path.write_text(json.dumps(raw))
    with pytest.raises(UsageError, match="'rms_norm_eps' is missing"):
        read_config(path)


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
    with pytest.raises(OSError, match=r"none/x.safetensors: cannot be written"):
        write_tensors(tmp_path / "none" / "x.safetensors", {"a": np.zeros(2)})
