"""The engine: shared network calls, and each image what it would be alone."""

import threading
import time
from queue import Queue

import jax
import numpy as np
import pytest
from serving import (
    SOLVERS,
    compilations,
    drawn,
    expected,
    make_generator,
    pictures_of,
    pixels,
    request,
    running,
)

import eqxldm as ex
from eqxldm.serving.events import Failure, Forward, Picture, Preview, QueueFull
from eqxldm.serving.programs import Programs
from eqxldm.serving.requests import Limits, RequestError

MIXED = [
    request(solver, steps, guidance, seed=2**40 + i, label=i % 3, n=1 + i % 2, **options)
    for i, (solver, steps, guidance, options) in enumerate([
        ("ddim", 4, 2.0, {}),
        ("ddpm", 7, 1.0, {}),
        ("heun", 3, 3.5, {}),
        ("unipc", 6, 0.0, {"interval": (0.2, 1.0)}),
        ("dpmsolver++", 5, 1.5, {}),
        ("sde-dpmsolver++", 2, 2.0, {}),
        ("ddim", 1, 2.0, {"interval": (0.0, 1.0)}),
    ])
]  # fmt: skip


@pytest.fixture(scope="module")
def generator():
    return make_generator()


@pytest.fixture(scope="module")
def engine(generator):
    with running(generator, slots=4, queue=16) as engine:
        yield engine


def latents(programs):
    return np.asarray(programs.state.x)


def test_each_image_of_a_mixture_is_what_sample_draws(generator, engine):
    assert {wanted.solver for wanted in MIXED} == set(SOLVERS)
    with compilations() as compiled:
        found = drawn(engine, *MIXED)
        assert not compiled
    for wanted, pictures in zip(MIXED, found, strict=True):
        for index, picture in enumerate(pictures):
            key = wanted
            if wanted.seed >= 2**32:  # a key of 64 bits, which jax.random.key does not take
                continue
            np.testing.assert_allclose(picture, expected(generator, key, index)[1], atol=1)
    small = [request(r.solver, r.steps, r.guidance, seed=5, label=r.label, interval=r.interval)
             for r in MIXED]  # fmt: skip
    for wanted, (picture,) in zip(small, drawn(engine, *small), strict=True):
        want = expected(generator, wanted)[1].astype(int)
        assert np.abs(picture.astype(int) - want).max() <= 1, wanted
        assert np.ptp(want) > 50
    (alone,), (other,) = drawn(engine, request(seed=6)), drawn(engine, request(seed=7))
    assert np.any(alone[0] != other[0])


def test_company_changes_nothing_with_one_size(generator):
    """Bit for bit: calls have one shape, whoever else is there."""
    with running(generator, slots=4, sizes=(8,), decodes=(4,)) as engine:
        together = drawn(engine, *MIXED, *MIXED[::-1])
        for wanted, pictures, again in zip(MIXED, together, together[::-1], strict=False):
            (alone,) = drawn(engine, wanted)
            np.testing.assert_array_equal(pictures, alone)
            np.testing.assert_array_equal(again, alone)


def test_sizes_differ_by_rounding_alone(generator, engine):
    """The bound that the documentation states, on what is decoded."""
    together = drawn(engine, *MIXED)
    for wanted, pictures in zip(MIXED, together, strict=True):
        (alone,) = drawn(engine, wanted)
        assert np.abs(np.asarray(alone, int) - np.asarray(pictures, int)).max() <= 1


def test_a_request_joins_one_that_is_under_way(engine):
    queue, other = Queue(), Queue()
    engine.submit(request(steps=200, previews=50), queue.put)
    assert isinstance(queue.get(timeout=30), Preview)
    engine.submit(request(steps=2, seed=1), other.put)
    assert isinstance(other.get(timeout=30), Picture)
    assert engine.active == 1  # the long one is not done
    events = []
    while not events or isinstance(events[-1], Preview):
        events.append(queue.get(timeout=30))
    assert isinstance(events[-1], Picture)
    steps = [event.step for event in events[:-1]]
    assert steps == sorted(steps) and events[0].of == 200


def test_a_trajectory_has_every_state_and_the_way_back(generator, engine):
    queue = Queue()
    engine.submit(request(steps=5, seed=3, trajectory=True), queue.put)
    events = [queue.get(timeout=30) for _ in range(7)]
    assert [type(e) for e in events] == [Preview] * 5 + [Picture, Forward]
    assert [e.step for e in events[:5]] == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(pixels(events[4].estimate), pixels(events[5].data))
    assert np.any(pixels(events[1].state) != pixels(events[1].estimate))
    # It begins where the forward process ends, and t is that of the state.
    ends = pixels(events[0].state).astype(int), pixels(events[6].frames[-1]).astype(int)
    np.testing.assert_allclose(*ends, rtol=0, atol=1)
    assert [round(e.time, 4) for e in events[:5]] == [1.0, 0.8, 0.6, 0.4, 0.2]
    forward = events[-1]
    np.testing.assert_array_equal(pixels(forward.frames[0]), pixels(events[5].data))
    key = jax.random.split(jax.random.fold_in(jax.random.key(3), 0))[0]
    noise = ex.Diffusion(ex.CosineVP(), ex.predict_v).sample_prior((2, 4, 4), key=key)
    from eqxldm.data.pixels import to_uint8

    want = np.asarray(to_uint8(generator.decoder(noise)[None])[0]).astype(int)
    assert np.abs(pixels(forward.frames[-1]).astype(int) - want).max() <= 1


