"""The tracker finds what moving digits do, and sees what they do not."""

import numpy as np

from eqxldm.data import MovingDigits, direction_of
from eqxldm.metrics import blobs, motions, track

DISC = np.hypot(*np.mgrid[-13.5:14:1, -13.5:14:1]) < 6
CLIPS = MovingDigits(255 * DISC[None].astype(np.uint8), np.array([0]), 60, frames=17)
ROOM = (36.0, 36.0)


def test_tracks_are_where_the_digits_are():
    judged = right = 0
    for index in range(12):
        clip = CLIPS.clip(index)
        places = track(clip.frames[..., 0])
        seen = np.isfinite(places).all((1, 2))
        found = motions(places, ROOM)
        assert (found is None) == (seen.sum() < 5)
        if found is None:
            continue
        assert all(m.residual < 0.5 and m.turns == m.turns_at_walls for m in found)
        said = sorted(direction_of(v) for v in clip.velocities)
        judged, right = (
            judged + 1,
            right + (sorted(direction_of(m.velocity) for m in found) == said),
        )
        truth = clip.places + 13.5
        apart = np.linalg.norm(places[seen][:, :, None] - truth[seen][:, None], axis=-1)
        assert (apart.min(2) < 1).all()
    assert judged >= 8 and right >= judged - 1


def test_motion_that_walls_do_not_explain_has_a_large_residual():
    line = np.stack([np.linspace(14, 40, 17), np.linspace(20, 40, 17)], 1)[:, None]
    (straight,) = motions(line, ROOM) or []
    assert straight.residual < 0.1 and straight.variation < 0.01
    wandering = line + np.random.default_rng(0).normal(0, 3, line.shape)
    (found,) = motions(wandering, ROOM) or []
    assert found.residual > 1.5 and found.variation > 0.3
    there_and_back = np.concatenate([line[:9], line[7::-1]])  # it turns where no wall is
    (found,) = motions(there_and_back, ROOM) or []
    assert found.turns > 0 and found.turns_at_walls == 0


def test_things_that_touch_or_vanish_are_not_counted():
    frame = np.zeros((40, 40))
    frame[5:10, 5:10] = 255
    assert blobs(frame, 2) is None
    frame[20:25, 20:25] = 255
    assert blobs(frame, 2) is not None and blobs(frame, 1) is None
    frame[5:25, 5:8] = frame[20:23, 5:25] = 255
    assert blobs(frame, 2) is None
    assert motions(np.full((17, 2, 2), np.nan), ROOM) is None
