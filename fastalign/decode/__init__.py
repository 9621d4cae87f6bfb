"""From a base model to text aligned with a palette: sample candidates, select among them, best-of-N."""

from fastalign.decode.best_of import BestOf, best_of
from fastalign.decode.candidates import Candidates
from fastalign.decode.sampler import Sampler
from fastalign.decode.select import effective_sample_size, select

__all__ = ["BestOf", "Candidates", "Sampler", "best_of", "effective_sample_size", "select"]