def test_a_cancelled_request_frees_its_slot(engine):
    queues = [Queue() for _ in range(4)]
    jobs = [engine.submit(request(steps=250, previews=1), q.put) for q in queues]
    waits = Queue()
    engine.submit(request(steps=1), waits.put)
    for job in jobs:
        job.cancel()
    pictures_of(waits, 1)
    assert all(not isinstance(e, Picture) for q in queues for e in list(q.queue))
    deadline = time.monotonic() + 10
    while engine.active and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.active == engine.waiting == 0


def test_a_full_queue_refuses_and_says_when(engine):
    jobs = []
    with pytest.raises(QueueFull) as caught:
        for _ in range(40):
            jobs.append(engine.submit(request(steps=250, n=2), lambda event: None))
    assert 4 <= len(jobs) <= 10 and caught.value.retry_after >= 1
    for job in jobs:
        job.cancel()
    drawn(engine, request())


def test_a_flow_map_shares_a_server_with_the_ode(generator):
    flow = ex.Diffusion(ex.LinearFlow(), ex.predict_velocity)
    served = generator.replace(
        diffusion=flow, flow_map=ex.average_velocity_map(generator.network),
        solvers={"euler": ex.Euler()}, defaults=generator.defaults.__class__("map", 1),
    )  # fmt: skip
    with running(served, slots=2) as engine, compilations() as compiled:
        wanted = [request("map", n, 1.0, seed=n, label=1) for n in (1, 3)]
        found = drawn(engine, *wanted, request("euler", 3, 2.0, seed=9))
        assert not compiled
        for r, (picture,) in zip(wanted, found, strict=False):
            key = jax.random.split(jax.random.fold_in(jax.random.key(r.seed), 0))[0]
            z = ex.sample_map(
                ex.average_velocity_map(generator.network), ex.uniform_times(r.steps),
                flow.sample_prior((2, 4, 4), key=key), jax.numpy.asarray(1),
            )  # fmt: skip
            from eqxldm.data.pixels import to_uint8

            want = np.asarray(to_uint8(generator.decoder(z)[None])[0]).astype(int)
            assert np.abs(picture.astype(int) - want).max() <= 1


def test_more_images_than_a_call_has_rows_for_take_turns_in_full_calls(generator):
    seen = []
    observe = lambda name, value: seen.append(value) if name == "rows" else None
    with running(generator, slots=5, sizes=(4,), decodes=(4,), observe=observe) as engine:
        wanted = request(steps=6, guidance=2.0, interval=(0.0, 1.0), n=5, previews=6)
        queue = Queue()
        engine.submit(wanted, queue.put)
        found, done = {}, dict.fromkeys(range(5), 0)
        while len(found) < 5:
            event = queue.get(timeout=30)
            if isinstance(event, Picture):
                found[event.index] = pixels(event.data)
                continue
            done[event.index] = event.step
            # Nobody is more than a turn behind.
            going = [step for index, step in done.items() if index not in found]
            assert max(done.values()) - min(going) <= 2
        assert engine.together == 2
    assert seen == [4] * 15  # five images of six guided calls, two at a time
    for index, picture in found.items():
        np.testing.assert_allclose(picture, expected(generator, wanted, index)[1], atol=1)


def test_images_that_come_while_the_device_is_busy_share_a_call(generator):
    class Busy:
        done = threading.Event()

        def block_until_ready(self):
            self.done.wait(30)

    flow = ex.Diffusion(ex.LinearFlow(), ex.predict_velocity)
    served = generator.replace(
        diffusion=flow, flow_map=ex.average_velocity_map(generator.network), solvers={},
        defaults=generator.defaults.__class__("map", 1),
    )  # fmt: skip
    seen, queues = [], [Queue() for _ in range(3)]
    observe = lambda name, value: seen.append(value) if name == "rows" else None
    with running(served, slots=8, sizes=(4,), decodes=(4,), observe=observe) as engine:
        engine._flights.append(Busy())
        for i, queue in enumerate(queues):
            engine.submit(request("map", 1, 1.0, seed=i), queue.put)
            time.sleep(0.1)  # in which the engine's thread sees it
        assert not seen
        Busy.done.set()
        for queue in queues:
            pictures_of(queue, 1)
    assert seen == [3]


def test_what_ends_badly_is_one_failure(generator):
    broken = lambda x, t, cond, key=None: x * np.nan
    with running(generator.replace(network=broken), slots=1) as engine:
        queue = Queue()
        engine.submit(request(n=2), queue.put)
        failure = queue.get(timeout=30)
        assert isinstance(failure, Failure) and failure.status == 500
        with pytest.raises(RequestError, match="steps"):
            engine.submit(request(solver="ddim", steps=10**9), queue.put)
        engine.limits = Limits(seconds=0.0)
        engine.submit(request(steps=250), queue.put)
        failure = queue.get(timeout=30)
        assert failure.status == 504 and "0 s" in failure.message
        engine.limits = Limits()
        engine.submit(request(steps=250, n=2), queue.put)
    assert queue.get(timeout=30).status == 503  # stopped under it
    with pytest.raises(RequestError, match="stopping"):
        engine.submit(request(), queue.put)
    with pytest.raises(ValueError, match="guidance"):
        Programs(generator, slots=1, sizes=(1,))


def test_nothing_is_compiled_later_where_the_weights_lie_on_a_mesh(generator):
    """As those of a run do, which is loaded onto one."""
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    put = lambda part: jax.tree.map(lambda a: jax.device_put(a, place), part)
    solvers = {name: SOLVERS[name] for name in ("ddim", "heun")}
    served = generator.replace(
        network=put(generator.network), decoder=put(generator.decoder), solvers=solvers
    )
    with running(served, slots=2) as engine, compilations() as compiled:
        for n in (1, 2):
            drawn(engine, *(request(steps=3, seed=i, guidance=1.0 + i) for i in range(n)))
        assert not compiled
