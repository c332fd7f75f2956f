"""Rewards to gradients."""

from minigrpo.grpo.advantages import group_advantages
from minigrpo.grpo.batch import Batch, PackedBatch, pack
from minigrpo.grpo.experience import Experience
from minigrpo.grpo.update import UpdateSpec

__all__ = ["Batch", "Experience", "PackedBatch", "UpdateSpec", "group_advantages", "pack"]
