"""What a stage says of itself in a report: predicted against measured sizes, and how the error falls with more calibration texts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, FiniteFloat

from squeeze.report.text import amount, figures, percent
from squeeze.report.training import distill_words

if TYPE_CHECKING:
    from squeeze.report.schema import Manifest, StageRecord

TOLERANCE = 0.02
"""Share of the prediction by which a size may differ before it is a warning."""
GRAPH_BYTES = 500_000
"""What an ONNX graph itself (operators, names, shapes) may take beside its weights, which alone are predicted."""
SIZE_COLUMNS = ("weights of", "predicted", "measured", "difference")
CURVE_COLUMNS = ("calibration texts", "SQNR of answers", "KL from float", "same answers", "cosine to float")


class CurvePoint(BaseModel):
    """A copy quantized with the first `texts` calibration texts, its answers against float's on texts that calibrated none."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    texts: int
    held_out: int
    """Texts that the answers were compared on."""
    sqnr_db: FiniteFloat | None
    """10 log10(|y|² / |y − ŷ|²) over all answers; None where they are equal."""
    kl: FiniteFloat | None = None
    """Mean of Σ p log(p / q) in nats; None for tasks without probabilities."""
    same: FiniteFloat | None = None
    """Share of answers (classes, next tokens) that stay the same."""
    cosine: FiniteFloat | None = None
    """Mean cosine of embeddings to float's."""

    @property
    def cells(self) -> tuple[str, ...]:
        """As a table shows it."""
        return (
            f"{self.texts:,}", "equal" if self.sqnr_db is None else f"{self.sqnr_db:.1f} dB",
            "" if self.kl is None else f"{figures(self.kl)} nats", "" if self.same is None else percent(self.same, 2),
            "" if self.cosine is None else f"{self.cosine:.5f}",
        )  # fmt: skip


def curve_table(points: Sequence[CurvePoint]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(columns, rows) of a curve, without the quantities that its task does not have."""
    rows = [point.cells for point in points]
    filled = [n for n in range(len(CURVE_COLUMNS)) if any(row[n] for row in rows)]
    return tuple(CURVE_COLUMNS[n] for n in filled), [tuple(row[n] for n in filled) for row in rows]


@dataclass(frozen=True)
class SizeRow:
    """One artifact's weight files: bytes as computed before they were written, and as they came out."""

    artifact: str
    predicted: int
    measured: int
    is_graph: bool

    @property
    def difference(self) -> float:
        """Share of the prediction that came out more (or, negative, less)."""
        return (self.measured - self.predicted) / max(self.predicted, 1)

    @property
    def is_off(self) -> bool:
        """Whether the difference is more than the tolerance, and more than a graph explains."""
        allowed = TOLERANCE * self.predicted
        return abs(self.measured - self.predicted) > (max(allowed, GRAPH_BYTES) if self.is_graph else allowed)

    @property
    def said(self) -> str:
        """ "predicted 23.4 MB, 0.3 % more": what stands beside the measured size."""
        if self.measured == self.predicted:
            return "as predicted"
        way = "more" if self.difference > 0 else "less"
        return f"predicted {amount(self.predicted, 'bytes')}, {percent(abs(self.difference), 2)} {way}"

    @property
    def cells(self) -> tuple[str, ...]:
        """As a table shows it."""
        sign = "+" if self.difference > 0 else ""
        sizes = (amount(self.predicted, "bytes"), amount(self.measured, "bytes"))
        return (self.artifact, *sizes, f"{sign}{percent(self.difference, 2)}")


def size_row(manifest: "Manifest") -> SizeRow | None:
    """Predicted and measured bytes of one artifact; None where none were predicted (sources, and reports of before)."""
    record = manifest.record
    if record is None or record.predicted_bytes is None:
        return None
    return SizeRow(manifest.name, record.predicted_bytes, manifest.weight_bytes, manifest.format == "onnx")


def size_rows(manifests: "Sequence[Manifest]") -> list[SizeRow]:
    """Of all artifacts whose size was predicted."""
    return [row for manifest in manifests if (row := size_row(manifest)) is not None]


def stage_label(record: "StageRecord") -> str:
    """A stage by its kind and what it is about: "quantize int8", "distill 3 layers, kl + 0.5 hidden, 3 epochs …"."""
    if record.kind == "distill":
        return f"distill {distill_words(record.settings, tuple(record.training.shares) if record.training else ())}".strip()
    if record.kind == "prune":
        return f"prune {prune_words(record.settings)}"
    return f"{record.kind} {record.settings.get('scheme', '')}".strip()


def prune_words(settings: Mapping[str, Any]) -> str:
    """What a prune stage is about: "wanda 50 % unstructured", "sparsegpt 2:4", "25 % fewer layers, 8 heads"."""
    remove = settings.get("remove")
    if remove:
        return ", ".join(
            _parts(name, remove[name]) for name in ("layers", "heads", "neurons") if remove.get(name) is not None
        )
    pattern, share = str(settings.get("pattern")), settings.get("sparsity")
    words = [str(settings.get("criterion"))]
    if share is not None and ":" not in pattern:
        words.append(_whole(share))
    words.append(pattern)
    if settings.get("scope") == "global":
        words.append("over all matrices")
    if settings.get("allocation") not in (None, "uniform"):
        words.append(f"by {settings['allocation']}")
    schedule = settings.get("schedule")
    return " ".join(words) + (f", {schedule['kind']} schedule" if schedule else "")


def _parts(name: str, value: float | Sequence[int]) -> str:
    if isinstance(value, Sequence):
        return f"{name} {', '.join(map(str, value))}"
    return f"{value:g} {name}" if value >= 1 else f"{_whole(value)} fewer {name}"


def _whole(share: float) -> str:
    """A share in percent, without decimals where it has none: 50 %, 33.3 %."""
    return percent(share, 0 if abs(100 * share - round(100 * share)) < 1e-9 else 1)


def stage_warnings(manifest: "Manifest") -> Iterator[str]:
    """What a reader should know before using this artifact: bad choices, and a size that is not what was computed."""
    yield from manifest.record.warnings if manifest.record is not None else ()
    row = size_row(manifest)
    if row is not None and row.is_off:
        yield (
            f"its weights take {amount(row.measured, 'bytes')}, but {amount(row.predicted, 'bytes')} were computed beforehand "
            f"({row.cells[-1]}): something is stored twice, or not at all; squeeze inspect shows the layers"
        )
