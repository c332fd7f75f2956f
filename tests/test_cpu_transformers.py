"""Parity with transformers, which writes the checkpoints, reads ours back, and generates beside us."""

import json
import pathlib

import numpy as np
import pytest
from conftest import ROOT, forward, make_generator, mesh_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from minigrpo.config import RolloutOptions
from minigrpo.model.hub_config import read_config
from minigrpo.model.weights import export, load_params

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
    "initializer_range": 0.3,
}


def write_model(folder, kind, tied):
    """A random checkpoint with every kind of weight non-trivial, in several files."""
    torch.manual_seed(0)
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}}
    if kind == "qwen3":
        config = transformers.Qwen3Config(**SIZES, **rope, head_dim=16, tie_word_embeddings=tied)
        model = transformers.Qwen3ForCausalLM(config)
    else:
        config = transformers.Qwen2Config(**SIZES, **rope, tie_word_embeddings=tied)
        model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                weight.add_(0.2 * torch.randn_like(weight))
    model.eval().save_pretrained(folder, max_shard_size="200KB")
    return model


def our_logits(folder, tokens, mesh=(1, 1)):
    config = read_config(folder / "config.json")
    params = load_params(folder, config, mesh_of(*mesh))
    return config, params, forward(config, params, tokens, mesh)


@pytest.fixture(scope="module", params=[("qwen3", True), ("qwen3", False), ("qwen2", True), ("qwen2", False)], ids=str)
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, write_model(folder, *request.param)


def test_logits_equal(written):
    folder, theirs = written
    assert len(list(folder.glob("*.safetensors"))) > 1
    tokens = np.random.default_rng(0).integers(0, 320, (3, 40)).astype(np.int32)
    with torch.no_grad():
        want = theirs(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    _, _, got = our_logits(folder, tokens)
    assert np.abs(want).max() > 3
    assert np.abs(np.asarray(got) - want).max() < 2e-4


@pytest.fixture(scope="module")
def greedy(written):
    """16 prompts of unequal length and 64 greedy tokens of each, by transformers."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(2, 320, length).tolist() for length in range(3, 35, 2)]
    texts = [
        written[1].generate(torch.tensor([p]), max_new_tokens=64, do_sample=False, pad_token_id=0) for p in prompts
    ]
    return prompts, [text[0, len(prompt) :].tolist() for prompt, text in zip(prompts, texts, strict=True)]


@pytest.mark.parametrize(
    ("slots", "page_size", "pool_pages", "mesh"),
    [(4, 8, 96, (1, 1)), (16, 64, 0, (4, 1))],
)
def test_greedy_text_equal(written, greedy, slots, page_size, pool_pages, mesh):
    """Whatever the slots, pages, pool and mesh."""
    folder, _ = written
    config = read_config(folder / "config.json")
    prompts, want = greedy
    options = RolloutOptions(
        max_completion_length=64, temperature=0.0, page_size=page_size, slots=str(slots), pool_pages=pool_pages
    )
    generator = make_generator(config, options, mesh, (1,), prompt_tokens=40, num_tokens=320)
    ours = generator(load_params(folder, config, mesh_of(*mesh)), prompts, list(range(16)), 1, (0, 0))
    assert [row[:length].tolist() for row, length in zip(ours.tokens, ours.lengths, strict=True)] == want


def test_exported_model_loads_in_transformers_with_equal_logits(written, tmp_path):
    folder, _ = written
    tokens = np.random.default_rng(2).integers(0, 320, (8, 30)).astype(np.int32)
    config, params, ours = our_logits(folder, tokens, mesh=(4, 2))
    export(tmp_path / "out", folder, params, config, (1,), np.float32)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        theirs = reloaded.eval()(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    assert np.abs(np.asarray(ours) - theirs).max() < 2e-4
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 1


def test_builtin_model_and_its_chat_template_work_in_transformers():
    from minigrpo.data.chat import load_tokenizer

    folder = pathlib.Path(ROOT / "minigrpo" / "builtin")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    messages = [{"role": "user", "content": "Anna has 12 apples. How many?"}]
    assert ours.render(messages) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = ours.render(messages)
    assert ours.encode([text])[0] == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode([ours.encode([text])[0]])[0] == theirs.decode(
        theirs(text)["input_ids"], skip_special_tokens=True
    )


def test_this_repository_on_the_path_does_not_disturb_transformers():
    """transformers asks whether an optional package called `kernels` is there; our folder of that name is not it."""
    from transformers.utils import is_kernels_available

    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not is_kernels_available()
