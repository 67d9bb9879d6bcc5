"""Products of float32 matrices in float32, on every device.

JAX's default is the fastest product that a device has: on a recent NVIDIA GPU TensorFloat-32, whose
inputs have 10 bits after the leading one instead of 23, on a TPU bfloat16 with 7. That error can be
seen beside exact answers. So the scripts compute in float32. ``--dtype bfloat16`` asks for speed.
"""

import jax

SETTING = "jax_default_matmul_precision"


def full_precision() -> None:
    """Makes float32 the precision of products and convolutions of float32 arrays, in this process.

    A CPU computes so in any case. A precision that the user has set, by
    ``JAX_DEFAULT_MATMUL_PRECISION`` or in ``jax.config``, stays.
    """
    if getattr(jax.config, SETTING) is None:
        jax.config.update(SETTING, "highest")
