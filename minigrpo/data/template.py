"""Chat templates rendered as transformers renders them, in a sandbox that bounds their time and memory."""

import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.visitor

from minigrpo.config import UsageError

Message = dict[str, Any]
"""A role, and content: text or a list of {"type": "text", "text": ...} parts; tool calls and more are passed on."""

MOST_WORK = 1 << 27
"""Characters and items that one rendering may make or read; a chat of a million tokens needs some 40 million."""
ROUND, CALL = 64, 1024
"""Work of a round of a loop, an operation or an item of a list, and of a call, in characters."""
LONGEST_INTEGER = 1 << 16
"""Bits of the largest number."""
LARGEST_TEMPLATE = 1 << 20
"""Characters of the longest template; published ones have about 20,000."""

MULTIPLYING = frozenset(
    {"replace", "join", "indent", "expandtabs", "tojson", "wordwrap", "translate", "batch", "slice"}
)
"""Functions whose result may have as many characters as their arguments' sizes multiplied."""

LOOKING = frozenset({"length", "count", "first", "last", "default", "d"})
"""Filters that do not walk through their argument, however long it is."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning, the first being the one that templates read."""


class WorkError(jinja2.TemplateError):
    """A template that makes more than any prompt needs."""


class Generation(jinja2.ext.Extension):
    """The blocks {% generation %} of templates made for training, which mark what the assistant wrote."""

    tags: Any = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the block's body in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [jinja2.nodes.Scope(body, lineno=line)]


class Bounded(jinja2.visitor.NodeTransformer):
    """Rewrites loops and concatenations so that they pass the sandbox's meter."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.For:
        """Return the loop over a counted iterable; a round costs the text in its body too."""
        self.generic_visit(node)
        cost = ROUND + sum(len(data.data) for data in node.find_all(jinja2.nodes.TemplateData))
        node.iter = filtered("counted", cast(jinja2.nodes.Expr, node.iter), jinja2.nodes.Const(cost))
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Filter:
        """Return a ~ b as a call."""
        self.generic_visit(node)
        return filtered("concatenated", jinja2.nodes.List(node.nodes, lineno=node.lineno))


def filtered(name: str, value: jinja2.nodes.Expr, *args: jinja2.nodes.Expr) -> jinja2.nodes.Filter:
    """Return the node of `value|name(*args)`."""
    return jinja2.nodes.Filter(value, name, list(args), [], None, None, lineno=value.lineno)


def weight(value: Any) -> int:
    """Return the characters of a text, or the work of walking through a list or dict; 1 for anything else."""
    total, waiting = 1, [value]
    while waiting and total <= MOST_WORK:
        item = waiting.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, list | tuple | dict):
            total += ROUND * len(item)
            waiting += [*item, *item.values()] if isinstance(item, dict) else item
    return total


def cost_of(name: str, values: Sequence[Any]) -> int:
    """Return the work of calling the function `name` with these arguments, a method's own object among them."""
    sizes = [abs(value) if isinstance(value, int) else weight(value) for value in values]
    return math.prod(max(size, 1) for size in sizes) if name in MULTIPLYING else sum(sizes)


def widths(text: Any) -> int:
    """Return the sum of the field widths in a format string."""
    return sum(int(digits[:18]) for digits in re.findall(r"\d+", text)) if isinstance(text, str) else 0


