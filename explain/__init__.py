"""Which examples fire a feature -> propose a description -> simulate activations from it -> score -> report."""

from explain.config import ExplainConfig
from explain.scores import CorrelationScores, correlation_scores

__all__ = ["CorrelationScores", "ExplainConfig", "correlation_scores"]
