"""Processes that a bench runs beside ours, and the virtual environment that Tunix needs for itself."""

import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

PEERS = pathlib.Path(__file__).resolve().parent
TUNIX = "google-tunix==0.1.7"
PYTHONS = ("python3.12", "python3.13")
"""Tunix's jax is newer than Python 3.11 gets."""


def output_of(*command: str) -> str:
    """Return the output of a process; end this one if it fails, as it has printed the reason."""
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode < 0:
        sys.stderr.write(f"error: {' '.join(command[:2])} was ended by signal {-result.returncode}\n")
    if result.returncode:
        sys.exit(result.returncode)
    return result.stdout


def last_json(*command: str) -> dict[str, Any]:
    """Return the JSON object of the line that a process ends with."""
    return dict(json.loads(output_of(*command).splitlines()[-1]))


def find_python() -> str:
    if sys.version_info >= (3, 12):
        return sys.executable
    versions = pathlib.Path.home() / ".pyenv" / "versions"
    known = [shutil.which(name) for name in PYTHONS]
    known += [str(path) for path in sorted(versions.glob("3.1[23]*/bin/python"))]
    found = next((path for path in known if path and runs(path)), None)
    if found is None:
        raise FileNotFoundError(f"Tunix needs one of {', '.join(PYTHONS)} on the PATH")
    return found


def runs(python: str) -> bool:
    """Tell if a Python starts: pyenv's on the PATH do so only for the versions it is told to use."""
    return subprocess.run([python, "--version"], capture_output=True).returncode == 0


def tunix_python(folder: str) -> str:
    """Return the Python of the environment in `folder`, which is made and filled from PyPI if it is missing."""
    python = pathlib.Path(folder) / "bin" / "python"
    if not python.exists():
        output_of(find_python(), "-m", "venv", folder)
        sys.stderr.write(output_of(str(python), "-m", "pip", "install", "--quiet", TUNIX))
    return str(python)
