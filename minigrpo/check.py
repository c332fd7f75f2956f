"""`python -m minigrpo.check`: will this run learn, fit and finish? Takes the flags of train, and loads no weights.

Each line of the page is ok, warn or fail, with what mends it. The exit code is 0, 1 where something warns, or 2 where
something fails; the last line is JSON.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import re
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import jax
import numpy as np

from minigrpo import plan as planner
from minigrpo.build import Build, build
from minigrpo.command_line import run_named
from minigrpo.commands import COMMANDS
from minigrpo.config import TRAIN_DEFAULTS, PlanOptions, Settings, UsageError
from minigrpo.data.calls import Reward
from minigrpo.data.datasets import PromptSet
from minigrpo.data.findings import FAIL, OK, STATUSES, WARN, Finding, Subject
from minigrpo.data.grading import same_answer
from minigrpo.data.pitfalls import find_mistakes
from minigrpo.data.probes import as_reference
from minigrpo.grpo.experience import Experience, concatenate, sample_experience
from minigrpo.model.qwen import abstract_params
from minigrpo.planning.memory import device_share_bytes
from minigrpo.runtime.checkpoint import state_bytes
from minigrpo.runtime.chips import CHIPS, GIB, Chip
from minigrpo.runtime.files import free_bytes, size_text
from minigrpo.runtime.run_folder import check_empty, check_writable
from minigrpo.runtime.session import with_run_settings
from minigrpo.runtime.workers import joined
from minigrpo.train import (
    check_settings,
    load_held_out,
    load_prompts,
    sampling_spec,
)
from minigrpo.version import __version__

SECTIONS = COMMANDS["check"].sections

ROWS_TRIED = 32
"""Rows whose references the reward functions are tried on."""

SLOW_PARAMETERS = 200_000_000
"""Parameters beyond which training on a CPU is hopeless."""

SHOWN_TOKENS = 400
"""Most tokens of the prompt that the page shows, half at either end."""

MOST_COMPARED = 100_000
"""Training prompts that are compared with held-out ones."""

ROLLOUT_PROMPTS = 8
"""Prompts of a rollout on a CPU; an accelerator takes a step's, in the very program that training needs."""

UPDATE_EFFICIENCY = 0.4
"""Share of a chip's peak FLOP/s that an update is taken to reach."""

Result = TypeVar("Result")


class Page:
    """The findings so far, each printed when it is made."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def add(self, findings: Sequence[Finding]) -> None:
        """Print findings and keep them."""
        for finding in findings:
            self.findings.append(finding)
            self.show(finding.line())

    def show(self, text: str) -> None:
        """Print text."""
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def attempt(self, name: str, work: Callable[[], Result]) -> Result | None:
        """Return the result of work; None where it raises a UsageError, which is a finding that fails."""
        try:
            return work()
        except UsageError as error:
            self.add([Finding(name, FAIL, str(error))])
            return None

    @property
    def code(self) -> int:
        """Return the exit code: the place of the gravest status."""
        return max((STATUSES.index(finding.status) for finding in self.findings), default=0)

    def close(self, figures: dict[str, Any]) -> int:
        """Print the counts and the last line, and return the exit code."""
        counts = Counter(finding.status for finding in self.findings)
        self.show(", ".join(f"{counts[status]} {status}" for status in STATUSES))
        found = [dataclasses.asdict(finding) for finding in self.findings]
        counted = {status: counts[status] for status in STATUSES}
        self.show(json.dumps({"status": STATUSES[self.code]} | counted | {"findings": found} | figures))
        return self.code


# The machine


def machine_findings(built: Build) -> list[Finding]:
    """Return findings about devices, versions, keys and the disk."""
    return [device_finding(built), *key_findings(built.settings), *disk_findings(built)]


def parameter_count(built: Build) -> int:
    """Return the number of the model's parameters, without loading them."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(built.spec.config)))


def device_finding(built: Build) -> Finding:
    """Return the devices, versions and size of the model; a warning for a large model on a CPU."""
    devices, count = built.spec.mesh.devices, parameter_count(built)
    text = (
        f"{devices.size} x {devices.flat[0].device_kind} as --mesh={devices.shape[0]},{devices.shape[1]}, minigrpo "
        f"{__version__}, jax {jax.__version__}, Python {platform.python_version()}; {built.settings.model.model} of "
        f"{count:,} parameters in {built.spec.dtype}"
    )
    if built.spec.platform == "cpu" and count > SLOW_PARAMETERS and not built.settings.check.topology:
        return Finding("machine", WARN, text, "a CPU is far too slow for it: use a TPU or a GPU")
    return Finding("machine", OK, text)


