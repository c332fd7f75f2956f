"""The grader of rewards and of evaluation: finds a completion's final answer and compares it with the reference.

Work is bounded by the size of the text. A verdict depends on the two texts alone, never on time or load.
"""

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from minigrpo.data.symbolic import verdict

LONGEST = 20_000
"""Characters of a completion that are looked at, from its end, where the answer is."""

LONGEST_ANSWER = 400
"""Characters of the longest answer that is read as a number or cleaned of markup."""


# Finding the answer

BOXES = (r"\boxed", r"\fbox")
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
FRACTION = r"\\[dtc]?frac\s*(?:\{\s*(-?\d{1,40})\s*\}|(\d))\s*(?:\{\s*(-?\d{1,40})\s*\}|(\d))"
QUALIFIER = r"(?:(?:\bnot|n't|\bhalf of|\btwice|\b(?:less|more|fewer|greater|other) than|\bat (?:least|most))\s+)?"
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SCALE = "|".join(SCALES)
LAST_NUMBER = re.compile(
    QUALIFIER + r"(?:(?<![\w)}])-)?[$€£]?-?"
    r"(?:\d{0,40}\s?" + FRACTION + r"|(?:\d{1,40}\s)?\d{1,40}\s?/\s?\d{1,40}"
    r"|\d{1,3}(?:,\d{3}){1,13}(?!\d)(?:\.\d{1,40})?|\d{1,40}(?:\.\d{1,40})?|\.\d{1,40})"
    rf"(?:\s?%|\s(?:{SCALE})s?\b)?"
)
LAST_MATHS = re.compile(
    r"(?<!\\)\$(?=\S)([^$\n]{1,200})(?<![\s\\-])\$(?!\d)|\\\((.{1,200}?)\\\)|\\\[([^\[\]]{1,200})\\\]"
)


def tail(text: str) -> str:
    """Return the last LONGEST characters, the only ones that are graded."""
    return text[-LONGEST:]


def between(text: str, opening: str, closing: str) -> str | None:
    """Return the text from the last `opening` to the first `closing` after it."""
    _, found, rest = tail(text).rpartition(opening)
    inside, closed, _ = rest.partition(closing)
    return inside.strip() if found and closed else None


def closing_brace(text: str) -> int:
    """Return the place of the brace that closes one opened before `text`, or -1."""
    depth = 1
    for place, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return place
    return -1


def boxed(text: str) -> str | None:
    r"""Return the content of the last \boxed{...}, braces balanced.

    >>> boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    text = tail(text)
    found = BOX.match(text, max(0, *map(text.rfind, BOXES)))
    inside = text[found.end() :] if found else ""
    end = closing_brace(inside)
    return inside[:end].strip() if end >= 0 else None


def after_hashes(text: str) -> str | None:
    """Return the line after the last ####, unless that is a heading with a box further down."""
    _, marked, after = tail(text).rpartition("####")
    lines = after.strip().splitlines()
    return lines[0].strip() if marked and lines and boxed("\n".join(lines[1:])) is None else None


def marked_answer(text: str) -> str | None:
    """Return the answer inside <answer> tags, after ####, or in a box; None when nothing marks one."""
    for answer in (between(text, "<answer>", "</answer>"), after_hashes(text)):
        if answer is not None:
            return answer
    return boxed(text)


