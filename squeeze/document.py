"""A recipe's YAML as values that remember where they were written, and the faults found in them so far.

YAML is read as its nodes, so that each value keeps its line, and scalars follow YAML 1.2 (`no` is text and `1e-4` a number, unlike
in PyYAML's YAML 1.1). Nothing is ever constructed: tags that could run code are faults, and so are files, depths and alias
expansions far above any real recipe. Rejected: `yaml.safe_load` (it forgets lines, keeps the last of two equal keys and turns the
label `no` into false).
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from squeeze.errors import RecipeError, nearest

MAX_BYTES = 1_000_000

MAX_VALUES = 10_000
"""Values in a recipe once its aliases are written out: far above any real one, far below what fills a memory."""

MAX_DEPTH = 50

MAX_DIGITS = 100

MAX_SHOWN = 60
"""Characters of a wrong value that a message repeats."""

Place = tuple[str | int, ...]
"""Where a value stands: ("stages", 0, "scheme")."""


@dataclass(frozen=True)
class Spot:
    """Where a value was written, `recipes/x.yaml:12` or `--set data.path`. Faults are listed by `line`."""

    line: int
    text: str


@dataclass
class Document:
    """A recipe while it is read: its value, the spot of each value in it, and the faults found so far."""

    name: str
    value: Any = None
    spots: dict[Place, Spot] = field(default_factory=dict)
    faults: list[tuple[int, str]] = field(default_factory=list)
    unread: set[Place] = field(default_factory=set)
    values: int = 0

    def in_file(self, node: Any) -> Spot:
        """The spot of a node of the file."""
        line = node.start_mark.line + 1
        return Spot(line, f"{self.name}:{line}")

    def spot(self, place: Place) -> Spot:
        """The spot of a value, or of the nearest one around it that was written."""
        while place not in self.spots:
            place = place[:-1]
        return self.spots[place]

    def fault(self, place: Place, text: str, spot: Spot | None = None) -> None:
        """Note a fault as `recipes/x.yaml:12 stages[0].sparsity = 1.4 is …`; an override is its own place."""
        spot = spot or self.spot(place)
        if spot.text == f"--set {'.'.join(map(str, place))}":
            where = spot.text
        else:
            where = f"{spot.text}{':' if spot.line >= MAX_BYTES else ''} {dotted(place)}".rstrip()
        self.faults.append((spot.line, f"{where} {text}"))

    def unreadable(self, place: Place, text: str) -> None:
        """Note a fault of a value that has no meaning, so that nothing more is said about it."""
        self.fault(place, text)
        self.unread.add(place)


WORD = re.compile(r"[\w-]+\Z")

TAG = "tag:yaml.org,2002:"

SCALARS = {
    "null": re.compile(r"(~|null|Null|NULL|)\Z"),
    "bool": re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(r"[-+]?[0-9]+\Z"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z"),
}
"""What an unquoted scalar is, first match first; all else is text. YAML 1.2's core schema less octal and infinity."""


class _Loader(yaml.SafeLoader):
    """Composes nodes and constructs nothing. None is PyYAML's key for "whatever the first character is"."""

    yaml_implicit_resolvers = {None: [(f"{TAG}{kind}", pattern) for kind, pattern in SCALARS.items()]}  # noqa: RUF012


def read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        siblings = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise RecipeError(f"{path} does not exist. {nearest(str(path), siblings)}") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path} is over 1 MB. A recipe is a page of settings: is this a data file?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line} is not UTF-8 text. Save the recipe as UTF-8.") from error


