"""What zeros are worth: for each pruned artifact the sparsity asked and reached, what is left, and what that brought, in plain words.

A mask of zeros makes a file that compresses better, and on kernels that multiply by zeros as by any number nothing else; a part that is
removed makes a smaller product. Which of the two was bought is told by the clock, so each artifact is held against the one it was
made from, in the same runtime and workload, with the interval, and where no gain is shown the structure or the runtime is named
that would bring one. Where later stages changed speed too (integers), the gain is shown and not put down to zeros.
All of it follows from a report, and nothing is stored. Rejected: a theoretical speed-up, operations left over operations: it is the
very figure by which zeros pass for speed.

What could use zeros, as it stands:
* ONNX Runtime and torch have dense kernels on CPUs (microsoft/onnxruntime#2121; neuralmagic/sparseml#1529 measured it).
* torch multiplies 2:4 matrices on NVIDIA GPUs of compute capability 8.0 and later, in 16 or 8 bits, once they are converted
  (torch.sparse.to_sparse_semi_structured).
* OpenVINO packs the weights of products of 8-bit weights and activations, both sizes multiples of 64, on processors with AMX, where
  CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE is set and a matrix has that share of zeros; its documentation sets 0.8.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from squeeze.provenance import Digest
from squeeze.report import stats
from squeeze.report.schema import Manifest, Measurement, Report, StageRecord
from squeeze.report.summary import QUANTITIES, label
from squeeze.report.text import amount, json_text, percent
from squeeze.report.verdict import Verdict

SPEEDS = ("decode_rate", "time_per_output_token", "set_time", "latency", "time_to_first_token")
"""Quantities that speak for speed, most telling first."""
DENSE = {"torch.sparse": "torch"}
"""Runtimes for zeros -> the one that the dense model runs in."""
PACKED = 0.8
"""Share of zeros from which OpenVINO's packed weights are mentioned."""
ZERO_COLUMNS = (
    "artifact", "zeros", "asked", "reached", "of all weights", "parameters", "not zero", "weights", "zstd", "speed",
)  # fmt: skip
REMOVE = "remove neurons, heads or whole layers instead of single weights (squeeze prune --remove-neurons 0.5, say)"


@dataclass(frozen=True)
class Speed:
    """One workload, against the artifact that it was made from."""

    label: str
    where: str
    """ "onnxruntime on cpu"."""
    verdict: Verdict


@dataclass(frozen=True)
class ZeroRow:
    """One artifact that was pruned, or made of one that was."""

    artifact: str
    before: str
    """What its bytes and speed are held against; "" where that is not in the report."""
    pattern: str
    """ "unstructured", "2:4", "removed: neurons 50 %"."""
    removes: bool
    """Whether parts were removed, in place of zeros."""
    asked: float | None
    reached: float | None
    """Share of zeros in the pruned matrices; None where parts were removed, and where the report does not tell."""
    of_all: float
    """Share of all parameters that are zero."""
    parameters: int
    nonzero: int
    removed: float
    """Share of the parameters of `before` that are gone."""
    weight_bytes: int
    weight_bytes_before: int | None
    compressed: float | None
    compressed_before: float | None
    speeds: tuple[Speed, ...]
    timed: bool
    """Whether this artifact was timed at all."""
    others: tuple[str, ...]
    """Stages after pruning that change speed too, such as "quantize int8"."""

    @property
    def cells(self) -> tuple[str, ...]:
        """As a table shows it."""
        gone = f" ({percent(self.removed, 1)} removed)" if self.removed > 0 else ""
        return (
            self.artifact, self.pattern, _share(self.asked), _share(self.reached), percent(self.of_all, 1), f"{self.parameters:,}{gone}",
            f"{self.nonzero:,}", _change(self.weight_bytes_before, self.weight_bytes), _change(self.compressed_before, self.compressed),
            "; ".join(f"{s.label}: {_said(s.verdict)}" for s in self.speeds) or ("nothing to compare with" if self.timed else "not timed"),
        )  # fmt: skip


