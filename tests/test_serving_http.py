"""The server over HTTP: answers, refusals, streams, clients that leave, and its end."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving import compilations, drawn, make_generator, pixels, request

from eqxldm.serving.app import Access, make_app
from eqxldm.serving.engine import Engine
from eqxldm.serving.metrics import Metrics
from eqxldm.serving.requests import Limits
from eqxldm.serving.server import access_for, bind, settings

URL = "/v1/images/generations"
ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def served(engine, access=None, metrics=None):
    """A client of a server in a thread."""
    app = make_app(engine, metrics, access)
    with listening(app) as base, httpx.Client(base_url=base, timeout=30) as client:
        yield client


@contextlib.contextmanager
def listening(app):
    """The address of an application that is served in a thread."""
    import uvicorn

    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(settings(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def metrics():
    found = Metrics()
    yield found
    found.close()


@pytest.fixture(scope="module")
def engine(metrics):
    engine = Engine(make_generator(), slots=2, queue=6, observe=metrics.observe)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def client(engine, metrics):
    with served(engine, access_for("127.0.0.1", None), metrics) as client:
        assert client.get("/healthz").status_code == 200
        refused = client.get("/readyz")  # not started yet
        assert refused.status_code == 503 and refused.headers["retry-after"] == "2"
        early = client.post(URL, json={"label": 1})
        assert early.status_code == 503 and "not ready" in message(early)
        engine.start()
        assert engine.ready.wait(60)
        assert client.get("/readyz").text == "ready\n"
        yield client


def message(response):
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]["message"]


def decoded(data):
    return pixels(base64.b64decode(data))


def events(response):
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def test_pictures_as_base64_and_by_url(client, engine):
    body = {"label": 1, "n": 2, "seed": 3, "steps": 5, "guidance": 1.5, "solver": "unipc"}
    with compilations() as compiled:
        answer = client.post(URL, json=body | {"model": "tiny", "size": "8x8", "user": "me"})
        assert not compiled
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["seed"], found["steps"], found["solver"]) == (3, 5, "unipc")
    ours = drawn(engine, request("unipc", 5, 1.5, seed=3, label=1, n=2))[0]
    for entry, picture in zip(found["data"], ours, strict=True):
        np.testing.assert_allclose(decoded(entry["b64_json"]), picture, atol=1)
    links = client.post(URL, json=body | {"response_format": "url"}).json()["data"]
    for entry, other in zip(links, found["data"], strict=True):
        picture = client.get(entry["url"])
        assert picture.headers["content-type"] == "image/png"
        assert abs(pixels(picture.content).astype(int) - decoded(other["b64_json"])).max() <= 1
    # What a prompt of other clients names is a class here; what is left out is filled in.
    named = client.post(URL, json={"prompt": "two"}).json()
    assert named["label"] == 2 and named["guidance"] == 2.0 and named["seed"] >= 0


def test_what_the_server_says_of_itself(client):
    model = client.get("/v1/models").json()["data"][0]
    assert model["id"] == "tiny" and model["labels"] == ["zero", "one", "two"]
    assert model["limits"]["steps"] == 250 and "heun" in model["solvers"]
    page = client.get("/")
    assert "<main>" in page.text and "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("app.js", "style.css"):
        assert client.get(f"/{name}").status_code == 200
        assert "http" not in client.get(f"/{name}").text  # nothing comes from elsewhere
    shown = client.get("/metrics").text
    for name in (
        'eqxldm_requests_total{status="200"}', "eqxldm_queue 0.0", "eqxldm_active 0.0",
        "eqxldm_request_seconds_bucket", "eqxldm_step_seconds_bucket", "eqxldm_ready 1.0",
        "eqxldm_network_rows_bucket", "eqxldm_network_calls_total{size=",
        "eqxldm_compilations_total",
    ):  # fmt: skip
        assert name in shown


BAD = {
    "the body is not JSON": b"{",
    "not JSON: ": b'{"a": "\xff"}',
    "must be a JSON object": b"[1]",
    "the body is not JSON:": b"[" * 60_000,
    "the body is not JSON: Exceeds": b'{"n": 1' + b"0" * 5000 + b"}",
    "n must be a whole number in 1 .. 16, got 1000000": {"label": 0, "n": 1_000_000},
    "n must be a whole number in 1 .. 16, got 0": {"label": 0, "n": 0},
    "n must be a whole number in 1 .. 16, got True": {"label": 0, "n": True},
    "n must be a whole number in 1 .. 16, got '2'": {"label": 0, "n": "2"},
    "guidance must be a number in 0 .. 50, got nan": b'{"label": 0, "guidance": NaN}',
    "guidance must be a number in 0 .. 50, got inf": b'{"label": 0, "guidance": 1e999}',
    "guidance must be a number in 0 .. 50, got -1": {"label": 0, "guidance": -1},
    "steps must be a whole number in 1 .. 250": {"label": 0, "steps": 251},
    "seed must be a whole number": {"label": 0, "seed": -1},
    "solver must be one of ddim, ddpm": {"label": 0, "solver": "magic"},
    "which class?": {},
    "label 3: need 0 .. 2": {"label": 3},
    "label 'x": {"prompt": "x" * 2000},
    "not both": {"prompt": "one", "label": 1},
    "at most 4000 are taken": {"prompt": "x" * 5000},
    "prompt must be text": {"prompt": ["a"]},
    "size '512x512': this model draws 8x8": {"label": 0, "size": "512x512"},
    "size '\\ud800': this model": b'{"label": 0, "size": "\\ud800"}',
    "label '\\ud800": b'{"label": "\\ud800"}',
    "no option '": b'{"label": 0, "\\udfff": 1}',
    "there is no option 'colour'": {"label": 0, "colour": 1},
    "must be [low, high]": {"label": 0, "guidance_interval": [0.5, 0.5]},
    "guidance_interval must be two numbers": {"label": 0, "guidance_interval": 3},
    "needs \"stream\": true": {"label": 0, "partial_images": 2},
    "trajectory shows one image": {"label": 0, "n": 2, "stream": True, "trajectory": True},
    "response_format must be one of b64_json, url": {"label": 0, "response_format": "file"},
    "output_format must be one of png": {"label": 0, "output_format": "/etc/passwd"},
    "stream must be true or false": {"label": 0, "stream": 1},
}  # fmt: skip


@pytest.mark.parametrize("expected", BAD)
def test_a_bad_request_is_one_message(expected, client):
    body = BAD[expected]
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = client.post(URL, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and expected in message(answer)
    assert len(message(answer)) < 300


def test_other_refusals(client):
    long = client.post(URL, json={"prompt": "x" * 1_000_000})
    assert long.status_code == 413 and "65536 bytes" in message(long)

    def pieces():
        for _ in range(100):
            yield b" " * 1000

    chunked = client.post(URL, content=pieces(), headers={"Content-Type": "application/json"})
    assert chunked.status_code == 413
    plain = client.post(URL, content="{}", headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415
    assert client.post(URL, json={"model": "other", "label": 1}).status_code == 404
    for path in ("/nothing", "/v1/images/files/..%2f..%2fetc%2fpasswd", "/../pyproject.toml",
                 "/v1/images/files/none.png", "/page/index.html"):  # fmt: skip
        assert "error" in client.get(path).json() and client.get(path).status_code == 404
    assert client.get(URL).status_code == 405 and "GET" in message(client.get(URL))
    foreign = client.get("/v1/models", headers={"Host": "evil.example:8000"})
    assert foreign.status_code == 421
    assert client.get("/v1/models", headers={"Host": "localhost"}).status_code == 200


def test_a_stream_shows_the_image_coming(client):
    body = {"label": 1, "seed": 3, "steps": 8, "stream": True, "partial_images": 3}
    with client.stream("POST", URL, json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        found = list(events(answer))
    kinds = [event["type"].split(".")[-1] for event in found]
    assert kinds == ["started", *["partial_image"] * 3, "completed"]
    assert [e["step"] for e in found[1:4]] == [1, 4, 7] and found[0]["seed"] == 3
    whole = client.post(URL, json={"label": 1, "seed": 3, "steps": 8}).json()["data"][0]
    last = decoded(found[-1]["b64_json"]).astype(int)
    assert abs(last - decoded(whole["b64_json"])).max() <= 1
    body = {"label": 1, "steps": 3, "solver": "heun", "stream": True, "trajectory": True}
    with client.stream("POST", URL, json=body) as answer:
        found = list(events(answer))
    states = [e["state_b64_json"] for e in found if "state_b64_json" in e]
    assert len(states) == 5 and found[-1]["type"] == "forward" and len(found[-1]["frames"]) == 8
    ends = (decoded(states[0]).astype(int), decoded(found[-1]["frames"][-1]).astype(int))
    assert abs(ends[0] - ends[1]).max() <= 1


def test_who_leaves_is_drawn_no_further(client, engine):
    long = {"label": 1, "steps": 250, "n": 3}
    for stream in (True, False):
        before = client.get("/metrics").text
        body = json.dumps(long | {"stream": stream})
        head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection((client.base_url.host, client.base_url.port)) as raw:
            raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            wait_for(lambda: engine.active)
        wait_for(lambda: not engine.active and not engine.waiting)
        assert client.get("/metrics").text != before
    assert client.post(URL, json={"label": 1}).status_code == 200


def test_a_full_queue_says_when_to_come_again(client, engine):
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            body = {"label": 1, "steps": 250, "n": 4, "stream": True}
            answer = stack.enter_context(client.stream("POST", URL, json=body))
            assert answer.status_code == 200
        refused = client.post(URL, json={"label": 1})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    wait_for(lambda: not engine.active and not engine.waiting)


def test_slow_and_late_clients(client, engine, monkeypatch):
    monkeypatch.setattr("eqxldm.serving.exchange.BODY_SECONDS", 0.2)
    head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port)) as raw:
        raw.sendall(f"{head}Content-Length: 50\r\n\r\n{{".encode())
        raw.settimeout(5)
        assert b"408" in b"".join(iter(lambda: raw.recv(1000), b""))  # and closed at once
    monkeypatch.setattr(engine, "limits", Limits(seconds=0.0))
    late = client.post(URL, json={"label": 1, "steps": 250})
    assert late.status_code == 504 and "fewer steps" in message(late)
    with client.stream("POST", URL, json={"label": 1, "steps": 250, "stream": True}) as answer:
        assert [e["type"] for e in events(answer)][-1] == "error"


def test_a_request_that_trickles_in_is_given_up(client, monkeypatch):
    monkeypatch.setattr("eqxldm.serving.connections.HEAD_SECONDS", 0.4)
    monkeypatch.setattr("eqxldm.serving.exchange.BODY_SECONDS", 0.2)
    place = client.base_url.host, client.base_url.port
    head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    whole = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for sent, then, expected in (
        ("", "", b"408"),  # nothing at all
        ("", head, b"408"),  # the head, a byte at a time
        (f"{head}Content-Length: 9999\r\n\r\n", "{" * 50, b"408"),  # the body
        (whole, head, b"ok\nHTTP/1.1 408"),  # the next head on a connection that was kept
    ):
        with socket.create_connection(place, timeout=10) as raw:
            raw.sendall(sent.encode())
            assert expected in (answer := trickle(raw, then.encode())), answer
    assert client.get("/healthz").status_code == 200


def trickle(raw, data):
    """Sends a byte at a time until the server closes; what it said."""
    answer = b""
    raw.settimeout(0.05)
    for i in range(200):
        with contextlib.suppress(OSError):
            raw.sendall(data[i : i + 1])
        try:
            got = raw.recv(4096)
        except TimeoutError:
            continue
        except OSError:  # it has closed while bytes were on their way
            break
        if not got:
            break
        answer += got
    return answer


def test_who_reads_nothing_is_cut_off(monkeypatch):
    monkeypatch.setattr("eqxldm.serving.connections.TAKE_SECONDS", 0.3)
    gone = threading.Event()

    async def endless(scope, receive, send):
        async def wait():
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        waiting = asyncio.ensure_future(wait())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not gone.is_set():
            await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})
            await asyncio.sleep(0)
        await waiting

    with listening(endless) as address, socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", int(address.split(":")[-1])))
        raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert gone.wait(20)


def test_a_token_keeps_others_out(engine, client):
    metrics = Metrics()
    with served(engine, Access("secret"), metrics) as guarded:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            for path in ("/v1/models", "/metrics"):
                refused = guarded.get(path, headers=given)
                assert refused.status_code == 401 and "token" in message(refused)
                assert refused.headers["www-authenticate"] == "Bearer"
        right = {"Authorization": "Bearer secret"}
        body = {"label": 1, "response_format": "url"}
        found = guarded.post(URL, json=body, headers=right).json()["data"][0]
        assert guarded.get(found["url"]).status_code == 200
        for path in ("/", "/healthz", "/readyz"):
            assert guarded.get(path).status_code == 200
    metrics.close()


def test_two_servers_on_one_port():
    with bind("127.0.0.1", 0) as first, pytest.raises(OSError, match="Take another PORT"):
        bind("127.0.0.1", first.getsockname()[1])
    assert access_for("0.0.0.0", None).hosts is None
    assert "[::1]" in access_for("::1", None).hosts


PROGRAM = """
import sys
sys.path.insert(0, "tests")
from serving import make_generator
from eqxldm.serving import Engine, serve
from eqxldm.serving.metrics import Metrics
from eqxldm.serving.server import bind
metrics, listener = Metrics(), bind("127.0.0.1", 0)
engine = Engine(make_generator(), slots=1, sizes=(2,), observe=metrics.observe)
sys.exit(serve(engine, listener, metrics=metrics, say=lambda text: print(text, flush=True)))
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_cleanly_with_a_stream_under_way(signum):
    run = [sys.executable, "-W", "error", "-c", PROGRAM]
    with subprocess.Popen(run, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as child:  # fmt: skip
        assert child.stdout is not None and child.stderr is not None
        address = child.stdout.readline().split()[-1]
        body = {"label": 1, "steps": 250, "n": 16, "stream": True}
        with httpx.stream("POST", address + URL, json=body, timeout=30) as answer:
            found = events(answer)
            assert next(found)["type"] == "image_generation.started"
            os.kill(child.pid, signum)
            last = list(found)[-1]
        assert last["type"] in ("error", "image_generation.completed")
        assert child.wait(20) == 0
        assert child.stderr.read() == ""


def test_answers_are_sent_at_once():
    with bind("127.0.0.1", 0) as listener:

        async def option():
            found = asyncio.get_running_loop().create_future()

            class Connected(asyncio.Protocol):
                def connection_made(self, transport):
                    accepted = transport.get_extra_info("socket")
                    found.set_result(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

            server = await asyncio.get_running_loop().create_server(Connected, sock=listener)
            with socket.create_connection(listener.getsockname()):
                value = await asyncio.wait_for(found, 10)
            server.close()
            return value

        assert asyncio.run(option()) != 0
