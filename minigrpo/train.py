"""`python -m minigrpo.train`: GRPO. Each step: rollout, reward, advantage, update, log."""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minigrpo.build import (
    Build,
    announce,
    build,
    check_lora,
    check_loss,
    check_quantize,
    grpo_update_spec,
    make_generator,
)
from minigrpo.command_line import run_named
from minigrpo.commands import COMMANDS
from minigrpo.config import TRAIN_DEFAULTS, Settings, UsageError
from minigrpo.data.calls import Reward, TrainerState
from minigrpo.data.datasets import (
    XML_REWARDS,
    PromptSet,
    check_evaluated,
    held_out_options,
    load_dataset,
    naming_eval_flags,
    tokenize,
)
from minigrpo.data.findings import OK, Subject
from minigrpo.data.pitfalls import find_mistakes
from minigrpo.data.recorded import load_recorded
from minigrpo.data.rewards import check_columns, check_names, overlong_rewards, parse_rewards
from minigrpo.door import make_callable
from minigrpo.evaluate import (
    Scoring,
    answer_questions,
    greedy_options,
    held_out,
    margin_rows,
    read_answers,
)
from minigrpo.grpo.batch import Batch, PackedBatch, PackingSpec, pack, put_batch
from minigrpo.grpo.experience import (
    Experience,
    SamplingSpec,
    advantages_of,
    batch_of,
    sample_experience,
    split_batch,
)
from minigrpo.grpo.offline import hold_out, margins, recorded_experience, validate
from minigrpo.grpo.optimizer import TrainState, init_state
from minigrpo.grpo.samples import TokenScores, records_tokens, sample_rows, token_columns
from minigrpo.grpo.update import UpdateSpec, batch_logprobs, update
from minigrpo.model.params import Params, join, split_trainable
from minigrpo.planning.memory import device_share_bytes, packing_spec, pool_limit
from minigrpo.report import closing_words, write_report
from minigrpo.rollout.generator import Rollout
from minigrpo.runtime.bucket import RunHome
from minigrpo.runtime.mesh import fetch
from minigrpo.runtime.progress import Progress
from minigrpo.runtime.run_folder import RunFolder, completion_metrics, memory_metrics, reward_metrics
from minigrpo.runtime.session import (
    Measured,
    Measurement,
    Position,
    Session,
    check_home,
    choose_home,
    open_session,
    with_run_settings,
)
from minigrpo.runtime.sinks import Opener, find_sinks
from minigrpo.runtime.workers import WORKERS, joined
from minigrpo.share import check_hub, push, write_card

SECTIONS = COMMANDS["train"].sections

PROGRAMS = {"decode_weights": 1, "run_mesh": 2, "batch_logprobs": 2, "gradients": 2, "apply_gradients": 1}
"""Device programs of a run, and how often each may be compiled: sampling once more for evaluation."""

CHECK_SECONDS = 2.0
"""Most that an own reward function may take over made-up answers before the first step."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """The policy that the KL term compares with, and the programs that compute its log-probs."""

    spec: UpdateSpec
    params: Params | None
    """None where the reference moves: it is then part of the state."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run with its choices made."""

    build: Build
    update_spec: UpdateSpec
    packing: PackingSpec
    frozen: Params
    """The weights that are not trained: the base under adapters, {} otherwise."""
    reference: Reference | None
    collect: Callable[[Params, int], Experience]
    """(policy, step) -> the step's completions and their rewards, sampled or from a file."""
    reward_weights: dict[str, float]
    evaluate: Measurement | None
    data_size: int
    total_steps: int

    @property
    def settings(self) -> Settings:
        """Return the settings of the run."""
        return self.build.settings

    def policy(self, state: TrainState) -> Params:
        """Return all of the policy's weights."""
        return join(state.params, self.frozen)


def train(run: Run, state: TrainState, session: Session) -> tuple[Position, TrainState]:
    """Run the loop: rollout and reward, advantage, update, log. Stop early where a signal asked for it."""
    at, log = session.first, session.log
    session.evaluate_first(state, run.evaluate)
    for step in range(at.step, run.total_steps):
        clock = Clock()
        with session.saving(at, state):
            log.progress.phase("rollout")
            experience = run.collect(run.policy(state), step)
        clock.start_phase()
        log.progress.phase("update")
        batch = batch_with_advantages(run, experience)
        batches = pack_minibatches(run, state, batch, experience.prompts)
        clock.mark("time/logprobs")
        state, metrics, tokens = improve(run, state, batches)
        state = move_reference(run, state, step)
        clock.mark("time/update")
        metrics |= summary(run, experience, step, clock)
        at = at.after(metrics["skipped_updates"] > 0)
        log.log(at.step, metrics)
        log.log_completions(at.step, samples(run, experience, batch, TokenScores(batches[0], tokens), at.step))
        session.check_skipped(at, batch)
        best = session.checkpoints.rate(at.step, metrics)
        best |= session.evaluate(at, state, run.evaluate)
        session.end_step(at, state, best)
    return at, state


