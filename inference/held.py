"""A program whose parameters are known: they stay, while the other program's are trained."""

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import jax
from numpyro import handlers

from inference._describe import describe_arrays, describe_value
from inference.sites import ChecksData, HasEncoder, Prepares, Program

OFFERS = {"prepare": Prepares, "check_data": ChecksData, "encoder": HasEncoder}


class Held:
    """A NumPyro program with some of its parameters held at given values.

    They are no parameters any more. ``fit`` does not train or return them, and judges take the
    rest. With all of a model's held, training fits the guide alone:

        held = Held(model, {name: params[name] for name in ("W", "b", "sigma")})
        result = fit(held, guides.mean_field(model), data, num_epochs=10)

    What the program offers (``prepare``, ``check_data``, ``encoder``) the held one offers too. It
    takes the program's arguments.

    Args:
        program: a model or a guide.
        params: values by the names of ``numpyro.param`` sites, for one seed; all seeds share them.
    """

    def __init__(self, program: Program, params: Mapping[str, Any]):
        self.program, self.params = program, dict(params)
        for name, protocol in OFFERS.items():
            if isinstance(program, protocol):
                setattr(self, name, getattr(program, name))
        with contextlib.suppress(TypeError, ValueError):  # a callable without a signature
            self.__signature__ = inspect.signature(program)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program."""
        known = handlers.substitute(self.program, data=self.params)
        return handlers.block(known, hide=list(self.params))(*args, **kwargs)

    def __repr__(self) -> str:
        leaves = jax.tree_util.tree_leaves_with_path(self.params)
        arrays = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
        return f"Held({describe_value(self.program)}, {describe_arrays(arrays, contents=True)})"
