"""Every loss against its formula in numpy, over ragged texts whose padding must never count."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

from squeeze.distillation.answers import Answers, Needs, Top
from squeeze.distillation.losses import LOSSES, Place, agreement, relation_heads, softness
from squeeze.distillation.objective import bind, projection
from squeeze.distillation.settings import LossName, LossTerm
from squeeze.errors import TrainError

LENGTHS = (5, 3, 1)
TASKS = {
    "causal-lm": ("kl", "reverse-kl", "skewed-kl", "js", "mse", "labels", "hidden", "cosine", "attention", "relations"),
    "text-classification": (
        "kl", "reverse-kl", "skewed-kl", "js", "mse", "labels", "hidden", "cosine", "attention", "relations",
    ),
    "feature-extraction": ("hidden", "cosine", "attention", "relations", "embedding", "similarity"),
}  # fmt: skip
CASES = [(task, name) for task, names in TASKS.items() for name in names]


def draw(task: str, seed: int, width: int = 8, classes: int = 7) -> Answers:
    """Answers of one network to three texts, random in the padding too."""
    torch.manual_seed(seed)
    b, n = len(LENGTHS), max(LENGTHS)
    keys = mask()[:, None, None, :] & (torch.ones(n, n).tril().bool() if task == "causal-lm" else True)
    scores = torch.randn(b, 4, n, n).masked_fill(~keys, -torch.inf)
    return Answers(
        logits=torch.randn(b, n, classes) if task == "causal-lm" else torch.randn(b, classes),
        embedding=torch.nn.functional.normalize(torch.randn(b, width), dim=-1),
        hidden={layer: torch.randn(b, n, width) for layer in range(4)},
        attentions={layer: scores.roll(layer, 1).softmax(-1) for layer in range(1, 4)},
        relations={layer: tuple(torch.randn(b, n, w) for w in (width, width, width)) for layer in range(1, 4)},  # type: ignore[misc]
        heads=4,
    )


def mask() -> torch.Tensor:
    return torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]


def place(task: str, layers: tuple[tuple[int, int], ...] = (), **changes: Any) -> Place:
    torch.manual_seed(9)
    inputs = {
        "input_ids": torch.randint(0, 7, mask().shape),
        "attention_mask": mask().long(),
        "labels": torch.tensor([2, -100, 5]),
    }
    return Place(task, inputs | changes, layers, nn.ModuleDict())


def compute(name: str, task: str, student: Answers, teacher: Answers, at: Place | None = None, **settings: Any) -> Any:
    (bound,) = bind([LossTerm(kind=name, **settings)], task, 3, 3)  # type: ignore[arg-type]
    return bound.loss.compute(bound.term, student, teacher, at or place(task, bound.layers))


def leaves(answers: Answers) -> list[torch.Tensor]:
    parts = [answers.logits, answers.embedding, *answers.hidden.values(), *answers.attentions.values()]
    parts += [part for three in answers.relations.values() for part in three]
    return [part for part in parts if part is not None]


def array(tensor: torch.Tensor | None) -> Any:
    assert tensor is not None
    return tensor.detach().numpy().astype(np.float64)


def softmax(z: Any) -> Any:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def counted(task: str) -> list[tuple[Any, float]]:
    """Index into [b, n] -> what it counts; the rows of logits of causal-lm are those, of texts the texts."""
    if task == "causal-lm":
        places = [(row, at) for row, length in enumerate(LENGTHS) for at in range(length - 1)]
        return [(at, 1 / len(places)) for at in places]
    return [((row, at), 1 / len(LENGTHS) / length) for row, length in enumerate(LENGTHS) for at in range(length)]


def mean_of_rows(task: str, per_row: Any) -> float:
    """From [b, n] or, of texts, [b]."""
    if task == "causal-lm":
        return float(sum(weight * per_row[at] for at, weight in counted(task)))
    return float(per_row.mean())


def kl(p: Any, q: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * np.log(p / q), 0).sum(-1)


def formula(name: str, task: str, student: Answers, teacher: Answers) -> float:
    """The loss with its default settings, in its plainest form."""
    if name in ("kl", "reverse-kl", "skewed-kl", "js"):
        t = 2.0 if task == "text-classification" else 1.0
        p, q = softmax(array(teacher.logits) / t), softmax(array(student.logits) / t)
        m = (p + q) / 2
        value = {
            "kl": kl(p, q), "reverse-kl": kl(q, p), "skewed-kl": kl(p, 0.1 * p + 0.9 * q), "js": (kl(p, m) + kl(q, m)) / 2,
        }[name]  # fmt: skip
        return t * t * mean_of_rows(task, value)
    if name == "mse":
        return mean_of_rows(task, ((array(student.logits) - array(teacher.logits)) ** 2).mean(-1))
    if name == "labels":
        inputs = place(task).inputs
        q = softmax(array(student.logits))
        if task == "causal-lm":
            goal = np.roll(inputs["input_ids"].numpy(), -1, axis=1)
            return mean_of_rows(task, -np.log(np.take_along_axis(q, goal[..., None], -1)[..., 0]))
        return float(-(np.log(q[0, 2]) + np.log(q[2, 5])) / 3)
    if name == "embedding":
        return float(1 - (array(student.embedding) * array(teacher.embedding)).sum(-1).mean())
    if name == "similarity":
        s, t_ = (array(e) @ array(e).T for e in (student.embedding, teacher.embedding))
        return float(np.mean([(s[i, j] - t_[i, j]) ** 2 for i in range(3) for j in range(3) if i != j]))
    weights = counted(task)
    pairs = {"hidden": range(4), "cosine": [3], "attention": range(1, 4), "relations": [3]}[name]
    total = 0.0
    for layer in pairs:
        for at, weight in weights:
            if name in ("hidden", "cosine"):
                one, other = array(student.hidden[layer])[at], array(teacher.hidden[layer])[at]
                value = ((one - other) ** 2).mean()
                if name == "cosine":
                    value = 1 - one @ other / np.linalg.norm(one) / np.linalg.norm(other)
            elif name == "attention":
                row, query = at
                value = kl(*(array(side.attentions[layer])[row, :, query] for side in (teacher, student))).mean()
            else:
                value = np.mean([related(part, at, task, student, teacher, layer) for part in range(3)])
            total += weight * float(value) / len(pairs)
    return total


def related(part: int, at: tuple[int, int], task: str, student: Answers, teacher: Answers, layer: int) -> float:
    """KL of one row of the relations of queries, keys or values; mean over 4 heads."""
    row, query = at
    keys = query + 1 if task == "causal-lm" else LENGTHS[row]
    values = []
    for head in range(4):
        both = []
        for side in (teacher, student):
            states = array(side.relations[layer][part])[row]
            size = states.shape[-1] // 4
            a = states[:keys, head * size : (head + 1) * size]
            both.append(softmax(states[query, head * size : (head + 1) * size] @ a.T / np.sqrt(size)))
        values.append(kl(*both))
    return float(np.mean(values))


def test_the_names_of_recipes_are_those_of_the_table() -> None:
    assert set(get_args(LossName)) == set(LOSSES)
    assert {(task, name) for name, loss in LOSSES.items() for task in loss.tasks} - {("causal-lm", "sequence")} == set(
        CASES
    )  # test_generate.py has it
    assert all(loss.reads <= set(LossTerm.model_fields) - {"kind", "weight"} for loss in LOSSES.values())


@pytest.mark.parametrize(("task", "name"), CASES)
def test_a_loss_is_its_formula(task: str, name: str) -> None:
    student, teacher = draw(task, 1), draw(task, 2)
    found = float(compute(name, task, student, teacher))
    assert found > 0.01
    assert found == pytest.approx(formula(name, task, student, teacher), rel=1e-5)


@pytest.mark.parametrize(("task", "name"), CASES)
def test_a_loss_is_computed_in_full_precision_where_networks_are_not(task: str, name: str) -> None:
    student, teacher = draw(task, 1), draw(task, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = compute(name, task, student, teacher)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(formula(name, task, student, teacher), rel=1e-5)


@pytest.mark.parametrize(("task", "name"), CASES)
def test_padding_never_counts_and_gradients_reach_the_student_alone(task: str, name: str) -> None:
    values = []
    for noise in (0.0, 1e3):
        student, teacher = draw(task, 1), draw(task, 2)
        padding = ~mask()
        for side in (student, teacher):
            for each in leaves(side):
                if each.shape[:2] == padding.shape and each.ndim == 3:
                    each[padding] += noise
                each.requires_grad_()
        value = compute(name, task, student, teacher)
        reached = torch.autograd.grad(value, leaves(student), allow_unused=True, retain_graph=False)
        assert any(each is not None and bool(each.any()) for each in reached)
        for each in reached:
            if each is not None and each.ndim == 3 and each.shape[:2] == padding.shape:
                assert not each[padding].any()
        values.append(float(value.detach()))
    assert values[1] == pytest.approx(values[0], rel=1e-5)


@pytest.mark.parametrize(("task", "name"), [case for case in CASES if case[1] not in ("labels", "relations")])
def test_a_student_that_is_its_teacher_loses_nothing(task: str, name: str) -> None:
    assert float(compute(name, task, draw(task, 1), draw(task, 1))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("task", "name"), [case for case in CASES if case[1] != "similarity"])
def test_parts_of_a_batch_add_up_to_the_whole(task: str, name: str) -> None:
    """Weighted with the objective's units: predicted tokens, or texts."""
    student, teacher = draw(task, 1), draw(task, 2)
    whole = float(compute(name, task, student, teacher))
    (bound,) = bind([LossTerm(kind=name)], task, 3, 3)  # type: ignore[arg-type]
    total = 0.0
    for rows, units in ((slice(0, 1), LENGTHS[0] - 1), (slice(1, 3), LENGTHS[1] - 1)):
        ours, theirs = cut(student, rows), cut(teacher, rows)
        everything = place(task, bound.layers)
        inputs = {key: value[rows] for key, value in everything.inputs.items()}
        at = Place(task, inputs, bound.layers, nn.ModuleDict())
        share = units / 6 if task == "causal-lm" else len(inputs["labels"]) / 3
        total += share * float(compute(name, task, ours, theirs, at))
    assert total == pytest.approx(whole, rel=1e-5)


