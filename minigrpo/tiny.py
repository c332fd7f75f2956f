"""`python -m minigrpo.tiny`: makes the folder builtin:tiny starts from, a config and a tokenizer but no weights.

The weights then come from `python -m minigrpo.sft` (README.md has both commands).
"""

import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from minigrpo.command_line import run_named
from minigrpo.config import Settings, TinyOptions, UsageError
from minigrpo.data import arithmetic
from minigrpo.data.chat import CHATML
from minigrpo.runtime.files import write_whole, writing

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PIECES = r"\p{N}| ?\p{L}+|[^\p{L}\p{N}\s]+|\s+"
"""Splits off every digit; words keep their leading space."""


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on generated problems and their solutions."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = arithmetic.problems("train", 5_000, arithmetic.SFT_START)
    texts = [row["prompt"] + "\n" + row["completion"] + "\nsystem user assistant\n" for row in rows]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def model_config(options: TinyOptions) -> dict[str, Any]:
    """Return the config.json of a tiny Qwen3."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "intermediate_size": 3 * options.hidden_size,
        "num_hidden_layers": options.num_hidden_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
    }


def main(settings: Settings) -> int:
    """Write a tiny model with random weights to --output_dir; return the exit code."""
    options = settings.tiny
    folder = Path(options.output_dir)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"--output_dir={folder}: is not an empty folder; name a new one")
    tokenizer = train_tokenizer(options.vocab_size)
    ends = [tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>")]
    files: dict[str, Any] = {
        "tokenizer.json": json.loads(tokenizer.to_str()),
        "config.json": model_config(options),
        "generation_config.json": {"eos_token_id": ends},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": CHATML,
        },
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    sys.stderr.write(f"{folder}: {tokenizer.get_vocab_size()} tokens, no weights yet; train them with\n")
    sys.stderr.write(f"python -m minigrpo.sft --model={folder} --init=random --dataset=builtin:arithmetic\n")
    return 0


if __name__ == "__main__":
    run_named("tiny", main)
