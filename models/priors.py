"""Priors p(z | c) as objects: one field of a model, with a condition or without.

    model = vae.Model(prior=MixtureOfNormals(10))
    model = vae.Model(Labels(10), prior=LearnedNormal())

| object             | p(z | c)                                                                   |
|--------------------|----------------------------------------------------------------------------|
| `StandardNormal`   | Normal(0, I)                                                               |
| `LearnedNormal`    | Normal(loc(c), scale(c)^2), independent dimensions                         |
| `MixtureOfNormals` | sum_k w_k(c) Normal(loc_k(c), scale_k(c)^2)                                |
| `VampPrior`        | (1 / K) sum_k q(z | u_k, c), q the guide, u_k learned (Tomczak & Welling)  |
| `FlowPrior`        | e ~ Normal(0, I) carried through couplings that depend on c (Dinh et al.)  |

Without a condition c is left out. The networks are then numbers that all data share.

**A prior made from the guide.** The VampPrior needs q(z | u, c). The guide owns its encoder, and
the model does not. So the model *runs the guide* on the pseudo-inputs u_k and keeps the
distribution of z. The guide's parameters are then sites of the model too, under the guide's names.
NumPyro gives a name one value in both programs. So the two share the encoder, both are plain
programs, and the gradient of an encoder's weight is the sum of its two uses. The guide is made
first, from the same model with another prior:

    base = vae.Model()
    guide = guides.mean_field(base)
    model = replace(base, prior=VampPrior(guide, num_components=500))
    fit(model, guide, ...)

A prior is a frozen dataclass. Its call returns a distribution of batch shape () or (N,), and of
event shape (num_latents,). Its numbers are the site ``prior``; a VampPrior's are the pseudo-inputs,
the site ``pseudo_inputs``.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jax import random
from jaxtyping import Array, Float
from numpyro.primitives import Messenger

from models.conditions import Condition
from models.densities import Folded
from models.flows import AffineCoupling, Stack, every_other
from models.likelihoods import Likelihood
from models.networks import MLP, Activation, check_at_least, network, positive, still

UNIT = math.log(math.e - 1)  # softplus(UNIT) = 1


@dataclass(frozen=True)
class Setting:
    """What a model tells its prior.

    Attributes:
        site: the name of the latent site.
        num_latents: the dimensions of z.
        x_shape: the shape of one x.
        condition: the kind of c, or None.
        likelihood: p(x | z, c), which knows what an x looks like.
        activation, dtype: of the networks.
    """

    site: str
    num_latents: int
    x_shape: tuple[int, ...]
    condition: Condition | None
    likelihood: Likelihood
    activation: Activation
    dtype: str


@runtime_checkable
class Prior(Protocol):
    """What a model asks of a prior."""

    def __call__(self, setting: Setting, c: Any = None) -> dist.Distribution:
        """p(z | c), of batch shape () or (N,) and event shape (num_latents,)."""
        ...


def check_prior(prior: Any) -> None:
    """Raises TypeError for what is no prior: a class, a name, a distribution."""
    if isinstance(prior, type) or not isinstance(prior, Prior):
        got = f"the class {prior.__name__}" if isinstance(prior, type) else repr(prior)
        raise TypeError(
            f"prior: expected an object of models.priors, got {got}; write for example "
            f"StandardNormal() or MixtureOfNormals(10)"
        )


# --- numbers from a condition ---------------------------------------------------------------------


class FromCondition(nnx.Module):
    """Numbers that depend on the condition, if there is one.

    Args:
        condition: the kind of condition, or None.
        hidden: units of the hidden layers, from c on. () for an affine map of c's features.
        num_outputs: how many numbers there are.
        activation, dtype: as in ``models.networks.MLP``.
    """

    def __init__(
        self,
        condition: Condition | None,
        hidden: tuple[int, ...],
        num_outputs: int,
        activation: Activation,
        dtype: str,
        *,
        rngs: nnx.Rngs,
    ):
        if condition is None:
            self.numbers = nnx.Param(jnp.zeros(num_outputs, jnp.float32))
            self.features = self.mlp = None
        else:
            self.features = condition.features(rngs=rngs)
            sizes = (condition.num_features, *hidden, num_outputs)
            self.mlp = MLP(sizes, activation, dtype, rngs=rngs)

    def __call__(self, c: Any = None) -> Float[Array, "*N numbers"]:
        """(N, num_outputs), or (num_outputs,) without a condition."""
        if self.features is None or self.mlp is None:
            return self.numbers[...]
        return self.mlp(self.features(jnp.asarray(c)))


def _from_condition(
    setting: Setting, c: Any, hidden: tuple[int, ...], num_outputs: int
) -> Float[Array, "*N numbers"]:
    def build(rngs: nnx.Rngs) -> FromCondition:
        rest = setting.activation, setting.dtype
        return FromCondition(setting.condition, hidden, num_outputs, *rest, rngs=rngs)

    return network("prior", build)(c)


# --- Normals --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StandardNormal:
    """Normal(0, I), whatever the condition."""

    def __call__(self, setting: Setting, c: Any = None) -> dist.Distribution:
        """Normal(0, I)."""
        return dist.Normal(0.0, 1.0).expand([setting.num_latents]).to_event(1)


STANDARD = StandardNormal()


@dataclass(frozen=True)
class LearnedNormal:
    """Independent Normals, with learned locations and scales (Sohn, Lee & Yan 2015, p(z | x)).

    Attributes:
        hidden: units of the hidden layers of the prior network, from c to z. () for an affine map
            of the condition's features.

    Raises:
        ValueError: a size is not positive.
    """

    hidden: tuple[int, ...] = ()

    def __post_init__(self):
        check_at_least(1, self, "hidden")

    def __call__(self, setting: Setting, c: Any = None) -> dist.Distribution:
        """Normal(loc(c), scale(c)^2)."""
        numbers = _from_condition(setting, c, self.hidden, 2 * setting.num_latents)
        loc, raw = jnp.split(numbers, 2, axis=-1)
        return dist.Normal(loc, positive(raw + UNIT)).to_event(1)


@dataclass(frozen=True)
class MixtureOfNormals:
    """A mixture of independent Normals, all its numbers learned.

    Its components start apart: their locations are Normal(0, 1 / 4) draws, the site
    ``prior_centres``, to which the numbers of the condition are added.

    Attributes:
        num_components: how many Normals there are.
        hidden: units of the hidden layers between the condition and the numbers.

    Raises:
        ValueError: a number is not positive.
    """

    num_components: int = 10
    hidden: tuple[int, ...] = ()

    def __post_init__(self):
        check_at_least(1, self, "num_components", "hidden")

    def __call__(self, setting: Setting, c: Any = None) -> dist.Distribution:
        """The mixture."""
        shape = self.num_components, setting.num_latents
        size = math.prod(shape)
        numbers = _from_condition(setting, c, self.hidden, self.num_components + 2 * size)
        logits, loc, raw = jnp.split(numbers, [self.num_components, self.num_components + size], -1)
        loc, raw = (a.reshape(*a.shape[:-1], *shape) for a in (loc, raw))
        centres = numpyro.param("prior_centres", lambda key: 0.5 * random.normal(key, shape))
        components = dist.Normal(centres + loc, positive(raw + UNIT)).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), components)


# --- a flow ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowPrior:
    """Normal(0, I) carried through couplings (Dinh, Sohl-Dickstein & Bengio 2017, equation 4).

    The couplings see the condition. They start as the identity.

    Attributes:
        num_layers: how many couplings there are. With 0 it is Normal(0, I).
        num_hidden: units of each coupling's hidden layer.

    Raises:
        ValueError: a number is out of range.
    """

    num_layers: int = 4
    num_hidden: int = 64

    def __post_init__(self):
        check_at_least(0, self, "num_layers")
        check_at_least(1, self, "num_hidden")

    def __call__(self, setting: Setting, c: Any = None) -> dist.Distribution:
        """The distribution of the flow's end."""
        base = StandardNormal()(setting)
        if not self.num_layers:
            return base
        condition, size = setting.condition, setting.num_latents

        def build(rngs: nnx.Rngs) -> _ConditionedCouplings:
            return _ConditionedCouplings(condition, size, self, rngs=rngs)

        flow = network("prior", build)
        context, nets = flow.context(c), flow.couplings.layers
        maps: list[Any] = [
            AffineCoupling(net, context, every_other(i, size))
            for i, net in enumerate(cast(list[MLP], nets))
        ]
        return dist.TransformedDistribution(base.expand(context.shape[:-1]), maps)