# From experience to the next state


def batch_with_advantages(run: Run, experience: Experience) -> Batch:
    """Return the step's completions with their advantages, on the host."""
    lone = 1.0 if run.settings.data.offline else 0.0
    advantages = advantages_of(experience, run.settings.rewards, run.reward_weights, lone)
    exclude = run.settings.loss.mask_truncated_completions
    return batch_of(experience, advantages, run.settings.rollout.max_completion_length, exclude)


def pack_minibatches(run: Run, state: TrainState, batch: Batch, prompts: list[list[int]]) -> list[PackedBatch]:
    """Pack the minibatches onto the mesh, with old and reference log-probs where the loss needs them."""
    mesh = run.build.spec.mesh
    minibatches = split_batch(batch, prompts, run.settings.steps.num_minibatches)
    packed = [put_batch(mesh, pack(run.packing, own_prompts, own)) for own, own_prompts in minibatches]
    return jax.block_until_ready([add_logprobs(run, state, one) for one in packed])


def add_logprobs(run: Run, state: TrainState, packed: PackedBatch) -> PackedBatch:
    """Add old log-probs where several updates follow, and the reference's where there is one."""
    old = ref = None
    if run.settings.steps.updates_per_step > 1:
        old = batch_logprobs(run.update_spec, run.policy(state), packed)
    if run.reference:
        params = run.reference.params if run.reference.params is not None else join(state.reference, run.frozen)
        ref = batch_logprobs(run.reference.spec, params, packed)
    return dataclasses.replace(packed, batch=dataclasses.replace(packed.batch, old_logprobs=old, ref_logprobs=ref))


def improve(
    run: Run, state: TrainState, batches: list[PackedBatch]
) -> tuple[TrainState, dict[str, float], dict[str, Array]]:
    """Make --num_iterations passes over the minibatches -> new state, metrics, and numbers of every token.

    Metrics are means of the last pass, read once at the end. The numbers are the first minibatch's in that pass, from
    before its update.
    """
    passed, tokens = [], dict[str, Array]()
    for number in range(len(batches) * run.settings.steps.num_iterations):
        state, metrics, own = update(run.update_spec, state, batches[number % len(batches)], run.frozen)
        passed.append(metrics)
        tokens = tokens if number % len(batches) else own
    read = jax.device_get(passed)
    last = read[-len(batches) :]
    means = {name: float(over_minibatches(name)([one[name] for one in last])) for name in last[0]}
    total = {"skipped_updates": float(sum(one["skipped_updates"] for one in read))}
    return state, means | {"learning_rate": float(last[-1]["learning_rate"])} | total, tokens


def over_minibatches(name: str) -> Callable[[list[Any]], Any]:
    """Return how a metric of several minibatches becomes the step's: by its name the least, the most or the mean."""
    return np.max if name.endswith("max") else np.min if name.endswith("min") else np.mean


@jax.jit
def mix(reference: Params, params: Params, share: Float[Array, ""]) -> Params:
    """Move the reference towards the policy (TR-DPO, arXiv:2404.09656, eq. 3)."""
    return jax.tree.map(lambda old, new: ((1 - share) * old + share * new).astype(old.dtype), reference, params)


def move_reference(run: Run, state: TrainState, step: int) -> TrainState:
    """Move the reference to the policy every --sync_ref_steps."""
    options = run.settings.loss
    if not options.sync_ref_steps or (step + 1) % options.sync_ref_steps:
        return state
    moved = mix(state.reference, state.params, jnp.float32(options.ref_mixup_alpha))
    return dataclasses.replace(state, reference=moved)


# What is logged


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.phases: dict[str, float] = {}

    def start_phase(self) -> None:
        """Begin the next phase here: the time before it is counted elsewhere."""
        self.last = time.perf_counter()

    def mark(self, name: str) -> None:
        """End a phase."""
        now = time.perf_counter()
        self.phases[name], self.last = now - self.last, now

    def total(self) -> float:
        """Return the seconds up to the end of the last phase."""
        return self.last - self.started


