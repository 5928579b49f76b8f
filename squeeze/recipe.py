"""Recipes: YAML in, one frozen and wholly checked Recipe out, or every fault at once with its line and its mend.

A recipe is plain values: text, numbers, true and false, lists and mappings. YAML is read as its nodes, so that each
value keeps the line it stands on, and scalars follow YAML 1.2 (`no` is text and `1e-4` a number, unlike in PyYAML's
YAML 1.1). Pydantic then finds what is wrong, and the last part of this file says it in words: line, value seen, nearest
name.

Rejected: `yaml.safe_load` (it forgets lines, keeps the last of two equal keys and turns the label `no` into false);
pydantic's strict mode (behind any `before` validator it refuses a list for a tuple), for which `_coerced` stands in;
includes and variables in recipes (what was run must be readable from one file).
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from squeeze.benchmark.workload import BenchSettings
from squeeze.compress import Stage
from squeeze.data import DataSettings
from squeeze.errors import RecipeError, nearest
from squeeze.exporter import ExportSettings
from squeeze.model import ModelSettings
from squeeze.provenance import Digest, digest_json
from squeeze.verification import VerifySettings

MAX_BYTES = 1_000_000
MAX_VALUES = 10_000
"""Values in a recipe once its aliases are written out: far above any real one, far below what fills a memory."""
MAX_DEPTH = 50
MAX_DIGITS = 100
MAX_SHOWN = 60
"""Characters of a wrong value that a message repeats."""

Place = tuple[str | int, ...]
"""Where a value stands: ("stages", 0, "scheme")."""


Settings = TypeVar("Settings", bound=BaseModel)


class Recipe(BaseModel):
    """A trained model, what is done to it, and what is exported, verified and measured; what is left out is not run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^\w[\w .-]*$", max_length=100)] = Field(
        description="what reports call this recipe: letters, digits, spaces, dots and dashes"
    )
    model: ModelSettings = Field(description="the trained model")
    data: DataSettings = Field(description="the texts it is measured on")
    task: Literal["causal-lm", "text-classification", "feature-extraction"] = Field(description="what the model is for")
    stages: tuple[Stage, ...] = Field(description="what is done to the weights, in this order; [] changes nothing")
    export: ExportSettings | None = Field(default=None, description="how ONNX is written; {} for the defaults")
    verify: VerifySettings | None = Field(default=None, description="how the export is checked; {} for the defaults")
    bench: BenchSettings | None = Field(default=None, description="what is measured, and how; {} for the defaults")
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of everything that is drawn at random")
    notes: tuple[str, ...] = Field(default=(), description="remarks that a reader of the report must know")

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        """What can never work is refused now and not after an hour."""
        for number, stage in enumerate(self.stages[:-1]):
            if stage.kind == "quantize":
                raise ValueError(
                    f"stages[{number}] (quantize) is not the last stage. It turns weights into integers, which later "
                    "stages cannot change: move it to the end."
                )
        if self.verify is not None and self.export is None:
            raise ValueError("verify checks an export, and there is none. Add a line `export: {}`, or drop verify.")
        return self


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, changed by overrides such as `data.splits.evaluate=20` or `stages.0.scheme=int8`.

    Relative paths in it (of a model or of data) are meant from the working directory, as on the command line, not from
    the recipe's own folder: a recipe then means the same wherever it lies, and `--set model.path=…` completes in a
    shell. Raises RecipeError with one line for every fault.
    """
    document = _Document(str(path))
    document.value = _file_value(document, _read_text(path))
    for number, override in enumerate(overrides):
        _override(document, override, number)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(document.value)
    except ValidationError as error:
        _explain(error, document)
    else:
        for place, given, used in _coerced(document.value, recipe.model_dump(mode="json")):
            document.fault(place, f"= {_shown(given)} is {_word(given)}, not {_word(used)}.")
    if document.faults or recipe is None:
        raise RecipeError("\n".join(text for _, text in sorted(set(document.faults))))
    return recipe


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Change plain settings by overrides such as `data.label_column=y`. Raises RecipeError with one line for every fault."""
    document = _Document("--set")
    document.value = content
    for number, override in enumerate(overrides):
        _override(document, override, number)
    if document.faults:
        raise RecipeError("\n".join(text for _, text in sorted(set(document.faults))))


