"""Chat templates and ends beside transformers: same files, same text, same tokens; nonsense is one bounded line."""

import dataclasses
import functools
import json
import time

import pytest
import tokenizers
from conftest import ROOT

from minigrpo.config import DataOptions, UsageError
from minigrpo.data import template as templates
from minigrpo.data.chat import load_tokenizer, special_tokens, warn_of_templated
from minigrpo.data.datasets import chat
from minigrpo.data.template import ChatTemplate

BUILTIN = ROOT / "minigrpo" / "builtin"
IM_END, ENDOFTEXT = 151_645, 151_643

HERE = {
    "two parts": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}",
    "bos of its own": "{% set ns = namespace(x=bos_token) %}{{ ns.x }}{{ messages[-1]['content']|trim ~ unk_token }}",
    "tojson": "{{ messages|tojson(indent=2) }}{{ {'b': 'é<', 'a': 1}|tojson(sort_keys=true) }}"
    "{{ [1, 2]|tojson(separators=(',', ':')) }}{{ 'é'|tojson(ensure_ascii=true) }}",
    "nothing to call": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}"
    "{{ messages|length }}{{ pad_token }}",
    "loops": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ loop.index ~ '/' ~ loop.length }}"
    "{% if loop.last %}{% break %}{% endif %}{{ loop.nextitem.role }}{% endfor %}\n  {% set a = 1 %}  \nx",
    "macros": "{% macro f(m, d=2) %}{{ m.role|upper }}{{ '%s-%d' % (m.role, d) }}{% endmacro %}"
    "{% for m in messages %}{{ f(m, d=loop.index0) }}{% endfor %}{{ caller is defined }}",
    "generation": "{% for m in messages %}{%- if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}!\n{% endgeneration %}"
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}",
    "what a generation sets": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|"
    "{{ m.tool_calls is defined }}\n{% endfor %}",
    "filters": "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='role')|join(', ') }}"
    "{{ messages|rejectattr('role', 'in', ['user'])|list|length }}{{ 'a b'.split()[-1] }}{{ ['b', 'a']|sort|first }}"
    "{{ messages[0].items()|list|length }}{{ {'b': 1}|dictsort }}{{ 'x'|default('y') }}{{ none|default('z', true) }}",
}
"""Made here, with what published templates use; those of TRL are the published ones (Qwen2.5, Qwen3, 2507, R1, ...)."""

QWEN2_5_MATH = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nPlease reason step by step, and put your final answer within \\\\boxed{}."
    "<|im_end|>\n' }}{%- endif %}{%- for message in messages %}{%- if (message.role == 'user') or (message.role == "
    "'system' and not loop.first) or (message.role == 'assistant' and not message.tool_calls) %}{{- '<|im_start|>' + "
    "message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""Rebuilt from the published description of Qwen2.5-Math-Instruct: Qwen2.5's with another system message."""

THINKING_2507 = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)
"""The ending of Qwen3-Thinking-2507, rebuilt: the answer begins within the thinking."""

USER = {"role": "user", "content": "What is 2 + 2?"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": [2, "é"]}}}
CHATS = {
    "a prompt": [USER],
    "a system prompt": [{"role": "system", "content": "Be brief.\n"}, USER],
    "several turns": [
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"},
        {"role": "user", "content": "  And 3 by 3? \n"},
    ],
    "reasoning beside": [USER, {"role": "assistant", "content": "4", "reasoning_content": "two twos"}, USER],
    "a call": [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "name": "add", "content": "4"}],
    "a call and nulls": [
        {**USER, "tool_calls": None, "name": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "4"},
        {"role": "tool", "content": "5"},
    ],
    "an answer": [USER, {"role": "assistant", "content": "4"}],
    "two system prompts": [{"role": "system", "content": "A"}, USER, {"role": "system", "content": "B"}, USER],
}
"""Every shape of a conversation that TRL's page on dataset formats has."""
PARTS = [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]}]
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds <x>.", "parameters": {"type": "object", "properties": {}}},
}


def of_trl():
    trl = pytest.importorskip("trl")
    folder = ROOT.__class__(trl.__file__).parent / "chat_templates"
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


