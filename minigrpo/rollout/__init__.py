"""Prompts to completions."""

from minigrpo.rollout.generator import Generator, Rollout, RolloutSpec, Start
from minigrpo.rollout.sampling import Sampler

__all__ = ["Generator", "Rollout", "RolloutSpec", "Sampler", "Start"]