def validated(kind: type[Settings], content: Any, where: str) -> Settings:
    """`content` as settings of this kind. Raises RecipeError naming every field that is wrong, and what was seen there."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        lines = [
            f"{_dotted((where, *f['loc']))} = {_shown(f['input'])}: {f['msg']}."
            for f in error.errors(include_url=False)
        ]
        raise RecipeError("\n".join(lines)) from error


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors that complete and check YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def recipe_digest(recipe: Recipe) -> Digest:
    """Digest of all settings, defaults included: it tells a run that was cut off from one of another recipe."""
    return digest_json(recipe.model_dump(mode="json"))


# Reading: text -> nodes -> plain values, each with its spot.


@dataclass(frozen=True)
class _Spot:
    """Where a value was written, `recipes/x.yaml:12` or `--set data.path`. Faults are listed by `line`."""

    line: int
    text: str


@dataclass
class _Document:
    """A recipe while it is read: its value, the spot of each value in it, and the faults found so far."""

    name: str
    value: Any = None
    spots: dict[Place, _Spot] = field(default_factory=dict)
    faults: list[tuple[int, str]] = field(default_factory=list)
    unread: set[Place] = field(default_factory=set)
    values: int = 0

    def in_file(self, node: Any) -> _Spot:
        """The spot of a node of the file."""
        line = node.start_mark.line + 1
        return _Spot(line, f"{self.name}:{line}")

    def spot(self, place: Place) -> _Spot:
        """The spot of a value, or of the nearest one around it that was written."""
        while place not in self.spots:
            place = place[:-1]
        return self.spots[place]

    def fault(self, place: Place, text: str, spot: _Spot | None = None) -> None:
        """Note a fault as `recipes/x.yaml:12 stages[0].sparsity = 1.4 is …`; an override is its own place."""
        spot = spot or self.spot(place)
        if spot.text == f"--set {'.'.join(map(str, place))}":
            where = spot.text
        else:
            where = f"{spot.text}{':' if spot.line >= MAX_BYTES else ''} {_dotted(place)}".rstrip()
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


def _read_text(path: Path) -> str:
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


def _file_value(document: _Document, text: str) -> Any:
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


def _plain(document: _Document, node: Any, place: Place, override: _Spot | None) -> Any:
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
        place, f"has the tag {_shown(node.tag)}. A recipe holds plain values; tags can run code. Drop it."
    )
    return None


def _mapping(document: _Document, node: Any, place: Place, override: _Spot | None) -> dict[str, Any]:
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


def _scalar(document: _Document, node: Any, place: Place) -> int | float | bool | None:
    kind, text = node.tag.removeprefix(TAG), str(node.value)
    if not SCALARS[kind].match(text):
        document.unreadable(place, f"= {_shown(text)} is tagged !!{kind} but is none. Drop the tag.")
    elif kind == "bool":
        return text.lower() == "true"
    elif kind == "int" and len(text) <= MAX_DIGITS:
        return int(text)
    elif kind == "float" and math.isfinite(float(text)):
        return float(text)
    elif kind != "null":
        document.unreadable(place, f"= {_shown(text)} is too large a number.")
    return None


def _override(document: _Document, override: str, number: int) -> None:
    """Set one value as `path=value` says, the value read as YAML. An unknown key is left for validation to find."""
    dotted, equals, text = override.partition("=")
    keys = re.sub(r"\[(\d+)\]", r".\1", dotted.strip()).split(".")
    spot = _Spot(MAX_BYTES + number, f"--set {'.'.join(keys)}")
    if not equals or not all(keys):
        document.fault(
            (), "is not path=value. Write it as --set data.splits.evaluate=20.", _Spot(spot.line, f"--set {override}")
        )
        return
    try:
        node = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        document.fault((), f"= {_shown(text)} is not YAML: {_syntax_fault(error)}. Quote it.", spot)
        return
    target = document.value
    place: Place = ()
    last: str | int = ""
    for key in keys:
        step = _step(target, key)
        if step is None:
            held = f"has {len(target)} entr{'y' if len(target) == 1 else 'ies'}" if isinstance(target, list) else None
            seen = held or f"= {_shown(target)} holds no settings"
            document.fault(place, f"{seen}, so there is no {_shown(key)} in it.", _Spot(spot.line, f"--set {dotted}"))
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


# Explaining: what pydantic found -> a line that says what, where and how to mend.


def _explain(error: ValidationError, document: _Document) -> None:
    """Note every fault once. Where a `kind` is wrong, the settings beside it cannot be judged and are passed over."""
    faults: dict[Place, list[ErrorDetails]] = {}
    for fault in error.errors(include_url=False):
        faults.setdefault(_place(fault, document.value), []).append(fault)
    wrong = [place for place, found in faults.items() if place[-1:] == ("kind",) and found[0]["type"] in KIND_FAULTS]
    for place, found in faults.items():
        is_judged = not any(place[: len(kind) - 1] == kind[:-1] and place != kind for kind in wrong)
        if is_judged and place not in document.unread:
            document.fault(place, _sentence(found, place, document.value))


def _place(fault: ErrorDetails, value: Any) -> Place:
    """Pydantic's location without the names of union members that it puts between the keys."""
    place: list[str | int] = []
    for step in fault["loc"]:
        held = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        if step in held:
            value = value[step]
            place.append(step)
    if fault["type"] == "missing":
        place.append(fault["loc"][-1])
    elif fault["type"].startswith("union_tag"):
        place.append("kind")
    return tuple(place)


