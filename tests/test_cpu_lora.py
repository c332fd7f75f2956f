"""Adapters beside peft, both ways; merging, dropout, int8, and what LoRA training keeps."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, forward, make_generator, make_update_spec, mesh_of, place
from test_cpu_grpo import assert_close, host_batch, place_batch

from minigrpo.config import LoraOptions, RolloutOptions, UsageError
from minigrpo.grpo.batch import Batch, micro_batch, restore_order
from minigrpo.grpo.optimizer import init_state
from minigrpo.grpo.update import batch_logprobs, completion_logprobs, gradients, update, weigh_tokens
from minigrpo.model import lora
from minigrpo.model.hub import find_source
from minigrpo.model.hub_config import parse_config, read_config
from minigrpo.model.params import Lora, is_adapter, join, merge_adapters, select, split_trainable
from minigrpo.model.qwen import ComputeSpec, abstract_params, quantize, random_adapters
from minigrpo.model.weights import load_params

RANK4 = Lora(rank=4, alpha=6.0, dropout=0.0, targets=("q", "v", "o", "gate", "down"))


def logits(config, params, tokens, mesh=(1, 1)):
    return np.asarray(forward(config, params, tokens, mesh))


def adapters_of(config, scale=0.1):
    """Adapters that do change something."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(0, scale, x.shape).astype(np.float32), select(abstract_params(config), is_adapter)
    )


@pytest.fixture(scope="module")
def adapted(tiny_config, tiny_params):
    config = dataclasses.replace(tiny_config, lora=RANK4)
    return config, join(tiny_params, adapters_of(config))


TOKENS = np.random.default_rng(5).integers(0, 250, (8, 12)).astype(np.int32)


def test_fresh_adapters_change_nothing_and_merged_ones_equal_those_beside(tiny_config, tiny_params, adapted):
    config, params = adapted
    plain = logits(tiny_config, tiny_params, TOKENS)
    fresh = random_adapters(config, mesh_of(1, 1), 0)
    np.testing.assert_array_equal(logits(config, join(tiny_params, fresh), TOKENS), plain)
    beside = logits(config, params, TOKENS)
    assert np.abs(beside - plain).max() > 0.1 * np.abs(plain).max()
    merged = logits(tiny_config, merge_adapters(config, params), TOKENS)
    np.testing.assert_allclose(merged, beside, atol=1e-5 * np.abs(beside).max())


def test_only_adapters_are_trained_and_meshes_agree(adapted):
    config, params = adapted
    device_mesh = mesh_of(4, 2)
    spec = make_update_spec(config, device_mesh)
    trained, frozen = split_trainable(config, place(params, device_mesh))
    state = init_state(spec.optimizer, jax.tree.map(jnp.copy, trained), device_mesh)
    new, _, _ = update(spec, state, place_batch(device_mesh, host_batch(), rows=1), frozen)
    assert jax.tree.structure(new.params) == jax.tree.structure(trained)
    grads = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), trained, new.params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    loss = jax.grad(lambda adapters: one_device_loss(config, join(adapters, jax.tree.map(np.asarray, frozen))))(
        jax.tree.map(np.asarray, trained)
    )
    assert_close(grads, loss, 1e-4)


def one_device_loss(config, params):
    """The loss of one micro-batch on one device, differentiable in all parameters."""
    spec, packed = make_update_spec(config, mesh_of(1, 1)), place_batch(mesh_of(1, 1), host_batch())
    part = micro_batch(packed, 0)
    logprobs, entropy = completion_logprobs(spec, jax.tree.map(jnp.asarray, params), part)
    weights = weigh_tokens(spec, packed.batch)[:, 0].reshape(logprobs.shape)
    return spec.objective(part.batch, weights, logprobs, entropy)[0]


