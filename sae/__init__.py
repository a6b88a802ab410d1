"""Sparse autoencoders: architectures, training, evaluation, formats and steering. Knows nothing of LLM explainers.

Imports with torch, numpy, safetensors and pydantic alone; everything heavier is imported where it is used.
"""

from sae.config import EvaluateConfig, TrainConfig
from sae.sae import SAE, LatentStatistics, SAEConfig
from sae.train import train, train_sweep

__all__ = ["SAE", "EvaluateConfig", "LatentStatistics", "SAEConfig", "TrainConfig", "train", "train_sweep"]
