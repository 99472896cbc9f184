"""A text appearing, as one HTML page that needs nothing else."""

import html
import json
from pathlib import Path

import numpy as np

from eqxldm.durable import replacing

from .corpus import Vocabulary

PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 1.1rem/1.6 monospace; max-width: 48rem; margin: 3rem auto; }}
#text {{ white-space: pre-wrap; overflow-wrap: anywhere; }}</style>
<h1>{title}</h1><p id="text">{last}</p>
<p><input id="step" type="range" min="0" max="{most}" value="{most}"> <span id="at"></span></p>
<script>
const frames = {frames}, step = document.getElementById("step");
const show = () => {{
  document.getElementById("text").textContent = frames[step.value];
  document.getElementById("at").textContent = "step " + step.value + " of {most}";
}};
step.oninput = show;
let i = 0;
const timer = setInterval(() => {{
  step.value = i; show(); if (++i >= frames.length) clearInterval(timer);
}}, 120);
</script>
"""


def write_page(path: Path, vocabulary: Vocabulary, frames: np.ndarray, title: str) -> None:
    """The steps `(steps, n)` of one text as a page; "_" where it is still masked."""
    texts = [vocabulary.decode(frame) for frame in frames]
    kept = [text for i, text in enumerate(texts) if i == 0 or text != texts[i - 1]]
    page = PAGE.format(
        title=html.escape(title),
        last=html.escape(kept[-1]),
        most=len(kept) - 1,
        frames=json.dumps(kept).replace("</", "<\\/"),
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
