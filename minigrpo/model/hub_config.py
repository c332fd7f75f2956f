"""config.json of a Hugging Face checkpoint -> ModelConfig, with every field that cannot be refused by name."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minigrpo.config import UsageError
from minigrpo.data.json_file import read_object
from minigrpo.model.params import ModelConfig
from minigrpo.model.rope import RopeScaling

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM"}

MOST_LAYERS, MOST_PARAMETERS = 10_000, 10**13
"""Beyond any model."""
LARGEST_SIZE = 10**12
"""Of anything that config.json counts."""
DEFAULT_POSITIONS = 32_768
"""Positions of a config.json that does not say, as in transformers."""
QWEN3_HEAD_DIM = 128
"""Of a qwen3 config.json that does not say, as in transformers."""

TELLING = re.compile(r"quant|compress|rope|rotary|scaling|softcap|expert|moe_|lora|peft|adapter|mlp_bias|embed_scale")
"""Names of settings that change the arithmetic, which is why unknown ones are not passed over."""
UNDERSTOOD = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
ROPE_FIELDS = {"default": frozenset[str](), "yarn": frozenset(field.name for field in dataclasses.fields(RopeScaling))}
"""Kind of rope -> its settings besides rope_theta and the kind itself."""

Check = Callable[[Any], bool]


def read_config(path: str | Path) -> ModelConfig:
    """Read a Hugging Face config.json; UsageError naming the file and the field."""
    if not Path(path).exists():
        raise UsageError(f"{path}: not a readable config.json (no such file)")
    return parse_config(read_object(Path(path)), str(path))


def parse_config(raw: dict[str, Any], source: str) -> ModelConfig:
    """Turn the fields of a config.json into a ModelConfig; `source` names the file in errors."""
    if not isinstance(raw, dict):
        raise UsageError(f"{source}: not a model's config.json, which is a JSON object")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UsageError(
            f"{source}: model_type {kind!r:.60} is not supported; use a qwen3 or qwen2 (Qwen2.5) checkpoint"
        )
    refuse_variants(raw, source)
    theta, scaling = parse_rope(raw, source)
    others: dict[str, Any] = sizes(raw, source) | ({"rope_scaling": scaling} if scaling else {})
    config = ModelConfig(
        model_type=kind,
        **others,
        rope_theta=theta,
        rms_norm_eps=number(raw, source, "rms_norm_eps", lambda eps: 0 < eps < 1, "between 0 and 1, such as 1e-06"),
        tie_word_embeddings=switch(raw, source, "tie_word_embeddings"),
        max_position_embeddings=whole(raw, source, "max_position_embeddings", DEFAULT_POSITIONS),
    )
    check_sizes(config, source)
    return config


def sizes(raw: dict[str, Any], source: str) -> dict[str, int]:
    """Return the sizes of a config.json, with transformers' values for missing ones."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    found = {name: whole(raw, source, name) for name in names}
    heads, hidden = found["num_attention_heads"], found["hidden_size"]
    head_dim = QWEN3_HEAD_DIM if raw["model_type"] == "qwen3" and "head_dim" not in raw else hidden // heads
    kv_heads = whole(raw, source, "num_key_value_heads", heads)
    return found | {"num_key_value_heads": kv_heads, "head_dim": whole(raw, source, "head_dim", head_dim)}


