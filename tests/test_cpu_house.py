"""The shape of the code: imports point one way, every setting is read, worked examples hold."""

import ast
import dataclasses
import doctest
import importlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from minigrpo import check, compare, config, evaluate, generate, plan, report, sft, train

LEVELS = [
    {"version"},
    {"config", "commands", "other_names", "door"},
    {"config_files"},
    {"command_line", "__main__"},
    {"user_code", "remote"},
    {"runtime", "data", "diagnostics"},
    {"model", "reporting"},
    {"rollout"},
    {"grpo"},
    {"planning"},
    {"build"},
    {"compare", "evaluate", "generate", "report"},
    {"share"},
    {"train", "sft", "tiny", "plan"},
    {"api", "check"},
    {"__init__"},
]
"""Wings and files of minigrpo from the bottom up: each imports only from its own wing and from levels below."""


def imported_modules(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("minigrpo"):
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names if alias.name != "__version__"]


def test_imports_point_downward():
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    for path in (ROOT / "minigrpo").rglob("*.py"):
        own = path.relative_to(ROOT / "minigrpo").parts[0].removesuffix(".py")
        for other in set(imported_modules(path)) - {"kernels", own}:
            assert level[other] < level[own], f"{path} imports {other}"


def test_kernels_import_nothing_of_minigrpo():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not list(imported_modules(path)), path


def attributes_read(path):
    return {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}


def test_every_setting_is_read_somewhere():
    files = (ROOT / "minigrpo").rglob("*.py")
    read = set().union(*map(attributes_read, files))
    options = config.section_types(tuple(config.SECTION_NAMES), config.Settings).values()
    names = {field.name for section in options for field in dataclasses.fields(section)}
    unread = names - read
    assert not unread


@pytest.mark.parametrize("command", [train, sft, evaluate, generate, plan, check, report, compare])
def test_flag_names_are_unique(command):
    options = config.section_types(command.SECTIONS, config.Settings).values()
    names = [field.name for section in options for field in dataclasses.fields(section)]
    assert len(names) == len(set(names))


PLATFORM_FREE = (
    "model",
    "rollout",
    "grpo",
    "data",
    "train",
    "sft",
    "evaluate",
    "generate",
    "report",
    "reporting",
    "compare",
    "config",
    "config_files",
    "command_line",
)


def test_the_core_names_no_platform():
    for path in (ROOT / "minigrpo").rglob("*.py"):
        if path.relative_to(ROOT / "minigrpo").parts[0].removesuffix(".py") in PLATFORM_FREE:
            assert not re.findall(r"""["'](?:cpu|gpu|tpu)["']""", path.read_text()), path


DOCTESTED = ["data.datasets", "data.columns", "data.grading", "data.rewards"]
DOCTESTED += ["data.probes", "data.findings", "rollout.generator", "config_files", "other_names", "command_line"]
DOCTESTED += ["runtime.sinks", "share"]
DOCTESTED += ["reporting.significance", "reporting.verdict"]


@pytest.mark.parametrize("name", DOCTESTED)
def test_worked_examples(name):
    result = doctest.testmod(importlib.import_module(f"minigrpo.{name}"))
    assert result.attempted > 0 and result.failed == 0


def test_the_rollout_bench_runs_and_ends_with_json():
    flags = (
        "--new_tokens=8",
        "--prompts=4",
        "--vocab=64",
        "--layers=1",
        "--hidden=32",
        "--repeats=2",
        "--mean_length=4",
    )
    command = [sys.executable, "bench/rollout_tput.py", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    import json

    report = json.loads(result.stdout.splitlines()[-1])
    assert report["tokens_per_second"] > 0 and 0 < report["limit_seconds"]
    assert report["prefill_tokens_per_second"] > 0 and report["peak_mib"] > 0
    assert len(report["occupancy_over_time"]) == min(10, report["decode_steps"])
    assert report["occupancy_over_time"][0] == 1 > report["occupancy"]