def cut(answers: Answers, rows: slice) -> Answers:
    assert answers.logits is not None
    assert answers.embedding is not None
    return Answers(
        logits=answers.logits[rows], embedding=answers.embedding[rows],
        hidden={k: v[rows] for k, v in answers.hidden.items()},
        attentions={k: v[rows] for k, v in answers.attentions.items()},
        relations={k: (v[0][rows], v[1][rows], v[2][rows]) for k, v in answers.relations.items()}, heads=4,
    )  # fmt: skip


def test_texts_without_labels_add_nothing_but_count() -> None:
    student = draw("text-classification", 1)
    none = place("text-classification", labels=torch.tensor([-100, -100, -100]))
    assert student.logits is not None
    student.logits.requires_grad_()
    value = compute("labels", "text-classification", student, Answers(), none)
    assert float(value.detach()) == 0
    assert not torch.autograd.grad(value, student.logits)[0].any()
    smooth = float(compute("labels", "text-classification", student, Answers(), smoothing=0.3).detach())
    logs = np.log(softmax(array(student.logits)))
    expected = -sum(0.7 * logs[row, y] + 0.3 * logs[row].mean() for row, y in ((0, 2), (2, 5))) / 3
    assert smooth == pytest.approx(expected, rel=1e-5)
    bare = Place("text-classification", {"attention_mask": mask()}, (), nn.ModuleDict())
    with pytest.raises(TrainError, match="these texts have none"):
        compute("labels", "text-classification", student, Answers(), bare)


