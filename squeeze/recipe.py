"""Recipes: YAML in, one frozen and wholly checked Recipe out, or every fault at once with its line and its mend.

A recipe is plain values: text, numbers, true and false, lists and mappings (`document.py` reads them). Pydantic then finds
what is wrong, and the last part of this file says it in words: line, value seen, nearest name.

Rejected: pydantic's strict mode (behind any `before` validator it refuses a list for a tuple), for which `_coerced` stands in;
includes and variables in recipes (what was run must be readable from one file).
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from squeeze.benchmark.workload import BenchSettings
from squeeze.compress import DistillStage, Stage
from squeeze.data import DataSettings
from squeeze.document import Document, Place, apply_override, dotted, file_value, read_text, shown
from squeeze.errors import RecipeError, nearest
from squeeze.exporter import ExportSettings
from squeeze.model import ModelSettings
from squeeze.provenance import Digest, digest_json
from squeeze.pruning.settings import WITH_GRADIENTS, PruneStage
from squeeze.verification import VerifySettings

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
        kinds = [stage.kind for stage in self.stages]
        for number, (kind, following) in enumerate(pairwise(kinds)):
            if kind in ("quantize", "qat") and following != "qat":
                mend = f"put {following} before quantize" if following in ("distill", "prune") else "move it to the end"
                raise ValueError(
                    f"stages[{number}] ({kind}) is followed by {following}. It leaves integers, which only qat can go on "
                    f"training: {mend}."
                )
        if self.data.splits.train == 0 and "distill" in kinds:
            raise ValueError(
                f"stages[{kinds.index('distill')}] (distill) trains, and there is nothing to train on. Set data.splits.train, to "
                "rest for all texts that are left over."
            )
        if self.stages and isinstance(self.stages[0], DistillStage) and self.stages[0].learns_from_itself:
            raise ValueError(
                "stages[0] (distill) has the source model for student and for teacher: there is nothing to learn. Set "
                "student.layers or another student, or name another teacher."
            )
        for number, stage in enumerate(self.stages):
            if isinstance(stage, PruneStage) and (fault := self._why_not(stage)):
                raise ValueError(f"stages[{number}] (prune) {fault}")
        if kinds[:1] == ["qat"] or any(
            k == "qat" and before not in ("quantize", "qat") for before, k in pairwise(kinds)
        ):
            raise ValueError("qat trains what a quantize stage has made. Put one right before it.")
        if self.export is not None and self.export.needs_data and self.data.splits.calibration == 0:
            raise ValueError(
                "export.kv_cache: int8 takes its scales from calibration texts, and there are none. Set data.splits.calibration, "
                "or drop kv_cache."
            )
        if self.verify is not None and self.export is None:
            raise ValueError("verify checks an export, and there is none. Add a line `export: {}`, or drop verify.")
        return self

    def _why_not(self, stage: PruneStage) -> str:
        """What a prune stage lacks in this recipe, and the mend; "" where nothing."""
        if stage.needs_data and self.data.splits.calibration == 0:
            what = "ranks parts" if stage.remove is not None else f"({stage.criterion}) ranks weights"
            return f"{what} by calibration texts, and there are none. Set data.splits.calibration, to 24 texts or blocks say."
        if stage.schedule is not None and self.data.splits.train == 0:
            return "trains, and there is nothing to train on. Set data.splits.train, to rest for all texts that are left over."
        if stage.remove is None and stage.criterion in WITH_GRADIENTS and self.task == "feature-extraction":
            return (
                f"has criterion {stage.criterion}, which reads the gradient of a loss, and embeddings have none. Use wanda, sparsegpt or "
                "magnitude."
            )
        return ""


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, changed by overrides such as `data.splits.evaluate=20` or `stages.0.scheme=int8`.

    Relative paths in it (of a model or of data) are meant from the working directory, as on the command line, not from
    the recipe's own folder: a recipe then means the same wherever it lies, and `--set model.path=…` completes in a
    shell. Raises RecipeError with one line for every fault.
    """
    document = Document(str(path))
    document.value = file_value(document, read_text(path))
    for number, override in enumerate(overrides):
        apply_override(document, override, number)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(document.value)
    except ValidationError as error:
        _explain(error, document)
    else:
        for place, given, used in _coerced(document.value, recipe.model_dump(mode="json")):
            document.fault(place, f"= {shown(given)} is {_word(given)}, not {_word(used)}.")
    if document.faults or recipe is None:
        raise RecipeError("\n".join(text for _, text in sorted(set(document.faults))))
    return recipe


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Change plain settings by overrides such as `data.label_column=y`. Raises RecipeError with one line for every fault."""
    document = Document("--set")
    document.value = content
    for number, override in enumerate(overrides):
        apply_override(document, override, number)
    if document.faults:
        raise RecipeError("\n".join(text for _, text in sorted(set(document.faults))))


def validated(kind: type[Settings], content: Any, where: str) -> Settings:
    """`content` as settings of this kind. Raises RecipeError naming every field that is wrong, and what was seen there."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        lines = [
            f"{dotted((where, *f['loc']))} = {shown(f['input'])}: {f['msg']}." for f in error.errors(include_url=False)
        ]
        raise RecipeError("\n".join(lines)) from error


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors that complete and check YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def recipe_digest(recipe: Recipe) -> Digest:
    """Digest of all settings, defaults included: it tells a run that was cut off from one of another recipe."""
    return digest_json(recipe.model_dump(mode="json"))


# Explaining: what pydantic found -> a line that says what, where and how to mend.


def _explain(error: ValidationError, document: Document) -> None:
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
        return f"= {shown(tag)} is unknown. {nearest(tag, _kinds(models))}"
    info = next((model.model_fields[place[-1]] for model in models if place and place[-1] in model.model_fields), None)
    meaning = f" {info.description[0].upper()}{info.description[1:]}." if info and info.description else ""
    if kind == "missing":
        return f"is missing.{meaning}"
    seen = fault["input"]
    if kind in ("value_error", "assertion_error"):
        text = str(fault["ctx"]["error"])
        return text if isinstance(seen, dict | list) else f"= {shown(seen)}: {text}"
    if kind == "literal_error" and len(found) == 1 and isinstance(seen, str) and (names := _names(fault)):
        return f"= {shown(seen)} is unknown. {nearest(seen, names)}"
    return f"= {shown(seen)} {' and '.join(_reason(each, info) for each in found)}.{meaning}"


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
