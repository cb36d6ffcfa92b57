"""What the speed of training is measured on: the steps of train.py, with as much kept as was asked for."""
import math

import pytest
import torch
from models import pictures, tiny
from tiny import fails

import speed_training


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_a_forced_mask_keeps_the_same_share_of_every_image_and_has_the_gradient_of_the_mask_that_was_found(share):
    model, images = tiny(), pictures(3)
    weight = torch.rand(3, 25, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((model.mask(model.selector(images)) * weight).sum(), model.selector.prototypes)
    speed_training.force(model, share)
    keep = model.mask(model.selector(images))
    assert keep.sum(1).tolist() == [round(25 * share)] * 3 and set(keep.flatten().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(torch.autograd.grad((keep * weight).sum(), model.selector.prototypes), found)


def test_every_variant_is_measured_and_its_ratio_and_memory_printed(capsys, monkeypatch):
    monkeypatch.setattr(speed_training, "peak_memory", speed_training.peak_memory_here)      # starts no process
    speed_training.main(["--arch", "mini", "--size", "32", "--batch", "2", "--turns", "1", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line[:48].strip() for line in lines] == list(speed_training.VARIANTS)
    rows = [[float(x) for x in line[48:].split()] for line in lines]
    assert rows[0][2] == 1 and all(math.isfinite(x) and x > 0 for row in rows for x in row[1:])


def test_the_input_pipeline_is_measured_at_both_sizes(capsys):
    speed_training.measure_data(count=1, turns=1)
    assert capsys.readouterr().out.count("images/s and core") == 4


def test_a_share_that_is_none_is_refused(capsys):
    assert "--keep" in fails(speed_training.main, "--keep", 1.5)(capsys)
    assert "--keep" in fails(speed_training.main, "--keep", -1)(capsys)
