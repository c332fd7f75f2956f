"""Adapters beside peft, both ways; merging, dropout, int8, and what LoRA training keeps."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, mesh_of, place
from flax import nnx
from test_cpu_grpo import assert_close, host_batch, make_trainer

from minigrpo.config import LoraOptions, RolloutOptions, UsageError
from minigrpo.grpo import update as grpo
from minigrpo.grpo.optimizer import init_state
from minigrpo.model import lora
from minigrpo.model.attention import attend_on
from minigrpo.model.qwen import (
    Lora,
    abstract_params,
    is_adapter,
    join,
    parse_config,
    read_config,
    select,
    split_trained,
    unembed,
)
from minigrpo.model.weights import load_params
from minigrpo.rollout.generator import Roller
from minigrpo.runtime.mesh import Layout, by_sequence, put

RANK4 = Lora(rank=4, alpha=6.0, dropout=0.0, targets=("q", "v", "o", "gate", "down"))


def logits(config, params, tokens, mesh=(1, 1)):
    device_mesh = mesh_of(*mesh)
    model = nnx.merge(abstract_params(config)[0], jax.tree.map(jnp.asarray, params))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model(
        jnp.asarray(tokens), positions, attend_on(device_mesh), None, Layout(jnp.dtype("float32"), device_mesh)
    )
    return np.asarray(unembed(hidden, model.head_weights()))


def adapters_of(config, scale=0.1):
    """Adapters that do change something."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(0, scale, x.shape).astype(np.float32), select(abstract_params(config)[1], is_adapter)
    )


@pytest.fixture(scope="module")
def adapted(tiny_config, tiny_params):
    config = dataclasses.replace(tiny_config, lora=RANK4)
    return config, join(tiny_params, adapters_of(config))


TOKENS = np.random.default_rng(5).integers(0, 250, (8, 12)).astype(np.int32)


def test_fresh_adapters_change_nothing_and_merged_ones_equal_those_beside(tiny_config, tiny_params, adapted):
    config, params = adapted
    plain = logits(tiny_config, tiny_params, TOKENS)
    fresh = lora.random_adapters(config, mesh_of(1, 1), 0)
    np.testing.assert_array_equal(logits(config, join(tiny_params, fresh), TOKENS), plain)
    beside = logits(config, params, TOKENS)
    assert np.abs(beside - plain).max() > 0.1 * np.abs(plain).max()
    merged = logits(tiny_config, lora.merge(config, params), TOKENS)
    np.testing.assert_allclose(merged, beside, atol=1e-5 * np.abs(beside).max())


def test_only_adapters_are_trained_and_meshes_agree(adapted):
    config, params = adapted
    device_mesh = mesh_of(4, 2)
    trainer = make_trainer(config, device_mesh)
    trained, frozen = split_trained(config, place(params, device_mesh))
    state = init_state(trainer.optimizer, jax.tree.map(jnp.copy, trained), device_mesh)
    batch = put(device_mesh, grpo.pad_rows(host_batch(), device_mesh.size), by_sequence(device_mesh))
    new, _ = grpo.update(trainer, state, batch, frozen)
    assert jax.tree.structure(new.params) == jax.tree.structure(trained)
    grads = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), trained, new.params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    whole = dataclasses.replace(trainer, graph=abstract_params(config)[0])
    loss = jax.grad(lambda adapters: grpo_loss(whole, join(adapters, jax.tree.map(np.asarray, frozen)), host_batch()))(
        jax.tree.map(np.asarray, trained)
    )
    assert_close(grads, loss, 1e-4)


def grpo_loss(trainer, params, batch):
    """The loss on one device, without parts or placement."""
    mesh = mesh_of(1, 1)
    head = dataclasses.replace(trainer.head, mesh=mesh)
    single = dataclasses.replace(trainer, head=head, layout=Layout(jnp.dtype("float32"), mesh))
    batch, params = jax.tree.map(jnp.asarray, (batch, params))
    logprobs, entropy = grpo.score(single, params, batch)
    weights = single.weigh(batch.loss_mask, (batch.completion_lengths > 0).sum())
    return single.objective(batch, weights, logprobs, entropy)[0]


