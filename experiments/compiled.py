"""Compiled programs, kept on disk for the next process.

A script calls ``keep_compiled()`` before its first step. A notebook may call it in its first cell:

    from experiments.compiled import keep_compiled

    keep_compiled()
"""

import os
import warnings
from pathlib import Path

import jax
import pooch

MAX_BYTES = 2**27  # of the directory. The entries that were used longest ago go first.
SETTINGS = {
    "jax_compilation_cache_max_size": MAX_BYTES,
    "jax_persistent_cache_min_compile_time_secs": 0.05,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_persistent_cache_enable_xla_caches": "none",  # they know no bound
}


def keep_compiled() -> Path | None:
    """Keeps compiled programs in the user's cache directory (JAX's persistent compilation cache).

    A program that is found there is the one that was compiled before, so results have the same
    bits. An entry that cannot be read is compiled anew.

    A directory that the user has named by ``JAX_COMPILATION_CACHE_DIR`` or in ``jax.config`` is
    used instead, with the user's own settings. ``JAX_ENABLE_COMPILATION_CACHE=0`` keeps nothing.

    Returns:
        The directory, or None if nothing is kept.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    if jax.config.jax_compilation_cache_dir is not None:
        return Path(jax.config.jax_compilation_cache_dir)
    directory = pooch.os_cache("guidebook") / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    for name, value in SETTINGS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    return directory
