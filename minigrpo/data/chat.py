"""A checkpoint's tokenizer, chat template and end tokens."""

import dataclasses
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HubTokenizer

from minigrpo.config import UsageError
from minigrpo.data.json_file import read_object, read_text
from minigrpo.data.template import PROBE, ChatTemplate, Message, text_of

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Used when a checkpoint brings no template of its own."""

RAW = "{{ messages|map(attribute='content')|join('\n\n') }}"
"""The template of --chat_template=none: the texts themselves, a blank line between them."""

END_TOKENS = ("<|im_end|>", "<|endoftext|>")
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
QWEN_TOKENIZERS = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast")
QWEN_DEFAULTS = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
"""Special tokens of a Qwen tokenizer whose tokenizer_config.json does not mention them, as in transformers."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text <-> token ids for one checkpoint."""

    hub: HubTokenizer
    template: ChatTemplate
    stop_tokens: tuple[int, ...]
    """Tokens that end a completion, in order."""
    end_of_turn: int
    """The one of them that a completion on file ends with."""
    enable_thinking: bool = False
    raw: bool = False
    """Prompts are texts without a chat template; the tokenizer then adds its own special tokens, as in transformers."""
    keep_special_tokens: bool = False

    @property
    def num_tokens(self) -> int:
        """Return the number of real tokens: the model's vocabulary may have more rows, which are padding."""
        return max(self.hub.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize texts, special tokens only where the text spells them; UsageError for anything but text."""
        return self.tokens_of(texts, add_special_tokens=False)

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize rendered prompts; `raw` ones get the tokens that the tokenizer adds by itself."""
        return self.tokens_of(texts, add_special_tokens=self.raw)

    def tokens_of(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Tokenize texts; UsageError for text that is not Unicode, such as half of a surrogate pair."""
        broken = next((text for text in texts if any("\ud800" <= char <= "\udfff" for char in text)), None)
        if broken is not None:
            raise UsageError(f"{broken!r:.60}: not Unicode text, so it cannot be tokenized")
        return [row.ids for row in self.hub.encode_batch(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Return texts without special tokens, or with all but the end with --keep_special_tokens."""
        rows = [self.without_end(row) for row in tokens]
        return self.hub.decode_batch(rows, skip_special_tokens=not self.keep_special_tokens)

    def without_end(self, row: Sequence[int]) -> list[int]:
        """Return tokens without a last one that ends the completion."""
        tokens = [int(token) for token in row]
        return tokens[:-1] if tokens and tokens[-1] in self.stop_tokens else tokens

    def render(self, messages: Sequence[Message], **settings: Any) -> str:
        """Return the chat as text, ending where the assistant's answer begins; UsageError naming the template.

        `settings` are more names of the template's, such as a row's `tools`.
        """
        return self.template.render(messages, enable_thinking=self.enable_thinking, **settings)


def load_tokenizer(
    folder: Path,
    enable_thinking: bool = False,
    chat_template: str = "auto",
    keep_special_tokens: bool = False,
    model: Path | None = None,
) -> Tokenizer:
    """Read tokenizer.json, the special tokens, the chat template and the end tokens of a checkpoint folder.

    `chat_template` is auto, none or a file, as --chat_template. `model` is the folder of config.json and
    generation_config.json where the tokenizer is elsewhere, as beside an adapter. UsageError naming the file.
    """
    hub = read_tokenizer(folder / "tokenizer.json")
    special = special_tokens(folder)
    template = choose_template(folder, chat_template, special)
    raw = chat_template == "none"
    end = None if raw else template_end(template, hub)
    stops = stop_tokens(model or folder, hub, special, end, folder)
    last = end if end is not None else hub.token_to_id(special.get("eos_token", ""))
    last = last if last in stops else stops[-1]
    return Tokenizer(hub, template, stops, last, enable_thinking, raw, keep_special_tokens)


def read_tokenizer(path: Path) -> HubTokenizer:
    """Read a tokenizer.json; UsageError for one that is missing, torn or empty."""
    if not path.exists():
        raise UsageError(f"{path}: not found; a checkpoint folder needs its tokenizer.json")
    try:
        hub = HubTokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises plain Exception for every kind of bad file
        raise UsageError(f"{path}: not a readable tokenizer ({error!s:.200})") from error
    if not hub.get_vocab_size(with_added_tokens=True):
        raise UsageError(f"{path}: its vocabulary is empty; copy the tokenizer.json of the original checkpoint")
    hub.no_padding()
    hub.no_truncation()
    return hub


def special_tokens(folder: Path) -> dict[str, str]:
    """Return the named special tokens that transformers would give to a template; UsageError unless they are text.

    Of tokenizer_config.json, and of an older special_tokens_map.json where that lists no added tokens.
    """
    path = folder / "tokenizer_config.json"
    config = read_object(path, {})
    named = dict(QWEN_DEFAULTS) if config.get("tokenizer_class") in QWEN_TOKENIZERS else {}
    found = named_tokens(path, config)
    if "added_tokens_decoder" not in config:
        older = folder / "special_tokens_map.json"
        found |= named_tokens(older, read_object(older, {}))
    return {name: token for name, token in (named | found).items() if token is not None}


def named_tokens(path: Path, config: dict[str, Any]) -> dict[str, str | None]:
    """Return the tokens that a file names, null ones included."""
    extra = config.get("extra_special_tokens")
    listed = {**config, **(extra if isinstance(extra, dict) else {})}
    own = {name: value for name, value in listed.items() if name.endswith("_token") and isinstance(value, str)}
    return own | {name: token_text(path, name, config[name]) for name in SPECIAL_TOKENS if name in config}


def token_text(path: Path, name: str, value: Any) -> str | None:
    """Return a token given as text or as {"content": text}; UsageError for anything else."""
    content = value.get("content") if isinstance(value, dict) else value
    if (content is None and value is None) or isinstance(content, str):
        return content
    raise UsageError(f"{path}: {name} is {value!r:.60}; it must be a token's text, {{'content': text}} or null")


def choose_template(folder: Path, wanted: str, special: dict[str, str]) -> ChatTemplate:
    """Return the chat template that --chat_template names; UsageError for one that cannot be read."""
    if wanted == "none":
        return ChatTemplate(RAW, "--chat_template=none", special)
    if wanted != "auto":
        return ChatTemplate(
            read_template(Path(wanted), f"--chat_template={wanted}"), f"--chat_template={wanted}", special
        )
    path = folder / "chat_template.jinja"
    if path.exists():
        return ChatTemplate(read_template(path, str(path)), str(path), special)
    path = folder / "tokenizer_config.json"
    return ChatTemplate(listed_template(path, read_object(path, {}).get("chat_template")), str(path), special)


def brings_template(folder: Path) -> bool:
    """Tell whether a checkpoint folder has a chat template of its own."""
    listed = read_object(folder / "tokenizer_config.json", {}).get("chat_template")
    return (folder / "chat_template.jinja").is_file() or bool(listed)


def read_template(path: Path, name: str) -> str:
    """Return a template file's text."""
    try:
        return read_text(path)
    except ValueError as error:
        raise UsageError(f"{name}: the chat template cannot be read ({error})") from error


def listed_template(path: Path, value: Any) -> str:
    """Return the template in tokenizer_config.json: its text, the one named default of a list, or ChatML for none."""
    if value is None:
        return CHATML
    if isinstance(value, str) and value:
        return value
    entries = value if isinstance(value, list) and all(isinstance(entry, dict) for entry in value) else []
    found = next((entry.get("template") for entry in entries if entry.get("name") == "default"), None)
    if not isinstance(found, str):
        raise UsageError(
            f"{path}: chat_template is {value!r:.60}; it must be a template's text, or a list of "
            "{'name': 'default', 'template': text}; --chat_template=FILE names another"
        )
    return found


# Ends


def template_end(template: ChatTemplate, hub: HubTokenizer) -> int | None:
    """Return the special token that the template writes after an assistant's answer; None where it writes none."""
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    try:
        text = template.render(chat, add_generation_prompt=False)
    except UsageError:  # a template that only asks
        return None
    after = text.rpartition(PROBE)[2].lstrip()
    tokens = {token.content: number for number, token in hub.get_added_tokens_decoder().items()}
    starts = [token for token in tokens if after.startswith(token)]
    return tokens[max(starts, key=len)] if starts and PROBE in text else None


def stop_tokens(
    model: Path, hub: HubTokenizer, special: dict[str, str], end: int | None, folder: Path
) -> tuple[int, ...]:
    """Return every token that ends a completion, in order.

    Those of generation_config.json, or of config.json where it names none; the tokenizer's eos_token; the template's
    end of turn. END_TOKENS serve where there is none of these. UsageError naming the file of one that cannot be.
    """
    named = [file_ends(model / name, hub) for name in ("generation_config.json", "config.json")]
    own = eos_of(folder, hub, special)
    ends = {*(named[0] or named[1]), *([] if own is None else [own]), *([] if end is None else [end])}
    ends = ends or {token for token in map(hub.token_to_id, END_TOKENS) if token is not None}
    if not ends:
        raise UsageError(
            f"{model}: no eos_token_id in generation_config.json or config.json, no eos_token in tokenizer_config.json "
            f"and no {END_TOKENS[0]} token; write one of them"
        )
    return tuple(sorted(ends))


def file_ends(path: Path, hub: HubTokenizer) -> tuple[int, ...]:
    """Return the end tokens that a file lists, () for none or null; UsageError for anything that is not a token."""
    value = read_object(path, {}).get("eos_token_id")
    if value is None:
        return ()
    listed = value if isinstance(value, list) else [value]
    wrong = [token for token in listed if not is_token(token, hub)]
    if wrong or not listed:
        raise UsageError(
            f"{path}: eos_token_id is {value!r:.60}; it must be a token id of the tokenizer's, a list of them, or null"
        )
    return tuple(listed)


def is_token(value: Any, hub: HubTokenizer) -> bool:
    """Tell if a value is the id of one of the tokenizer's tokens."""
    return type(value) is int and 0 <= value < 2**32 and hub.id_to_token(value) is not None


def eos_of(folder: Path, hub: HubTokenizer, special: dict[str, str]) -> int | None:
    """Return the tokenizer's eos_token; UsageError for a token that the tokenizer does not have."""
    token = special.get("eos_token")
    number = None if token is None else hub.token_to_id(token)
    if token is not None and number is None and token not in END_TOKENS:
        raise UsageError(
            f"{folder}: eos_token {token!r:.60} of its tokenizer_config.json is no token of tokenizer.json"
        )
    return number


# Prompts that are templated already


def control_tokens(tokenizer: Tokenizer) -> list[str]:
    """Return the special tokens that the template itself writes, such as <|im_start|>."""
    added = [token.content for token in tokenizer.hub.get_added_tokens_decoder().values() if token.special]
    return [token for token in added if token in tokenizer.template.source]


def warn_of_templated(tokenizer: Tokenizer, chats: Iterable[Sequence[Message]], name: str) -> int:
    """Return how many prompts hold control tokens of the template; one line on stderr if there are any.

    `name` is the dataset's. Under --chat_template=none nothing is counted: such prompts are what it is for.
    """
    tokens = control_tokens(tokenizer)
    if tokenizer.raw or not tokens:
        return 0
    pattern = re.compile("|".join(map(re.escape, tokens)))
    count = sum(any(pattern.search(text_of(message)) for message in chat) for chat in chats)
    if count:
        sys.stderr.write(
            f"{name}: {count} prompts already hold control tokens such as {tokens[0]}, and the chat template is put "
            "around them all the same; if they are templated already, pass --chat_template=none\n"
        )
    return count
