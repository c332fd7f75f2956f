"""GRPO for Qwen3 and Qwen2.5 in pure JAX."""

from pathlib import Path

from minigrpo.runtime.signals import STOP, started_as_command

__version__ = "0.2.0"

if not Path(__file__).with_name("kernels").is_dir():  # a checkout, in which kernels/ is beside the package
    __path__.append(str(Path(__file__).parent.parent))

if started_as_command():  # signals are heard from the first moment on
    STOP.install()
