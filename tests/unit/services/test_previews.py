import io

import pytest
import torch
from PIL import Image

from services.previews import Previews, jpeg
from services.settings import PreviewSettings
from services.store import MemoryStore
from tests.unit.services.engine_kit import give, picture, running, spec


def test_a_jpeg_shows_the_picture_it_was_made_of():
    image = torch.zeros(3, 32, 48, dtype=torch.uint8)
    image[0, :, :24] = 255  # left half red
    for one in (image, image.permute(1, 2, 0).contiguous().permute(2, 0, 1)):  # both memory orders
        shown = Image.open(io.BytesIO(jpeg(one, 90))).convert("RGB")
        assert shown.size == (48, 32)
        assert shown.getpixel((5, 16))[0] > 240
        assert shown.getpixel((43, 16))[0] < 15


@pytest.mark.parametrize(("watched", "expected"), [(True, 2), (False, 1)])
def test_pictures_come_often_only_while_somebody_looks(watched, expected):
    store, settings = MemoryStore(), PreviewSettings(max_fps=1e6, idle_fps=0.001)
    with running(store) as (engine, cameras):
        give(store, engine, spec("door"))
        sessions = list(engine.sessions.values())
        previews = Previews(store, lambda: sessions, settings)
        if watched:
            store.watch("door", 60)
        put = 0
        for n in range(2):
            cameras["door"].feed(picture("door", n))
            put += previews.run_once()
            assert previews.run_once() == 0  # the same frame is not put twice
        assert put == expected
        sessions.clear()
        assert previews.run_once() == 0
