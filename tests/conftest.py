"""What every test stands on: shapes checked as programs run, eight devices, nothing of the user's.

That warnings are errors is set in pyproject.toml.
"""

import gc
import os
import sys
import tempfile
import types
from typing import Any

import beartype
import jax
import jaxtyping
import numpy as np
import psutil
import pytest

_checked: dict[tuple[Any, ...], tuple[Any, Any]] = {}


def checked(stub: Any) -> Any:
    """``beartype``. It sees a function within a function once, and not at every call of the outer.

    jaxtyping hands it no function itself, but a stub that takes the same arguments, or the result
    too, and does nothing. Stubs of the same code, annotations and defaults check the same.
    """
    if not isinstance(stub, types.FunctionType) or "<locals>" not in stub.__qualname__:
        return beartype.beartype(stub)
    defaults = (*(stub.__defaults__ or ()), *(stub.__kwdefaults__ or {}).values())
    annotations = tuple(stub.__annotations__.items())
    key = stub.__module__, stub.__qualname__, stub.__code__, annotations, *map(id, defaults)
    if key not in _checked:
        _checked[key] = beartype.beartype(stub), defaults  # kept: no other object gets their ids
    return _checked[key][0]


# Every annotation in the packages is checked when a function is called. This must come before
# their first import.
jaxtyping.install_import_hook(["models", "inference", "experiments"], f"{__name__}.checked")

# A CPU stands in for eight. This must come before JAX looks for devices; where it finds a GPU,
# that is still the one it computes on, and tests that need eight devices skip themselves.
# Programs here are small and run once, so that most of the time goes into compiling them: let XLA
# do that in haste, in the processes that tests start too.
os.environ["XLA_FLAGS"] = " ".join(
    [
        *os.environ.get("XLA_FLAGS", "").split(),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)

if "JAX_NUM_CPU_DEVICES" not in os.environ:
    jax.config.update("jax_num_cpu_devices", 8)

# As in the scripts, products of float32 arrays are in float32 on every device.
if jax.config.jax_default_matmul_precision is None:
    jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure(config: pytest.Config) -> None:
    """Settings that the processes which tests start inherit."""
    caches = tempfile.TemporaryDirectory(prefix="guidebook-caches-")
    config.add_cleanup(caches.cleanup)
    os.environ |= {
        "MPLBACKEND": "Agg",
        "MPLCONFIGDIR": f"{caches.name}/matplotlib",
        "XDG_CACHE_HOME": caches.name,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # leaves those processes room on a GPU
    }
    _share_compiled_programs(f"{caches.name}/jax")
    # Nothing locks an entry of the cache: one that is read half written is compiled anew.
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent comp")


def _share_compiled_programs(directory: str) -> None:
    """One cache for this session's processes: its workers, and what the tests start.

    A worker finds the variables in its environment, where the first process has put them.
    """
    for name, value in {
        "jax_compilation_cache_dir": directory,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_persistent_cache_enable_xla_caches": "none",
    }.items():
        if name.upper() not in os.environ:
            os.environ[name.upper()] = str(value)
            jax.config.update(name, value)


def pytest_collection_finish() -> None:
    """Tracing makes many objects. Looking through all modules for garbage would take a fifth of
    the time. So the collector leaves out what is there by now, and looks less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """A worker stays small: after a file that leaves it large, JAX forgets what it has compiled."""
    yield
    if psutil.Process().memory_info().rss > 1.2 * 2**30:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in every run, whatever ran before."""
    return np.random.default_rng(0)


@pytest.fixture
def without_type_checks():
    """The packages as a user has them: a wrong type meets their own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