def summary(run: Run, experience: Experience, step: int, clock: Clock) -> dict[str, float]:
    """Return the step's metrics besides the update's own."""
    rollout, present = experience.rollout, experience.rollout.lengths > 0
    lengths = rollout.lengths[present]
    asked = np.repeat([len(prompt) for prompt in experience.prompts], experience.group)[present].sum()
    phases = experience.seconds | clock.phases
    epoch = (step + 1) * run.settings.steps.batch_size / run.data_size
    scale = run.settings.rewards.scale_rewards
    return (
        {"epoch": epoch, "num_tokens": float(lengths.sum() + asked)}
        | reward_metrics(experience.rewards, experience.components, experience.group, scale)
        | experience.metrics
        | {"frac_groups_left_out": float(1 - experience.group_mask.mean())}
        | completion_metrics(lengths, rollout.stopped[present])
        | {"step_time": clock.total(), "tokens_per_second": lengths.sum() / clock.total()}
        | phases
        | rollout_metrics(rollout, phases)
        | memory_metrics()
    )


def rollout_metrics(rollout: Rollout, phases: dict[str, float]) -> dict[str, float]:
    """Return the metrics of sampling; none for responses on file."""
    if not rollout.decode_steps:
        return {}
    return {
        "rollout/tokens_per_second": rollout.sampled / phases["time/rollout"],
        "rollout/occupancy": rollout.occupancy,
        "rollout/preempted": float(rollout.preempted),
        "rollout/refilled_share": float(rollout.refilled / max(1, rollout.sampled)),
    } | kept_metrics(rollout)


def kept_metrics(rollout: Rollout) -> dict[str, float]:
    """Return the mean probability that truncated sampling kept, per token; none where it left nothing out."""
    if rollout.kept is None:
        return {}
    mask = np.arange(rollout.tokens.shape[1]) < rollout.lengths[:, None]
    return {"rollout/kept_mass": float(rollout.kept.mass[mask].mean())}


def samples(run: Run, experience: Experience, batch: Batch, scores: TokenScores, step: int) -> list[dict[str, Any]]:
    """Return rows of completions.jsonl: the step's first group, and some of the next."""
    count = run.settings.run.log_completions
    recorded = count and records_tokens(step, run.total_steps)
    tokens = token_columns(experience, run.build.tokenizer.decode, scores) if recorded else []
    return sample_rows(experience, batch.advantages, step, count, tokens)


# Setting up


def load_held_out(built: Build, rewards: list[Reward]) -> PromptSet | None:
    """Read the rows of --eval_steps, before training starts; with reference answers if there is no other measure."""
    settings = built.settings
    if not settings.run.eval_steps:
        return None
    options, size = held_out_options(settings.data, settings.run), settings.run.eval_size
    with naming_eval_flags():
        if settings.data.offline:
            limit, end = settings.rollout.max_completion_length, built.tokenizer.end_of_turn
            return load_recorded(built.tokenizer, options, limit, end, "test", size)
        data = held_out(built.tokenizer, options, size, read_answers(rewards))
        check_columns(rewards, data.rows[0])
        return data


def load_prompts(built: Build) -> tuple[PromptSet, list[Reward]]:
    """Read the training prompts, and the reward functions for sampled completions."""
    settings, limit = built.settings, built.settings.rollout.max_completion_length
    options, flags = settings.data, settings.rewards
    if options.offline:
        refuse_sampling_flags(settings)
        return load_recorded(built.tokenizer, options, limit, built.tokenizer.end_of_turn), []
    rewards = parse_rewards(XML_REWARDS if flags.reward == "auto" else flags.reward)
    rewards += overlong_rewards(flags.overlong_buffer, flags.overlong_penalty, limit)
    check_names(flags.reward, rewards)
    dataset = load_dataset(options, "train", read_answers(rewards))
    check_columns(rewards, dataset.rows[0])
    data = tokenize(dataset, built.tokenizer, options)
    sys.stderr.write(f"data: {len(data)} prompts of {dataset.name}, {data.dropped} dropped as too long\n")
    return data, rewards