TRL = of_trl()
ALL = {**TRL, **HERE, "qwen2_5_math (rebuilt)": QWEN2_5_MATH, "qwen3_thinking_2507 (rebuilt)": THINKING_2507}
DATED = {name for name, source in ALL.items() if "strftime_now(" in source}


def write(folder, name, content):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """The real tokenizer of Qwen3, and the same in transformers, with every special token named."""
    from conftest import SHARED

    transformers = pytest.importorskip("transformers")
    real = SHARED / "qwen3_tokenizer" / "tokenizer.json"
    if not real.exists():
        pytest.skip(f"needs {real}")
    folder = tmp_path_factory.mktemp("qwen3")
    (folder / "tokenizer.json").symlink_to(real)
    named = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False, "normalized": False},
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
    }
    write(folder, "tokenizer_config.json", named)
    return folder, transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)


@functools.cache
def compiled(name):
    """A template with the special tokens of the fixture above."""
    named = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return ChatTemplate(ALL[name], name, named)


def theirs(hub, chat, source, **settings):
    """What transformers renders, None where it fails."""
    try:
        return hub.apply_chat_template(
            chat, chat_template=source, tokenize=False, add_generation_prompt=True, enable_thinking=False, **settings
        )
    except Exception:
        return None


def ours(template, chat, **settings):
    try:
        return template.render(chat, enable_thinking=False, **settings)
    except UsageError as error:
        assert "\n" not in str(error)
        return None


@pytest.mark.parametrize("name", [name for name in ALL if name not in DATED])
def test_templates_render_as_transformers_renders_them(qwen3, name):
    _, hub, _ = qwen3
    template = compiled(name)
    assert template.special_tokens == {k: v for k, v in hub.special_tokens_map.items() if k != "unk_token"}
    wanted = {shape: theirs(hub, chat, ALL[name]) for shape, chat in CHATS.items()}
    assert {shape: ours(template, chat) for shape, chat in CHATS.items()} == wanted
    assert wanted["a prompt"] is not None
    for thinking in (False, True):
        text = template.render(CHATS["a prompt"], enable_thinking=thinking)
        kwargs = {"chat_template": ALL[name], "tokenize": False, "enable_thinking": thinking}
        assert text == hub.apply_chat_template(CHATS["a prompt"], add_generation_prompt=True, **kwargs)


@pytest.mark.parametrize("name", [name for name in TRL if name.startswith(("qwen", "deepseek")) and name not in DATED])
def test_tokens_are_those_of_apply_chat_template(qwen3, name):
    _, hub, tokenizer = qwen3
    tokenizer = dataclasses.replace(tokenizer, template=compiled(name))
    settings = {"chat_template": TRL[name], "add_generation_prompt": True, "enable_thinking": False}
    for messages in (CHATS["a system prompt"], CHATS["several turns"], CHATS["a call"]):
        if theirs(hub, messages, TRL[name]) is not None:
            wanted = hub.apply_chat_template(messages, return_dict=False, **settings)
            assert tokenizer.encode_prompts([tokenizer.render(messages)]) == [wanted]


@pytest.mark.parametrize("name", ["qwen3.jinja", "qwen2_5.jinja", "qwen3_instruct_2507.jinja", "llama3_1.jinja"])
def test_tools_of_a_row_reach_the_template(qwen3, name):
    _, hub, _ = qwen3
    template = compiled(name)
    wanted = theirs(hub, CHATS["a call"], TRL[name], tools=[TOOL])
    assert wanted and "Adds <x>." in wanted and ours(template, CHATS["a call"], tools=[TOOL]) == wanted


@pytest.mark.parametrize("name", [name for name in ALL if name not in DATED])
def test_text_parts_are_read_by_every_template(qwen3, name):
    """As transformers where a template reads parts; as one text where it would drop, print or fail on them."""
    _, hub, _ = qwen3
    template = compiled(name)
    flat = [{"role": "user", "content": "What is 2 + 2?"}]
    wanted = theirs(hub, PARTS if template.reads_parts else flat, ALL[name])
    assert ours(template, PARTS) == wanted