def _sentence(found: list[ErrorDetails], place: Place, recipe: Any) -> str:
    """What is wrong with one value, whose faults are several where it fits no member of a union."""
    fault, kind = found[0], found[0]["type"]
    models = _models(place[:-1], recipe)
    if kind == "extra_forbidden":
        return f"is unknown. {nearest(str(place[-1]), [name for model in models for name in model.model_fields])}"
    if kind == "union_tag_not_found":
        return f"is missing. {nearest('', _kinds(models))}"
    if kind == "union_tag_invalid":
        tag = str(fault["ctx"]["tag"])
        return f"= {_shown(tag)} is unknown. {nearest(tag, _kinds(models))}"
    info = next((model.model_fields[place[-1]] for model in models if place and place[-1] in model.model_fields), None)
    meaning = f" {info.description[0].upper()}{info.description[1:]}." if info and info.description else ""
    if kind == "missing":
        return f"is missing.{meaning}"
    seen = fault["input"]
    if kind in ("value_error", "assertion_error"):
        text = str(fault["ctx"]["error"])
        return text if isinstance(seen, dict | list) else f"= {_shown(seen)}: {text}"
    if kind == "literal_error" and len(found) == 1 and isinstance(seen, str) and (names := _names(fault)):
        return f"= {_shown(seen)} is unknown. {nearest(seen, names)}"
    return f"= {_shown(seen)} {' and '.join(_reason(each, info) for each in found)}.{meaning}"


