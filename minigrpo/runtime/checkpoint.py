"""Checkpoints: written in the background, every array checked by its digest when read, the newest good one taken.

RUN/checkpoints/N holds the state after N steps: orbax's arrays in `default/`, and a manifest with every array's shape,
dtype and digest and with the counters of the host. Data, manifest and names are on the disk itself before the folder
gets its name.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from minigrpo.config import UsageError
from minigrpo.runtime.bucket import (
    Place,
    RunHome,
    absolute,
    in_bucket,
    is_checkpoint,
    remove_checkpoint,
    write_error,
)
from minigrpo.runtime.digest import Digests, begin_digests
from minigrpo.runtime.files import free_bytes, remove_tree, size_text, sync, sync_tree, write_whole
from minigrpo.runtime.run_folder import last_step
from minigrpo.runtime.workers import WORKERS

FREE_TO_CHANGE = {
    "eval_dataset", "eval_num_generations", "eval_size", "eval_steps", "grace_seconds", "gradient_accumulation_steps",
    "hub_private", "keep_best", "log_completions", "logging_steps", "max_skipped_steps", "mesh", "offload_optimizer",
    "output_dir", "page_size", "pool_pages", "print_completions", "push_to_hub", "remat", "report_to", "resume",
    "reward_timeout", "save_minutes", "save_steps", "save_total_limit", "slots", "wandb_mode", "wandb_project",
}  # fmt: skip
"""Settings that a resumed run may have otherwise than the run it continues: they change no result by design."""

MAY_GROW = ("max_steps", "num_epochs")
"""Settings of the run's length, which a resumed run may have larger."""

FORMAT = 1
"""Version of the manifest; a higher one is refused."""

MANIFEST = Path("manifest", "metadata")
"""Where orbax puts the item that is called manifest."""

TEMPORARY = ".orbax-checkpoint-tmp"
MARKER = "newest_checkpoint.txt"
"""File of the run folder that says which checkpoint reached the disk last."""


Found = tuple[dict[str, jax.Array], dict[str, Any]]
"""A checkpoint's arrays and its manifest."""


class Unusable(Exception):
    """A checkpoint that is torn or damaged; its text says how."""


def quiet(record: logging.LogRecord) -> bool:
    """Let a log record pass unless orbax wrote it: its reports are raised as exceptions too."""
    return "orbax" not in record.pathname


def is_late(error: BaseException | None) -> bool:
    """Tell if an error is of an abandoned read: tensorstore's threads report it after the first one."""
    return any(text in str(error) for text in ("Event loop is closed", "TensorStore"))


@functools.cache
def silence_orbax() -> None:
    """Keep orbax's warnings and its tasks' tracebacks off the terminal: failures are raised as well."""
    logging.getLogger("absl").addFilter(quiet)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # after a failed save
    show, show_unraisable = sys.excepthook, sys.unraisablehook
    sys.excepthook = lambda *error: None if is_late(error[1]) else show(*error)
    sys.unraisablehook = lambda error: None if is_late(error.exc_value) else show_unraisable(error)


def flatten(tree: Any) -> dict[str, Any]:
    """Return leaves by path, so that a checkpoint depends on no Python class: {'params/layers/mlp/up': ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(like: Any, leaves: dict[str, Any]) -> Any:
    """Return a tree of the structure of `like` from leaves by path."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in flatten(like)])


def state_bytes(state: Any) -> int:
    """Return the bytes of a state's arrays, the most that its checkpoint takes on disk."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def first_line(error: BaseException) -> str:
    """Return the message of an error, without the details of tensorstore's objects."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.split(" See full TensorStore details")[0].split(" [source locations=")[0][:300]


# The manifest


