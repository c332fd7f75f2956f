"""Config files of --config: YAML or JSON, flat or by section, read strictly; and the recipes that are shipped."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from minigrpo.config import Options, Settings, UsageError, check_kind, field_type, section_names, section_types
from minigrpo.other_names import other_name, similar, written

RECIPES = Path(__file__).parent / "recipes"

LARGEST_FILE = 1 << 20
"""Bytes of the largest config file that is read."""

UNTAGGED = ("str", "int", "float", "bool", "null", "timestamp", "merge", "value")
"""Kinds that YAML gives to words without a tag."""

Scalar = str | int | float | bool | None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A flag's value in a config file."""

    section: str
    """Section that it is written in; '' for a flat one."""
    name: str
    value: Any


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """Settings that a config file gives to a command."""

    path: Path
    values: dict[str, Any]
    """Values of the command's flags."""
    ignored: tuple[str, ...]
    """Flags that only other commands have."""


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_config(name: str) -> Path:
    """Return the file that --config names, a path or a shipped recipe; UsageError for neither."""
    path = Path(name)
    if name and path.is_file():
        return path
    if name.removesuffix(".yaml") in shipped_recipes():
        return RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    if name and path.is_dir():
        raise UsageError(f"--config={name}: is a folder; name the file in it, such as {path / 'config.json'}")
    raise UsageError(f"--config={name}: no such file, nor one of the shipped recipes: {', '.join(shipped_recipes())}")


def read_config(name: str, sections: tuple[str, ...], kind: type[Settings]) -> ConfigFile:
    """Read a config file for a command with these sections of its settings.

    UsageError, in one line that names the file and the key, for what is not YAML or JSON, a key that is unknown or
    given twice, and a value of another type.
    """
    path = find_config(name)
    everything = section_types(section_names(kind), kind)
    values: dict[str, Any] = {}
    ignored = []
    for entry in read_entries(path, everything):
        value = typed_value(path, find_field(path, entry, everything), entry.value)
        owner = next((section for section in sections if has_flag(everything[section], entry.name)), None)
        if owner is None or entry.section not in ("", owner):
            ignored.append(entry.name)
        elif entry.name in values:
            raise UsageError(f"{path}: {entry.name} is given twice, by itself and under {owner}; leave one of them out")
        elif value is not None:
            values[entry.name] = value
    return ConfigFile(path, values, tuple(dict.fromkeys(ignored)))


# Keys and their values


def read_entries(path: Path, everything: dict[str, type[Options]]) -> Iterator[Entry]:
    """Yield the entries of a file, those of its sections too."""
    content = read_mapping(path)
    if not content:
        raise UsageError(f"{path}: holds no settings; write lines such as learning_rate: 1e-5")
    for name, value in content.items():
        if isinstance(value, dict) and name not in everything:
            meant = "; ".join(f"did you mean {other}?" for other in similar(name, everything)[:1])
            raise UsageError(f"{path}: {name} is no section; {meant or 'the sections are ' + ', '.join(everything)}")
        if isinstance(value, dict):
            yield from (Entry(name, key, own) for key, own in value.items())
        elif value is not None or name not in everything:  # a section whose keys are all commented out is None
            yield Entry("", name, value)


def has_flag(options: type[Options], name: str) -> bool:
    """Tell if a section has a flag of this name."""
    return any(field.name == name for field in dataclasses.fields(options))


def find_field(path: Path, entry: Entry, everything: dict[str, type[Options]]) -> dataclasses.Field[Any]:
    """Return the field that an entry sets, of any command; UsageError for a key that no command has."""
    owners = [entry.section] if entry.section else list(everything)
    fields = [field for owner in owners for field in dataclasses.fields(everything[owner])]
    found = next((field for field in fields if field.name == entry.name), None)
    if found:
        return found
    where = f" in {entry.section}" if entry.section else ""
    if not entry.section and entry.name in everything:
        raise UsageError(f"{path}: {entry.name} is a section; write its flags below it, indented")
    raise UsageError(f"{path}: {entry.name}: no such key{where}{advice(entry.name, entry.section, everything)}")


