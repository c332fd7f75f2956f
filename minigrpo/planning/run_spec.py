"""The frozen facts of a run that determine its device programs and their memory."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from minigrpo.config import Settings
from minigrpo.kernels.backend import Backend
from minigrpo.model.params import ModelConfig
from minigrpo.model.qwen import ComputeSpec, Qwen


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """Everything that determines a run's device programs."""

    settings: Settings
    config: ModelConfig
    mesh: Mesh
    backend: Backend
    platform: str
    """Of the devices that are planned for or run on; asked for memory only."""
    device_bytes: int
    """Memory of one device."""
    dtype: Any
    num_tokens: int
    """Real tokens, of which the head may have more rows."""
    stop_tokens: tuple[int, ...]

    @property
    def model(self) -> Qwen:
        """Return the network."""
        return Qwen(self.config)

    @property
    def compute(self) -> ComputeSpec:
        """Return the dtype and mesh of forward passes."""
        return ComputeSpec(self.dtype, self.mesh)

    @property
    def base_dtype(self) -> Any:
        """Return the dtype of the base weights in training: float32 when they are trained themselves."""
        return self.dtype if self.config.lora else jnp.dtype("float32")

    @property
    def dropout(self) -> float:
        """Return the dropout of the adapters."""
        return self.config.lora.dropout if self.config.lora else 0.0

    @property
    def update_sequences(self) -> int:
        """Return the sequences of one update: a step's, or one minibatch's."""
        steps = self.settings.steps
        return steps.batch_size * steps.num_generations // steps.num_minibatches
