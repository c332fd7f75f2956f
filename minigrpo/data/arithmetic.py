"""builtin:arithmetic: generated word problems of one to three operations, train and test disjoint."""

import random
import zlib
from collections.abc import Callable

NAMES = (
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Farid",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Leo",
    "Maria",
    "Noah",
)
THINGS = ("apples", "books", "cards", "coins", "marbles", "pencils", "shells", "stamps", "stickers", "tickets")
PLACES = ("shop", "school", "market", "library", "museum", "garden")
TEST_SHARE = 10
"""One problem in this many, chosen by a hash of its text, is a test problem and never a training problem."""

SFT_START = 1_000_000
"""Number of the first problem used for warm starts: GRPO's training problems are others."""

LARGEST = 50
"""Largest starting number."""

LARGEST_CHANGE = 30
"""Most that one sentence adds or takes away."""

LARGEST_FACTOR = 4
"""A total of at most half of LARGEST may be multiplied by up to this."""

SYSTEM_PROMPT = ""
"""None: the built-in model was warmed up without one."""

Step = tuple[int, str, str]
"""The new total, a sentence of the problem, and the calculation that solves it."""


def another(rng: random.Random, name: str) -> str:
    """Draw a name other than `name`."""
    return rng.choice([other for other in NAMES if other != name])


def gain(rng: random.Random, total: int, name: str, thing: str) -> Step:
    """Draw a step that adds to the total."""
    n = rng.randint(2, LARGEST_CHANGE)
    sentence = rng.choice(
        (
            f"{name} gets {n} more {thing}.",
            f"Then {name} buys {n} {thing}.",
            f"{another(rng, name)} gives {name} {n} {thing}.",
            f"At the {rng.choice(PLACES)}, {name} finds {n} {thing}.",
        )
    )
    return total + n, sentence, f"{total} + {n}"


def loss(rng: random.Random, total: int, name: str, thing: str) -> Step:
    """Draw a step that subtracts from the total."""
    n = rng.randint(1, min(total, LARGEST_CHANGE))
    sentence = rng.choice(
        (
            f"{name} loses {n} {thing}.",
            f"Then {name} sells {n} {thing}.",
            f"{name} gives {n} {thing} to {another(rng, name)}.",
            f"{name} leaves {n} {thing} at the {rng.choice(PLACES)}.",
        )
    )
    return total - n, sentence, f"{total} - {n}"


def multiply(rng: random.Random, total: int, name: str, thing: str) -> Step:
    """Draw a step that multiplies the total."""
    n = rng.randint(2, LARGEST_FACTOR)
    sentence = rng.choice(
        (
            f"{name} then collects until there are {n} times as many {thing}.",
            f"A magic box turns every one of the {thing} into {n}.",
        )
    )
    return total * n, sentence, f"{total} * {n}"


def choose_step(rng: random.Random, total: int) -> Callable[..., Step]:
    """Draw the kind of the next step among those that keep the total within bounds."""
    allowed = [gain] + [loss] * (total > 1) + [multiply] * (2 <= total <= LARGEST // 2)
    return rng.choice(allowed)


def problem(rng: random.Random) -> dict[str, str]:
    """Draw one word problem: prompt, worked completion, and answer."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    total = rng.randint(2, LARGEST)
    sentences, lines = [f"{name} has {total} {thing}."], []
    for _ in range(rng.randint(1, 3)):
        after, sentence, calculation = choose_step(rng, total)(rng, total, name, thing)
        sentences.append(sentence)
        lines.append(f"{calculation} = {after}")
        total = after
    question = rng.choice((f"How many {thing} does {name} have now?", f"How many {thing} are there in the end?"))
    return {
        "prompt": " ".join(sentences + [question]),
        "completion": format_answer("\n".join(lines), str(total)),
        "answer": str(total),
    }


def format_answer(reasoning: str, answer: str) -> str:
    """Write reasoning and answer in the format that the rewards check."""
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


def problems(split: str, count: int, start: int = 0) -> list[dict[str, str]]:
    """Return problems number `start` to `start + count` of "train" or "test"; each depends on its number alone."""
    return [numbered(split, index) for index in range(start, start + count)]


def numbered(split: str, index: int) -> dict[str, str]:
    """Return problem number `index` of a split; prompts are hashed into splits, so the two never share one."""
    rng = random.Random(f"{split} {index}")
    while True:
        row = problem(rng)
        if (zlib.crc32(row["prompt"].encode()) % TEST_SHARE == 0) == (split == "test"):
            return row
