"""For mkdocstrings: shows the examples of docstrings as code."""

from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Puts every run of lines that begins with `>>>` into a fence, up to the next empty line."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None or ">>>" not in obj.docstring.value:
            return
        lines, inside = [], False
        for line in obj.docstring.value.splitlines():
            if line.startswith(">>>") and not inside:
                lines.append("```pycon")
                inside = True
            elif inside and not line.strip():
                lines.append("```")
                inside = False
            lines.append(line)
        obj.docstring.value = "\n".join([*lines, "```"] if inside else lines)
