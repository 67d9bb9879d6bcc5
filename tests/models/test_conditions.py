"""Conditions: what their features are, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.conditions import Labels, Values, check_given


def features(condition, c):
    return condition.features(rngs=nnx.Rngs(0))(jnp.asarray(c))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.int64])
def test_labels_of_any_integer_type_are_one_hot(dtype):
    labels, c = Labels(5), np.array([4, 0, 2, 2], dtype)
    labels.check(c)
    assert labels.num_features == 5
    np.testing.assert_array_equal(features(labels, c), np.eye(5)[[4, 0, 2, 2]])


def test_the_number_of_classes_may_be_more_than_the_labels_type_holds():
    c = np.array([0, 255], np.uint8)
    Labels(256).check(jnp.asarray(c))
    np.testing.assert_array_equal(features(Labels(256), c), np.eye(256)[c])


def test_an_embedded_label_is_a_learned_vector_of_its_own():
    labels = Labels(4, num_embedded=3)
    module = labels.features(rngs=nnx.Rngs(0))
    assert labels.num_features == 3
    (vectors,) = jax.tree.leaves(nnx.state(module, nnx.Param))
    assert vectors.shape == (4, 3)
    assert len(np.unique(vectors, axis=0)) == 4
    embedded = module(jnp.array([3, 1, 3]))
    np.testing.assert_allclose(embedded, vectors[jnp.array([3, 1, 3])], rtol=1e-6)


@pytest.mark.parametrize("num_embedded", [None, 2])
@pytest.mark.parametrize("outside", [-1, 3, 200])
def test_a_label_outside_the_classes_is_never_a_vector(num_embedded, outside):
    labels = Labels(3, num_embedded)

    @jax.jit
    def compiled(c):
        labels.check(c)  # sees no values here, and lets them pass
        return features(labels, c)

    c = jnp.array([0, outside, 2])
    values = compiled(c)
    assert np.isnan(values[1]).all()
    assert np.isfinite(values[np.array([0, 2])]).all()
    with pytest.raises(ValueError, match=rf"c: expected labels 0 to 2, got {outside};"):
        labels.check(c)


@pytest.mark.parametrize(
    ("c", "message"),
    [
        (np.array([0, 3, 1, 7, 3]), r"labels 0 to 2, got 3, 7; declare more.*Labels\(8\)"),
        (np.array([0, -2, 4]), r"labels 0 to 2, got -2, 4; declare more classes, Labels\(5\)"),
        # 255 is the greatest of its type, and no number of classes has a label -1
        (
            np.array([1, 255], np.uint8),
            r"labels 0 to 2, got 255; declare more classes, Labels\(256\)",
        ),
        (np.array([1, -1]), r"labels 0 to 2, got -1; (?!.*declare)mend the labels"),
        (jnp.array([0.0, 1.0]), r"one integer label per datum, got float32 of shape \(2,\)"),
        (np.array([True]), r"one integer label per datum, got bool of shape \(1,\)"),
        (np.array([[1], [2]]), r"one integer label per datum, got int64 of shape \(2, 1\)"),
        (np.array(1), r"one integer label per datum, got int64 of shape \(\)"),
    ],
)
def test_labels_refuse(c, message):
    with pytest.raises(ValueError, match=rf"^c: expected {message}"):
        Labels(3).check(c)


@pytest.mark.parametrize("c", [jnp.zeros(2), jnp.zeros((2, 1), int)])
def test_labels_refuse_types_and_shapes_when_traced_too(c):
    for look in (Labels(3).check, lambda c: features(Labels(3), c)):
        with pytest.raises(ValueError, match="expected one integer label per datum, got"):
            jax.eval_shape(look, c)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (4, 2, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_values_of_any_shape_are_flattened(shape, dtype, rng):
    values, c = Values(shape), rng.integers(0, 9, (5, *shape)).astype(dtype)
    values.check(c)
    assert values.num_features == np.prod(shape)
    flat = features(values, c)
    assert flat.dtype == jnp.float32
    np.testing.assert_array_equal(flat, c.reshape(5, -1))


@pytest.mark.parametrize(
    ("shape", "c", "message"),
    [
        ((2, 3), np.zeros((5, 3, 2)), r"shape \(N, 2, 3\), got \(5, 3, 2\)"),
        ((2, 3), np.zeros((5, 6)), r"shape \(N, 2, 3\), got \(5, 6\)"),
        ((2, 3), np.zeros(5), r"shape \(N, 2, 3\), got \(5,\)"),
        ((3,), np.zeros((5, 2)), r"shape \(N, 3\), got \(5, 2\)"),
        ((), np.zeros((5, 1)), r"shape \(N,?\), got \(5, 1\)"),
    ],
)
def test_values_refuse(shape, c, message):
    for look in (Values(shape).check, lambda c: features(Values(shape), c)):
        with pytest.raises(ValueError, match=rf"^c: expected {message}"):
            look(c)


def test_a_condition_is_given_if_and_only_if_there_is_one():
    check_given(None, None)
    check_given(Labels(3), np.zeros(2))  # and its values are not looked at
    with pytest.raises(ValueError, match=r"c: expected conditions, got none; .* Labels\(num_cl"):
        check_given(Labels(3), None)
    with pytest.raises(ValueError, match="c: expected none, got some; leave c out of the data"):
        check_given(None, np.zeros(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Labels(0), "num_classes: expected at least 1, got 0"),
        (lambda: Labels(3, 0), "num_embedded: expected at least 1, got 0"),
        (lambda: Values((2, 0)), r"shape: expected positive lengths, got \(2, 0\)"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_conditions_are_values():
    assert Labels(3, 2) == Labels(3, 2) != Labels(3)
    assert Values((2,)) == Values((2,)) != Values((3,))
    assert len({Labels(3), Labels(3), Labels(3, 2), Values((2,)), Values((2,))}) == 3