def test_some_templates_read_parts_and_some_do_not():
    reads = {name: compiled(name).reads_parts for name in TRL if name.startswith("qwen")}
    assert reads["qwen3_vl.jinja"] and reads["qwen3_5_think.jinja"] and not reads["qwen3.jinja"]


@pytest.mark.parametrize("content", [[{"type": "image", "image": "x.png"}], [{"type": "text"}], ["text"], [5]])
def test_what_is_no_text_is_refused(qwen3, content):
    with pytest.raises(UsageError, match="its parts must be"):
        qwen3[2].render([{"role": "user", "content": content}])


@pytest.mark.parametrize("name", sorted(DATED))
def test_dates_are_refused_with_a_cure(name):
    template = compiled(name)
    with pytest.raises(UsageError, match=r"strftime_now.*--chat_template=FILE"):
        template.render([USER])


def test_a_row_may_hold_half_a_conversation_of_any_kind(qwen3):
    """Settings of the rows of a table, which has nulls where another row has a value."""
    tokenizer = qwen3[2]
    row = [{"role": "user", "content": "hi", "tool_calls": None, "reasoning_content": None, "thinking": None}]
    assert tokenizer.render(row) == tokenizer.render([{"role": "user", "content": "hi"}])


# Special tokens


PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}
NAMED = [
    {},
    {"tokenizer_class": "Qwen2Tokenizer"},
    {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    {"tokenizer_class": "Qwen2Tokenizer", "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}},
    {
        "tokenizer_class": "Qwen2TokenizerFast",
        "bos_token": None,
        "pad_token": "<|im_start|>",
        "image_token": "<|im_end|>",
    },
    {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {"vision_token": "<|im_start|>"}},
    {
        "tokenizer_class": "Qwen2Tokenizer",
        "sep_token": "<|im_end|>",
        "mask_token": "<|im_end|>",
        "cls_token": "<|im_end|>",
    },
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", NAMED)
def test_special_tokens_are_those_of_transformers(tmp_path, config):
    transformers = pytest.importorskip("transformers")
    folder = checkpoint(tmp_path, {**config, "eos_token": "<|im_end|>"} if not config else config)
    write(folder, "config.json", {"model_type": "qwen3"})
    assert special_tokens(folder) == transformers.AutoTokenizer.from_pretrained(folder).special_tokens_map


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_an_older_special_tokens_map_counts_where_no_added_tokens_are_listed(tmp_path, listed):
    transformers = pytest.importorskip("transformers")
    decoder = {
        "0": {"content": "<|endoftext|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    }
    folder = checkpoint(tmp_path, {"tokenizer_class": "Qwen2Tokenizer", "bos_token": "<|im_start|>"})
    config = json.loads((folder / "tokenizer_config.json").read_text()) | (
        {"added_tokens_decoder": decoder} if listed else {}
    )
    write(folder, "tokenizer_config.json", config)
    write(folder, "special_tokens_map.json", {"bos_token": {"content": "<|im_end|>", "single_word": False}})
    assert special_tokens(folder)["bos_token"] == ("<|im_start|>" if listed else "<|im_end|>")
    assert special_tokens(folder) == transformers.AutoTokenizer.from_pretrained(folder).special_tokens_map


@pytest.mark.parametrize("value", [5, True, ["<s>"], {"text": "<s>"}, {"content": 5}, {}])
@pytest.mark.parametrize("name", ["bos_token", "eos_token", "mask_token"])
def test_special_tokens_that_are_no_text_are_refused(tmp_path, name, value):
    one_line(checkpoint(tmp_path, {name: value}), f"{name} is ")


# Raw prompts, and prompts that are templated already


def checkpoint(folder, config=None, generation=None, **files):
    """A folder with the built-in model's small tokenizer."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes((BUILTIN / "tokenizer.json").read_bytes())
    files = {"tokenizer_config.json": config or {}, **({"generation_config.json": generation} if generation else {})}
    for name, content in files.items():
        write(folder, name, content)
    return folder


def one_line(folder, message, **settings):
    """The folder is refused when loaded or when its template is used, in one line that says so."""
    with pytest.raises(UsageError, match=message) as caught:
        load_tokenizer(folder, **settings).render([USER])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_raw_prompts_are_the_texts_themselves(tmp_path):
    tokenizer = load_tokenizer(checkpoint(tmp_path, {"chat_template": "{{ 1/0 }}"}), chat_template="none")
    assert tokenizer.raw and tokenizer.render([USER]) == USER["content"]
    assert tokenizer.render(chat("<|im_start|>user\n2+2?", "")) == "<|im_start|>user\n2+2?"
    assert tokenizer.render(chat("2+2?", "Think.")) == "Think.\n\n2+2?"
    assert tokenizer.render(PARTS) == "What is 2 + 2?"


def test_a_tokenizer_that_adds_a_first_token_does_so_for_raw_prompts_alone(tmp_path):
    """As TRL: apply_chat_template adds nothing, and the tokenizer called on a text adds what it adds."""
    transformers = pytest.importorskip("transformers")
    hub = tokenizers.Tokenizer.from_file(str(BUILTIN / "tokenizer.json"))
    first = hub.token_to_id("<|im_start|>")
    hub.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", first)]
    )
    folder = checkpoint(
        tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages[0].content }}"}
    )
    hub.save(str(folder / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    raw, templated = load_tokenizer(folder, chat_template="none"), load_tokenizer(folder)
    assert raw.encode_prompts(["2 + 2"]) == [theirs("2 + 2").input_ids]
    assert raw.encode_prompts(["2 + 2"])[0][0] == first and raw.encode(["2 + 2"])[0][0] != first
    text = templated.render([USER])
    assert templated.encode_prompts([text]) == [theirs.apply_chat_template([USER], return_dict=False)]


def test_a_template_of_ones_own_wins(tmp_path):
    folder = checkpoint(tmp_path / "model", {"chat_template": "{{ 1/0 }}"})
    write(folder, "chat_template.jinja", "file: {{ messages[0].content }}")
    assert load_tokenizer(folder).render([USER]) == "file: What is 2 + 2?"
    own = write(tmp_path, "own.jinja", "own: {{ messages[0].content }}") / "own.jinja"
    assert load_tokenizer(folder, chat_template=str(own)).render([USER]) == "own: What is 2 + 2?"
    with pytest.raises(UsageError, match=r"--chat_template=nowhere.jinja: the chat template cannot be read"):
        load_tokenizer(folder, chat_template="nowhere.jinja")


def test_prompts_that_are_templated_already_are_counted_in_one_line(tmp_path, capsys):
    tokenizer = load_tokenizer(checkpoint(tmp_path))
    chats = [[USER], [{"role": "user", "content": "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"}], PARTS]
    assert warn_of_templated(tokenizer, chats, "--dataset=x.jsonl") == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--dataset=x.jsonl: 1 prompts already hold" in said and "--chat_template=none" in said
    assert warn_of_templated(tokenizer, [[USER], PARTS], "x") == 0
    assert warn_of_templated(load_tokenizer(tmp_path, chat_template="none"), chats, "x") == 0
    assert capsys.readouterr().err == ""


def test_options_name_the_template():
    assert DataOptions().chat_template == "auto" and not DataOptions().keep_special_tokens


# Nonsense

BAD_TEMPLATES = {
    "a number": (5, "chat_template is 5"),
    "an object": ({"default": "{{ messages }}"}, "chat_template is {'default'"),
    "texts": (["a"], r"chat_template is \['a'\]"),
    "a name alone": ([{"name": "default"}], "chat_template is"),
    "another name": ([{"name": "rag", "template": "x"}], "chat_template is"),
    "template 5": ([{"name": "default", "template": 5}], "chat_template is"),
    "empty": ("", "chat_template is ''"),
    "true": (True, "chat_template is True"),
    "no Jinja": ("{% if %}", "does not parse"),
    "not closed": ("{% generation %}", "does not parse"),
    "unknown tag": ("{% foo %}", "does not parse"),
    "unknown filter": ("{{ 1|foo }}", "does not parse"),
    "nested": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "does not parse"),
    "too long": ("x" * (templates.LARGEST_TEMPLATE + 1), "characters; the most is"),
    "divides by zero": ("{{ 1 / 0 }}", "division by zero"),
    "modulo zero": ("{{ 1 % 0 }}", "ZeroDivisionError"),
    "number and text": ("{{ 1 + 'a' }}", "unsupported operand"),
    "text and null": ("{{ 'a' + none }}", "TypeError"),
    "includes": ("{% include 'x' %}", "no loader"),
    "imports": ("{% import 'x' as y %}", "no loader"),
    "extends": ("{% extends 'x' %}", "no loader"),
    "undefined": ("{{ nope.x }}", "'nope' is undefined"),
    "out of range": ("{{ messages[7].content }}", "no element 7"),
    "loops over a number": ("{% for x in 5 %}{% endfor %}", "not iterable"),
    "own error": ("{{ raise_exception('roles\nmust alternate') }}", "roles must alternate"),
    "endless macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "leaves the sandbox": ("{{ messages.__class__.__mro__ }}", "unsafe"),
    "leaves by a method": ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    "encoding": ("{{ 'a'.encode('x') }}", "unknown encoding"),
    "date": ("{{ strftime_now('%Y') }}", "strftime_now"),
    "chance": ("{{ [1, 2]|random }}", "random"),
    "lorem ipsum": ("{{ lipsum(n=1) }}", "random"),
}


@pytest.mark.parametrize("source, message", BAD_TEMPLATES.values(), ids=BAD_TEMPLATES)
def test_bad_templates_are_one_line(tmp_path, source, message):
    one_line(checkpoint(tmp_path, {"chat_template": source}), message)


def test_a_template_that_is_not_utf8_is_one_line(tmp_path):
    folder = checkpoint(tmp_path)
    (folder / "chat_template.jinja").write_bytes(b"{{ messages }}\xff")
    one_line(folder, r"chat_template\.jinja: the chat template cannot be read \(not UTF-8")


ENDLESS = {
    "a product": "{{ 'a' * 1000000000 }}",
    "a product the other way": "{{ 1000000000 * [1] }}",
    "a power": "{{ 2 ** 1000000000 }}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "nested loops": "{% set r = range(100000) %}{% for i in r %}{% for j in r %}x{% endfor %}{% endfor %}",
    "empty loops": "{% set r = range(100000) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "long rounds": "{% set x %}{% for i in range(100000) %}" + "x" * 10_000 + "{% endfor %}{% endset %}",
    "a list of lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a width by %": "{{ '%1000000000d' % 1 }}",
    "a width beside": "{{ '%*d' % (1000000000, 1) }}",
    "a width by format": "{{ '{:1000000000}'.format(1) }}",
    "a width by the filter": "{{ '%1000000000d'|format(1) }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "center": "{{ 'x'|center(1000000000) }}",
    "indent": "{{ ('a\n' * 100000)|indent(1000000) }}",
    "tojson": "{{ messages|tojson(indent=1000000000) }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "join": "{{ (['a'] * 100000)|join('b' * 100000) }}",
    "tabs": "{{ '\t'.expandtabs(1000000000) }}",
    "range": "{{ range(1000000000)|list }}",
    "slices": "{{ [1]|slice(1000000000)|list }}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_templates_that_never_end_are_bounded(source, monkeypatch):
    """Here with a hundredth of the work, since the suite has other things to do."""
    monkeypatch.setattr(templates, "MOST_WORK", templates.MOST_WORK // 100)
    begun = time.monotonic()
    with pytest.raises(UsageError, match=r"T: the chat template failed .* more than \d+ characters and items"):
        ChatTemplate(source, "T", {}).render([USER])
    assert time.monotonic() - begun < 5


def test_long_chats_are_within_the_bounds():
    """A prompt of a million characters, and one of a thousand messages."""
    for name in ("qwen3.jinja", "qwen2_5_training.jinja", "deepseek_r1_distill.jinja"):
        template = compiled(name)
        assert len(template.render([{"role": "user", "content": "word " * 200_000}])) > 1_000_000
        turns = [USER, {"role": "assistant", "content": "<think>a</think>4"}] * 500
        assert template.render([*turns, USER]).count("2 + 2") == 501


BROKEN_JSON = {
    "nested": ("[" * 100_000, "nested too deeply"),
    "nested objects": ('{"a":' * 100_000, "nested too deeply"),
    "torn": ('{"a": ', "not readable JSON"),
    "a list": ("[1]", "must hold a JSON object"),
    "twice": ('{"eos_token": "a", "eos_token": "b"}', "'eos_token' is given twice"),
    "a long number": ('{"a": ' + "9" * 5000 + "}", "not readable JSON"),
    "empty": ("", "not readable JSON"),
}


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text, message", BROKEN_JSON.values(), ids=BROKEN_JSON)
def test_broken_settings_files_are_one_line(tmp_path, name, text, message):
    one_line(write(checkpoint(tmp_path), name, text), f"{name}: .*{message}")


def test_settings_that_are_not_utf8_are_one_line(tmp_path):
    folder = checkpoint(tmp_path)
    (folder / "generation_config.json").write_bytes(b'{"a": "\xff"}')
    one_line(folder, "generation_config.json: not readable JSON .not UTF-8")


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}", "not a readable tokenizer"),
        ("[]", "not a readable tokenizer"),
        ("", "not a readable tokenizer"),
        (tokenizers.Tokenizer(tokenizers.models.BPE()).to_str(), "vocabulary is empty"),
        (None, "not found"),
    ],
)
def test_bad_tokenizers_are_one_line(tmp_path, content, message):
    folder = checkpoint(tmp_path)
    (folder / "tokenizer.json").unlink() if content is None else write(folder, "tokenizer.json", content)
    one_line(folder, f"tokenizer.json: .*{message}")


# Ends


@pytest.mark.parametrize(
    "eos",
    ["x", [], {}, -1, True, False, 1.5, [None], [1, "2"], {"a": 1}, [[1]], [-1], [True], "", 10**9, [7, 10**9], 0.0],
)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_end_tokens_that_are_none_are_refused(tmp_path, name, eos):
    folder = write(checkpoint(tmp_path), name, {"eos_token_id": eos})
    one_line(folder, f"{name}: eos_token_id is .* it must be a token id")


def ids(*tokens):
    hub = tokenizers.Tokenizer.from_file(str(BUILTIN / "tokenizer.json"))
    return tuple(sorted({hub.token_to_id(token) if isinstance(token, str) else token for token in tokens}))


ENDS = {
    "a list": (PLAIN, {"eos_token_id": [7, 3]}, {}, (3, 7, "<|im_end|>")),
    "a number": (PLAIN, {"eos_token_id": 7}, {}, (7, "<|im_end|>")),
    "twice": (PLAIN, {"eos_token_id": [7, 7]}, {}, (7, "<|im_end|>")),
    "null falls back to config.json": (PLAIN, {"eos_token_id": None}, {"eos_token_id": 9}, (9, "<|im_end|>")),
    "generation_config.json goes first": (PLAIN, {"eos_token_id": 7}, {"eos_token_id": 9}, (7, "<|im_end|>")),
    "the tokenizer's": ({**PLAIN, "eos_token": "<|endoftext|>"}, {}, {}, ("<|endoftext|>", "<|im_end|>")),
    "a base that names one only": (
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"},
        {"eos_token_id": ids("<|endoftext|>")[0]},
        {},
        ("<|endoftext|>", "<|im_end|>"),
    ),
    "the template's": (
        {**PLAIN, "chat_template": "{% for m in messages %}{{ m.content }}<|endoftext|>\n{% endfor %}"},
        {"eos_token_id": 7},
        {},
        (7, "<|endoftext|>"),
    ),
    "a template that fails on answers": (
        {**PLAIN, "chat_template": "{{ messages[0].content if messages|length == 1 else 1 / 0 }}"},
        {"eos_token_id": 7},
        {},
        (7,),
    ),
    "a template without an end": (
        {**PLAIN, "chat_template": "{{ messages[-1].content }}"},
        {"eos_token_id": 7},
        {},
        (7,),
    ),
    "none named at all": (
        {**PLAIN, "chat_template": "{{ messages[0].content }}"},
        {},
        {},
        ("<|im_end|>", "<|endoftext|>"),
    ),
}


@pytest.mark.parametrize("config, generation, model, wanted", ENDS.values(), ids=ENDS)
def test_every_end_token_counts(tmp_path, config, generation, model, wanted):
    folder = write(checkpoint(tmp_path, config, generation), "config.json", model)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.stop_tokens == ids(*wanted) and tokenizer.end_of_turn in tokenizer.stop_tokens


def test_answers_on_file_end_with_the_templates_end(tmp_path):
    template = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
    folder = checkpoint(
        tmp_path, {**PLAIN, "chat_template": template, "eos_token": "<|im_end|>"}, {"eos_token_id": [7]}
    )
    assert load_tokenizer(folder).end_of_turn == ids("<|endoftext|>")[0]
    assert load_tokenizer(folder, chat_template="none").end_of_turn == ids("<|im_end|>")[0]
    assert load_tokenizer(folder, chat_template="none").stop_tokens == ids("<|im_end|>", 7)


def test_an_eos_token_that_the_tokenizer_lacks_is_refused(tmp_path):
    one_line(checkpoint(tmp_path, {**PLAIN, "eos_token": "</s>"}), "eos_token '</s>' .* is no token")


def test_a_tokenizer_without_any_end_is_refused(tmp_path):
    hub = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    folder = checkpoint(tmp_path, PLAIN)
    hub.save(str(folder / "tokenizer.json"))
    one_line(folder, "no eos_token_id in generation_config.json")


def test_the_tokenizer_may_lie_beside_an_adapter(tmp_path):
    tokenizer = checkpoint(tmp_path / "adapter", PLAIN)
    model = write(checkpoint(tmp_path / "base", PLAIN), "generation_config.json", {"eos_token_id": 7})
    assert load_tokenizer(tokenizer, model=model).stop_tokens == ids("<|im_end|>", 7)


# The rest of the tokenizer


def test_special_tokens_are_kept_on_request_but_for_the_end(tmp_path):
    folder = checkpoint(tmp_path)
    keep, drop = load_tokenizer(folder, keep_special_tokens=True), load_tokenizer(folder)
    row = keep.encode(["<|im_start|>hi<|im_end|>"])[0]
    assert keep.decode([row]) == ["<|im_start|>hi"] and drop.decode([row]) == ["hi"]
    assert keep.decode([row[:-1], []]) == ["<|im_start|>hi", ""]


def test_qwen3_tokenizer_and_default_template(shared, tmp_path):
    """The real tokenizer without a template of its own gets ChatML, and its usual end tokens."""
    (tmp_path / "tokenizer.json").write_bytes((shared / "qwen3_tokenizer" / "tokenizer.json").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.num_tokens == 151_669 and tokenizer.stop_tokens == (ENDOFTEXT, IM_END)
    assert tokenizer.end_of_turn == IM_END
    text = tokenizer.render([{"role": "user", "content": "2+2?"}])
    assert text == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer.encode([text])[0]
    assert tokens[0] == 151_644 and tokens.count(IM_END) == 1
    assert tokenizer.decode([tokens]) == ["user\n2+2?\nassistant\n"]


def test_templates_see_thinking(tmp_path):
    template = "{% if enable_thinking %}<think>{% else %}<think></think>{% endif %}{{ messages[0].content }}"
    folder = checkpoint(tmp_path, {"chat_template": template})
    assert load_tokenizer(folder, True).render([USER]) == "<think>What is 2 + 2?"
    assert load_tokenizer(folder, False).render([USER]) == "<think></think>What is 2 + 2?"


def test_a_list_of_templates_has_a_default(tmp_path):
    listed = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    assert load_tokenizer(checkpoint(tmp_path, {"chat_template": listed})).render([USER]) == USER["content"]


def test_text_that_is_no_unicode_is_refused(tmp_path):
    with pytest.raises(UsageError, match="not Unicode"):
        load_tokenizer(checkpoint(tmp_path)).encode_prompts(["a\ud800"])
