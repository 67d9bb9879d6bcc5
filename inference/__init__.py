"""How it is learnt: one engine, and judges that say how good the fit is."""

from inference.checkpoints import CheckpointError
from inference.datatree import to_datatree
from inference.engine import Fit, NonFiniteError, fit
from inference.evaluation import (
    ElboTerms,
    Estimate,
    LabelCheck,
    elbo_terms,
    label_check,
    log_likelihood,
    pareto_k_threshold,
    pointwise_elbo,
)
from inference.generation import (
    Sample,
    decode,
    encode,
    interpolate,
    reconstruct,
    sample,
    traverse,
)
from inference.held import Held
from inference.objectives import (
    OBJECTIVES,
    DoublyReparameterized,
    FreeBits,
    Hybrid,
    KLWarmUp,
    KLWeighted,
    StickingTheLanding,
)
from inference.optimizers import precondition
from inference.particles import antithetic

__all__ = [
    "OBJECTIVES",
    "CheckpointError",
    "DoublyReparameterized",
    "ElboTerms",
    "Estimate",
    "Fit",
    "FreeBits",
    "Held",
    "Hybrid",
    "KLWarmUp",
    "KLWeighted",
    "LabelCheck",
    "NonFiniteError",
    "Sample",
    "StickingTheLanding",
    "antithetic",
    "decode",
    "elbo_terms",
    "encode",
    "fit",
    "interpolate",
    "label_check",
    "log_likelihood",
    "pareto_k_threshold",
    "pointwise_elbo",
    "precondition",
    "reconstruct",
    "sample",
    "to_datatree",
    "traverse",
]
