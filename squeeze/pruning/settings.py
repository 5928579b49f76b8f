"""What a recipe says about pruning: which weights become zero, or which parts are removed."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from squeeze.distillation.settings import LossTerm
from squeeze.training.settings import Training

CriterionName = Literal[
    "magnitude", "random", "movement", "taylor", "wanda", "wanda-regional", "sparsegpt",
]  # fmt: skip
"""The names in `criteria.CRITERIA`, which imports torch and so cannot stand here; a test holds the two together."""
PartsCriterionName = Literal["influence", "activation", "taylor", "michel", "random"]
"""The names in `structures.PARTS`: how layers, heads and neurons are ranked."""
PATTERN = re.compile(r"^(unstructured|row|[1-9]\d*:[1-9]\d*|block-[1-9]\d*x[1-9]\d*)$")

Share = Annotated[float, Field(ge=0, lt=1)]


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
        default=None, description="how parts are ranked: a name in `squeeze methods`; none: influence for layers, activation for others"
    )


class ScheduleSettings(BaseModel):
    """Pruning while training: sparsity rises from `start` to the stage's own (Zhu & Gupta 2017, arXiv:1710.01878, eq. 1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["cubic", "iterative"] = Field(
        default="cubic", description="cubic: masks follow the curve; iterative: `times` equal cuts, each followed by training"
    )
    start: Share = Field(default=0.0, description="sparsity at the first step")
    begin: float = Field(default=0.0, ge=0, lt=1, description="share of the steps before the first mask")
    end: float = Field(default=0.7, gt=0, le=1, description="share of the steps after which masks stay as they are")
    times: int = Field(default=10, ge=1, description="how often masks are chosen anew between the two")


class PruneStage(BaseModel):
    """Set weights to zero, or remove parts of the network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["prune"] = "prune"
    sparsity: Share | None = Field(default=None, description="share of the weights of all pruned matrices that become zero")
    criterion: CriterionName = Field(default="wanda", description="what a weight is worth: a name in `squeeze methods`")
    pattern: str = Field(
        default="unstructured",
        description="unstructured; N:M such as 2:4 (N of M neighbours along the inputs become zero); block-16x16; row (whole outputs)",
    )
    scope: Literal["row", "layer", "global"] | None = Field(
        default=None, description="weights that are ranked together; none: the criterion's own (row for wanda, else layer)"
    )
    allocation: Literal["uniform", "sensitivity", "owl"] = Field(
        default="uniform", description="how sparsity is spread over matrices: equal; by measured sensitivity; by outliers (OWL)"
    )
    keep: tuple[str, ...] = Field(default=(), description="matrices that stay dense, as names with * and ?")
    remove: RemoveSettings | None = Field(default=None, description="parts that are removed, in place of single weights")
    schedule: ScheduleSettings | None = Field(default=None, description="prune step by step while training; {} for the defaults")
    losses: tuple[LossTerm, ...] = Field(
        default=(), description="with a schedule: what is minimised, from the unpruned model; []: the task's defaults"
    )
    training: Training = Field(default=Training(), description="with a schedule: how long, how fast, in what order")
    seed: int = Field(default=0, ge=0, description="what is drawn at random")
