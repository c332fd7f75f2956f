"""`python -m minigrpo.train`: GRPO. Each step: rollout, reward, advantage, update, log."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from minigrpo import grpo, start
from minigrpo.checkpoint import Checkpoints, check_same_run
from minigrpo.config import (
    DataOptions,
    LossOptions,
    ModelOptions,
    OptimizerOptions,
    RewardOptions,
    RolloutOptions,
    RunOptions,
    Settings,
    StepOptions,
    UsageError,
    run_command,
)
from minigrpo.data import Prompts, batch_numbers, is_file, load_dataset, tokenize
from minigrpo.evaluate import accuracy, held_out
from minigrpo.memory import choose_parts
from minigrpo.metrics import RunFolder, check_empty, check_writable, completion_metrics, make_folder, reward_metrics
from minigrpo.model import Params
from minigrpo.optimizer import TrainState, init_state, learning_rate
from minigrpo.rewards import Reward, parse_rewards, score_completions
from minigrpo.rollout import Roller, Rollout
from minigrpo.sharding import by_sequence, put
from minigrpo.start import TINY, Setup, check_loss, set_up
from minigrpo.weights import export

SECTIONS = (
    ModelOptions, DataOptions, RolloutOptions, RewardOptions, LossOptions, OptimizerOptions, StepOptions, RunOptions,
)  # fmt: skip


RECIPES: dict[str, dict[str, Any]] = {
    TINY: {"temperature": 1.0, "learning_rate": 2e-4, "beta": 0.0, "max_steps": 100},
}
"""Defaults that a built-in model carries for this command besides `minigrpo.start.RECIPES`."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run is made of besides its state."""

    setup: Setup
    data: Prompts
    rewards: list[Reward]
    roller: Roller
    trainer: grpo.Trainer
    reference: Params | None
    held_out: Prompts | None
    total_steps: int

    def options(self, section: type) -> Any:
        return self.setup.settings[section]


def train(job: Job, state: TrainState, first_step: int, folder: RunFolder, checkpoints: Checkpoints) -> TrainState:
    """The loop."""
    run, seed = job.options(RunOptions), job.options(StepOptions).seed
    skipped_in_a_row = 0
    for step in range(first_step, job.total_steps):
        clock = Clock()
        numbers = batch_numbers(len(job.data), job.options(StepOptions).batch_size, step, seed)
        indices = [number % len(job.data) for number in numbers]
        rollout = roll_out(job, state, indices, numbers, step)
        clock.mark("time/rollout")
        rewards, parts, texts = reward(job, rollout, indices)
        clock.mark("time/reward")
        batch = make_batch(job, rollout, advantages(job, rewards, parts), indices, state)
        clock.mark("time/logprobs")
        state, metrics = improve(job, state, batch)
        clock.mark("time/update")
        metrics |= summary(job, rollout, rewards, parts, indices, step, clock)
        folder.log(step + 1, metrics)
        folder.append("completions.jsonl", samples(job, step, indices, texts, rewards))
        skipped_in_a_row = skipped_in_a_row + 1 if metrics["skipped_updates"] else 0
        if skipped_in_a_row == run.max_skipped_steps:
            give_up(folder, step + 1, batch, run.max_skipped_steps)
        if job.held_out and (step + 1) % run.eval_steps == 0:
            evaluate(job, state, step + 1, folder)
        if run.save_steps and (step + 1) % run.save_steps == 0:
            checkpoints.save(step + 1, state)
    return state


def roll_out(job: Job, state: TrainState, indices: list[int], numbers: list[int], step: int) -> Rollout:
    """--num_generations completions of each of the step's prompts."""
    options = job.options(StepOptions)
    prompts = [job.data.tokens[i] for i in indices]
    return job.roller(state.params, prompts, numbers, options.num_generations, (options.seed, step))


def reward(job: Job, rollout: Rollout, indices: list[int]) -> tuple[np.ndarray, dict[str, np.ndarray], list[str]]:
    """Weighted rewards [B], each function's scores, and the completions as text."""
    rows = [job.data.rows[i] for i in indices for _ in range(job.options(StepOptions).num_generations)]
    ids = [tokens[:length].tolist() for tokens, length in zip(rollout.tokens, rollout.lengths, strict=True)]
    texts = job.setup.tokenizer.decode(ids)
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}
    arguments = columns | {"prompts": columns["prompt"], "completions": texts, "completion_ids": ids}
    return *score_completions(job.rewards, job.options(RewardOptions).reward_timeout, arguments), texts


def advantages(job: Job, rewards: np.ndarray, parts: dict[str, np.ndarray]) -> np.ndarray:
    """How much better than its group every completion is [B]."""
    options, group = job.options(RewardOptions), job.options(StepOptions).num_generations
    if options.normalize_rewards == "each":
        return grpo.normalised_apart(parts, {reward.name: reward.weight for reward in job.rewards}, group)
    return grpo.group_advantages(rewards, group, options.scale_rewards, options.baseline)


