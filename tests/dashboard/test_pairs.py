"""Any two artifacts: the same rows as a comparison gives, for every ordered pair that there is room for."""

from itertools import permutations
from typing import Any

from squeeze.dashboard import pairs
from squeeze.dashboard.readings import Readings
from squeeze.provenance import digest_bytes
from squeeze.report.compare import compare


def test_every_ordered_pair_has_the_rows_that_a_comparison_gives(make: Any) -> None:
    report = make.full()
    found, left = pairs.within(Readings("0" * 12, report))
    names = ("0-source", "1-quantize", "2-broken")
    assert list(found) == [f"{a}|{b}" for a, b in permutations(names, 2)]
    assert left == 0
    for a, b in permutations(names, 2):
        rows = compare(report, report, before_artifact=a, after_artifact=b).rows
        assert found[f"{a}|{b}"] == [
            (r.label, r.runtime, r.before.text, r.after.text, r.words, r.bounds, r.sense) for r in rows
        ]


def test_the_other_way_round_says_the_opposite(make: Any) -> None:
    found, _ = pairs.within(Readings("0" * 12, make.full()))
    there, back = (
        next(row for row in found[key] if row[0] == "latency, 1×128")
        for key in ("0-source|1-quantize", "1-quantize|0-source")
    )
    assert (there[4], there[6], back[4], back[6]) == ("2.00× faster", "better", "2.00× slower", "worse")
    assert (there[2], there[3]) == (back[3], back[2])


def test_a_side_that_failed_is_said_to_have(make: Any) -> None:
    found, _ = pairs.within(Readings("0" * 12, make.full()))
    assert [row[4:] for row in found["0-source|2-broken"]] == [
        ("not measured in the second: killed by SIGKILL", "", "failed")
    ]


def test_beyond_the_bound_pairs_with_source_and_result_come_first_and_the_rest_is_counted() -> None:
    keys = [f"m{n}" for n in range(30)]
    chosen, left = pairs.chosen_pairs(keys, ("m0", "m29"), most=200)
    assert len(chosen) == 200
    assert left == 30 * 29 - 200
    assert {pair for pair in permutations(keys, 2) if set(pair) & {"m0", "m29"}} <= set(chosen)
    assert pairs.chosen_pairs(keys[:20], ("m0", "m1")) == (list(permutations(keys[:20], 2)), 0), (
        "twenty artifacts have all theirs"
    )


def test_results_of_different_runs_are_paired_with_what_to_know_before_believing_it(make: Any) -> None:
    source, result = make.manifest("0-source"), make.manifest("1-quantize")
    rows = [make.measured(m, "latency", [v, v * 1.01, v * 0.99]) for m, v in ((source, 2.0), (result, 1.0))]
    first = make.report((source, result), rows)
    second = make.report(
        (source, result), [m.model_copy(update={"values": tuple(v / 2 for v in m.values)}) for m in rows], title="b"
    )
    found, told = pairs.across([Readings("a" * 12, first), Readings("b" * 12, second)])
    a, b = "a" * 12, "b" * 12
    assert list(found) == [f"{a}/1-quantize|{b}/1-quantize", f"{b}/1-quantize|{a}/1-quantize"]
    assert found[f"{a}/1-quantize|{b}/1-quantize"][0][4] == "2.00× less"
    assert "not in turn" in told[f"{a}|{b}"][0]


def test_at_most_so_many_results_are_paired_and_the_newest_first(make: Any) -> None:
    source = make.manifest("a")
    every = [
        Readings(
            f"{n:012}",
            make.report([source], [make.measured(source, "weight_bytes", [1.0 + n], repeat=())], title=str(n)),
        )
        for n in range(25)
    ]
    found, told = pairs.across(every)
    assert len(found) == len(told) == pairs.MOST
    assert f"{24:012}/a|{0:012}/a" in found
    assert f"{0:012}/a|{1:012}/a" not in found


def test_artifacts_of_one_name_are_paired_apart(make: Any) -> None:
    twins = [make.manifest("1-prune", inputs=digest_bytes(bytes([n]))) for n in range(2)]
    rows = [
        make.measured(m, "weight_bytes", [size], unit="bytes", repeat=())
        for m, size in zip(twins, (100.0, 50.0), strict=True)
    ]
    found, _ = pairs.within(Readings("0" * 12, make.report(twins, rows)))
    assert len(found) == 2
    assert sorted(row[4] for rows in found.values() for row in rows) == [
        "200.0\u00a0% of before",
        "50.0\u00a0% of before",
    ]
