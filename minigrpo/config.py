"""Every setting: one frozen dataclass per concern, which flags and config files are made from, checked when built."""

import dataclasses
import json
import math
import numbers
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_UNREAD = 141

WARMUP_RATIO = 0.1
"""Share of a run that warms up where neither --warmup_ratio nor --warmup_steps says."""

LARGEST_SEED = 2**31 - 1
LARGEST_BATCH = 65536
LARGEST_RANK = 4096
MOST_TOKENS, LARGEST_PAGE, MOST_PAGES, MOST_SLOTS = 2**20, 4096, 2**24, 2**16
"""Of a prompt or a completion, beyond any model's context; of a page; and pages, a thousand million tokens in all."""

SINKS = ("tensorboard", "wandb", "trackio", "mlflow")
HUB_REPOSITORY = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]{0,94}/[\w][\w.-]{0,94}(?<![-.])", re.ASCII)
"""OWNER/NAME, of letters, digits, -, _ and a single dot between them."""


class UsageError(ValueError):
    """Bad input from the person running a command; its text is one line that names the input, its value and the fix."""


def option(
    default: Any,
    text: str,
    *,
    choices: tuple[Any, ...] = (),
    low: Any = None,
    above: Any = None,
    high: Any = None,
    below: Any = None,
    number: bool = False,
    needed: bool = False,
) -> Any:
    """Return a dataclass field that is also a flag: `low` <= value <= `high`, `above` < value < `below`, or choices.

    `number` says that a text flag may hold a whole number too, which config files write without quotes; `needed`, that
    it must not be empty.
    """
    limits = {"choices": choices, "low": low, "above": above, "high": high, "below": below, "needed": needed}
    return dataclasses.field(default=default, metadata={"help": text, "number": number, **limits})


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of the settings classes: checks every field against the limits it declares."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_limits(field, getattr(self, field.name))


LARGEST_INT = 2**31 - 1

KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def check_kind(field: dataclasses.Field[Any], value: Any) -> None:
    """Raise UsageError that names the flag if a value, as from a run's config.json, is of another type."""
    kind = field_type(field)
    accepted: Any = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"--{field.name}={value!r:.60}: must be {KINDS[kind]}")


