"""Tokens that packed updates compute over useful ones: `python bench/packed_shapes.py`. No device work; last line JSON.

The micro-batches are those that `minigrpo.train` makes on the chips of --topology, of real prompts and completions of
lognormal lengths. Without the file of prompts their lengths are lognormal too.
"""

import dataclasses
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from minigrpo.command_line import run_command
from minigrpo.config import Options, Settings, UsageError, option
from minigrpo.grpo.batch import Batch, Lengths, PackedBatch, PackingSpec, pack
from minigrpo.plan import SECTIONS, plan_spec
from minigrpo.planning import memory

DATA = ROOT.parent / "shared" / "data"
PROMPT_MEAN, PROMPT_SIGMA = 90.0, 0.4
"""Of prompt lengths where there is no file: those of GSM8K."""


@dataclasses.dataclass(frozen=True)
class LengthOptions(Options):
    """Lengths"""

    mean: str = option("350,600,1000,1500", "mean completion lengths before they are cut at the limit, by commas")
    sigma: float = option(0.8, "standard deviation of their logarithms", above=0.0)
    sample_steps: int = option(100, "steps whose lengths are drawn", low=1)
    prompts_file: str = option(str(DATA / "gsm8k" / "train.jsonl"), "JSONL of prompts, in the column question")
    tokenizer: str = option(str(DATA / "qwen3_tokenizer" / "tokenizer.json"), "tokenizer of that file's prompts")

    @property
    def means(self) -> list[float]:
        """Return the means; UsageError for a word that is no positive number."""
        try:
            means = [float(part) for part in self.mean.split(",")]
        except ValueError as error:
            raise UsageError(f"--mean={self.mean}: must be numbers separated by commas, such as 350,600") from error
        if min(means) < 1 or not np.isfinite(means).all():
            raise UsageError(f"--mean={self.mean}: a mean must be at least 1 token")
        return means


@dataclasses.dataclass(frozen=True)
class BenchSettings(Settings):
    """The plan's settings and this bench's."""

    lengths: LengthOptions = LengthOptions()


def lognormal(rng: np.random.Generator, mean: float, sigma: float, limit: int, count: int) -> Int[np.ndarray, " N"]:
    """Draw lengths of this mean, from 1 to the limit, at which longer ones are cut."""
    drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(np.rint(drawn), 1, limit).astype(np.int64)


def prompt_lengths(settings: BenchSettings, rng: np.random.Generator) -> Int[np.ndarray, " N"]:
    """Return the lengths of the file's prompts that are not too long, or lengths drawn at random without the file."""
    options, limit = settings.lengths, settings.data.max_prompt_length
    file, tokenizer = pathlib.Path(options.prompts_file), pathlib.Path(options.tokenizer)
    if not (file.exists() and tokenizer.exists()):
        return lognormal(rng, PROMPT_MEAN, PROMPT_SIGMA, limit, 1 << 12)
    texts = [json.loads(line)["question"] for line in file.read_text().splitlines()]
    lengths = np.array([len(one.ids) for one in Tokenizer.from_file(str(tokenizer)).encode_batch(texts)])
    if not (lengths <= limit).any():
        raise UsageError(f"--max_prompt_length={limit}: the shortest prompt of {file} has {lengths.min()} tokens")
    return lengths[lengths <= limit]


def blank_batch(spec: PackingSpec, lengths: Lengths) -> PackedBatch:
    """Pack a batch of these lengths, every token being 0."""
    count, limit = len(lengths.completions), spec.completion_tokens
    tokens, logprobs = np.zeros((count, limit), np.int32), np.zeros((count, limit), np.float32)
    batch = Batch(tokens, lengths.completions.astype(np.int32), np.zeros(count, np.float32), logprobs)
    return pack(spec, [[0] * int(length) for length in lengths.prompts[:: lengths.group]], batch)


def useful_tokens(spec: PackingSpec, lengths: Lengths) -> int:
    """Count the tokens of all sequences; with shared prefixes a group's prompt once."""
    prompts = lengths.prompts[:: lengths.group] if spec.share_prefixes else lengths.prompts
    return int(prompts.sum() + lengths.completions.sum())


@dataclasses.dataclass(frozen=True)
class Shape:
    """Packing at one mean length."""

    computed_over_useful: float
    micro_batches: float
    """Mean of all steps."""
    array_shapes: int
    """Different shapes of a step's arrays, each of which would be compiled."""


def measure(settings: BenchSettings, spec: PackingSpec, mean: float) -> Shape:
    """Pack the batches of --sample_steps steps."""
    rng, options, count = np.random.default_rng(0), settings.lengths, settings.steps.batch_size
    known = prompt_lengths(settings, rng)
    computed, useful, used, shapes = 0, 0, [], set()
    for _ in range(options.sample_steps):
        prompts = np.repeat(rng.choice(known, count), spec.group)
        completions = lognormal(rng, mean, options.sigma, spec.completion_tokens, count * spec.group)
        lengths = Lengths(prompts, completions, spec.group)
        packed = blank_batch(spec, lengths)
        used.append(int(packed.micro_batches))
        computed += used[-1] * spec.devices * spec.packed_tokens
        useful += useful_tokens(spec, lengths)
        shapes.add(str(jax.tree.map(np.shape, packed)))
    return Shape(round(computed / useful, 3), round(float(np.mean(used)), 2), len(shapes))


def describe(mean: float, shape: Shape) -> str:
    """Return what a person reads of one mean."""
    return (
        f"mean {mean:5g}: {shape.computed_over_useful:.3f} computed over useful tokens, "
        f"{shape.micro_batches:.1f} micro-batches, {shape.array_shapes} shape of arrays\n"
    )


def main(settings: BenchSettings) -> int:
    """Measure every mean."""
    jax.config.update("jax_platforms", "cpu")
    settings = settings.with_defaults({"batch_size": 32})
    steps, means = settings.steps, settings.lengths.means
    run = plan_spec(settings)
    spec = memory.packing_spec(run, run.update_sequences, steps.num_generations)
    sys.stderr.write(
        f"{settings.plan.topology} as fsdp,tp={settings.plan.mesh}: {steps.batch_size} prompts x "
        f"{steps.num_generations}, micro-batches of {spec.rows} x {spec.row_tokens} tokens per chip\n"
    )
    rows = {}
    for mean in means:
        rows[f"{mean:g}"] = measure(settings, spec, mean)
        sys.stderr.write(describe(mean, rows[f"{mean:g}"]))
    report = {
        "bench": "packed_shapes",
        "batch_size": steps.batch_size,
        "num_generations": steps.num_generations,
        "packing": dataclasses.asdict(spec),
        "means": {mean: dataclasses.asdict(shape) for mean, shape in rows.items()},
    }
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    run_command(
        "python bench/packed_shapes.py",
        __doc__ or "",
        (*SECTIONS, "lengths"),
        main,
        "defaults here: --batch_size=32",
        BenchSettings,
    )
