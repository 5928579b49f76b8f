"""What is measured: the bench section of a recipe, and the inputs of each workload."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from squeeze.report.schema import Workload

Count = Annotated[int, Field(ge=1)]


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
    """Real traffic: the whole held-out split once, at the lengths that its texts have."""

    kind: Literal["dataset"] = "dataset"
    batch: int = Field(default=50, ge=1)
    order: Literal["sorted", "shuffled", "given"] = "sorted"

    def described(self, examples: int) -> Workload:
        """As the report names it."""
        return Workload(kind="dataset", batch=self.batch, examples=examples, order=self.order)


class GenerateWorkload(_Settings):
    """Greedy generation from prompts of one length, cut from held-out blocks; without data, random tokens."""

    kind: Literal["generate"] = "generate"
    batch: int = Field(default=1, ge=1)
    prompt: int = Field(default=128, ge=1)
    new_tokens: int = Field(default=64, ge=2)

    def described(self, examples: int) -> Workload:
        """As the report names it."""
        return Workload(kind="generate", batch=self.batch, prompt=self.prompt, new_tokens=self.new_tokens)


class _LoadTest(_Settings):
    """Requests that come while others are worked on: a shape of random tokens, or held-out texts one at a time."""

    callers: int = Field(default=1, ge=1, description="requests worked on at once, each in a thread of its own")
    batch: int = Field(default=1, ge=1)
    sequence: int | None = Field(default=None, ge=1, description="none: held-out texts at their own lengths")
    seconds: float = Field(default=10.0, gt=0, description="how long requests come")


class ClosedLoop(_LoadTest):
    """Each caller asks again as soon as it is answered: what a server can do when it is never idle."""

    kind: Literal["closed"] = "closed"

    def described(self, examples: int) -> Workload:
        """As the report names it."""
        return Workload(kind="closed", batch=self.batch, sequence=self.sequence, callers=self.callers)


class OpenLoop(_LoadTest):
    """Requests arrive at random (Poisson), whether or not the earlier ones are answered; waiting counts.

    Without a rate, the highest that keeps the 99th percentile within the limit is sought.
    """

    kind: Literal["open"] = "open"
    rate: float | None = Field(default=None, gt=0, description="mean arrivals a second; none: the highest is sought")
    limit_ms: float = Field(default=50.0, gt=0, description="what the 99th percentile must not exceed")

    def described(self, examples: int) -> Workload:
        """As the report names it."""
        return Workload(
            kind="open", batch=self.batch, sequence=self.sequence, callers=self.callers, rate=self.rate,
            limit_seconds=self.limit_ms / 1e3,
        )  # fmt: skip


class GridWorkload(_Settings):
    """Every combination of these: fixed shapes with `sequence`, generation with `prompt` and `new_tokens`."""

    kind: Literal["grid"] = "grid"
    batch: tuple[Count, ...] = Field(default=(1,), min_length=1)
    sequence: tuple[Count, ...] = ()
    prompt: tuple[Count, ...] = ()
    new_tokens: tuple[Annotated[int, Field(ge=2)], ...] = (64,)

    def expanded(self) -> Iterator[FixedWorkload | GenerateWorkload]:
        """The single workloads."""
        for batch, sequence in product(self.batch, self.sequence):
            yield FixedWorkload(batch=batch, sequence=sequence)
        for batch, prompt, new_tokens in product(self.batch, self.prompt, self.new_tokens):
            yield GenerateWorkload(batch=batch, prompt=prompt, new_tokens=new_tokens)


AnyWorkload = FixedWorkload | DatasetWorkload | GenerateWorkload | ClosedLoop | OpenLoop
WorkloadSettings = Annotated[AnyWorkload | GridWorkload, Field(discriminator="kind")]


def _several(given: Any) -> Any:
    return given if given is None or isinstance(given, list | tuple) else (given,)


OneOrSeveral = BeforeValidator(_several)
"""A single value stands for a list of one."""


class BenchSettings(_Settings):
    """How to measure. Devices, threads, dtypes and runtimes are a grid: every combination that an artifact can have is a cell."""

    device: Annotated[tuple[Literal["cpu", "cuda"], ...], OneOrSeveral] = Field(
        default=("cpu",), min_length=1, description="cpu, cuda, or a list; never silently another than asked for"
    )
    threads: Annotated[tuple[Count, ...] | None, OneOrSeveral] = Field(
        default=None, description="threads of every runtime, or a list; none: one for each core"
    )
    dtype: Annotated[tuple[Literal["float32", "bfloat16", "float16"], ...] | None, OneOrSeveral] = Field(
        default=None, description="what torch and OpenVINO compute in, or a list; none: what the files hold"
    )
    runtimes: Annotated[tuple[str, ...] | None, OneOrSeveral] = Field(
        default=None, description="names in `squeeze methods`; none: the best one for each artifact"
    )
    repeats: int = Field(default=5, ge=1, description="child processes for each cell and pass, at least")
    most_repeats: int = Field(default=40, ge=1, description="child processes for each cell and pass, at most")
    precision: float = Field(
        default=0.03,
        gt=0,
        lt=1,
        description="repeats are added until half an interval is this small a share of its ratio",
    )
    budget_seconds: float = Field(
        default=60.0, ge=0, description="time for added repeats; those that `repeats` asks for are always made"
    )
    load_repeats: int = Field(default=3, ge=1, description="child processes for each load test")
    seconds_per_cell: float = Field(
        default=1.0, gt=0, description="timed calls of a fixed workload go on for this long, five at least"
    )
    warmup_seconds: float = Field(
        default=0.1,
        ge=0,
        description="untimed calls before them go on for this long, two at least; kept apart in the report",
    )
    quality: bool = Field(default=True, description="score the held-out examples")
    memory: bool = Field(
        default=True, description="peak and steady memory, in children of their own, and zstd-compressed size"
    )
    ceilings: bool = Field(default=True, description="hold every cell against what this machine can do")
    energy: bool = Field(default=True, description="read RAPL or NVML where the machine has them")
    profile: bool = Field(default=False, description="time for each operator and layer, where ONNX Runtime can tell")
    lm_eval: tuple[str, ...] = Field(
        default=(), description="tasks of lm-evaluation-harness: names, or YAML files whose data is local"
    )
    lm_eval_limit: int | None = Field(default=None, ge=1, description="examples of each such task; none: all")
    workloads: tuple[WorkloadSettings, ...] | None = Field(default=None, description="none: the task's defaults")

    @property
    def reads_logits(self) -> bool:
        """Whether anything asks for more than times: some runtime must then give the logits of whole texts."""
        return self.quality or bool(self.lm_eval)

    def single_workloads(self, task: str) -> tuple[AnyWorkload, ...]:
        """The workloads asked for, or the task's defaults; grids expanded, each once."""
        found: dict[AnyWorkload, None] = {}
        for work in DEFAULTS[task] if self.workloads is None else self.workloads:
            found |= dict.fromkeys(work.expanded() if isinstance(work, GridWorkload) else (work,))
        return tuple(found)


DEFAULTS: Mapping[str, tuple[AnyWorkload, ...]] = {
    "causal-lm": (GenerateWorkload(),),
    "text-classification": (
        FixedWorkload(batch=1, sequence=16), FixedWorkload(batch=1, sequence=128), FixedWorkload(batch=8, sequence=128), DatasetWorkload(),
    ),
    "feature-extraction": (FixedWorkload(batch=1, sequence=128), DatasetWorkload()),
}  # fmt: skip


def random_tokens(batch: int, length: int, vocabulary: int, seed: int) -> dict[str, NDArray[np.int64]]:
    """Tokens without padding; every input that a text model may ask for."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, (batch, length), dtype=np.int64)
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
