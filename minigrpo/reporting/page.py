"""The report's page: one HTML file that needs nothing else and runs no script."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from minigrpo.reporting.history import History, Rows
from minigrpo.reporting.verdict import Verdict
from minigrpo.runtime.run_folder import TOKEN_NUMBERS

TEMPLATE = Path(__file__).parent.parent / "builtin" / "report.html.jinja"

SHOWN = 12
"""Single completions on the page, half of them the first, half the last."""

MEMBERS, TOKENS = 16, 320
"""Completions of a group, and tokens of a completion, that the page shows."""

LONGEST = 6000
"""Characters of a text that the page shows; the file has all."""

SURPRISE, ENTROPY, RATIO, DRIFT = 3.0, 2.0, 0.2, 1.0
"""Nats at full colour: -log p, entropy, the policy's log-prob less the sampling one's, and less the reference's."""

COLOURINGS = {
    "surprise": ("surprise, -log p of the token", "surprise"),
    "entropy": ("entropy of the policy", "entropy"),
    "ratio": ("ratio of the policy to the one that sampled", "ratio"),
    "clipped": ("clipped ratio", "clipped"),
    "drift": ("distance from the reference", "over reference"),
}
"""Id of a colouring -> its label, and the word that tokens with its number are titled with."""

FILES = (
    "metrics.jsonl", "evaluations.jsonl", "completions.jsonl", "answers.jsonl", "summary.json", "config.json",
    "flags.txt", "command.txt", "train.log", "report", "final", "adapter", "checkpoints", "tensorboard",
)  # fmt: skip
"""Files and folders of a run that the page links to."""


@dataclasses.dataclass(frozen=True)
class Token:
    """A token's text, its colours from 0 to 1 as CSS variables, and its numbers for the pointer."""

    text: str
    style: str
    title: str


@dataclasses.dataclass(frozen=True)
class Member:
    """A completion of a group, in its tokens if they were recorded, and how many tokens are not shown."""

    row: dict[str, Any]
    tokens: list[Token]
    left_out: int

    @property
    def style(self) -> str:
        """Return the colour of the advantage as a CSS variable: --good above 0, --bad below."""
        advantage = self.row.get("advantage") or 0.0
        return f"--{'good' if advantage > 0 else 'bad'}:{min(1.0, abs(advantage) / 2):.2f}"


@dataclasses.dataclass(frozen=True)
class Group:
    """Completions of one prompt in one step."""

    step: int
    prompt: str
    answer: str | None
    members: list[Member]
    more: int
    """Members that are not shown."""


# Groups


def shortened(text: Any) -> str:
    """Return a text, cut at LONGEST characters."""
    text = str(text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text) - LONGEST:,} more characters)"


def prompt_text(prompt: Any) -> str:
    """Return a prompt as text, its messages one after the other."""
    if not isinstance(prompt, list):
        return shortened(prompt)
    texts = [str(one.get("content", one)) if isinstance(one, dict) else str(one) for one in prompt]
    return shortened("\n\n".join(texts))


def whole_groups(samples: Rows) -> list[Rows]:
    """Return the rows of every group with several members, in order."""
    groups: dict[tuple[int, int], Rows] = {}
    for row in samples:
        if "member" in row and "group" in row:
            groups.setdefault((row["step"], row["group"]), []).append(row)
    return [rows for rows in groups.values() if len(rows) > 1]