def file_value(document: Document, text: str) -> Any:
    """The recipe's values. RecipeError at once where the text is not YAML, for then nothing else can be said."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = mark.line + 1 if mark else text.count("\n", 0, getattr(error, "position", 0)) + 1
        raise RecipeError(f"{document.name}:{line} is not YAML: {_syntax_fault(error)}.") from error
    if not isinstance(root, yaml.MappingNode):
        seen = "empty" if root is None else "not a mapping"
        raise RecipeError(f"{document.name}:1 the recipe is {seen}. It begins with a line such as `name: my-recipe`.")
    document.spots[()] = document.in_file(root)
    return _plain(document, root, (), None)


def _syntax_fault(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return f"{getattr(error, 'context', None) or ''} {problem}".strip()


def _plain(document: Document, node: Any, place: Place, override: Spot | None) -> Any:
    """The value of a node; notes its spot and those of all inside it. `override` is the spot of a `--set`."""
    document.spots.setdefault(place, override or document.in_file(node))
    document.values += 1
    if document.values > MAX_VALUES or len(place) > MAX_DEPTH:
        limit = f"{MAX_VALUES} values" if document.values > MAX_VALUES else f"{MAX_DEPTH} levels"
        raise RecipeError(f"{document.spot(place).text} the recipe has over {limit} once its aliases are written out.")
    if isinstance(node, yaml.MappingNode) and node.tag == f"{TAG}map":
        return _mapping(document, node, place, override)
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{TAG}seq":
        return [_plain(document, child, (*place, number), override) for number, child in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and node.tag == f"{TAG}str":
        return str(node.value)
    if isinstance(node, yaml.ScalarNode) and node.tag.removeprefix(TAG) in SCALARS:
        return _scalar(document, node, place)
    document.unreadable(
        place, f"has the tag {shown(node.tag)}. A recipe holds plain values; tags can run code. Drop it."
    )
    return None


def _mapping(document: Document, node: Any, place: Place, override: Spot | None) -> dict[str, Any]:
    """Keys are text as written: `no: 0` is the label "no". A key's line is its value's too."""
    mapping: dict[str, Any] = {}
    for key, child in node.value:
        spot = override or document.in_file(key)
        if not isinstance(key, yaml.ScalarNode):
            document.fault(place, "has a list or a mapping for a key. Keys are single words.", spot)
            continue
        inside = (*place, str(key.value))
        if key.value in mapping:
            document.fault(inside, f"is set a second time, after {document.spot(inside).text}. Keep one.", spot)
            continue
        document.spots[inside] = spot
        mapping[key.value] = _plain(document, child, inside, override)
    return mapping


def _scalar(document: Document, node: Any, place: Place) -> int | float | bool | None:
    kind, text = node.tag.removeprefix(TAG), str(node.value)
    if not SCALARS[kind].match(text):
        document.unreadable(place, f"= {shown(text)} is tagged !!{kind} but is none. Drop the tag.")
    elif kind == "bool":
        return text.lower() == "true"
    elif kind == "int" and len(text) <= MAX_DIGITS:
        return int(text)
    elif kind == "float" and math.isfinite(float(text)):
        return float(text)
    elif kind != "null":
        document.unreadable(place, f"= {shown(text)} is too large a number.")
    return None


def apply_override(document: Document, override: str, number: int) -> None:
    """Set one value as `path=value` says, the value read as YAML. An unknown key is left for validation to find."""
    dotted, equals, text = override.partition("=")
    keys = re.sub(r"\[(\d+)\]", r".\1", dotted.strip()).split(".")
    spot = Spot(MAX_BYTES + number, f"--set {'.'.join(keys)}")
    if not equals or not all(keys):
        document.fault(
            (), "is not path=value. Write it as --set data.splits.evaluate=20.", Spot(spot.line, f"--set {override}")
        )
        return
    try:
        node = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        document.fault((), f"= {shown(text)} is not YAML: {_syntax_fault(error)}. Quote it.", spot)
        return
    target = document.value
    place: Place = ()
    last: str | int = ""
    for key in keys:
        step = _step(target, key)
        if step is None:
            held = f"has {len(target)} entr{'y' if len(target) == 1 else 'ies'}" if isinstance(target, list) else None
            seen = held or f"= {shown(target)} holds no settings"
            document.fault(place, f"{seen}, so there is no {shown(key)} in it.", Spot(spot.line, f"--set {dotted}"))
            return
        place, last = (*place, step), step
        if len(place) < len(keys):
            if isinstance(target, dict) and target.get(key) is None:
                target[key], document.spots[place] = {}, spot
            target = target[step]
    for inside in [inside for inside in document.spots if inside[: len(place)] == place]:
        del document.spots[inside]
    document.spots[place] = spot
    target[last] = None if node is None else _plain(document, node, place, spot)


def _step(target: Any, key: str) -> str | int | None:
    """The key or number under which `key` lies in a mapping or list; None where neither can have it."""
    if isinstance(target, dict):
        return key
    if isinstance(target, list) and key.isdecimal() and int(key) < len(target):
        return int(key)
    return None


def dotted(place: Place) -> str:
    """`stages[0].scheme`; a key that is not a plain word is quoted, so that it cannot pass for something else."""
    words = (
        f"[{step}]" if isinstance(step, int) else f".{step if WORD.match(step) else shown(step)}" for step in place
    )
    return "".join(words).removeprefix(".")


def shown(value: Any) -> str:
    """A value as the reader wrote it, control characters escaped and cut at MAX_SHOWN characters."""
    text = (
        {True: "true", False: "false"}[value] if isinstance(value, bool) else "null" if value is None else repr(value)
    )
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
