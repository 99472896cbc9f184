"""Published pipelines: a diffusers folder as parts and functions that compose with the library.

pipe = pipelines.load("stable-diffusion-v1-5")
cond, null = pipe.encode(["a red fox in the snow"]), pipe.null()
times, keys = pipe.times(28), jax.random.split(jax.random.key(0), 1)
denoiser = pipelines.GuidedDenoiser(pipe.denoiser, null, jnp.array(7.5))
z = pipe.noise(keys, 512, 512, times)
z = pipelines.sample_latents(denoiser, pipe.diffusion, pipe.solver, times, z, cond)
images = pipe.decode(z)
"""

from .denoisers import (
    ExtraChannels as ExtraChannels,
    GuidedDenoiser as GuidedDenoiser,
    NetworkDenoiser as NetworkDenoiser,
    SkipLayers as SkipLayers,
    skip_layers as skip_layers,
)
from .errors import PipelineError as PipelineError
from .families import FAMILIES as FAMILIES, Family as Family
from .folder import (
    Folder as Folder,
    PartFiles as PartFiles,
    open_pipeline_folder as open_pipeline_folder,
)
from .grids import (
    AbstractGrid as AbstractGrid,
    FlowGrid as FlowGrid,
    MultistepFlowGrid as MultistepFlowGrid,
    TableGrid as TableGrid,
)
from .interpolated import InterpolatedVP as InterpolatedVP
from .pipeline import (
    Pipeline as Pipeline,
    check_lora as check_lora,
    describe as describe,
    load as load,
    merge_lora as merge_lora,
)
from .sampling import (
    Keep as Keep,
    Step as Step,
    latent_mask as latent_mask,
    sample_latents as sample_latents,
    sample_steps as sample_steps,
    start_latents as start_latents,
    step_program as step_program,
    steps_of_strength as steps_of_strength,
)
from .schedules import (
    Schedule as Schedule,
    load_schedule as load_schedule,
    read_schedule as read_schedule,
)
from .text import Encoding as Encoding, TextPart as TextPart
