"""Products of float32 matrices in float32, on every device.

JAX's default is the fastest product that a device has. On a recent NVIDIA GPU that is
TensorFloat-32: inputs have 10 bits after the leading one. On a TPU it is bfloat16, with 7 bits.
Float32 has 23. The error shows beside exact answers (``inference/README.md``, Precision). So the
scripts compute in float32. ``--dtype bfloat16`` asks for speed.
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
