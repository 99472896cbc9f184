"""Runs the blocks of a page (JSON on standard input) and writes what each printed and drew.

usage: run_blocks.py NAME OUT < BLOCKS
"""

import io
import json
import os
import re
import sys
import time
from contextlib import redirect_stdout

import matplotlib
import matplotlib.pyplot as plt

# Figures have no ground of their own, and what would be black is the colour of the page's text.
_INK = "#010203"
_STYLE = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "font.size": 10,
    "image.cmap": "gray",
    "image.interpolation": "none",
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "eqxldm",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.prop_cycle": matplotlib.cycler(
        color=["#4f7cd6", "#e07b39", "#2fa37c", "#c9529c", "#9a8a2f", "#7a6bd0"]
    ),
}


def main(name, out):
    """Run the blocks in one namespace, as if they were one program."""
    matplotlib.rcParams.update(_STYLE)
    blocks = json.load(sys.stdin)
    names, results = {"__name__": "__main__"}, []
    for number, block in enumerate(blocks):
        printed, begin = io.StringIO(), time.monotonic()
        with redirect_stdout(printed):
            exec(compile(block, f"{name}, block {number + 1}", "exec"), names)
        seconds = time.monotonic() - begin
        figures = [_drawn(plt.figure(number)) for number in plt.get_fignums()]
        plt.close("all")
        print(f"  block {number + 1} of {len(blocks)}: {seconds:.1f} s", flush=True)
        results.append({"printed": printed.getvalue(), "figures": figures, "seconds": seconds})
    # Whole or not at all: what is there under this name is taken for the result.
    with open(out + ".part", "w") as file:
        json.dump(results, file)
    os.replace(out + ".part", out)


def _drawn(figure):
    svg = io.StringIO()
    figure.savefig(svg, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = svg.getvalue()
    text = text[text.index("<svg") :]
    # The size in points becomes the greatest width; smaller screens scale it down.
    width = re.search(r'<svg[^>]*? width="([\d.]+)pt"', text)[1]
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = text.replace("<svg", f'<svg style="max-width: {float(width) * 1.4:.0f}px"', 1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    label = figure.get_label()
    return {"svg": text.replace(_INK, "currentColor"), "caption": label}


if __name__ == "__main__":
    main(*sys.argv[1:])
