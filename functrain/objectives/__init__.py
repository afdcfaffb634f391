"""What is minimised: a sum over a batch, and the weight that divides it."""

from functrain.objectives.base import Carrying, Coupled, Objective, logits_of
from functrain.objectives.head import Head, find_head
from functrain.objectives.head import described as describe_head
from functrain.objectives.language import LanguageModeling
from functrain.objectives.logprobs import TokenScores, sequence_logps, token_scores
from functrain.objectives.losses import DIVERGENCES, LOSSES, PairLogps, PairLoss
from functrain.objectives.preference import PreferenceOptimization
from functrain.objectives.reference import reference_logps
from functrain.objectives.routing import RoutedLanguageModeling
from functrain.objectives.unpaired import UnpairedOptimization

__all__ = [
    "DIVERGENCES",
    "LOSSES",
    "Carrying",
    "Coupled",
    "Head",
    "LanguageModeling",
    "Objective",
    "PairLogps",
    "PairLoss",
    "PreferenceOptimization",
    "RoutedLanguageModeling",
    "TokenScores",
    "UnpairedOptimization",
    "describe_head",
    "find_head",
    "logits_of",
    "reference_logps",
    "sequence_logps",
    "token_scores",
]