def make_batch(job: Job, rollout: Rollout, advantages: np.ndarray, indices: list[int], state: TrainState) -> grpo.Batch:
    """The update's input on the mesh: advantages, and old and reference log-probs where the loss needs them."""
    options = job.options(StepOptions)
    group = options.num_generations
    limits = job.options(DataOptions).max_prompt_length, job.options(RolloutOptions).max_completion_length
    prompts = [job.data.tokens[i] for i in indices for _ in range(group)]
    batch = grpo.assemble(prompts, rollout.tokens, rollout.lengths, limits)
    batch = dataclasses.replace(
        batch,
        advantages=advantages,
        rollout_logprobs=rollout.logprobs[:, : batch.completions.shape[1]],
        left_out=~rollout.stopped if job.options(LossOptions).mask_truncated_completions else None,
    )
    mesh = job.setup.mesh
    batch = put(mesh, grpo.pad_rows(batch, mesh.size * job.trainer.parts), by_sequence(mesh))
    old = grpo.batch_logprobs(job.trainer, state.params, batch) if options.num_iterations > 1 else None
    ref = None if job.reference is None else grpo.batch_logprobs(job.trainer, job.reference, batch)
    return jax.block_until_ready(dataclasses.replace(batch, old_logprobs=old, ref_logprobs=ref))


def improve(job: Job, state: TrainState, batch: grpo.Batch) -> tuple[TrainState, dict[str, float]]:
    """--num_iterations updates on the batch; metrics are the last one's, with the learning rate it used."""
    schedule = learning_rate(job.options(OptimizerOptions), total_updates(job.options(StepOptions), job.total_steps))
    skipped = 0.0
    for _ in range(job.options(StepOptions).num_iterations):
        rate = float(schedule(int(state.updates)))
        state, metrics = grpo.update(job.trainer, state, batch)
        skipped += float(metrics["skipped_updates"])
    own = {"learning_rate": rate, "skipped_updates": skipped}
    return state, {name: float(value) for name, value in metrics.items()} | own


def give_up(folder: RunFolder, step: int, batch: grpo.Batch, count: int) -> None:
    """Saves the batch whose loss or gradient is not finite, and ends the run."""
    path = folder.folder / f"not-finite-step-{step}.npz"
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    whole: dict[str, Any] = multihost_utils.process_allgather(
        {name: value for name, value in fields.items() if value is not None}, tiled=True
    )
    if folder.writes:
        np.savez(path, **whole)
    raise UsageError(
        f"--max_skipped_steps={count}: the loss or gradient of {count} steps in a row was not finite, so nothing was "
        f"learned from them; the last one's batch is {path}. Start again with a lower --learning_rate"
    )


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self):
        self.started = self.last = time.perf_counter()
        self.phases: dict[str, float] = {}

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.phases[name], self.last = now - self.last, now

    def total(self) -> float:
        return self.last - self.started


def summary(
    job: Job, rollout: Rollout, rewards: np.ndarray, parts: dict, indices: list[int], step: int, clock: Clock
) -> dict[str, float]:
    """The step's metrics besides the update's own."""
    options = job.options(StepOptions)
    memory = jax.local_devices()[0].memory_stats() or {}
    asked = options.num_generations * sum(len(job.data.tokens[i]) for i in indices)
    return (
        {"epoch": (step + 1) * options.batch_size / len(job.data), "num_tokens": float(rollout.lengths.sum() + asked)}
        | reward_metrics(rewards, parts, options.num_generations)
        | completion_metrics(rollout.lengths, rollout.stopped)
        | {"rollout/occupancy": rollout.occupancy, "step_time": clock.total()}
        | clock.phases
        | {"rollout/tokens_per_second": rollout.lengths.sum() / clock.phases["time/rollout"]}
        | ({"device/peak_bytes": memory["peak_bytes_in_use"]} if "peak_bytes_in_use" in memory else {})
    )


def samples(job: Job, step: int, indices: list[int], texts: list[str], rewards: np.ndarray) -> list[dict[str, Any]]:
    """The first completions of the step, one per prompt, with their rewards."""
    group = job.options(StepOptions).num_generations
    shown = range(min(job.options(RunOptions).log_completions, len(indices)))
    return [
        {
            "step": step + 1,
            "prompt": job.data.rows[indices[i]]["prompt"],
            "completion": texts[i * group],
            "reward": float(rewards[i * group]),
        }
        for i in shown
    ]


def evaluate(job: Job, state: TrainState, step: int, folder: RunFolder) -> None:
    """Greedy accuracy on held-out prompts, to evaluations.jsonl."""
    whole = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "pool_pages": 0}
    greedy = dataclasses.replace(job.options(RolloutOptions), temperature=0.0, **whole)
    assert job.held_out
    result = accuracy(job.setup, state.params, job.held_out, greedy)
    folder.append("evaluations.jsonl", [{"step": step} | result])
    folder.say(f"step {step}: greedy accuracy {result['accuracy']:.1%} of {result['problems']} held-out problems")


