"""From a base model to text aligned with a palette: sample candidates, select among them, best-of-N."""

from fastalign.decode.adaptive import Adaptive, Pilot, adaptive, pilot
from fastalign.decode.best_of import BestOf, best_of
from fastalign.decode.candidates import Candidates
from fastalign.decode.estimates import BestOfCurve, Estimate, best_of_curve, best_of_n_kl, estimate, needed
from fastalign.decode.particles import Particles, particles
from fastalign.decode.rejection import Rejection, speculative_rejection
from fastalign.decode.sampler import Sampler
from fastalign.decode.select import effective_sample_size, select
from fastalign.decode.worth import Worth, worth

__all__ = [
    "Adaptive",
    "BestOf",
    "BestOfCurve",
    "Candidates",
    "Estimate",
    "Particles",
    "Pilot",
    "Rejection",
    "Sampler",
    "Worth",
    "adaptive",
    "best_of",
    "best_of_curve",
    "best_of_n_kl",
    "effective_sample_size",
    "estimate",
    "needed",
    "particles",
    "pilot",
    "select",
    "speculative_rejection",
    "worth",
]
