"""Where the time of one call goes, summed by operator and by layer: what the terminal and the page both show."""

from dataclasses import dataclass

from squeeze.report.schema import Profile
from squeeze.report.text import amount, percent

MOST_ROWS = 12
COLUMNS = ("a call", "share", "kernels")


@dataclass(frozen=True)
class ProfileRow:
    """One operator, or one layer, of a profiled call."""

    name: str
    seconds: float
    share: float
    """Of the time inside kernels."""
    count: float
    """Kernels run in one call."""

    @property
    def cells(self) -> tuple[str, ...]:
        """As a table shows it."""
        return self.name, amount(self.seconds, "s"), percent(self.share, 1), f"{self.count:g}"


@dataclass(frozen=True)
class ProfileTable:
    """One profile, by operator or by layer, longest first."""

    by: str
    """ "operator" or "layer"."""
    where: str
    seconds: float
    """Of one call, profiling included."""
    rows: tuple[ProfileRow, ...]
    """At most MOST_ROWS; what is left out is the last row."""


def profile_tables(profile: Profile) -> tuple[ProfileTable, ProfileTable]:
    """By operator and by layer."""
    return _table(profile, "operator"), _table(profile, "layer")


def _table(profile: Profile, by: str) -> ProfileTable:
    inside = sum(row.seconds for row in profile.rows)
    sums: dict[str, tuple[float, float]] = {}
    for row in profile.rows:
        name = getattr(row, by) or "(no layer)"
        seconds, count = sums.get(name, (0.0, 0.0))
        sums[name] = seconds + row.seconds, count + row.count
    ordered = sorted(sums.items(), key=lambda item: -item[1][0])
    shown, rest = (ordered, []) if len(ordered) <= MOST_ROWS else (ordered[: MOST_ROWS - 1], ordered[MOST_ROWS - 1 :])
    if rest:
        left = (sum(seconds for _, (seconds, _) in rest), sum(count for _, (_, count) in rest))
        shown = [*shown, (f"({len(rest)} more)", left)]
    rows = tuple(
        ProfileRow(name, seconds, seconds / inside if inside else 0.0, count) for name, (seconds, count) in shown
    )
    where = f"{profile.artifact}, {profile.runtime}, {profile.workload.label}, {profile.threads} threads"
    return ProfileTable(by, where, profile.seconds, rows)