def zeros(report: Report) -> list[ZeroRow]:
    """A row for each pruned artifact of the report and for all that were made of it; none where nothing was pruned."""
    known = {m.digest: m for m in report.manifests}
    rows = []
    for digest, manifest in known.items():
        chain = _chain(manifest, known)
        number = next((n for n, m in enumerate(chain) if m.record is not None and m.record.kind == "prune"), None)
        if number is not None:
            rows.append(_row(report, digest, chain, number, known))
        elif manifest.extra.get("pruned"):
            rows.append(_row(report, digest, chain, None, known))
    return rows


def zero_words(report: Report, rows: Sequence[ZeroRow] | None = None) -> list[str]:
    """What a reader should take from the rows, a sentence or two for each artifact; of those that were not timed, only of the last
    where none was."""
    rows = zeros(report) if rows is None else rows
    timed = [row for row in rows if row.timed]
    if rows and not timed:
        last = rows[-1]
        more = "" if last.removes else "; zeros alone make no dense kernel faster"
        told = f"{_what(last)}, and no speed was measured: what that brings is not known. Measure it with squeeze bench{more}."
        return [f"{last.artifact}: {text}" for text in (told, *_compressed(last))]
    return [f"{row.artifact}: {text}" for row in timed for text in _of(report, row)]


def _of(report: Report, row: ZeroRow) -> Iterator[str]:
    where = row.speeds[0].where if row.speeds else ""
    gains = [s for s in row.speeds if s.verdict.sense == "better"]
    called = [s for s in row.speeds if s.verdict.sense != "unknown"]
    if not row.speeds:
        yield f"{_what(row)}; what it was made from was not timed in the same runtime and workload, so no gain or loss of speed is shown."
    elif row.others:
        told = "; ".join(f"{s.label}: {_said(s.verdict)}" for s in row.speeds)
        yield f"{_what(row)}, and {' and '.join(row.others)} came after it: the change of speed ({told}) is that of all of them together."
    elif not called:
        yield f"{_what(row)}; {row.speeds[0].verdict.words}, so nothing is said of speed. Raise bench.repeats."
    elif gains:
        best = gains[0].verdict
        rest = [s for s in called if s.verdict.sense != "better"]
        also = "" if not rest else f"; {', '.join(f'{s.label}: {_said(s.verdict)}' for s in rest)}"
        yield f"{_what(row)}, and in {where} that is {best.words} {best.bounds} ({gains[0].label}){also}."
    else:
        told = "; ".join(f"{s.label}: {_said(s.verdict)}" for s in called)
        yield f"{_what(row)}, and in {where} that brought no speed ({told})." + (
            "" if row.removes else f" {_remedy(report, row)}"
        )
    yield from _compressed(row)


def _what(row: ZeroRow) -> str:
    if row.removes:
        return f"{percent(row.removed, 1)} of the parameters are removed"
    share = row.reached if row.reached is not None else row.asked
    if share is None:
        return f"{percent(row.of_all, 1)} of all weights are zero"
    return f"{percent(share, 1)} of the weights in its pruned matrices are zero ({percent(row.of_all, 1)} of all)"


def _remedy(report: Report, row: ZeroRow) -> str:
    """What would turn these zeros, or others in their place, into speed."""
    on_gpu = any(s.where.endswith("cuda") for s in row.speeds)
    said = ["Its kernels multiply by zeros as by any number."]
    if row.pattern == "2:4":
        said.append(
            "This pattern is what the sparse tensor cores of NVIDIA GPUs (compute capability 8.0 and later) run, in 16 or 8 bits; "
            "in 16, squeeze's runtime torch.sparse does (squeeze bench --runtime torch.sparse --device cuda --dtype float16); "
            "elsewhere, for speed, " + REMOVE + "."
        )
    elif re.fullmatch(r"\d+:\d+", row.pattern):
        said.append(f"No runtime here has kernels for {row.pattern}; GPUs have them for 2:4. For speed, {REMOVE}.")
    elif row.pattern == "row":
        said.append(f"Rows that are zero as a whole can go: for speed, {REMOVE}.")
    else:
        gpu = "or prune 2:4 for" if on_gpu else "or prune 2:4 and run it on"
        said.append(
            f"For speed, {REMOVE}, {gpu} the sparse tensor cores of an NVIDIA GPU (compute capability 8.0 and later, through torch)."
        )
    if (row.reached or 0) >= PACKED and not on_gpu:
        said.append(
            "With so many zeros OpenVINO may pack the weights: 8-bit weights and activations, a processor with AMX, and its property "
            "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE set"
            + ("." if "amx_int8" in report.environment.cpu_flags else "; this processor has no AMX.")
        )
    return " ".join(said)


