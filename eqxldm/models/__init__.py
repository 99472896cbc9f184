"""The networks, one example at a time: autoencoder, discriminator, DiT."""

from .autoencoder import AutoencoderKL as AutoencoderKL, Posterior as Posterior
from .classifier import ConvClassifier as ConvClassifier
from .discriminator import PatchDiscriminator as PatchDiscriminator
from .dit import DiT as DiT, save_matmuls as save_matmuls
