"""Compiled programs kept on disk between runs."""

import os
import sys
import tempfile
import time
from pathlib import Path

import jax

FOLDER, MAX_BYTES = "jax_compilation_cache_dir", 4 << 30
"""jax's setting for the folder of compiled programs, and what it may hold; the least recently used ones go."""

TORN_SECONDS = 60
"""After this time jax has written a program's time stamp too, or never will."""


def programs_folder() -> Path:
    """Return the folder for compiled programs (XDG base directories); OSError if it cannot be written."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (given if given.is_absolute() else Path.home() / ".cache") / "minigrpo" / "programs"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return folder


def drop_torn_programs(folder: Path) -> None:
    """Delete programs that a process was killed while writing: jax would neither replace them nor keep any other."""
    for program in folder.glob("*-cache"):
        stamped = program.with_name(program.name.removesuffix("-cache") + "-atime").exists()
        if not stamped and time.time() - program.stat().st_mtime > TORN_SECONDS:
            program.unlink()


def keep_programs() -> None:
    """Make jax keep compiled programs between runs unless it has a folder; print a line if they cannot be kept."""
    named, wanted = (getattr(jax.config, name) for name in (FOLDER, "jax_enable_compilation_cache"))
    if named or not wanted:
        return
    try:
        folder = programs_folder()
        drop_torn_programs(folder)
    except (OSError, RuntimeError) as error:
        sys.stderr.write(f"compiled programs are not kept: {error}; JAX_COMPILATION_CACHE_DIR names another folder\n")
        return
    jax.config.update(FOLDER, str(folder))
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
