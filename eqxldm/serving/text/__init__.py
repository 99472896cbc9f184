"""A server for text: masked diffusion whose requests share the network's calls.

- `TextGenerator`: what is served, as functions.
- `TextEngine`: the queue and the slots, a thread that writes. It needs no HTTP.
- `TextAnswers`: `POST /v1/completions`.
"""

from .answers import TextAnswers as TextAnswers
from .canvas import Canvas as Canvas, lay_out as lay_out
from .engine import Progress as Progress, TextEngine as TextEngine, Written as Written
from .generator import TextDefaults as TextDefaults, TextGenerator as TextGenerator
from .programs import TextPrograms as TextPrograms
from .requests import TextAnswer as TextAnswer, TextRequest as TextRequest, parse_text as parse_text
