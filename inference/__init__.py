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
from inference.objectives import Hybrid, KLWarmUp, KLWeighted
from inference.optimizers import precondition
from inference.particles import antithetic

__all__ = [
    "CheckpointError",
    "ElboTerms",
    "Estimate",
    "Fit",
    "Hybrid",
    "KLWarmUp",
    "KLWeighted",
    "LabelCheck",
    "NonFiniteError",
    "Sample",
    "antithetic",
    "decode",
    "elbo_terms",
    "encode",
    "fit",
    "interpolate",
    "label_check",
    "log_likelihood",
    "pointwise_elbo",
    "precondition",
    "reconstruct",
    "sample",
    "to_datatree",
    "traverse",
]