def tell_mistakes(built: Build, data: PromptSet, rewards: list[Reward]) -> None:
    """Print what is likely to keep a new run from learning, a line each; see minigrpo.check for all of it."""
    if built.settings.run.resume or not WORKERS.writes:
        return
    subject = Subject(built.settings, built.tokenizer, built.source.folder, data, rewards, seconds=CHECK_SECONDS)
    for finding in find_mistakes(subject):
        if finding.status != OK:
            sys.stderr.write(f"{finding.line()}\n")


def refuse_sampling_flags(settings: Settings) -> None:
    """Raise UsageError for flags that mean nothing without sampling."""
    alone = {"reward": "auto", "overlong_buffer": 0, "zero_std_groups": "keep", "rollout_correction": "none"}
    alone |= {"normalize_rewards": "sum", "top_k": 0, "top_p": 1.0, "min_p": 0.0, "stop": ""}
    given = next((name for name, value in alone.items() if settings.as_dict()[name] != value), None)
    if given:
        raise UsageError(f"--{given}: --offline takes the responses and scores of the file; leave --{given} out")


def load_reference(built: Build, spec: UpdateSpec, trainable: Params, frozen: Params) -> tuple[Reference | None, Any]:
    """Return the reference of the KL term, and the part of it that the state holds if it moves.

    Under adapters the reference is the base without them, which costs no copy.
    """
    loss, lora = built.settings.loss, built.spec.config.lora
    if not loss.beta:
        return None, None
    if loss.sync_ref_steps:
        start = jax.tree.map(jnp.copy, trainable) if lora else built.load(built.settings.steps.seed, built.spec.dtype)
        return Reference(spec, None), start
    if lora:
        base = dataclasses.replace(spec.model, config=dataclasses.replace(built.spec.config, lora=None))
        return Reference(dataclasses.replace(spec, model=base), frozen), None
    return Reference(spec, built.load(built.settings.steps.seed, built.spec.dtype)), None


def check_settings(built: Build) -> None:
    """Raise UsageError for settings that cannot be trained with."""
    check_loss(built.settings)
    check_quantize(built.spec.config)
    check_lora(built.settings, built.spec.config)
    check_evaluated(built.settings)


def sampling_spec(
    built: Build, data: PromptSet, rewards: list[Reward], resident: int, total_steps: int
) -> SamplingSpec:
    """Return the spec of sampling and scoring completions; `resident` bytes stay on each device meanwhile."""
    settings = built.settings
    return SamplingSpec(
        data=data,
        generator=make_generator(built.spec, settings.rollout, pool_limit(built.spec, resident)),
        decode=built.tokenizer.decode,
        rewards=tuple(rewards),
        reward_timeout=settings.rewards.reward_timeout,
        batch_size=settings.steps.batch_size,
        group=settings.steps.num_generations,
        seed=settings.steps.seed,
        total_steps=total_steps,
        stops=settings.rollout.stop_texts,
        zero_std_groups=settings.loss.zero_std_groups,
        max_resamples=settings.loss.max_resamples,
    )


def make_run(built: Build) -> tuple[Run, TrainState]:
    """Load data and weights, and make a run and its first state of them."""
    check_settings(built)
    settings, spec = built.settings, built.spec
    steps = settings.steps
    data, rewards = load_prompts(built)
    if WORKERS.count > 1:
        WORKERS.equal({f"prompts of --dataset={settings.data.dataset} of digest": data.digest()})
    tell_mistakes(built, data, rewards)
    held = load_held_out(built, rewards)
    total = steps.max_steps or max(1, round(steps.num_epochs * len(data) / steps.batch_size))
    update_spec = grpo_update_spec(spec, total * steps.updates_per_step)
    packing = packing_spec(spec, spec.update_sequences, steps.num_generations)
    trainable, frozen = split_trainable(spec.config, built.load(steps.seed, spec.base_dtype))
    reference, moving = load_reference(built, update_spec, trainable, frozen)
    offloaded = update_spec.offload_optimizer
    state = init_state(update_spec.optimizer, trainable, spec.mesh, moving, offloaded=offloaded)
    if settings.data.offline:
        collect = functools.partial(recorded_experience, data, steps.batch_size, steps.num_generations, steps.seed)
    else:
        resident = resident_bytes(state, frozen, reference)
        collect = functools.partial(sample_experience, sampling_spec(built, data, rewards, resident, total))
    weights = {reward.name: reward.weight for reward in rewards}
    run = Run(built, update_spec, packing, frozen, reference, collect, weights, None, len(data), total)
    return dataclasses.replace(run, evaluate=make_evaluation(run, held, rewards, state)), state


