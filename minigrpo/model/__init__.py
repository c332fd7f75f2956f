"""The Qwen network, its parameters and its files."""

from minigrpo.model.hub import find_source
from minigrpo.model.hub_config import read_config
from minigrpo.model.params import ModelConfig, Params
from minigrpo.model.qwen import LayerContext, Qwen

__all__ = ["LayerContext", "ModelConfig", "Params", "Qwen", "find_source", "read_config"]
