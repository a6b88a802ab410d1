"""The architectures. Adding one is a file here and a line below."""

from sae.architectures.batchtopk import BatchTopKSAE
from sae.architectures.identity import IdentitySAE
from sae.architectures.jumprelu import JumpReLUSAE
from sae.architectures.standard import StandardSAE
from sae.architectures.topk import TopKSAE
from sae.sae import SAE

ARCHITECTURES: dict[str, type[SAE]] = {
    cls.architecture: cls for cls in (StandardSAE, TopKSAE, BatchTopKSAE, JumpReLUSAE, IdentitySAE)
}
