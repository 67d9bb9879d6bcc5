"""How it is learnt: one engine, and judges that say how good the fit is."""

from inference._checkpoints import CheckpointError
from inference._checks import ProgramError
from inference._data import Prepared
from inference._saving import FitError
from inference._streams import StreamError
from inference.annealing import Bracket, bracket
from inference.calibration import plot_calibration, sbc, sbc_power
from inference.comparison import compare
from inference.datatree import to_datatree
from inference.diagnosis import Page, diagnose
from inference.engine import fit
from inference.evaluation import (
    ElboTerms,
    Estimate,
    LabelCheck,
    elbo_terms,
    label_check,
    log_likelihood,
    log_predictive_density,
    pareto_k_threshold,
    pointwise_elbo,
    pointwise_log_likelihood,
)
from inference.fit import Fit, Interrupted, NonFiniteError
from inference.gaps import InferenceGap, inference_gap
from inference.generation import (
    decode,
    encode,
    interpolate,
    reconstruct,
    sample_posterior,
    sample_posterior_predictive,
    sample_prior_predictive,
    traverse,
)
from inference.held import Held
from inference.objectives import (
    OBJECTIVES,
    DoublyReparameterized,
    FreeBits,
    Hybrid,
    ImportanceWeighted,
    KLWarmUp,
    KLWeighted,
    LabelTerm,
    ReweightedWakeSleep,
    StickingTheLanding,
    Traits,
    traits,
)
from inference.optimizers import precondition
from inference.particles import InPieces, antithetic
from inference.prediction import LabelProbabilities, Prediction, plot_reliability, predict

__all__ = [
    "OBJECTIVES",
    "Bracket",
    "CheckpointError",
    "DoublyReparameterized",
    "ElboTerms",
    "Estimate",
    "Fit",
    "FitError",
    "FreeBits",
    "Held",
    "Hybrid",
    "ImportanceWeighted",
    "InPieces",
    "InferenceGap",
    "Interrupted",
    "KLWarmUp",
    "KLWeighted",
    "LabelCheck",
    "LabelProbabilities",
    "LabelTerm",
    "NonFiniteError",
    "Page",
    "Prediction",
    "Prepared",
    "ProgramError",
    "ReweightedWakeSleep",
    "StickingTheLanding",
    "StreamError",
    "Traits",
    "antithetic",
    "bracket",
    "compare",
    "decode",
    "diagnose",
    "elbo_terms",
    "encode",
    "fit",
    "inference_gap",
    "interpolate",
    "label_check",
    "log_likelihood",
    "log_predictive_density",
    "pareto_k_threshold",
    "plot_calibration",
    "plot_reliability",
    "pointwise_elbo",
    "pointwise_log_likelihood",
    "precondition",
    "predict",
    "reconstruct",
    "sample_posterior",
    "sample_posterior_predictive",
    "sample_prior_predictive",
    "sbc",
    "sbc_power",
    "to_datatree",
    "traits",
    "traverse",
]