def test_dropout_depends_on_the_update_and_the_sequence_alone(adapted):
    """On other meshes, in other micro-batches and among other sequences."""
    config = dataclasses.replace(adapted[0], lora=dataclasses.replace(RANK4, dropout=0.5))

    def one(mesh, rows=8, updates=0, seed=3, lengths=None):
        device_mesh = mesh_of(*mesh)
        spec = make_update_spec(config, device_mesh, dropout_seed=seed)
        trained, frozen = split_trainable(config, place(adapted[1], device_mesh))
        state = init_state(spec.optimizer, jax.tree.map(jnp.copy, trained), device_mesh)
        state = dataclasses.replace(state, updates=jnp.int32(updates))
        batch = host_batch()
        batch = batch if lengths is None else dataclasses.replace(batch, completion_lengths=lengths)
        new, metrics, _ = update(spec, state, place_batch(device_mesh, batch, rows=rows), frozen)
        return jax.tree.map(np.asarray, new.params), float(metrics["entropy"])

    first, entropy = one((1, 1))
    for mesh, rows in (((1, 1), 3), ((4, 2), 1)):
        again, same = one(mesh, rows)
        assert_close(again, first, 1e-4)
        assert same == pytest.approx(entropy, rel=1e-5)
    assert one((1, 1), updates=1)[1] != entropy != one((1, 1), seed=4)[1]
    halves = [np.where(np.arange(8) % 2 == odd, host_batch().completion_lengths, 0) for odd in (0, 1)]
    sums = [one((1, 1), lengths=lengths)[1] * lengths.sum() for lengths in halves]
    assert sum(sums) == pytest.approx(entropy * host_batch().completion_lengths.sum(), rel=1e-5)


def score_rollout(config, params, prompts, rollout, temperature, num_tokens):
    """The trainer's log-probs of a rollout, beside the sampler's: the largest difference."""
    mesh, width = mesh_of(1, 1), rollout.tokens.shape[1]
    spec = make_update_spec(config, mesh, temperature=temperature, num_tokens=num_tokens)
    batch = Batch(rollout.tokens, rollout.lengths, np.zeros(len(rollout.lengths), np.float32))
    packed = place_batch(mesh, batch, prompts, 4, (16, width), group=len(rollout.lengths) // len(prompts))
    scored = np.asarray(batch_logprobs(spec, jax.tree.map(jnp.asarray, params), packed))
    mask = np.arange(width) < rollout.lengths[:, None]
    return np.abs(restore_order(packed, scored, len(rollout.lengths)) - rollout.logprobs)[mask].max()


def test_rollouts_of_adapters_equal_those_of_the_merged_model(tiny_config, adapted):
    config, params = adapted
    options = RolloutOptions(max_completion_length=8, temperature=0.0, page_size=8, slots="4")

    def roll(config, params):
        generator = make_generator(config, options, stops=(1,), prompt_tokens=8)
        return generator(jax.tree.map(jnp.asarray, params), TOKENS[:, :5].tolist(), list(range(8)), 2, (0, 0))

    beside, merged = roll(config, params), roll(tiny_config, merge_adapters(config, params))
    np.testing.assert_array_equal(beside.tokens, merged.tokens)
    assert score_rollout(config, params, TOKENS[:, :5].tolist(), beside, 1.0, 250) < 1e-4


# int8


@pytest.fixture(scope="module")
def builtin():
    folder = ROOT / "minigrpo" / "builtin"
    config = read_config(folder / "config.json")
    return config, load_params(folder, config, mesh_of(1, 1))


def test_int8_halves_the_weights_and_keeps_the_logits(builtin):
    config, params = builtin
    int8 = dataclasses.replace(config, int8=True)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    quantized = quantize(int8, half, mesh_of(1, 1))
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (quantized, half)]
    assert sizes[0] < 0.52 * sizes[1]
    tokens = np.random.default_rng(1).integers(0, 400, (8, 40)).astype(np.int32)
    close, exact = logits(int8, quantized, tokens), logits(config, half, tokens)
    assert np.linalg.norm(close - exact) < 0.02 * np.linalg.norm(exact)


def test_int8_rollouts_are_scored_alike_by_the_trainer(builtin):
    config, params = builtin
    config = dataclasses.replace(config, int8=True, lora=dataclasses.replace(RANK4, targets=("q", "down")))
    whole = join(quantize(config, params, mesh_of(1, 1)), adapters_of(config, 0.02))
    options = RolloutOptions(max_completion_length=16, temperature=0.9, page_size=8, slots="8")
    generator = make_generator(config, options, stops=(1,), prompt_tokens=16, num_tokens=400)
    rollout = generator(jax.tree.map(jnp.asarray, whole), TOKENS.tolist(), list(range(8)), 1, (0, 0))
    assert score_rollout(config, whole, TOKENS.tolist(), rollout, 0.9, 400) < 1e-4


# What is kept, and files


def test_lora_state_is_small(tiny_config):
    """Of a model of real proportions: Qwen3-0.6B, all matrices, rank 16."""
    families = json.loads((ROOT / "minigrpo" / "builtin" / "families.json").read_text())
    config = parse_config(families["Qwen/Qwen3-0.6B"], "families.json")
    targets = LoraOptions(lora_rank=16)
    adapters = select(abstract_params(dataclasses.replace(config, lora=lora.make_lora(targets))), is_adapter)
    counts = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (adapters, abstract_params(config))]
    assert counts[0] < 0.05 * counts[1]