def _compressed(row: ZeroRow) -> Iterator[str]:
    now, then = row.compressed, row.compressed_before
    if row.removes or row.others or now is None or then is None or then <= 0:
        return
    sizes = f"{amount(then, 'bytes')} → {amount(now, 'bytes')}"
    files = row.weight_bytes_before
    dense = (
        ", while its files take as much disk as before" if files and abs(row.weight_bytes / files - 1) < 0.01 else ""
    )
    if now < 0.995 * then:
        yield f"compressed with zstd it is {percent(1 - now / then, 1)} smaller ({sizes}){dense}."
    else:
        yield f"compressed with zstd it is no smaller ({sizes})."


# One artifact


def _row(
    report: Report, digest: Digest, chain: Sequence[Manifest], number: int | None, known: Mapping[Digest, Manifest]
) -> ZeroRow:
    manifest = chain[0]
    stage = None if number is None else chain[number].record
    before, alike = (None, True) if number is None else _before(chain, number, known)
    later = () if number is None or alike else tuple(_later(chain, number, before))
    remove = _removed(stage)
    numel, zero = _counted(chain)
    measured = [m for m in report.measurements if m.artifact_digest == digest]
    theirs = [] if before is None else [m for m in report.measurements if m.artifact_digest == before.digest]
    gone = 0.0 if before is None or not before.parameters else 1 - manifest.parameters / before.parameters
    asked = None if stage is None or remove else _asked(stage)
    return ZeroRow(
        artifact=manifest.name, before="" if before is None else before.name, pattern=remove or _pattern(chain, stage),
        removes=bool(remove), asked=asked,
        reached=zero / numel if numel and not remove else None,
        of_all=1 - manifest.nonzero_parameters / manifest.parameters if manifest.parameters else 0.0,
        parameters=manifest.parameters, nonzero=manifest.nonzero_parameters, removed=max(0.0, gone),
        weight_bytes=manifest.weight_bytes, weight_bytes_before=None if before is None else before.weight_bytes,
        compressed=_value(measured, "compressed_bytes"), compressed_before=_value(theirs, "compressed_bytes"),
        speeds=tuple(_speeds(theirs, measured)), timed=any(m.quantity in SPEEDS and m.values for m in measured), others=later,
    )  # fmt: skip


def _chain(manifest: Manifest, known: Mapping[Digest, Manifest]) -> list[Manifest]:
    """The artifact and what it was made from, itself first."""
    found = [manifest]
    while (parent := known.get(found[-1].parent or "")) is not None and parent not in found:
        found.append(parent)
    return found


def _before(chain: Sequence[Manifest], number: int, known: Mapping[Digest, Manifest]) -> tuple[Manifest | None, bool]:
    """What `chain[0]` is held against, and whether that has gone the same way: what was pruned, as it was before, exported and treated
    alike; else that itself, or its export where this is one."""
    origin = known.get(chain[number].parent or "")
    if origin is None or number == 0:
        return origin, True
    wanted = [_way(m) for m in chain[:number]]
    for candidate in known.values():
        path = _chain(candidate, known)
        if origin in path and [_way(m) for m in path[: path.index(origin)]] == wanted:
            return candidate, True
    if chain[0].format == origin.format:
        return origin, False
    return next((m for m in known.values() if m.parent == origin.digest and m.format == chain[0].format), None), False


def _way(manifest: Manifest) -> tuple[str, str]:
    """How an artifact was made, so that two that were made alike compare."""
    record = manifest.record
    return (
        manifest.format,
        "" if record is None else f"{record.kind} {json_text(dict(sorted(record.settings.items())))}",
    )


