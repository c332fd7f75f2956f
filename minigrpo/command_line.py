"""From a command line to settings and an exit code: flags, config files, --help and errors of one line."""

import contextlib
import dataclasses
import os
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from minigrpo.commands import COMMANDS
from minigrpo.config import (
    ALL_SETTINGS,
    EXIT_INTERRUPTED,
    EXIT_UNREAD,
    EXIT_USAGE,
    KINDS,
    MODEL_DEFAULTS,
    TINY,
    TRAIN_DEFAULTS,
    AnySettings,
    Options,
    Settings,
    UsageError,
    field_type,
    make_settings,
    section_types,
)
from minigrpo.config_files import ConfigFile, read_config, shipped_recipes
from minigrpo.other_names import other_name, similar, written
from minigrpo.version import __version__

LEFT_BEHIND = 5.0
"""Seconds that threads left behind by other code, which Python waits for at its end, may go on."""

HELP_WIDTH = 100
"""Characters of a line of --help."""

FIRST_FLAGS = (
    "model", "dataset", "reward", "batch_size", "num_generations", "max_completion_length", "max_steps",
    "learning_rate", "mesh", "output_dir",
)  # fmt: skip
"""Flags that --help shows before the others."""

DISPLACES = {"num_epochs": "max_steps", "warmup_steps": "warmup_ratio", "warmup_ratio": "warmup_steps"}
"""Flag -> the one that says the same otherwise: given later, it takes the place of the other one's earlier value."""

DEFINE: dict[type, Callable[..., Any]] = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
}


# Flags


def define_flags(types_by_name: Mapping[str, type[Options]]) -> flags.FlagValues:
    """Define an absl flag for every option, and --config."""
    values = flags.FlagValues()
    flags.DEFINE_multi_string("config", [], "config files or shipped recipes, later ones first", flag_values=values)
    for options in types_by_name.values():
        for field in dataclasses.fields(options):
            DEFINE[field_type(field)](field.name, field.default, field.metadata["help"], flag_values=values)
    return values


def parse_flags(argv: list[str], sections: tuple[str, ...], kind: type[AnySettings] = ALL_SETTINGS) -> AnySettings:
    """Parse a command line and the config files that it names; what is on the command line wins.

    UsageError for an unknown flag or key, a bad value or a stray argument.
    """
    values = define_flags(section_types(sections, kind))
    check_values_follow(argv, values)
    try:
        rest: list[str] = values(["minigrpo", *argv])[1:]
    except (flags.Error, OSError, ValueError) as error:  # absl's ValueError is of --noNAME=VALUE
        raise UsageError(f"{flag_problem(error, argv, values)} (see --help)") from error
    if rest:
        raise UsageError(
            f"unexpected argument {rest[0]!r}; flags are written --name=value, spaces in quotes (see --help)"
        )
    given = {name: typed(values[name].value) for name in values if values[name].present and name != "config"}
    return merge([read_config(name, sections, kind) for name in values.config], given, sections, kind)


def merge(
    files: list[ConfigFile], given: dict[str, Any], sections: tuple[str, ...], kind: type[AnySettings]
) -> AnySettings:
    """Return the settings of config files, later ones first, under flags; say which keys mean nothing here."""
    merged: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    for file in files:
        if file.ignored:
            sys.stderr.write(f"note: {file.path}: not flags of this command, ignored: {', '.join(file.ignored)}\n")
        merged = displaced(merged, file.values) | file.values
        origin |= dict.fromkeys(file.values, file.path)
    from_file = displaced(merged, given).keys() - given.keys()
    try:
        settings = make_settings(displaced(merged, given) | given, sections, kind)
    except UsageError as error:
        raise located(error, {name: origin[name] for name in from_file}) from error
    return dataclasses.replace(settings, from_file=frozenset(from_file))


