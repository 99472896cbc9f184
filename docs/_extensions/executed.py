"""For mkdocs: pages whose Python is run while the site is built, and the progress of the build.

A page with `execute: true` in its front matter has its ```python blocks run from first to last,
in one process and one namespace. What a block prints follows it, and so do the figures that it
leaves open. Results are cached by the blocks and the library's source: a change of a word runs
nothing.
"""

import hashlib
import html
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from mkdocs.exceptions import PluginError

_ROOT = Path(__file__).parents[2]
_RUNNER = Path(__file__).with_name("run_blocks.py")
_CACHE = _ROOT / ".docs_cache"
_BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
_FIGURE = re.compile(r'<div class="figure" id="figure-(\d+)-(\d+)"></div>')

_results: dict[str, list] = {}  # by page: of each block, what it printed and its figures
_seen: list[str] = []


def on_pre_build(**_):
    """Forget the build before (`mkdocs serve` builds again and again)."""
    _results.clear()
    _seen.clear()


def on_page_markdown(markdown, page, files, **_):
    """Report the page; if it is to be executed, put what its blocks print and draw behind them."""
    name = page.file.src_uri
    _seen.append(name)
    count = len(files.documentation_pages())
    print(f"[{len(_seen)}/{count}] {name}", flush=True)
    if not page.meta.get("execute"):
        return None
    results = _results[name] = _run(name, _BLOCK.findall(markdown))
    of_block = iter(enumerate(results))

    def with_output(match):
        block, result = next(of_block)
        parts = [match[0]]
        if result["printed"]:
            parts.append(f"\n``` {{ .text .output }}\n{result['printed'].rstrip()}\n```\n")
        for figure in range(len(result["figures"])):
            parts.append(f'\n<div class="figure" id="figure-{block}-{figure}"></div>\n')
        return "".join(parts)

    seconds = sum(result["seconds"] for result in results)
    return (
        _BLOCK.sub(with_output, markdown)
        + f"\n\n*The code of this page ran in {seconds:.0f} seconds when the site was built.*\n"
    )


def on_page_content(content, page, **_):
    """Put the figures in; they would only be slow to read as Markdown."""
    results = _results.get(page.file.src_uri)
    if results is None:
        return None

    def drawn(match):
        figure = results[int(match[1])]["figures"][int(match[2])]
        caption = html.escape(figure["caption"])
        below = f"<figcaption>{caption}</figcaption>" if caption else ""
        return (
            f'<figure class="plot" role="img" aria-label="{caption}" data-search-exclude>'
            f"{figure['svg']}{below}</figure>"
        )

    return _FIGURE.sub(drawn, content)


def _run(name, blocks):
    path = _CACHE / f"{_identity(blocks)}.json"
    if path.exists():
        return json.loads(path.read_text())
    print(f"  executing {len(blocks)} blocks", flush=True)
    _CACHE.mkdir(exist_ok=True)
    begin = time.monotonic()
    finished = subprocess.run(
        [sys.executable, "-W", "error", str(_RUNNER), name, str(path)],
        input=json.dumps(blocks),
        text=True,
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "MPLBACKEND": "agg"},
    )
    if finished.returncode != 0:
        raise PluginError(f"{name}: a block failed; its error stands above")
    print(f"  executed in {time.monotonic() - begin:.0f} s", flush=True)
    return json.loads(path.read_text())


def _identity(blocks):
    """Of the blocks and of all that they run."""
    digest = hashlib.sha256(json.dumps(blocks).encode())
    for path in [_RUNNER, *sorted((_ROOT / "eqxldm").rglob("*.py"))]:
        digest.update(path.read_bytes())
    for package in ("equinox", "jax", "matplotlib", "numpy", "optax"):
        digest.update(f"{package} {version(package)}".encode())
    return digest.hexdigest()[:32]
