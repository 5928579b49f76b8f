"""What a recipe says about pruning: which weights become zero, or which parts are removed."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from squeeze.distillation.settings import LossTerm
from squeeze.report.explained import prune_words
from squeeze.training.settings import Training

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from squeeze.data import Data
    from squeeze.distillation.taught import Taught
    from squeeze.model import Model
    from squeeze.provenance import Digest
    from squeeze.report.schema import StageRecord

    Batches = Sequence[Mapping[str, NDArray[np.int64]]]
    """Calibration texts as the network takes them, with `labels` where the task has them."""

CriterionName = Literal[
    "magnitude", "random", "movement", "taylor", "wanda", "wanda-regional", "sparsegpt",
]  # fmt: skip
"""The names in `criteria.CRITERIA`, which imports torch and so cannot stand here; a test holds the two together."""
PartsCriterionName = Literal["influence", "activation", "taylor", "michel", "random"]
"""The names in `structures.PARTS`: how layers, heads and neurons are ranked."""
PATTERN = re.compile(r"^(unstructured|row|[1-9]\d*:[1-9]\d*|block-[1-9]\d*x[1-9]\d*)$")

DATA_FREE = frozenset({"magnitude", "random"})
"""Criteria that read no texts."""
WITH_GRADIENTS = frozenset({"movement", "taylor"})
"""Criteria that read the gradient of a loss, which embeddings do not have."""
UPDATING = frozenset({"sparsegpt"})
"""Criteria that change the weights that stay, column by column, and so choose masks on the way."""

SCANS = ("block", "matrix")
"""What a scan prunes apart."""

Share = Annotated[float, Field(ge=0, lt=1)]


def n_of_m(pattern: str) -> tuple[int, int] | None:
    """(zeros, neighbours) of a pattern such as 2:4; None for others."""
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    return None if found is None else (int(found[1]), int(found[2]))


def block_of(pattern: str) -> tuple[int, int] | None:
    """(outputs, inputs) of a pattern such as block-16x16; None for others."""
    found = re.fullmatch(r"block-(\d+)x(\d+)", pattern)
    return None if found is None else (int(found[1]), int(found[2]))


class RemoveSettings(BaseModel):
    """Parts that are removed, as shares of what each layer has (0.25), or as how many stay (8), or, for layers, which ones stay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: Annotated[int, Field(ge=1)] | Share | tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, description="whole layers: a share below 1 goes; a whole number stays; a list: those stay"
    )
    heads: Annotated[int, Field(ge=1)] | Share | None = Field(
        default=None, description="attention heads of each layer: a share below 1 goes; a whole number stays"
    )
    neurons: Annotated[int, Field(ge=1)] | Share | None = Field(
        default=None, description="feed-forward neurons of each layer: a share below 1 goes; a whole number stays"
    )
    criterion: PartsCriterionName | None = Field(
        default=None,
        description="how parts are ranked: a name in `squeeze methods`; none: influence for layers, activation for others",
    )

    @property
    def needs_data(self) -> bool:
        """Whether texts decide which parts go: not where they are drawn at random, or where only named layers stay."""
        ranked = self.heads is not None or self.neurons is not None or not isinstance(self.layers, tuple)
        return ranked and self.criterion != "random"


