"""How it is learnt: one engine, and judges that say how good the fit is."""

from inference.checkpoints import CheckpointError
from inference.datatree import to_datatree
from inference.engine import Fit, NonFiniteError, fit
from inference.evaluation import pointwise_elbo
from inference.optimizers import precondition
from inference.particles import antithetic

__all__ = [
    "CheckpointError",
    "Fit",
    "NonFiniteError",
    "antithetic",
    "fit",
    "pointwise_elbo",
    "precondition",
    "to_datatree",
]
