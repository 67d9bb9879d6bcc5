"""The table of what each family can hold, in ``models/README.md``, found out by running them.

The models come in two kinds: a plain one of independent standard Normals, and one whose sites are
joint and not Gaussian. What q shows with both is the family's. What it shows with the second alone
is the model's: "as p".
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from inference.sites import is_fixed, trace_of
from models import guides

PAGE = Path(__file__).parents[2] / "models" / "README.md"
KEY = jax.random.key(0)
DATA = {"x": jnp.array([0.3])}
YES, NO, AS_MODEL = "yes", "-", "as p"


# --- models ---------------------------------------------------------------------------------------


def first_site(is_plain):
    """Two numbers of a datum."""
    if is_plain:
        return numpyro.sample("z1", dist.Normal(0, 1).expand([2]).to_event(1))
    root = jnp.array([[1.0, 0.0], [0.5, 1.0]])
    return numpyro.sample("z1", dist.MultivariateStudentT(5.0, jnp.zeros(2), root))


def one_site(x, is_plain):
    with numpyro.plate("data", len(x)):
        z1 = first_site(is_plain)
        numpyro.sample("x", dist.Normal(z1.sum(-1), 1), obs=x)


def many_sites(x, is_plain):
    """Two global sites, and two local ones. The second has two entries along a further plate."""
    a = numpyro.sample("a", dist.Normal(0, 1))
    b = numpyro.sample("b", dist.Normal(0 if is_plain else a, 1))
    with numpyro.plate("data", len(x), dim=-2):
        z1 = first_site(is_plain)
        with numpyro.plate("times", 2, dim=-1):
            z2 = numpyro.sample("z2", dist.Normal(0 if is_plain else z1.sum(-1), 1))
            numpyro.sample("x", dist.Normal(z2 + a + b, 1), obs=x[:, None])


def several(x):
    with numpyro.plate("data", len(x)):
        z = [numpyro.sample(name, dist.Normal(0, 1)) for name in ("z1", "z2")]
        numpyro.sample("x", dist.Normal(sum(z), 1), obs=x)


def bounded(x):
    with numpyro.plate("data", len(x)):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        share = numpyro.sample("share", dist.Beta(2.0, 1.0))
        weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))
        numpyro.sample("x", dist.Normal(rate * share * weights[..., 0], 1), obs=x)


def discrete(x):
    with numpyro.plate("data", len(x)):
        k = numpyro.sample("k", dist.Categorical(jnp.ones(3) / 3))
        b = numpyro.sample("b", dist.Bernoulli(0.5))
        numpyro.sample("x", dist.Normal(k + b, 1), obs=x)


def with_global(x):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(numpyro.sample("z", dist.Normal(0, 1)), scale), obs=x)


# --- what a family shows --------------------------------------------------------------------------


def sites_of(guide):
    """The sites of a guide, as shapes. None if it refuses its model."""
    sites = {}
    try:
        jax.eval_shape(lambda: sites.update(trace_of(guide, KEY, {}, **DATA)))
    except ValueError:
        return None
    return sites


def draws(guide, names):
    sites = sites_of(guide)
    return sites is not None and set(names) <= sites.keys()


def any_params(sites):
    """Parameters that no training made."""
    rng, params = np.random.default_rng(0), {}
    for name, site in sites.items():
        if site["type"] == "param":
            draw = partial(jnp.ones_like) if is_fixed(site) else lambda p: _any(rng, p)
            params[name] = jax.tree.map(draw, site["value"])
    return params


def _any(rng, leaf):
    return jnp.asarray(rng.normal(size=leaf.shape) / 2, leaf.dtype)


def depends(family, is_plain):
    """By property, whether log q shows it. A zero of the Hessian is an independence."""
    guide = guides.make(family, partial(many_sites, is_plain=is_plain), globals="full_covariance")
    sites = sites_of(guide)
    if sites is None:
        guide = guides.make(family, partial(one_site, is_plain=is_plain))
        sites = sites_of(guide)
    params = any_params(sites)
    names = [name for name, site in sites.items() if site["type"] == "sample"]

    @jax.jit
    def hessians(values):
        """Of log q of all sites, and of the first local one alone."""

        def log_q(values):
            drawn = trace_of(guide, KEY, params | values, **DATA)
            terms = {n: drawn[n]["fn"].log_prob(drawn[n]["value"]).sum() for n in names}
            return sum(terms.values()), terms["z1"]

        everything, first = jax.hessian(log_q)(values)
        return everything, first["z1"]["z1"]

    @jax.jit
    def draw(key):
        drawn = trace_of(guide, key, params, **DATA)
        return {name: drawn[name]["value"] for name in names}

    points = map(draw, jax.random.split(KEY))
    (everything, first), (_, elsewhere) = map(hessians, points)

    def across(name, other):
        return name in names and other in names and abs(everything[name][other]).max() > 1e-4

    def within(block):
        block = np.array(block).reshape(2, 2)
        return abs(block[0, 1]) > 1e-4

    return {
        "a local site depends on those before it": across("z1", "z2"),
        "the numbers of one site are joint": within(first),
        "the entries of one site along a further plate are joint": "z2" in names
        and within(everything["z2"]["z2"]),
        "a site is not Gaussian in unconstrained coordinates": not np.allclose(
            first, elsewhere, atol=1e-3
        ),
        'global sites are joint, with `globals="full_covariance"`': across("a", "b"),
    }


def found_of(family):
    """What a family can hold, by property."""
    plain, joint = depends(family, True), depends(family, False)
    shown = {n: YES if plain[n] else AS_MODEL if joint[n] else NO for n in plain}
    sites = sites_of(guides.make(family, partial(one_site, is_plain=True)))
    table = sites_of(guides.make(family, partial(one_site, is_plain=True)).per_datum(1))
    able = {
        "several local sites": draws(guides.make(family, several), ("z1", "z2")),
        "positive, bounded and simplex supports": draws(
            guides.make(family, bounded), ("rate", "share", "weights")
        ),
        "Categorical and Bernoulli sites": draws(guides.make(family, discrete), ("k", "b")),
        "global sites": draws(guides.make(family, with_global), ("scale", "z")),
        "numbers of each datum's own, by `.per_datum(num_data)`": "rows"
        in table.get("encoder", {"value": ()})["value"],
        "no encoder is needed": "encoder" not in sites,
    }
    return shown | {name: YES if it else NO for name, it in able.items()}


ORDER = (
    "several local sites",
    "a local site depends on those before it",
    "the numbers of one site are joint",
    "the entries of one site along a further plate are joint",
    "a site is not Gaussian in unconstrained coordinates",
    "positive, bounded and simplex supports",
    "Categorical and Bernoulli sites",
    "global sites",
    'global sites are joint, with `globals="full_covariance"`',
    "numbers of each datum's own, by `.per_datum(num_data)`",
    "no encoder is needed",
)


@pytest.mark.slow
def test_the_page_says_what_each_family_can_hold():
    names = [family.replace("-", "_") for family in guides.GUIDES]
    found = [found_of(family) for family in guides.GUIDES]
    assert set(ORDER) == found[0].keys()
    rows = [["", *(f"`{name}`" for name in names)], ["---"] * (1 + len(names))]
    rows += [[name, *(each[name] for each in found)] for name in ORDER]
    table = "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)
    assert table in PAGE.read_text(), f"expected this table in {PAGE}:\n{table}"