def call_cost(function: Any, values: list[Any]) -> int:
    """Return the work of calling a function or method; a method's object is what it works on."""
    name, method = getattr(function, "__name__", ""), getattr(function, "__wrapped__", function)
    own = getattr(method, "__self__", None)
    own = own if isinstance(own, str | list | dict) else None
    return cost_of(name, [own, *values]) + (widths(own) if name.startswith("format") else 0)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment in which transformers renders chat templates, with a meter of the work done."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self) -> None:
        extensions = [Generation, jinja2.ext.loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self.written)
        self.left = MOST_WORK
        self.globals |= {"raise_exception": raise_exception, "strftime_now": refuse_date, "lipsum": refuse_chance}
        self.filters |= {"tojson": to_json, "random": refuse_chance, "concatenated": concatenated}
        self.filters |= {name: self.metered(name, run) for name, run in self.filters.items() if name not in LOOKING}
        self.filters["counted"] = self.counted

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        return cast(jinja2.nodes.Template, Bounded().visit(super()._parse(source, name, filename)))

    def spend(self, work: int) -> None:
        """Count work; WorkError once there has been too much."""
        self.left -= work
        if self.left < 0:
            raise WorkError(f"it makes or reads more than {MOST_WORK} characters and items for one prompt")

    def counted(self, values: Any, cost: int) -> Iterator[Any]:
        """Yield the values, each at its cost."""
        for value in values:
            self.spend(cost)
            yield value

    def written(self, value: Any) -> Any:
        """Count a value and return the text that goes into the prompt."""
        self.spend(weight(value))
        return value

    def metered(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter whose arguments and result are counted."""

        @functools.wraps(run)
        def count(*args: Any, **kwargs: Any) -> Any:
            work = cost_of(name, [*args, *kwargs.values()]) + (widths(args[0]) if name == "format" else 0)
            self.spend(ROUND + work)
            result = run(*args, **kwargs)
            self.spend(weight(result))
            return result

        return count

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method of the template, counted."""
        self.spend(CALL)
        if not isinstance(function, jinja2.runtime.Macro):  # which is given its arguments as they are
            self.spend(call_cost(function, [*args, *kwargs.values()]))
        result = super().call(context, function, *args, **kwargs)
        self.spend(weight(result))
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute left + right and the like, counted."""
        numbers = [value for value in (left, right) if isinstance(value, int)]
        if len(numbers) == 2:
            bits = left.bit_length() * (right if operator == "**" else 1) + right.bit_length()
            self.spend(MOST_WORK + 1 if bits > LONGEST_INTEGER else ROUND)
        elif operator == "*":
            self.spend(cost_of("replace", [left, right]))
        else:
            formatted = [left, *right] if isinstance(right, tuple) else [left, right]
            self.spend(ROUND + cost_of("%", formatted) + (widths(left) if operator == "%" else 0))
        return super().call_binop(context, operator, left, right)


def raise_exception(message: str) -> None:
    """Raise the template's own error."""
    raise jinja2.TemplateError(message)


def refuse_date(*_: Any) -> None:
    """Refuse today's date."""
    raise jinja2.TemplateError(
        "it puts today's date into the prompt (strftime_now), so that a run could not be repeated; "
        "write a date into a copy and pass --chat_template=FILE"
    )


def refuse_chance(*_: Any, **__: Any) -> None:
    """Refuse random text."""
    raise jinja2.TemplateError("it puts random text into the prompt, so that a run could not be repeated")


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without HTML escapes, with the options that transformers gives its templates."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def concatenated(parts: list[Any]) -> str:
    """Return the parts as one text."""
    return "".join(map(str, parts))


class ChatTemplate:
    """A compiled chat template and the special tokens that it may name."""

    def __init__(self, source: str, name: str, special_tokens: dict[str, str]):
        """Compile a template; UsageError naming `name` if it is too long or no Jinja."""
        self.source, self.name, self.special_tokens = source, name, special_tokens
        if len(source) > LARGEST_TEMPLATE:
            raise UsageError(f"{name}: a chat template of {len(source)} characters; the most is {LARGEST_TEMPLATE}")
        self.sandbox = Sandbox()
        try:
            self.compiled = self.sandbox.from_string(source)
        except Exception as error:  # Jinja and Python's compiler raise many kinds
            raise UsageError(f"{name}: the chat template does not parse: {reason(error)}") from error
        self.reads_parts = self.shows([{"type": "text", "text": PROBE}])

    def shows(self, content: Any) -> bool:
        """Return whether the template takes the text out of such content and out of nothing else."""
        try:
            text = self.run([{"role": "user", "content": content}], {"add_generation_prompt": True})
        except Exception:  # a template that cannot read the content, for whatever reason
            return False
        return PROBE in text and not re.search(rf"""['"]text['"]: ?['"]{PROBE}""", text)

    def run(self, messages: Sequence[Message], settings: dict[str, Any]) -> str:
        """Return the text for messages that are ready."""
        self.sandbox.left = MOST_WORK
        names = {**self.special_tokens, "tools": None, "documents": None, **settings}
        return self.compiled.render(messages=list(messages), **names)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **settings: Any) -> str:
        """Render the chat, ending where the assistant's answer begins; UsageError if it cannot be rendered.

        `settings` are more names of the template's, such as `enable_thinking`.
        """
        ready = [self.prepare(message) for message in messages]
        try:
            return self.run(ready, {"add_generation_prompt": add_generation_prompt, **settings})
        except Exception as error:  # a template is a program: it may raise anything
            raise UsageError(
                f"{self.name}: the chat template failed on {messages[-1:]!r:.80}: {reason(error)}"
            ) from error

    def prepare(self, message: Message) -> Message:
        """Return a message as transformers hands it over: without nulls, its reasoning under every usual name.

        Text parts become text where the template cannot read parts, which transformers would drop or print as Python.
        """
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[key] for key in REASONING if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        content = message.get("content")
        if isinstance(content, list | tuple):
            message["content"] = [part_of(part) for part in content] if self.reads_parts else joined_parts(content)
        return message


PROBE = "minigrpo probe"
"""Text that no template holds."""


def reason(error: Exception) -> str:
    """Return an error's own words on one line."""
    words = " ".join(str(error).split())
    kind = "" if isinstance(error, jinja2.TemplateError) and words else f"{type(error).__name__}: "
    return f"{kind}{words}"[:300]


def part_of(part: Any) -> Message:
    """Return a text part without nulls; UsageError for an image or anything else that is not text."""
    if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
        raise UsageError(f"a message's content holds {part!r:.60}; its parts must be {{'type': 'text', 'text': ...}}")
    return {key: value for key, value in part.items() if value is not None}


def joined_parts(content: Sequence[Any]) -> str:
    """Return the texts of the parts as one."""
    return "".join(part_of(part)["text"] for part in content)


def text_of(message: Message) -> str:
    """Return a message's text, "" for one that has only tool calls."""
    content = message.get("content")
    return joined_parts(content) if isinstance(content, list | tuple) else str(content or "")
