"""What is minimised: a sum over a batch, and the weight that divides it."""

from functrain.objectives.base import Objective, logits_of
from functrain.objectives.language import LanguageModeling
from functrain.objectives.logprobs import sequence_logps
from functrain.objectives.preference import PreferenceOptimization
from functrain.objectives.reference import reference_logps

__all__ = [
    "LanguageModeling",
    "Objective",
    "PreferenceOptimization",
    "logits_of",
    "reference_logps",
    "sequence_logps",
]
