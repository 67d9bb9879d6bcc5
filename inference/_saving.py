"""A fit on disk: ``fit.json`` and ``arrays.npz``. No pickle is written or read."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from inference._checks import look
from inference._describe import versions
from inference._steps import SEED_AXES, State
from inference.sites import Program

FORMAT = 1  # the number of the newest format


SAVED = ("params", "mutable", "elbo", "validation_elbo", "state", "config", "info", "batch")


class FitError(ValueError):
    """A saved fit that cannot be read, or that belongs to other programs."""


def write(path: Path, fields: Mapping[str, Any]) -> None:
    """Writes the fields of a fit into a directory.

    Raises:
        FitError: the directory holds something else, or cannot be written.
    """
    trees = {"params": fields["params"], "mutable": fields["mutable"]}
    if fields["state"] is not None:
        trees["state"] = fields["state"]._asdict()
    arrays, kinds = {}, {}
    for prefix, tree in trees.items():
        for path_in_tree, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = f"{prefix}{path_of(path_in_tree)}"
            arrays[name], kinds[name] = _plain(leaf)
    arrays["elbo"], kinds["elbo"] = _plain(fields["elbo"])
    if fields["validation_elbo"] is not None:
        arrays["validation_elbo"], kinds["validation_elbo"] = _plain(fields["validation_elbo"])
    described = {
        "format": FORMAT,
        "guidebook": versions()["guidebook"],
        "config": fields["config"],
        "info": fields["info"],
        "batch": {name: [str(a.dtype), list(a.shape)] for name, a in fields["batch"].items()},
        "has_state": fields["state"] is not None,
        "arrays": kinds,
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
        strangers = {p.name for p in path.iterdir()} - {"fit.json", "arrays.npz"}
        if strangers:
            raise FitError(
                f"{path}: expected a new directory or a saved fit, got one that holds "
                f"{sorted(strangers)[0]!r}; give another directory"
            )
        names = {name: f"a{i}" for i, name in enumerate(arrays)}  # zip dislikes some characters
        with (path / "arrays.npz").open("wb") as stream:
            np.savez(stream, **{names[name]: array for name, array in arrays.items()})
        (path / "fit.json").write_text(json.dumps(described, indent=1) + "\n")
    except OSError as error:
        raise FitError(
            f"{path}: expected a directory that can be written, got {error.strerror or error}; "
            f"give another directory"
        ) from error


def read(path: Path, model: Program, guide: Program) -> dict[str, Any]:
    """Reads the fields of a fit and compares them with the programs.

    Raises:
        FitError: the directory is damaged or foreign, or the programs have other parameters.
    """
    described, arrays = _read(path)
    batch = {
        name: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))
        for name, (dtype, shape) in described["batch"].items()
    }
    found = look(model, guide, batch, key=random.key(0), whole=True, can_infer_discrete=True)
    trees = []
    for prefix, expected in (("params", found.params), ("mutable", found.mutable)):
        stored = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
        got = {name: a.shape[1:] for name, a in stored.items()}
        compare_shapes(f"{path}: {prefix}", shapes_of(expected), got, FitError)
        trees.append(
            jax.tree_util.tree_map_with_path(
                lambda p, _, stored=stored: jnp.asarray(stored[path_of(p)]), expected
            )
        )
    state = None
    if described["has_state"]:
        fields = {
            name: [a for n, a in arrays.items() if n.startswith(f"state['{name}']")]
            for name in State._fields
        }
        single = [n for n, axis in zip(State._fields, SEED_AXES, strict=True) if axis is None]
        single += ["best_elbo", "num_stale", "active"]
        known: dict[str, Any] = {n: v[0] if n in single else v for n, v in fields.items()}
        state = State(**known)
    return {
        "params": trees[0],
        "mutable": trees[1],
        "elbo": arrays["elbo"],
        "validation_elbo": arrays.get("validation_elbo"),
        "state": state,
        "config": described["config"],
        "info": described["info"],
        "batch": batch,
    }


def _plain(leaf: Any) -> tuple[np.ndarray, str]:
    """An array that NumPy's format holds, and the name of its type."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(random.key_data(leaf)), "key"
    array = np.asarray(leaf)
    if array.dtype.kind == "V":  # bfloat16 and its kin
        return array.view(f"u{array.dtype.itemsize}"), array.dtype.name
    return array, array.dtype.name


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The two files of a fit."""
    remedy = "give the directory that Fit.save wrote, or save the fit anew"
    try:
        described = json.loads((path / "fit.json").read_text())
        with (
            (path / "arrays.npz").open("rb") as stream,
            np.load(stream, allow_pickle=False) as archive,
        ):
            stored = {name: archive[name] for name in archive.files}
        if described["format"] > FORMAT:
            raise FitError(
                f"{path}: expected format {FORMAT} or older, got {described['format']}, written "
                f"by guidebook {described['guidebook']}; update guidebook"
            )
        arrays = {
            name: _restored(stored[f"a{i}"], kind)
            for i, (name, kind) in enumerate(described["arrays"].items())
        }
        for part in ("config", "info", "batch", "has_state"):
            described[part]
        return described, arrays
    except FitError:
        raise
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise FitError(f"{path}: expected a saved fit, got no {missing} in it; {remedy}") from error
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise FitError(
            f"{path}: expected a saved fit, got one that cannot be read "
            f"({type(error).__name__}: {error}); {remedy}"
        ) from error


def _restored(array: np.ndarray, kind: str) -> Any:
    if kind == "key":
        return random.wrap_key_data(jnp.asarray(array))
    return array if array.dtype.name == kind else array.view(jnp.dtype(kind))


def shapes_of(tree: Any, seed_axis: bool = False) -> dict[str, tuple[int, ...]]:
    """The shape of every array of a tree, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(p): tuple(np.shape(leaf))[seed_axis:] for p, leaf in leaves}


def path_of(path: Any) -> str:
    """A path in a tree, as text."""
    return jax.tree_util.keystr(path)


def compare_shapes(kind: str, expected: dict, got: dict, error: type[ValueError]) -> None:
    """Raises where names or shapes of a fit's arrays are not those of the programs."""
    for name in [*expected, *got]:
        if expected.get(name) != got.get(name):
            words = [
                "none" if shapes.get(name) is None else f"shape {shapes[name]}"
                for shapes in (expected, got)
            ]
            raise error(
                f"{kind} {name}: expected {words[0]}, as the programs have it, got {words[1]} in "
                f"the fit; give the programs that the parameters belong to"
            )
