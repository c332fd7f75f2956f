"""The commands: what each is for, the settings that it has flags for, and how it is called."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Command:
    """A command, which is called by `python -m minigrpo.NAME`."""

    does: str
    sections: tuple[str, ...]
    """Names of the fields of Settings that it has flags for."""
    examples: tuple[str, ...] = ()
    """Arguments of calls to try, without the command itself."""
    notes: str = ""
    names: tuple[str, ...] = ()
    """Flags that arguments without a name stand for, in order."""


COMMANDS = {
    "check": Command(
        "try a run's rewards, prompts and machine before it starts",
        ("model", "lora", "data", "rollout", "rewards", "loss", "optimizer", "steps", "run", "cluster", "check"),
        (
            "--config=tunix-gsm8k",
            "--model=./my-qwen --dataset=train.jsonl --reward=my_rewards.py:brevity --rollout",
        ),
    ),
    "train": Command(
        "train a model with GRPO on sampled or scored responses",
        ("model", "lora", "data", "rollout", "rewards", "loss", "optimizer", "steps", "run", "cluster"),
        (
            "--mesh=4,2 --max_steps=10",
            "--config=tunix-gsm8k --max_steps=1000",
            "--model=./my-qwen --dataset=train.jsonl --reward='correctness,my_rewards.py:brevity*0.2' --eval_steps=50",
            "--resume --output_dir=runs/mine",
        ),
    ),
    "sft": Command(
        "warm-start a base model on prompt/completion rows",
        ("model", "lora", "data", "optimizer", "sft", "run", "cluster"),
        ("--model=./my-base --dataset=rows.jsonl --learning_rate=1e-5 --output_dir=runs/warm",),
        "Here --answer_column is the completion; auto tries completion, response, output, answer, solution.\n"
        "The trained model is in RUN/final; --model=RUN of other commands finds it there.",
    ),
    "evaluate": Command(
        "measure accuracy, pass@k and majority@k on held-out problems",
        ("model", "data", "rollout", "evaluate", "cluster"),
        (
            "--model=runs/mine --base=Qwen/Qwen3-1.7B",
            "--model=runs/mine --num_generations=8 --temperature=0.9 --output=answers.jsonl",
        ),
        "Here --temperature is 0 unless given, for a single answer: greedy.\n"
        "--model and --base may also be a run folder, one of its checkpoints or an adapter; it is asked as that run "
        "asked.",
    ),
    "generate": Command(
        "answer a prompt, a file of prompts, or a chat",
        ("model", "data", "rollout", "generate", "cluster"),
        ("--model=runs/mine --prompt='What is 12 times 7?'", "--model=runs/mine --chat"),
        "--model may also be a run folder, one of its checkpoints or an adapter; it is asked as that run did.",
    ),
    "plan": Command(
        "compile a run for TPU chips you do not have, and say whether it fits",
        ("model", "lora", "data", "rollout", "loss", "optimizer", "steps", "plan"),
        (
            "--config=tunix-gsm8k --topology=v6e:2x4 --mesh=4,2",
            "--config=lora-scored-responses --topology=gpu:24GB --mesh=1,1",
        ),
    ),
    "report": Command("draw a run's plots and page", ("report",), ("--run=runs/mine",), names=("run",)),
    "compare": Command(
        "compare two runs or models on the same problems, by a paired test",
        ("compare",),
        ("--run=runs/a --other=runs/b", "--run=answers.jsonl"),
        "python -m minigrpo.compare runs/a runs/b does too. A run must have --eval_steps; a file is what evaluate "
        "--output wrote.\nThe test is McNemar's, exact; for several answers, rewards and margins one of random sign "
        "changes.\nThe problems needed are those that show the difference in four of five tests.",
        ("run", "other"),
    ),
    "tiny": Command(
        "write the config and tokenizer that builtin:tiny starts from",
        ("tiny",),
        ("--output_dir=runs/tiny",),
    ),
}