def seal(content: dict[str, Any]) -> str:
    """Return the digest of a manifest's content."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def make_manifest(
    step: int, arrays: dict[str, jax.Array], digests: dict[str, int], host: dict[str, Any], best: "Best | None"
) -> dict[str, Any]:
    """Return the manifest beside the arrays: {'format', 'step', 'arrays': {name: [shape, dtype, digest]}, ...}."""
    content = {
        "format": FORMAT,
        "step": step,
        "arrays": {name: [list(array.shape), str(array.dtype), digests[name]] for name, array in arrays.items()},
        "host": host,
        "best": best and dataclasses.asdict(best),
    }
    return content | {"seal": seal(content)}


def read_manifest(step: Place) -> dict[str, Any]:
    """Return a checkpoint's manifest; Unusable when it is missing or damaged, UsageError when a newer minigrpo's."""
    try:
        content: dict[str, Any] = json.loads((step / MANIFEST).read_text(encoding="utf-8"))
        intact = content.pop("seal") == seal(content)
    except FileNotFoundError as error:
        raise Unusable(f"no {MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unusable(f"{MANIFEST} is not readable ({first_line(error)})") from error
    if not intact:
        raise Unusable(f"{MANIFEST} is damaged")
    if content["format"] > FORMAT:
        raise UsageError(f"{step}: written by a newer minigrpo (format {content['format']}); pip install -U minigrpo")
    if str(content["step"]) != step.name:
        raise Unusable(f"holds step {content['step']}")
    return content


def difference(manifest: dict[str, Any], shapes: dict[str, Any]) -> str:
    """Return the first array that a checkpoint holds in another shape than `shapes`; empty when there is none."""
    saved = {name: tuple(shape) for name, (shape, *_) in manifest["arrays"].items()}
    wanted = {name: tuple(array.shape) for name, array in shapes.items()}
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            return f"{name} is {saved.get(name, 'nothing')} there and {wanted.get(name, 'nothing')} here"
    return ""


def check_digests(manifest: dict[str, Any], arrays: dict[str, jax.Array]) -> None:
    """Raise Unusable, naming the array, when one differs from the saved one."""
    for name, value in begin_digests(arrays)().items():
        if value != manifest["arrays"][name][2]:
            raise Unusable(f"{name} is damaged: its digest is not the one it was saved with")


def read_arrays(step: Place, named: dict[str, Any]) -> dict[str, jax.Array]:
    """Return the arrays named, which may be some of a checkpoint's, laid out as in `named`, without checking them."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(named)
    arguments = ocp.args.PyTreeRestore(item=named, partial_restore=True, restore_args=restore_args)
    with ocp.PyTreeCheckpointer() as checkpointer:
        return dict(checkpointer.restore(absolute(step / "default"), args=arguments))


def read_checked(step: Place, named: dict[str, Any], manifest: dict[str, Any]) -> dict[str, jax.Array]:
    """Return the arrays named, in the dtypes and layouts of `named`; Unusable when any is torn or damaged."""
    as_saved = {
        name: jax.ShapeDtypeStruct(array.shape, manifest["arrays"][name][1], sharding=array.sharding)
        for name, array in named.items()
    }
    try:
        arrays = read_arrays(step, as_saved)
    except Exception as error:  # a torn checkpoint surfaces as any of orbax's, tensorstore's or the system's
        raise Unusable(first_line(error)) from error
    if missing := [name for name, array in arrays.items() if not isinstance(array, jax.Array)]:
        raise Unusable(f"{missing[0]} is missing")
    check_digests(manifest, arrays)
    return {name: array.astype(named[name].dtype) for name, array in arrays.items()}


def read_params(step: Path, shapes: Any) -> Any:
    """Return the parameters of a checkpoint's training state, laid out as `shapes`; UsageError for an unusable one."""
    silence_orbax()
    named = flatten({"params": shapes})
    try:
        manifest = read_manifest(step)
        saved = {name: array for name, array in manifest["arrays"].items() if name.startswith("params/")}
        if other := difference({"arrays": saved}, named):
            raise UsageError(f"{step}: is another model's ({other}); check --model and --base_model")
        return unflatten({"params": shapes}, read_checked(step, named, manifest))["params"]
    except Unusable as error:
        raise UsageError(f"{step}: not a usable checkpoint ({error}); name another one") from error


# The folder


@dataclasses.dataclass(frozen=True)
class Best:
    """The step with the best value so far of the metric of --keep_best."""

    metric: str
    step: int
    value: float


def set_aside(step: Place) -> None:
    """Move a checkpoint's folder out of the way, under a name that is free, so that saving goes on at its step."""
    wanted = step.parent.parent / f"unusable-checkpoint-{step.name}"
    names = [wanted, *(wanted.with_name(f"{wanted.name}-{number}") for number in range(2, 1000))]
    step.rename(next(name for name in names if not name.exists()))


