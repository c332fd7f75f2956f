"""A chat in the terminal: ready when it asks, and compiled once for all turns."""

import collections

import jax
import pytest

from minigrpo import generate
from minigrpo.command_line import parse_flags
from minigrpo.runtime.progress import COMPILING


@pytest.fixture
def compiles():
    """Programs compiled, or read from disk, so far: by name."""
    counts = collections.Counter()

    def count(event, duration, **context):
        if event == COMPILING:
            counts[str(context.get("fun_name"))] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    yield counts
    jax.monitoring.unregister_event_duration_listener(count)


class Person:
    """A stdin that notes, before every line it is asked for, what has been compiled and shown."""

    def __init__(self, lines, compiles, capsys):
        self.lines, self.compiles, self.capsys = iter(lines), compiles, capsys
        self.seen, self.shown = [], []

    def isatty(self):
        return True

    def readline(self):
        self.seen.append(dict(self.compiles))
        self.shown.append(self.capsys.readouterr())
        return next(self.lines)


def test_a_chat_is_ready_when_it_asks_and_compiles_nothing_afterwards(compiles, capsys, monkeypatch):
    person = Person(["hi\n", "Anna has 3 apples. How many apples does Anna have?\n", "ok\n", "\n"], compiles, capsys)
    monkeypatch.setattr("sys.stdin", person)
    flags = ["--model=builtin:tiny", "--mesh=1,1", "--chat", "--temperature=0", "--max_completion_length=32"]
    assert generate.main(parse_flags(flags, generate.SECTIONS)) == 0
    assert sum("run_mesh" in name for name in person.seen[0]) == 1
    assert all(seen == person.seen[0] for seen in person.seen)
    assert person.shown[0].out == "" and all(shown.out for shown in person.shown[1:])
    for shown in person.shown:
        assert shown.err.endswith("> ")
    for shown in person.shown[1:]:
        assert "tokens/s once begun\n" in shown.err and "compil" not in shown.err