def test_settings_reach_the_formula() -> None:
    task = "text-classification"
    student, teacher = draw(task, 1), draw(task, 2)
    p, q = softmax(array(teacher.logits) / 3), softmax(array(student.logits) / 3)
    assert float(compute("kl", task, student, teacher, temperature=3)) == pytest.approx(9 * kl(p, q).mean(), rel=1e-5)
    found = float(compute("skewed-kl", task, student, teacher, temperature=3, skew=0.4))
    assert found == pytest.approx(9 * kl(p, 0.4 * p + 0.6 * q).mean(), rel=1e-5)
    m = 0.8 * p + 0.2 * q
    found = float(compute("js", task, student, teacher, temperature=3, skew=0.8))
    assert found == pytest.approx(9 * (0.8 * kl(p, m) + 0.2 * kl(q, m)).mean(), rel=1e-5)
    assert softness(LossTerm(kind="kl"), "text-classification") == 2


def test_a_cached_top_stands_for_logits_of_distributions_and_not_of_mse() -> None:
    student, teacher = draw("causal-lm", 1), draw("causal-lm", 2)
    assert teacher.logits is not None
    likely, tokens = teacher.logits.log_softmax(-1).topk(7, dim=-1)
    cached = Answers(top=Top(tokens, likely, torch.full(tokens.shape[:-1], -torch.inf), 1.0))
    for name in ("kl", "reverse-kl", "skewed-kl", "js"):
        whole = float(compute(name, "causal-lm", student, teacher))
        assert float(compute(name, "causal-lm", student, cached)) == pytest.approx(whole, rel=1e-5)
    with pytest.raises(TrainError, match="mse compares all logits.*Use kl"):
        compute("mse", "causal-lm", student, cached)
    with pytest.raises(TrainError, match="the student has 7, the teacher 6"):
        compute("mse", "causal-lm", student, Answers(logits=teacher.logits[..., :6]))