def make_checkpointer(finalized: Callable[[], None]) -> ocp.AsyncCheckpointer:
    """Return a writer of checkpoints in the background that gives the devices no program: a rollout would hold it up.

    Workers wait for each other by jax's coordination service, not by a collective. An array of which devices have
    copies is written by the first of them, not in slices by all.
    """
    several = set(range(WORKERS.count)) if WORKERS.count > 1 else None
    one = {"multiprocessing_options": ocp.options.MultiprocessingOptions(active_processes=several)}
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(**one),
        default=ocp.PyTreeCheckpointHandler(type_handler_registry=registry, **one),
        manifest=ocp.JsonCheckpointHandler(**one),
    )
    options = ocp.options.AsyncOptions(post_finalization_callback=finalized)
    return ocp.AsyncCheckpointer(handler, async_options=options, **one)


class Checkpoints:
    """The checkpoints of one run folder, by number of finished steps."""

    def __init__(
        self,
        folder: Path | RunHome,
        keep: int,
        *,
        save_steps: int = 0,
        save_minutes: float = 0.0,
        keep_best: str = "",
    ):
        """Open RUN/checkpoints, or those of a run's home; nothing is deleted before `restore` or the first `save`."""
        silence_orbax()
        self.home = folder if isinstance(folder, RunHome) else RunHome(folder.parent)
        self.folder: Place = self.home.checkpoints if isinstance(folder, RunHome) else folder
        self.keep, self.save_steps, self.save_minutes = keep, save_steps, save_minutes
        self.metric = keep_best.removeprefix("-")
        self.sign = -1 if keep_best.startswith("-") else 1
        self.best: Best | None = None
        self.committed = set(self.steps())
        self.newest = 0
        """The newest step that is on the disk itself, or was restored."""
        self.needed = 0
        self.saved_at = time.monotonic()
        self.finisher: threading.Thread | None = None
        self.failure: BaseException | None = None
        self.begun: tuple[int, Digests] | None = None
        """A step and the digests of its state."""
        self.checkpointer = make_checkpointer(self.sync_data)

    def steps(self) -> list[int]:
        """Return the numbers of the folders that may be checkpoints, ascending."""
        folders = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(path.name) for path in folders if is_checkpoint(path))

    # Saving

    def rate(self, step: int, metrics: dict[str, float]) -> bool:
        """Return whether the metric of --keep_best is among these and the best so far: `step` is to be saved then.

        UsageError for a metric that is missing where it was to be found for the first time.
        """
        same_kind = all(name.startswith("eval/") == self.metric.startswith("eval/") for name in metrics)
        if self.metric and not self.best and same_kind and self.metric not in metrics:
            raise UsageError(f"--keep_best={self.metric}: no such metric; there are {', '.join(sorted(metrics))}")
        value = self.sign * metrics.get(self.metric, math.nan)
        if math.isnan(value) or (self.best and value <= self.sign * self.best.value):
            return False
        self.best = Best(self.metric, step, metrics[self.metric])
        return True

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is to be made now, by --save_steps or by --save_minutes.

        UsageError when the one before could not be written.
        """
        self.raise_failure()
        if not self.save_steps:
            return False
        late = self.save_minutes > 0 and time.monotonic() - self.saved_at >= 60 * self.save_minutes
        return step % self.save_steps == 0 or late

    def begin_digests(self, step: int, state: Any) -> Digests:
        """Begin what a save of `state` needs from the devices: a rollout then keeps them busy until its end."""
        if self.begun is None or self.begun[0] != step:
            self.begun = step, begin_digests(flatten(state))
        return self.begun[1]

    def save(self, step: int, state: Any, host: dict[str, Any] | None = None) -> None:
        """Start saving `state` and the JSON values `host` as after `step` steps; returns before they are on disk.

        UsageError when this or the save before it cannot be written.
        """
        self.wait()
        if step in self.committed:
            return
        arrays = flatten(state)
        self.needed = state_bytes(state)
        path = self.folder / str(step)
        try:
            if path.exists() and WORKERS.writes:
                set_aside(path)
            manifest = make_manifest(step, arrays, self.begin_digests(step, state)(), host or {}, self.best)
            items = ocp.args.Composite(default=ocp.args.PyTreeSave(arrays), manifest=ocp.args.JsonSave(manifest))
            self.checkpointer.save(absolute(path), args=items)
        except Exception as error:  # orbax wraps what the system raises in many ways
            raise write_error(path, error, self.needed) from error
        self.saved_at = time.monotonic()
        self.finisher = threading.Thread(target=self.finish, args=(step,), name=f"checkpoint {step}", daemon=True)
        self.finisher.start()

    def sync_data(self) -> None:
        """Bring the logs up to a checkpoint, and itself, to the disk before it gets its name; in orbax's own thread."""
        self.home.flush()
        if WORKERS.writes and not in_bucket(self.folder):
            for folder in self.folder.glob(f"*{TEMPORARY}*"):
                sync_tree(Path(folder))

    def finish(self, step: int) -> None:
        """Wait for a save under way, then note it and delete older ones; runs in a thread of its own."""
        try:
            self.checkpointer.wait_until_finished()
            if WORKERS.writes:
                if not in_bucket(self.folder):
                    sync(Path(self.folder))
                write_whole(self.home.folder / MARKER, f"{step}\n")
                self.home.saved(step)
            self.committed.add(step)
            self.newest = step
            self.prune()
        except Exception as error:  # as in save; raised in the main thread by raise_failure
            self.failure = error

    def prune(self) -> None:
        """Delete all checkpoints but the newest --save_total_limit and the best."""
        protected = {*sorted(self.committed)[-self.keep :], *([self.best.step] if self.best else [])}
        for step in sorted(self.committed - protected):
            self.committed.discard(step)
            if WORKERS.writes and (self.folder / str(step)).exists():
                remove_checkpoint(self.folder / str(step))
                self.home.removed(step)

    def raise_failure(self) -> None:
        """Raise an error of the save in the background as a UsageError."""
        if self.failure:
            failure, self.failure = self.failure, None
            raise write_error(self.folder, failure, self.needed) from failure

    def wait(self) -> None:
        """Wait until the save under way is on the disk itself; UsageError when it cannot be written."""
        if self.finisher:
            self.finisher.join()
            self.finisher = None
        self.raise_failure()

    def close(self) -> None:
        """Wait as `wait` does, then release orbax's resources."""
        try:
            self.wait()
        finally:
            self.checkpointer.close()

    def space(self, state: Any) -> str:
        """Return a line on the space that the run's checkpoints need, and whether there is enough."""
        each, kept = state_bytes(state), self.keep + 1 + bool(self.metric)
        free = None if in_bucket(self.folder) else free_bytes(Path(self.folder))
        line = f"checkpoints: up to {size_text(each)} each, {kept} at once"
        if free is None:
            return line
        short = "" if free > each * kept else "; too little: make room, or lower --save_total_limit"
        return f"{line}, {size_text(free)} free in {self.folder.parent}{short}"

    # Restoring

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]]:
        """Return the newest good checkpoint as (step, state laid out as `like`, host); (0, like, {}) before the first.

        Unusable ones after it are named and set aside. UsageError, with nothing moved, when none can be used, when they
        are another model's or a newer minigrpo's, or when there were some and all are gone.
        """
        candidates = self.steps()
        if not candidates:
            self.check_none_is_lost()
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), flatten(like))
        failed: dict[Place, str] = {}
        for step in reversed(candidates):
            found = self.attempt(step, shapes, failed)
            if found:
                arrays, manifest = found
                self.take(step, manifest, failed)
                return step, unflatten(like, arrays), manifest["host"]
        if failed:
            reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in failed.items())
            raise UsageError(
                f"--resume: no usable checkpoint in {self.folder} ({reasons}); nothing was moved; "
                "start anew in another --output_dir"
            )
        self.take(0, {"best": None}, failed)
        return 0, like, {}

    def attempt(self, step: int, shapes: dict[str, Any], failed: dict[Place, str]) -> Found | None:
        """Return a checkpoint's arrays and manifest, or None and why in `failed`; UsageError for another model's."""
        folder = self.folder / str(step)
        found, reason = None, "unusable in another process"
        try:
            manifest = read_manifest(folder)
            if other := difference(manifest, shapes):
                raise UsageError(f"--resume: {folder} is another model's ({other}); check --model and --output_dir")
            found = read_checked(folder, shapes, manifest), manifest
        except Unusable as error:
            reason = str(error)
        if not WORKERS.any(found is None):
            return found
        failed[folder] = reason
        sys.stderr.write(f"checkpoint {folder} is not usable, trying the one before: {reason}\n")
        return None

    def take(self, step: int, manifest: dict[str, Any], failed: dict[Place, str]) -> None:
        """Adopt a checkpoint: set damaged ones aside, and delete half-written and surplus ones that a crash left."""
        if WORKERS.writes:
            for folder in failed:
                set_aside(folder)
            for pattern in (f"*{TEMPORARY}*", "*.deleted"):
                for left in self.folder.glob(pattern):
                    remove_tree(Path(left))
            self.remove_unfinished()
        WORKERS.gather("damaged checkpoints are set aside")
        self.committed, self.newest = set(self.steps()), step
        best = manifest["best"]
        if best and best["metric"] == self.metric and best["step"] in self.committed:
            self.best = Best(**best)
        self.prune()

    def remove_unfinished(self) -> None:
        """Delete what a crash left in a bucket of checkpoints that were being written or deleted."""
        places = self.folder.iterdir() if in_bucket(self.folder) and self.folder.is_dir() else ()
        for place in [place for place in places if place.name.isdecimal() and not is_checkpoint(place)]:
            remove_checkpoint(place)

    def check_none_is_lost(self) -> None:
        """Raise UsageError when the logs say that there were checkpoints, so that a run's logs are not emptied."""
        run = self.home.folder
        logged, newest = last_step(run / "metrics.jsonl"), read_marker(run)
        if newest > 0 or logged > 2 * self.save_steps > 0:
            saved = f"{run / MARKER} names checkpoint {newest}" if newest else f"{run}/metrics.jsonl has {logged} steps"
            raise UsageError(
                f"--resume: {saved}, but {self.folder} holds no checkpoint; put them back, or start anew in another "
                "--output_dir"
            )