def resident_bytes(state: TrainState, frozen: Params, reference: Reference | None) -> int:
    """Return the bytes of training on each device while it samples."""
    return device_share_bytes((state, frozen, reference.params if reference else None))


def make_evaluation(run: Run, held: PromptSet | None, rewards: list[Reward], state: TrainState) -> Measurement | None:
    """Return the measurement of --eval_steps: accuracy and rewards of answers, or the margin of responses on file."""
    if held is None:
        return None
    if run.settings.data.offline:
        return make_validation(run, held, state)
    settings, samples = run.settings, run.settings.run.eval_num_generations
    decoding = greedy_options(settings.rollout) if samples == 1 else settings.rollout
    resident = resident_bytes(state, run.frozen, run.reference)

    def measure(state: TrainState, step: int) -> Measured:
        at = TrainerState(global_step=step, max_steps=run.total_steps)
        scoring = Scoring(tuple(rewards), settings.rewards.reward_timeout, settings.steps.seed, at)
        return answer_questions(run.build, run.policy(state), held, decoding, samples, scoring, resident)

    return measure


def make_validation(run: Run, held: PromptSet, state: TrainState) -> Measurement:
    """Return the validation on held-out responses, against the policy at the start."""
    steps, mesh = run.settings.steps, run.build.spec.mesh
    group, size = steps.num_generations, run.build.spec.update_sequences // steps.num_generations
    rows = hold_out(mesh, run.packing, held, group, size, functools.partial(batch_with_advantages, run))

    def mean_logprobs(state: TrainState) -> Float[np.ndarray, " B"]:
        return rows.mean_logprobs(lambda batch: fetch(batch_logprobs(run.update_spec, run.policy(state), batch)))

    before = mean_logprobs(state)

    def measure(state: TrainState, step: int) -> Measured:
        now = mean_logprobs(state)
        found = margins(now.reshape(-1, group), rows.scores.reshape(-1, group))
        return Measured(validate(rows, before, now, group), margin_rows(held, found))

    return measure


def warn_of_zeros(settings: Settings) -> None:
    """Print a line for settings under which a loss or a KL penalty is 0 by construction."""
    loss, once = settings.loss, settings.steps.updates_per_step == 1
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
    """Train as the settings say."""
    with joined(settings), Progress() as progress, choose_home(settings.run) as home:
        return run_training(with_run_settings(settings, home), progress, home)


def run_training(
    settings: Settings, progress: Progress, home: RunHome, sinks: Mapping[str, Opener] = MappingProxyType({})
) -> int:
    """Build the run, train it, and write its results; `sinks` are opened besides those of --report_to."""
    progress.phase("loading")
    openers = find_sinks(settings.run) | dict(sinks) if WORKERS.writes else {}
    built = build(settings, settings.run.mesh, TRAIN_DEFAULTS)
    folder = home.folder
    check_home(built.settings, home)
    WORKERS.first(lambda: check_hub(built.settings.run))
    run, state = make_run(built)
    announce(built, run.packing, built.spec.update_sequences, (state.params, run.frozen), home.name)
    warn_of_zeros(built.settings)
    if (built.settings.optimizer.warmup_steps or 0) > run.total_steps:
        sys.stderr.write(f"note: --warmup_steps is more than the run's {run.total_steps}: the rate never peaks\n")
    session, state = open_session(home, built.settings, run.total_steps, state, progress, openers)

    def export(state: TrainState) -> Path:
        built.export(folder / "final", folder / "adapter", state.params, run.frozen)
        return Path(WORKERS.first(lambda: describe_run(folder, built)))

    code = session.complete(lambda: train(run, state, session), export, PROGRAMS)
    name = built.settings.run.push_to_hub
    if not code and name:
        upload(session.log, name)
    if code == 0 and session.log.writes:
        session.log.say(closing_words(folder))
    return code


def describe_run(folder: Path, built: Build) -> str:
    """Write the report and the model card -> the report's path."""
    page = write_report(folder)
    write_card(folder, built.settings, built.source.base)
    return str(page)


def upload(log: RunFolder, name: str) -> None:
    """Upload the model to the Hub repository `name`; UsageError in every process where that fails."""
    log.progress.phase("upload")
    log.say(f"uploaded: {WORKERS.first(lambda: push(log.folder, name))}")


make_callable(__name__)

if __name__ == "__main__":
    run_named("train", main)
