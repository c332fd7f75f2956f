"""Does it learn: trains the built-in model from several seeds and draws accuracy against steps; last line JSON."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from minigrpo.command_line import run_command
from minigrpo.config import Options, Settings, option


@dataclasses.dataclass(frozen=True)
class CurveOptions(Options):
    """Learning curve"""

    seeds: int = option(3, "runs, from seed 0 on", low=1)
    max_steps: int = option(100, "steps per run", low=4)
    eval_size: int = option(500, "unseen test problems", low=1)
    output_dir: str = option("runs/learning", "where the runs go; a finished one found there is used as it is")
    picture: str = option("bench/learning_curve.png", "file the curve is drawn to")


@dataclasses.dataclass(frozen=True)
class CurveSettings(Settings):
    """The flags of this bench."""

    curve: CurveOptions = CurveOptions()


def train(options: CurveOptions, seed: int) -> pathlib.Path:
    """Train with this seed, unless that is done already -> the run's folder."""
    folder = pathlib.Path(options.output_dir).absolute() / f"seed{seed}"
    if not (folder / "final").exists():
        started = time.perf_counter()
        flags = {
            "model": "builtin:tiny",
            "dataset": "builtin:arithmetic",
            "seed": seed,
            "max_steps": options.max_steps,
            "eval_steps": options.max_steps // 4,
            "eval_size": options.eval_size,
            "output_dir": folder,
        }
        arguments = [f"--{name}={value}" for name, value in flags.items()]
        subprocess.run([sys.executable, "-m", "minigrpo.train", *arguments], cwd=ROOT, check=True)
        (folder / "seconds.txt").write_text(f"{time.perf_counter() - started:.0f}\n")
    return folder


def read_curve(folder: pathlib.Path) -> tuple[list[int], list[float]]:
    """Read the steps and accuracies of a run's evaluations."""
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows], [row["accuracy"] for row in rows]


def draw(curves: dict[int, tuple[list[int], list[float]]], path: str) -> None:
    """Draw accuracy against steps."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for seed, (steps, accuracies) in curves.items():
        axes.plot(steps, [100 * a for a in accuracies], marker="o", label=f"seed {seed}")
    axes.set(xlabel="step", ylabel="greedy accuracy on unseen problems (%)", ylim=(0, 100))
    axes.set_title("builtin:tiny on builtin:arithmetic, 16 prompts x 8 completions per step")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(settings: CurveSettings) -> int:
    """Train every seed and draw the curves."""
    options = settings.curve
    folders = {seed: train(options, seed) for seed in range(options.seeds)}
    curves = {seed: read_curve(folder) for seed, folder in folders.items()}
    start = curves[0][1][0]
    draw(curves, options.picture)
    ends = [accuracies[-1] for _, accuracies in curves.values()]
    report = {
        "bench": "learning_curve",
        "start": start,
        "end": ends,
        "gain_points": [round(100 * (end - start), 1) for end in ends],
        "seconds": [float((folder / "seconds.txt").read_text()) for folder in folders.values()],
    }
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    run_command("python bench/learning_curve.py", __doc__ or "", ("curve",), main, kind=CurveSettings)
