"""Python files and modules of the user's own: loading a function or class of theirs, and telling what they raised."""

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from minigrpo.config import UsageError

LONGEST_SHOWN = 300
"""Characters of a user's value or error that a message shows."""


def load_named(flag: str, source: str, name: str, modules: dict[str, ModuleType], kind: str = "function") -> Any:
    """Return the function or class `name` of a Python file or of a module, each of which is executed once per flag.

    UsageError that names the flag, such as "--reward": no such file, one that fails, or nothing callable of that name.
    """
    given = f"{flag}={source}:{name}"
    if source not in modules:
        modules[source] = load_module(given, source, name)
    found = getattr(modules[source], name, None)
    if found is None or not callable(found):
        known = [key for key, value in vars(modules[source]).items() if callable(value)]
        raise UsageError(f"{given}: {source} has no {kind} {name}{near(name, known)}")
    return found


def near(name: str, known: Iterable[str]) -> str:
    """Return a hint at the most similar name, "" when none is similar."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""


def load_module(given: str, source: str, name: str) -> ModuleType:
    """Import a Python file or module; UsageError that begins with `given`, the flag and its value, if it fails."""
    path = Path(source)
    is_file = path.suffix == ".py" or len(path.parts) > 1 or path.is_file()
    if is_file and (not path.is_file() or path.suffix != ".py"):
        raise UsageError(f"{given}: there is no Python file {source}")
    folder = path.resolve().parent if is_file else Path.cwd()
    try:
        with importable_from(folder):
            return execute(path) if is_file else importlib.import_module(source)
    except ModuleNotFoundError as error:
        if is_file or error.name is None or not f"{source}.".startswith(f"{error.name}."):
            raise import_failure(given, source, error, folder) from error
        raise UsageError(f"{given}: no module {source}; a file is named PATH.py:{name}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's own file may raise anything
        raise import_failure(given, source, error, folder) from error


def import_failure(given: str, source: str, error: BaseException, folder: Path) -> UsageError:
    """Return the UsageError for a module that cannot be imported."""
    return UsageError(f"{given}: importing {source} failed: {shown(error)}{error_place(error, folder)}")


def execute(path: Path) -> ModuleType:
    """Run a Python file as a module."""
    spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@contextmanager
def importable_from(folder: Path) -> Iterator[None]:
    """Let a folder's modules be imported, before all others now, and after all others from then on."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def shown(value: Any) -> str:
    """Return a value's repr on one line, bounded, whatever its repr does."""
    try:
        text = repr(value)
    except (Exception, SystemExit):  # the user's own class may raise anything
        text = f"{type(value).__name__} (its repr fails)"
    line = " ".join(text[: 2 * LONGEST_SHOWN].split())
    return line if len(line) <= LONGEST_SHOWN else line[:LONGEST_SHOWN] + "..."


def error_place(error: BaseException, folder: Path | None) -> str:
    """Return " at FILE:LINE", the innermost place in `folder` or else of all, "" where only this package is known."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno or 1))
    package = Path(__file__).parent
    frames = [place for place in frames if "importlib" not in place[0] and package not in Path(place[0]).parents]
    own = [place for place in frames if folder and Path(place[0]).parent == folder] or frames
    return f" at {own[-1][0]}:{own[-1][1]}" if own else ""