class _ConditionedCouplings(nnx.Module):
    """The networks of a ``FlowPrior``, and the condition's features."""

    def __init__(
        self, condition: Condition | None, num_latents: int, prior: FlowPrior, *, rngs: nnx.Rngs
    ):
        self.features = None if condition is None else condition.features(rngs=rngs)
        num_inputs = num_latents + (0 if condition is None else condition.num_features)
        sizes = num_inputs, prior.num_hidden, 2 * num_latents
        self.couplings = Stack(still(*sizes, rngs=rngs) for _ in range(prior.num_layers))

    def context(self, c: Any) -> Float[Array, "*N features"]:
        """The condition's features, or none."""
        return jnp.zeros(0) if self.features is None else self.features(jnp.asarray(c))


# --- a prior made from the guide ------------------------------------------------------------------


@dataclass(frozen=True)
class VampPrior:
    """The mean of the guide at learned pseudo-inputs u_k (Tomczak & Welling 2018, equation 9).

        p(z | c)  =  (1 / K) sum_k q(z | u_k, c)

    With K = 1 it is a Normal, if the guide is one. u_k has the shape of one x, and lies where x
    can: a pixel between black and white. With a condition the guide runs on each of the K
    pseudo-inputs for each datum, K * N in all.

    Attributes:
        guide: a program that draws the latent site first, as a function of x and c alone. Take the
            guide that is fitted with the model. It is made from the same model with another prior.
        num_components: K, the number of pseudo-inputs.

    Raises:
        ValueError: fewer than 1 pseudo-input. In use: the guide draws another site first, or draws
            random numbers to make the distribution of z.
    """

    guide: Callable[..., Any]
    num_components: int = 500

    def __post_init__(self):
        check_at_least(1, self, "num_components")

    def __call__(self, setting: Setting, c: Any = None) -> dist.Distribution:
        """The mixture. The guide's parameters become sites of the program that calls it."""
        count, shape = self.num_components, (self.num_components, *setting.x_shape)
        numbers = numpyro.param("pseudo_inputs", lambda key: random.normal(key, shape))
        arrays = {"x": setting.likelihood.from_real(numbers)}
        if c is not None:
            c = jnp.asarray(c)
            arrays["x"] = jnp.tile(arrays["x"], (len(c), *[1] * len(setting.x_shape)))
            arrays["c"] = jnp.repeat(c, count, axis=0)
        looked = _Looks(setting.site)
        with looked:
            self.guide(**arrays)
        components: Any = looked.fn
        if c is not None:
            components = Folded(components, (len(c), count))
        return dist.MixtureSameFamily(dist.Categorical(logits=jnp.zeros(count)), components)