def _reason(fault: ErrorDetails, info: FieldInfo | None) -> str:
    kind, bounds = fault["type"], fault.get("ctx", {})
    if kind in REASONS:
        return REASONS[kind]
    if kind == "literal_error":
        return f"is not {bounds['expected']}"
    if kind in LIMITS:
        return _interval(info) or LIMITS[kind].format(**bounds)
    return f"is wrong: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _interval(info: FieldInfo | None) -> str:
    """`is not in [0, 1)` for a field with both bounds; else nothing."""
    bounds = {
        name: getattr(m, name)
        for m in (info.metadata if info else ())
        for name in ("ge", "gt", "le", "lt")
        if hasattr(m, name)
    }
    low = f"[{bounds['ge']}" if "ge" in bounds else f"({bounds['gt']}" if "gt" in bounds else ""
    high = f"{bounds['le']}]" if "le" in bounds else f"{bounds['lt']})" if "lt" in bounds else ""
    return f"is not in {low}, {high}" if low and high else ""


def _models(place: Place, value: Any) -> list[type[BaseModel]]:
    """The settings classes that the value at a place may be of; its `kind` tells the members of a union apart."""
    models: list[type[BaseModel]] = [Recipe]
    for step in place:
        value = value[step]
        if isinstance(step, str):
            fields = (model.model_fields[step] for model in models if step in model.model_fields)
            models = [inside for info in fields for inside in _classes(info.annotation)]
        if isinstance(value, dict):
            models = [model for model in models if value.get("kind") in _kinds([model])] or models
    return models


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _classes(argument)


def _kinds(models: Sequence[type[BaseModel]]) -> list[str]:
    fields = (model.model_fields["kind"] for model in models if "kind" in model.model_fields)
    return [kind for info in fields for kind in get_args(info.annotation)]


def _names(fault: ErrorDetails) -> list[str]:
    """The texts that a Literal allows."""
    return re.findall(r"'([^']*)'", str(fault["ctx"]["expected"]))


def _coerced(given: Any, used: Any, place: Place = ()) -> Iterator[tuple[Place, Any, Any]]:
    """Values that pydantic quietly turned into another kind: `true` or '5' for a number, 1 for true."""
    if isinstance(given, dict) and isinstance(used, dict):
        for key in given:
            yield from _coerced(given[key], used.get(key), (*place, key))
    elif isinstance(given, list) and isinstance(used, list):
        for number, (one, other) in enumerate(zip(given, used, strict=False)):
            yield from _coerced(one, other, (*place, number))
    elif _word(given) and _word(used) and _word(given) != _word(used):
        yield place, given, used


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else ""


def _dotted(place: Place) -> str:
    """`stages[0].scheme`; a key that is not a plain word is quoted, so that it cannot pass for something else."""
    words = (
        f"[{step}]" if isinstance(step, int) else f".{step if WORD.match(step) else _shown(step)}" for step in place
    )
    return "".join(words).removeprefix(".")


def _shown(value: Any) -> str:
    """A value as the reader wrote it, control characters escaped and cut at MAX_SHOWN characters."""
    text = (
        {True: "true", False: "false"}[value] if isinstance(value, bool) else "null" if value is None else repr(value)
    )
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


KIND_FAULTS = ("literal_error", "union_tag_invalid", "union_tag_not_found")
REASONS = {
    "bool_parsing": "is neither true nor false",
    "bool_type": "is neither true nor false",
    "dict_type": "is not a mapping",
    "float_parsing": "is not a number",
    "float_type": "is not a number",
    "int_from_float": "is not a whole number",
    "int_parsing": "is not a whole number",
    "int_parsing_size": "is too large a number",
    "int_type": "is not a whole number",
    "list_type": "is not a list",
    "model_attributes_type": "is not a mapping of settings",
    "model_type": "is not a mapping of settings",
    "string_pattern_mismatch": "has characters that are not allowed",
    "string_type": "is not text: put it in quotes",
    "tuple_type": "is not a list",
}
LIMITS = {
    "greater_than": "is not greater than {gt}",
    "greater_than_equal": "is less than {ge}",
    "less_than": "is not less than {lt}",
    "less_than_equal": "is greater than {le}",
    "string_too_long": "is longer than {max_length} characters",
    "too_long": "has more than {max_length} entries",
    "too_short": "has fewer than {min_length} entries",
}
