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

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench" / "peers")]

from environment import PEERS, last_json, tunix_python
from train_step import ShapeOptions

from minigrpo.config import Options, Settings, UsageError, option, run_command


@dataclasses.dataclass(frozen=True)
class CompareOptions(Options):
    """Comparison"""

    peers: str = option("trl,tunix", "who is compared with, by commas")
    rounds: int = option(3, "turns of each", low=1)
    tunix_venv: str = option("runs/tunix-venv", "Tunix's own environment, made if it is not there")

    def __post_init__(self):
        super().__post_init__()
        unknown = set(self.names) - {"trl", "tunix"}
        if unknown:
            raise UsageError(f"--peers={self.peers}: {unknown.pop()!r} is not trl or tunix")

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in self.peers.split(",")]


def run_ours(shape: dict) -> dict:
    return last_json(sys.executable, str(ROOT / "bench" / "train_step.py"), *(f"--{k}={v}" for k, v in shape.items()))


def run_trl(shape: dict) -> dict:
    return last_json(sys.executable, str(PEERS / "trl_step.py"), json.dumps(shape))


def memory_share(ours: list[dict], peer: list[dict]) -> dict[str, float]:
    """Ours of the peer's peak memory: in the first turn, and the most in later ones of the peer's least."""
    mine, other = ([turn["peak_mib"] for turn in turns] for turns in (ours, peer))
    share = {"first": mine[0] / other[0]} | ({"later": max(mine[1:]) / min(other[1:])} if mine[1:] else {})
    return {turn: round(value, 3) for turn, value in share.items()}


def main(settings: Settings) -> int:
    """Compares in a folder for compiled programs that is this run's alone."""
    with tempfile.TemporaryDirectory(prefix="minigrpo-compare-") as programs:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
        return compare(settings)


def compare(settings: Settings) -> int:
    options: CompareOptions = settings[CompareOptions]
    shape = dataclasses.asdict(settings[ShapeOptions])
    python = tunix_python(options.tunix_venv) if "tunix" in options.names else ""
    runners = {
        "ours": run_ours,
        "trl": run_trl,
        "tunix": lambda shape: last_json(python, str(PEERS / "tunix_run.py"), json.dumps(shape | {"mode": "step"})),
    }
    results: dict[str, list[dict]] = {name: [] for name in ("ours", *options.names)}
    for _ in range(options.rounds):
        for name, turns in results.items():
            turns.append(runners[name](shape))
            sys.stderr.write(f"{name}: {statistics.median(turns[-1]['seconds']):.3f} s a step\n")
    seconds = {name: statistics.median(s for turn in turns for s in turn["seconds"]) for name, turns in results.items()}
    report = {
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
    run_command("python bench/compare.py", __doc__ or "", (CompareOptions, ShapeOptions), main)