def test_states_of_other_widths_go_through_a_map_that_starts_as_the_identity() -> None:
    student, teacher = draw("feature-extraction", 1, width=8), draw("feature-extraction", 2, width=12)
    wide = {layer: nn.functional.pad(states, (0, 4)) for layer, states in student.hidden.items()}
    for name, layers in (("hidden", tuple((n, n) for n in range(4))), ("cosine", ((3, 3),))):
        at = place("feature-extraction", layers)
        maps = nn.ModuleDict({f"{n}-{n}": projection(8, 12) for n in range(4)})
        mapped = Place(at.task, at.inputs, layers, maps)
        found = compute(name, "feature-extraction", student, teacher, mapped)
        assert float(found.detach()) == pytest.approx(
            float(compute(name, "feature-extraction", Answers(hidden=wide), teacher)), rel=1e-5
        )
        found.backward()
        assert maps["3-3"].weight.grad is not None
        with pytest.raises(TrainError, match="8 wide, the teacher's layer . 12"):
            compute(name, "feature-extraction", student, teacher)
    assert float(compute("similarity", "feature-extraction", student, teacher)) > 0
    with pytest.raises(TrainError, match="Use similarity"):
        bind([LossTerm(kind="embedding")], "feature-extraction", 2, 2, (8, 12))


def test_similarity_of_a_text_alone_is_nothing() -> None:
    one, other = (cut(draw("feature-extraction", seed), slice(0, 1)) for seed in (1, 2))
    assert float(compute("similarity", "feature-extraction", one, other)) == 0


def test_embeddings_of_other_widths_are_judged_by_whom_they_resemble() -> None:
    same, wide = draw("feature-extraction", 1).embedding, draw("feature-extraction", 2, width=12).embedding
    assert same is not None
    assert wide is not None
    torch.testing.assert_close(agreement(same, same), torch.ones(3))
    torch.testing.assert_close(agreement(same, nn.functional.pad(same, (0, 4))), torch.ones(3))
    s, t = ((array(e) @ array(e).T)[0, 1:] for e in (same, wide))
    assert float(agreement(same, wide)[0]) == pytest.approx(s @ t / np.linalg.norm(s) / np.linalg.norm(t), rel=1e-5)


def test_attention_with_other_heads_is_refused() -> None:
    student, teacher = draw("causal-lm", 1), draw("causal-lm", 2)
    fewer = Answers(attentions={n: maps[:, :2] for n, maps in student.attentions.items()})
    with pytest.raises(TrainError, match="of the student has 2, layer 1 of the teacher 4. Use relations"):
        compute("attention", "causal-lm", fewer, teacher)