def has_wandb_login() -> bool:
    """Tell if Weights & Biases' key is in the environment or in the file that `wandb login` writes."""
    files = [Path.home() / name for name in (".netrc", "_netrc")]
    with contextlib.suppress(OSError):
        return bool(os.environ.get("WANDB_API_KEY")) or any("wandb" in f.read_text() for f in files if f.is_file())
    return False


def key_findings(settings: Settings) -> list[Finding]:
    """Return whether keys are there, which are never shown; a failure for a sink that needs one."""
    hub, wandb = bool(huggingface_hub.get_token()), has_wandb_login()
    text = ", ".join(
        f"{name} is {'' if there else 'not '}set" for name, there in (("HF_TOKEN", hub), ("WANDB_API_KEY", wandb))
    )
    mode = settings.run.wandb_mode or os.environ.get("WANDB_MODE", "online")
    if "wandb" in settings.run.sinks and mode == "online" and not wandb:
        return [Finding("keys", FAIL, f"{text}, and --report_to=wandb", "set it, or pass --wandb_mode=offline")]
    if settings.run.push_to_hub and not hub:
        return [Finding("keys", FAIL, f"{text}, and --push_to_hub", "set HF_TOKEN, or run hf auth login")]
    return [Finding("keys", OK, text)]


def disk_findings(built: Build) -> list[Finding]:
    """Return whether the run folder can be written and has room for checkpoints and the final model."""
    run = built.settings.run
    if "://" in run.output_dir:
        return [Finding("disk", OK, f"--output_dir={run.output_dir} is no local disk, and not tried here")]
    folder = Path("runs/new" if run.output_dir == "auto" else run.output_dir)
    try:
        if not run.resume:
            check_empty(folder)
        check_writable(folder)
        write_test(folder)
    except UsageError as error:
        return [Finding("disk", FAIL, str(error))]
    each, kept = checkpoint_bytes(built), run.save_total_limit + 1 + bool(run.keep_best)
    needed = each * kept + 2 * parameter_count(built)
    free = free_bytes(folder)
    text = f"{kept} checkpoints of {size_text(each)} and the final model need {size_text(needed)}"
    if free is None:
        return [Finding("disk", OK, text)]
    text = f"{text}, {size_text(free)} are free for {folder.parent}; a file was written there"
    if free < needed:
        return [Finding("disk", FAIL, text, "make room, name another --output_dir, or lower --save_total_limit")]
    return [Finding("disk", OK, text)]


def write_test(folder: Path) -> None:
    """Write a file where the run folder will be, and remove it; UsageError when the disk refuses."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UsageError(f"--output_dir={folder}: {existing} cannot be written ({error.strerror or error})") from error


def checkpoint_bytes(built: Build) -> int:
    """Return the most bytes of one checkpoint: trained parameters, moments, and a reference that moves."""
    shapes = planner.make_shapes(built.spec)
    moving = state_bytes(shapes.trainable) if built.settings.loss.sync_ref_steps else 0
    return state_bytes(shapes.state) + moving


# Data


def overlap_findings(built: Build, data: PromptSet, rewards: list[Reward]) -> list[Finding]:
    """Return a finding about held-out prompts that are trained on too."""
    held = load_held_out(built, rewards)
    if held is None:
        return []
    trained = {tuple(data.tokens[i]) for i in range(min(len(data), MOST_COMPARED))}
    count = sum(tuple(held.tokens[i]) in trained for i in range(len(held)))
    text = f"{len(held)} prompts are evaluated every {built.settings.run.eval_steps} steps, {count} are trained on too"
    status = FAIL if count > len(held) / 2 else WARN if count else OK
    cure = "" if status == OK else "name other rows with --eval_dataset or --eval_split"
    return [Finding("held-out prompts", status, text, cure)]


def marked_tokens(subject: Subject) -> str:
    """Return the first prompt as the model sees it: tokens divided by dots, special ones with their ids."""
    hub, ids = subject.tokenizer.hub, subject.data.tokens[0]
    special = {number for number, token in hub.get_added_tokens_decoder().items() if token.special}
    half = SHOWN_TOKENS // 2
    shown = ids if len(ids) <= SHOWN_TOKENS else [*ids[:half], -1, *ids[-half:]]
    pieces, waiting = [], []
    for token in shown:
        waiting.append(token)
        text = " ... " if token < 0 else hub.decode(waiting, skip_special_tokens=False)
        if text.endswith("\ufffd") and len(waiting) < 8:  # part of a character
            continue
        waiting = []
        pieces.append(f"[{text} {token}]" if token in special else text)
    return "\u00b7".join(pieces)


def show_prompt(page: Page, subject: Subject) -> None:
    """Print the first prompt, token by token, and how a right answer to it looks and ends."""
    page.show(f"the first prompt, {len(subject.data.tokens[0])} tokens, and an answer as the rewards want it:")
    tokenizer = subject.tokenizer
    end = f"[{tokenizer.hub.id_to_token(tokenizer.end_of_turn)} {tokenizer.end_of_turn}]"
    answer = ""
    if subject.rewards and subject.trial.referenced:
        answer = subject.trial.bench.right(subject.trial.expected)[0]
    elif subject.settings.data.offline:
        answer = str(subject.data.rows[0]["responses"][0])
    for prefix, text in (("  | ", marked_tokens(subject)), ("  > ", (answer or "...") + end)):
        page.show(textwrap.indent(text, prefix, lambda line: True))


def data_findings(page: Page, built: Build, loaded: tuple[PromptSet, list[Reward]]) -> dict[str, Any]:
    """Print the findings about data, rewards and template, and the prompt; return the rewards' scores."""
    subject = Subject(built.settings, built.tokenizer, built.source.folder, *loaded, rows_tried=ROWS_TRIED)
    page.add(find_mistakes(subject))
    page.add(page.attempt("held-out prompts", lambda: overlap_findings(built, *loaded)) or [])
    show_prompt(page, subject)
    if not subject.rewards:
        return {}
    trial = subject.trial
    scores = {one.reward.name: one.by_kind.get(trial.expected.name, {}) for one in trial.tried}
    plain = {name: {kind: as_number(value) for kind, value in own.items()} for name, own in scores.items()}
    return {"expected_format": trial.expected.name, "rewards": plain}


