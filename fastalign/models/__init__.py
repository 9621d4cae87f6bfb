"""Properties of a transformers model, and the trial that tests each path it may run on."""

from fastalign.models.identity import Verdict, language_model
from fastalign.models.trial import Probe, tried

__all__ = ["Probe", "Verdict", "language_model", "tried"]