class ScheduleSettings(BaseModel):
    """Pruning while training: sparsity rises from `start` to the stage's own (Zhu & Gupta 2017, arXiv:1710.01878, eq. 1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["cubic", "iterative"] = Field(
        default="cubic",
        description="cubic: masks follow the curve; iterative: `times` equal cuts, each followed by training",
    )
    start: Share = Field(default=0.0, description="sparsity at the first step")
    begin: float = Field(default=0.0, ge=0, lt=1, description="share of the steps before the first mask")
    end: float = Field(default=0.7, gt=0, le=1, description="share of the steps after which masks stay as they are")
    times: int = Field(default=10, ge=1, description="how often masks are chosen anew between the two")


class PruneStage(BaseModel):
    """Set weights to zero, or remove parts of the network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["prune"] = "prune"
    sparsity: float | None = Field(
        default=None, ge=0, lt=1, description="share of the weights of all pruned matrices that become zero"
    )
    criterion: CriterionName = Field(default="wanda", description="what a weight is worth: a name in `squeeze methods`")
    pattern: str = Field(
        default="unstructured",
        description="unstructured; N:M such as 2:4 (N of M neighbours along the inputs become zero); block-16x16; row (whole outputs)",
    )
    scope: Literal["row", "layer", "global"] | None = Field(
        default=None,
        description="weights that are ranked together; none: the criterion's own (row for wanda, else layer)",
    )
    allocation: Literal["uniform", "sensitivity", "owl"] = Field(
        default="uniform",
        description="how sparsity is spread over matrices: equal; by measured sensitivity; by outliers (OWL)",
    )
    scan: str = Field(
        default="block",
        description="with allocation sensitivity: what is tried apart, block or matrix (several times as long); or the .json file that "
        "`squeeze inspect --sensitivity --out` wrote",
    )
    keep: tuple[str, ...] = Field(default=(), description="matrices that stay dense, as names with * and ?")
    remove: RemoveSettings | None = Field(
        default=None, description="parts that are removed, in place of single weights"
    )
    schedule: ScheduleSettings | None = Field(
        default=None, description="prune step by step while training; {} for the defaults"
    )
    losses: tuple[LossTerm, ...] = Field(
        default=(), description="with a schedule: what is minimised, from the unpruned model; []: the task's defaults"
    )
    training: Training = Field(default=Training(), description="with a schedule: how long, how fast, in what order")
    seed: int = Field(default=0, ge=0, description="what is drawn at random")

    @field_validator("scan")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in SCANS and not value.endswith(".json"):
            raise ValueError(f"scan {value!r} is neither {' nor '.join(SCANS)} nor a .json file")
        return value

    @field_validator("pattern")
    @classmethod
    def _can_be_read(cls, value: str) -> str:
        if not PATTERN.fullmatch(value):
            raise ValueError(
                f"pattern {value!r} is unknown. Known: unstructured, N:M (such as 2:4), block-RxC (such as block-16x16), row"
            )
        pair = n_of_m(value)
        if pair is not None and pair[0] >= pair[1]:
            raise ValueError(
                f"pattern {value} makes {pair[0]} of {pair[1]} neighbours zero, and at least one must stay. The first number must be "
                "below the second"
            )
        return value

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        fields = type(self).model_fields
        if self.remove is not None:
            if self.remove.layers is None and self.remove.heads is None and self.remove.neurons is None:
                raise ValueError("remove names no parts. Set remove.layers, remove.heads or remove.neurons")
            unread = [
                n for n in fields if n not in ("kind", "remove", "seed") and getattr(self, n) != fields[n].default
            ]
            if unread:
                raise ValueError(
                    f"{unread[0]} is for single weights, and remove takes whole parts. Drop one of them; two prune stages do both"
                )
            return self
        pair = n_of_m(self.pattern)
        if pair is None and self.sparsity is None:
            raise ValueError(
                "nothing says how much is pruned. Set sparsity, the share of weights that become zero, or remove, the parts that go"
            )
        if pair is not None and self.sparsity is not None and abs(self.sparsity - pair[0] / pair[1]) > 1e-6:
            raise ValueError(
                f"sparsity {self.sparsity:g} is not what pattern {self.pattern} gives, {pair[0] / pair[1]:g}. Drop sparsity"
            )
        return self

    @model_validator(mode="after")
    def _choices_fit(self) -> Self:
        pair = n_of_m(self.pattern)
        if self.scope is not None and pair is not None:
            raise ValueError(
                f"scope {self.scope}: pattern {self.pattern} ranks weights among {pair[1]} neighbours. Drop scope"
            )
        if self.scope == "global" and self.pattern != "unstructured":
            raise ValueError(
                f"scope global ranks single weights of all matrices together, not pattern {self.pattern}. Use scope layer"
            )
        if self.scope == "row" and self.pattern == "row":
            raise ValueError("scope row ranks weights within a row, and pattern row takes whole ones. Drop scope")
        if self.criterion in UPDATING and (self.scope == "global" or self.pattern == "row"):
            what = "scope global" if self.scope == "global" else "pattern row"
            raise ValueError(
                f"{what}: {self.criterion} makes up for each zero within its own row and matrix, on the way. Use another criterion, or "
                f"drop {what.split()[0]}"
            )
        if self.scan != type(self).model_fields["scan"].default and self.allocation != "sensitivity":
            raise ValueError(
                f"scan {self.scan} says what an allocation by sensitivity tries apart, and allocation is {self.allocation}. Drop it, or "
                "set allocation: sensitivity"
            )
        if self.allocation != "uniform" and (self.pattern != "unstructured" or self.scope == "global"):
            what = "scope global" if self.scope == "global" else f"pattern {self.pattern}"
            raise ValueError(
                f"allocation {self.allocation} gives each matrix a sparsity of its own, which {what} decides. Drop one of them"
            )
        return self

    @model_validator(mode="after")
    def _schedule_means_something(self) -> Self:
        if self.schedule is None:
            fields = type(self).model_fields
            unread = [n for n in ("losses", "training") if getattr(self, n) != fields[n].default]
            if unread:
                raise ValueError(
                    f"{unread[0]} is for pruning while training. Add a schedule, {{}} for the defaults, or drop it"
                )
        elif n_of_m(self.pattern) is not None:
            raise ValueError(
                f"a schedule raises sparsity step by step, and pattern {self.pattern} fixes it. Drop schedule; a distill stage after this "
                "one trains with the zeros in place"
            )
        return self

    @property
    def scan_file(self) -> Path | None:
        """The table that an earlier scan wrote; None where this stage scans itself."""
        return None if self.scan in SCANS else Path(self.scan)

    @property
    def share(self) -> float:
        """Share of the weights of all pruned matrices that become zero; what N:M implies; 0 where parts are removed."""
        pair = n_of_m(self.pattern)
        return pair[0] / pair[1] if pair is not None else self.sparsity or 0.0

    @property
    def scheme(self) -> str:
        """For progress: what the stage is about."""
        return prune_words(self.model_dump(mode="json"))

    @property
    def progress_noun(self) -> str:
        """For progress: what is counted."""
        return "step" if self.schedule is not None else "block"

    @property
    def needs_data(self) -> bool:
        """Whether texts decide the result."""
        if self.remove is not None:
            return self.remove.needs_data
        measures = self.allocation != "uniform" and self.scan_file is None
        return self.criterion not in DATA_FREE or measures or self.schedule is not None

    def apply(
        self, model: "Model", batches: "Batches" = (), done: Callable[..., None] | None = None, *, data: "Data | None" = None,
        teacher: "Taught | None" = None, workspace: Path | None = None, key: "Digest" = "",
    ) -> "StageRecord":  # fmt: skip
        """Prune `model` in place. `batches` are calibration texts, with `labels` for the criteria that read gradients.

        `data`, `teacher` (the unpruned model), `workspace` and `key` are for a schedule, as a distill stage gets them. `done(i, n)` hears
        of each block, or step. Raises PruneError for what cannot be pruned so; the model is then as it was.
        """
        from squeeze.pruning.stage import prune

        return prune(self, model, batches, done, data=data, teacher=teacher, workspace=workspace, key=key)
