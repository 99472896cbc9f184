"""Published pipelines: a diffusers folder as parts and functions that compose with the library."""

from .errors import PipelineError as PipelineError
from .grids import AbstractGrid as AbstractGrid, FlowGrid as FlowGrid, TableGrid as TableGrid
from .interpolated import InterpolatedVP as InterpolatedVP
from .schedules import (
    Schedule as Schedule,
    load_schedule as load_schedule,
    read_schedule as read_schedule,
)
