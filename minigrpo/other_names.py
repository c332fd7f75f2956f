"""Names that people know from TRL, transformers, PEFT, Tunix and others, and what they are here."""

import difflib
from collections.abc import Iterable

BATCH = "use --batch_size, which counts prompts per step over all devices; each has --num_generations completions"
ONE_LENGTH = "use --max_completion_length, and --max_prompt_length for prompts"
OWN_SAMPLER = "there is no engine to choose: minigrpo samples with its own paged generator"
SAVED = "continue a run with --resume --output_dir=RUN, which restores its settings"
EVALUATION = "use --eval_steps=N, --eval_dataset and --eval_size"

OTHER_NAMES = {
    "lr": "use --learning_rate",
    "actor_learning_rate": "use --learning_rate",
    "lr_scheduler_type": "use --lr_schedule=warmup_cosine, warmup_linear or constant",
    "scheduler": "use --lr_schedule=warmup_cosine, warmup_linear or constant",
    "optim": "there is one optimizer, AdamW: --learning_rate, --adam_b1, --adam_b2, --weight_decay",
    "optimizer": "there is one optimizer, AdamW: --learning_rate, --adam_b1, --adam_b2, --weight_decay",
    "adam_beta1": "use --adam_b1",
    "b1": "use --adam_b1",
    "adam_beta2": "use --adam_b2",
    "b2": "use --adam_b2",
    "adam_epsilon": "AdamW's epsilon is fixed at 1e-8; --epsilon is the clipping range",
    "gradient_clipping": "use --max_grad_norm",
    "grad_clip": "use --max_grad_norm",
    "batch": BATCH,
    "global_batch_size": BATCH,
    "train_batch_size": BATCH,
    "train_micro_batch_size": BATCH,
    "per_device_train_batch_size": BATCH,
    "generation_batch_size": BATCH,
    "steps_per_generation": "use --num_minibatches, the updates of a pass over a step's completions",
    "ppo_epochs": "use --num_iterations",
    "mu": "use --num_iterations, the passes of the update over a rollout",
    "num_steps": "use --max_steps",
    "total_steps": "use --max_steps",
    "epochs": "use --num_epochs",
    "num_train_epochs": "use --num_epochs",
    "steps": "use --max_steps",
    "outer_iterations": "use --sync_ref_steps, which moves the reference to the policy as an outer iteration does",
    "num_samples": "use --num_generations",
    "mixed_precision": "use --compute_dtype=bfloat16 or float32",
    "fp32": "use --compute_dtype=float32",
    "per_device_eval_batch_size": "leave it out: evaluation fills the slots by itself",
    "grad_accum": "use --gradient_accumulation_steps, which only saves memory; --batch_size is the batch",
    "max_response_length": "use --max_completion_length",
    "stop_strings": "use --stop",
    "entropy_coef": "there is no entropy bonus; --epsilon_high keeps the entropy up, as in DAPO",
    "tools": "there are no tool calls: completions are single answers",
    "rollout_func": OWN_SAMPLER,
    "callbacks": "use on_step=function with minigrpo.train(...) in Python",
    "split": "use --dataset_split",
    "eval_file": "use --eval_dataset, with --eval_steps",
    "test_file": "use --eval_dataset, with --eval_steps",
    "model_dir": "use --model",
    "tokenizer_path": "the tokenizer comes with --model",
    "modules_to_save": "adapters are all that is trained; use --lora_targets",
    "use_dora": "there is plain LoRA: --lora_rank, --lora_alpha, --lora_targets",
    "use_liger_kernel": "leave it out: the head never holds all logits",
    "answer_key": "use --answer_column",
    "wandb_name": "use --output_dir; its last part names the run",
    "wandb_entity": "set the environment variable WANDB_ENTITY",
    "wandb_key": "set the environment variable WANDB_API_KEY",
    "warmup": "use --warmup_ratio or --warmup_steps",
    "group_size": "use --num_generations",
    "n_generations": "use --num_generations",
    "max_length": ONE_LENGTH,
    "max_seq_length": ONE_LENGTH,
    "max_tokens": ONE_LENGTH,
    "max_new_tokens": "use --max_completion_length",
    "max_tokens_to_generate": "use --max_completion_length",
    "total_generation_steps": "use --max_completion_length",
    "do_sample": "use --temperature, 0 being greedy",
    "generation_kwargs": "give its entries as flags: --temperature, --top_p, --top_k, --min_p",
    "sampling_params": "give its entries as flags: --temperature, --top_p, --top_k, --min_p",
    "use_vllm": OWN_SAMPLER,
    "vllm_importance_sampling_correction": "use --rollout_correction=token or sequence",
    "vllm_importance_sampling_mode": "use --rollout_correction=token or sequence",
    "vllm_importance_sampling_cap": "use --rollout_correction_cap",
    "vllm_gpu_memory_utilization": "use --slots or --pool_pages, which bound the KV cache",
    "vllm_*": OWN_SAMPLER,
    "sglang_*": OWN_SAMPLER,
    "rollout_engine": OWN_SAMPLER,
    "kl_coef": "use --beta",
    "kl_beta": "use --beta",
    "clip_eps": "use --epsilon",
    "cliprange": "use --epsilon",
    "advantage_estimator": "use --baseline=group or rloo, and --scale_rewards",
    "use_bias_correction_kl": "use --kl_bias_correction",
    "sync_ref_model": "use --sync_ref_steps=N",
    "ref_model_sync_steps": "use --sync_ref_steps",
    "ref_model_mixup_alpha": "use --ref_mixup_alpha",
    "model_name": "use --model",
    "model_name_or_path": "use --model",
    "model_id": "use --model",
    "model_path": "use --model",
    "pretrained_model_name_or_path": "use --model",
    "tokenizer": "the tokenizer comes with --model",
    "tokenizer_name_or_path": "the tokenizer comes with --model",
    "trust_remote_code": "leave it out: no code of a checkpoint is ever run",
    "hf_token": "set the environment variable HF_TOKEN",
    "bf16": "use --compute_dtype=bfloat16, the default on TPU and GPU",
    "fp16": "use --compute_dtype=bfloat16; float16 is not supported",
    "tf32": "use --compute_dtype=bfloat16 or float32",
    "dtype": "use --compute_dtype=bfloat16 or float32",
    "torch_dtype": "use --compute_dtype=bfloat16 or float32",
    "load_in_8bit": "use --quantize=int8, with --lora_rank",
    "load_in_4bit": "use --quantize=int8, with --lora_rank; there is no 4-bit format",
    "gradient_checkpointing": "use --remat=full, attention, mlp, dots or none",
    "attn_implementation": "leave it out: the attention kernel follows the device",
    "deepspeed": "use --mesh=FSDP,TP, which shards weights, gradients and optimizer",
    "fsdp": "use --mesh=FSDP,TP",
    "tensor_parallel_size": "use --mesh=FSDP,TP",
    "tp": "use --mesh=FSDP,TP",
    "use_peft": "use --lora_rank",
    "use_lora": "use --lora_rank",
    "peft_config": "use --lora_rank, --lora_alpha, --lora_dropout and --lora_targets",
    "r": "use --lora_rank",
    "rank": "use --lora_rank",
    "lora_r": "use --lora_rank",
    "alpha": "use --lora_alpha",
    "target_modules": "use --lora_targets",
    "lora_target_modules": "use --lora_targets",
    "dataset_name": "use --dataset",
    "dataset_path": "use --dataset",
    "data_path": "use --dataset",
    "train_file": "use --dataset",
    "train_dataset": "use --dataset",
    "validation_file": "use --eval_dataset, with --eval_steps",
    "dataset_train_split": "use --dataset_split",
    "dataset_test_split": "use --eval_split",
    "chat_template_path": "use --chat_template=FILE",
    "chat_template_kwargs": "use --enable_thinking, the argument that Qwen3's templates know",
    "reward_func": "use --reward, such as correctness or FILE.py:FUNCTION",
    "reward_funcs": "use --reward, functions separated by commas, such as correctness,FILE.py:FUNCTION",
    "reward_functions": "use --reward, functions separated by commas, such as correctness,FILE.py:FUNCTION",
    "reward_model": "use --reward=FILE.py:FUNCTION, a function that calls the model",
    "reward_weights": "write weights into --reward, such as correctness*2,FILE.py:FUNCTION*0.5",
    "multi_objective_aggregation": "use --normalize_rewards=sum or each",
    "soft_overlong_punishment": "use --overlong_buffer and --overlong_penalty",
    "run_name": "use --output_dir; its last part names the run",
    "exp_name": "use --output_dir; its last part names the run",
    "log_dir": "use --output_dir; logs and checkpoints are in it",
    "logging_dir": "use --output_dir; TensorBoard's files are in its tensorboard folder",
    "checkpoint_dir": "use --output_dir; checkpoints are in its checkpoints folder",
    "resume_from_checkpoint": SAVED,
    "init_from": "use --model=RUN, which starts from another run's weights",
    "init_from_checkpoint": "use --model=RUN, which starts from another run's weights",
    "overwrite_output_dir": "name a new --output_dir; a run is never written over",
    "hub_model_id": "use --push_to_hub=OWNER/NAME",
    "hub_private_repo": "use --hub_private",
    "hub_token": "set the environment variable HF_TOKEN",
    "eval_strategy": EVALUATION,
    "evaluation_strategy": EVALUATION,
    "eval_every_n_steps": EVALUATION,
    "do_eval": EVALUATION,
    "save_strategy": "use --save_steps, 0 for only the final model",
    "logging_strategy": "use --logging_steps",
    "load_best_model_at_end": "use --keep_best=METRIC, which keeps the best step's checkpoint too",
    "metric_for_best_model": "use --keep_best=METRIC",
    "data_seed": "use --seed, which covers data, sampling and weights",
    "full_determinism": "leave it out: a run is always reproducible",
    "num_completions_to_print": "use --log_completions=N",
    "device": "set the environment variable JAX_PLATFORMS to cpu, cuda or tpu",
    "max_samples": "use --dataset_split, such as train[:1000], for Hub datasets",
}
"""Name of another library's -> what to do here; a name that ends in * stands for all that begin so."""


def other_name(name: str) -> str:
    """Return what another library's name is here; '' for a name that is not in the table.

    >>> other_name("mu")
    'use --num_iterations, the passes of the update over a rollout'
    """
    starts = (known.removesuffix("*") for known in OTHER_NAMES if known.endswith("*"))
    family = next((start for start in starts if name.startswith(start)), "")
    return OTHER_NAMES.get(name) or OTHER_NAMES.get(f"{family}*", "")


def written(name: str) -> str:
    """Return a name as flags are written: Learning-Rate is learning_rate."""
    return name.replace("-", "_").lower()


def similar(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names, three at most, that a misspelt one may stand for.

    >>> similar("learning_rat", ["learning_rate", "seed"])
    ['learning_rate']
    """
    return difflib.get_close_matches(name, sorted(known), 3, 0.75)