def last_expression(text: str) -> str | None:
    r"""Return the text's last number or fraction, or the last $...$ or \(...\) with a digit that ends after it."""
    text = tail(text)
    last_digit = max(map(text.rfind, "0123456789"))
    text = plain_signs(text[max(0, last_digit - LONGEST_ANSWER) : last_digit + LONGEST_ANSWER // 4]).replace("{,}", ",")
    number = max(LAST_NUMBER.finditer(text), key=re.Match.end, default=None)
    maths = max(LAST_MATHS.finditer(text), key=re.Match.end, default=None)
    if maths and number and maths.start() <= number.start() < number.end() <= maths.end():
        return next(group for group in maths.groups() if group is not None)
    return number[0] if number else None


def extract_answer(text: str) -> str | None:
    r"""Return the final answer: inside <answer> tags, after ####, in \boxed{}, or the last number or expression.

    >>> extract_answer("<answer>\n42\n</answer>"), extract_answer("It is 6 * 7.\n#### 42"), extract_answer("about 42.")
    ('42', '42', '42')
    """
    marked = marked_answer(text)
    return last_expression(text) if marked is None else marked


Extract = Callable[[str], str | None]
"""How a final answer is found: `extract_answer`, or `marked_answer` to be strict about its form."""


# Cleaning it

SIGNS = dict.fromkeys("\u2212\u2013\u2010\u2011\u2012\ufe63\uff0d", "-")
SIGNS |= dict.fromkeys("\u00a0\u2007\u2009\u200a\u202f\u3000", " ") | dict.fromkeys("\u200b\ufeff", "")
SIGNS |= {"\uff0b": "+", "\uff04": "$", "\uff05": "%", "\uff0c": ",", "\u2044": "/", "\u2215": "/", "\u2019": "'"}
SIGNS |= {chr(0xFF10 + digit): str(digit) for digit in range(10)}
SIGNS |= {"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "⅛": " 1/8", "⅕": " 1/5"}
SIGNS |= {"²": "^2", "³": "^3", "\u00d7": r"\times ", "÷": r"\div ", "·": r"\cdot ", "°": " degrees "}
SIGNS |= {"π": r"\pi ", "√": r"\sqrt ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∞": r"\infty "}
SPELLINGS = str.maketrans(SIGNS)

WRAPPED = r"(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|operatorname|boldsymbol|bm|emph)"
CLEANING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"<\|\w+\|>|</?(?:s|b|i|u|em|strong)>", ""),  # end tokens and HTML
        (r"^#+\s*", ""),
        (r"(?<!\\)\\[()\[\]]", ""),
        (r"(?<!\\)\$\$([^$]+)\$\$", r"\1"),
        (r"(?<!\\)\$(?=\S)([^$]+?)(?<![\s\\-])\$(?!\d)", r"\1"),
        (r"(?<![\w*)])(\*{1,3}|__|`{1,3})(?=\S)([^*`]+?)(?<=\S)\1(?![\w*(])", r"\2"),
        (r"\{,\}", ","),
        (r"\\!|\\displaystyle\b|\\left(?![a-z])|\\right(?![a-z])", ""),
        (r"\\[,;: ]|~|\\q?quad\b", " "),
        (r"\\([$%#&€£])", r"\1"),
        (r"\^\s*(?:\\circ\b|\{\s*\\circ\s*\})|\\degrees?\b", " degrees "),
        (r"\\[dtc]frac", r"\\frac"),
        (rf"\\{WRAPPED}\s*\{{([^{{}}]*)\}}", r"\1"),
        (r"\\frac\{([A-Za-z]+)\}\{([A-Za-z]+)\}(?=\s*$)", r"\1/\2"),
        (r"^(?:\{(.*)\}|\(([^(),]*)\)|\"(.*)\"|'(.*)')$", r"\1\2\3\4"),
    )
]


def plain_signs(text: str) -> str:
    """Replace typographic signs by plain ones."""
    return text.translate(SPELLINGS)


def clean(text: str) -> str:
    r"""Remove Markdown, LaTeX text commands and spacing, typographic signs and final points.

    >>> clean(r"**\(18\text{ dollars}\)**."), clean(r"\boxed{1{,}000}")
    ('18 dollars', '1,000')
    """
    if len(text) > LONGEST_ANSWER:
        return text.strip()
    inside = boxed(text)
    plain = plain_signs(text if inside is None else inside)
    for _ in range(2):  # one wrapping may hide another
        plain = plain.strip().rstrip(".,;:").strip()
        for pattern, replacement in CLEANING:
            plain = pattern.sub(replacement, plain)
    return " ".join(plain.split()).rstrip(".,;:")


# Reading what it states

CHANGES = frozenset(
    "not no never cannot isn't aren't wasn't can't neither nor or and wrong incorrect false than least most "
    "half halves halved doubled tripled thirds fifths tenths hundredths thousandths ths double twice squared "
    "cubed root sqrt factorial pi log ln sin cos tan exp abs mod modulo choose divided multiplied plus minus except "
    "but unless without almost nearly between unequal".split()
)
"""Words that make of a number beside them another value, several or none."""

