"""chart.py: where values and pictures end up."""
import numpy as np
import pytest
from PIL import Image

from chart import COLOURS, Axis, arrange, cells, plot, table

X = Axis("x", (0, 10), {"0": 0, "five": 5, "10": 10})
DOWN = Axis("y", (4, 0), {"4": 4, "0": 0})


def frame(chart):
    """What lies inside the frame -> (height, width, 3)."""
    pixels = np.asarray(chart).astype(int)
    grey = (pixels == 128).all(-1)
    rows = np.flatnonzero(grey.sum(1) > 80)
    columns = np.flatnonzero(grey.sum(0) > 40)
    assert len(rows) == len(columns) == 2
    return pixels[rows[0] + 1:rows[1], columns[0] + 1:columns[1]]


@pytest.mark.parametrize("label", ["y", "a label", "a longer label"])
def test_a_background_fills_the_frame_to_the_pixel(label):
    cells = np.arange(50 * 100).reshape(50, 100) % 251
    background = Image.fromarray(cells.astype("uint8"))
    chart = plot("title", X, DOWN._replace(label=label), background=background, size=(100, 50))
    assert np.array_equal(frame(chart), np.stack([cells] * 3, axis=-1))


def test_a_curve_passes_through_its_points_and_ends_at_the_frame():
    xs = np.linspace(-5, 15, 2001)
    curves = [("line", xs, 0.4 * xs), ("line", xs, 0 * xs + 3)]
    chart = plot("title", X, DOWN, curves, size=(100, 80))
    colour = [int(COLOURS[0][i:i + 2], 16) for i in (1, 3, 5)]
    coloured = (abs(np.asarray(chart).astype(int) - colour) < 40).all(-1)
    assert not coloured[:, :20].any()
    rows, columns = np.nonzero((abs(frame(chart) - colour) < 40).all(-1))
    # y = 0.4 x falls from the top left, where y is 0, to the bottom right; y = 3 is three quarters
    # down.
    on_first = abs(rows - 0.8 * columns) < 3
    on_second = abs(rows - 60) < 2
    assert (on_first | on_second).all()
    for line in (on_first, on_second):
        assert set(columns[line]) >= set(range(3, 97))


def test_a_tables_colours_are_its_values_and_what_is_nan_stays_empty():
    values = np.array([[3.0, 5.0, 9.0], [4.0, np.nan, 1.0]])
    drawn = frame(table("title", cells("x", "abc"), cells("y", (1, 2)), values, (3, 5),
                        size=(60, 40)))
    assert drawn.shape == (2 * 40, 3 * 60, 3)
    blue = np.array([0, 114, 178])
    for (row, column), share in np.ndenumerate([[0, 1, 1], [0.5, 0, 0]]):
        cell = drawn[40 * row:40 * row + 40, 60 * column:60 * column + 60]
        assert abs(cell[2:6, 2:-2] - (255 - share * (255 - blue))).max() <= 1
        empty = np.isnan(values[row, column])
        assert (abs(cell[2:-2, 2:-2] - cell[2, 2]).max() < 2) == empty      # a number stands there


def test_pictures_are_arranged_row_by_row():
    pictures = [Image.new("RGB", size, colour) for size, colour in
                [((4, 3), "red"), ((6, 2), "blue"), ((1, 1), "black")]]
    sheet = arrange(pictures, columns=2)
    assert sheet.size == (12, 6)
    assert [sheet.getpixel(place) for place in ((0, 0), (6, 0), (0, 3), (11, 5))] == [
        (255, 0, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255)]
