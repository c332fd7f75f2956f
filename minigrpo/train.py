"""`python -m minigrpo.train`: GRPO. Each step: rollout, reward, advantage, update, log."""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minigrpo import build
from minigrpo.build import TINY, Setup, check_lora, check_loss, check_quantize, set_up
from minigrpo.config import (
    DataOptions,
    LoraOptions,
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
from minigrpo.data.datasets import Prompts, is_file, load_dataset, tokenize
from minigrpo.data.rewards import Reward, check_names, overlong_rewards, parse_rewards
from minigrpo.evaluate import accuracy, held_out
from minigrpo.grpo import update as grpo
from minigrpo.grpo.experience import Experience, Job, advantages, host_batch, make_batches, move_reference, sampled
from minigrpo.grpo.offline import load_recorded, recorded, validator
from minigrpo.grpo.optimizer import TrainState, init_state, learning_rate
from minigrpo.model.qwen import Params, split_trained
from minigrpo.planning.memory import choose_parts, held_bytes, pool_limit
from minigrpo.report import write_report
from minigrpo.rollout.generator import Rollout
from minigrpo.runtime.checkpoint import Checkpoints, check_same_run
from minigrpo.runtime.mesh import worker_mesh
from minigrpo.runtime.run_folder import (
    RunFolder,
    check_empty,
    check_writable,
    completion_metrics,
    import_wandb,
    make_folder,
    open_sinks,
    reward_metrics,
)

SECTIONS = (
    ModelOptions, LoraOptions, DataOptions, RolloutOptions, RewardOptions, LossOptions, OptimizerOptions, StepOptions,
    RunOptions,
)  # fmt: skip


RECIPES: dict[str, dict[str, Any]] = {
    TINY: {"temperature": 1.0, "learning_rate": 2e-4, "beta": 0.0, "max_steps": 100},
}
"""Defaults that a built-in model carries for this command besides `minigrpo.build.RECIPES`."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A job with its two choices."""

    job: Job
    gather: Callable[[Job, TrainState, int], Experience]
    """Where a step's completions and rewards come from."""
    check: Callable[[TrainState], dict[str, float]] | None
    """What --eval_steps measures."""


def train(run: Run, state: TrainState, first_step: int, folder: RunFolder, checkpoints: Checkpoints) -> TrainState:
    """The loop: rollout and reward, advantage, update, log."""
    job, options = run.job, run.job.options(RunOptions)
    skipped_in_a_row = 0
    for step in range(first_step, job.total_steps):
        clock = Clock()
        experience = run.gather(job, state, step)
        clock.start_phase()
        batches = make_batches(job, experience, advantages(job, experience), state)
        clock.mark("time/logprobs")
        state, metrics = improve(job, state, batches)
        state = move_reference(job, state, step)
        clock.mark("time/update")
        metrics |= summary(job, experience, step, clock)
        folder.log(step + 1, metrics)
        folder.append("completions.jsonl", samples(job, step, experience))
        skipped_in_a_row = skipped_in_a_row + 1 if metrics["skipped_updates"] else 0
        if skipped_in_a_row == options.max_skipped_steps:
            batch = host_batch(job, experience, advantages(job, experience))
            give_up(folder, step + 1, batch, options.max_skipped_steps)
        if run.check and (step + 1) % options.eval_steps == 0:
            evaluate(run.check(state), step + 1, folder)
        if options.save_steps and (step + 1) % options.save_steps == 0:
            checkpoints.save(step + 1, state)
    return state


def improve(job: Job, state: TrainState, batches: list[grpo.Batch]) -> tuple[TrainState, dict[str, float]]:
    """--num_iterations passes over the minibatches; metrics are the last pass's, with the learning rate used last."""
    schedule = learning_rate(job.options(OptimizerOptions), total_updates(job.options(StepOptions), job.total_steps))
    skipped, passed = 0.0, []
    for batch in batches * job.options(StepOptions).num_iterations:
        rate = float(schedule(int(state.updates)))
        state, metrics = grpo.update(job.trainer, state, batch, job.frozen)
        skipped += float(metrics["skipped_updates"])
        passed.append({name: float(value) for name, value in metrics.items()})
    last = passed[-len(batches) :]
    own = {"learning_rate": rate, "skipped_updates": skipped}
    return state, {name: float(np.mean([update[name] for update in last])) for name in last[0]} | own


def give_up(folder: RunFolder, step: int, batch: grpo.Batch, count: int) -> None:
    """Saves the step's batch, in which a loss or gradient is not finite, and ends the run."""
    path = folder.folder / f"not-finite-step-{step}.npz"
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    if folder.writes:
        np.savez(path, **{name: value for name, value in fields.items() if value is not None})
    raise UsageError(
        f"--max_skipped_steps={count}: the loss or gradient of {count} steps in a row was not finite, so nothing was "
        f"learned from them; the last one's batch is {path}. Start again with a lower --learning_rate"
    )


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self):
        self.started = self.last = time.perf_counter()
        self.phases: dict[str, float] = {}

    def start_phase(self) -> None:
        """What went before is not timed, or timed elsewhere."""
        self.last = time.perf_counter()

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.phases[name], self.last = now - self.last, now

    def total(self) -> float:
        return self.last - self.started


