"""What the dense network's matrices read of the calibration texts, in one pass, and the matrices themselves with their places.

For what is decided before anything is pruned: scans of sensitivity, and allocations by outliers. Pruning itself measures each matrix behind
those that are pruned already (`apply.py`), which needs a walk through the blocks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from squeeze.errors import LayerwiseError, PruneError
from squeeze.layerwise import Gram, repeated_blocks, width
from squeeze.model import Model
from squeeze.narrowing import cacheless
from squeeze.playback import Batches, readers
from squeeze.pruning.criteria import CRITERIA, Seen
from squeeze.pruning.gradients import loss_gradients
from squeeze.pruning.matrices import Matrix, matrices
from squeeze.pruning.settings import WITH_GRADIENTS, PruneStage


@dataclass(frozen=True, eq=False)
class Place:
    """A matrix that can be pruned, and where it stands."""

    matrix: Matrix
    module: nn.Module
    layer: int | None
    """Number of its block; None outside."""
    part: str
    """Its module's name in the block, or the whole one."""

    @property
    def name(self) -> str:
        """Of its parameter."""
        return self.matrix.name

    @property
    def weights(self) -> int:
        """How many."""
        return self.matrix.weight.numel()


def places(network: nn.Module, keep: Sequence[str] = ()) -> list[Place]:
    """The matrices that pruning would prune, in the network's order. Raises PruneError as `matrices` does."""
    try:
        path = f"{repeated_blocks(network)[0]}."
    except LayerwiseError:
        path = ""
    held = readers(network)
    found = []
    for matrix in matrices(network, keep):
        if not matrix.note:
            number, _, part = matrix.name.removeprefix(path).partition(".") if path else ("", "", matrix.name)
            layer = int(number) if number.isdigit() else None
            found.append(Place(matrix, held[matrix.name][0], layer, part.removesuffix(".weight")))
    return found


def layers_of(network: nn.Module, found: Sequence[Place]) -> dict[str, list[Place]]:
    """Layer's name -> its matrices; of a network without layers, each matrix by itself."""
    if found[0].layer is None:
        return {place.name: [place] for place in found}
    path, _ = repeated_blocks(network)
    layers: dict[str, list[Place]] = {}
    for place in found:
        layers.setdefault(f"{path}.{place.layer}", []).append(place)
    return layers


@contextmanager
def hidden_weights(masks: Mapping[Place, Tensor]) -> Iterator[None]:
    """While it lasts the weights whose mask [out, in] is False are zero; as they were, afterwards."""
    before = {place: place.matrix.weight.detach().clone() for place in masks}
    try:
        for place, mask in masks.items():
            place.matrix.put(place.matrix.rows().masked_fill(~mask, 0))
        yield
    finally:
        for place, weight in before.items():
            place.matrix.weight.detach().copy_(weight)


@dataclass
class Reading:
    """What one matrix has read: squares summed for each input, and the Gram matrix where it was asked for."""

    squares: Tensor
    gram: Gram | None
    tokens: int = 0

    @property
    def norms(self) -> Tensor:
        """Root mean square of each input over tokens, [in]."""
        return (self.squares / self.tokens).sqrt()


@dataclass
class _Pass:
    """The batch that is going through the network, and who reads what."""

    valid: Tensor | None = None
    last: Tensor | None = None
    source: str = ""
    same: dict[str, str] = field(default_factory=dict)
    """Matrix -> the one just before it that reads the same tensor, and whose statistics are its own."""


def statistics(model: Model, batches: Batches, found: Sequence[Place], stage: PruneStage) -> dict[str, Seen]:
    """What the stage's criterion needs to know of each matrix, by its name.

    Gram matrices are kept once for matrices that read one tensor: 0.4 GB for SmolLM2-135M. Raises PruneError for criteria that
    need what one forward pass, or the task's loss, cannot tell, and for matrices that no text reaches.
    """
    criterion = CRITERIA[stage.criterion]
    if "block gradient" in criterion.needs:
        raise PruneError(
            f"{stage.criterion} needs each block's own gradients, which a scan does not compute. Scan by wanda."
        )
    read = Readings({}, {})
    if criterion.needs & {"norms", "gram"}:
        read = readings(model, batches, found, with_gram="gram" in criterion.needs)
    gradients = None
    if "gradient" in criterion.needs:
        weights = {place.name: place.matrix.weight for place in found}
        without = [name for name in CRITERIA if name not in WITH_GRADIENTS]
        gradients = loss_gradients(model, batches, weights, squares=criterion.squares, without=without)
    seen = {}
    for place in found:
        known = read.of(place) if read.by_name else None
        gradient = None if gradients is None else gradients.mean(place.name)
        seen[place.name] = Seen(
            norms=None if known is None else known.norms, gram=None if known is None or known.gram is None else known.gram.matrix,
            gradient=gradient.T if gradient is not None and place.matrix.transposed else gradient,
            generator=torch.Generator().manual_seed((crc32(place.name.encode()) ^ stage.seed) % 2**63),
        )  # fmt: skip
    return seen


@dataclass
class Readings:
    """What was read, by the name of the first of the matrices that read one tensor."""

    by_name: dict[str, Reading]
    same: dict[str, str]

    def of(self, place: Place) -> Reading:
        """What this matrix read."""
        return self.by_name[self.same.get(place.name, place.name)]


def readings(model: Model, batches: Batches, found: Sequence[Place], *, with_gram: bool) -> Readings:
    """One pass over all texts, padding left out. Raises PruneError for matrices that no text reaches, and inputs that are not finite."""
    known: dict[str, Reading] = {}
    now = _Pass()

    def watch(place: Place) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if x is now.last and (place.name in now.same or place.name not in known):
                now.same[place.name] = now.source
                return
            now.last, now.source = x, place.name
            rows = x if now.valid is None or x.shape[:-1] != now.valid.shape else x[now.valid]
            rows = rows.reshape(-1, x.shape[-1]).float()
            columns = width(place.module)
            reading = known.setdefault(
                place.name, Reading(torch.zeros(columns), Gram(torch.zeros(columns, columns)) if with_gram else None)
            )
            reading.squares += rows.square().sum(0)
            reading.tokens += len(rows)
            if reading.gram is not None:
                reading.gram.add(rows)

        return hook

    trunk: Any = getattr(model.network, "base_model", model.network)
    with ExitStack() as hooks, torch.no_grad():
        for place in found:
            if not isinstance(place.module, nn.RNNBase):  # what its inner matrices read passes through no module
                hooks.callback(place.module.register_forward_pre_hook(watch(place)).remove)
        for batch in batches:
            inputs = {name: torch.from_numpy(batch[name]) for name in model.text_inputs if name in batch}
            mask = inputs.get("attention_mask")
            now.valid, now.last = None if mask is None or bool(mask.all()) else mask.bool(), None
            trunk(**inputs, **cacheless(trunk))
    dead = [p.name for p in found if not (r := known.get(now.same.get(p.name, p.name))) or not r.tokens]
    if dead:
        raise PruneError(
            f"what {dead[0]} reads of the calibration texts is not known. Keep it dense (keep), or use magnitude."
        )
    broken = [name for name, reading in known.items() if not bool(reading.squares.isfinite().all())]
    if broken:
        raise PruneError(f"the inputs of {broken[0]} are not finite on the calibration texts. Repair the checkpoint.")
    return Readings(known, now.same)
