"""Rotary frequencies: the plain ones, and those that YaRN stretches over a longer context."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """YaRN's settings (arXiv:2309.00071, section 3), under the names that config.json gives them.

    RopeScaling(factor=4.0, original_max_position_embeddings=32768) is Qwen's for 131,072 positions.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    """Factor of cos and sin; None derives it from the others."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """Turns over the original context from which frequencies are kept, and below which they are stretched whole."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """The ramp between the two starts and ends at whole dims."""

    @property
    def positions(self) -> int:
        """Return how many positions the stretched frequencies reach."""
        return int(self.factor * self.original_max_position_embeddings)


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Float[np.ndarray, " H2"]:
    """Return the angle per position of every pair of dims [H/2], float32 (arXiv:2104.09864; YaRN: equation 23)."""
    wavelengths: np.ndarray = np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    plain = np.float32(1) / wavelengths
    if scaling is None:
        return plain
    stretched = np.float32(1) / (np.float32(scaling.factor) * wavelengths)
    kept = np.float32(1) - ramp(head_dim, theta, scaling)
    return (stretched * (np.float32(1) - kept) + plain * kept).astype(np.float32)


def ramp(head_dim: int, theta: float, scaling: RopeScaling) -> Float[np.ndarray, " H2"]:
    """Return the share of stretching of every pair of dims [H/2]: 0 for fast ones, 1 for slow ones."""
    low, high = (pair_of(turns, head_dim, theta, scaling) for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0
    pairs = np.arange(head_dim // 2, dtype=np.float32)
    share: np.ndarray = np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)
    return share.astype(np.float32)


def pair_of(turns: float, head_dim: int, theta: float, scaling: RopeScaling) -> float:
    """Return the pair of dims, a fraction, that makes `turns` turns over the original context."""
    wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
    return head_dim * math.log(wavelength) / (2 * math.log(theta))


def attention_factor(scaling: RopeScaling | None) -> float:
    """Return the factor of cos and sin, which sharpens attention over the longer context (section 3.4)."""
    if scaling is None:
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return sharpening(scaling.factor, scaling.mscale) / sharpening(scaling.factor, scaling.mscale_all_dim)
    return sharpening(scaling.factor)


def sharpening(factor: float, weight: float = 1.0) -> float:
    """Return 0.1 * weight * ln(factor) + 1 (equation 22)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