def test_attention_of_keys_that_underflow_stays_a_number_and_gives_a_gradient() -> None:
    scores = torch.tensor([[[[0.0, -60.0], [0.0, -200.0]]]], requires_grad=True)
    q, p = scores.softmax(-1), torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    at = Place("text-classification", {"attention_mask": torch.ones(1, 2)}, ((1, 1),), nn.ModuleDict())
    value = compute("attention", "text-classification", Answers(attentions={1: q}), Answers(attentions={1: p}), at)
    (gradient,) = torch.autograd.grad(value, scores)
    torch.testing.assert_close(gradient[0, 0], torch.tensor([[0.25, -0.25], [0.0, 0.0]]))


def test_relation_heads_of_grouped_queries_have_the_teachers_size() -> None:
    assert relation_heads(9, [[576, 192, 192], [576, 192, 192]]) == (9, 3, 3)
    assert relation_heads(4, [[32, 32, 32], [64, 64, 64]]) == (4, 4, 4)
    assert relation_heads(1, [[32, 8, 8], [64, 16, 16]]) == (1, 1, 1)
    with pytest.raises(
        TrainError, match=r"into 9 relation heads \(3 for keys.*\[32, 16, 16\].*Set heads to one of 1, 2, 4, 8\."
    ):
        relation_heads(9, [[32, 16, 16], [576, 192, 192]])


def test_relations_need_no_widths_that_match() -> None:
    student, teacher = draw("causal-lm", 1, width=8), draw("causal-lm", 2, width=12)
    found = float(compute("relations", "causal-lm", student, teacher))
    assert found == pytest.approx(formula("relations", "causal-lm", student, teacher), rel=1e-5)
    assert float(compute("relations", "causal-lm", student, student, heads=2)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "task", "message"),
    [
        ({"kind": "kl", "skew": 0.2, "heads": 3}, "causal-lm", "kl does not read heads and skew; it reads weight, temperature. Drop them"),
        ({"kind": "mse", "temperature": 2}, "causal-lm", "mse does not read temperature; it reads weight. Drop it"),
        ({"kind": "labels", "layers": ((1, 1),)}, "causal-lm", "labels does not read layers; it reads weight, smoothing"),
        ({"kind": "embedding"}, "causal-lm", "embedding is for feature-extraction, not for causal-lm, which has kl, reverse-kl"),
        ({"kind": "hidden", "layers": ((4, 1),)}, "causal-lm", "layer 4 of the student .* are 0 to 3, of the teacher 0 to 6"),
        ({"kind": "hidden", "layers": ((1, -1),)}, "causal-lm", "layer -1 of the teacher"),
        ({"kind": "relations", "layers": ((0, 1),)}, "causal-lm", "layer 0 of the student .* are 1 to 3"),
    ],
)  # fmt: skip
def test_what_a_loss_cannot_do_is_refused(settings: dict[str, Any], task: str, message: str) -> None:
    with pytest.raises(TrainError, match=message):
        bind([LossTerm(**settings)], task, 3, 6)


def test_layers_that_are_not_given_are_spread_or_the_last() -> None:
    terms = [LossTerm(kind=kind) for kind in ("hidden", "cosine", "attention", "relations", "kl", "kl")]  # type: ignore[arg-type]
    bound = bind(terms, "causal-lm", 3, 6)
    assert [each.layers for each in bound] == [
        ((0, 0), (1, 2), (2, 4), (3, 6)), ((3, 6),), ((1, 2), (2, 4), (3, 6)), ((3, 6),), (), (),
    ]  # fmt: skip
    assert [each.name for each in bound] == ["hidden", "cosine", "attention", "relations", "kl 5", "kl 6"]
    assert bind([LossTerm(kind="attention")], "causal-lm", 6, 2)[0].layers[0] == (1, 1)
    assert bound[3].needs("causal-lm") == (Needs(relations=frozenset({3})), Needs(relations=frozenset({6})))
    assert bound[4].needs("causal-lm")[1] == Needs(logits=True, temperatures=frozenset({1.0}))
