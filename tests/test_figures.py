"""Figures: intervals and colours are what they say, and every figure can be written to a file."""
import numpy as np
import pytest
import torch
from PIL import Image

from measure import figures


def test_a_kind_of_mask_has_its_own_colour_wherever_its_name_occurs():
    colours = [figures.bar_style(f"{mask} (some model)")["color"] for mask in figures.MASKS]
    assert len(set(colours)) == len(figures.MASKS)
    assert figures.bar_style("early, hard")["color"] == figures.bar_style("early, hard (ifam)")["color"]


def test_what_a_mask_drops_is_grey_and_what_it_keeps_is_the_picture():
    picture, keep = np.random.default_rng(0).random((8, 8, 3)), torch.tensor([[1.0, 0], [0, 1]])
    shown = figures.only_kept(picture, keep)
    assert np.array_equal(shown[:4, :4], picture[:4, :4]) and np.allclose(shown[:4, 4:], 0.93)


def test_signs_have_colours_and_zero_has_none():
    less, none, more = figures.signed(np.array([[-1.0, 0, 1]]))[0]
    assert less[2] > less[0] and more[0] > more[2] and np.ptp(none) < 0.01


def test_an_outline_runs_between_kept_and_dropped_patches_only():
    line = figures.outlined(np.zeros((8, 8, 3)), np.array([[1, 0], [1, 0]])).any(2)
    assert line.shape == (24, 24) and line[:, 11:13].all() and not line[:, :10].any() and not line[:, 14:].any()


def test_a_coarse_heat_map_has_the_mean_of_each_cell():
    values = torch.arange(16.0).view(4, 4)
    assert figures.coarse(values, 2)[0, 0] == 2.5 and figures.coarse(values, 2)[3, 3] == values[2:, 2:].mean()


@pytest.mark.parametrize("draw", [
    lambda path: figures.grid({"a": [np.zeros((4, 4, 3)), (np.eye(4), "text")], "b": [None, np.ones((4, 4, 3))]}, ["one"], path, k=2),
    lambda path: figures.group_bars({"none": {"x y": {"n": 4, "accuracy": 0.5}, "z": {"n": 0, "accuracy": None}}}, path, chance=0.5),
    lambda path: figures.ladder({"one": {"none": 1.0, "early, hard": 0}, "two": {"none": 0, "early, hard": 0}}, path),
    lambda path: figures.curves({"late, hard": [0.5, 0.9], "early, hard": [0.5, 0.6]}, "x", "y", path, chance=0.5),
], ids=["grid", "group bars", "ladder", "curves"])
def test_a_figure_is_written_where_it_is_asked_to(draw, tmp_path):
    draw(tmp_path / "figure.png")
    assert min(Image.open(tmp_path / "figure.png").size) > 100 and not figures.plt.get_fignums()
