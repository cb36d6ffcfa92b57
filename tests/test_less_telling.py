"""What is done against what a mask tells: trimmed patches, the largest component, dilation. None of it may leak."""
import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from models import TINY, pictures, tiny
from tiny import fails, train

import evaluate
import predict
import runs
import train as training
from baselines import TrueMask, build
from ifam import Noise, assign, largest_component, paint
from measure import figures
from measure.leakage import shown_under, stage2_classifier
from runs import Config, preset, traced
from settings import UsageError

SWITCHES = {"trimmed by the parts": dict(trim="found"), "trimmed by the true mask": dict(trim="truth"), "the largest component": dict(largest=True),
            "dilated": dict(largest=True, dilate="always"), "everything, a smaller stage 1": dict(trim="found", largest=True, dilate="always", selector_size=42)}


def true_masks(count=3, size=70, seed=5):
    """Blobs of 0 and 1 (B, 1, S, S), whose border runs through patches."""
    noise = torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(noise, size, mode="bicubic") > 0).float()


# ---------------------------------------------------------------- nothing that is hidden or painted is read
@pytest.mark.parametrize("name", SWITCHES)
def test_no_pixel_that_is_hidden_or_painted_moves_a_bit_of_a_logit(name):
    model, images, truth = tiny(140, seed=1, **SWITCHES[name]), pictures(height=140), true_masks(size=140)
    classifier = stage2_classifier(model)
    with torch.no_grad():
        keep, held = classifier.find(images, truth)
        shown = shown_under(keep, getattr(held, "shown", None), model.predictor.backbone)
        assert 0 < shown.mean() < 1
        repainted = torch.where(shown > 0, images, torch.full_like(images, 9.0))
        logits = classifier.head(classifier.features(images, held))
        assert torch.equal(logits, model(images, **({"shown": truth} if model.needs_truth else {})).logits)
        assert torch.equal(logits, classifier.head(classifier.features(repainted, held)))
    images = images.requires_grad_()
    gradient = torch.autograd.grad(classifier.head(classifier.features(images, held)).square().sum(), images)[0]
    assert (gradient * (1 - shown) == 0).all() and (gradient * shown).abs().max() > 0


def test_stage_1_still_sees_the_whole_image():
    plain, trimmed, x = tiny(), tiny(trim="found"), pictures()
    a, b = plain(x), trimmed(x)
    assert torch.equal(a.maps, b.maps) and torch.equal(a.keep, b.keep) and torch.equal(a.logits_stage1, b.logits_stage1)
    assert not torch.equal(a.logits, b.logits) and a.shown is None


# ---------------------------------------------------------------- trimmed patches
def bilinear(values, y, x):
    """The value at the centre of pixel (y, x) of 14 x 14 to a cell of `values` (h, w): the plain formula."""
    h, w = values.shape
    y, x = (min(max((c + .5) / 14 - .5, 0), n - 1) for c, n in ((y, h), (x, w)))
    top, left = int(y), int(x)
    below, right = min(top + 1, h - 1), min(left + 1, w - 1)
    v, u = y - top, x - left
    return (1 - v) * ((1 - u) * values[top, left] + u * values[top, right]) + v * ((1 - u) * values[below, left] + u * values[below, right])


def test_a_pixel_is_shown_where_a_part_beats_the_background_in_the_enlarged_maps():
    model, x = tiny(trim="found"), pictures(2)
    out = model(x)
    maps = assign(out.part_logits).unflatten(2, (5, 5))
    wrong = 0
    for b in range(2):
        for row in range(0, 70, 3):
            for column in range(0, 70, 3):
                *parts, background = (bilinear(maps[b, k], row, column).item() for k in range(5))
                wrong += abs(max(parts) - background) > 1e-5 and (max(parts) > background) != bool(out.shown[b, 0, row, column])
    assert wrong == 0 and 0 < out.shown.mean() < 1


