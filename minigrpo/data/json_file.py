"""JSON files of other people: one object, read strictly."""

import json
from pathlib import Path
from typing import Any

from minigrpo.config import UsageError

LARGEST_FILE = 64 << 20
"""Bytes of the largest settings file that is read; published tokenizer configs have about 1 MB."""


def read_object(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the object in a JSON file, or `default` where there is no such file.

    UsageError naming the file: unreadable, not UTF-8, not JSON, nested too deeply, a key given twice, no object.
    """
    if default is not None and not path.exists():
        return default
    try:
        text = read_text(path)
        content = json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise UsageError(f"{path}: not readable JSON (brackets nested too deeply)") from error
    except ValueError as error:
        raise UsageError(f"{path}: not readable JSON ({error!s:.200})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: must hold a JSON object, not {type(content).__name__}")
    return content


def read_text(path: Path) -> str:
    """Return a settings file's text; ValueError for one that cannot be read, is too large or is not UTF-8."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"larger than {LARGEST_FILE >> 20} MB")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict; ValueError for a key that is given twice, of which readers take different ones."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise ValueError(f"the key {twice!r} is given twice")
    return content
