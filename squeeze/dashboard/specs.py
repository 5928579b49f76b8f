"""The charts: for each kind a question, how to read the answer, and a Vega-Lite specification without data.

How each is drawn stands in `drawings`. The data source is named "rows", and colours come from the config (`themes`), names of ranges
included, so that one specification serves both themes, the page and an exported image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from squeeze.dashboard import drawings
from squeeze.dashboard.drawings import Columns, Layers, Spec
from squeeze.dashboard.rows import Variant

VEGA_LITE = "6.4"
"""Version that the specifications are written for, as vl_convert names it."""
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"


@dataclass(frozen=True)
class Chart:
    """One kind of chart."""

    title: str
    """The question that it answers."""
    about: str
    empty: str
    """Why there is nothing to draw, where there is not."""
    columns: Columns
    """Of the table behind it, and of the tooltips."""
    layers: Callable[[Variant, Columns], Layers]
    height: Any = 320

    def spec(self, variant: Variant) -> Spec:
        """Vega-Lite without data; the page names "rows"."""
        return {
            "$schema": SCHEMA, "description": f"{self.title} {variant.label}", "title": None, "width": "container", "height": self.height,
            "data": {"name": "rows"}, "layer": self.layers(variant, self.columns),
        }  # fmt: skip


CHARTS: dict[str, Chart] = {
    "pareto": Chart(
        "What does each artifact lose, and what does it gain for that?",
        "Better is towards the top left. The area is the size on disk, a line joins an artifact with what it was made from, squares were "
        "made by another tool, and a point is dimmed where another is at least as good in both values and shown to be better in one; "
        "rules are 95 % intervals.",
        "No artifact has both a quality (perplexity, accuracy or cosine) and a speed, size or memory.",
        (
            ("artifact", "artifact"), ("runtime", "runtime"), ("stage", "made by"), ("y_text", "quality"), ("x_text", "cost"),
            ("size", "on disk"), ("standing", "standing"),
        ),
        drawings.pareto, 400,
    ),
    "gains": Chart(
        "How many times better is it than the source?",
        "Bars begin at 1×, no change; to the right is better, whichever way the quantity counts. A rule is the 95 % interval, and only "
        "where it does not reach 1× is anything called better or worse.",
        "Nothing was measured of both the source and another artifact.",
        (
            ("label", "quantity"), ("runtime", "runtime"), ("before", "before"), ("after", "after"), ("verdict", "verdict"),
            ("ratio_text", "times better"), ("sense", "sense"), ("evidence", "from"), ("note", "note"),
        ),
        drawings.gains, {"step": 40},
    ),
    "latency": Chart(
        "How long do calls take, the slow ones included?",
        "A line rises to the share of calls that took so long or less; marks are the 50th, 95th and 99th percentile of all timed calls. "
        "Of more than 2,000 values a chart draws so many at even ranks, each exactly, and its table says how many.",
        "No latency was measured.",
        (("series", "artifact"), ("mark", "mark"), ("x", "seconds"), ("y", "share of calls"), ("text", "value"), ("note", "values")),
        drawings.latency, 320,
    ),
    "generation": Chart(
        "How long until the first token, and for each one after it?",
        "Time by the length of the prompt; a rule is the 95 % interval over repeats.",
        "No text was generated.",
        (("series", "artifact"), ("workload", "workload"), ("x", "prompt tokens"), ("text", "time")),
        drawings.generation, 320,
    ),
    "load": Chart(
        "How many requests a second, before the slowest become too slow?",
        "Better is towards the top left: more requests answered, and a shorter 99th percentile counted from each request's arrival; a tick "
        "is the limit that was asked for, and a line joins loads of more and more callers.",
        "No load test was run.",
        (
            ("series", "artifact"), ("workload", "load"), ("kind", "requests come"), ("x_text", "answered"), ("y_text", "99th percentile"),
            ("limit_text", "limit"),
        ),
        drawings.load, 340,
    ),
    "layers": Chart(
        "What became of each layer, and which lose most?",
        "Each cell is one weight matrix, from the first layer to the last; a dash was not measured, and its tooltip says why.",
        "No stage kept figures of its layers.",
        (("name", "matrix"), ("layer", "layer"), ("part", "part"), ("text", "value"), ("shape", "shape"), ("note", "note")),
        drawings.layers, {"step": 20},
    ),
    "time": Chart(
        "Where does the time go?",
        "Time inside kernels in one call, as the runtime's profiler counted it; the shortest are one line.",
        "Nothing was profiled: squeeze bench --profile.",
        (("series", "artifact"), ("name", "operator or layer"), ("text", "time"), ("share_text", "share"), ("kernels", "kernels")),
        drawings.time, {"step": 10},
    ),
    "training": Chart(
        "Did it learn, and from what?",
        "Each loss's part over the tokens trained on, weights included, and the metric on examples held out; a diamond is the step whose "
        "weights came out.",
        "No stage trained.",
        (("series", "curve"), ("step", "step"), ("x", "tokens"), ("text", "value"), ("note", "note")),
        drawings.training, 300,
    ),
    "floor": Chart(
        "How near is it to the best that this machine can do?",
        "100 % is the time of reading every weight once, or of every operation at the machine's best rate, whichever is longer; far below, "
        "something else takes the time.",
        "The machine was not measured, or nothing timed has a known cost: squeeze bench machine.",
        (("series", "artifact"), ("text", "reached"), ("measured", "measured"), ("floor", "floor"), ("bound", "bound by")),
        drawings.floor, {"step": 24},
    ),
    "memory": Chart(
        "How much memory does it take?",
        "Resident memory of the process before the model is opened, with it after the calls, and at its peak, end to end.",
        "No memory was measured.",
        (("series", "artifact"), ("piece", "until"), ("text", "measured"), ("interval", "interval"), ("added", "more than before")),
        drawings.memory, {"step": 28},
    ),
    "history": Chart(
        "Has it become better or worse from run to run?",
        "Medians with 95 % intervals, on one kind of machine each; a diamond begins a new level, which chance alone would show in one of a "
        "hundred series (rank sums against random orders; twelve runs are the fewest that can tell).",
        "No title was run twice on one kind of machine: there is nothing to follow.",
        (("series", "run"), ("started", "started"), ("git", "commit"), ("text", "value"), ("change_text", "change")),
        drawings.history, 320,
    ),
}  # fmt: skip
"""In the order of the page."""
