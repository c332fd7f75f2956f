"""config.json: what every published one says is read as transformers reads it, and nonsense is one line."""

import dataclasses
import json
import time

import numpy as np
import pytest
from conftest import ROOT

from minigrpo.config import UsageError
from minigrpo.model.hub_config import check_lengths, parse_config, parse_rope, read_config
from minigrpo.model.qwen import ModelConfig
from minigrpo.model.rope import RopeScaling, attention_factor, inverse_frequencies
from minigrpo.model.weights import config_json

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

with_yarn = pytest.mark.skipif(
    "rope_scaling" not in {field.name for field in dataclasses.fields(ModelConfig)},
    reason="ModelConfig has no field rope_scaling yet",
)


def refused(change, source="config.json"):
    with pytest.raises(UsageError) as caught:
        parse_config({**QWEN3, **change}, source)
    text = str(caught.value)
    assert text.startswith(f"{source}: ") and "\n" not in text and len(text) < 500
    return text


WRONG = ["x", [], {}, -1, 0, 1.5, True, False, "8", [8], 2.0, float("nan"), 10**400]
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.parametrize("value", WRONG, ids=lambda value: f"{value!r:.12}")
@pytest.mark.parametrize("name", [*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"])
def test_sizes_of_the_wrong_kind_are_refused(name, value):
    assert f"{name} is" in refused({name: value})


NO_NUMBERS = ["x", [], {}, -1, 0, float("nan"), float("inf"), float("-inf"), True, "1e-6", [1e-6], 10**400]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: f"{value!r:.12}")
@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps"])
def test_numbers_of_the_wrong_kind_are_refused(name, value):
    assert f"{name} is" in refused({name: value})


NONSENSE = {
    "eps above 1": ({"rms_norm_eps": 1.0}, "rms_norm_eps is 1.0; it must be a number between 0 and 1"),
    "theta 1": ({"rope_theta": 1.0}, "rope_theta is 1.0; it must be a number above 1"),
    "tied x": ({"tie_word_embeddings": "x"}, "tie_word_embeddings is 'x'; it must be true or false"),
    "tied 1": ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
    "tied list": ({"tie_word_embeddings": []}, "tie_word_embeddings is []"),
    "sliding x": ({"use_sliding_window": "x"}, "use_sliding_window is 'x'"),
    "sliding": ({"use_sliding_window": True}, "use_sliding_window=true is not supported"),
    "layer types": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
    "layer types 5": ({"layer_types": 5}, "layer_types is 5"),
    "bias": ({"attention_bias": True}, "attention_bias=true is not supported for qwen3"),
    "bias x": ({"attention_bias": "x"}, "attention_bias is 'x'"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    "no activation": ({"hidden_act": None}, "hidden_act None is not supported"),
    "another model": ({"model_type": "llama"}, "model_type 'llama' is not supported"),
    "no model": ({"model_type": None}, "model_type None is not supported"),
    "a list of models": ({"model_type": ["qwen3"]}, "model_type ['qwen3'] is not supported"),
    "a mixture of experts": ({"model_type": "qwen3_moe", "num_experts": 128}, "model_type 'qwen3_moe'"),
    "experts": ({"num_experts": 8}, "num_experts=8 is not understood"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple of"),
    "an odd head": ({"head_dim": 15}, "head_dim 15 is odd"),
    "10^12 layers": ({"num_hidden_layers": 10**12}, "num_hidden_layers 1000000000000"),
    "10^5 layers": ({"num_hidden_layers": 10**5}, "no model has more than 10000 layers"),
    "a huge vocabulary": ({"vocab_size": 10**12}, "parameters"),
    "a huge layer": ({"intermediate_size": 10**12}, "parameters"),
    "huge heads": ({"head_dim": 10**12}, "parameters"),
    "fp8": (
        {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}},
        "a quantized checkpoint (quantization_config",
    ),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "'bitsandbytes'"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method 'gptq'"),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, "use the original one in bfloat16"),
    "no method": ({"quantization_config": {"bits": 4}}, "quant_method 'unknown'"),
    "quantization x": ({"quantization_config": "x"}, "quant_method 'x'"),
    "quantization 5": ({"quantization_config": 5}, "quant_method 5"),
    "compressed": ({"compression_config": {"format": "int-quantized"}}, "a quantized checkpoint (compression_config"),
    "quantization of next year": ({"quantization_v2": {"bits": 1}}, "quantization_v2={'bits': 1} is not understood"),
    "rope of next year": ({"rope_wavelets": 3}, "rope_wavelets=3 is not understood"),
    "partial rope": ({"rotary_pct": 0.5}, "rotary_pct=0.5 is not understood"),
    "soft caps": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not understood"),
    "scaled logits": ({"logits_scaling": 8.0}, "logits_scaling=8.0 is not understood"),
    "adapters inside": ({"lora_adapter": {"r": 8}}, "lora_adapter={'r': 8} is not understood"),
    "scaling x": ({"rope_scaling": "x"}, "rope_scaling is 'x'; it must be an object"),
    "scaling list": ({"rope_scaling": ["a"]}, "rope_scaling is ['a']"),
    "scaling 5": ({"rope_scaling": 5}, "rope_scaling is 5"),
    "scaling true": ({"rope_scaling": True}, "rope_scaling is True"),
    "parameters x": ({"rope_parameters": "x"}, "rope_parameters is 'x'"),
    "parameters 5": ({"rope_parameters": 5}, "rope_parameters is 5"),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not supported"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "only 'default' and 'yarn' are"),
    "llama3": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "rope type 'llama3'"),
    "longrope": ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope'"),
    "type 5": ({"rope_scaling": {"rope_type": 5}}, "rope type 5 is not supported"),
    "type list": ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope type ['yarn'] is not supported"),
    "two types": ({"rope_scaling": {**YARN, "type": "default"}}, "rope_type 'yarn' and type 'default'"),
    "default with a factor": ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, "has factor=4.0"),
    "sections": ({"rope_scaling": {"type": "default", "mrope_section": [16, 24]}}, "mrope_section=[16, 24]"),
    "a setting of YaRN's next year": ({"rope_scaling": {**YARN, "curl": 2}}, "rope_scaling has curl=2"),
    "by layer types": ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "has full_attention="),
    "half the head": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "has partial_rotary_factor=0.5"),
    "YaRN without factor": ({"rope_scaling": {"rope_type": "yarn"}}, "field 'factor' is missing"),
    "thetas that differ": (
        {"rope_parameters": {"rope_theta": 10000.0}},
        "rope_theta is 1e+06 in one place and 10000 in",
    ),
    "three thetas": (
        {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "default", "rope_theta": 1e4}},
        "rope_theta is 1e+06 in one place and 10000 in another",
    ),
    "theta of the table": ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta is 'x'"),
    "theta NaN of the table": ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta is nan"),
    "scaling in one place": (
        {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}},
        "contradict each other",
    ),
    "scaling in the other": ({"rope_parameters": YARN, "rope_scaling": {"type": "default"}}, "contradict each other"),
    "two factors": ({"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 2.0}}, "contradict each other"),
    "two contexts": (
        {"rope_scaling": YARN, "original_max_position_embeddings": 64},
        "original_max_position_embeddings is 64 in one place and 128 in another",
    ),
}


@pytest.mark.parametrize("change, message", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_one_line(change, message):
    begun = time.monotonic()
    assert message in refused(change)
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize(
    "value", ["x", [], {}, True, float("nan"), float("inf"), -1, 0, "4"], ids=lambda v: f"{v!r:.12}"
)
@pytest.mark.parametrize(
    "name", ["factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale"]
)
def test_settings_of_yarn_of_the_wrong_kind_are_refused(name, value):
    assert f"{name} is" in refused({"rope_scaling": {**YARN, name: value}})


def test_settings_of_yarn_that_contradict_each_other_are_refused():
    assert "beta_fast 1 of rope_scaling is less than its beta_slow 2" in refused(
        {"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 2}}
    )
    assert "truncate is 'x'" in refused({"rope_scaling": {**YARN, "truncate": "x"}})
    assert "factor is 0.5" in refused({"rope_scaling": {**YARN, "factor": 0.5}})


@pytest.mark.parametrize("name", [*SIZES, "rms_norm_eps", "rope_theta"])
def test_missing_fields_are_named(name):
    without = {key: value for key, value in QWEN3.items() if key != name}
    for raw in (without, {**without, name: None}):
        with pytest.raises(UsageError, match=f"config.json: field '{name}' is missing"):
            parse_config(raw, "config.json")


HARMLESS = {
    "nulls": dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config", "layer_types", "sliding_window")),
    "empty": {
        "rope_scaling": {},
        "quantization_config": {},
        "num_experts": 0,
        "rope_wavelets": False,
        "layer_types": [],
    },
    "settings of others": {
        "unsloth_version": "2025.9",
        "torch_dtype": "bfloat16",
        "max_window_layers": 28,
        "x": {"y": 1},
    },
    "transformers 5": {
        "rope_theta": None,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "layer_types": ["full_attention"] * 2,
        "dtype": "bfloat16",
    },
    "both places": {"rope_parameters": {"rope_theta": 1000000, "type": "default", "partial_rotary_factor": 1.0}},
    "default spelt twice": {"rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": None}},
    "no window": {"use_sliding_window": False, "sliding_window": 4096},
    "whole eps": {"rms_norm_eps": 1e-06, "max_position_embeddings": 512},
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_what_changes_nothing_passes(change):
    assert parse_config({**QWEN3, **change}, "config.json") == parse_config(QWEN3, "config.json")


def test_what_is_left_out_is_as_in_transformers():
    transformers = pytest.importorskip("transformers")
    raw = {key: value for key, value in QWEN3.items() if key not in ("head_dim", "tie_word_embeddings")}
    del raw["max_position_embeddings"]
    for kind, theirs in (("qwen3", transformers.Qwen3Config), ("qwen2", transformers.Qwen2Config)):
        ours, wanted = parse_config({**raw, "model_type": kind}, "x"), theirs(**{**raw, "model_type": kind})
        head_dim = getattr(wanted, "head_dim", None) or wanted.hidden_size // wanted.num_attention_heads
        assert ours.head_dim == head_dim and ours.tie_word_embeddings == wanted.tie_word_embeddings
        assert ours.max_position_embeddings == wanted.max_position_embeddings
        assert ours.rope_theta == wanted.rope_parameters["rope_theta"]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_config_that_transformers_writes_is_read(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    build = transformers.Qwen3Config if kind == "qwen3" else transformers.Qwen2Config
    settings = {key: value for key, value in QWEN3.items() if key not in ("model_type", "rope_theta", "architectures")}
    if kind == "qwen2":
        settings |= {"head_dim": 4}
    build(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **settings).save_pretrained(tmp_path)
    assert read_config(tmp_path / "config.json") == parse_config(QWEN3 | settings | {"model_type": kind}, "x")


def test_the_published_sizes_are_read():
    families = json.loads((ROOT / "minigrpo" / "builtin" / "families.json").read_text())
    for name, raw in families.items():
        assert parse_config(raw, name).num_hidden_layers == raw["num_hidden_layers"]
    assert parse_config(QWEN3 | {"num_hidden_layers": 200, "hidden_size": 16384, "intermediate_size": 65536}, "x")


FILES = {
    "nested": ("[" * 100_000, "nested too deeply"),
    "nested objects": ('{"a":' * 100_000, "nested too deeply"),
    "a list": ("[]", "must hold a JSON object"),
    "a number": ("5", "must hold a JSON object"),
    "torn": ('{"model_type": "qwen3"', "not readable JSON"),
    "empty": ("", "not readable JSON"),
    "twice": ('{"model_type": "qwen3", "rope_theta": 1e4, "rope_theta": 1e6}', "'rope_theta' is given twice"),
    "twice inside": ('{"rope_scaling": {"factor": 1, "factor": 4}}', "'factor' is given twice"),
    "a long number": ('{"vocab_size": ' + "9" * 5000 + "}", "not readable JSON"),
    "no model": ("{}", "model_type None"),
}


@pytest.mark.parametrize("text, message", FILES.values(), ids=FILES)
def test_broken_files_are_one_line(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config\.json: ") as caught:
        read_config(tmp_path / "config.json")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_one_line(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UsageError, match=r"config\.json: not readable JSON .not UTF-8"):
        read_config(tmp_path / "config.json")
    with pytest.raises(UsageError, match=r"config\.json: not a readable config.json"):
        read_config(tmp_path / "nowhere" / "config.json")
    with pytest.raises(UsageError, match="not readable JSON"):
        read_config(tmp_path)


# YaRN


SCALINGS = [
    {},
    {"beta_fast": 16.0, "beta_slow": 2.0},
    {"mscale": 0.7, "mscale_all_dim": 1.1},
    {"mscale": 1.0},
    {"truncate": False},
    {"truncate": False, "beta_fast": 2.0, "beta_slow": 2.0},
    {"attention_factor": 0.8782488562869419},
]
MODELS = {
    "Qwen3": (1e6, 128, 32768, 4.0),
    "Qwen2.5-0.5B": (1e6, 64, 32768, 4.0),
    "Qwen2.5-7B, half": (1e6, 128, 32768, 2.0),
    "2507": (5e6, 128, 262144, 4.0),
    "a small one": (1e4, 16, 64, 8.0),
    "no stretch": (1e4, 32, 2048, 1.0),
}


@pytest.mark.parametrize("extra", SCALINGS, ids=str)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_yarn_is_that_of_transformers(model, extra):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta, head_dim, original, factor = model
    table = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **extra}
    positions = int(original * factor)
    theirs = transformers.Qwen3Config(
        head_dim=head_dim, max_position_embeddings=positions, rope_parameters={**table, "rope_theta": theta}
    )
    wanted, sharpened = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    read, scaling = parse_rope({**QWEN3, "rope_theta": theta, "rope_scaling": table}, "config.json")
    assert scaling and read == theta and scaling.positions == positions
    ours = inverse_frequencies(head_dim, read, scaling)
    assert ours.dtype == np.float32 and ours.shape == (head_dim // 2,)
    np.testing.assert_allclose(ours, wanted.numpy(), rtol=5e-7)
    assert attention_factor(scaling) == pytest.approx(sharpened, rel=1e-12)


def test_plain_frequencies_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    for theta, head_dim in ((1e6, 128), (1e4, 64)):
        config = transformers.Qwen3Config(
            head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta}
        )
        rotary = transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding(config)
        np.testing.assert_allclose(inverse_frequencies(head_dim, theta), rotary.inv_freq.numpy(), rtol=5e-7)
    assert attention_factor(None) == 1.0


CONTEXT = {"original_max_position_embeddings": 32768}
PUBLISHED = {
    "Qwen2.5": (
        {
            "max_position_embeddings": 32768,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        },
        RopeScaling(4.0, 32768),
    ),
    "Qwen3": (
        {
            "max_position_embeddings": 40960,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
        RopeScaling(4.0, 32768),
    ),
    "R1-0528-Qwen3-8B": (
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "attn_factor": None,
            },
        },
        RopeScaling(4.0, 32768),
    ),
    "transformers 5": (
        {
            "rope_theta": None,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_theta": 1e6,
                "rope_type": "yarn",
                "factor": 4,
                "original_max_position_embeddings": 32768,
            },
        },
        RopeScaling(4.0, 32768),
    ),
    "no original context": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, RopeScaling(2.0, 512)),
    "beside": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 256},
        RopeScaling(2.0, 256),
    ),
    "in both places": ({"rope_scaling": YARN, "rope_parameters": YARN}, RopeScaling(4.0, 128)),
    "plain": ({}, None),
}


