from itertools import groupby

import numpy as np
import pytest
import torch

from pipelines.box_sets import open_boxes
from pipelines.moving_shapes import (
    CLEAN_FRAMES,
    CONDITIONS,
    DEGRADED_FRAMES,
    FRAMES,
    IGNORE_BELOW,
    PHOTOS,
    SHAPES,
    SIDE_PX,
    MovingPhotos,
    MovingShapes,
    _outline,
    _paint,
    draw_film,
)


@pytest.fixture(scope="module")
def films():
    return [draw_film(4, number) for number in range(60)]


def test_a_film_follows_from_its_number():
    film, again, other = draw_film(3, 5), draw_film(3, 5), draw_film(3, 6)
    assert np.array_equal(film.frames, again.frames)
    assert np.array_equal(film.boxes, again.boxes)
    assert not np.array_equal(film.frames, other.frames)
    assert film.frames.shape == (FRAMES, SIDE_PX, SIDE_PX)
    assert film.frames.dtype == np.uint8


@pytest.mark.parametrize("label", range(len(SHAPES)))
def test_a_box_is_the_box_of_what_is_painted(label):
    for angle in (0.0, 0.3, 1.1, 2.9, 5.0):
        outline = _outline(label, 10.0, angle)
        at = np.array([[40.3, 50.8], [41.0, 52.5]])
        light = np.zeros((2, SIDE_PX, SIDE_PX), np.float32)
        cover = _paint(light, label, 10.0, angle, at, 0.5)
        assert np.allclose(light, 0.5 * cover, atol=1e-6)
        for place, seen in zip(at, cover, strict=True):
            rows, columns = np.nonzero(seen > 0.02)
            painted = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            box = [*(place + outline.min(axis=0)), *(place + outline.max(axis=0))]
            assert np.abs(np.subtract(painted, box)).max() <= 1.6  # a pixel that is touched shows; corners are thin


def test_shapes_stay_in_the_picture_and_their_truth_is_sound(films):
    for film in films:
        assert 1 <= len(film.labels) <= 3
        assert film.boxes.min() >= -1e-3
        assert film.boxes.max() <= SIDE_PX + 1e-3
        assert (film.boxes[..., 2:] - film.boxes[..., :2]).min() > 10
        assert film.visible.min() >= 0
        assert film.visible.max() <= 1 + 1e-5


def test_bad_frames_come_in_spells_between_clean_ones(films):
    conditions = set()
    for film in films:
        runs = [(bad, len(list(run))) for bad, run in groupby(film.condition > 0)]
        conditions.update(film.condition.tolist())
        for bad, length in runs[1:-1]:
            low, high = DEGRADED_FRAMES if bad else CLEAN_FRAMES
            assert low <= length <= high
    assert conditions == set(range(len(CONDITIONS)))


def test_shapes_rest_drift_and_fly(films):
    steps = []
    for film in films:
        steps.extend(np.abs(np.diff(film.boxes[..., :2], axis=0)).sum(axis=2).max(axis=0).tolist())
    shares = [np.mean([low <= step < high for step in steps]) for low, high in ((0, 0.06), (0.06, 0.6), (0.6, 7))]
    assert np.allclose(shares, (0.25, 0.25, 0.5), atol=0.15)


def test_the_data_set_is_one_of_ours():
    train, val = open_boxes("moving_shapes", SHAPES, None, "train"), MovingShapes("val")
    assert (len(train), len(val)) == (900, 200)
    assert train.identity != val.identity
    video = val.video(3)
    film = draw_film(7, 3)
    assert torch.equal(video.read([4, 9])[:, 2], torch.from_numpy(film.frames[[4, 9]]))
    assert tuple(video.frames.shape) == (FRAMES, 3, SIDE_PX, SIDE_PX)
    for frame, objects in enumerate(video.objects):
        assert np.array_equal(objects.boxes, film.boxes[frame])
        assert np.array_equal(objects.ignore, film.visible[frame] < IGNORE_BELOW)
        assert objects.condition == CONDITIONS[film.condition[frame]]
    assert not torch.equal(train.video(3).frames, video.frames)
    with pytest.raises(IndexError):
        val.video(200)


def test_photos_are_clean_frames_of_the_films():
    films, photos = MovingShapes("train"), MovingPhotos("train")
    assert len(photos) == PHOTOS * len(films)
    seen = []
    for index in range(2 * PHOTOS):
        photo, film = photos.video(index), films.video(index // PHOTOS)
        (objects,) = photo.objects
        assert objects.condition == "clean"
        assert any(
            torch.equal(photo.frames[0], frame) and np.array_equal(objects.boxes, there.boxes)
            for frame, there in zip(film.frames, film.objects, strict=True)
        )
        seen.append(photo.name)
    assert len(set(seen)) == 2 * PHOTOS
