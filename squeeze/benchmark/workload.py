"""What is measured: the bench section of a recipe, and the inputs of each workload."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from squeeze.report.schema import Workload


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FixedWorkload(_Settings):
    """Random tokens in one shape, called again and again."""

    kind: Literal["fixed"] = "fixed"
    batch: int = Field(ge=1)
    sequence: int = Field(ge=1)

    def described(self, examples: int) -> Workload:
        """As the report names it."""
        return Workload(kind="fixed", batch=self.batch, sequence=self.sequence)


class DatasetWorkload(_Settings):
    """The whole held-out split once, at the lengths that its texts have."""

    kind: Literal["dataset"] = "dataset"
    batch: int = Field(default=50, ge=1)
    order: Literal["sorted", "given"] = "sorted"

    def described(self, examples: int) -> Workload:
        """As the report names it."""
        return Workload(kind="dataset", batch=self.batch, examples=examples, order=self.order)


class GenerateWorkload(_Settings):
    """Greedy generation from prompts of one length, cut from held-out blocks."""

    kind: Literal["generate"] = "generate"
    batch: int = Field(default=1, ge=1)
    prompt: int = Field(default=128, ge=1)
    new_tokens: int = Field(default=64, ge=2)

    def described(self, examples: int) -> Workload:
        """As the report names it."""
        return Workload(kind="generate", batch=self.batch, prompt=self.prompt, new_tokens=self.new_tokens)


AnyWorkload = FixedWorkload | DatasetWorkload | GenerateWorkload
WorkloadSettings = Annotated[AnyWorkload, Field(discriminator="kind")]


class BenchSettings(_Settings):
    """How to measure."""

    device: Literal["cpu", "cuda"] = Field(default="cpu", description="never silently another than asked for")
    threads: int | None = Field(default=None, ge=1, description="threads of every runtime; none: one for each core")
    repeats: int = Field(default=3, ge=1, description="child processes for each cell and pass")
    seconds_per_cell: float = Field(
        default=2.0, gt=0, description="timed calls of a fixed workload go on for this long, five at least"
    )
    workloads: tuple[WorkloadSettings, ...] | None = Field(default=None, description="none: the task's defaults")


DEFAULTS: Mapping[str, tuple[AnyWorkload, ...]] = {
    "causal-lm": (GenerateWorkload(),),
    "text-classification": (
        FixedWorkload(batch=1, sequence=16), FixedWorkload(batch=1, sequence=128), FixedWorkload(batch=8, sequence=128), DatasetWorkload(),
    ),
    "feature-extraction": (FixedWorkload(batch=1, sequence=128), DatasetWorkload()),
}  # fmt: skip


def fixed_inputs(settings: FixedWorkload, vocabulary: int, seed: int) -> dict[str, NDArray[np.int64]]:
    """Random tokens without padding; every input that a text model may ask for."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, (settings.batch, settings.sequence), dtype=np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def prompts(settings: GenerateWorkload, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    """[batch, prompt] from the held-out blocks, laid end to end and around where they do not suffice."""
    needed = settings.batch * settings.prompt
    return np.resize(blocks.reshape(-1), needed).reshape(settings.batch, settings.prompt)


def pack(batches: Sequence[Mapping[str, NDArray[np.int64]]]) -> dict[str, NDArray[Any]]:
    """Batches as one flat set of named arrays, for .npz."""
    return {f"{number}.{name}": array for number, batch in enumerate(batches) for name, array in batch.items()}


def unpack(arrays: Mapping[str, NDArray[Any]]) -> list[dict[str, NDArray[Any]]]:
    """What `pack` packed."""
    batches: dict[int, dict[str, NDArray[Any]]] = {}
    for key in arrays:
        number, name = key.split(".", 1)
        batches.setdefault(int(number), {})[name] = arrays[key]
    return [batches[number] for number in sorted(batches)]
