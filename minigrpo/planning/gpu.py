"""A run's scratch memory by arithmetic, for GPUs, whose compiler is not part of the installation."""

import dataclasses
import re

from minigrpo.build import Programs
from minigrpo.config import UsageError
from minigrpo.grpo.logprobs import Tiles
from minigrpo.planning import memory
from minigrpo.planning.cost import Work
from minigrpo.runtime.chips import GIB, Chip
from minigrpo.runtime.mesh import TP

LOGITS_COPIES = 3
"""Arrays of [slots, vocabulary] in float32 that sampling works on."""

GATHERED_LAYERS = 2
"""Layers whose weights are whole on a device at once: one in use, one on its way."""


@dataclasses.dataclass(frozen=True)
class GpuPrograms(Programs):
    """Programs for cards with so much memory; the devices of its mesh only stand for them."""

    gib: int

    @property
    def platform(self) -> str:
        return "gpu"

    @property
    def device_memory(self) -> int:
        return self.gib * GIB


def parse_card(topology: str) -> Chip:
    """'gpu:80GB' -> a card of 80 GiB whose speed is not known; UsageError for another form."""
    found = re.fullmatch(r"gpu:([1-9]\d{0,3})GB", topology)
    if not found:
        raise UsageError(f"--topology={topology}: a GPU is written with its memory, such as gpu:80GB")
    return Chip("GPU", float(found[1]), 0.0, 0.0, 0.0)


def gathered_bytes(programs: Programs, work: Work) -> int:
    layer = work.layer_weights // programs.config.num_hidden_layers
    return GATHERED_LAYERS * layer * programs.dtype.itemsize


def rows_in_part(programs: Programs, work: Work, parts: int) -> int:
    return -(-work.rows // programs.mesh.size // parts)


def update_scratch(programs: Programs, work: Work, parts: int, trained: int) -> int:
    """Gradients, of all parts so far and of this one, and what the larger holds of the layers' and the head's pass."""
    sizes, tp, length = programs.config.sizes, programs.mesh.shape[TP], work.prompt + work.completion
    rows = rows_in_part(programs, work, parts)
    chunk = min(Tiles().backward_rows, rows * work.completion)
    head = rows * memory.saved_bytes(programs, length) + 4 * (sizes["V"] // tp) * (sizes["D"] + 2 * chunk * tp)
    layers = rows * memory.activation_bytes(programs, length) + trained + gathered_bytes(programs, work)
    return (trained if parts > 1 else 0) + max(layers, head)


def scoring_scratch(programs: Programs, work: Work, parts: int) -> int:
    """The widest of one layer's numbers in a forward pass: the MLP's two products, and what goes in and comes out.

    Or attention's scores and weights, where these are more.
    """
    widest = 2 * (programs.config.intermediate_size + programs.config.hidden_size) * programs.dtype.itemsize
    length = work.prompt + work.completion
    row = max(length * widest, 2 * memory.score_bytes(programs, length)) + memory.mask_bytes(programs, length)
    return rows_in_part(programs, work, parts) * row + gathered_bytes(programs, work)


def rollout_scratch(programs: Programs, slots: int, pool: int) -> int:
    """The page pool, and what sampling needs over the vocabulary."""
    return pool + 4 * LOGITS_COPIES * slots * programs.config.vocab_size