STATES = (
    r"(?:is|are|was|were|be|equals?|equal|have|has|had|makes?|made|gets?|earns?|earned|costs?|pays?|paid|needs?|spends?|"
    r"spent|sold|left|answer|total|result|approximately|about|around|roughly|exactly|only|just|"
    r"(?:equal|comes?|amounts?|adds(?: up)?|rounds?|works out|simplifies|reduces) to)"
)
LEAD = re.compile(rf"(?:[A-Za-z][A-Za-z']*[\s,]+){{0,15}}?(?:{STATES}\b(?!\s*[-+*/^=(_])|[A-Za-z']+\s*:)\s*:?\s*(?=\S)")
APPROXIMATE = re.compile(r"^(?:≈|~|\\approx|=|:)\s*")
SIDE = re.compile(
    r"(?!\\?(?:log|ln|sin|cos|tan|exp|sqrt|abs|min|max)\b)"
    r"(?:[A-Za-z][a-z]*\s+){0,8}\\?[A-Za-z]+'*(?:\s*_(?:\w+|\{\w+\}))?(?:\s?\([\w,+\s-]*\))?|"
    r"(?:\\times|\\cdot|\\div|[\d\s+*/().,$-])+|m?\s?\\(?:angle|triangle|overline)\s?\{?\s?[A-Z]+\}?|\|[A-Z]+\|"
)
"""A side of an equation that only names the other: x, f(2), Total cost, 6*7; not 2x."""


def words(text: str) -> list[str]:
    """Split text into lowercase words."""
    return re.findall(r"[a-z][a-z']*", text.lower())


def without_lead(text: str) -> str:
    """Drop words that introduce the answer, such as "The answer is" and "Total:", if none of them changes it."""
    found = LEAD.match(text)
    if found is None or not CHANGES.isdisjoint(words(found[0])) or found[0].count(" ") > 16:
        return text
    return text[found.end() :]


def without_name(text: str) -> str:
    """Return the last side of an equation whose other sides only name it: 5 of "x = 5" and of "2 + 3 = 5"."""
    *names, last = re.split(r"(?<![<>!=])=(?!=)", text)
    named = all(SIDE.fullmatch(name.strip()) and CHANGES.isdisjoint(words(name)) for name in names)
    return last.strip() if named and last.strip() else text


def stated(text: str) -> str:
    """Return the answer by itself, cleaned, without words or a name that introduce it."""
    plain = clean(text)
    for _ in range(3 if len(plain) <= LONGEST_ANSWER else 0):
        plain = without_name(without_lead(APPROXIMATE.sub("", plain)))
    return plain


MONEY = r"(?:(?:US|CA|AU|NZ|HK|A|C|S)?\$|€|£|¥|₹|₩|USD|EUR|GBP|INR|JPY|CNY|RMB|Rs\.?)"
DIGITS = (
    r"(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d\d)+,\d{3}|\d{1,3}(?: \d{3})+|\d{1,3}(?:'\d{3})+|\d{1,3}(?:_\d{3})+|"
    r"\d{1,3}(?:\.\d{3}){2,}|\d+)(?![\d,_']\d)"
)
NUMBER = re.compile(
    rf"(?P<sign>[+-]?|negative|minus)\s*{MONEY}?\s*(?P<second>-?)"
    rf"(?:(?P<mixed>\d+)\s+(?P<above>\d+)\s*/\s*(?P<below>\d+)|(?P<over>\d+)\s*/\s*(?P<under>\d+)|"
    rf"(?P<whole>{DIGITS})(?P<decimals>\.\d*)?|(?P<part>\.\d+))(?!\d)"
    r"(?:[eE](?P<power>[+-]?\d{1,3})(?![\d.])|\s*(?:\\times|\\cdot|\*|x)\s*10\s?\^\s?\{?\s?(?P<tens>[+-]?\d{1,3})\s?\}?)?"
)
UNIT = r"\s*/?\s*[A-Za-zµΩ](?:[A-Za-zµΩ.'/*,\s-]|\^\s?\{?-?\d\}?|\\cdot)*+"
REST = re.compile(
    rf"(?P<scale>\s(?:{SCALE})s?\b|[kKM](?![\w/^])|\s?bn\b)?\s*(?P<percent>%|percent\b|per\s?cent\b)?\s*(?:{MONEY}|¢)?"
    rf"(?P<unit>{UNIT})?\s*(?:\((?P<gloss>[A-Za-z\s.,'-]*)\))?[\s.,;]*"
)
SHORT_SCALES = {"k": 10**3, "K": 10**3, "M": 10**6, "bn": 10**9}
LETTERS = frozenset("m g s h l L N J W V A C F K Ω µ".split())
SHORT = frozenset(
    "kg mg lb lbs oz km cm mm nm ft in yd mi ml mL kL dL cL cc hr hrs min mins sec secs ms am pm mph kph rpm kW kJ Hz "
    "Pa kPa kcal cal mol deg rad sq pts pt gal cups GB MB TB kB KB ha kmh cts bit px ppm st nd rd th".split()
)
LITTLE = frozenset("of in is as a an on at by to we it he my so per for pm am i".split())


