"""Host memory of every worker while a checkpoint of a published model's size is loaded and exported. Last line JSON.

The checkpoint, in the real format with random weights, is written to --folder first. The limit is a worker's share of
the weights and two tensors of the largest size. Memory is anonymous memory (RssAnon), sampled every 5 ms, less what the
process held before.
"""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from minigrpo.build import build
from minigrpo.command_line import parse_flags, run_command
from minigrpo.commands import COMMANDS
from minigrpo.config import Options, Settings, UsageError, option
from minigrpo.model.hub_config import parse_config
from minigrpo.model.params import ModelConfig
from minigrpo.model.qwen import abstract_params
from minigrpo.model.weights import expected_tensors
from minigrpo.runtime import links
from minigrpo.runtime.workers import WORKERS, joined

BUILTIN = ROOT / "minigrpo" / "builtin"


@dataclasses.dataclass(frozen=True)
class MemoryOptions(Options):
    """Workers and their model"""

    shape: str = option("Qwen/Qwen3-1.7B", "published model whose sizes the checkpoint has")
    workers: int = option(4, "processes, of one device each", low=2, high=64)
    folder: str = option("", "where checkpoint and export are written; a temporary folder if empty")


@dataclasses.dataclass(frozen=True)
class MemorySettings(Settings):
    """This bench's settings."""

    memory: MemoryOptions = MemoryOptions()


def read_shape(name: str) -> tuple[dict[str, Any], ModelConfig]:
    """Return a published model's config; UsageError for an unknown one."""
    families = json.loads((BUILTIN / "families.json").read_text())
    if name not in families:
        raise UsageError(f"--shape={name}: must be of {', '.join(families)}")
    return families[name], parse_config(families[name], "families.json")


def write_checkpoint(folder: pathlib.Path, raw: dict[str, Any], config: ModelConfig) -> tuple[int, int]:
    """Write random bfloat16 weights, a tensor a file -> bytes of all, and of the largest tensor."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(BUILTIN / name, folder)
    (folder / "config.json").write_text(json.dumps(raw))
    shapes, index, sizes = expected_tensors(abstract_params(config), config), {}, []
    random = np.random.default_rng(0)
    for number, (name, shape) in enumerate(shapes.items()):
        value = random.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
        index[name] = f"model-{number:05}.safetensors"
        sizes.append(value.nbytes)
        save_file({name: value}, folder / index[name], {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(sizes), max(sizes)


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no RssAnon")


def peak_of(work: Callable[[], Any], before: int) -> tuple[Any, int]:
    """Run work -> its result, and the most memory meanwhile above `before`."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return work(), peak[0]
    finally:
        done.set()
        watcher.join()


def work(flags: list[str], exported: pathlib.Path) -> None:
    """Load and export as one of the workers, and write the peaks beside the export."""
    settings: Any = parse_flags(flags, COMMANDS["train"].sections)
    with joined(settings):
        built = build(settings, settings.run.mesh)
        before = anonymous_bytes()
        params, loading = peak_of(lambda: built.load(0, built.spec.dtype), before)
        _, exporting = peak_of(lambda: built.export(exported, exported.with_name("adapter"), params, {}), before)
        peaks = {"loading": loading, "exporting": exporting}
        exported.with_name(f"peaks-{WORKERS.index}.json").write_text(json.dumps(peaks))


def main(settings: MemorySettings) -> int:
    """Write the checkpoint, start the workers, and compare their peaks with the limit -> 0 if all keep to it."""
    options = settings.memory
    raw, config = read_shape(options.shape)
    with tempfile.TemporaryDirectory(dir=options.folder or None) as temporary:
        folder = pathlib.Path(temporary)
        total, largest = write_checkpoint(folder / "model", raw, config)
        address = f"--coordinator_address=127.0.0.1:{links.free_port()}"
        flags = [f"--model={folder}/model", f"--mesh={options.workers},1", "--compute_dtype=bfloat16", address]
        flags += [f"--num_processes={options.workers}"]
        started = time.monotonic()
        commands = [
            [sys.executable, __file__, "worker", str(folder / "final"), *flags, f"--process_id={i}"]
            for i in range(options.workers)
        ]
        workers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
        codes = [worker.wait() for worker in workers]
        if any(codes):
            raise UsageError("a worker failed, as it says above")
        peaks = [json.loads((folder / f"peaks-{i}.json").read_text()) for i in range(options.workers)]
        seconds = time.monotonic() - started
    limit = total / options.workers + 2 * largest
    most = {name: max(peak[name] for peak in peaks) for name in ("loading", "exporting")}
    for name, value in most.items():
        print(f"{name:10} {value / 2**30:6.2f} GiB at most; limit {limit / 2**30:.2f}")
    print(
        json.dumps(
            {"bench": "worker_memory", "shape": options.shape, "workers": options.workers, "weights": total}
            | {"largest_tensor": largest, "limit": limit, "seconds": round(seconds, 1), "peaks": peaks}
        )
    )
    return int(any(value > limit for value in most.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(sys.argv[3:], pathlib.Path(sys.argv[2]))
    else:
        run_command("python bench/worker_memory.py", __doc__ or "", ("memory",), main, kind=MemorySettings)
