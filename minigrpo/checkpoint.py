"""Asynchronous checkpoints with orbax, and resuming from the newest complete one."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

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


class Checkpoints:
    """The checkpoints of one run folder, by number of finished steps."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.manager = ocp.CheckpointManager(
            folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        )

    def save(self, step: int, state: Any) -> None:
        """Starts saving `state` as after `step` steps; returns before it is on disk."""
        if step in self.manager.all_steps():
            return
        self.manager.save(step, args=ocp.args.StandardSave(flatten(state)))

    def restore(self, like: Any) -> tuple[int, Any]:
        """The newest complete checkpoint as (step, state), laid out like `like`; (0, like) when none was ever saved.

        Unusable ones are named and moved out of the way, so that saving goes on at their steps.
        """
        if not self.manager.all_steps():
            return 0, like
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), flatten(like))
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                return step, unflatten(like, self.manager.restore(step, args=ocp.args.StandardRestore(shapes)))
            except (
                Exception
            ) as error:  # a torn checkpoint surfaces as any of orbax's, tensorstore's or the system's errors
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                sys.stderr.write(
                    f"checkpoint {self.folder / str(step)} is not usable, trying the one before: {reason}\n"
                )
                (self.folder / str(step)).rename(self.folder.parent / f"unusable-checkpoint-{step}")
                self.manager.reload()
        raise UsageError(
            f"--resume: no usable checkpoint in {self.folder}; start without --resume in another --output_dir"
        )

    def close(self) -> None:
        """Waits for saves under way."""
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
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{step}: not a usable checkpoint ({str(error).splitlines()[0]})") from error
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
