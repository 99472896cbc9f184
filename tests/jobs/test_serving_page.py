"""The page in headless Chromium: it draws, cancels, shows what is wrong, at two widths."""

import os
from pathlib import Path

import httpx
import pytest
from chromium import chromium, page
from serving import make_generator, make_text_generator, writing
from test_serving_http import served, wait_for

from eqxldm.serving.engine import Engine

pytestmark = pytest.mark.skipif(chromium() is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def engine():
    engine = Engine(make_generator(), slots=2, queue=30, sizes=(4,), decodes=(4,))
    engine.start()
    assert engine.ready.wait(60)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def address(engine):
    with served(engine) as client:
        yield str(client.base_url)


@pytest.fixture(scope="module")
def browser():
    with page() as found:
        yield found


ID = "document.getElementById"
DONE = f"{ID}('status').textContent.startsWith('Done')"
FINISHED = "document.querySelectorAll('#images img[src]:not(.unfinished)').length"


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1400, False)])
def test_the_page_draws_at_two_widths(browser, address, engine, width, dark):
    browser.size(width, 900, dark=dark)
    browser.open(address)
    browser.wait(f"{ID}('status').textContent === 'Ready.'")
    assert browser.run("document.title") == "tiny"
    # By keyboard alone: from the class to the button, which Enter presses.
    browser.run(f"{ID}('steps').value = 6; {ID}('n').value = 3; {ID}('seed').value = 5")
    browser.run(f"{ID}('seed').focus()")
    browser.press("Enter", 13)
    browser.wait(DONE)
    assert browser.run(FINISHED) == 3
    assert browser.run("document.querySelectorAll('#history button').length") == 3
    # Compare, by the arrow keys of the tabs.
    browser.run(f"{ID}('tab-create').focus()")
    browser.press("ArrowRight", 39)
    assert browser.run("document.activeElement.id") == "tab-compare"
    browser.run(f"{ID}('go').click()")
    browser.wait(DONE)
    assert browser.run("document.querySelectorAll('#rows img[src]').length") == 18
    browser.press("ArrowRight", 39)
    browser.run(f"{ID}('tab-denoising').click(); {ID}('go').click()")
    browser.wait(DONE)
    assert browser.run("document.querySelectorAll('#reverse img').length") == 6
    assert browser.run("document.querySelectorAll('#forward img').length") == 8
    last = browser.run(f"{ID}('state').src")
    browser.run(f"{ID}('scrub').focus()")
    browser.press("ArrowLeft", 37)
    assert browser.run(f"{ID}('state').src") != last
    assert browser.run(f"{ID}('where').textContent").startswith("call 5 of 6")
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    for tab in ("create", "compare", "denoising"):
        browser.run(f"{ID}('tab-{tab}').click()")
        assert browser.run(overflow) <= 0, tab
    assert not browser.errors


def test_the_page_cancels_and_shows_what_is_wrong(browser, address, engine):
    browser.size(1400, 900)
    browser.open(address)
    browser.wait(f"{ID}('status').textContent === 'Ready.'")
    browser.run(f"{ID}('steps').value = 250; {ID}('n').value = 16; {ID}('go').click()")
    browser.wait(f"{ID}('status').textContent.startsWith('Step')")
    browser.run(f"{ID}('cancel').click()")
    browser.wait(f"{ID}('status').textContent === 'Cancelled.'")
    wait_for(lambda: not engine.active and not engine.waiting)
    browser.run(f"{ID}('steps').value = 9999; {ID}('settings').noValidate = true")
    browser.run(f"{ID}('go').click()")
    browser.wait(f"!{ID}('error').hidden")
    assert "steps must be a whole number in 1 .. 250" in browser.run(f"{ID}('error').textContent")
    assert not browser.run(f"{ID}('go').disabled") and not browser.errors


def test_the_page_of_text_writes_at_two_widths(browser):
    with writing(make_text_generator(), slots=2, sizes=(4,)) as engine, served(engine) as client:
        for width, dark in ((390, True), (1400, False)):
            browser.size(width, 900, dark=dark)
            write_and_look(browser, client)


