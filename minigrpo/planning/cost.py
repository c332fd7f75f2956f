"""Work and memory of a training step's phases, counted from shapes."""

import dataclasses

import minigrpo.planning.hlo as hlo
from minigrpo.model.params import ModelConfig


@dataclasses.dataclass(frozen=True)
class Phase:
    """A program of a step on one chip."""

    memory: hlo.Memory
    resident: int
    """Bytes that stay on the chip meanwhile and are no argument of the program."""
    traffic: dict[str, hlo.Traffic]
    compile_seconds: float
    flops: float
    bytes: float

    @property
    def total(self) -> int:
        """Return the bytes on the chip while the program runs."""
        return self.memory.total + self.resident


@dataclasses.dataclass(frozen=True)
class Counted:
    """Figures of a phase on one chip that are known without compiling it."""

    resident: int
    flops: float
    moved: float
    """Bytes read and written."""
    scratch: int
    """Bytes besides its arguments, by arithmetic."""
    turns: int | None = None
    """Of a loop whose length is decided at run time, when all of the work is there."""


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs and bytes of a step's parts over all chips, counted from shapes."""

    config: ModelConfig
    prompts: int
    group: int
    prompt: int
    completion: int
    shared: bool = False
    """An update's layers take each prompt once; attention is counted with each of its completions all the same."""

    @property
    def layer_weights(self) -> int:
        """Return the number of matrix weights in all layers."""
        c = self.config
        attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
        return c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)

    @property
    def head_weights(self) -> int:
        """Return the number of weights in the LM head."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def weights(self) -> int:
        """Return the number of weights that decoding a token reads."""
        return self.layer_weights + self.head_weights

    @property
    def kv_row(self) -> int:
        """Return how many key and value numbers a token has."""
        return 2 * self.config.num_hidden_layers * self.config.num_key_value_heads * self.config.head_dim

    @property
    def rows(self) -> int:
        """Return the number of sequences."""
        return self.prompts * self.group

    def attention_flops(self, tokens: int) -> float:
        """Count the FLOPs of causal attention of one sequence."""
        c = self.config
        return 2.0 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * tokens * tokens

    def score_flops(self) -> tuple[float, float, float]:
        """Count the FLOPs of one forward pass: the layers' matmuls, the head's, and attention."""
        length = self.prompt + self.completion
        copies = self.prompts if self.shared else self.rows
        return (
            2.0 * self.layer_weights * (copies * self.prompt + self.rows * self.completion),
            2.0 * self.head_weights * self.rows * self.completion,
            self.rows * self.attention_flops(length),
        )

    def update_flops(self, remat: str) -> float:
        """Count the FLOPs of forward, backward (twice the forward; attention 2.5 times) and recomputation."""
        layers, head, attention = self.score_flops()
        inner = 2 * self.config.num_hidden_layers * self.config.hidden_size * self.config.intermediate_size
        again = {"none": 0, "dots": 0, "mlp": 1 - inner / self.layer_weights, "attention": 1, "full": 1}[remat]
        return layers * (3 + again) + head * 4 + attention * (3.5 + (remat in ("dots", "full")))

    def rollout_flops(self) -> float:
        """Count the FLOPs of prefill, once per prompt, and of decoding, token by token."""
        before, whole = self.attention_flops(self.prompt), self.attention_flops(self.prompt + self.completion)
        decode = 2.0 * self.rows * self.completion * self.weights
        prefill = self.prompts * (2.0 * self.prompt * self.layer_weights + before)
        return decode + self.rows * (whole - before) + prefill

    def rollout_bytes(self, chips: int, slots: int, item: int) -> float:
        """Count the bytes that one chip reads: its weights once per step, and every token's context once."""
        own = -(-self.rows // chips)
        steps = -(-own // slots) * self.completion
        context = own * self.completion * (self.prompt + self.completion / 2)
        return item * (steps * self.weights + self.kv_row * context)
