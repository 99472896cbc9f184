"""Text over HTTP: completions at once and as a stream, refusals, a token, clients that leave."""

import contextlib
import json
import socket
import threading

import numpy as np
import pytest
from serving import compilations, make_text_generator, written
from test_serving_http import events, message, served, wait_for

from eqxldm.serving.app import Access
from eqxldm.serving.metrics import Metrics
from eqxldm.serving.requests import Limits
from eqxldm.serving.server import access_for
from eqxldm.serving.text import Canvas, TextEngine, TextRequest

URL = "/v1/completions"
LONG = {"calls": 60, "sampler": "ancestral"}


@pytest.fixture(scope="module")
def metrics():
    found = Metrics()
    yield found
    found.close()


@pytest.fixture(scope="module")
def engine(metrics):
    engine = TextEngine(
        make_text_generator(), slots=2, queue=6, sizes=(2, 4), observe=metrics.observe
    )
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def client(engine, metrics):
    with served(engine, access_for("127.0.0.1", None), metrics) as client:
        refused = client.get("/readyz")  # not started yet
        assert refused.status_code == 503
        assert client.post(URL, json={"prompt": "a"}).status_code == 503
        engine.start()
        assert engine.ready.wait(60)
        assert client.get("/readyz").text == "ready\n"
        yield client


def test_texts_of_a_prompt_and_of_a_list(client, engine):
    body = {"prompt": "ab", "max_tokens": 6, "n": 2, "seed": 3, "model": "words", "user": "me"}
    with compilations() as compiled:
        answer = client.post(URL, json=body | {"temperature": 0.5, "logprobs": None})
        assert not compiled
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["object"] == "text_completion" and found["id"].startswith("cmpl-")
    assert (found["seed"], found["sampler"], found["temperature"]) == (3, "random", 0.5)
    wanted = TextRequest(("ab",), "random", 3, n=2, max_tokens=6, temperature=0.5)
    ours = [text for text, _ in written(engine, wanted)[0]]
    assert [choice["text"] for choice in found["choices"]] == [text[2:] for text in ours]
    assert found["choices"][1] | {"text": ""} == {
        "index": 1, "text": "", "logprobs": None, "finish_reason": "length", "calls": 3,
    }  # fmt: skip
    assert found["usage"] == {"prompt_tokens": 2, "completion_tokens": 12, "total_tokens": 14}
    both = client.post(URL, json=body | {"prompt": ["ab", "c"], "temperature": 0.5, "echo": True})
    texts = [choice["text"] for choice in both.json()["choices"]]
    assert texts[:2] == ours and [t[0] for t in texts[2:]] == ["c", "c"] and len(texts[2]) == 7
    filled = client.post(URL, json={"prompt": "a_b_", "infill": True, "seed": 1}).json()
    (choice,) = filled["choices"]
    assert choice["text"][0::2] == "ab" and "_" not in choice["text"]
    assert filled["usage"]["completion_tokens"] == 2
    ended = client.post(URL, json=body | {"temperature": 0.5, "stop": [ours[0][4], "zz"]}).json()
    cut = ended["choices"][0]
    assert cut["text"] == ours[0][2:4].split(ours[0][4])[0] and cut["finish_reason"] == "stop"
    # In blocks the first is done when the others have not begun: they are not written.
    blocks = {"seed": 1, "sampler": "blocks", "block_size": 4, "calls": 16}
    (all_,) = client.post(URL, json=blocks).json()["choices"]
    (early,) = client.post(URL, json=blocks | {"stop": all_["text"][1:4]}).json()["choices"]
    assert all_["calls"] == 16 and early["calls"] == 4
    assert early["text"] == all_["text"][:1] and early["finish_reason"] == "stop"


def test_a_stream_adds_up_and_shows_the_text_appearing(client):
    body = {"prompt": "ab", "seed": 5, "calls": 7, "sampler": "random"}
    whole = client.post(URL, json=body).json()["choices"][0]["text"]
    stream = body | {"stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", URL, json=stream) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        found = list(events(answer))
    assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == 14
    choices = [event["choices"][0] for event in found[:-1]]
    assert "".join(choice["text"] for choice in choices) == whole
    assert [choice["shown"].count("_") for choice in choices] == [14, 12, 10, 8, 6, 4, 2, 0]
    assert [choice["finish_reason"] for choice in choices] == [None] * 7 + ["length"]
    assert choices[-1]["shown"] == whole and choices[-1]["calls"] == 7
    stop = whole[3:5]
    with client.stream("POST", URL, json=stream | {"stop": stop, "echo": True}) as answer:
        choices = [event["choices"][0] for event in events(answer) if event["choices"]]
    assert "".join(choice["text"] for choice in choices) == "ab" + whole[: whole.index(stop)]
    assert choices[-1]["finish_reason"] == "stop"


