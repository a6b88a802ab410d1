"""Text -> token rows -> activations on disk -> shuffled batches. Knows nothing of sparse autoencoders."""

from activation_store.config import DataConfig, HarvestConfig, ModelConfig
from activation_store.errors import InputError
from activation_store.paired import PairedBatches
from activation_store.statistics import HookStatistics
from activation_store.store import ActivationStore

__all__ = ["ActivationStore", "DataConfig", "HarvestConfig", "HookStatistics", "InputError", "ModelConfig", "PairedBatches"]
