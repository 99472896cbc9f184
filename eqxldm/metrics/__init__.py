"""Measures of reconstructions and samples."""

from .frechet import (
    frechet_distance as frechet_distance,
    gaussian_moments as gaussian_moments,
)
from .image import psnr as psnr, ssim as ssim
from .manifold import precision_recall as precision_recall