def as_number(value: float) -> float | None:
    """Return a number that JSON can hold."""
    return None if math.isnan(value) else round(float(value), 6)


# The plan


def planned_settings(settings: Settings, given: Settings, folder: Path) -> Settings:
    """Return settings to plan for --topology, with the dtype that such chips get, and the devices as --mesh."""
    topology = given.check.topology
    chips = math.prod(int(size) for size in re.findall(r"\d+", topology.partition(":")[2]))
    chips = 1 if topology.startswith(planner.GPU) else max(chips, 1)
    mesh = f"{chips},1" if given.run.mesh == "auto" else given.run.mesh
    options = PlanOptions(topology=topology, mesh=mesh, eval_steps=given.run.eval_steps, eval_size=given.run.eval_size)
    changed = settings.with_values({"compute_dtype": given.model.compute_dtype, "model": str(folder)})
    return dataclasses.replace(changed, plan=options)


def chip_of(built: Build) -> Chip:
    """Return the figures of the devices here."""
    kind = built.spec.mesh.devices.flat[0].device_kind
    found = next((chip for chip in CHIPS.values() if chip.kind == kind), None)
    return found or Chip(kind, built.spec.device_bytes / GIB, 0.0, 0.0, 0.0)


def plan_findings(built: Build, given: Settings) -> tuple[list[Finding], dict[str, Any]]:
    """Return the plan's verdict for --topology, or else for the accelerators here, with its figures."""
    if given.check.topology:
        where = given.check.topology
        report = planner.plan(planned_settings(built.settings, given, built.source.folder))
    elif built.spec.platform != "cpu":
        where = "the devices here"
        report = planner.verdict(built.spec, chip_of(built)) | {"advice": ""}
    else:
        return [], {}
    largest = max(report["phases"], key=lambda name: report["phases"][name]["hbm_gib"])
    text = f"{where}: {largest} needs the most, {report['phases'][largest]['hbm_gib']:.1f} GiB of each"
    if report["fits"]:
        return [Finding("plan", OK, f"fits {text}")], {"plan": report}
    cure = report["advice"] or "lower --slots or --beta=0, or pass --lora_rank=16"
    return [Finding("plan", FAIL, f"does not fit {text}", cure)], {"plan": report}


# The rollout


def sample_rollout(built: Build, data: PromptSet, rewards: list[Reward]) -> tuple[Experience, Experience]:
    """Sample completions of two batches of prompts; only the second is free of compiling."""
    steps = built.settings.steps
    params = built.load(steps.seed, built.spec.base_dtype)
    most = ROLLOUT_PROMPTS if built.spec.platform == "cpu" else steps.batch_size
    spec = sampling_spec(built, data, rewards, device_share_bytes(params), total_steps(built, data))
    spec = dataclasses.replace(spec, batch_size=min(most, steps.batch_size), zero_std_groups="keep")
    return sample_experience(spec, params, 0), sample_experience(spec, params, 1)


def total_steps(built: Build, data: PromptSet) -> int:
    """Return the steps of the run."""
    steps = built.settings.steps
    return steps.max_steps or max(1, round(steps.num_epochs * len(data) / steps.batch_size))


