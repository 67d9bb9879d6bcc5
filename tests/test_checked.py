"""Types of functions within functions are checked, though such a function is looked at once."""

import sys
from unittest import mock

import beartype
import jaxtyping
import pytest

checked = sys.modules["tests.conftest"].checked


def outer(kind):
    @jaxtyping.jaxtyped(typechecker=checked)
    def inner(x: kind, shift: float | None = None) -> int:
        return x

    return inner


def test_annotations_hold_at_every_call():
    for _ in range(2):
        assert outer(int)(1) == 1
        for kind, x in ((int, "a"), (str, 1), (str, "a")):  # the last returns no int
            with pytest.raises(jaxtyping.TypeCheckError):
                outer(kind)(x)


def test_a_function_within_a_function_is_looked_at_once():
    outer(float)
    with mock.patch.object(beartype, "beartype", side_effect=AssertionError("again")):
        outer(float)
        with pytest.raises(AssertionError, match="again"):
            outer(complex)
