"""Errors: what they say and the exit code they carry."""

import pytest

from squeeze import errors
from squeeze.errors import SqueezeError, VerifyError, nearest

ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SqueezeError)]


@pytest.mark.parametrize("kind", ALL)
def test_every_error_exits_with_2_except_a_failed_check(kind: type[SqueezeError]) -> None:
    assert kind.exit_code == (3 if kind is VerifyError else 2)


def test_a_slip_is_answered_with_the_nearest_name_and_all_that_are_known() -> None:
    assert nearest("sparcity", ["sparsity", "scheme"]) == "Did you mean 'sparsity'? Known: scheme, sparsity."


def test_case_and_dashes_do_not_count_against_a_name() -> None:
    assert nearest("Causal_LM", ["causal-lm", "x"]).startswith("Did you mean 'causal-lm'?")


def test_an_unrelated_name_gets_the_list_alone() -> None:
    assert nearest("zebra", ["int8", "int4"]) == "Known: int4, int8."


def test_no_choices_are_said_to_be_none() -> None:
    assert nearest("x", []) == "None are known."


def test_choices_may_be_an_iterator_and_may_repeat() -> None:
    assert nearest("a", iter(["a", "b", "a"])) == "Did you mean 'a'? Known: a, b."