def write_and_look(browser, client):
    browser.open(str(client.base_url))
    browser.wait(f"{ID}('status').textContent === 'Ready.'")
    assert browser.run("document.title") == "words"
    browser.run(f"{ID}('prompt').value = 'ab'; {ID}('n').value = 3; {ID}('seed').value = 5")
    browser.run(f"{ID}('seed').focus()")
    browser.press("Enter", 13)
    browser.wait(DONE)
    texts = "[...document.querySelectorAll('#texts article p')].map((p) => p.textContent)"
    found = browser.run(texts)
    assert len(found) == 3 and all(len(t) == 16 and t[:2] == "ab" for t in found)
    assert not any("_" in text for text in found)
    assert browser.run("document.querySelectorAll('#history button').length") == 3
    browser.run(f"{ID}('scrub').focus()")
    browser.press("ArrowLeft", 37)
    assert any("_" in text for text in browser.run(texts))
    # Blanks in a prompt, and what is wrong.
    browser.run(f"{ID}('prompt').value = 'a_b'; {ID}('infill').checked = true; {ID}('go').click()")
    browser.wait(f"{DONE} && document.querySelector('#texts article p').textContent.length === 3")
    browser.run(f"{ID}('prompt').value = 'xyz'; {ID}('go').click()")
    browser.wait(f"!{ID}('error').hidden")
    assert "is not among the letters" in browser.run(f"{ID}('error').textContent")
    assert len(browser.run(texts)) == 3  # what was written before is still there
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.run(overflow) <= 0 and not browser.errors


def test_pictures_for_the_documentation(browser):
    """Of a server with a trained run: EQXLDM_PAGE=http://127.0.0.1:8000."""
    where = os.environ.get("EQXLDM_PAGE")
    if where is None:
        pytest.skip("EQXLDM_PAGE names no server")
    assert httpx.get(f"{where}/readyz").status_code == 200
    images = Path(__file__).parents[2] / "docs" / "images"
    browser.size(1100, 780)
    browser.open(where)
    browser.wait(f"{ID}('status').textContent === 'Ready.'")
    browser.run(f"{ID}('label').value = 7; {ID}('n').value = 16; {ID}('n-slider').value = 16")
    browser.run(f"{ID}('seed').value = 0; {ID}('go').click()")
    browser.wait(DONE, 100)
    (images / "serve-create.png").write_bytes(browser.png())
    browser.run(f"{ID}('tab-compare').click(); {ID}('go').click()")
    browser.wait(DONE, 200)
    (images / "serve-compare.png").write_bytes(browser.png())
    browser.run(f"{ID}('tab-denoising').click(); {ID}('go').click()")
    browser.wait(DONE, 100)
    browser.run(f"{ID}('scrub').value = 13; {ID}('scrub').dispatchEvent(new Event('input'))")
    (images / "serve-denoising.png").write_bytes(browser.png())
    browser.size(390, 1100, dark=True)
    browser.run("document.querySelector('h1').scrollIntoView()")
    (images / "serve-phone.png").write_bytes(browser.png())


def test_a_picture_of_text_for_the_documentation(browser):
    """Of a server with a trained run of words: EQXLDM_TEXT_PAGE=http://127.0.0.1:8000."""
    where = os.environ.get("EQXLDM_TEXT_PAGE")
    if where is None:
        pytest.skip("EQXLDM_TEXT_PAGE names no server")
    browser.size(1100, 700)
    browser.open(where)
    browser.wait(f"{ID}('status').textContent === 'Ready.'")
    browser.run(f"{ID}('prompt').value = 'in the '; {ID}('n').value = 2; {ID}('seed').value = 0")
    browser.run(f"{ID}('temperature').value = 0.7; showSliders(pairs)")
    browser.run(f"{ID}('go').click()")
    browser.wait(DONE, 100)
    browser.run(f"{ID}('scrub').value = 32; {ID}('scrub').dispatchEvent(new Event('input'))")
    images = Path(__file__).parents[2] / "docs" / "images"
    (images / "serve-text.png").write_bytes(browser.png())
