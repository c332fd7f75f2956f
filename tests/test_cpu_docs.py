"""The pages: links lead somewhere, commands parse, files beside them are whole, sentences are short and plain."""

import ast
import contextlib
import importlib
import importlib.util
import pathlib
import re
import shlex
import subprocess
import textwrap

import pytest
from conftest import ROOT

DOCS = ROOT / "minigrpo" / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
FILES = [*PAGES, DOCS / "slurm.sbatch", DOCS / "gke_jobset.yaml"]

LONGEST = 30
"""Words of a sentence."""

TAKING_AN_OBJECT = "use|uses|is|are|be|write|name|give|pass|want|needs?|takes?|try|set"
ODD = re.compile(rf"\bproducts\b|\bapart\b|\balike\b|\b(?:{TAKING_AN_OBJECT}) such as\b", re.IGNORECASE)

ARGUMENTS = {"compare": ("run", "other")}
"""Command -> flags that its arguments without a name stand for."""


def named(path):
    return str(path.relative_to(ROOT))


def without_blocks(text):
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def blocks(text, language):
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in found]


# Links


def anchors(path):
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", without_blocks(path.read_text()), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower().strip()) for title in titles)
    return {title.replace(" ", "-") for title in plain}


def links(text):
    return re.findall(r"\]\(([^)\s]+)\)", without_blocks(text))


def broken_links(page, text):
    found = []
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


def test_anchors_are_githubs(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Stop, and `resume` on 2-core CPUs (not run)\n```sh\n# none\n```\n## Next_one\n")
    assert anchors(page) == {"stop-and-resume-on-2-core-cpus-not-run", "next_one"}
    text = "[a](page.md#next_one) [b](#next_one) [c](none.md) [d](page.md#none) [e](https://x.org/none)"
    assert broken_links(page, text) == ["none.md", "page.md#none"]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_somewhere(page):
    assert not broken_links(page, page.read_text())


def test_every_page_is_linked_from_another():
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links(page.read_text())}
    assert {path for path in FILES if path != ROOT / "README.md"} <= linked


# Commands


def commands(text):
    """Words after `python -m minigrpo.NAME`, of every command in a text -> [(name, words)]."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in joined.splitlines():
        for match in re.finditer(r"-m minigrpo\.(\w+)([^`\n]*)", line):
            found.append((match[1], words(match[2])))
    return found


def words(rest):
    """Words of a shell command up to the first operator; variables that stand for flags are left out."""
    if rest.count("'") % 2:  # the end of a command for another machine
        rest = rest.rstrip().removesuffix("'")
    lexer = shlex.shlex(rest, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    taken = []
    for word in lexer:
        if set(word) <= set("();<>|&"):
            break
        taken.append(word.rstrip(".,:"))
    return [word for word in taken if word and not word.startswith(("$", "#"))]


def shown_commands():
    found = {}
    for path in FILES:
        text = path.read_text()
        if path.suffix == ".md":
            prose = "\n".join(re.findall(r"`([^`]+)`", without_blocks(text)))
            text = "\n".join(blocks(text, "sh")) + "\n" + prose
        for name, given in commands(text):
            call = f"{named(path)}:{name} {' '.join(given)}"
            found[call] = pytest.param(name, given, id=call[:120])
    return list(found.values())


def parser():
    """The function that parses a command line, wherever it is."""
    there = importlib.util.find_spec("minigrpo.command_line")
    return importlib.import_module("minigrpo.command_line" if there else "minigrpo.config").parse_flags


def sections_of(name):
    """The sections of a command's settings."""
    if importlib.util.find_spec("minigrpo.commands"):
        known = importlib.import_module("minigrpo.commands").COMMANDS
        if name in known:
            return known[name].sections
    return getattr(importlib.import_module(f"minigrpo.{name}"), "SECTIONS", (name,))


def write_files(arguments):
    """Write the user's own files that a command names, as they would be."""
    shipped = {path.stem for path in (ROOT / "minigrpo" / "recipes").glob("*.yaml")}
    for word in arguments:
        flag, _, value = word.partition("=")
        path = pathlib.Path(value)
        if flag == "--config" and value not in shipped and "$" not in value:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"max_steps": 1}' if path.suffix == ".json" else "max_steps: 1\n")
        elif flag == "--flagfile":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("--max_steps=1\n")


def parse(name, given):
    """Parse a command as its main would, without running it; returns the settings."""
    free = iter(ARGUMENTS.get(name, ()))
    arguments = [word if word.startswith("-") else f"--{next(free)}={word}" for word in given]
    write_files(arguments)
    arguments = [word for word in arguments if not word.startswith("--config=$")]
    return parser()(arguments, sections_of(name))


def test_commands_are_found_whole():
    text = (
        "A=1 python -m minigrpo.train --a='x > y' \\\n  --b=c*2 > out 2>&1 &\npython -m minigrpo.compare r/a r/b | tail"
    )
    assert commands(text) == [("train", ["--a=x > y", "--b=c*2"]), ("compare", ["r/a", "r/b"])]
    assert commands('"$PYTHON" -m minigrpo.train --o="$RUN" $RESUME') == [("train", ["--o=$RUN"])]


