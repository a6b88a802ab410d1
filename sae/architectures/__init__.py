"""The architectures. Adding one is a file here and a line below."""

from sae.architectures.batchtopk import BatchTopKSAE
from sae.architectures.cross_layer import CrossLayerTranscoder
from sae.architectures.directions import DirectionsSAE
from sae.architectures.gated import GatedSAE
from sae.architectures.identity import IdentitySAE
from sae.architectures.jumprelu import JumpReLUSAE
from sae.architectures.matryoshka import MatryoshkaSAE
from sae.architectures.p_anneal import PAnnealSAE
from sae.architectures.standard import StandardSAE
from sae.architectures.topk import TopKSAE
from sae.sae import SAE

ARCHITECTURES: dict[str, type[SAE]] = {
    cls.architecture: cls
    for cls in (
        StandardSAE, PAnnealSAE, GatedSAE, TopKSAE, BatchTopKSAE, MatryoshkaSAE, JumpReLUSAE, CrossLayerTranscoder, IdentitySAE,
        DirectionsSAE,
    )
}  # fmt: skip