def advice(name: str, section: str, everything: dict[str, type[Options]]) -> str:
    """Return what to write in place of an unknown key, to follow the error."""
    homes = {field.name: home for home, options in everything.items() for field in dataclasses.fields(options)}
    name = written(name)
    if other_name(name):
        return f"; {other_name(name)}"
    if section and name in homes:
        return f"; it belongs to {homes[name]}"
    meant = similar(name, homes)
    return f"; did you mean {' or '.join(meant)}?" if meant else "; --help lists them"


def typed_value(path: Path, field: dataclasses.Field[Any], value: Any) -> Any:
    """Return a value as the flag's type, None for a flag that may be unset; UsageError for a value of another type."""
    kind = field_type(field)
    if value is None and field.default is None:
        return None
    if isinstance(value, list):
        raise UsageError(f"{path}: {field.name}: must be one value, not a list; write it with commas, such as 4,2")
    if isinstance(value, dict) or value is None:
        raise UsageError(f"{path}: {field.name}: must be one value, not {'nothing' if value is None else 'a mapping'}")
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 10**300 else math.inf
    elif kind is str and type(value) is bool and "true" in field.metadata["choices"]:
        value = str(value).lower()
    elif kind is str and type(value) is int and field.metadata["number"]:
        value = str(value)
    try:
        check_kind(field, value)
    except UsageError as error:
        raise UsageError(f"{path}: {str(error).removeprefix('--')}") from error
    return value


# The file itself


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file; lists in it are empty, mappings are read two levels deep."""
    text = read_text(path)
    try:
        content = parse_json(text) if path.suffix.lower() == ".json" else parse_yaml(text)
    except RecursionError as error:
        raise UsageError(f"{path}: nested too deeply") from error
    except ValueError as error:
        raise UsageError(f"{path}: {error!s:.200}") from error
    if content is not None and not isinstance(content, dict):
        kind = "list" if isinstance(content, list) else "single value"
        raise UsageError(f"{path}: must hold flags and their values, such as learning_rate: 1e-5, not a {kind}")
    return content or {}


def read_text(path: Path) -> str:
    """Return a file's text; UsageError for one that cannot be read, is too large or is not UTF-8."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UsageError(f"{path}: larger than {LARGEST_FILE >> 20} MB, which is no config file")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error


def parse_json(text: str) -> Any:
    """Parse JSON; ValueError for what is none, or a key that is given twice."""
    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"not readable JSON ({error})") from error


def parse_yaml(text: str) -> Any:
    """Parse YAML; ValueError for what is none, for tags, and for a key that is given twice."""
    try:
        return plain(yaml.compose(text, Loader=yaml.SafeLoader), 2)
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"not readable YAML ({where}{error.problem or error.context})") from error
    except yaml.YAMLError as error:
        raise ValueError(f"not readable YAML ({str(error).splitlines()[0]})") from error


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return pairs as a dict; ValueError for a key that is given twice."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"{key:.60} is given twice; leave one of them out")
        content[key] = value
    return content


def plain(node: Any, depth: int) -> Any:
    """Return a YAML node as Python's types, mappings to `depth` levels; ValueError for a tag or an odd key."""
    if isinstance(node, yaml.SequenceNode):
        return []
    if isinstance(node, yaml.MappingNode):
        pairs = node.value if depth else []
        return unique([(key_of(key), plain(value, depth - 1)) for key, value in pairs])
    if node is None:
        return None
    if node.tag.removeprefix("tag:yaml.org,2002:") not in UNTAGGED:
        raise ValueError(f"line {node.start_mark.line + 1}: the tag {node.tag:.60} means nothing here")
    return node.value if node.style else scalar(node.value)


def key_of(node: Any) -> str:
    """Return a key; ValueError for a key that is a list or a mapping."""
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"line {node.start_mark.line + 1}: a key must be a flag's name")
    return str(node.value)


def scalar(text: str) -> Scalar:
    """Return an unquoted word as YAML 1.2's core schema has it, in which 1e-5 is a number and no is a word.

    >>> [scalar(text) for text in ("1e-5", "16", "4,2", "no", "true", "~")]
    [1e-05, 16, '4,2', 'no', True, None]
    """
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text.lower() in ("true", "false") and text in (text.lower(), text.upper(), text.title()):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?[0-9]+", text):
        return int(text)
    return float(text) if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text) else text
