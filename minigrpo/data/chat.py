"""A checkpoint's tokenizer, chat template and end tokens."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jinja2
import jinja2.sandbox
from tokenizers import Tokenizer as HubTokenizer

from minigrpo.config import UsageError, read_json

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Used when a checkpoint brings no template of its own."""

END_TOKENS = ("<|im_end|>", "<|endoftext|>")
Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text <-> token ids for one checkpoint."""

    hub: HubTokenizer
    template: jinja2.Template
    stop_tokens: tuple[int, ...]
    enable_thinking: bool = False

    @property
    def num_tokens(self) -> int:
        """Real tokens: the model's vocabulary may have more rows, which are padding."""
        return max(self.hub.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """UsageError for a text that is no Unicode."""
        broken = next((text for text in texts if any("\ud800" <= char <= "\udfff" for char in text)), None)
        if broken is not None:
            raise UsageError(f"{broken!r:.60}: not Unicode text, so it cannot be tokenized")
        return [encoding.ids for encoding in self.hub.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Texts without special tokens."""
        return self.hub.decode_batch([list(row) for row in tokens], skip_special_tokens=True)

    def render(self, messages: Sequence[Message]) -> str:
        """The chat as text, ending where the assistant's answer begins."""
        try:
            return self.template.render(
                messages=list(messages), add_generation_prompt=True, enable_thinking=self.enable_thinking
            )
        except jinja2.TemplateError as error:
            raise UsageError(f"the checkpoint's chat template failed on {messages[-1]!r:.80}: {error}") from error


def load_tokenizer(folder: Path, enable_thinking: bool = False) -> Tokenizer:
    """Reads tokenizer.json, the chat template and the end tokens of a checkpoint folder."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UsageError(f"{path}: not found; a checkpoint folder needs its tokenizer.json")
    try:
        hub = HubTokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises plain Exception for every kind of bad file
        raise UsageError(f"{path}: not a readable tokenizer ({error})") from error
    hub.no_padding()
    hub.no_truncation()
    return Tokenizer(hub, load_template(folder), stop_tokens(folder, hub), enable_thinking)


def load_template(folder: Path) -> jinja2.Template:
    """The chat template, compiled in a sandbox that reaches no Python attribute or module."""
    source = read_json(folder / "tokenizer_config.json").get("chat_template") or CHATML
    if (folder / "chat_template.jinja").exists():
        source = (folder / "chat_template.jinja").read_text()
    if not isinstance(source, str):
        source = next((t["template"] for t in source if t.get("name") == "default"), CHATML)
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.globals["raise_exception"] = raise_template_error
    sandbox.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    try:
        return sandbox.from_string(source)
    except jinja2.TemplateError as error:
        raise UsageError(f"{folder}: the chat template does not parse: {error}") from error


def raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)


def stop_tokens(folder: Path, hub: HubTokenizer) -> tuple[int, ...]:
    """End tokens of generation_config.json or config.json, else those of END_TOKENS that the tokenizer has."""
    for name in ("generation_config.json", "config.json"):
        ids = read_json(folder / name).get("eos_token_id")
        if ids is not None:
            ids = [ids] if isinstance(ids, int) else ids
            return tuple(sorted(set(ids)))
    ids = [hub.token_to_id(token) for token in END_TOKENS]
    if not any(i is not None for i in ids):
        raise UsageError(
            f"{folder}: no eos_token_id in generation_config.json or config.json, and no {END_TOKENS[0]} token"
        )
    return tuple(sorted(i for i in ids if i is not None))
