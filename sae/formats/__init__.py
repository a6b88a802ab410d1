"""On-disk formats. Adding one is a file here and a line below."""

from pathlib import Path
from typing import Protocol

from sae.formats.saelens import SAELensFormat
from sae.sae import SAE


class Format(Protocol):
    """How one family of SAE folders is recognised, read and written."""

    def detect(self, path: Path) -> bool:
        """Say whether `path` holds this format, by its content."""

    def load(self, path: Path) -> SAE:
        """Read the SAE at `path`."""

    def save(self, sae: SAE, path: Path) -> None:
        """Write `sae` to `path`."""


FORMATS: dict[str, Format] = {"saelens": SAELensFormat()}