def displaced(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Return the earlier values without those that later ones take the place of under another name."""
    gone = {DISPLACES[name] for name in later if name in DISPLACES} - later.keys()
    return {name: value for name, value in earlier.items() if name not in gone}


def located(error: UsageError, origin: Mapping[str, Path]) -> UsageError:
    """Return the error with the config file that gave the flag it names, if one did."""
    named = re.match(r"--(\w+)", str(error))
    if named is None or named[1] not in origin:
        return error
    return UsageError(f"{origin[named[1]]}: {str(error).removeprefix('--')}")


def typed(value: Any) -> Any:
    """Return a flag's value; in text, a backslash and an n are a new line."""
    return value.replace("\\n", "\n") if isinstance(value, str) else value


# What is wrong with a command line


def check_values_follow(argv: list[str], values: flags.FlagValues) -> None:
    """Raise UsageError for a flag that needs a value and is followed by another flag, or by nothing."""
    for word, following in zip(argv, [*argv[1:], "--"], strict=False):
        name = word.lstrip("-")
        if word == "--":
            return
        needs = name == "flagfile" or (name in values and not values[name].boolean)
        if word.startswith("-") and needs and following.startswith("--"):
            raise UsageError(f"--{name}: needs a value, written --{name}=VALUE (see --help)")


def flag_problem(error: Exception, argv: list[str], values: flags.FlagValues) -> str:
    """Return one line for an error of absl's."""
    text = str(error).splitlines()[0]
    if isinstance(error, flags.UnrecognizedFlagError):
        return f"--{error.flagname}: no such flag{instead(error.flagname, values)}"
    if isinstance(error, flags.CantOpenFlagFileError) and isinstance(error.__context__, OSError):
        return f"--flagfile={error.__context__.filename}: cannot be read ({error.__context__.strerror})"
    if isinstance(error, UnicodeDecodeError):
        file = next((word for word in argv if word.lstrip("-").startswith("flagfile")), "--flagfile")
        return f"{file}: not UTF-8 text"
    illegal = re.match(r"flag --(\w+)=(.*?): ", str(error), re.DOTALL)
    if isinstance(error, flags.IllegalFlagValueError) and illegal and illegal[1] in values:
        kind = {"bool": bool, "int": int, "float": float}.get(values[illegal[1]].flag_type(), str)
        return f"--{illegal[1]}={illegal[2]!s:.60}: must be {KINDS[kind]}"
    return text


def instead(name: str, known: Iterable[str]) -> str:
    """Return what to write in place of an unknown flag, to follow the error."""
    name = written(name)
    if other_name(name):
        return f"; {other_name(name)}"
    elsewhere = [command for command, about in COMMANDS.items() if name in flag_names(about.sections)]
    if elsewhere and name not in known:
        return f" of this command; it belongs to {', '.join(elsewhere)}"
    meant = [f"--{other}" for other in similar(name, known)]
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def flag_names(sections: tuple[str, ...]) -> list[str]:
    """Return the names of the flags of some sections."""
    return [
        field.name for options in section_types(sections, Settings).values() for field in dataclasses.fields(options)
    ]


# Help


def flag_help(field: dataclasses.Field[Any]) -> list[str]:
    """Return the lines on a flag: its choices or kind, its default, its text."""
    choices = "|".join(map(str, field.metadata["choices"])) or field_type(field).__name__
    default = "" if field.default in (None, "") else f" [{field.default}]"
    text = textwrap.wrap(field.metadata["help"], HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return [f"  --{field.name}={choices}{default}", *text]


def help_text(command: str, caption: str, options: Iterable[type[Options]], footer: str) -> str:
    """Return the --help page: the flags that matter first, then the others by area, then files and the footer."""
    areas = [(area.__doc__, dataclasses.fields(area)) for area in options]
    every = {field.name: field for _, fields in areas for field in fields}
    first = [every[name] for name in FIRST_FLAGS if name in every]
    shown = {field.name for field in first} if len(every) > 2 * len(FIRST_FLAGS) else set()
    lines = [caption, "", f"usage: {command} [--flag=value ...] [--config=FILE] [--flagfile=FILE]"]
    if shown:
        lines += ["", "First of all:", *(line for field in first for line in flag_help(field))]
    for title, fields in areas:
        rest = [line for field in fields if field.name not in shown for line in flag_help(field)]
        lines += ["", f"{title}:", *rest] if rest else []
    lines += ["", "Files:", "  --config=FILE|RECIPE", *CONFIG_HELP, f"      recipes: {', '.join(shipped_recipes())}"]
    return "\n".join([*lines, "", footer] if footer else lines)


CONFIG_HELP = (
    "      YAML or JSON file of flags, flat or by section, or the name of a shipped recipe; repeated, later",
    "      ones win, and flags on the command line win over all; a run's config.json is one",
)


def command_footer(name: str) -> str:
    """Return the end of a command's --help: notes, defaults of the built-in model, examples."""
    command = COMMANDS[name]
    notes = [command.notes] if command.notes else []
    if name == "train":
        own = "\n".join(f"  --{flag}={value}" for flag, value in (MODEL_DEFAULTS[TINY] | TRAIN_DEFAULTS[TINY]).items())
        notes.append(f"{TINY} has defaults of its own:\n{own}")
    examples = [f"  python -m minigrpo.{name} {example}" for example in command.examples]
    return "\n\n".join([*notes, "\n".join(["Examples:", *examples])])


# Commands


def answer_questions(
    argv: list[str], command: str, caption: str, types_by_name: Mapping[str, type[Options]], footer: str
) -> None:
    """Print --help or --version and exit, where they are asked for."""
    if any(arg in ("--help", "-h", "-help", "--helpfull") for arg in argv):
        sys.stdout.write(help_text(command, caption, types_by_name.values(), footer) + "\n")
        sys.exit(0)
    if "--version" in argv:
        sys.stdout.write(f"minigrpo {__version__}\n")
        sys.exit(0)


def answer_early(argv: list[str]) -> None:
    """Answer --help and --version of the command that the interpreter is starting, before its modules are imported."""
    name = next((word.removeprefix("minigrpo.") for word in sys.orig_argv if word.startswith("minigrpo.")), "")
    if name in COMMANDS:
        about = COMMANDS[name]
        types_by_name = section_types(about.sections, Settings)
        answer_questions(argv, f"python -m minigrpo.{name}", about.does, types_by_name, command_footer(name))


def run_named(name: str, main: Callable[[AnySettings], int]) -> None:
    """Run one of COMMANDS as `run_command` does."""
    about = COMMANDS[name]
    run_command(f"python -m minigrpo.{name}", about.does, about.sections, main, command_footer(name), names=about.names)


def run_command(
    command: str,
    caption: str,
    sections: tuple[str, ...],
    main: Callable[[AnySettings], int],
    footer: str = "",
    kind: type[AnySettings] = ALL_SETTINGS,
    names: tuple[str, ...] = (),
) -> None:
    """Parse sys.argv, run `main` and exit. Bad input is one line on stderr and code 2, never a traceback.

    `names` are flags that arguments without a name stand for, in order.
    """
    argv = name_arguments(sys.argv[1:], names)
    answer_questions(argv, command, caption, section_types(sections, kind), footer)
    try:
        code = main(parse_flags(argv, sections, kind))
    except UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        code = EXIT_USAGE
    except BrokenPipeError:  # as after `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_UNREAD
    except OSError as error:
        if error.filename is None or is_own_file(error.filename):  # a bug, not a file that the user named
            raise
        sys.stderr.write(f"error: {error.filename}: {error.strerror or error}\n")
        code = EXIT_USAGE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = EXIT_INTERRUPTED
    threading.Thread(target=end_late, args=(code,), daemon=True).start()
    sys.exit(code)


def name_arguments(argv: list[str], names: tuple[str, ...]) -> list[str]:
    """Give arguments that have no name, and are no flag's value, those of the flags in `names` that are left, in order.

    >>> name_arguments(["a", "--x=1", "b"], ("run", "other")), name_arguments(["--run", "a", "b"], ("run", "other"))
    (['--run=a', '--x=1', '--other=b'], ['--run', 'a', '--other=b'])
    """
    given = {word.lstrip("-").partition("=")[0] for word in argv if word.startswith("-")}
    left = [name for name in names if name not in given]
    named = []
    for before, word in zip(["", *argv], argv, strict=False):
        is_value = before.startswith("--") and "=" not in before
        named.append(word if word.startswith("-") or is_value or not left else f"--{left.pop(0)}={word}")
    return named


def end_late(code: int) -> None:
    """End the process soon after its main thread, also where a reward function left threads or exit handlers behind."""
    threading.main_thread().join()
    time.sleep(LEFT_BEHIND)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.write("note: threads that other code left behind were cut off\n")
        sys.stderr.flush()
    os._exit(code)


def is_own_file(name: Any) -> bool:
    """Tell if a file belongs to the installed package rather than to its user."""
    return Path(os.fsdecode(name)).absolute().is_relative_to(Path(__file__).parent)
