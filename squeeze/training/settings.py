"""How a stage that trains goes about it."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Training(BaseModel):
    """Length, rate and order of a training; what it minimises is the stage's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: float = Field(default=1.0, gt=0, description="passes over the examples; may be a part of one")
    steps: int | None = Field(default=None, ge=1, description="steps of the optimizer in place of epochs")
    batch: int = Field(default=32, ge=1, description="examples in a step, those of all processes and parts together")
    accumulation: int = Field(
        default=1,
        ge=1,
        description="parts that a process computes its share of a batch in, one after another: memory against time",
    )
    learning_rate: float = Field(default=1e-4, gt=0, description="highest rate, after warming up")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="how the rate falls after warming up"
    )
    warm_up: float = Field(default=0.06, ge=0, lt=1, description="share of the steps over which the rate rises from 0")
    weight_decay: float = Field(
        default=0.01, ge=0, description="of matrices; norms and biases have none (AdamW, arXiv:1711.05101)"
    )
    clip: float = Field(default=1.0, gt=0, description="largest norm of a step's gradient")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="of the products; auto: bfloat16 where the device multiplies it in tiles, else float32",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: CUDA where there is some")
    sharding: Literal["none", "fsdp"] = Field(
        default="none",
        description="fsdp: several processes divide weights, gradients and optimizer state among them; accelerate's --use_fsdp says it too",
    )
    held_out: int = Field(
        default=1000,
        ge=0,
        description="examples of the train split that are not trained on but judge the training, a fifth at most; 0: none",
    )
    validations: int = Field(default=10, ge=1, description="times that the held-out examples are scored, evenly spread")
    patience: int | None = Field(
        default=None, ge=1, description="validations without a better one after which training stops; none: never"
    )
    keep: Literal["best", "last"] = Field(
        default="best", description="which weights come out; of validations alike the earliest is best"
    )
    checkpoint_minutes: float = Field(
        default=2.0, gt=0, description="time between checkpoints that a killed run goes on from"
    )
    tensorboard: bool = Field(
        default=False,
        description="also write TensorBoard event files, into the run folder's tensorboard/<stage>; needs squeeze[tensorboard]",
    )
    seed: int = Field(default=0, ge=0, description="order of the examples, and what else is drawn at random")

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.batch % self.accumulation:
            raise ValueError(
                f"a batch of {self.batch} does not divide into {self.accumulation} equal parts of accumulation"
            )
        if self.patience is not None and self.held_out == 0:
            raise ValueError("patience waits for a better validation, and held_out is 0: there is none")
        return self
