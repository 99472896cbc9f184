"""What the documentation shows runs."""

import re

import jax
import jax.numpy as jnp
import pytest
from pages import ROOT, run_blocks

# Pages that the build of the site executes as a whole are not here, but for the recipes.
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if not page.read_text().startswith("---\nexecute: true")
]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{k}")
    for page in PAGES
    for k, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_in_the_pages_runs(block):
    names = {}
    exec(block, names)
    if "draw" in names and "loss" in names:  # README: the functions are defined, so call them
        dit, key = names["dit"], names["key"]
        x, label = jnp.ones((4, 8, 8)), jnp.array(1)
        assert names["loss"](dit, x, label, key).shape == ()
        drawn = jax.jit(lambda key: names["draw"](dit, label, key))(key)
        assert drawn.shape == x.shape and bool(jnp.isfinite(drawn).all())


def test_the_recipes_run(tmp_path):
    """All on one page, from first to last, as the build of the site runs them."""
    page = (ROOT / "docs" / "recipes.md").read_text()
    done, results = run_blocks(tmp_path, *re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    assert done.returncode == 0, done.stderr
    printed = "".join(result["printed"] for result in results)
    bits = [float(number) for number in re.findall(r"([\d.]+) bits", printed)]
    assert 0 < bits[0] < bits[1]  # what the network knows costs less
    assert sum(len(result["figures"]) for result in results) >= 7
