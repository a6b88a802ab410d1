"""What texts mean, as vectors: any sentence-transformers folder."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from activation_store.errors import InputError, first_line


class Embedder:
    """A sentence-transformers model. The package is an extra: `pip install monosem[embeddings]`."""

    def __init__(self, folder: str) -> None:
        """Load it. Raises InputError where the package is not installed or the folder holds no such model."""
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise InputError("explain.embedder: needs sentence-transformers; `pip install monosem[embeddings]`") from None
        try:
            self._model: Any = SentenceTransformer(folder)
        except Exception as error:  # the package raises many kinds; all mean: no model there
            raise InputError(f"explain.embedder: cannot load {folder!r} ({first_line(error)})") from None

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return a vector of length 1 for each text, (text, dimension)."""
        if not texts:
            return np.zeros((0, self._model.get_sentence_embedding_dimension()), np.float32)
        found: NDArray[np.float32] = self._model.encode(
            list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
        return found