def check_limits(field: dataclasses.Field[Any], value: Any) -> None:
    """Raise UsageError that names the flag if a value breaks a limit of its field; only some may be None."""
    if value is None and isinstance(field.type, types.UnionType):
        return
    check_kind(field, value)
    meta = field.metadata
    if meta["needed"] and not value:
        raise UsageError(f"--{field.name}=: must not be empty; leave it out for {field.default}")
    if meta["choices"] and value not in meta["choices"]:
        raise UsageError(f"--{field.name}={value}: must be one of {', '.join(map(str, meta['choices']))}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"--{field.name}={value}: must be a finite number")
    if meta["below"] is not None and not value < meta["below"]:
        raise UsageError(f"--{field.name}={value}: must be less than {meta['below']}")
    if meta["low"] is not None and not value >= meta["low"]:
        raise UsageError(f"--{field.name}={value}: must be at least {meta['low']}")
    if meta["above"] is not None and not value > meta["above"]:
        raise UsageError(f"--{field.name}={value}: must be greater than {meta['above']}")
    if meta["high"] is not None and not value <= meta["high"]:
        raise UsageError(f"--{field.name}={value}: must be at most {meta['high']}")
    if field_type(field) is int and abs(value) > LARGEST_INT:
        raise UsageError(f"--{field.name}={value}: must be at most {LARGEST_INT}")


@dataclasses.dataclass(frozen=True)
class ModelOptions(Options):
    """Model"""

    model: str = option(
        "auto",
        "Hub id, local folder or builtin:tiny; auto is Qwen/Qwen3-1.7B on TPU and GPU, builtin:tiny on CPU",
        needed=True,
    )
    base_model: str = option("auto", "model under the adapter that --model names; auto is the one written in it")
    init: str = option(
        "weights", "load the checkpoint's weights, or draw them at random", choices=("weights", "random")
    )
    compute_dtype: str = option(
        "auto",
        "dtype of activations and of the rollout's weights; auto is bfloat16 on TPU and GPU, float32 on CPU",
        choices=("auto", "float32", "bfloat16"),
    )
    quantize: str = option(
        "none", "hold the matrices of the base model in int8, rollouts included", choices=("none", "int8")
    )


@dataclasses.dataclass(frozen=True)
class LoraOptions(Options):
    """LoRA"""

    lora_rank: int = option(
        0, "train adapters of this rank instead of the weights; 0 trains the weights", low=0, high=LARGEST_RANK
    )
    lora_alpha: float = option(32.0, "adapters are scaled by alpha / rank", above=0.0)
    lora_dropout: float = option(0.0, "share of an adapter's inputs zeroed while training", low=0.0, below=1.0)
    lora_targets: str = option(
        "all", "matrices that get adapters, of q,k,v,o,gate,up,down, or q_proj and so on; all is every one"
    )


@dataclasses.dataclass(frozen=True)
class DataOptions(Options):
    """Data"""

    offline: bool = option(
        False,
        "train on the responses of the dataset, without sampling: rows {prompt, responses, scores}, "
        "{prompt, response, score}, {prompt, chosen, rejected} or {messages}",
    )
    dataset: str = option(
        "auto",
        "gsm8k, builtin:arithmetic, a Hub id, a folder of one, a save_to_disk folder, or a .jsonl, .json, .csv, .tsv, "
        ".parquet or .arrow file, compressed or not; auto follows the model (builtin:tiny: arithmetic)",
        needed=True,
    )
    dataset_config: str = option("auto", "config of a Hub dataset or folder, such as main; auto is its only one")
    dataset_split: str = option(
        "auto", "split of a Hub dataset or folder, train[:1000] too; auto is train, and test for evaluate"
    )
    prompt_column: str = option(
        "auto",
        "column that holds the prompt, dots leading into nested ones; auto tries prompt, question, problem, then "
        "Alpaca's instruction with input, then the chat in messages or conversations",
    )
    answer_column: str = option(
        "auto",
        "column that holds the reference answer, dots leading into nested ones; auto tries answer, solution, "
        "ground_truth, final_answer, target, reward_model.ground_truth, output, then the chat's last answer",
    )
    system_prompt: str = option(
        "auto", "system message, \\n being a new line; auto is the dataset's own, empty for none"
    )
    enable_thinking: bool = option(False, "let a Qwen3 chat template open a thinking turn")
    chat_template: str = option(
        "auto",
        "auto is the checkpoint's own, or ChatML; none takes prompts as they are, for base models; or a Jinja file",
    )
    keep_special_tokens: bool = option(False, "rewards see special tokens of completions, but for the end token")
    max_prompt_length: int = option(
        256, "prompts with more tokens than this are dropped and counted", low=1, high=MOST_TOKENS
    )


def parse_stop(text: str) -> tuple[str, ...]:
    """Parse --stop, a text or a JSON list of texts; UsageError for another list."""
    if not text.startswith("["):
        return (text,) if text else ()
    try:
        texts = json.loads(text, strict=False)
    except ValueError:
        texts = None
    if not isinstance(texts, list) or not texts or not all(one and isinstance(one, str) for one in texts):
        raise UsageError(f"--stop={text}: must be one text, or a JSON list of them where it begins with [")
    return tuple(texts)


@dataclasses.dataclass(frozen=True)
class RolloutOptions(Options):
    """Rollout"""

    max_completion_length: int = option(
        2048, "most tokens sampled per completion, end token included", low=1, high=MOST_TOKENS
    )
    temperature: float = option(0.9, "sampling temperature; 0 is greedy", low=0.0)
    top_k: int = option(0, "keep only the k likeliest tokens; 0 keeps all", low=0)
    top_p: float = option(1.0, "keep the likeliest tokens that hold this much probability", above=0.0, high=1.0)
    min_p: float = option(0.0, "drop tokens less likely than min_p times the likeliest", low=0.0, high=1.0)
    repetition_penalty: float = option(
        1.0,
        "divide the positive logits of tokens that prompt or completion have already, and multiply the negative ones; "
        "not for training",
        above=0.0,
    )
    stop: str = option(
        "",
        "text that ends a completion, \\n being a new line, or a JSON list of several. The completion is cut after the "
        "token that completes the text; it is sampled on till then, so no time is saved",
    )
    page_size: int = option(64, "tokens per page of the KV cache", low=1, high=LARGEST_PAGE)
    slots: str = option(
        "auto", "most completions decoded at once per device; auto is all of a step's, where memory allows", number=True
    )
    pool_pages: int = option(
        0, "pages of KV cache per device; 0 is enough for every slot at full length", low=0, high=MOST_PAGES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slots != "auto" and not (self.slots.isdigit() and 1 <= int(self.slots) <= MOST_SLOTS):
            raise UsageError(f"--slots={self.slots}: must be auto or a whole number from 1 to {MOST_SLOTS}")
        parse_stop(self.stop)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Return the texts that end a completion."""
        return parse_stop(self.stop)

    @property
    def slot_limit(self) -> int:
        """Return the largest number of slots; 0 is as many as memory allows."""
        return 0 if self.slots == "auto" else int(self.slots)


@dataclasses.dataclass(frozen=True)
class RewardOptions(Options):
    """Rewards"""

    reward: str = option(
        "auto",
        "comma-separated reward functions, each with an optional *WEIGHT: NAME, FILE.py:FUNCTION or "
        "PACKAGE.MODULE:FUNCTION; auto is the dataset's own",
    )
    reward_timeout: float = option(
        60.0, "seconds one call of a reward function may take (Python code; C code is not interrupted)", above=0.0
    )
    scale_rewards: str = option(
        "group", "divide advantages by the std of the group, of the batch, or not", choices=("group", "batch", "none")
    )
    baseline: str = option(
        "group", "subtract the mean of the group, or of its other members (RLOO)", choices=("group", "rloo")
    )
    overlong_buffer: int = option(
        0, "tokens before the length limit over which completions lose reward; 0 for none", low=0
    )
    overlong_penalty: float = option(1.0, "reward lost at the limit itself", above=0.0)
    normalize_rewards: str = option(
        "sum",
        "advantages of the summed rewards, or each reward function's own, then summed (GDPO)",
        choices=("sum", "each"),
    )


@dataclasses.dataclass(frozen=True)
class LossOptions(Options):
    """Loss"""

    loss_type: str = option(
        "grpo",
        "how tokens are averaged (cispo: as dapo, and ratios are capped instead of clipped)",
        choices=("grpo", "bnpo", "dr_grpo", "dapo", "cispo"),
    )
    importance_sampling_level: str = option(
        "token", "ratios of single tokens, or of whole completions (GSPO)", choices=("token", "sequence")
    )
    epsilon: float = option(0.2, "lower clipping range of the probability ratio", above=0.0)
    epsilon_high: float | None = option(
        None, "upper clipping range; unset means --epsilon. For cispo the cap of the ratio itself, such as 5", above=0.0
    )
    delta: float | None = option(None, "upper bound of the unclipped ratio too (two-sided clipping)", above=1.0)
    beta: float = option(0.08, "weight of the KL penalty to the reference; 0 loads no reference", low=0.0)
    sync_ref_steps: int = option(0, "steps between moves of the reference towards the policy; 0 never moves it", low=0)
    ref_mixup_alpha: float = option(
        1.0, "share of the policy in a moved reference, the rest being the old one", above=0.0, high=1.0
    )
    kl_estimator: str = option("k3", "estimate of the KL in the loss", choices=("k1", "k2", "k3"))
    kl_bias_correction: bool = option(False, "weight the KL estimate by the probability ratio")
    rollout_correction: str = option(
        "none",
        "truncated importance sampling from the sampler's to the trainer's log-probs",
        choices=("none", "token", "sequence"),
    )
    rollout_correction_cap: float = option(2.0, "largest weight of that correction", above=0.0)
    mask_truncated_completions: bool = option(False, "completions cut at the length limit teach nothing")
    zero_std_groups: str = option(
        "keep",
        "what to do with groups in which every completion gets the same score from the first reward: keep, skip, or "
        "resample other prompts (DAPO)",
        choices=("keep", "skip", "resample"),
    )
    max_resamples: int = option(3, "most extra rollouts of one step that replace groups", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_estimator == "k1":
            raise UsageError("--kl_estimator=k1: as a loss its expected gradient is zero; use k3 or k2")
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise UsageError("--loss_type=cispo: needs --epsilon_high, the cap of the ratio itself, such as 5")
        if self.sync_ref_steps and not self.beta:
            raise UsageError(f"--sync_ref_steps={self.sync_ref_steps}: --beta=0 has no reference to move")


@dataclasses.dataclass(frozen=True)
class OptimizerOptions(Options):
    """Update"""

    learning_rate: float = option(3e-6, "peak learning rate of AdamW", above=0.0)
    lr_schedule: str = option(
        "warmup_cosine", "schedule after the warmup", choices=("warmup_cosine", "warmup_linear", "constant")
    )
    warmup_ratio: float | None = option(
        None, "share of all steps spent warming up; unset is 0.1, or what --warmup_steps says", low=0.0, high=1.0
    )
    warmup_steps: int | None = option(None, "steps spent warming up, in place of --warmup_ratio", low=0)
    adam_b1: float = option(0.9, "AdamW first-moment decay", low=0.0, below=1.0)
    adam_b2: float = option(0.99, "AdamW second-moment decay", low=0.0, below=1.0)
    weight_decay: float = option(0.1, "AdamW weight decay of matrices (norms and biases have none)", low=0.0)
    max_grad_norm: float = option(0.1, "gradients are clipped to this global norm", above=0.0)
    remat: str = option(
        "full",
        "activations that the backward pass recomputes, from fastest to smallest: none; dots (keeps matmul outputs); "
        "mlp (keeps attention, gate and up); attention (keeps attention outputs); full",
        choices=("none", "dots", "mlp", "attention", "full"),
    )
    offload_optimizer: str = option(
        "auto",
        "keep AdamW's moments in the host's memory except while they are applied, which costs moving them there and "
        "back; auto does so where a rollout would not fit otherwise",
        choices=("auto", "true", "false"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise UsageError(
                f"--warmup_steps={self.warmup_steps}: --warmup_ratio={self.warmup_ratio} is given too; leave one out"
            )

    def warmup_updates(self, total: int, per_step: int = 1) -> int:
        """Return how many of `total` updates the learning rate rises for; `per_step` updates make a step."""
        if self.warmup_steps is not None:
            return self.warmup_steps * per_step
        return round((WARMUP_RATIO if self.warmup_ratio is None else self.warmup_ratio) * total)


@dataclasses.dataclass(frozen=True)
class TrainingOptions(Options):
    """Steps of every kind of training"""

    batch_size: int = option(16, "prompts per step", low=1, high=LARGEST_BATCH)
    gradient_accumulation_steps: str = option(
        "auto", "micro-batches of an update at full length, which changes no number; auto fits memory", number=True
    )
    packing: bool = option(
        True, "short sequences share rows in the update, changing no number; not with --lora_dropout"
    )
    max_steps: int = option(0, "steps to train; 0 means --num_epochs over the data", low=0)
    num_epochs: float = option(1.0, "passes over the data when --max_steps is 0", above=0.0, high=1e6)
    seed: int = option(0, "seed of shuffling, sampling and random weights", low=0, high=LARGEST_SEED)


@dataclasses.dataclass(frozen=True)
class StepOptions(TrainingOptions):
    """Steps"""

    num_generations: int = option(8, "completions per prompt: the group", low=2, high=LARGEST_BATCH)
    num_iterations: int = option(1, "passes of the update over a rollout", low=1)
    num_minibatches: int = option(1, "updates per pass, each on an equal share of the prompts", low=1)
    share_prompts: str = option(
        "auto",
        "compute a prompt once for its completions, with --packing, changing no number; auto does, but not on TPU",
        choices=("auto", "true", "false"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.num_minibatches:
            raise UsageError(f"--num_minibatches={self.num_minibatches}: must divide --batch_size={self.batch_size}")
        if self.share_prompts == "true" and not self.packing:
            raise UsageError("--share_prompts=true: needs --packing=true; leave one of them out")

    @property
    def updates_per_step(self) -> int:
        """Return the number of optimizer updates per step."""
        return self.num_iterations * self.num_minibatches


@dataclasses.dataclass(frozen=True)
class RunOptions(Options):
    """Run"""

    mesh: str = option(
        "auto",
        "FSDP,TP mesh; auto is every device as fsdp, and 1,1 on CPU",
    )
    output_dir: str = option("auto", "run folder; auto is runs/ and the time", needed=True)
    resume: bool = option(False, "continue the run in --output_dir from its newest complete checkpoint")
    save_steps: int = option(50, "steps between checkpoints; 0 keeps only the final one", low=0)
    save_minutes: float = option(10.0, "minutes after which a checkpoint is made between them; 0 for never", low=0.0)
    save_total_limit: int = option(2, "newest checkpoints kept", low=1)
    keep_best: str = option(
        "", "metric whose best step's checkpoint is kept too: eval/accuracy, for example; -eval/loss for the lowest"
    )
    grace_seconds: float = option(
        25.0,
        "seconds that SIGTERM or Ctrl-C leaves for the update under way, and the checkpoint, before the run ends",
        low=0.0,
    )
    max_skipped_steps: int = option(
        5, "the run ends, and saves the batch, after so many steps in a row without a finite loss and gradient", low=1
    )
    eval_steps: int = option(
        0,
        "steps between evaluations on held-out rows: greedy answers, or sft's loss; also before and after; 0 is never",
        low=0,
    )
    eval_size: int = option(500, "held-out rows per evaluation", low=1)
    eval_num_generations: int = option(
        1, "answers per held-out prompt; several are sampled as in training and give pass@k and the majority", low=1
    )
    eval_dataset: str = option("auto", "dataset of those rows; auto is the test split of --dataset, if it has one")
    eval_config: str = option(
        "auto", "config of that dataset; auto is its only one, or --dataset_config for the same dataset"
    )
    eval_split: str = option("auto", "split of that dataset; auto is test")
    logging_steps: int = option(
        1,
        "steps between printed lines and points of the sinks, which are means over them; metrics.jsonl has all",
        low=1,
    )
    log_completions: int = option(4, "sample completions, or sft's rows, written per step", low=0)
    print_completions: int = option(0, "of those, how many are printed too", low=0)
    push_to_hub: str = option("", "OWNER/NAME of the Hub repository that the trained model is uploaded to")
    hub_private: bool = option(False, "make that repository private")
    report_to: str = option(
        "tensorboard",
        "sinks of metrics and completions, by commas: tensorboard; wandb, trackio, mlflow (extras of these names); "
        "FILE.py:CLASS or PACKAGE.MODULE:CLASS; or none",
    )
    wandb_project: str | None = option(
        None, "project of Weights & Biases; unset is WANDB_PROJECT, or minigrpo; the key comes from the environment"
    )
    wandb_mode: str | None = option(
        None,
        "offline keeps the run in its folder for `wandb sync`; unset is WANDB_MODE, or online",
        choices=("online", "offline", "disabled"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sinks(self.report_to, self.sinks)
        if self.print_completions > self.log_completions:
            raise UsageError(
                f"--print_completions={self.print_completions}: only --log_completions={self.log_completions} are "
                "kept of a step; raise that too"
            )
        if self.hub_private and not self.push_to_hub:
            raise UsageError("--hub_private: nothing is uploaded; name a repository with --push_to_hub=OWNER/NAME")
        if self.push_to_hub and not HUB_REPOSITORY.fullmatch(self.push_to_hub):
            raise UsageError(f"--push_to_hub={self.push_to_hub}: must be OWNER/NAME, as on the Hub")
        if self.wandb_project is not None and "wandb" not in self.sinks:
            raise UsageError(f"--wandb_project={self.wandb_project}: means nothing without --report_to=wandb")
        if self.wandb_mode in ("online", "offline") and "wandb" not in self.sinks:
            raise UsageError(f"--wandb_mode={self.wandb_mode}: means nothing without --report_to=wandb")
        if self.keep_best.removeprefix("-") in ("accuracy", "margin"):
            raise UsageError(
                f"--keep_best={self.keep_best}: what is measured on held-out rows begins with eval/; write "
                f"--keep_best=eval/{self.keep_best.removeprefix('-')}"
            )
        if self.keep_best.startswith(("eval/", "-eval/")) and not self.eval_steps:
            raise UsageError(f"--keep_best={self.keep_best}: nothing is evaluated; set --eval_steps")

    @property
    def sinks(self) -> tuple[str, ...]:
        """Return the sinks of --report_to, () for none."""
        names = tuple(dict.fromkeys(name.strip() for name in self.report_to.split(",")))
        return () if names == ("none",) else names


def check_sinks(flag: str, names: tuple[str, ...]) -> None:
    """Raise UsageError for a sink of --report_to that is none of ours and names no class."""
    unknown = next((name for name in names if name not in SINKS and not all(name.rpartition(":"))), None)
    if unknown == "none":
        raise UsageError(f"--report_to={flag}: none goes alone")
    if unknown is not None:
        raise UsageError(f"--report_to={flag}: {unknown!r} is not {', '.join(SINKS)}, none or FILE.py:CLASS")


@dataclasses.dataclass(frozen=True)
class ClusterOptions(Options):
    """Several processes"""

    coordinator_address: str = option(
        "",
        "HOST:PORT of worker 0; unset asks the TPU's metadata, Slurm, Open MPI or GKE; else one process",
    )
    num_processes: int = option(0, "workers that run this command, each with its own --process_id", low=0, high=65536)
    process_id: int | None = option(None, "number of this worker, from 0", low=0)
    start_timeout: float = option(300.0, "seconds that workers wait for each other at the start", above=0.0)


@dataclasses.dataclass(frozen=True)
class SftOptions(TrainingOptions):
    """Steps"""

    batch_size: int = option(64, "rows per step", low=1, high=LARGEST_BATCH)
    max_completion_length: int = option(
        512, "rows with longer completions, end token included, are dropped and counted", low=1, high=MOST_TOKENS
    )
    problems: int = option(50_000, "rows of builtin:arithmetic to generate", low=1)

    @property
    def as_steps(self) -> StepOptions:
        """Return the options that this training shares with GRPO."""
        return StepOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(TrainingOptions)})


@dataclasses.dataclass(frozen=True)
class EvalOptions(Options):
    """Evaluation"""

    mesh: str = option("auto", "FSDP,TP mesh; auto is every device as fsdp, and 1,1 on CPU")
    eval_size: int = option(500, "held-out problems answered", low=1)
    num_generations: int = option(1, "answers per problem; several give pass@k and the majority's accuracy", low=1)
    reward: str = option("", "reward functions of the answers too, written as for train")
    base: str = option("", "another model to be asked the same, such as the one that training started from")
    output: str = option("", "JSONL file that every answer is written to")
    seed: int = option(0, "seed of sampling and of random weights", low=0, high=LARGEST_SEED)


@dataclasses.dataclass(frozen=True)
class GenerateOptions(Options):
    """Generate"""

    mesh: str = option("auto", "FSDP,TP mesh; auto is every device as fsdp, and 1,1 on CPU")
    prompt: str = option("", "one prompt, answered on stdout as it is sampled")
    prompts: str = option("", "file of prompts, one per line or JSONL; the answers are JSONL on stdout")
    chat: bool = option(False, "a chat: one message per line of stdin, an empty line or its end closing it")
    num_generations: int = option(1, "answers per prompt of --prompts", low=1)
    seed: int = option(0, "seed of sampling and of random weights", low=0, high=LARGEST_SEED)


@dataclasses.dataclass(frozen=True)
class PlanOptions(Options):
    """Plan"""

    topology: str = option(
        "v6e:2x4", "TPU generation and chips: v6e:2x4, v5e:4x4, v5p:2x2x1; or each GPU's memory: gpu:80GB"
    )
    mesh: str = option("4,2", "FSDP,TP mesh, of each slice")
    slices: int = option(1, "slices of that topology, joined by the data-centre network", low=1, high=64)
    eval_steps: int = option(0, "plan the evaluation of such a run too; 0 means it has none", low=0)
    eval_size: int = option(500, "held-out prompts per evaluation", low=1)
    eval_num_generations: int = option(1, "answers per held-out prompt", low=1)


@dataclasses.dataclass(frozen=True)
class CheckOptions(Options):
    """Check"""

    topology: str = option(
        "", "chips to plan the run for, such as v6e:2x4 or gpu:80GB; unset plans for the accelerators here, if any"
    )
    rollout: bool = option(False, "load the weights, sample a small rollout, and estimate steps, hours and price")
    price_per_hour: float = option(0.0, "price of the machine per hour, for the estimate of --rollout", low=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.price_per_hour and not self.rollout:
            raise UsageError(f"--price_per_hour={self.price_per_hour}: means nothing without --rollout")


@dataclasses.dataclass(frozen=True)
class ReportOptions(Options):
    """Report"""

    run: str = option("", "run folder")


@dataclasses.dataclass(frozen=True)
class CompareOptions(Options):
    """Compare"""

    run: str = option("", "run folder, or file of answers that evaluate --output wrote")
    other: str = option("", "the one to compare it with; a file with two models is compared within itself")


@dataclasses.dataclass(frozen=True)
class TinyOptions(Options):
    """Tiny model"""

    output_dir: str = option("runs/tiny", "folder to write", needed=True)
    vocab_size: int = option(512, "tokens, special ones included", low=300)
    hidden_size: int = option(128, "embedding size", low=8)
    num_hidden_layers: int = option(4, "layers", low=1)


def field_type(field: dataclasses.Field[Any]) -> type:
    """Return the plain type behind a field's annotation: float for `float | None`."""
    kind = field.type
    if isinstance(kind, types.UnionType):
        kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
    assert isinstance(kind, type)
    return kind


AnySettings = TypeVar("AnySettings", bound="Settings")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting there is, as `settings.rollout.temperature`; a command has flags for some of the sections."""

    model: ModelOptions = ModelOptions()
    lora: LoraOptions = LoraOptions()
    data: DataOptions = DataOptions()
    rollout: RolloutOptions = RolloutOptions()
    rewards: RewardOptions = RewardOptions()
    loss: LossOptions = LossOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    steps: StepOptions = StepOptions()
    run: RunOptions = RunOptions()
    cluster: ClusterOptions = ClusterOptions()
    sft: SftOptions = SftOptions()
    evaluate: EvalOptions = EvalOptions()
    generate: GenerateOptions = GenerateOptions()
    plan: PlanOptions = PlanOptions()
    check: CheckOptions = CheckOptions()
    report: ReportOptions = ReportOptions()
    compare: CompareOptions = CompareOptions()
    tiny: TinyOptions = TinyOptions()
    sections: tuple[str, ...] = ()
    """Names of the sections that the command has flags for."""
    explicit: frozenset[str] = frozenset()
    """Names of the flags that were given, on the command line or in a config file."""
    from_file: frozenset[str] = frozenset()
    """Names of those that a config file gave."""

    def with_defaults(self: AnySettings, recipe: Mapping[str, Any]) -> AnySettings:
        """Return these settings with the recipe's values for every flag that was not given explicitly."""
        return self.with_values({name: value for name, value in recipe.items() if name not in self.explicit})

    def with_values(self: AnySettings, values: Mapping[str, Any]) -> AnySettings:
        """Return these settings with other values for some flags of the command."""
        changed = {}
        for name in self.sections:
            options = getattr(self, name)
            own = {field.name: values[field.name] for field in dataclasses.fields(options) if field.name in values}
            changed[name] = dataclasses.replace(options, **own)
        return dataclasses.replace(self, **changed)

    def as_dict(self) -> dict[str, Any]:
        """Return the value of every flag of the command by name, but those of `cluster`: where it runs."""
        named = [name for name in self.sections if name != "cluster"]
        return {flag: value for name in named for flag, value in dataclasses.asdict(getattr(self, name)).items()}


def section_names(kind: type[Settings]) -> tuple[str, ...]:
    """Return every section that a command with such settings may have flags for."""
    about = ("sections", "explicit", "from_file")
    return tuple(field.name for field in dataclasses.fields(kind) if field.name not in about)


SECTION_NAMES = section_names(Settings)

ALL_SETTINGS: Any = Settings
"""Default for a `type[AnySettings]`, untyped because mypy takes no concrete class as one."""


def section_types(sections: tuple[str, ...], kind: type[Settings]) -> dict[str, type[Options]]:
    """Return the options classes of a command's sections, by name."""
    hints = typing.get_type_hints(kind)
    return {name: hints[name] for name in sections}


def make_settings(
    values: Mapping[str, Any], sections: tuple[str, ...], kind: type[AnySettings] = ALL_SETTINGS
) -> AnySettings:
    """Return a command's settings: `values` by flag, which count as given, and defaults for the rest.

    UsageError that names the flag for a value that breaks a limit.
    """
    built: dict[str, Any] = {
        name: options(
            **{field.name: values[field.name] for field in dataclasses.fields(options) if field.name in values}
        )
        for name, options in section_types(sections, kind).items()
    }
    return kind(**built, sections=sections, explicit=frozenset(values))


TINY = "builtin:tiny"

MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    TINY: {
        "max_prompt_length": 128,
        "max_completion_length": 96,
        "page_size": 16,
        "remat": "attention",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
    }
}
"""Defaults that a built-in model carries for every command; explicit flags win."""

TRAIN_DEFAULTS: dict[str, dict[str, Any]] = {
    TINY: {"temperature": 1.0, "learning_rate": 2e-4, "beta": 0.0, "max_steps": 100, "eval_steps": 100},
}
"""Defaults that a built-in model carries for train besides those for every command."""


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object, {} when it does not exist; UsageError naming the file when it is not JSON."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: must hold a JSON object, not {type(content).__name__}")
    return content


def parse_mesh(text: str) -> tuple[int, int]:
    """Parse '4,2' into (4, 2)."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--mesh={text}: must be two positive whole numbers FSDP,TP, such as 4,2")
    return int(parts[0]), int(parts[1])
