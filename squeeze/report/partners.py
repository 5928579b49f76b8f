"""Which measurement of the source one of the result is held against: like with like, found at once among ten thousand."""

from collections.abc import Sequence

from squeeze.provenance import Digest
from squeeze.report.schema import Measurement

Groups = dict[tuple[object, ...], list[Measurement]]
SCORED_IN = {"onnxruntime-genai": "onnxruntime"}
"""Runtimes that generate and score nothing, and where the bench scores the same graph."""
FAILED_QUALITY = "quality"
"""The quantity of a quality pass that gave nothing: it stands for every quantity that would have come of it."""


def groups(measured: Sequence[Measurement], sources: Sequence[Digest]) -> Groups:
    """All that was measured of the sources, by what makes two measurements comparable."""
    found: Groups = {}
    for m in measured:
        if m.artifact_digest in sources:
            found.setdefault((m.artifact_digest, *_like(m)), []).append(m)
            if m.quantity == FAILED_QUALITY:
                found.setdefault((m.artifact_digest, FAILED_QUALITY), []).append(m)
    return found


def partner(known: Groups, sources: Sequence[Digest], after: Measurement, *, scored: bool) -> Measurement | None:
    """The source's measurement to hold against `after`: in the same runtime if there is one, else the first.

    Where quality failed for the source, that failure is the partner of what was `scored`: no other runtime silently takes its place.
    """
    for source in sources:
        alike = list(known.get((source, *_like(after)), ()))
        if scored:
            alike += known.get((source, FAILED_QUALITY), ())
        if alike:
            return next((m for m in alike if m.runtime == after.runtime), alike[0])
    return None


def _like(m: Measurement) -> tuple[object, ...]:
    return m.quantity, m.workload, m.device, m.threads, m.dtype
