"""What a recipe says about a student, its losses and its texts."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

LossName = Literal[
    "kl", "reverse-kl", "skewed-kl", "js", "mse", "labels", "hidden", "cosine", "attention", "relations", "embedding", "similarity",
]  # fmt: skip
"""The names in `losses.LOSSES`, which imports torch and so cannot stand here; a test holds the two together."""


class StudentSettings(BaseModel):
    """Which network learns; with nothing said it is the model that the stage is given (a pruned one, say)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str | None = Field(
        default=None, description="a trained model to start from: folder, hub id, asset: or artifact"
    )
    layers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, description="layers of the model that the student keeps: how many, or which ones, from 0"
    )
    choose: Literal["spread", "first", "last", "importance"] = Field(
        default="spread",
        description="which ones a number of layers means; importance: those that change the hidden states most",
    )
    heads: int | None = Field(
        default=None, ge=1, description="attention heads that each layer keeps, the most important ones"
    )
    neurons: int | None = Field(
        default=None, ge=1, description="feed-forward neurons that each layer keeps, the most important ones"
    )
    config: dict[str, Any] | None = Field(
        default=None,
        description="values of config.json that differ from the model's; the student then starts from random weights",
    )

    @model_validator(mode="after")
    def _is_one_way(self) -> Self:
        cut = self.layers is not None or self.heads is not None or self.neurons is not None
        if sum((self.path is not None, cut, self.config is not None)) > 1:
            raise ValueError(
                "a student comes from path, or is cut (layers, heads, neurons), or starts from config: give one of the three"
            )
        if isinstance(self.layers, tuple) and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ValueError(f"layers = {list(self.layers)} must name at least one layer, and each once")
        return self


class LossTerm(BaseModel):
    """One loss and its weight; settings that the loss does not read are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: LossName = Field(description="a name in `squeeze methods`")
    weight: float = Field(default=1.0, gt=0, description="what it is multiplied by in the sum of losses")
    temperature: float | None = Field(
        default=None, gt=0, description="softens teacher and student; none: the loss's own default"
    )
    skew: float | None = Field(
        default=None, gt=0, lt=1, description="share of the teacher in the mixture (skewed-kl, js)"
    )
    layers: tuple[tuple[int, int], ...] | None = Field(
        default=None,
        description="pairs of (student's, teacher's) layer, from 1; 0: the embeddings; none: evenly spread, or the last ones",
    )
    heads: int | None = Field(
        default=None, ge=1, description="relation heads (relations); none: the teacher's attention heads"
    )
    smoothing: float | None = Field(
        default=None, ge=0, lt=1, description="share of each label given to all classes (labels)"
    )


CACHE = ".teacher-cache"
"""The folder of a teacher's answers in a run folder."""


class CacheSettings(BaseModel):
    """The teacher's answers on disk: they are computed once, and later epochs and runs read them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    top: int = Field(
        default=32,
        ge=1,
        description="tokens whose probability is kept at each place (causal-lm), beside that of all others",
    )
    gigabytes: float = Field(
        default=4.0, gt=0, description="answers that would take more are computed anew at each step"
    )
    folder: str | None = Field(
        default=None,
        description="where they lie, for later runs too; none: in the run folder, until the run is complete",
    )
