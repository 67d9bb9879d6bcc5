"""What an import does not do."""

import subprocess
import sys

CODE = """
import experiments.certify, experiments.diagnose, experiments.mnist_vae, inference, models.guides
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""


def test_an_import_does_not_start_jax():
    """``jax.distributed.initialize`` must come before, and so must the choice of devices."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
