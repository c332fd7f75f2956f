"""One whole optimizer step beside the same step written in torch, from the same weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_update_spec, mesh_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_cpu_grpo import REAL as HEAD_TOKENS
from test_cpu_grpo import place_batch

from minigrpo.config import LossOptions, OptimizerOptions
from minigrpo.grpo.batch import Batch
from minigrpo.grpo.optimizer import init_state, make_optimizer
from minigrpo.grpo.update import update
from minigrpo.model.hub_config import read_config
from minigrpo.model.weights import hub_tensors, load_params

TEMPERATURE = 0.9
OPTIONS = OptimizerOptions(
    learning_rate=5e-3, lr_schedule="constant", warmup_ratio=0.0, max_grad_norm=0.05, weight_decay=0.1
)
LOSS = LossOptions(beta=0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A 2-layer Qwen3 in torch, and the folder it was saved to."""
    torch.manual_seed(1)
    config = transformers.Qwen3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=1,
    )
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return folder, theirs


def make_batch():
    rng = np.random.default_rng(3)
    prompts = [rng.integers(2, 250, size).tolist() for size in (3, 7, 5, 5, 2, 9, 4, 6)]
    lengths = np.array([4, 8, 1, 6, 8, 3, 5, 7], np.int32)
    completions = rng.integers(2, 250, (8, 8)).astype(np.int32)
    names = "old_logprobs", "ref_logprobs"
    scored = {name: rng.normal(-5, 1, completions.shape).astype(np.float32) for name in names}
    advantages = rng.normal(size=8).astype(np.float32)
    return prompts, Batch(completions, lengths, advantages, **scored)


def torch_logprobs(model, prompts, batch):
    """Whole sequences, the log-probs of all tokens that follow, and the places of every completion's tokens."""
    rows = torch.zeros(8, 24, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        rows[b, : len(prompt) + 8] = torch.tensor([*prompt, *batch.completions[b].tolist()])
    logits = model(rows).logits.double()[:, :, :HEAD_TOKENS] / TEMPERATURE
    lengths = zip(prompts, batch.completion_lengths.tolist(), strict=True)
    return rows, torch.log_softmax(logits, dim=-1), [len(p) + torch.arange(length) for p, length in lengths]


def cut_after(model, prompts, batch, count):
    """Cut-offs that leave the `count` likeliest tokens in, and some of the completions' own tokens out."""
    with torch.no_grad():
        _, logprobs, places = torch_logprobs(model, prompts, batch)
    cutoffs = np.zeros(batch.completions.shape, np.float32)
    for b, at in enumerate(places):
        ordered = logprobs[b, at - 1].sort(dim=-1, descending=True).values
        cutoffs[b, : len(at)] = ordered[:, count - 1 : count + 1].mean(dim=-1)
    return dataclasses.replace(batch, cutoffs=cutoffs)


def torch_step(model, prompts, batch):
    """Loss, gradients before clipping, their norm, and weights after the step, by name."""
    rows, logprobs, places = torch_logprobs(model, prompts, batch)
    total = 0.0
    for b, at in enumerate(places):
        length, follow, target = len(at), logprobs[b, at - 1], rows[b, at][:, None]
        if batch.cutoffs is not None:
            kept = follow >= torch.tensor(batch.cutoffs[b, :length, None])
            kept = kept.scatter(1, target, True)
            follow = torch.log_softmax(follow.masked_fill(~kept, -torch.inf), dim=-1)
        now = follow.gather(1, target)[:, 0]
        old, ref = (torch.tensor(x[b, :length]).double() for x in (batch.old_logprobs, batch.ref_logprobs))
        ratio, advantage = torch.exp(now - old), float(batch.advantages[b])
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        kl = torch.exp(ref - now) - (ref - now) - 1
        total = total + (-surrogate + 0.1 * kl).mean() / 8
    total.backward()
    named = dict(model.named_parameters())
    grads = {name: p.grad.clone() for name, p in named.items()}
    norm = torch.nn.utils.clip_grad_norm_(named.values(), OPTIONS.max_grad_norm)
    plain = [p for name, p in named.items() if "norm" in name]
    decayed = [p for name, p in named.items() if "norm" not in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=5e-3, betas=(0.9, 0.99), eps=1e-8).step()
    return total.item(), grads, norm.item(), {name: p.detach() for name, p in named.items()}


def assert_same(ours, theirs):
    for name, value in theirs.items():
        scale = value.abs().max().item()
        assert np.abs(ours[name] - value.numpy()).max() <= 1e-4 * scale, name


@pytest.mark.parametrize(("mesh", "sequences_per_row", "kept"), [((1, 1), 1, 0), ((4, 2), 8, 0), ((4, 2), 8, 40)])
def test_loss_gradients_norm_and_weights_are_torchs(model, mesh, sequences_per_row, kept):
    """`kept` is how many tokens truncated sampling left; 0 is all."""
    folder, theirs = model
    theirs.load_state_dict(transformers.Qwen3ForCausalLM.from_pretrained(folder).state_dict())
    theirs.zero_grad()
    prompts, batch = make_batch()
    batch = cut_after(theirs, prompts, batch, kept) if kept else batch
    config, device_mesh = read_config(folder / "config.json"), mesh_of(*mesh)
    params = load_params(folder, config, device_mesh)
    before = dict(hub_tensors(params, np.float32))
    packed = place_batch(device_mesh, batch, prompts, 2, (16, 8), sequences_per_row=sequences_per_row)

    def step(optimizer):
        spec = make_update_spec(config, device_mesh, optimizer=optimizer, loss=LOSS, temperature=TEMPERATURE)
        state = init_state(optimizer, jax.tree.map(jnp.copy, params), device_mesh)
        new, metrics, _ = update(spec, state, packed, {})
        return dict(hub_tensors(new.params, np.float32)), metrics

    stepped, _ = step(optax.sgd(1.0))
    after, metrics = step(make_optimizer(OPTIONS, 10))
    loss, grads, norm, weights = torch_step(theirs, prompts, batch)
    np.testing.assert_allclose(float(metrics["loss"]), loss, rtol=1e-4)
    np.testing.assert_allclose(float(metrics["grad_norm"]), norm, rtol=1e-4)
    assert_same({name: before[name] - stepped[name] for name in before}, grads)
    assert_same(after, weights)