@dataclass(frozen=True)
class Stated:
    """A number as an answer states it."""

    value: Fraction
    percent: bool
    decimal: bool
    """Written with a decimal point, so perhaps rounded."""


def is_unit(text: str) -> bool:
    """Tell if the text after a number is a unit or words that leave it as it is; not a factor like x or 2pi's pi."""
    if not CHANGES.isdisjoint(words(text)) or not set(SCALES).isdisjoint(words(text)):
        return False
    names = re.findall(r"([A-Za-zµΩ']+)(\.?\s?\^)?", text)
    return all(is_word(name, bool(power), place, text[:1]) for place, (name, power) in enumerate(names))


def is_word(name: str, power: bool, place: int, start: str) -> bool:
    """Tell if a run of letters after a number is a word or a unit rather than variables."""
    known = name in LETTERS or name in SHORT or len(name) >= 4
    if known or power or (place == 0 and start != "/" and not start.isspace()):
        return known
    return name.lower() in LITTLE or len(name) == 3


def magnitude(found: re.Match[str]) -> Fraction:
    """Return the unsigned value of a NUMBER."""
    if found["over"]:
        return Fraction(int(found["over"]), int(found["under"]))
    if found["mixed"]:
        return int(found["mixed"]) + Fraction(int(found["above"]), int(found["below"]))
    whole, decimals = re.sub(r"\D", "", found["whole"] or ""), found["decimals"] or found["part"] or ""
    return Fraction(f"{whole or 0}{decimals.rstrip('.')}")


def read_number(text: str) -> Stated | None:
    """Return the number that an answer states, None for an expression or anything that is not one number."""
    plain = re.sub(FRACTION, r" \1\2/\3\4", stated(text)) if len(text) <= LONGEST_ANSWER else ""
    found = NUMBER.match(plain.strip())
    rest = REST.fullmatch(plain.strip()[found.end() :]) if found else None
    if not found or not rest or int(found["under"] or found["below"] or 1) == 0:
        return None
    if (rest["unit"] and not is_unit(rest["unit"])) or not CHANGES.isdisjoint(words(rest["gloss"] or "")):
        return None
    sign = -1 if found["sign"] in ("-", "negative", "minus") or found["second"] else 1
    scale = (rest["scale"] or "").strip().removesuffix("s")
    factor = sign * (SCALES | SHORT_SCALES).get(scale, 1) * Fraction(10) ** int(found["power"] or found["tens"] or 0)
    return Stated(magnitude(found) * factor, bool(rest["percent"]), "." in found[0])


def as_number(text: str) -> Fraction | None:
    r"""Return the number that an answer states beside a sign of money, %, units or \boxed{}; None for an expression.

    >>> as_number("$1,234.50"), as_number("72 clips"), as_number(r"\boxed{18}."), as_number("1/3"), as_number("3x")
    (Fraction(2469, 2), Fraction(72, 1), Fraction(18, 1), Fraction(1, 3), None)
    """
    number = read_number(text)
    return number.value if number else None


# Comparing

ROUNDED = 6
"""Decimals to which a written decimal and a fraction that has no end must agree, as in the math-verify library."""


def same_value(given: Fraction, wanted: Fraction, decimal: bool) -> bool:
    """Tell if two fractions are equal, endless decimals rounded."""
    endless = any(pow(10, 2000, number.denominator) for number in (given, wanted))
    return given == wanted or (decimal and endless and round(given, ROUNDED) == round(wanted, ROUNDED))


def same_number(given: Stated, wanted: Stated) -> bool:
    """Tell if two numbers are equal; beside a plain number, 50% may mean 50 or 0.5."""
    decimal = given.decimal or wanted.decimal
    if given.percent == wanted.percent or same_value(given.value, wanted.value, decimal):
        return same_value(given.value, wanted.value, decimal)
    values = [number.value / (100 if number.percent else 1) for number in (given, wanted)]
    return same_value(values[0], values[1], decimal)


def plain_text(text: str) -> str:
    """Return the answer in lower case, without spaces that separate no words."""
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", stated(text).lower())