def test_dropout_depends_on_the_update_and_the_row_alone(adapted):
    config = dataclasses.replace(adapted[0], lora=dataclasses.replace(RANK4, dropout=0.5))

    def one(mesh, parts=1, updates=0):
        device_mesh = mesh_of(*mesh)
        trainer = dataclasses.replace(make_trainer(config, device_mesh, parts=parts), dropout_seed=3)
        trained, frozen = split_trained(config, place(adapted[1], device_mesh))
        state = init_state(trainer.optimizer, jax.tree.map(jnp.copy, trained), device_mesh)
        state = dataclasses.replace(state, updates=jnp.int32(updates))
        batch = put(device_mesh, grpo.pad_rows(host_batch(), device_mesh.size * parts), by_sequence(device_mesh))
        new, metrics = grpo.update(trainer, state, batch, frozen)
        return jax.tree.map(np.asarray, new.params), float(metrics["entropy"])

    first, entropy = one((1, 1))
    assert_close(one((4, 2), parts=2)[0], first, 1e-4)
    assert one((1, 1), updates=1)[1] != entropy


def test_rollouts_of_adapters_equal_those_of_the_merged_model(tiny_config, adapted):
    config, params = adapted
    options = RolloutOptions(max_completion_length=8, temperature=0.0, page_size=8, slots=4)

    def roll(config, params):
        roller = Roller(config, mesh_of(1, 1), jnp.dtype("float32"), options, 250, (1,))
        return roller(jax.tree.map(jnp.asarray, params), TOKENS[:, :5].tolist(), list(range(8)), 2, (0, 0))

    beside, merged = roll(config, params), roll(tiny_config, lora.merge(config, params))
    np.testing.assert_array_equal(beside.tokens, merged.tokens)
    trainer = make_trainer(config, mesh_of(1, 1))
    trainer = dataclasses.replace(trainer, head=dataclasses.replace(trainer.head, temperature=1.0))
    prompts = [row for row in TOKENS[:, :5].tolist() for _ in range(2)]
    batch = grpo.assemble(prompts, beside.tokens, beside.lengths, (8, 8))
    scored = np.asarray(grpo.batch_logprobs(trainer, jax.tree.map(jnp.asarray, params), batch))
    mask = np.arange(scored.shape[1]) < beside.lengths[:, None]
    assert np.abs(scored - beside.logprobs[:, : scored.shape[1]])[mask].max() < 1e-4


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
    quantized = lora.quantize(int8, half, mesh_of(1, 1))
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (quantized, half)]
    assert sizes[0] < 0.52 * sizes[1]
    tokens = np.random.default_rng(1).integers(0, 400, (8, 40)).astype(np.int32)
    close, exact = logits(int8, quantized, tokens), logits(config, half, tokens)
    assert np.linalg.norm(close - exact) < 0.02 * np.linalg.norm(exact)


def test_int8_rollouts_are_scored_alike_by_the_trainer(builtin):
    config, params = builtin
    config = dataclasses.replace(config, int8=True, lora=dataclasses.replace(RANK4, targets=("q", "down")))
    whole = join(lora.quantize(config, params, mesh_of(1, 1)), adapters_of(config, 0.02))
    options = RolloutOptions(max_completion_length=16, temperature=0.9, page_size=8, slots=8)
    roller = Roller(config, mesh_of(1, 1), jnp.dtype("float32"), options, 400, (1,))
    rollout = roller(jax.tree.map(jnp.asarray, whole), TOKENS.tolist(), list(range(8)), 1, (0, 0))
    trainer = make_trainer(config, mesh_of(1, 1))
    trainer = dataclasses.replace(trainer, head=dataclasses.replace(trainer.head, num_tokens=400))
    batch = grpo.assemble(TOKENS.tolist(), rollout.tokens, rollout.lengths, (16, 16))
    scored = np.asarray(grpo.batch_logprobs(trainer, jax.tree.map(jnp.asarray, whole), batch))
    mask = np.arange(scored.shape[1]) < rollout.lengths[:, None]
    assert np.abs(scored - rollout.logprobs[:, : scored.shape[1]])[mask].max() < 1e-4


# What is kept, and files


def test_lora_state_is_small(tiny_config):
    """Of a model of real proportions: Qwen3-0.6B, all matrices, rank 16."""
    families = json.loads((ROOT / "minigrpo" / "builtin" / "families.json").read_text())
    config = parse_config(families["Qwen/Qwen3-0.6B"], "families.json")
    targets = LoraOptions(lora_rank=16)
    adapters = select(abstract_params(dataclasses.replace(config, lora=lora.make_lora(targets)))[1], is_adapter)
    counts = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (adapters, abstract_params(config)[1])]
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


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"r": None}, "r, lora_alpha"),
    ],
)
def test_adapters_that_are_not_understood_are_refused(tmp_path, change, message):
    fields = lora.adapter_json(RANK4, "base") | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(UsageError, match=message):
        lora.read_adapter_config(tmp_path)
