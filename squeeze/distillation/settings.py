"""What a recipe says about a student, its losses and its texts."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from squeeze.rows import ASSETS

LossName = Literal[
    "kl", "reverse-kl", "skewed-kl", "js", "mse", "labels", "hidden", "cosine", "attention", "relations", "embedding", "similarity",
    "sequence",
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
        default=None, ge=0, lt=1, description="share of each label given to all classes (labels, sequence)"
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


class UnlabelledSettings(BaseModel):
    """Texts beside the train split that nobody labelled: the teacher says what they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="a .csv, .jsonl, .parquet or .txt file, or an asset: name; prose for causal-lm")
    text_column: str = Field(default="text", description="column or key that holds the text (not for .txt)")
    encoding: str = Field(default="utf-8", description="character encoding of a .csv, .jsonl or .txt file")
    count: int | None = Field(
        default=None,
        ge=1,
        description="texts (blocks, for causal-lm) that are used at most, drawn by the seed; none: all",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_asset(cls, given: Any) -> Any:
        """An asset brings its column and encoding."""
        if isinstance(given, Mapping) and (asset := ASSETS.get(str(given.get("path")))):
            return {**{k: v for k, v in asset.settings.items() if k in ("text_column", "encoding")}, **given}
        return given


class AugmentSettings(BaseModel):
    """Copies of the train texts with words replaced (Jiao et al. 2019, "TinyBERT", arXiv:1909.10351, algorithm 1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: Literal["neighbours", "masked-lm", "mask"] = Field(
        default="neighbours",
        description="what a word becomes: one near it in the teacher's embedding table (words of one token); one that a masked "
        "language model would put there; or the mask token",
    )
    model: str | None = Field(default=None, description="the masked language model: folder or hub id (masked-lm)")
    copies: int = Field(default=1, ge=1, description="copies of each text")
    share: float = Field(default=0.4, gt=0, le=1, description="share of the words that are replaced")
    candidates: int = Field(default=15, ge=1, description="words that each replacement is drawn from (not for mask)")
    keep_labels: bool = Field(
        default=False, description="copies have their text's label; false: only the teacher says what they are"
    )

    @model_validator(mode="after")
    def _has_its_model(self) -> Self:
        if (self.by == "masked-lm") != (self.model is not None):
            raise ValueError(
                "by: masked-lm reads a masked language model, and only it does. Name one with augment.model, or set by: neighbours, "
                "which needs none"
            )
        return self


class GenerateSettings(BaseModel):
    """Blocks that the teacher has written (Kim & Rush 2016, arXiv:1606.07947): it continues the first tokens of train blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: int = Field(default=32, ge=1, description="tokens of a train block that are given and not learned")
    count: int | None = Field(default=None, ge=1, description="train blocks that are continued; none: all")
    beams: int = Field(default=1, ge=1, description="width of the beam search; 1: none")
    temperature: float | None = Field(
        default=None, gt=0, description="draw each token at this temperature; none: take the likeliest"
    )
    batch: int = Field(default=16, ge=1, description="blocks that are continued at once")
    beside: bool = Field(default=False, description="train on the train blocks themselves too")

    @model_validator(mode="after")
    def _is_one_way(self) -> Self:
        if self.beams > 1 and self.temperature is not None:
            raise ValueError("a beam search looks for the likeliest text and draws none: give beams or temperature")
        return self


class OnPolicySettings(BaseModel):
    """Steps whose texts the student writes itself (Agarwal et al. 2023, "GKD", arXiv:2306.13649, algorithm 1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(default=0.5, gt=0, le=1, description="share of the steps whose batch is sampled (λ)")
    every: int = Field(default=1, ge=1, description="steps of which only the first can be sampled: sampling is slow")
    prompt: int = Field(default=32, ge=1, description="tokens of a train block that the student goes on from")
    new_tokens: int = Field(default=32, ge=1, description="tokens that it writes at most; those alone are learned from")
    temperature: float = Field(default=1.0, gt=0, description="at which it draws them")
