"""Figures of chips, in the one table that plans and benches count with."""

import dataclasses

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip: usable memory in GiB, bandwidth in GB/s, bf16 TFLOP/s, clock in GHz (published specifications).

    A tpu7x chip shows as two devices; the figures are one device's. A clock of 0 is not published.
    """

    kind: str
    """jax's device_kind."""
    hbm_gib: float
    bandwidth: float
    tflops: float
    clock: float


CHIPS = {
    "v4": Chip("TPU v4", 32.0, 1228.0, 275.0, 1.05),
    "v5e": Chip("TPU v5 lite", 15.75, 819.0, 197.0, 1.5),
    "v5p": Chip("TPU v5", 95.0, 2765.0, 459.0, 1.75),
    "tpu7x": Chip("TPU7x", 94.75, 3685.0, 1153.0, 0.0),
    "v6e": Chip("TPU v6 lite", 31.25, 1640.0, 918.0, 1.75),
}


def memory_of_kind(device_kind: str) -> int | None:
    """Return the bytes of memory of a chip of this device_kind; None for one that is not in the table."""
    return next((int(chip.hbm_gib * GIB) for chip in CHIPS.values() if chip.kind == device_kind), None)
