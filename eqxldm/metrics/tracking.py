"""Where things are in a clip, and whether they move as things do that bounce off walls."""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Num
from scipy import ndimage, optimize

LEAST = 0.1  # of a frame's brightness that a thing has
MOST_GAPS = 3  # after which both orders of two things are tried
SEEN = 5  # frames in which all things must be seen, for their motion to be judged


class Motion(NamedTuple):
    """How one thing moves: the best bouncing path, and what is left when it is taken away.

    `velocity` is that of the first frame, (rows, columns), in pixels a frame. `residual` is the
    root mean square distance to the path; `variation` the standard deviation of the speed between
    frames in which it does not turn, by its mean. Of `turns`, changes of direction along an axis,
    `turns_at_walls` are at a wall. `bounces` are the frames, no whole numbers, at which the path
    meets a wall.
    """

    velocity: Float[np.ndarray, " 2"]
    residual: float
    variation: float
    turns: int
    turns_at_walls: int
    bounces: tuple[float, ...] = ()


def reflected(x: Float[np.ndarray, "*n"], length: float) -> Float[np.ndarray, "*n"]:
    """Where a point that would be at `x` is, if walls at 0 and `length` throw it back.

    `r(x) = length - |x mod 2 length - length|`, a triangle wave: the speed between walls is kept.

    >>> reflected(np.array([3.0, 11.0, -2.0]), 10.0)
    array([3., 9., 2.])
    """
    return length - np.abs(np.mod(x, 2 * length) - length)


def wall_times(place: float, velocity: float, length: float, end: float) -> list[float]:
    """When a point meets the walls at 0 and `length`, in `(0, end]`, ascending.

    It would be at `place + velocity t` without them: at a multiple of `length` it meets one.

    >>> wall_times(2.0, 4.0, 10.0, 5.0), wall_times(2.0, -4.0, 10.0, 5.0)
    ([2.0, 4.5], [0.5, 3.0])
    """
    if velocity == 0:
        return []
    last = place + velocity * end
    low, high = sorted((place / length, last / length))
    times = [(k * length - place) / velocity for k in range(math.ceil(low), math.floor(high) + 1)]
    return sorted(t for t in times if 0 < t <= end)


def blobs(frame: Num[np.ndarray, "h w"], count: int) -> Float[np.ndarray, "n 2"] | None:
    """The centres of mass of the `count` things in a frame; None if it shows another number.

    A thing is a connected set of pixels brighter than a quarter of the range, with gaps of one
    pixel bridged, that has at least a tenth of the brightness. Two that touch are one: their frame
    is not counted, rather than guessed at.

    >>> frame = np.zeros((9, 9)); frame[1:3, 1:3] = 255; frame[6:8, 6:8] = 255
    >>> blobs(frame, 2)
    array([[1.5, 1.5],
           [6.5, 6.5]])
    """
    bright = frame > 64
    joined = ndimage.binary_dilation(bright, np.ones((3, 3)))
    labels, n = ndimage.label(joined, np.ones((3, 3)))  # type: ignore[misc]
    if n < count:
        return None
    light = np.where(bright, frame, 0).astype(np.float64)
    mass = ndimage.sum_labels(light, labels, np.arange(1, n + 1))
    large = 1 + np.flatnonzero(mass >= LEAST * mass.sum())
    if len(large) != count:
        return None
    return np.array(ndimage.center_of_mass(light, labels, large))


def track(clip: Num[np.ndarray, "f h w"], count: int = 2) -> Float[np.ndarray, "f n 2"]:
    """The places of `count` things in every frame, NaN where they cannot be told apart.

    From frame to frame each goes to where it would be at its last velocity, such that the sum of
    the distances is least (the Hungarian method).

    >>> clip = np.zeros((3, 8, 8)); clip[0, 2, 2] = clip[1, 2, 3] = clip[2, 2, 4] = 255
    >>> track(clip, 1)[:, 0, 1]
    array([2., 3., 4.])
    """
    found = np.full((len(clip), count, 2), np.nan)
    last: int | None = None
    velocity = np.zeros((count, 2))
    for f, frame in enumerate(clip):
        places = blobs(frame, count)
        if places is None:
            continue
        if last is not None:
            expected = found[last] + velocity * (f - last)
            cost = np.linalg.norm(expected[:, None] - places[None], axis=-1)
            places = places[optimize.linear_sum_assignment(cost)[1]]
            velocity = (places - found[last]) / (f - last)
        found[f], last = places, f
    return found


