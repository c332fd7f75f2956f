"""Decodes with transformers' `generate`, shaped by the flags of bench/rollout_tput.py given as one JSON argument.

Prints one JSON line: tokens per second of every timed call. Needs the test extra (torch, transformers). In float32
on the CPU, in bfloat16 on a GPU.
"""

import json
import random
import sys
import time

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config


def build_model(shape):
    config = Qwen3Config(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=3 * shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32)
    return model.eval()


def main():
    shape = json.loads(sys.argv[1])
    model = build_model(shape)
    draw = random.Random(1)
    lengths = [draw.randint(shape["prompt_length"] // 2, shape["prompt_length"]) for _ in range(shape["prompts"])]
    prompts = [[draw.randrange(3, shape["vocab"]) for _ in range(length)] for length in lengths]
    rows = [prompt for prompt in prompts for _ in range(shape["generations"])]
    width = max(lengths)
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    sampling = GenerationConfig(
        max_new_tokens=shape["new_tokens"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
        eos_token_id=None,
        disable_compile=True,
    )
    rates = []
    for _ in range(shape["repeats"] + 1):
        started = time.perf_counter()
        with torch.no_grad():
            out = model.generate(input_ids=tokens, attention_mask=mask, generation_config=sampling).cpu()
        rates.append(out[:, width:].numel() / (time.perf_counter() - started))
    sys.stdout.write(json.dumps({"rates": rates[1:]}) + "\n")


if __name__ == "__main__":
    main()
