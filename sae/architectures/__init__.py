"""The architectures. Adding one is a file here and a line below."""

from sae.architectures.identity import IdentitySAE
from sae.architectures.standard import StandardSAE
from sae.sae import SAE

ARCHITECTURES: dict[str, type[SAE]] = {cls.architecture: cls for cls in (StandardSAE, IdentitySAE)}