class _Looks(Messenger):
    """Looks at the first latent site of a guide. The guide's parameters alone are seen outside."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.fn = name, None
        self.is_in_param = False  # a parameter that is made asks for a key

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "param":
            self.is_in_param = True
        if self.is_in_param:
            return
        msg["stop"] = True
        if msg["value"] is not None or msg["kwargs"].get("rng_key") is not None:
            return
        if msg["type"] == "prng_key":
            raise ValueError(
                "prior: expected a guide whose distribution of z is a function of x and c, got one "
                "that draws random numbers on the way; take another family, such as mean_field"
            )
        if msg["type"] != "sample":
            return
        if self.fn is None:
            if msg["name"] != self.name:
                raise ValueError(
                    f"prior: expected a guide that draws {self.name!r} first, given x and c alone, "
                    f"got one that draws {msg['name']!r} first; take another guide, such as "
                    f"guides.structured or guides.mean_field"
                )
            self.fn = msg["fn"]
        msg["value"] = jnp.zeros(msg["fn"].shape())  # what follows is not looked at

    def postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "param":
            self.is_in_param = False


# --- by name --------------------------------------------------------------------------------------

PRIORS: dict[str, Callable[..., Prior]] = {
    "standard": StandardNormal,
    "learned": LearnedNormal,
    "mixture": MixtureOfNormals,
    "vamp": VampPrior,
    "flow": FlowPrior,
}


def make(name: str, **settings: Any) -> Prior:
    """The prior of a name. It ignores the settings of other priors, and those that are None.

    Args:
        name: one of ``PRIORS``.
        settings: fields of any prior, for example ``guide`` and ``num_components``.

    Raises:
        ValueError: no such prior.
    """
    if name not in PRIORS:
        raise ValueError(f"prior: expected one of {', '.join(PRIORS)}, got {name!r}")
    known = inspect.signature(PRIORS[name]).parameters
    return PRIORS[name](**{n: v for n, v in settings.items() if n in known and v is not None})
