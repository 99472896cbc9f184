"""The exact versions of every dependency, with the hashes of all their files.

    python constraints/pins.py renew UV [--keep]           # write python3.11.txt and python3.12.txt
    python constraints/pins.py select FILE SET...          # requirements of some sets, with hashes
    python constraints/pins.py versions FILE               # all versions, as constraints

A block of such a file is a requirement, its hashes, and the sets that need it: `runtime`, the
extras of pyproject.toml, and `build`, which builds this package. pip takes a file from whatever
index has it, if its hash is one of them.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
PROJECT = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())
EXTRAS = tuple(PROJECT["project"]["optional-dependencies"])
SETS = ("build", "runtime", *EXTRAS)
COMPILE = "pip compile --universal --no-header --no-annotate --no-emit-index-url --quiet".split()


def blocks(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """`(requirement with its marker, lines of hashes, sets)` of each block.

    >>> list(blocks("a==1 \\\\\\n    --hash=sha256:00\\n    # runtime dev\\n"))
    [('a==1', '    --hash=sha256:00', ['runtime', 'dev'])]
    """
    for block in re.findall(r"^[^\s#].*(?:\n[ ].*)*", text, re.MULTILINE):
        head, *lines = block.splitlines()
        hashes = [line for line in lines if line.strip().startswith("--hash=")]
        sets = [word for line in lines if line.strip().startswith("#") for word in line.split()[1:]]
        yield head.removesuffix("\\").strip(), "\n".join(hashes), sets


def name(requirement: str) -> str:
    """The project of a requirement line.

    >>> name("array-record==0.8.6 ; sys_platform != 'win32'")
    'array-record'
    """
    return re.split(r"[=\s\[;]", requirement, maxsplit=1)[0]


def select(text: str, sets: list[str]) -> str:
    """The requirements of these sets with their hashes, for `pip install --require-hashes`."""
    if unknown := sorted(set(sets) - set(SETS)):
        raise SystemExit(f"no set named {', '.join(unknown)}: there are {', '.join(SETS)}.")
    chosen = [(head, hashes) for head, hashes, of in blocks(text) if set(of) & set(sets)]
    return "".join(f"{head} \\\n{hashes}\n" for head, hashes in chosen)


def versions(text: str) -> str:
    """All requirements without hashes."""
    return "".join(f"{head}\n" for head, _, _ in blocks(text))


def renew(uv: str, minor: str, *, keep: bool) -> None:
    """Resolves all sets at once, then asks which of it each set needs."""
    path = FOLDER / f"python{minor}.txt"
    project = FOLDER.parent / "pyproject.toml"
    build = [*PROJECT["build-system"]["requires"], "editables"]
    with tempfile.TemporaryDirectory() as folder:
        built, every = Path(folder, "build.in"), Path(folder, "all.txt")
        built.write_text("\n".join(build) + "\n")
        compile = [uv, *COMPILE, "--python-version", minor]
        if keep:
            every.write_text(versions(path.read_text()))
        upgrade = [] if keep else ["--upgrade"]
        all_of_it = [str(project), str(built), "--all-extras", *upgrade, "--generate-hashes"]
        subprocess.run([*compile, *all_of_it, "--output-file", str(every)], check=True)
        pinned = Path(folder, "pinned.txt")
        pinned.write_text(versions(every.read_text()))
        needed = {}
        for kind in SETS:
            asked = [str(built)] if kind == "build" else [str(project)]
            asked += ["--extra", kind] if kind in EXTRAS else []
            found = Path(folder, f"{kind}.txt")
            found.write_text(pinned.read_text())  # what an output file holds is preferred
            subprocess.run([*compile, *asked, "--output-file", str(found)], check=True)
            needed[kind] = {name(head) for head, _, _ in blocks(found.read_text())}
        lines = []
        for head, hashes, _ in blocks(every.read_text()):
            if minor == "3.11":  # a file for one minor version needs no marker for others
                if "python_full_version >= '3.12'" in head:
                    continue
                head = re.sub(r" ; python_full_version < '3\.12'$", "", head)
            sets = " ".join(kind for kind in SETS if name(head) in needed[kind])
            lines.append(f"{head} \\\n{hashes}\n    # {sets}\n")
    path.write_text("".join(lines))


def main(command: str, *args: str) -> None:
    if command == "renew":
        for minor in ("3.11", "3.12"):
            renew(args[0], minor, keep="--keep" in args)
    elif command == "select":
        print(select(Path(args[0]).read_text(), list(args[1:])), end="")
    elif command == "versions":
        print(versions(Path(args[0]).read_text()), end="")
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*(sys.argv[1:] or [""]))
