"""What an import does not do."""

import subprocess
import sys
from pathlib import Path

# One process for all: to start it takes longer than to look. What imports least comes first.
CODE = """
import sys

def absent(*names):
    assert sys.modules.keys().isdisjoint(names), sys.modules.keys() & {*names}

import inference.datatree
absent("arviz_base", "xarray", "pandas")
import experiments.datasets
absent("sklearn", "scipy.io")

import experiments.certify, experiments.diagnose, experiments.mnist_vae, inference, models.guides
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "JAX has started"
"""


def test_an_import_does_not_start_jax_nor_import_what_is_not_needed():
    """``jax.distributed.initialize`` must come before, and so must the choice of devices."""
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