def test_trimming_by_the_true_mask_is_painting_the_background_before_stage_2():
    model, plain, x, truth = tiny(trim="truth"), tiny(), pictures(), true_masks()
    out = model(x, shown=truth)
    assert torch.equal(out.logits, plain.predictor(x * truth, out.keep)) and torch.equal(out.keep, plain(x).keep)
    with pytest.raises(ValueError, match="pass shown"):
        model(x)
    told = TrueMask(3, TINY, 70, pooling="mean", trim="truth").eval()
    keep = F.avg_pool2d(truth, 14).flatten(1).round()
    assert torch.equal(told(x, keep, shown=truth).logits, told.predictor(x * truth, keep))
    for missing in ({}, {"keep": keep}):
        with pytest.raises(ValueError, match="pass keep and shown"):
            told(x, **missing)


def test_a_part_that_drops_out_in_training_shows_no_pixel():
    model, x = tiny(trim="found"), pictures(2)
    parts = torch.tensor([[1., 0, 1, 0]] * 2)
    first = model.selector(x)
    maps = F.interpolate(first.maps, (70, 70), mode="bilinear")
    alone = (maps[:, [0, 2]].amax(1, keepdim=True) > maps[:, -1:]).float()
    assert torch.equal(model.shown_pixels(first, (70, 70), Noise(parts2=parts)), alone)


def test_painting_leaves_what_is_shown_and_makes_the_rest_the_mean_colour_even_of_what_is_not_finite():
    x, shown = pictures(1), true_masks(1)
    x[:, :, shown[0, 0] == 0] = float("inf")
    painted = paint(x, shown)
    assert painted.isfinite().all() and (painted * (1 - shown) == 0).all() and torch.equal(painted[shown.expand(1, 3, -1, -1) > 0], x[shown.expand(1, 3, -1, -1) > 0])
    assert paint(x, None) is x


# ---------------------------------------------------------------- the shape of the mask
def neighbours(keep):
    """A mask (h, w) and the eight neighbours of what it keeps: the plain loop."""
    wide = torch.zeros_like(keep)
    for i, j in keep.nonzero().tolist():
        wide[max(0, i - 1):i + 2, max(0, j - 1):j + 2] = 1
    return wide


def test_the_largest_component_is_what_stays_and_dilation_adds_neighbours():
    x, plain = pictures(4), tiny()
    keep = plain(x).keep
    assert torch.equal(tiny(largest=True)(x).keep, largest_component(keep, (5, 5)))
    wide = torch.stack([neighbours(k.view(5, 5)).flatten() for k in keep])
    assert torch.equal(tiny(dilate="always")(x).keep, wide) and wide.sum() > keep.sum()
    largest = largest_component(keep, (5, 5))
    assert torch.equal(tiny(largest=True, dilate="always")(x).keep, torch.stack([neighbours(k.view(5, 5)).flatten() for k in largest]))