def test_a_wrong_flag_is_found():
    with pytest.raises(ValueError, match="learning_rat"):
        parse("train", ["--learning_rat=1"])


@pytest.mark.parametrize(("name", "given"), shown_commands())
def test_every_command_parses(name, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):
        if {"--help", "--version"} & set(given):
            return
        assert parse(name, given)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_flag_in_a_sentence_exists(page):
    """Flags of minigrpo in inline code, which no command of a page may show."""
    known = {flag for name in ("train", "sft", "evaluate", "generate", "plan", "report") for flag in flags_of(name)}
    known |= {
        flag for name in ("check", "compare") if importlib.util.find_spec(f"minigrpo.{name}") for flag in flags_of(name)
    }
    spans = [span for span in re.findall(r"`([^`]+)`", without_blocks(page.read_text())) if span.startswith("--")]
    told = {word[2:].partition("=")[0] for span in spans for word in span.split() if re.match(r"--[a-z]\w*(=|$)", word)}
    assert told - known - ELSEWHERE == set()


ELSEWHERE = {
    "config", "flagfile", "help", "version", "signal", "gpu", "worker", "baseline", "mean_length", "lr", "over_time",
}  # fmt: skip
"""Flags in sentences that are those of every command, of benches, or of other programs."""


def flags_of(name):
    settings = parser()([], sections_of(name))
    return [field for section in settings.sections for field in vars(getattr(settings, section))]


def test_every_bench_and_test_named_is_there():
    for page in PAGES:
        for name in re.findall(r"\b((?:bench|tests)/\w+\.(?:py|png))", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


# Files and code


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_compiles(page):
    for code in blocks(page.read_text(), "python"):
        ast.parse(code)


def test_reward_functions_of_the_page_score():
    import asyncio

    names = {}
    for code in blocks((DOCS / "rewards.md").read_text(), "python"):
        exec(compile(code, "rewards.md", "exec"), names)
    texts = ["4 m because", "5"]
    assert names["brevity"](texts, unit=["m", "m"]) == [-0.011, -0.001]
    assert names["has_unit"](texts, unit=["m", "m"]) == [1.0, 0.0]
    assert asyncio.run(names["judge"](texts, texts)) == [1.0, 0.0]


def test_a_sink_of_the_page_is_a_sink(tmp_path):
    from minigrpo.runtime.sinks import own_sink

    code = next(code for code in blocks((DOCS / "metrics.md").read_text(), "python") if "class Print" in code)
    (tmp_path / "mine.py").write_text(code)
    assert own_sink(f"{tmp_path}/mine.py:Print").__name__ == "Print"


def test_the_batch_script_parses():
    subprocess.run(["bash", "-n", DOCS / "slurm.sbatch"], check=True)


def test_shell_blocks_parse():
    for page in PAGES:
        for code in blocks(page.read_text(), "sh"):
            done = subprocess.run(["bash", "-n"], input=code.replace("...", ""), text=True, capture_output=True)
            assert not done.returncode, f"{page.name}: {done.stderr}{code}"


def test_the_jobset_is_four_workers_of_four_chips():
    yaml = pytest.importorskip("yaml")
    jobset = yaml.safe_load((DOCS / "gke_jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (4, 4, "Indexed")
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    script = container["args"][0]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    grace = int(re.search(r"--grace_seconds=(\d+)", script)[1])
    assert grace < pod["terminationGracePeriodSeconds"]


def test_the_pages_are_in_the_wheel():
    import tomllib

    kinds = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["minigrpo"]
    for path in DOCS.iterdir():
        inner = path.relative_to(ROOT / "minigrpo")
        assert path.suffix in (".pyc", "") or any(inner.match(kind) for kind in kinds), inner


# English


def sentences(text):
    """Sentences of a page: without code, tables and headings; code in a line counts as a word, a list of code too."""
    text = without_blocks(text)
    text = re.sub(r"^(\||#|!\[|<).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]+`", "CODE", text)
    text = re.sub(r"CODE(?:(?:, (?:or |and )?| or | and |/)CODE)+", "CODE", text)
    for paragraph in re.split(r"\n\s*\n|^\s*(?:[*-]|\d+\.) ", text, flags=re.MULTILINE):
        plain = " ".join(paragraph.replace("**", "").split())
        yield from re.split(r"(?<=[.!?:])[\")]*\s+(?=[A-Z\"(0-9])", plain)


def test_sentences_are_found():
    text = "One `a b` two.\nThree\n[four](x.md).\n\n| no | no |\n* `a`, `b` and `c` five. Six 0.5 e\n```\nno. no\n```\n"
    assert [s for s in sentences(text) if s] == ["One CODE two.", "Three four.", "CODE five.", "Six 0.5 e"]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_sentences_are_short(page):
    long = [sentence for sentence in sentences(page.read_text()) if len(sentence.split()) > LONGEST]
    assert not long


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_odd_words(page):
    assert ODD.findall(re.sub(r"`[^`]+`", "", without_blocks(page.read_text()))) == []


def test_odd_words_are_found():
    assert ODD.findall("its products, kept apart; use such as v6e; rows such as this") == [
        "products",
        "apart",
        "use such as",
    ]
