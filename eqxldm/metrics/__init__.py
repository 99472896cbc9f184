"""Measures of reconstructions and samples."""

from .frechet import (
    frechet_distance as frechet_distance,
    gaussian_distance as gaussian_distance,
    gaussian_moments as gaussian_moments,
)
from .image import psnr as psnr, ssim as ssim
from .tracking import (
    Motion as Motion,
    blobs as blobs,
    motions as motions,
    reflected as reflected,
    track as track,