def _later(chain: Sequence[Manifest], number: int, before: Manifest | None) -> Iterator[str]:
    """Stages since pruning that change speed too, in words; training alone does not."""
    for step, made_from in zip(reversed(chain[:number]), reversed(chain[1 : number + 1]), strict=True):
        record = step.record
        if record is None:
            continue
        if step.format == "torch" and (record.kind in ("quantize", "qat") or step.parameters != made_from.parameters):
            yield f"{record.kind} {record.settings.get('scheme', '')}".strip()
        elif step.format == "onnx" and before is not None and before.record is not None and _way(step) != _way(before):
            yield "an export of another kind"


def _removed(record: StageRecord | None) -> str:
    """Which parts a prune stage removed, in words; "" for one that set weights to zero."""
    remove: Any = None if record is None else record.settings.get("remove")
    if not isinstance(remove, dict):
        return ""
    parts = {name: remove.get(name) for name in ("layers", "heads", "neurons") if remove.get(name) is not None}
    return "removed: " + ", ".join(f"{name} {_how_many(value)}" for name, value in parts.items()) if parts else ""


def _how_many(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"but {', '.join(map(str, value))}"
    return percent(value, 0) if value < 1 else f"down to {value}"


def _asked(stage: StageRecord) -> float | None:
    """Share of zeros that the stage was asked for; N:M says it by itself."""
    sparsity, pattern = stage.settings.get("sparsity"), re.fullmatch(r"(\d+):(\d+)", str(stage.settings.get("pattern")))
    if pattern is not None:
        return int(pattern[1]) / int(pattern[2])
    return float(sparsity) if isinstance(sparsity, int | float) else None


def _pattern(chain: Sequence[Manifest], stage: StageRecord | None) -> str:
    if stage is not None:
        return str(stage.settings.get("pattern", "unstructured"))
    each = {str(row.get("pattern")) for row in _pruned(chain).values()}
    return ", ".join(sorted(each))


def _pruned(chain: Sequence[Manifest]) -> dict[str, dict[str, Any]]:
    """Matrix -> what pruning made of it, as the nearest artifact of the chain tells."""
    for manifest in chain:
        found = manifest.extra.get("pruned")
        if isinstance(found, dict) and found:
            return {name: row for name, row in found.items() if isinstance(row, dict)}
    return {}


def _counted(chain: Sequence[Manifest]) -> tuple[int, float]:
    """(weights, zeros) of the pruned matrices, as the last stage of the chain that lists them found them; (0, 0) where none does."""
    pruned = _pruned(chain)
    for manifest in chain:
        rows = {} if manifest.record is None else {row.name: row for row in manifest.record.layers}
        listed = [rows[name] for name in pruned if name in rows]
        if pruned and len(listed) == len(pruned):
            sizes = [_product(row.shape) for row in listed]
            return sum(sizes), sum(size * row.sparsity for size, row in zip(sizes, listed, strict=True))
    return 0, 0.0


def _product(shape: Sequence[int]) -> int:
    size = 1
    for number in shape:
        size *= number
    return size


def _speeds(before: Sequence[Measurement], after: Sequence[Measurement]) -> Iterator[Speed]:
    """Each timed workload that both ran in one runtime, with the same device, threads and type; torch.sparse takes no dense model, and is
    held against torch."""
    for quantity in SPEEDS:
        judge = QUANTITIES[quantity].judge
        for m in after:
            old = next((o for o in before if m.quantity == quantity and _like(o) == _like(m) and o.values), None)
            if old is not None and m.values and judge is not None:
                yield Speed(label(m), f"{m.runtime} on {m.device}", judge(old, m))


def _like(m: Measurement) -> tuple[object, ...]:
    return m.quantity, m.workload, DENSE.get(m.runtime, m.runtime), m.device, m.threads, m.dtype


def _value(measured: Sequence[Measurement], quantity: str) -> float | None:
    return next((stats.median(m.values) for m in measured if m.quantity == quantity and m.values), None)


def _said(verdict: Verdict) -> str:
    return f"{verdict.words} {verdict.bounds}".strip()


def _share(value: float | None) -> str:
    return "" if value is None else percent(value, 1)


def _change(before: float | None, after: float | None) -> str:
    if after is None:
        return "not measured"
    now = amount(after, "bytes")
    return now if before is None or before == after else f"{amount(before, 'bytes')} → {now}"