def summary(job: Job, experience: Experience, step: int, clock: Clock) -> dict[str, float]:
    """The step's metrics besides the update's own."""
    options, rollout = job.options(StepOptions), experience.rollout
    present = rollout.lengths > 0
    lengths = rollout.lengths[present]
    memory = jax.local_devices()[0].memory_stats() or {}
    asked = np.repeat([len(job.data.tokens[i]) for i in experience.indices], job.group)[present].sum()
    phases = experience.seconds | clock.phases
    return (
        {"epoch": (step + 1) * options.batch_size / len(job.data), "num_tokens": float(lengths.sum() + asked)}
        | reward_metrics(experience.rewards, experience.parts, job.group)
        | {"frac_groups_left_out": float(1 - experience.used.mean())}
        | completion_metrics(lengths, rollout.stopped[present])
        | {"step_time": clock.total(), "tokens_per_second": lengths.sum() / clock.total()}
        | phases
        | rollout_metrics(rollout, lengths, phases)
        | ({"device/peak_bytes": memory["peak_bytes_in_use"]} if "peak_bytes_in_use" in memory else {})
    )


def rollout_metrics(rollout: Rollout, lengths: np.ndarray, phases: dict[str, float]) -> dict[str, float]:
    """How well sampling went; nothing for responses on file."""
    if not rollout.decode_steps:
        return {}
    return {"rollout/tokens_per_second": lengths.sum() / phases["time/rollout"], "rollout/occupancy": rollout.occupancy}


def samples(job: Job, step: int, experience: Experience) -> list[dict[str, Any]]:
    """The first completions of the step, one per prompt, with their rewards."""
    shown = range(min(job.options(RunOptions).log_completions, len(experience.indices)))
    rows = [(job.data.rows[experience.indices[i]], i * job.group) for i in shown]
    return [
        {"step": step + 1, "prompt": row["prompt"], "completion": experience.texts[at]}
        | {"reward": as_json(experience.rewards[at]), "length": int(experience.rollout.lengths[at])}
        | {"rewards": {name: as_json(scores[at]) for name, scores in experience.parts.items()}}
        for row, at in rows
    ]


