"""Time by operator and by layer, worked by hand."""

from squeeze.provenance import digest_bytes
from squeeze.report.profiles import MOST_ROWS, profile_tables
from squeeze.report.schema import Profile, ProfileRow, Workload


def profile(*rows: tuple[str, str, float, float]) -> Profile:
    made = tuple(ProfileRow(operator=o, layer=layer, seconds=s, count=n) for o, layer, s, n in rows)
    return Profile(
        artifact="a", artifact_digest=digest_bytes(b"a"), runtime="onnxruntime", threads=2, calls=3, seconds=1.0, rows=made,
        workload=Workload(kind="fixed", batch=1, sequence=8),
    )  # fmt: skip


def test_rows_are_summed_both_ways_longest_first() -> None:
    operators, layers = profile_tables(profile(("MatMul", "0", 1, 2), ("Gelu", "0", 3, 1), ("MatMul", "", 5, 5)))
    assert [(row.name, row.seconds, row.share, row.count) for row in operators.rows] == [
        ("MatMul", 6, 6 / 9, 7),
        ("Gelu", 3, 3 / 9, 1),
    ]
    assert [(row.name, row.seconds) for row in layers.rows] == [("(no layer)", 5), ("0", 4)]
    assert (operators.by, layers.by) == ("operator", "layer")


def test_what_does_not_fit_is_summed_in_the_last_row() -> None:
    operators, layers = profile_tables(profile(*(("MatMul", str(n), 1.0 + n, 1) for n in range(MOST_ROWS + 3))))
    assert len(layers.rows) == MOST_ROWS
    assert layers.rows[-1].name == "(4 more)"
    assert sum(row.share for row in layers.rows) == 1
    assert len(operators.rows) == 1


def test_a_profile_of_no_time_has_no_share() -> None:
    operators, _ = profile_tables(profile(("MatMul", "", 0, 1)))
    assert operators.rows[0].share == 0
    assert profile_tables(profile())[0].rows == ()
