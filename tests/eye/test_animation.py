"""Films of the glimpses."""

import numpy as np
import pytest
from PIL import Image

from mambascope.eye.animation import Film, draw_frame, frame_steps, write_film
from tests.eye.common import LABELS


@pytest.fixture
def film():
    rng = np.random.default_rng(0)
    canvas = np.full((40, 40, 3), 200, dtype=np.uint8)
    probabilities = rng.dirichlet(np.ones(3), 9).astype(np.float32)
    positions = np.array([[0, 0], [8, 8], [32, 32], *[[16, 0]] * 6])
    return Film(canvas, positions, probabilities, np.linspace(0.1, 0.9, 9, dtype=np.float32), 8, LABELS, "a.png", True)


def test_frames_show_what_was_seen(film):
    first, third = (np.array(draw_frame(film, step)) for step in (1, 3))
    assert first.shape == third.shape
    scale, left, top = 256 / 40, 12, 36

    def at(frame, row, column):
        return frame[top + int(row * scale), left + int(column * scale)].tolist()

    assert at(first, 4, 4) == at(third, 4, 4) == [200] * 3
    assert at(first, 36, 36) == [56] * 3  # not seen yet
    assert at(third, 36, 36) == [200] * 3


@pytest.mark.parametrize(("ending", "frames"), [("gif", 60), ("png", 4)])
def test_films_are_animations(film, tmp_path, ending, frames):
    path = write_film(film, tmp_path / "new" / f"a.{ending}", frames=frames)
    with Image.open(path) as image:
        # the last glimpses look alike, and GIF joins equal frames
        assert 4 <= image.n_frames <= 9
        assert image.format == ending.upper()
    with pytest.raises(ValueError, match=r"written as \.gif or \.png"):
        write_film(film, tmp_path / "a.mp4")


def test_frame_steps():
    assert frame_steps(5, 60) == [1, 2, 3, 4, 5]
    steps = frame_steps(4096, 40)
    assert (steps[0], steps[-1]) == (1, 4096)
    assert len(steps) <= 41
    assert steps[:10] == list(range(1, 11))
