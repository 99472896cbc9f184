"""Measures of reconstructions and samples."""

from .frechet import (
    frechet_distance as frechet_distance,
    gaussian_distance as gaussian_distance,
    gaussian_moments as gaussian_moments,
)
from .image import psnr as psnr, ssim as ssim
from .inception_score import InceptionScore as InceptionScore, inception_score as inception_score
from .kernel import KID as KID, cmmd as cmmd, kid as kid
from .manifold import (
    Manifold as Manifold,
    density_coverage as density_coverage,
    manifold_scores as manifold_scores,
    precision_recall as precision_recall,
)
from .moments import (
    Moments as Moments,
    merge_moments as merge_moments,
    moments_of as moments_of,
    stream_moments as stream_moments,
)
from .reference import (
    Reference as Reference,
    read_reference as read_reference,
    write_reference as write_reference,
)
from .tracking import (
    Motion as Motion,
    blobs as blobs,
    motions as motions,
    reflected as reflected,
    track as track,
    wall_times as wall_times,
)
