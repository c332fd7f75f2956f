"""GRPO for Qwen3 and Qwen2.5 in pure JAX."""

import importlib
import signal
import sys

if sys.argv[:1] == ["-m"] and any(word.startswith("minigrpo.") for word in sys.orig_argv):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before STOP hears signals

from pathlib import Path

from minigrpo.runtime.signals import STOP, started_as_command
from minigrpo.version import __version__ as __version__

if not Path(__file__).with_name("kernels").is_dir():  # a checkout, in which kernels/ is beside the package
    __path__.append(str(Path(__file__).parent.parent))

API = ("train", "generate", "evaluate", "load")
"""Functions of the Python door; the first three are the commands' modules, which may be called."""


def __getattr__(name: str) -> object:
    """Return a function of the Python door, importing what it needs only now."""
    if name in API:
        if name == "load":
            return importlib.import_module("minigrpo.api").load
        return importlib.import_module(f"minigrpo.{name}")
    raise AttributeError(f"module 'minigrpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the module's names, those that are imported when asked for included."""
    return sorted({*globals(), *API})


if started_as_command():  # signals are heard from the first moment on, and --help imports nothing that it does not need
    STOP.install()
    from minigrpo.command_line import answer_early

    answer_early(sys.argv[1:])
