"""A program whose parameters are known: held where they are, while the other program's train."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from numpyro import handlers

from inference.describe import describe_arrays, describe_value


class Held:
    """A NumPyro program with some of its parameters held at given values.

    They are no parameters any more: ``fit`` neither trains nor returns them, and judges take the
    rest. With all of a model's held, training fits the guide alone, to a model that stays:

        held = Held(model, {name: params[name] for name in ("W", "b", "sigma")})
        result = fit(held, guides.mean_field(model), data, num_epochs=10)

    Args:
        program: a model or a guide.
        params: values by the names of ``numpyro.param`` sites, for one seed; all seeds share them.
    """

    def __init__(self, program: Callable[..., Any], params: Mapping[str, Any]):
        self.program, self.params = program, dict(params)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program."""
        known = handlers.substitute(self.program, data=self.params)
        return handlers.block(known, hide=list(self.params))(*args, **kwargs)

    def check_data(self, **data: Any) -> None:
        """What the program says of the data, if it does."""
        look = getattr(self.program, "check_data", None)
        if look is not None:
            look(**data)

    def __repr__(self) -> str:
        leaves = jax.tree_util.tree_leaves_with_path(self.params)
        arrays = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
        return f"Held({describe_value(self.program)}, {describe_arrays(arrays, contents=True)})"
