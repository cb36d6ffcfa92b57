"""--draft decodes large JPEG files smaller, in training alone; the processes that read start once in a run."""
import os

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import train as run

import data
import runs
import speed
import train
from benchmarks.files import read_image
from benchmarks.transforms import FINE_GRAINED, PHOTOGRAPHS, View
from settings import parse


def sides(path, least):
    return read_image(path, "RGB", least=least).size


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return speed.photographs(tmp_path_factory.mktemp("large"), 2, 400, 300, octaves=4)


def split(paths, **settings):
    return speed.split_of(paths, FINE_GRAINED, 96, **settings)


def test_a_file_is_decoded_at_the_smallest_scale_that_keeps_the_side_that_is_needed(large, tmp_path):
    found = {least: sides(large[0], least) for least in (0, 301, 300, 151, 150, 75, 38, 37)}
    assert found == {0: (400, 300), 301: (400, 300), 300: (400, 300), 151: (400, 300), 150: (200, 150), 75: (100, 75), 38: (100, 75), 37: (50, 38)}
    Image.open(large[0]).save(tmp_path / "same.png")
    assert sides(tmp_path / "same.png", 37) == (400, 300)            # another format has no such mode


def test_only_training_views_without_a_mask_are_drafted_and_they_differ_little(large):
    plain, draft = split(large), split(large, draft=True)
    assert torch.equal(plain[0]["image"], draft[0]["image"])         # evaluation
    a, b = (some[3, 0]["image"] for some in (plain, draft))
    assert a.shape == b.shape and not torch.equal(a, b) and torch.equal(b, draft[3, 0]["image"])
    grey = FINE_GRAINED.normalisation[1][0]                          # levels of 0 to 1, of one deviation each
    assert (a - b).abs().mean() * grey * 255 < 8
    for some in (plain, draft):
        some.masks, some.train_masks = large, True
    assert torch.equal(plain[3, 0]["image"], draft[3, 0]["image"])   # a mask is as large as its picture


def test_files_that_are_not_twice_as_large_give_the_same_bits(large):
    plain, draft = (speed.split_of(large, FINE_GRAINED, 151, draft=on) for on in (False, True))
    assert all(torch.equal(plain[0, i]["image"], draft[0, i]["image"]) for i in range(2))


def test_the_flag_reaches_the_training_split_alone_and_is_off_by_default():
    assert parse(runs.Config, "", ["--data", "waterbirds", "--mini"], runs.preset).draft is False
    for flags, expected in (((), False), (("--draft",), True)):
        cfg = parse(runs.Config, "", ["--data", "waterbirds", "--mini", "--limit", "16", *flags], runs.preset)
        samples, val = train.open_data(cfg, 0, 1)
        assert (samples.draft, val.draft) == (expected, False)
    assert all(b.pipeline.crops_first == (b.pipeline is PHOTOGRAPHS) for b in data.BENCHMARKS.values())


def test_the_change_that_is_printed_is_that_of_the_pixels(large):
    rows = speed.drafts(96, large, 1, torch.device("cpu"))
    off = []
    for path in large:
        views = [View(read_image(path, "RGB", least=least)) for least in (0, 96)]
        for view in views:
            FINE_GRAINED.evaluate(view, 96)
        off.append(np.abs(np.subtract(*(np.asarray(view.image, dtype=int) for view in views))))
    found = rows["400 x 300, 96 px, --draft"]
    assert found["levels_mean"] == pytest.approx(np.mean(off)) and found["levels_most"] == np.max(off) > 0
    assert rows["400 x 300, 96 px"]["levels_mean"] is None


def test_the_processes_that_read_start_once_in_a_run(tmp_path, monkeypatch):
    started, plain = tmp_path / "started", train.leave_signals

    def note(worker):
        with open(started, "a") as file:
            file.write(f"{worker} {os.getpid()}\n")
        plain(worker)
    monkeypatch.setattr(train, "leave_signals", note)
    run(tmp_path / "run", "--limit", 32, "--epochs", 3, "--workers", 2)          # six steps, three epochs, three validations
    lines = started.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 2 and {line[0] for line in lines} == {"0", "1"}
