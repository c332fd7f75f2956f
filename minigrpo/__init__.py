"""GRPO for Qwen3 and Qwen2.5 in pure JAX."""

from pathlib import Path

__version__ = "0.2.0"

if not Path(__file__).with_name("kernels").is_dir():  # a checkout, in which kernels/ is beside the package
    __path__.append(str(Path(__file__).parent.parent))