FUNCTIONS = frozenset(
    "sqrt sinh cosh tanh arcsin arccos arctan frac log exp abs infty matrix pmatrix bmatrix vmatrix cases array begin "
    "end and or sin cos tan cot sec csc ln pi gcd lcm mod".split()
)
UNITS_AFTER = re.compile(r"(?<=\S)(?:\s+[A-Za-z]{3,})+(?:\s*\^\s*\{?\d\}?)?$")


def as_expression(text: str) -> str | None:
    """Return the answer as mathematics for the library; None for prose, whose letters it would multiply."""
    plain = stated(text)
    unit = UNITS_AFTER.search(plain)
    if unit and is_unit(unit[0]) and re.search(r"\\|\d", plain[: unit.start()]):
        plain = plain[: unit.start()]
    prose = any(len(word) > 3 or word.lower() in CHANGES for word in variables(plain))
    return None if prose or re.search(r"\d[' ]\d", plain) else re.sub(r"(?<=[\w)])\*\*(?=[\w(])", "^", plain)


def variables(text: str) -> list[str]:
    """Return the runs of letters that are no LaTeX command or name of a function."""
    found = re.findall(r"[A-Za-z]+", re.sub(r"\\[A-Za-z]+", " ", text))
    return [word for word in found if word.lower() not in FUNCTIONS]


class Undecided:
    """Count of comparisons left undecided since it was last asked for."""

    def __init__(self) -> None:
        self.count, self.lock = 0, threading.Lock()

    def add(self) -> None:
        """Count one comparison."""
        with self.lock:
            self.count += 1

    def take(self) -> int:
        """Return the count and reset it to 0."""
        with self.lock:
            count, self.count = self.count, 0
        return count


UNDECIDED = Undecided()


def take_undecided() -> int:
    """Return how many comparisons were left undecided, and so counted as wrong, since this was last asked."""
    return UNDECIDED.take()


def math_equal(given: str, wanted: str) -> bool:
    r"""Tell if two expressions mean the same, by math-verify: \sqrt{8} and 2\sqrt{2}, (x+1)^2 and x^2+2x+1."""
    answer = verdict(given, wanted)
    if answer == "undecided":
        UNDECIDED.add()
    return answer == "true"


def comparable(given: str, wanted: str, number: bool) -> bool:
    """Tell if the library can be trusted with two expressions; `number` tells if one of them is a number.

    It would take 10 for equal to the equation 2x = 10, and 5 to 5 ab, of which it takes the letters for a unit.
    """
    if number:
        return set(variables(given) + variables(wanted)) <= {"e", "i"} and "=" not in given + wanted
    sides = [re.sub(r"_\{[^{}]*\}", "", text) for text in (given, wanted)]  # without the k=1 of a sum
    single = ["=" in side and not re.search(r",|\b(?:or|and)\b|[<>!]=", side) for side in sides]
    return single[0] == single[1]


def equal_answers(given: str, wanted: str) -> bool:
    """Tell if two answers are equal as numbers if both are, else as text, else as mathematics."""
    numbers = read_number(given), read_number(wanted)
    if numbers[0] and numbers[1]:
        return same_number(numbers[0], numbers[1])
    if plain_text(given) == plain_text(wanted):
        return True
    expressions = as_expression(given), as_expression(wanted)
    given, wanted = expressions[0] or "", expressions[1] or ""
    if not given or not wanted or not comparable(given, wanted, any(numbers)):
        return False
    return math_equal(given, wanted)


def reference_answer(reference: str) -> str:
    """Return the marked answer of a reference, or all of it if none is marked."""
    marked = marked_answer(reference)
    return reference if marked is None else marked


def same_answer(completion: str, reference: str, extract: Extract = extract_answer) -> bool:
    """Tell if the completion's final answer equals the reference."""
    given = extract(completion)
    return given is not None and given != "" and equal_answers(given, reference_answer(reference))


def most_common(texts: list[str]) -> str:
    """Return a completion with the answer that most of them give: the first of several, the first text if none does."""
    answers = [extract_answer(text) for text in texts]
    known: list[str] = []
    groups = [None if answer is None else group_of(answer, known) for answer in answers]
    return texts[max(range(len(texts)), key=lambda i: (groups[i] is not None, groups.count(groups[i]), -i))]


def group_of(answer: str, known: list[str]) -> int:
    """Return the place in `known` of an equal answer, appending this one where there is none."""
    place = next((place for place, other in enumerate(known) if equal_answers(answer, other)), len(known))
    if place == len(known):
        known.append(answer)
    return place