def as_json(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def evaluate(result: dict[str, float], step: int, folder: RunFolder) -> None:
    """Writes and prints what --eval_steps measured."""
    folder.append("evaluations.jsonl", [{"step": step} | result])
    folder.say(f"step {step}: held out: " + "  ".join(f"{name} {value:.4g}" for name, value in result.items()))


# Setting up and ending


def total_updates(options: StepOptions, steps: int) -> int:
    return steps * options.updates_per_step


def held_out_options(setup: Setup) -> DataOptions:
    """Where the prompts of --eval_steps come from; UsageError when nothing was named and there is no test split."""
    run, data = setup.settings[RunOptions], setup.settings[DataOptions]
    if run.eval_dataset == "auto" and (is_file(data.dataset) or data.offline):
        raise UsageError(
            f"--eval_steps={run.eval_steps}: {data.dataset} has no test split; name one with --eval_dataset"
        )
    return dataclasses.replace(data, dataset=data.dataset if run.eval_dataset == "auto" else run.eval_dataset)


def load_held_out(setup: Setup) -> Prompts | None:
    """The rows of --eval_steps, read before training starts."""
    run, data = setup.settings[RunOptions], setup.settings[DataOptions]
    if not run.eval_steps:
        return None
    options = held_out_options(setup)
    try:
        return load_recorded(setup, options, run.eval_size) if data.offline else held_out(setup, options, run.eval_size)
    except UsageError as error:
        raise UsageError(str(error).replace("--dataset=", "--eval_dataset=")) from error


def load_prompts(setup: Setup) -> tuple[Prompts, list[Reward]]:
    """What is trained on, and the reward functions of what is sampled."""
    options, flags = setup.settings[DataOptions], setup.settings[RewardOptions]
    if options.offline:
        refuse_sampling_flags(setup.settings)
        return load_recorded(setup, options), []
    dataset = load_dataset(options, "train")
    data = tokenize(dataset, setup.tokenizer, options)
    sys.stderr.write(f"data: {len(data)} prompts of {dataset.name}, {data.dropped} dropped as too long\n")
    rewards = parse_rewards(dataset.reward if flags.reward == "auto" else flags.reward)
    limit = setup.settings[RolloutOptions].max_completion_length
    rewards += overlong_rewards(flags.overlong_buffer, flags.overlong_penalty, limit)
    check_names(flags.reward, rewards)
    return data, rewards


def refuse_sampling_flags(settings: Settings) -> None:
    """UsageError for flags that mean nothing without sampling."""
    alone = {"reward": "auto", "overlong_buffer": 0, "zero_std_groups": "keep", "rollout_correction": "none"}
    alone |= {"normalize_rewards": "sum"}
    given = next((name for name, value in alone.items() if settings.as_dict()[name] != value), None)
    if given:
        raise UsageError(f"--{given}: --offline takes the responses and scores of the file; leave --{given} out")


def load_reference(setup: Setup, trained: Params) -> Params | None:
    """What the KL penalty holds the policy to: adapters that change nothing, or another copy of the weights."""
    if not setup.settings[LossOptions].beta:
        return None
    if setup.config.lora:
        return jax.tree.map(jnp.zeros_like, trained)
    return setup.load(setup.settings[StepOptions].seed, setup.dtype)


def make_run(setup: Setup) -> tuple[Run, TrainState]:
    settings = setup.settings
    steps = settings[StepOptions]
    check_loss(settings[LossOptions], settings[RolloutOptions])
    check_quantize(setup.config)
    check_lora(settings, setup.config)
    if "wandb" in settings[RunOptions].report_to:
        import_wandb()
    data, rewards = load_prompts(setup)
    held = load_held_out(setup)
    total = steps.max_steps or max(1, round(steps.num_epochs * len(data) / steps.batch_size))
    parts = choose_parts(setup)
    trainer = setup.trainer(total_updates(steps, total), parts)
    trained, frozen = split_trained(setup.config, setup.load(steps.seed, setup.trained_dtype))
    reference = load_reference(setup, trained)
    moving = settings[LossOptions].sync_ref_steps > 0
    state = init_state(trainer.optimizer, trained, setup.mesh, reference if moving else None)
    resident = held_bytes((state, frozen, reference))
    job = Job(
        setup=setup,
        data=data,
        rewards=rewards,
        roller=setup.roller(settings[RolloutOptions], pool_limit=pool_limit(setup, resident)),
        trainer=trainer,
        frozen=frozen,
        reference=None if moving else reference,
        total_steps=total,
    )
    return Run(job, recorded if settings[DataOptions].offline else sampled, make_check(job, held, trained)), state


def make_check(job: Job, held: Prompts | None, start: Params) -> Callable[[TrainState], dict[str, float]] | None:
    """What --eval_steps measures: greedy accuracy, or how responses on file have fared."""
    if held is None:
        return None
    if job.options(DataOptions).offline:
        validate = validator(job, held, job.whole(start))
        return lambda state: validate(job.whole(state.params))
    whole = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "pool_pages": 0}
    greedy = dataclasses.replace(job.options(RolloutOptions), temperature=0.0, **whole)
    return lambda state: accuracy(job.setup, job.whole(state.params), held, greedy)


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


