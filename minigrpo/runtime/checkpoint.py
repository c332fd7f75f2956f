"""Asynchronous checkpoints with orbax, and resuming from the newest complete one."""

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from minigrpo.config import UsageError

FREE_TO_CHANGE = {
    "gradient_accumulation_steps", "log_completions", "mesh", "output_dir", "page_size", "pool_pages", "remat",
    "report_to", "resume", "reward_timeout", "save_steps", "save_total_limit", "slots", "wandb_mode", "wandb_project",
}  # fmt: skip
"""Settings that a resumed run may have otherwise than the run it continues: they change no result by design."""


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path, so that a checkpoint depends on no Python class: {'params/layers/mlp/up': ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(like: Any, leaves: dict[str, Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in flatten(like)])


def first_line(error: Exception) -> str:
    """What an error says, without the details of tensorstore's objects."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.split(" See full TensorStore details")[0][:300]


def other_shapes(step: Path, shapes: dict[str, jax.ShapeDtypeStruct]) -> str:
    """What a checkpoint holds in another shape than `shapes`, the first of it; empty if nothing, or if unreadable."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            saved = dict(checkpointer.metadata((step / "default").absolute()).item_metadata)
    except Exception:  # a torn checkpoint, which restoring it will tell
        return ""
    for name in sorted(saved.keys() | shapes.keys()):
        there, here = (tuple(x[name].shape) if name in x else "nothing" for x in (saved, shapes))
        if there != here:
            return f"{name} is {there} there and {here} here"
    return ""


def set_aside(step: Path) -> None:
    """Moves a checkpoint's folder out of the way, under a name that is free, so that saving goes on at its step."""
    wanted = step.parent.parent / f"unusable-checkpoint-{step.name}"
    names = [wanted, *(wanted.with_name(f"{wanted.name}-{number}") for number in range(2, 1000))]
    step.rename(next(name for name in names if not name.exists()))


class Checkpoints:
    """The checkpoints of one run folder, by number of finished steps."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.manager = ocp.CheckpointManager(
            folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        )

    def save(self, step: int, state: Any) -> None:
        """Starts saving `state` as after `step` steps; returns before it is on disk.

        UsageError when this or the save before it cannot be written.
        """
        if step in self.manager.all_steps():
            return
        with self.writing():
            self.manager.save(step, args=ocp.args.StandardSave(flatten(state)))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turns what orbax and the system raise for a full disk and the like into a UsageError."""
        try:
            yield
        except Exception as error:
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # orbax leaves many futures with the same error
            raise UsageError(
                f"cannot write a checkpoint to {self.folder} ({first_line(error)}): make room there, perhaps by "
                "--save_total_limit, and continue with --resume"
            ) from error

    def restore(self, like: Any) -> tuple[int, Any]:
        """The newest complete checkpoint as (step, state), laid out like `like`; (0, like) when none was ever saved.

        Unusable ones after it are named and moved out of the way. UsageError, with nothing moved, when none can be used
        or they are another model's.
        """
        if not self.manager.all_steps():
            return 0, like
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), flatten(like))
        failed: dict[Path, str] = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            folder = self.folder / str(step)
            if other := other_shapes(folder, shapes):
                raise UsageError(f"--resume: {folder} is another model's ({other}); check --model and --output_dir")
            try:
                state = unflatten(like, self.manager.restore(step, args=ocp.args.StandardRestore(shapes)))
            except Exception as error:  # a torn checkpoint surfaces as any of orbax's, tensorstore's or the system's
                failed[folder] = first_line(error)
                sys.stderr.write(f"checkpoint {folder} is not usable, trying the one before: {failed[folder]}\n")
                continue
            self.drop(list(failed))
            return step, state
        reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in failed.items())
        raise UsageError(
            f"--resume: no usable checkpoint in {self.folder} ({reasons}); nothing was moved; "
            "start anew in another --output_dir"
        )

    def drop(self, damaged: list[Path]) -> None:
        """Sets damaged checkpoints aside, once for all processes."""
        if not damaged:
            return
        if jax.process_index() == 0:
            for folder in damaged:
                set_aside(folder)
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self.manager.reload()

    def close(self) -> None:
        """Waits for saves under way; UsageError when one cannot be written."""
        with self.writing():
            self.manager.wait_until_finished()
        self.manager.close()


def read_params(step: Path, shapes: Any) -> Any:
    """The parameters of a checkpoint's training state, laid out as `shapes`; UsageError naming an unusable one."""
    named = flatten({"params": shapes})
    restore_args = ocp.checkpoint_utils.construct_restore_args(named)
    arguments = ocp.args.PyTreeRestore(item=named, partial_restore=True, restore_args=restore_args)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            leaves = checkpointer.restore((step / "default").absolute(), args=arguments)
    except Exception as error:  # as above, any
        raise UsageError(f"{step}: not a usable checkpoint ({first_line(error)})") from error
    return unflatten({"params": shapes}, leaves)["params"]


def check_same_run(folder: Path, values: dict[str, Any]) -> None:
    """UsageError when the run in `folder` was made with other settings than `values`, naming each that differs."""
    path = folder / "config.json"
    if not path.exists():
        raise UsageError(f"--resume: {folder} holds no run (no config.json); check --output_dir")
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"--resume: {path} is not readable JSON ({error})") from error
    if not isinstance(before, dict):
        raise UsageError(f"--resume: {path} is not the config.json of a run")
    differing = [
        f"--{name}={value} (was {before.get(name)})"
        for name, value in values.items()
        if name not in FREE_TO_CHANGE and before.get(name) != value
    ]
    if differing:
        raise UsageError(f"--resume: {folder} is another run; it differs in {', '.join(differing)}")