def test_targets_are_checked():
    with pytest.raises(UsageError, match="'key'"):
        lora.make_lora(LoraOptions(lora_rank=4, lora_targets="q,key"))
    assert lora.make_lora(LoraOptions()) is None


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tiny_config):
    """A base model saved by transformers, and the same in torch."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=1,
    )
    model = transformers.Qwen3ForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_peft_loads_our_adapter(hub, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    folder, base = hub
    plain = read_config(folder / "config.json")
    config = dataclasses.replace(plain, lora=RANK4)
    adapters = adapters_of(config, 0.2)
    lora.save_adapter(tmp_path / "adapter", adapters, RANK4, str(folder))
    ours = logits(config, join(load_params(folder, plain, mesh_of(1, 1)), adapters), TOKENS)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
        without = theirs.unload()(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    assert np.abs(wanted - without).max() > 0.1 * np.abs(without).max()
    np.testing.assert_allclose(ours, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_pefts_adapter(hub, tmp_path, rslora):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    folder, base = hub
    settings = peft.LoraConfig(
        r=8, lora_alpha=12, target_modules=["up_proj", "k_proj", "o_proj"], use_rslora=rslora, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(base, settings)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=1.0)
    rows = torch.tensor(TOKENS, dtype=torch.long)
    for _ in range(3):
        optimizer.zero_grad()
        theirs(rows, labels=rows).loss.backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = theirs.eval()(rows).logits.numpy()
        without = theirs.unload()(rows).logits.numpy()
    read, _ = lora.read_adapter_config(tmp_path)
    plain = read_config(folder / "config.json")
    config = dataclasses.replace(plain, lora=read)
    adapters = lora.load_adapter(tmp_path, config, mesh_of(1, 1))
    ours = logits(config, join(load_params(folder, plain, mesh_of(1, 1)), adapters), TOKENS)
    assert np.abs(wanted - without).max() > 1e-2 * np.abs(without).max()
    np.testing.assert_allclose(ours, wanted, atol=1e-4 * np.abs(wanted).max())


def adapter_folder(folder, **change):
    """An adapter_config.json of peft's own fields, changed."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(lora.adapter_json(RANK4, "base") | change))
    return folder