# Setting up and ending


def total_updates(options: StepOptions, steps: int) -> int:
    return steps * options.num_iterations


def load_held_out(setup: Setup) -> Prompts | None:
    """The problems of --eval_steps, read before training starts."""
    run, data = setup.settings[RunOptions], setup.settings[DataOptions]
    if not run.eval_steps:
        return None
    if run.eval_dataset == "auto" and is_file(data.dataset):
        raise UsageError(
            f"--eval_steps={run.eval_steps}: {data.dataset} has no test split; name one with --eval_dataset"
        )
    source = data.dataset if run.eval_dataset == "auto" else run.eval_dataset
    try:
        return held_out(setup, dataclasses.replace(data, dataset=source), run.eval_size)
    except UsageError as error:
        raise UsageError(f"--eval_dataset={run.eval_dataset}: {error}") from error


def make_job(setup: Setup) -> Job:
    settings = setup.settings
    steps = settings[StepOptions]
    dataset = load_dataset(settings[DataOptions], "train")
    data = tokenize(dataset, setup.tokenizer, settings[DataOptions])
    sys.stderr.write(f"data: {len(data)} prompts of {dataset.name}, {data.dropped} dropped as too long\n")
    total = steps.max_steps or max(1, round(steps.num_epochs * len(data) / steps.batch_size))
    flag = settings[RewardOptions].reward
    rewards = parse_rewards(dataset.reward if flag == "auto" else flag)
    roller = setup.roller(settings[RolloutOptions])
    check_loss(settings[LossOptions], settings[RolloutOptions])
    parts = choose_parts(setup, steps.batch_size * steps.num_generations)
    trainer = setup.trainer(total_updates(steps, total), parts)
    reference = setup.load(steps.seed, setup.dtype) if settings[LossOptions].beta > 0 else None
    return Job(setup, data, rewards, roller, trainer, reference, load_held_out(setup), total)


def choose_folder(setup: Setup) -> Path:
    """The run folder, new or to be resumed; UsageError rather than a mix of two runs. Creates nothing."""
    options = setup.settings[RunOptions]
    folder = Path(time.strftime("runs/%Y%m%d-%H%M%S") if options.output_dir == "auto" else options.output_dir)
    if options.resume:
        if options.output_dir == "auto":
            raise UsageError("--resume: name the run to continue with --output_dir")
        check_same_run(folder, setup.settings.as_dict())
    else:
        check_empty(folder)
    check_writable(folder)
    return folder


def announce(job: Job, folder: Path) -> None:
    """Every value used, once, and where things go."""
    for kind, section in job.setup.settings.sections.items():
        values = " ".join(f"{name}={value}" for name, value in dataclasses.asdict(section).items() if value is not None)
        sys.stderr.write(f"{(kind.__doc__ or '').lower()}: {values}\n")
    devices = job.setup.mesh.devices
    sys.stderr.write(
        f"mesh: fsdp={devices.shape[0]} tp={devices.shape[1]} of {devices.flat[0].device_kind} devices; "
        f"update in {job.trainer.parts} parts; run folder {folder}\n"
    )
    if (
        job.options(LossOptions).loss_type == "grpo"
        and job.reference is None
        and job.options(StepOptions).num_iterations == 1
    ):
        sys.stderr.write(
            "note: on-policy with --beta=0 the loss is about 0 by construction; watch reward and grad_norm\n"
        )


def main(settings: Settings) -> int:
    setup = set_up(settings, settings[RunOptions].mesh, RECIPES)
    options = setup.settings[RunOptions]
    folder = choose_folder(setup)
    job = make_job(setup)
    state = init_state(job.trainer.optimizer, setup.load(job.options(StepOptions).seed), setup.mesh)
    announce(job, folder)
    make_folder(folder)
    if not options.resume:
        setup.settings.save(folder)
    checkpoints = Checkpoints(folder / "checkpoints", options.save_total_limit)
    first_step, state = checkpoints.restore(state) if options.resume else (0, state)
    writes = jax.process_index() == 0
    log = RunFolder(folder, job.total_steps, options.report_to == "tensorboard", writes, first_step)
    if options.resume:
        log.say(f"resumed after step {first_step}")
    state = train(job, state, first_step, log, checkpoints)
    checkpoints.save(job.total_steps, state)
    checkpoints.close()
    log.close()
    export(folder / "final", setup.folder, state.params, setup.config, setup.stop_tokens)
    sys.stderr.write(f"done: {job.total_steps} steps; model in {folder / 'final'}\n")
    return 0


if __name__ == "__main__":
    own = "\n  ".join(f"--{name}={value}" for name, value in (start.RECIPES[TINY] | RECIPES[TINY]).items())
    run_command("python -m minigrpo.train", __doc__ or "", SECTIONS, main, f"{TINY} has defaults of its own:\n  {own}")
