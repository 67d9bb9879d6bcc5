"""The compiled parts of a run, one step at a time."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import lax, random

from inference import Prepared
from inference._feeds import Whole, Window
from inference._feeds import batch_index as index_of_batch
from inference._inputs import check
from inference._settings import Settings
from inference._steps import (
    ORDER,
    Plan,
    by_seed,
    current,
    finish,
    first_rows,
    keep_best,
    take_step,
    validate,
)
from inference._steps import init as init_state

SETTINGS = Settings(
    num_data=13,
    batch_size=4,
    num_epochs=None,
    num_steps=10,
    first_step=0,
    num_seeds=1,
    seed=0,
    average=0.0,
    validate_every=0,
    patience=None,
    on_nan="stop",
)


# --- which data a batch holds ---------------------------------------------------------------------


def order_of_visits(num_data, batch_size, num_steps, word=7):
    """The data that the steps visit, one after the other, and the epoch of each step."""
    settings = replace(SETTINGS, num_data=num_data, batch_size=batch_size)

    def step(word, place, _):
        epoch, offset = place
        index = index_of_batch(settings, epoch, offset, word)
        seen = offset + batch_size
        wraps = (seen >= num_data).astype(jnp.int32)
        return (epoch + wraps, seen - wraps * num_data), (index, epoch)

    zero = jnp.zeros((), jnp.int32)
    scan = jax.jit(lambda w: lax.scan(partial(step, w), (zero, zero), length=num_steps)[1])
    indices, epochs = scan(np.uint32(word))
    return np.asarray(indices).ravel(), np.asarray(epochs)


@pytest.mark.parametrize(("num_data", "batch_size"), [(12, 4), (13, 4), (7, 6)])
def test_epochs_follow_one_another_without_a_seam(num_data, batch_size):
    visited, epochs = order_of_visits(num_data, batch_size, num_steps=3 * num_data)
    by_epoch = visited.reshape(-1, num_data)  # 3 B whole epochs, whatever the batches
    np.testing.assert_array_equal(np.sort(by_epoch, axis=1), [np.arange(num_data)] * len(by_epoch))
    assert len(np.unique(by_epoch, axis=0)) == len(by_epoch)
    np.testing.assert_array_equal(np.bincount(visited), 3 * batch_size)
    np.testing.assert_array_equal(epochs, np.arange(3 * num_data) * batch_size // num_data)


def test_the_order_is_another_for_another_word():
    orders = {tuple(order_of_visits(12, 4, 3, word)[0].tolist()) for word in range(5)}
    assert len(orders) == 5


def test_a_batch_of_all_data_needs_no_order():
    whole = replace(SETTINGS, batch_size=13)
    zero = jnp.zeros((), jnp.int32)
    assert index_of_batch(whole, zero, zero, jnp.uint32(0)) is None


# --- one step -------------------------------------------------------------------------------------
#
# A model of one number, whose loss and gradient are formulas: x ~ Normal(loc, 1).

X = np.linspace(-1, 2, 13).astype(np.float32)
HELD_OUT = {"x": np.full(6, 0.5, np.float32)}


def model(x):
    loc = numpyro.param("loc", 0.5)
    scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("N", len(x)):
        numpyro.sample("x", dist.Normal(loc, lax.stop_gradient(scale)), obs=x)


def no_latents(x):
    pass


@cache
def plan_of(**settings) -> Plan:
    own = {
        "objective": None,
        "validation_objective": None,
        "optimizer": optax.sgd(0.1),
        "preprocess": None,
        "validation": Prepared(HELD_OUT) if "patience" in settings else None,
        "init": None,
        "mesh": None,
        "num_seeds": None,
        "seed": None,
        "num_epochs": None,
        "num_steps": 10,
        "batch_size": 4,
        "average": 0.0,
        "validate_every": None,
        "patience": None,
        "on_nan": "stop",
    }
    return check(model, no_latents, {"x": X}, **(own | settings)).plan


KEY = random.key(3)


def first_state(plan, **values):
    """The state of one seed before the first step, without the seed axis."""
    state = jax.jit(partial(init_state, plan))(KEY[None], {"x": X[first_rows(plan)]}, {})
    return by_seed(lambda x: x[0], state)._replace(**values)


def steps(plan, state, num_steps, data=X):
    """The states after each step, and its loss."""
    step = jax.jit(lambda state, data: take_step(plan, state, KEY, Whole({"x": data})))
    states, losses = [], []
    for _ in range(num_steps):
        state, loss = step(state, data)
        states.append(state)
        losses.append(float(loss))
    return states, np.array(losses)


def batches(num_steps):
    """The data of each step, by the rule of the test above."""
    word = random.bits(random.fold_in(KEY, ORDER), dtype=jnp.uint32)
    return X[order_of_visits(len(X), 4, num_steps, int(word))[0]].reshape(-1, 4)


def test_a_step_descends_on_its_batch_alone_and_its_loss_is_per_datum():
    plan = plan_of()
    states, losses = steps(plan, first_state(plan), 5)
    loc = 0.5
    for state, loss, batch in zip(states, losses, batches(5), strict=True):
        expected = np.mean(0.5 * (batch - loc) ** 2) + 0.5 * np.log(2 * np.pi)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        loc += 0.1 * np.mean(batch - loc)
        np.testing.assert_allclose(state.params["loc"], loc, rtol=1e-5)
    assert [int(s.step) for s in states] == [1, 2, 3, 4, 5]
    assert [(int(s.epoch), int(s.offset)) for s in states] == [
        (0, 4),
        (0, 8),
        (0, 12),
        (1, 3),
        (1, 7),
    ]


def test_the_average_is_the_mean_of_the_last_parameters():
    plan = plan_of(average=0.3)
    states, _ = steps(plan, first_state(plan), 10)
    mean = np.mean([float(s.params["loc"]) for s in states[7:]])
    np.testing.assert_allclose(states[-1].average["loc"], mean, rtol=1e-6)
    for state in (states[6], states[-1]):  # before averaging has begun, and at its end
        begun = state is states[-1]
        returned = current(plan.settings, state)["loc"]
        np.testing.assert_array_equal(returned, (state.average if begun else state.params)["loc"])


def test_a_skipped_step_moves_on_in_the_data_and_changes_nothing_else():
    bad = X.copy()
    bad[int(np.flatnonzero(batches(1)[0][0] == X)[0])] = np.nan  # in the first batch
    plan = plan_of(on_nan="skip")
    start = first_state(plan)
    (skipped,), (loss,) = steps(plan, start, 1, bad)
    assert np.isnan(loss)
    np.testing.assert_array_equal(skipped.params["loc"], start.params["loc"])
    assert (int(skipped.step), int(skipped.offset)) == (1, 4)


# --- the end --------------------------------------------------------------------------------------


def test_the_end_returns_constrained_parameters():
    plan = plan_of()
    state = by_seed(lambda x: x[None], first_state(plan))
    params, mutable = finish(plan, state)
    assert mutable == {}
    np.testing.assert_allclose(state.params["scale"], 0.0, atol=1e-6)  # the logarithm
    np.testing.assert_allclose(params["scale"], [1.0], rtol=1e-6)


def test_with_patience_the_best_parameters_are_kept_and_a_seed_stops():
    plan = plan_of(validate_every=1, patience=2)
    judge, best = jax.jit(partial(validate, plan, 6, 2)), jax.jit(partial(keep_best, plan))
    batches = Window(np.int32(0), {name: array[None] for name, array in HELD_OUT.items()})
    state = by_seed(lambda x: x[None], first_state(plan))
    seen = []
    for loc in (0.3, 0.5, 0.8, 0.9):
        params = state.params | {"loc": jnp.array([loc], jnp.float32)}
        count, (_, rest) = state.optimizer
        state = state._replace(optimizer=(count, (params, rest)))
        elbo = -judge(state, KEY[None], batches, 1)[:, 0]
        state = best(state, elbo)
        seen.append((float(elbo[0]), float(state.best[0]["loc"][0]), bool(state.active[0])))
    exact = [-0.5 * (loc - 0.5) ** 2 - 0.5 * np.log(2 * np.pi) for loc in (0.3, 0.5, 0.8, 0.9)]
    np.testing.assert_allclose([elbo for elbo, _, _ in seen], exact, rtol=1e-5)
    np.testing.assert_allclose([loc for _, loc, _ in seen], [0.3, 0.5, 0.5, 0.5], rtol=1e-6)
    assert [active for _, _, active in seen] == [True, True, True, False]
    np.testing.assert_allclose(finish(plan, state)[0]["loc"], [0.5], rtol=1e-6)


def test_before_the_first_evaluation_the_end_returns_the_last_parameters():
    plan = plan_of(validate_every=1, patience=2)
    state = by_seed(lambda x: x[None], first_state(plan))
    count, (params, rest) = state.optimizer
    moved = params | {"loc": params["loc"] + 1}
    state = state._replace(optimizer=(count, (moved, rest)))
    np.testing.assert_array_equal(finish(plan, state)[0]["loc"], moved["loc"])