@pytest.mark.parametrize("change, wanted", PUBLISHED.values(), ids=PUBLISHED)
def test_yarn_is_read_as_published(change, wanted):
    assert parse_rope({**QWEN3, **change}, "config.json") == (1e6, wanted)


@with_yarn
@pytest.mark.parametrize("change, wanted", PUBLISHED.values(), ids=PUBLISHED)
def test_yarn_is_written_as_it_was_read(change, wanted):
    config = parse_config({**QWEN3, **change}, "config.json")
    written = config_json(config, (1,), np.float32)
    assert parse_config(written, "written") == config
    assert written.get("rope_scaling", {}).get("factor") == (wanted.factor if wanted else None)


# Lengths


@pytest.mark.parametrize("limits", [(256, 256), (1, 1), (500, 12)])
def test_lengths_within_the_positions_pass(limits):
    check_lengths(parse_config(QWEN3, "x"), *limits)


@pytest.mark.parametrize("limits", [(256, 257), (512, 1), (2000, 1500), (1, 512)])
def test_lengths_beyond_the_positions_are_refused(limits):
    with pytest.raises(UsageError) as caught:
        check_lengths(parse_config(QWEN3, "x"), *limits)
    text = str(caught.value)
    assert f"--max_prompt_length={limits[0]}" in text and "512 positions" in text and "\n" not in text


@with_yarn
def test_positions_that_yarn_adds_count():
    stretched = parse_config({**QWEN3, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "x")
    check_lengths(stretched, 1024, 1024)
    with pytest.raises(UsageError, match="2048 positions"):
        check_lengths(stretched, 1024, 1025)