REFUSED = {
    "another method": ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    "no method": ({"peft_type": None}, "peft_type None"),
    "DoRA": ({"use_dora": True}, "use_dora=True"),
    "biases": ({"bias": "all"}, "bias='all'"),
    "lora_bias": ({"lora_bias": True}, "lora_bias=True"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "ranks": ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    "alphas": ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
    "some layers": ({"layers_to_transform": [0]}, "layers_to_transform"),
    "the first layer": ({"layers_pattern": "layers"}, "layers_pattern"),
    "layers twice": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    "trained tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "parameters": ({"target_parameters": ["mlp.up"]}, "target_parameters"),
    "PiSSA, which changes the base": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    "LoftQ": ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
    "activated LoRA": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "QALoRA": ({"use_qalora": True}, "use_qalora"),
    "a revision of the base": ({"revision": "v2"}, "revision='v2'"),
    "a setting of next year": ({"use_hydra": True}, "use_hydra=True"),
    "another one": ({"hydra_config": {"heads": 9}}, "hydra_config"),
    "the head": ({"target_modules": ["q_proj", "lm_head"]}, "target module 'lm_head'"),
    "a path to the head": ({"target_modules": ["model.lm_head"]}, "target module 'model.lm_head'"),
    "no targets": ({"target_modules": []}, "target_modules is"),
    "null": ({"target_modules": None}, "target_modules is None"),
    "numbers": ({"target_modules": [5]}, "target_modules is"),
    "a number": ({"target_modules": 5}, "target_modules is 5"),
    "an expression without tensors": ({"target_modules": ".*q_proj"}, "adapter_model.safetensors: not a complete"),
    "no rank": ({"r": None}, "r, lora_alpha"),
    "rank 0": ({"r": 0}, "cannot be"),
    "rank true": ({"r": True}, "r, lora_alpha"),
    "rank as text": ({"r": "8"}, "r, lora_alpha"),
    "a rank beyond any": ({"r": 10**12}, "cannot be"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "cannot be"),
    "alpha infinite": ({"lora_alpha": float("inf")}, "cannot be"),
    "alpha as text": ({"lora_alpha": "16"}, "r, lora_alpha"),
    "a long alpha": ({"lora_alpha": 10**400}, "cannot be"),
    "dropout 1": ({"lora_dropout": 1.0}, "cannot be"),
    "dropout NaN": ({"lora_dropout": float("nan")}, "cannot be"),
    "rslora as text": ({"use_rslora": "yes"}, "use_rslora"),
    "a base that is a number": ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5"),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_adapters_that_are_not_understood_are_refused(tmp_path, change, message):
    with pytest.raises(UsageError) as caught:
        lora.read_adapter_config(adapter_folder(tmp_path, **change))
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


UNDERSTOOD = {
    "as peft writes it": ({}, RANK4.targets),
    "full paths": (
        {"target_modules": [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qv"]},
        ("q", "v"),
    ),
    "parts of paths": ({"target_modules": ["self_attn.o_proj", "mlp.up_proj"]}, ("o", "up")),
    "all-linear": ({"target_modules": "all-linear"}, ("q", "k", "v", "o", "gate", "up", "down")),
    "settings of next year that say nothing": ({"use_hydra": False, "hydra_config": None, "heads": {}}, RANK4.targets),
    "initialised otherwise": ({"init_lora_weights": "gaussian", "revision": "main"}, RANK4.targets),
    "settings without effect": ({"megatron_core": "megatron.core", "qalora_group_size": 16}, RANK4.targets),
}


@pytest.mark.parametrize("change, targets", UNDERSTOOD.values(), ids=UNDERSTOOD)
def test_adapters_are_understood_by_what_they_say(tmp_path, change, targets):
    read, base = lora.read_adapter_config(adapter_folder(tmp_path, **change))
    assert read == dataclasses.replace(RANK4, targets=targets) and base == "base"


UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r"\.(?:(?:q_proj|k_proj|down_proj)))"
)
"""How unsloth writes its targets, with fewer of them."""
TARGETS = {
    "unsloth": {"target_modules": UNSLOTH},
    "a short expression": {"target_modules": r".*self_attn\.(q|o)_proj"},
    "full paths": {"target_modules": [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qv"]},
    "names": {"target_modules": ["up_proj", "q_proj"]},
    "all-linear without some": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "k_proj"]},
    "an expression of exclusions": {"target_modules": "all-linear", "exclude_modules": r".*mlp\..*"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", TARGETS.values(), ids=TARGETS)
def test_targets_mean_what_peft_makes_of_them(hub, tmp_path, settings):
    peft = pytest.importorskip("peft")
    folder, base = hub
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    adapted = {name.split(".")[-2] for name, _ in theirs.named_modules() if name.endswith(".lora_A")}
    theirs.save_pretrained(tmp_path)
    theirs.unload()
    read, _ = lora.read_adapter_config(tmp_path)
    assert {lora.HUB_MATRICES[name] for name in read.targets} == adapted
    config = dataclasses.replace(read_config(folder / "config.json"), lora=read)
    lora.load_adapter(tmp_path, config, mesh_of(1, 1))


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_some_layers_are_refused(hub, tmp_path):
    peft = pytest.importorskip("peft")
    folder, base = hub
    settings = peft.LoraConfig(r=2, target_modules=r"model\.layers\.0\..*q_proj", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base, settings)
    theirs.save_pretrained(tmp_path)
    theirs.unload()
    config = dataclasses.replace(read_config(folder / "config.json"), lora=lora.read_adapter_config(tmp_path)[0])
    with pytest.raises(UsageError, match=r"2 faults in its tensors: missing .*layers.1.self_attn.q_proj.lora_A"):
        lora.load_adapter(tmp_path, config, mesh_of(1, 1))


@pytest.mark.parametrize(
    "given, targets",
    [
        ("q_proj,v_proj", ("q", "v")),
        ("q, up_proj", ("q", "up")),
        ("all-linear", (*"qkvo", "gate", "up", "down")),
    ],
)
def test_targets_may_have_pefts_names(given, targets):
    made = lora.make_lora(LoraOptions(lora_rank=4, lora_targets=given))
    assert made and made.targets == targets


# Where the base is


@pytest.fixture
def saved(hub, tmp_path):
    """An adapter of ours beside its base."""
    folder, _ = hub
    config = dataclasses.replace(read_config(folder / "config.json"), lora=RANK4)
    adapters = adapters_of(config, 0.2)

    def save(base, name="adapter", **settings):
        lora.save_adapter(tmp_path / name, adapters, RANK4, str(base), **settings)
        return tmp_path / name

    return save


def test_the_base_is_written_so_that_it_is_found_from_elsewhere(hub, saved, tmp_path, monkeypatch):
    folder, _ = hub
    monkeypatch.chdir(folder.parent)
    adapter = saved(folder.name)
    monkeypatch.chdir(tmp_path)
    source = find_source(str(adapter))
    assert source.base == str(folder.resolve()) and source.folder == folder and source.adapter == adapter
    named = json.loads((saved("Qwen/Qwen3-0.6B") / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == "Qwen/Qwen3-0.6B"
    builtin = json.loads((saved("builtin:tiny") / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert builtin == str((ROOT / "minigrpo" / "builtin").resolve())


def test_an_adapter_whose_base_moved_says_so_and_takes_another(hub, saved, tmp_path):
    folder, _ = hub
    adapter, whole = saved("/nowhere/base"), saved(folder, "whole")
    with pytest.raises(UsageError, match=r"^--model=.*adapter: its base '/nowhere/base' cannot .*; pass --base_model"):
        find_source(str(adapter))
    assert find_source(str(adapter), str(folder)).folder == folder
    with pytest.raises(UsageError, match=r"^--base_model=./nowhere: neither a folder"):
        find_source(str(adapter), "./nowhere")
    with pytest.raises(UsageError, match=r"^--base_model=x: --model=.* is no folder of adapters"):
        find_source(str(folder), "x")
    with pytest.raises(UsageError, match=r"has adapters itself"):
        find_source(str(adapter), str(whole))
    itself = adapter_folder(tmp_path / "itself", base_model_name_or_path=str(tmp_path / "itself"))
    with pytest.raises(UsageError, match=r"has adapters itself"):
        find_source(str(itself))
    with pytest.raises(UsageError, match=r"names no base_model_name_or_path; pass --base_model"):
        find_source(str(adapter_folder(tmp_path / "unnamed", base_model_name_or_path=None)))


def test_a_runs_checkpoint_whose_base_moved_takes_another(hub, tmp_path):
    folder, _ = hub
    step = tmp_path / "run" / "checkpoints" / "3"
    step.mkdir(parents=True)
    (tmp_path / "run" / "flags.txt").write_text("")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": "/nowhere", "lora_rank": 4}))
    with pytest.raises(UsageError, match=r"^--model=.*/3: the model '/nowhere' that its run .* --base_model"):
        find_source(str(step))
    source = find_source(str(step), str(folder))
    assert source.folder == folder and source.adapter_step == step and source.lora and source.lora.rank == 4


def test_tokenizer_files_lie_beside_the_adapter(hub, saved):
    folder, _ = hub
    assert find_source(str(saved(folder))).tokenizer_folder == folder
    adapter = saved(folder, source=ROOT / "minigrpo" / "builtin", chat_template="{{ messages[0].content }}")
    assert find_source(str(adapter)).tokenizer_folder == adapter
    assert (adapter / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


@pytest.mark.filterwarnings("ignore")
def test_peft_and_transformers_load_the_folder_alone(hub, saved, tmp_path, monkeypatch):
    """From another folder, with nothing but its path."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, base = hub
    adapter = saved(folder, source=ROOT / "minigrpo" / "builtin")
    monkeypatch.chdir(tmp_path)
    rows = torch.tensor(TOKENS, dtype=torch.long)
    with torch.no_grad():
        wanted = peft.PeftModel.from_pretrained(base, adapter).eval()(rows).logits
        by_peft = peft.AutoPeftModelForCausalLM.from_pretrained(adapter).eval()(rows).logits[..., : wanted.shape[-1]]
        by_transformers = transformers.AutoModelForCausalLM.from_pretrained(adapter).eval()(rows).logits
    np.testing.assert_allclose(by_peft.numpy(), wanted.numpy(), atol=1e-5)
    np.testing.assert_allclose(by_transformers.numpy(), wanted.numpy(), atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_no_dtype_of_int8_and_adapters_with_dropout_is_promoted_by_chance(builtin):
    config, params = builtin
    config = dataclasses.replace(config, int8=True, lora=dataclasses.replace(RANK4, dropout=0.5))
    mesh = mesh_of(1, 1)
    spec = dataclasses.replace(make_update_spec(config, mesh, dropout_seed=3), compute=ComputeSpec(jnp.bfloat16, mesh))
    with jax.numpy_dtype_promotion("strict"):
        weights = jax.eval_shape(lambda: join(quantize(config, params, mesh), random_adapters(config, mesh, 0)))
        trained, frozen = split_trainable(config, weights)
        packed = place_batch(mesh, host_batch(old=True))
        jax.eval_shape(functools.partial(gradients, spec), trained, jnp.int32(0), packed, frozen)