def test_random_dilation_is_a_coin_of_each_image_in_training_and_nothing_in_evaluation():
    model, plain, x = tiny(dilate="random"), tiny(), pictures(3)
    assert torch.equal(model(x).keep, plain(x).keep)
    noise = Noise.draw(4, 25, generators=[torch.Generator().manual_seed(i) for i in range(3)], dilate=True)
    without = Noise.draw(4, 25, generators=[torch.Generator().manual_seed(i) for i in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(noise, without) if b is not None)      # the coin is drawn last
    keep = model.train()(x, noise=noise._replace(dilate=torch.tensor([1., 0, 1]))).keep
    plain_keep = plain.train()(x, noise=without).keep
    wide = torch.stack([neighbours(k.view(5, 5)).flatten() for k in plain_keep])
    assert torch.equal(keep, torch.stack([wide[0], plain_keep[1], wide[2]]))
    coins = Noise.draw(1, 1, generators=[torch.Generator().manual_seed(i) for i in range(400)], dilate=True).dilate
    assert set(coins.tolist()) == {0., 1.} and abs(coins.mean().item() - .5) < .1


@pytest.mark.parametrize("name", ["the largest component", "dilated"])
def test_the_gradient_of_the_mask_is_that_of_the_mask_as_it_was_found(name):
    weight = torch.randn(3, 25, generator=torch.Generator().manual_seed(0))
    gradients = []
    for switches in ({}, SWITCHES[name]):
        model = tiny(**switches)
        (model.mask(model.selector(pictures())) * weight).sum().backward()
        gradients.append(model.selector.prototypes.grad)
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


# ---------------------------------------------------------------- in the scripts
@pytest.mark.parametrize("flags", [["--trim", "found"], ["--trim", "truth"], ["--mask-largest", "--mask-dilate", "random"],
                                   ["--method", "early-truth", "--trim", "truth"]])
def test_a_run_trains_with_it_and_its_report_finds_no_leak(flags, tmp_path, capsys):
    out = train(tmp_path / "run", *flags)
    evaluate.main(["--ckpt", str(out / "best.pt"), "--leakage", "16", "--limit", "16"])
    report = json.loads((out / "report-limit16.json").read_text())
    assert report["leakage"]["repaint"]["max_logit_change"] == 0 == report["leakage"]["gradient"]["max_abs"]
    assert 0 <= report["mask"]["iou"] <= 1
    if "--trim" in flags:
        line = fails(evaluate.main, "--ckpt", out / "best.pt", "--encoding", "--limit", "16", "--out", tmp_path / "other.json")(capsys)
        assert "which paints some of their pixels" in line
    if "found" in flags:                                 # on a picture of one's own the painted pixels are known, and drawn
        model = runs.load(str(out / "best.pt"))
        found = predict.on(model, [Image.new("RGB", (120, 90), "olive")])
        assert found.shown.shape == (1, 1, 96, 96)
        torch.testing.assert_close(found.logits, model(found.pictures[0].image[None]).logits)
        figures.prediction(found, 0, tmp_path / "prediction.png")
    if "truth" in flags[-1]:
        assert report["leakage"]["admitted"] == 0


def test_two_steps_of_accumulation_are_one_step_with_it():
    """Nothing of it is of the batch: the step does not depend on how it is split."""
    model, x = tiny(dilate="random", trim="found").train(), pictures(4)
    noise = Noise.draw(4, 25, generators=[torch.Generator().manual_seed(i) for i in range(4)], dilate=True)
    whole, halves = model(x, noise=noise), [model(x[part], noise=noise.of(part)) for part in (slice(2), slice(2, 4))]
    for name in ("keep", "shown"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves]))


@pytest.mark.parametrize("flags, words", [
    (["--trim", "found", "--masking", "late", "--pooling", "mean"], "--trim paints what a hard, early mask"),
    (["--trim", "truth", "--hardness", "soft"], "--trim paints what a hard, early mask"),
    (["--mask-largest", "--hardness", "soft"], "are for hardness hard"),
    (["--mask-dilate", "random", "--hardness", "soft"], "are for hardness hard"),
    (["--method", "early-truth", "--trim", "found"], "finds none to trim by"),
    (["--method", "late-truth", "--trim", "truth"], "--trim means nothing to --method late-truth"),
    (["--method", "erm", "--mask-largest"], "--mask-largest means nothing to --method erm")])
def test_settings_that_make_no_sense_are_refused_in_one_line(flags, words, tmp_path, capsys):
    assert words in fails(training.main, "--data", "waterbirds", "--mini", "--limit", "32", "--device", "cpu", "--out", tmp_path / "run", *flags)(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("samples, words", [
    (SimpleNamespace(name="a folder", masks=None), "--trim truth needs true masks, and a folder has none here"),
    (SimpleNamespace(name="siim", masks=[], masks_tell=True, classes=("healthy", "sick")), "which gives the label away; choose --trim found or none")])
def test_true_masks_that_are_not_there_or_tell_the_label_trim_nothing(samples, words):
    with pytest.raises(UsageError, match=words):
        training.give_truth(samples, Config(method="ifam", trim="truth"))


@pytest.mark.parametrize("settings, words", [(dict(largest=True), "--mask-largest searches its mask"), (dict(trim="truth"), "is told where the object is")])
def test_what_has_no_fixed_shape_or_needs_the_truth_is_not_exported(settings, words):
    with pytest.raises(UsageError, match=words):
        traced(tiny(**settings), 2)


def test_settings_of_before_there_was_any_of_it_make_the_model_of_then():
    settings = asdict(Config(**preset({"mini": True}) | {"mini": True}))
    for name in ("trim", "mask_largest", "mask_dilate"):
        del settings[name]
    model = build(settings, 2)
    assert (model.trim, model.largest, model.dilate) == ("none", False, "none")
