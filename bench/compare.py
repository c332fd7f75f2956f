"""GRPO steps of ours, TRL's and Tunix's on the same shapes, in turn: `python bench/compare.py`; last line JSON.

Ours and Tunix keep what jax compiled in a folder of this run's: the first turn compiles, the others read that.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench" / "peers")]

from environment import PEERS, last_json, tunix_python
from train_step import StepShape

from minigrpo.command_line import run_command
from minigrpo.config import Options, Settings, UsageError, option


@dataclasses.dataclass(frozen=True)
class CompareOptions(Options):
    """Comparison"""

    peers: str = option("trl,tunix", "who is compared with, by commas")
    rounds: int = option(3, "turns of each", low=1)
    tunix_venv: str = option("runs/tunix-venv", "Tunix's own environment, made if it is not there")

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = set(self.names) - {"trl", "tunix"}
        if unknown:
            raise UsageError(f"--peers={self.peers}: {unknown.pop()!r} is not trl or tunix")

    @property
    def names(self) -> list[str]:
        """Return the peers' names."""
        return [name.strip() for name in self.peers.split(",")]


@dataclasses.dataclass(frozen=True)
class CompareSettings(Settings):
    """The flags of this bench."""

    comparison: CompareOptions = CompareOptions()
    shape: StepShape = dataclasses.field(default_factory=StepShape)


def run_ours(shape: dict[str, Any]) -> dict[str, Any]:
    """Run our step bench."""
    return last_json(sys.executable, str(ROOT / "bench" / "train_step.py"), *(f"--{k}={v}" for k, v in shape.items()))


def run_trl(shape: dict[str, Any]) -> dict[str, Any]:
    """Run TRL's trainer."""
    return last_json(sys.executable, str(PEERS / "trl_step.py"), json.dumps(shape))


def memory_share(ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> dict[str, float]:
    """Divide our peak memory by the peer's: in the first turn, and our most by its least in later ones."""
    mine, other = ([turn["peak_mib"] for turn in turns] for turns in (ours, peer))
    share = {"first": mine[0] / other[0]} | ({"later": max(mine[1:]) / min(other[1:])} if mine[1:] else {})
    return {turn: round(value, 3) for turn, value in share.items()}


def main(settings: CompareSettings) -> int:
    """Compare with a folder of compiled programs that is this run's alone."""
    with tempfile.TemporaryDirectory(prefix="minigrpo-compare-") as programs:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
        return compare(settings)


def compare(settings: CompareSettings) -> int:
    """Run everyone in turn; report medians and ratios."""
    options, shape = settings.comparison, dataclasses.asdict(settings.shape)
    python = tunix_python(options.tunix_venv) if "tunix" in options.names else ""
    runners: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "ours": run_ours,
        "trl": run_trl,
        "tunix": lambda shape: last_json(python, str(PEERS / "tunix_run.py"), json.dumps(shape | {"mode": "step"})),
    }
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ("ours", *options.names)}
    for _ in range(options.rounds):
        for name, turns in results.items():
            turns.append(runners[name](shape))
            sys.stderr.write(f"{name}: {statistics.median(turns[-1]['seconds']):.3f} s a step\n")
    seconds = {name: statistics.median(s for turn in turns for s in turn["seconds"]) for name, turns in results.items()}
    report: dict[str, Any] = {
        "bench": "compare",
        **shape,
        "seconds_per_step": {name: round(value, 4) for name, value in seconds.items()},
        "times_as_fast": {name: round(seconds[name] / seconds["ours"], 3) for name in options.names},
        "peak_mib": {name: [round(turn["peak_mib"]) for turn in turns] for name, turns in results.items()},
        "memory_share": {name: memory_share(results["ours"], results[name]) for name in options.names},
    }
    for name in options.names:
        share = report["memory_share"][name]
        later = f", {share['later']:.0%} once programs are kept" if "later" in share else ""
        sys.stderr.write(
            f"{report['times_as_fast'][name]:.2f} times as fast as {name}, "
            f"{share['first']:.0%} of its peak memory when it compiles{later}\n"
        )
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    run_command("python bench/compare.py", __doc__ or "", ("comparison", "shape"), main, kind=CompareSettings)