def check_sizes(config: ModelConfig, source: str) -> None:
    """Raise UsageError for sizes that contradict each other or that no memory holds; nothing is allocated for this."""
    if config.num_attention_heads % config.num_key_value_heads:
        raise UsageError(
            f"{source}: num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise UsageError(f"{source}: head_dim {config.head_dim} is odd; rotary angles turn pairs of dims")
    projected = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    layer = config.hidden_size * (2 * projected + 3 * config.intermediate_size)
    parameters = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    if config.num_hidden_layers > MOST_LAYERS or parameters > MOST_PARAMETERS:
        raise UsageError(
            f"{source}: num_hidden_layers {config.num_hidden_layers} and the other sizes make about "
            f"10^{math.log10(parameters):.0f} parameters; no model has more than {MOST_LAYERS} layers or "
            f"10^{math.log10(MOST_PARAMETERS):.0f} parameters"
        )


def check_lengths(config: ModelConfig, prompt_limit: int, completion_limit: int) -> None:
    """Raise UsageError for prompts and completions that together pass the model's positions, YaRN's counted."""
    scaling: RopeScaling | None = getattr(config, "rope_scaling", None)
    most = max(config.max_position_embeddings, scaling.positions if scaling else 0)
    if prompt_limit + completion_limit > most:
        raise UsageError(
            f"--max_prompt_length={prompt_limit} and --max_completion_length={completion_limit}: together "
            f"{prompt_limit + completion_limit} tokens, but the model has {most} positions (max_position_embeddings); "
            f"--max_completion_length={max(most - prompt_limit, 1)} or less fits"
        )


# Fields


def field(raw: dict[str, Any], source: str, name: str, default: Any = None) -> Any:
    """Return a field, or the default for one that is missing or null; UsageError where there is none."""
    value = raw.get(name)
    value = default if value is None else value
    if value is None:
        raise UsageError(f"{source}: field {name!r} is missing; it is needed for a {raw.get('model_type')} model")
    return value


def refuse(source: str, name: str, value: Any, wanted: str) -> UsageError:
    """Return the UsageError for a setting of a config.json."""
    return UsageError(f"{source}: {name} is {value!r:.60}; it must be {wanted}")


def whole(raw: dict[str, Any], source: str, name: str, default: int | None = None) -> int:
    """Return a whole number that can be a size; UsageError for anything else."""
    value = field(raw, source, name, default)
    if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
        raise refuse(source, name, value, f"a whole number of at least 1, and at most {LARGEST_SIZE:.0e}")
    return value


def number(raw: dict[str, Any], source: str, name: str, fits: Check, wanted: str, default: Any = None) -> float:
    """Return a finite number that `fits`; UsageError for anything else."""
    value = field(raw, source, name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not finite(value) or not fits(value):
        raise refuse(source, name, value, f"a number {wanted}")
    return float(value)


def finite(value: Any) -> bool:
    """Tell if a number is finite; an integer beyond any float is not."""
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def switch(raw: dict[str, Any], source: str, name: str, default: bool = False) -> bool:
    """Return true or false; UsageError for anything else."""
    value = field(raw, source, name, default)
    if not isinstance(value, bool):
        raise refuse(source, name, value, "true or false")
    return value


def is_set(value: Any) -> bool:
    """Tell if a setting says anything: it is not null, false, empty or 0."""
    return bool(value)


def refuse_variants(raw: dict[str, Any], source: str) -> None:
    """Raise UsageError for settings of a config.json that change the arithmetic and are not implemented."""
    refuse_quantized(raw, source)
    if switch(raw, source, "use_sliding_window"):
        raise UsageError(f"{source}: use_sliding_window=true is not supported; only full attention is")
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise refuse(source, "layer_types", kinds, "a list of 'full_attention', the only kind that is supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise UsageError(f"{source}: hidden_act {raw['hidden_act']!r:.60} is not supported; only 'silu' is")
    if raw["model_type"] == "qwen3" and switch(raw, source, "attention_bias"):
        raise UsageError(f"{source}: attention_bias=true is not supported for qwen3")
    for name, value in raw.items():
        if TELLING.search(name) and name not in UNDERSTOOD and is_set(value):
            raise UsageError(
                f"{source}: {name}={value!r:.60} is not understood, and it may change what the model computes"
            )


def refuse_quantized(raw: dict[str, Any], source: str) -> None:
    """Raise UsageError for a checkpoint that is stored quantized."""
    for name in ("quantization_config", "compression_config"):
        settings = raw.get(name)
        if is_set(settings):
            method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
            raise UsageError(
                f"{source}: a quantized checkpoint ({name}, quant_method {method!r:.60}) is not supported; use the "
                "original one in bfloat16, for adapters by --base_model, and --quantize=int8 to save memory"
            )


# Rope


def parse_rope(raw: dict[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    """Return rope_theta and YaRN's settings, None for plain rope.

    UsageError for an unknown kind or setting, and for places that contradict each other.
    """
    tables = {
        name: rope_table(raw, source, name) for name in ("rope_scaling", "rope_parameters") if is_set(raw.get(name))
    }
    places = [place for place in (raw, *tables.values()) if place.get("rope_theta") is not None]
    wanted = "above 1, such as 1000000.0"
    thetas = [number(place, source, "rope_theta", lambda theta: theta > 1, wanted) for place in places]
    if len(set(thetas)) > 1:
        raise UsageError(
            f"{source}: rope_theta is {thetas[0]:g} in one place and {thetas[1]:g} in another; make them equal"
        )
    scalings = [parse_scaling(raw, source, name, table) for name, table in tables.items()]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise UsageError(f"{source}: rope_scaling and rope_parameters contradict each other; keep one of them")
    return field({"model_type": raw["model_type"]}, source, "rope_theta", *thetas[:1]), (scalings or [None])[0]


def rope_table(raw: dict[str, Any], source: str, name: str) -> dict[str, Any]:
    """Return rope_scaling or rope_parameters; UsageError unless it is an object with known fields only."""
    table = raw[name]
    if not isinstance(table, dict):
        raise refuse(source, name, table, "an object such as {'rope_type': 'default'}, or null")
    kind = rope_type(table, source, name)
    known = ROPE_FIELDS[kind] | {"rope_theta", "rope_type", "type"}
    for key, value in table.items():
        neutral = not is_set(value) or (key == "partial_rotary_factor" and value == 1)
        if key not in known and not neutral:
            raise UsageError(
                f"{source}: {name} has {key}={value!r:.60}, which is not understood for rope type {kind!r}"
            )
    return table


def rope_type(table: dict[str, Any], source: str, name: str) -> str:
    """Return a table's kind of rope; UsageError for an unknown one, and for two."""
    kinds: list[str] = [table[key] for key in ("rope_type", "type") if table.get(key) is not None] or ["default"]
    wrong = next((kind for kind in kinds if not isinstance(kind, str) or kind not in ROPE_FIELDS), None)
    if wrong is not None:
        raise UsageError(f"{source}: rope type {wrong!r:.60} is not supported; only 'default' and 'yarn' are")
    if len(set(kinds)) > 1:
        raise UsageError(f"{source}: {name} has rope_type {kinds[0]!r} and type {kinds[1]!r}; keep one of them")
    return kinds[0]


def parse_scaling(raw: dict[str, Any], source: str, name: str, table: dict[str, Any]) -> RopeScaling | None:
    """Return YaRN's settings of a table, None if it is plain; UsageError naming the setting that cannot be."""
    if rope_type(table, source, name) == "default":
        return None
    original = original_positions(raw, source, table)

    def optional(key: str, default: float | None = None) -> float | None:
        given = table.get(key) is not None
        return number(table, source, key, lambda value: value > 0, "above 0") if given else default

    fast, slow = optional("beta_fast", 32.0), optional("beta_slow", 1.0)
    assert fast and slow
    if fast < slow:
        raise UsageError(f"{source}: beta_fast {fast:g} of {name} is less than its beta_slow {slow:g}")
    return RopeScaling(
        factor=number(table | {"model_type": "yarn"}, source, "factor", lambda value: value >= 1, "of at least 1"),
        original_max_position_embeddings=original,
        attention_factor=optional("attention_factor"),
        beta_fast=fast,
        beta_slow=slow,
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=switch(table, source, "truncate", True),
    )


def original_positions(raw: dict[str, Any], source: str, table: dict[str, Any]) -> int:
    """Return the context that YaRN stretches; UsageError where config.json gives two."""
    name, positions = "original_max_position_embeddings", raw.get("max_position_embeddings")
    outer, inner = (place.get(name) for place in (raw, table))
    if None not in (outer, inner) and outer != inner:
        raise UsageError(
            f"{source}: {name} is {outer!r:.60} in one place and {inner!r:.60} in another; make them equal"
        )
    given = next((value for value in (outer, inner, positions) if value is not None), DEFAULT_POSITIONS)
    return whole({name: given}, source, name)