def motions(
    places: Float[np.ndarray, "f n 2"], room: tuple[float, float], *, centre: float = 13.5
) -> list[Motion] | None:
    """How each thing moves; None if they were seen apart in fewer than five frames.

    Of two things that overlapped, the order after it is the one that fits better.

    **Arguments**:

    - `places`: what `track` found.
    - `room`: how far a thing can move along each axis, `size - 28` for digits of 28 pixels.
    - `centre`: where the centre of mass is in the thing's own patch, give or take two pixels.
    """
    seen = np.asarray(np.isfinite(places).all((1, 2)))
    if seen.sum() < SEEN:
        return None
    best: list[Motion] | None = None
    for order in _orders(places, seen):
        found = [_motion(order[:, k], seen, room, centre) for k in range(order.shape[1])]
        if best is None or sum(m.residual for m in found) < sum(m.residual for m in best):
            best = found
    return best


def _orders(
    places: Float[np.ndarray, "f n 2"], seen: Bool[np.ndarray, " f"]
) -> Iterator[Float[np.ndarray, "f n 2"]]:
    """The tracks, and of two things those with the two exchanged after some of the gaps: which of
    them came out of an overlap where is not known."""
    first = np.flatnonzero(seen & ~np.append(False, seen[:-1]))[1:]
    gaps = first[:MOST_GAPS] if places.shape[1] == 2 else []
    for exchanged in itertools.product((False, True), repeat=len(gaps)):
        order = places
        for f, swap in zip(gaps, exchanged, strict=True):
            if swap:
                order = np.concatenate([order[:f], order[f:, ::-1]])
        yield order


def _motion(
    path: Float[np.ndarray, "f 2"],
    seen: Bool[np.ndarray, " f"],
    room: tuple[float, float],
    centre: float,
) -> Motion:
    time = np.flatnonzero(seen)
    fits = [_fit(path[time, a], time, room[a], centre) for a in (0, 1)]
    following = np.flatnonzero(np.diff(time) == 1)
    first = time[following]
    steps = path[first + 1] - path[first]
    turns = at_walls = 0
    turning = np.zeros(len(path), bool)  # by the frame in which a step begins
    for a, (_, _, offset, _) in enumerate(fits):
        for i in np.flatnonzero(np.diff(first) == 1):
            u, v = steps[i, a], steps[i + 1, a]
            if u * v < 0 and min(abs(u), abs(v)) > 0.6:
                at = path[first[i] + 1, a] - offset
                wall = min(abs(at), abs(room[a] - at))
                turns, at_walls = turns + 1, at_walls + int(wall <= abs(u) + 1.5)
        near = [min(abs(x - offset), abs(room[a] + offset - x)) for x in path[first, a]]
        turning[first] |= np.array(near, float) <= 4.5
    free = np.linalg.norm(steps[~turning[first]], axis=1)
    variation = float(free.std() / max(free.mean(), 1e-9)) if len(free) >= 3 else float("nan")
    error = np.sqrt(sum(fit[3] for fit in fits))
    velocity = np.array([fits[0][1], fits[1][1]])
    pairs = zip(fits, room, strict=True)
    hits = (wall_times(fit[0], fit[1], length, len(path) - 1.0) for fit, length in pairs)
    bounces = tuple(sorted(itertools.chain.from_iterable(hits)))
    return Motion(velocity, float(error), variation, turns, at_walls, bounces)


def _fit(
    y: Float[np.ndarray, " n"], time: np.ndarray, room: float, centre: float
) -> tuple[float, float, float, float]:
    """`(place, velocity, offset, error)` of the path `offset + reflected(place + velocity t)` whose
    mean squared error is least, over a grid of starts and velocities; the offset is exact."""
    starts = np.linspace(0, room, 73)[:, None, None]
    velocities = np.linspace(-6, 6, 121)[None, :, None]
    for width in (1.0, 0.1):  # a coarse grid, then a fine one around its best
        paths = reflected(starts + velocities * time, room)
        offsets = np.clip((y - paths).mean(-1), centre - 2, centre + 2)
        errors = ((y - paths - offsets[..., None]) ** 2).mean(-1)
        i, j = np.unravel_index(errors.argmin(), errors.shape)
        start, velocity = starts[i, 0, 0], velocities[0, j, 0]
        best = float(start), float(velocity), float(offsets[i, j]), float(errors[i, j])
        if width == 1.0:
            starts = start + np.linspace(-0.5, 0.5, 11)[:, None, None]
            velocities = velocity + np.linspace(-0.1, 0.1, 21)[None, :, None]
    return best
