"""Numbers and foreign names as plain text, the same in a terminal, on the page and in a pipe.

Numbers never pass through the locale: a report reads the same under a comma locale. Names come from models, files and
data sets, and some are hostile: escape sequences that recolour a terminal, marks that turn the reading direction so
that "gpj.exe" shows as "exe.jpg". `visible` shows such characters as codes. Rejected: dropping them (two different
names would look alike).
"""

import json
import math
import re
import unicodedata
from typing import Any

MINUS, THIN = "\u2212", "\u00a0"
"""A real minus sign, and the no-break space that keeps a number with its unit."""

JOINERS = "\u200c\u200d"
"""Invisible, but they shape Persian and Indic words and emoji, and do no harm."""

NUMBER = re.compile(r"(?<![\w-])\d[\d.,]*(e[-+]?\d+)?(?![\w-])")

UNENCODABLE = {
    "×": "x", "–": "-", "—": "-", "−": "-", "…": "...", "±": "+-", "→": "->", "≤": "<=", "≥": ">=", "·": "-", "✓": "ok",
    "✗": "x", "’": "'", "“": '"', "”": '"', "µ": "u", "\u00a0": " ",
}  # fmt: skip
"""Stand-ins for a terminal that is not UTF-8."""


def visible(text: str, *, lines: bool = False) -> str:
    """The text with every control, direction and unassigned character as its code (`\\x1b`, `\\u202e`).

    With `lines`, line breaks stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _harmless(c) or (lines and c == "\n") else _code(c) for c in text)


def wording(text: str) -> str:
    """The text with its numbers left out: what stays the same while a counter runs or a loss falls. Those in names stay ("1-quantize")."""
    return NUMBER.sub("#", text)


def encodable(text: str, encoding: str | None) -> str:
    """The text in characters that `encoding` has: stand-ins where there are good ones, codes for the rest."""
    encoding = encoding or "ascii"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(c if _fits(c, encoding) else UNENCODABLE.get(c) or _code(c) for c in text)
    return text


def figures(value: float, digits: int = 3) -> str:
    """`value` with so many significant digits, thousands separated, never with an exponent: 0.0123, 1.50, 1,234."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def amount(value: float, unit: str) -> str:
    """A measured value in the unit that fits its size: 12.3 ms, 538 MB, 139 tokens/s. Bytes are decimal."""
    steps = SCALES.get(unit)
    if steps is None or not math.isfinite(value):
        return f"{figures(value)}{THIN}{unit}" if unit else figures(value)
    scale, name = next((step for step in steps if abs(value) >= step[0]), steps[-1])
    return f"{figures(value / scale)}{THIN}{name}"


def times(value: float) -> str:
    """A ratio: 2.72×, 12.3×, 140×."""
    return f"{value:.2f}×" if value < 10 else f"{figures(value)}×"


def percent(share: float, decimals: int) -> str:
    """A share of 1 as 12.3 %, with a real minus sign and no negative zero."""
    rounded = round(100 * share, decimals) + 0.0
    return f"{rounded:.{decimals}f}{THIN}%".replace("-", MINUS)


def decimals_for(share: float) -> int:
    """Decimals that show two significant digits of a share in percent, one at least and three at most."""
    if not math.isfinite(share) or share == 0:
        return 2
    return min(3, max(1, 1 - math.floor(math.log10(abs(100 * share)))))


def count(number: int, noun: str, plural: str | None = None) -> str:
    """1 repeat, 3 repeats, 3,000 examples."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def json_text(content: Any, indent: int | None = None) -> str:
    """JSON that every parser and every encoding takes: ASCII, infinity and NaN as the strings that reports hold.

    `json.dumps` alone would write `Infinity`, which is not JSON, and a check with nothing to compare has that value.
    """
    separators = (",", ":") if indent is None else None
    return json.dumps(_finite(content), indent=indent, separators=separators, ensure_ascii=True, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return NOT_FINITE[str(content)]
    return content


NOT_FINITE = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}
"""As pydantic spells them, so that a report printed is a report that reads back."""


def _harmless(char: str) -> bool:
    return char.isprintable() or char in JOINERS or unicodedata.category(char) == "Zs"


def _code(char: str) -> str:
    """Its escape in Python's spelling, which is also what a person can search for."""
    return char.encode("unicode_escape").decode("ascii")


def _fits(char: str, encoding: str) -> bool:
    try:
        char.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


SCALES: dict[str, tuple[tuple[float, str], ...]] = {
    "s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")),
}
"""Largest first."""