def rollout_figures(built: Build, both: Experience) -> dict[str, float | None]:
    """Return the shares of groups without contrast and of cut completions, accuracy, mean reward and length."""
    groups = np.nan_to_num(both.rewards.reshape(-1, both.group))
    answers = [as_reference(row.get("answer")) for row in both.rows for _ in range(both.group)]
    right = [same_answer(text, answer) for text, answer in zip(both.texts, answers, strict=True) if answer is not None]
    return {
        "frac_reward_zero_std": float((np.ptp(groups, axis=1) < 1e-9).mean()),
        "clipped_ratio": float(1 - both.rollout.stopped.mean()),
        "accuracy": float(np.mean(right)) if right else None,
        "reward": float(np.nan_to_num(both.rewards).mean()),
        "mean_length": float(both.rollout.lengths.mean()),
    }


def step_seconds(built: Build, timed: Experience) -> tuple[float, float]:
    """Return the seconds of sampling and scoring a step, scaled from a rollout, and of its update, estimated."""
    spec, steps = built.spec, built.settings.steps
    share = steps.batch_size / len(timed.rows)
    sampling = share * sum(timed.seconds.values())
    chip = chip_of(built)
    if not chip.tflops:
        return sampling, sampling * steps.num_iterations
    flops = planner.count_work(spec, steps.batch_size, steps.num_generations).update_flops(
        built.settings.optimizer.remat
    )
    peak = chip.tflops * 1e12 * spec.mesh.size * UPDATE_EFFICIENCY
    return sampling, steps.num_iterations * flops / peak


def contrast_finding(figures: dict[str, Any]) -> Finding:
    """Return a finding about groups whose completions all earn the same."""
    share = figures["frac_reward_zero_std"]
    text = f"{share:.0%} of groups have no contrast; mean reward {figures['reward']:.3g}"
    text += "" if figures["accuracy"] is None else f", accuracy {figures['accuracy']:.0%}"
    status = FAIL if share == 1 else WARN if share > 0.7 else OK
    cure = "nothing can be learned from those: take easier or harder problems, a higher --temperature, or sft first"
    return Finding("groups", status, text, "" if status == OK else cure)


def cut_finding(figures: dict[str, Any], limit: int) -> Finding:
    """Return a finding about completions that are cut at the limit."""
    share = figures["clipped_ratio"]
    text = f"{share:.0%} are cut at --max_completion_length={limit}, {figures['mean_length']:.0f} tokens on average"
    status = FAIL if share > 0.95 else WARN if share > 0.3 else OK
    return Finding("completions", status, text, "" if status == OK else "raise it, or see to the end token")


def rollout_findings(built: Build, data: PromptSet, rewards: list[Reward]) -> tuple[list[Finding], dict[str, Any]]:
    """Sample a small rollout; return what it shows of the run, with its figures and the estimate."""
    if built.settings.data.offline:
        return [Finding("rollout", WARN, "--rollout: --offline samples nothing", "leave one of them out")], {}
    first, second = sample_rollout(built, data, rewards)
    figures: dict[str, Any] = dict(rollout_figures(built, concatenate(first, second)))
    sampling, updating = step_seconds(built, second)
    count, price = total_steps(built, data), built.settings.check.price_per_hour
    hours = count * (sampling + updating) / 3600
    figures |= {"steps": count, "seconds_per_step": sampling + updating, "hours": hours}
    figures |= {"price": hours * price} if price else {}
    cost = f", {hours * price:.2f} at {price:g} an hour" if price else ""
    text = (
        f"{count:,} steps of about {sampling:.1f} s of sampling, measured, and {updating:.1f} s of updates, "
        f"estimated: about {hours:.2g} hours{cost}, compiling and evaluation not counted"
    )
    limit = built.settings.rollout.max_completion_length
    found = [contrast_finding(figures), cut_finding(figures, limit), Finding("cost", OK, text)]
    return found, {"rollout": figures}


# The command


def main(given: Settings) -> int:
    """Check the run that the settings describe; return the exit code."""
    with joined(given):
        return examine(given)


def examine(given: Settings) -> int:
    """Print the page and return the exit code."""
    page, figures = Page(), {"minigrpo": __version__, "jax": jax.__version__}

    def start() -> Build:
        settings = with_run_settings(given)
        return build(settings, settings.run.mesh, TRAIN_DEFAULTS)

    built = page.attempt("model", start)
    if built is None:
        return page.close(figures)
    page.add(machine_findings(built))
    page.attempt("settings", lambda: check_settings(built))
    loaded = page.attempt("data", lambda: load_prompts(built))
    if loaded:
        figures |= data_findings(page, built, loaded)
    stages: list[tuple[str, Callable[[], tuple[list[Finding], dict[str, Any]]]]] = []
    if loaded and given.check.rollout:
        stages.append(("rollout", lambda: rollout_findings(built, *loaded)))
    stages.append(("plan", lambda: plan_findings(built, given)))
    for name, stage in stages:
        found, own = page.attempt(name, stage) or ([], {})
        page.add(found)
        figures |= own
    return page.close(figures)


if __name__ == "__main__":
    run_named("check", main)