def announce(job: Job, state: TrainState, folder: Path) -> None:
    """Every value used, once, and where things go."""
    for kind, section in job.setup.settings.sections.items():
        values = " ".join(f"{name}={value}" for name, value in dataclasses.asdict(section).items() if value is not None)
        sys.stderr.write(f"{(kind.__doc__ or '').lower()}: {values}\n")
    devices = job.setup.mesh.devices
    workers = worker_mesh(job.setup.mesh, jax.local_device_count()).size
    beside = f", {workers} for rollouts of small models" if workers > devices.size else ""
    sys.stderr.write(
        f"mesh: fsdp={devices.shape[0]} tp={devices.shape[1]} of {devices.flat[0].device_kind} devices{beside}; "
        f"update in {job.trainer.parts} part{'s' * (job.trainer.parts > 1)}; run folder {folder}\n"
    )
    counts = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, job.frozen)]
    sys.stderr.write(f"parameters: {counts[0]:,} trained, {counts[1]:,} frozen\n")
    loss, once = job.options(LossOptions), job.options(StepOptions).updates_per_step == 1
    if loss.loss_type == "grpo" and not loss.beta and once:
        sys.stderr.write(
            "note: on-policy with --beta=0 the loss is about 0 by construction; watch reward and grad_norm\n"
        )
    if loss.sync_ref_steps == 1 and loss.ref_mixup_alpha == 1 and once:
        sys.stderr.write(
            "note: --sync_ref_steps=1 makes the reference equal to the policy before every update: "
            "the KL penalty is 0 by construction\n"
        )


def main(settings: Settings) -> int:
    setup = set_up(settings, settings[RunOptions].mesh, RECIPES)
    options = setup.settings[RunOptions]
    folder = choose_folder(setup)
    run, state = make_run(setup)
    job = run.job
    announce(job, state, folder)
    make_folder(folder)
    if not options.resume:
        setup.settings.save(folder)
    checkpoints = Checkpoints(folder / "checkpoints", options.save_total_limit)
    first_step, state = checkpoints.restore(state) if options.resume else (0, state)
    writes = jax.process_index() == 0
    sinks = open_sinks(folder, options, setup.settings.as_dict(), first_step) if writes else []
    log = RunFolder(folder, job.total_steps, sinks, writes, first_step)
    if options.resume:
        log.say(f"resumed after step {first_step}")
    if run.check and first_step == 0:
        evaluate(run.check(state), 0, log)
    state = train(run, state, first_step, log, checkpoints)
    try:
        checkpoints.save(job.total_steps, state)
        checkpoints.close()
    finally:  # what was trained is written even where a checkpoint could not be
        log.close()
        setup.export(folder / "final", folder / "adapter", state.params, job.frozen)
        page = write_report(folder)
    sys.stderr.write(f"done: {job.total_steps} steps; model in {folder / 'final'}, report in {page}\n")
    return 0


if __name__ == "__main__":
    own = "\n  ".join(f"--{name}={value}" for name, value in (build.RECIPES[TINY] | RECIPES[TINY]).items())
    run_command("python -m minigrpo.train", __doc__ or "", SECTIONS, main, f"{TINY} has defaults of its own:\n  {own}")