def read_marker(run: Path) -> int:
    """Return the number of the newest checkpoint as the run folder names it; 0 where it names none."""
    path = run / MARKER
    text = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    return int(text) if text.isdecimal() else 0


# The settings of a run that goes on


def read_run_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the run in `folder`; UsageError when there is none."""
    path = folder / "config.json"
    if not path.exists():
        raise UsageError(f"--resume: {folder} holds no run (no config.json); check --output_dir")
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UsageError(f"--resume: {path} is not readable JSON ({error})") from error
    if not isinstance(before, dict):
        raise UsageError(f"--resume: {path} is not the config.json of a run")
    return before


def grows(name: str, before: Any, now: Any) -> bool:
    """Return whether a setting of the run's length is the same kind of length, and longer."""
    numbers = isinstance(before, int | float) and isinstance(now, int | float)
    return name in MAY_GROW and numbers and now > before > 0


def check_same_run(folder: Path, values: dict[str, Any]) -> list[str]:
    """Return notes on the allowed differences of a resumed run from the run in `folder`.

    UsageError when settings differ that would make it another run, naming each.
    """
    before = read_run_settings(folder)
    if missing := sorted(values.keys() - before.keys() - FREE_TO_CHANGE):
        raise UsageError(
            f"--resume: {folder}/config.json has no {missing[0]!r}: it is damaged, or of another version of minigrpo, "
            f"which can continue the run; or begin a new one from {folder}/final with --model"
        )
    changed = {name: value for name, value in values.items() if before.get(name) != value}
    longer = {name for name, value in changed.items() if grows(name, before.get(name), value)}
    shown = {name: f"--{name}={value} (was {before.get(name)})" for name, value in changed.items()}
    shorter = "; the length may only grow" if set(MAY_GROW) & set(changed) - longer else ""
    if differing := [shown[name] for name in changed if name not in FREE_TO_CHANGE | longer]:
        raise UsageError(
            f"--resume: {folder} is another run; it differs in {', '.join(differing)}; leave these flags out, or begin "
            f"a new run with --model={folder}, which starts from its last weights{shorter}"
        )
    fixed_warmup = values.get("warmup_steps") is not None or values.get("warmup_ratio") == 0
    constant = values.get("lr_schedule") == "constant" and fixed_warmup
    if constant or not longer:
        return []
    return [
        f"note: {', '.join(shown[name] for name in sorted(longer))}: the {values.get('lr_schedule')} schedule spans "
        "the new length from here on, so the learning rate jumps, and the steps so far had the shorter run's"
    ]