def chosen_groups(samples: Rows) -> list[Group]:
    """Return the first, the middle and the last whole group, of those with recorded tokens and unequal rewards."""
    groups = whole_groups(samples)
    groups = [rows for rows in groups if any(row.get("tokens") for row in rows)] or groups
    groups = [rows for rows in groups if len({row.get("reward") for row in rows}) > 1] or groups
    places = sorted({0, len(groups) // 2, len(groups) - 1}) if groups else []
    return [make_group(groups[place]) for place in places]


def make_group(rows: Rows) -> Group:
    """Prepare a group for the page."""
    first, answer = rows[0], rows[0].get("answer")
    members = [make_member(row) for row in rows[:MEMBERS]]
    shown = None if answer is None else shortened(answer)
    return Group(first["step"], prompt_text(first["prompt"]), shown, members, len(rows) - len(members))


def make_member(row: dict[str, Any]) -> Member:
    """Prepare a completion for the page."""
    tokens = colour_tokens(row)
    left_out = max(0, int(row.get("length", 0)) - len(tokens)) if tokens else 0
    return Member(row | {"completion": shortened(row.get("completion", ""))}, tokens, left_out)


def colour_tokens(row: dict[str, Any]) -> list[Token]:
    """Return the recorded tokens of a completion with their colours."""
    texts = list(row.get("tokens") or [])
    if texts and not texts[-1] and row.get("stopped"):
        texts[-1] = "∎"  # the end token
    names = [name for name in TOKEN_NUMBERS if len(row.get(name) or []) == len(texts)]
    columns = {name: row[name] for name in names}
    known = [{name: own[i] for name, own in columns.items() if own[i] is not None} for i in range(len(texts))]
    return [colour_token(str(text), own) for text, own in list(zip(texts, known, strict=True))[:TOKENS]]


def colour_token(text: str, known: dict[str, float]) -> Token:
    """Return a token with its colours.

    --s is surprise, --e entropy, --u and --d the ratio above and below 1, --cu and --cd clipped there, --k the distance
    from the reference.
    """
    colours, told = {}, []
    if "logprobs" in known:
        colours["s"] = -known["logprobs"] / SURPRISE
        told.append(f"p {math.exp(known['logprobs']):.3f}, surprise {-known['logprobs']:.2f}")
    if "entropy" in known:
        colours["e"] = known["entropy"] / ENTROPY
        told.append(f"entropy {known['entropy']:.2f}")
    sampled, old = known.get("logprobs"), known.get("old_logprobs")
    policy = known.get("policy_logprobs", old)
    sampled = sampled if old is None or policy is old else old
    if policy is not None and sampled is not None:
        change = policy - sampled
        colours["u" if change > 0 else "d"] = abs(change) / RATIO
        told.append(f"ratio {math.exp(min(99.0, change)):.4f}")
    if known.get("clipped"):
        colours["cu" if known["clipped"] > 0 else "cd"] = 1.0
        told.append("clipped")
    if policy is not None and "ref_logprobs" in known:
        change = policy - known["ref_logprobs"]
        colours["k"] = abs(change) / DRIFT
        told.append(f"over reference {math.exp(min(99.0, change)):.3f}")
    style = ";".join(f"--{name}:{min(1.0, value):.2f}" for name, value in colours.items() if value >= 0.005)
    return Token(text, style, ", ".join(told))


def chosen_samples(samples: Rows) -> Rows:
    """Return the first and the last completions that stand for their group, SHOWN at most."""
    half = SHOWN // 2
    alone = [row for row in samples if not row.get("member")]
    kept = alone if len(alone) <= SHOWN else alone[:half] + alone[-half:]
    return [
        row | {"prompt": prompt_text(row.get("prompt", "")), "completion": shortened(row.get("completion", ""))}
        for row in kept
    ]


# The page


def files_of(folder: Path) -> list[str]:
    """Return what a run folder has of FILES, folders with a slash."""
    return [name + "/" * (folder / name).is_dir() for name in FILES if (folder / name).exists()]


def command_of(folder: Path) -> str:
    """Return the command that started a run; '' if it is not on file."""
    path = folder / "command.txt"
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""


def colourings(groups: list[Group]) -> dict[str, str]:
    """Return the colourings that the recorded tokens have numbers for: {id: label}."""
    titles = {token.title for group in groups for member in group.members for token in member.tokens}
    found = {"advantage": "advantage"} if groups else {}
    return found | {name: label for name, (label, word) in COLOURINGS.items() if any(word in one for one in titles)}


def number_text(value: Any) -> str:
    """Return a score as people read it; '-' for none."""
    return f"{value:+.3g}".removeprefix("+") if isinstance(value, int | float) else "-"


def render(
    history: History, summary: dict[str, Any], verdict: Verdict, images: dict[str, str], notes: list[str]
) -> str:
    """Render the page; everything from the run is escaped but the SVG pictures, whose makers escape it."""
    import jinja2  # takes a while to import
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number_text
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    groups = chosen_groups(history.samples)
    return template.render(
        name=history.folder.absolute().name,
        summary=summary,
        verdict=verdict,
        images={name: Markup(image) for name, image in images.items()},
        notes=notes,
        groups=groups,
        colourings=colourings(groups),
        samples=chosen_samples(history.samples),
        settings=history.settings,
        command=command_of(history.folder),
        files=files_of(history.folder),
    )
