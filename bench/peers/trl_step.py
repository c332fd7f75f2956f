"""GRPO steps by TRL's own trainer on the shapes given as one JSON argument; prints one JSON line.

Needs the test extra (torch, transformers, trl). Every completion has all its tokens: the end token is suppressed.
"""

import json
import os
import random
import resource
import sys
import tempfile
import time

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}

import datasets
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers_generate import build_model
from trl import GRPOConfig, GRPOTrainer

WARM_UP = 2


def word_tokenizer(vocab):
    """Return a tokenizer whose token i is the word "ti"; 0 pads and 1 ends."""
    words = {"[pad]": 0, "[end]": 1, "[unknown]": 2} | {f"t{i}": i for i in range(3, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[unknown]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[pad]",
        eos_token="[end]",
        unk_token="[unknown]",
        padding_side="left",
    )


class Clock(transformers.TrainerCallback):
    """Seconds between the ends of optimizer steps."""

    def __init__(self):
        self.seconds = []
        self.last = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def reward(completion_ids, **kwargs):
    return [sum(ids) % 17 / 17.0 for ids in completion_ids]


def main():
    shape = json.loads(sys.argv[1])
    rows, steps = shape["prompts"] * shape["generations"], shape["repeats"] + WARM_UP
    draw = random.Random(0)
    prompts = [
        " ".join(f"t{draw.randrange(3, shape['vocab'])}" for _ in range(shape["prompt_length"]))
        for _ in range(shape["prompts"] * (steps + 1))
    ]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = build_model(shape), word_tokenizer(shape["vocab"])
        model.config.eos_token_id = model.generation_config.eos_token_id = 1
        model.save_pretrained(folder + "/model")
        tokenizer.save_pretrained(folder + "/model")
        del model
        arguments = GRPOConfig(
            output_dir=folder + "/out",
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=rows,
            num_generations=shape["generations"],
            max_completion_length=shape["new_tokens"],
            max_steps=steps,
            beta=0.0,
            loss_type="grpo",
            temperature=1.0,
            gradient_checkpointing=False,
            generation_kwargs={"suppress_tokens": [1]},
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1000,
        )
        trainer = GRPOTrainer(
            model=folder + "/model",
            reward_funcs=reward,
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        out, sys.stdout = sys.stdout, sys.stderr
        trainer.train()
        sys.stdout = out
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    sys.stdout.write(json.dumps({"seconds": clock.seconds[WARM_UP:], "peak_mib": peak, **versions}) + "\n")


if __name__ == "__main__":
    main()