BAD = {
    "the body is not JSON": b"{",
    "must be a JSON object": b"[1]",
    "prompt is an empty list": {"prompt": []},
    "prompt must be a text, or a list of texts": {"prompt": [[1, 2]]},
    "prompt has 17 texts; at most 16 are taken": {"prompt": ["a"] * 17},
    "18 tokens, longer than the context of 16": {"prompt": "abc" * 6},
    "leaves nothing to write": {"prompt": "abcd" * 4},
    "'x' is not among the letters": {"prompt": "x"},
    "'\\ud800' is not among": b'{"prompt": "\\ud800"}',
    "max_tokens 15: the context has 16": {"prompt": "ab", "max_tokens": 15},
    "max_tokens must be a whole number in 1 .. 16": {"max_tokens": 0},
    "n must be a whole number in 1 .. 16, got 1000000": {"n": 1_000_000},
    "9 texts and n is 2: 18 texts": {"prompt": ["a"] * 9, "n": 2},
    "sampler must be one of random, ancestral": {"sampler": "magic"},
    "calls must be a whole number in 1 .. 60": {"calls": 61},
    "need one call each at least": {"sampler": "blocks", "calls": 1, "block_size": 4},
    "temperature must be a number in 0 .. 100, got nan": b'{"temperature": NaN}',
    "temperature must be a number in 0 .. 100, got -1": {"temperature": -1},
    "top_p must be above 0": {"top_p": 0},
    "top_p must be a number in 0 .. 1, got 1.5": {"top_p": 1.5},
    "guidance must be a number": {"guidance": "high"},
    "stop must be a text, or at most 4": {"stop": [""]},
    "seed must be a whole number": {"seed": -1},
    "give infill, or suffix": {"infill": True, "suffix": "a", "prompt": "_"},
    "logprobs: tokens come in any order": {"logprobs": 2},
    "best_of: tokens come": {"best_of": 3},
    "stream_options is an object": {"stream_options": {}},
    "stream must be true or false": {"stream": 1},
    "there is no option 'colour'": {"colour": 1},
}  # fmt: skip


def test_a_bad_request_is_one_message(client):
    for expected, body in BAD.items():
        content = body if isinstance(body, bytes) else json.dumps(body)
        answer = client.post(URL, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and expected in message(answer), (expected, answer.text)
        assert len(message(answer)) < 300
    assert client.post(URL, json={"model": "other"}).status_code == 404
    assert client.post(URL, json={"prompt": "a" * 70_000}).status_code == 413
    assert client.post(URL, content="{}").status_code == 415
    assert client.post("/v1/images/generations", json={}).status_code == 404
    neutral = {"best_of": 1, "frequency_penalty": 0.0, "logit_bias": {}, "presence_penalty": 0}
    assert client.post(URL, json=neutral).status_code == 200


def test_what_the_server_says_of_itself(client):
    client.post(URL, json={"seed": 1})
    model = client.get("/v1/models").json()["data"][0]
    assert model["id"] == "words" and model["context"] == 16
    assert model["samplers"][0] == model["defaults"]["sampler"] == "random"
    page = client.get("/")
    assert (
        'id="prompt"' in page.text
        and "default-src 'self'" in page.headers["content-security-policy"]
    )
    for name in ("text.js", "common.js", "style.css"):
        assert client.get(f"/{name}").status_code == 200
        assert "http" not in client.get(f"/{name}").text  # nothing comes from elsewhere
    assert client.get("/app.js").status_code == 404
    shown = client.get("/metrics").text
    for name in (
        'eqxldm_requests_total{status="200"}', "eqxldm_queue 0.0", "eqxldm_texts_total",
        "eqxldm_step_seconds_bucket", "eqxldm_network_calls_total{size=", "eqxldm_ready 1.0",
    ):  # fmt: skip
        assert name in shown


def test_full_late_and_gone(client, engine, monkeypatch):
    with contextlib.ExitStack() as stack:
        # So that nothing is done meanwhile: what the network says is waited for.
        held = stack.enter_context(pausing(engine))
        for _ in range(2):
            body = LONG | {"n": 4, "stream": True}
            assert stack.enter_context(client.stream("POST", URL, json=body)).status_code == 200
        refused = client.post(URL, json={})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        held.set()
    wait_for(lambda: not engine.active and not engine.waiting)
    for stream in (True, False):
        before = client.get("/metrics").text
        body = json.dumps(LONG | {"n": 3, "stream": stream})
        head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with pausing(engine) as held:
            with socket.create_connection((client.base_url.host, client.base_url.port)) as raw:
                raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
                wait_for(lambda: engine.active)
            wait_for(lambda before=before: client.get("/metrics").text != before)
            jobs = {text.job for text in engine._active}
            wait_for(lambda jobs=jobs: all(job.ended for job in jobs))
            held.set()
        wait_for(lambda: not engine.active and not engine.waiting)
    monkeypatch.setattr(engine, "limits", Limits(seconds=0.0))
    late = client.post(URL, json=LONG)
    assert late.status_code == 504 and "fewer calls" in message(late)
    with client.stream("POST", URL, json=LONG | {"stream": True}) as answer:
        assert list(events(answer))[-1]["type"] == "error"


@contextlib.contextmanager
def pausing(engine):
    """Steps wait for the event, and go on at the end in any case."""
    step, go = engine.programs.step, threading.Event()

    def waiting(*given):
        go.wait(30)
        return step(*given)

    engine.programs.step = waiting
    try:
        yield go
    finally:
        go.set()
        engine.programs.step = step


def test_a_token_keeps_others_out(engine, client):
    metrics = Metrics()
    with served(engine, Access("secret"), metrics) as guarded:
        assert guarded.post(URL, json={}).status_code == 401
        right = {"Authorization": "Bearer secret"}
        assert guarded.post(URL, json={}, headers=right).status_code == 200
    metrics.close()


def test_bytes_of_one_character_are_shown_together():
    decode = lambda ids: bytes(b"_"[0] if i == 256 else i for i in ids).decode(errors="replace")
    euro = list("€".encode())
    canvas = Canvas(np.array([97, 256, 256, 256, 256]), 1, 5, 256)
    shown = lambda *ids: canvas.first(np.array([97, *ids]), decode)
    assert shown(*euro[:2], 256, 256) == "" and shown(*euro, 256) == "€"
    assert shown(*euro, 98) == "€b"
