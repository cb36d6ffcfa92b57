"""MaskTune: what a finished model looks at most is hidden, by its rule, at its place, for one epoch."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import augment
import data
import evaluate
import ifam
import runs
import train
from augment import attribution, most_attributed
from baselines import ERM
from benchmarks.samples import Samples
from benchmarks.transforms import FINE_GRAINED
from models import TINY, pictures, tiny
from settings import UsageError, parse
from tiny import TINY as FLAGS
from tiny import fails
from tiny import train as run
from vit import attend_all, attend_masked


# ---------------------------------------------------------------- the rule
def test_hidden_is_what_exceeds_the_mean_of_the_positive_by_two_deviations():
    heat = torch.tensor([[0.0, *[1.0] * 8, 10.0]])
    assert most_attributed(heat).nonzero().tolist() == [[0, 9]]
    threshold = 2 + 2 * 8 ** 0.5                         # 7.657
    for value, hidden in ((threshold - 1e-3, False), (threshold + 1e-3, True)):
        nine = torch.tensor([1.0] * 8 + [10.0])          # the rule by hand
        assert (value > nine.mean() + 2 * nine.std(correction=0)) == hidden
    assert threshold == pytest.approx(7.657, abs=1e-3)


def test_a_constant_map_and_one_without_anything_positive_hide_nothing():
    heat = torch.stack([torch.full((1369,), x) for x in (0.1, 3.3333e-7, 1e5, 0.0)])
    assert not most_attributed(heat).any()


# ---------------------------------------------------------------- the attribution
def by_hand(stage, images, keep=None):
    """Gradient of the largest logit times token, in front of the last attention, one image at a time."""
    vit, rows = stage.backbone, []
    last = vit.blocks[-1]
    for b in range(len(images)):
        one = None if keep is None else keep[b:b + 1]
        *_, before, _ = vit.layers(images[b:b + 1], one)
        z = last.norm1(before).detach().requires_grad_()
        attend = attend_all if one is None else lambda q, k, v: attend_masked(q, k, v, vit.mask_of(one))
        logits = stage.head(stage.fc_norm(vit.norm(last.add(before, last.attn(z, attend)))[:, 0]))
        gradient, = torch.autograd.grad(logits.max(), z)
        rows.append((gradient * z)[0, vit.prefix:].sum(1).clamp_min(0))
    return torch.stack(rows).detach()


def test_attribution_is_gradient_times_token_in_front_of_the_last_attention():
    torch.manual_seed(0)
    model, x = ERM(3, TINY, 70).double(), pictures().double()
    heat = attribution(model, x)
    torch.testing.assert_close(heat, by_hand(model.predictor, x))
    assert (heat > 0).any() and all(p.grad is None for p in model.parameters()) and model.predictor.backbone.packed


def test_before_the_layer_norm_the_same_product_is_nothing_whatever_the_patch():
    torch.manual_seed(0)
    model, x = ERM(3, TINY, 70).double(), pictures().double()
    vit = model.predictor.backbone
    vit.blocks[-1].norm1.eps = 0.0
    *_, before, _ = vit.layers(x)
    z = before.detach().requires_grad_()
    logits = model.predictor.head(model.predictor.fc_norm(vit.norm(vit.blocks[-1](z, attend_all))[:, 0]))
    gradient, = torch.autograd.grad(logits.amax(1).sum(), z)
    assert (gradient * z).sum(2)[:, vit.prefix:].abs().max() < 1e-9 * attribution(model, x).max()


def test_of_a_mean_of_patches_it_is_how_much_each_adds_to_the_logit():
    torch.manual_seed(0)
    model, x = ERM(3, TINY, 70, pooling="mean", norm=False), pictures()
    tokens = model.predictor.backbone(x)[:, 5:].detach()
    each = (tokens @ model.predictor.head.weight.T / 25).detach()                # (B, N, C): sums to the logits
    answer = each.sum(1).argmax(1)
    torch.testing.assert_close(attribution(model, x), torch.stack([each[b, :, answer[b]] for b in range(3)]).clamp_min(0))


def test_ifam_attributes_among_the_patches_that_it_keeps():
    model, x = tiny().double(), pictures().double()
    keep = model(x).keep.detach()
    heat = attribution(model, x)
    torch.testing.assert_close(heat, by_hand(model.predictor, x, keep) * keep)
    assert 0 < keep.mean() < 1 and not heat[keep == 0].any() and heat.any()


def test_no_label_says_what_is_hidden():
    samples = data.load("waterbirds", data.find_root("waterbirds", "", True), 96, limit=16)["train"]
    cfg = parse(runs.Config, "", [*FLAGS, "--method", "erm"], runs.preset)
    model = train.build_model(cfg, torch.device("cpu")).eval()
    bits, said = augment.find_hidden(model, samples, cfg, 0, 1, "cpu")
    samples.labels = 1 - samples.labels
    assert torch.equal(augment.find_hidden(model, samples, cfg, 0, 1, "cpu")[0], bits)
    whole = torch.cat([most_attributed(attribution(model, samples[i]["image"][None])) for i in range(16)])
    assert said["hidden"] == pytest.approx(whole.double().mean().item())
    inside = sum(whole[i].double() @ torch.nn.functional.avg_pool2d(samples[i]["mask"][None].double(), 8).flatten() for i in range(16))
    assert said["in_object"] == pytest.approx(inside.item() / whole.sum().item(), rel=1e-5)


# ---------------------------------------------------------------- the place
def one_picture(folder, size=(90, 56), side=56):
    pixels = np.random.default_rng(0).integers(1, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(np.uint8(np.arange(size[0])[None] % 2 * np.ones((size[1], 1)) * 255)).save(folder / "m.png")
    samples = Samples("one", "train", side, ("a",), ["a"], [folder / "a.png"], [0], masks=[folder / "m.png"])
    samples.pipeline = FINE_GRAINED._replace(train=lambda view, size, rng: FINE_GRAINED.evaluate(view, size))
    return samples


def test_what_the_evaluation_view_hides_is_black_at_that_place_and_nothing_else_changes(tmp_path):
    samples = one_picture(tmp_path)
    hidden = torch.zeros(1, 49)
    hidden[0, [3, 24, 48]] = 1
    plain = samples[0]["image"]
    samples.hidden, samples.hidden_grid = augment.bits_of(hidden), (7, 7)
    sample = samples[0, 0]
    where = ifam.pixels(hidden, (7, 7), 8)[0, 0].bool()
    assert torch.equal(sample["hidden"].bool(), where) and "mask" not in sample
    black = -torch.tensor(FINE_GRAINED.normalisation[0]) / torch.tensor(FINE_GRAINED.normalisation[1])
    torch.testing.assert_close(sample["image"][:, where], black[:, None].expand(-1, int(where.sum())))
    assert torch.equal(sample["image"][:, ~where], plain[:, ~where]) and torch.equal(samples[0]["image"], plain)


def test_true_found_and_hidden_masks_are_augmented_together_and_come_apart_again(tmp_path):
    samples = one_picture(tmp_path, size=(56, 56))
    g = torch.Generator().manual_seed(0)
    found, hidden = (torch.rand(1, 49, generator=g) > 0.5 for _ in range(2))
    samples.train_masks = True
    samples.found, samples.found_grid, samples.hidden, samples.hidden_grid = augment.bits_of(found), (7, 7), augment.bits_of(hidden), (7, 7)
    sample = samples[0, 0]
    for name, patches in (("found", found), ("hidden", hidden)):
        assert torch.equal(sample[name], ifam.pixels(patches.to(torch.uint8), (7, 7), 8)[0, 0])
    assert torch.equal(sample["mask"], samples[0]["mask"]) and sample["mask"].any()
    samples.pipeline = FINE_GRAINED
    again = samples[3, 0]
    hidden = again.pop("hidden")
    samples.hidden = None
    alone = samples[3, 0]
    assert torch.equal(again["mask"], alone["mask"]) and torch.equal(again["found"], alone["found"]) and hidden.any()


def test_an_image_of_which_nothing_is_hidden_is_as_it_was(tmp_path):
    samples = one_picture(tmp_path)
    samples.pipeline = FINE_GRAINED
    plain = samples[2, 0]["image"]
    samples.hidden, samples.hidden_grid = augment.bits_of(torch.zeros(1, 49)), (7, 7)
    assert torch.equal(samples[2, 0]["image"], plain) and not samples[2, 0]["hidden"].any()


# ---------------------------------------------------------------- hidden from both stages
def test_a_hidden_patch_reaches_neither_stage_of_ifam_and_is_background():
    model, x, seen = tiny().train(), pictures(), torch.ones(3, 25)
    seen[:, [2, 7, 12, 20]] = 0
    other = torch.where(ifam.pixels(seen, (5, 5), 14) == 0, torch.randn_like(x), x)
    noise = ifam.Noise.draw(4, 25, generators=[torch.Generator().manual_seed(i) for i in range(6)])
    first, maps = model.forward_pair(x, x, noise, seen=seen)
    second, _ = model.forward_pair(other, x, noise, seen=seen)
    assert torch.equal(first.logits, second.logits) and torch.equal(first.logits_stage1, second.logits_stage1)
    assert not first.keep[seen == 0].any() and (first.maps.flatten(2)[:, -1][seen == 0] == 1).all() and first.keep.any()
    labels, affine = torch.arange(3), ifam.Affine()
    ifam.loss(first, maps, labels, affine).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_smaller_stage_1_hides_where_its_patches_centres_lie():
    model, x, seen = tiny(selector_size=42).train(), pictures(), torch.ones(3, 25)
    seen[:, :5] = 0
    out, _ = model.forward_pair(x, x, ifam.Noise.draw(4, 9, generators=[None] * 6), seen=seen)
    assert not out.keep[:, :5].any() and (out.maps[:, -1, 0] == 1).all()


# ---------------------------------------------------------------- the run
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "erm", "--method", "erm", "--limit", 32, "--log-every", 1)


def tuned(finished, out, *flags):
    train.main(["--masktune", str(finished), "--out", str(out), *map(str, flags)])
    return out


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_one_more_epoch_sees_every_image_once_hidden_at_a_tenth_of_the_rate_from_the_last_weights(finished, tmp_path, monkeypatch):
    seen, real = [], train.gradients
    monkeypatch.setattr(train, "gradients", lambda model, cfg, batch, step, *rest: seen.append((step, batch, {n: p.clone() for n, p in model.named_parameters()})) or real(model, cfg, batch, step, *rest))
    folder = tuned(finished, tmp_path / "tuned")
    assert [step for step, *_ in seen] == [2, 3]
    ids = [name for _, batch, _ in seen for name in batch["id"]]
    assert len(set(ids)) == len(ids) == 32 and all("hidden" in batch for _, batch, _ in seen)
    before, after = (runs.read_checkpoint(where / "last.pt") for where in (finished, folder))
    assert all(torch.equal(x, before["model"][name]) for name, x in seen[0][2].items())
    assert after["step"] == 4 and after["optimizer"]["state"][0]["step"] == 4    # of the optimizer too
    rates = [line["lr"]["heads, warmed up"] for line in lines(folder) if "loss" in line]
    base = before["optimizer"]["param_groups"]
    assert rates == [pytest.approx(0.1 * next(g["base_lr"] for g in base if g["base_lr"] == max(g["base_lr"] for g in base)))] * 2
    said = next(line["masktune"] for line in lines(folder) if "masktune" in line)
    assert 0 < said["hidden"] < 0.2 and 0 <= said["in_object"] <= 1 and 0 <= said["of_object"] <= 1
    evaluate.main(["--ckpt", str(folder / "best.pt")])
    assert 0 <= json.loads((folder / "report.json").read_text())["stage2"]["aa"] <= 1


def test_hidden_patches_have_no_token_and_pixels_are_black_alone(finished, tmp_path, monkeypatch):
    told, real = [], train.taught
    monkeypatch.setattr(train, "taught", lambda *how: told.append(real(*how)) or told[-1])
    tuned(finished, tmp_path / "patches")
    assert all(x.keys() == {"keep"} and ((x["keep"] == 0) | (x["keep"] == 1)).all() for x in told) and any((x["keep"] == 0).any() for x in told)
    told.clear()
    tuned(finished, tmp_path / "pixels", "--hide-with", "pixels")
    assert told == [{}] * len(told)
    assert runs.read_config(tmp_path / "pixels" / "config.json")["hide_with"] == "pixels"


def test_stopped_and_resumed_it_is_the_run_that_was_not_even_without_the_first_one(finished, tmp_path, monkeypatch):
    whole = tuned(finished, tmp_path / "whole")
    real = train.save

    def stop(path, rank, cfg, step, *rest, **more):
        real(path, rank, cfg, step, *rest, **more)
        if step == 3 and path.name == "last.pt":
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        tuned(finished, tmp_path / "killed", "--save-every", 1)
    monkeypatch.setattr(train, "save", real)
    monkeypatch.setattr(augment, "find_hidden", None)      # it is in hidden.pt
    killed = tuned(finished, tmp_path / "killed", "--resume")
    a, b = (runs.read_checkpoint(folder / "last.pt") for folder in (whole, killed))
    assert a["step"] == b["step"] == 4 and all(torch.equal(x, b["model"][name]) for name, x in a["model"].items())


def test_a_run_of_ifam_goes_on_too(tmp_path):
    first = run(tmp_path / "ifam", "--limit", 16, "--ema", 0.9)
    folder = first.with_name("ifam-masktune")
    train.main(["--masktune", str(first)])
    assert (folder / "best.pt").is_file() and runs.read_checkpoint(folder / "last.pt")["step"] == 2
    assert "masktune" in next(line for line in lines(folder) if "masktune" in line)


@pytest.mark.parametrize("flags, words", [
    (("--data", "cub"), "where it is waterbirds"), (("--lr", 1), "--lr 1.0 with --masktune"), (("--method", "ifam"), "where it is erm"),
    (("--masktune-lr", 0), "above 0"), (("--hide-with", "patch"), "did you mean patches")])
def test_other_settings_than_those_of_the_run_are_refused(finished, flags, words, tmp_path, capsys):
    line = fails(train.main, "--masktune", finished, *flags, "--out", tmp_path / "run")(capsys)
    assert words in line and not (tmp_path / "run").exists()


def test_a_run_that_cannot_go_on_says_why(finished, tmp_path, capsys):
    assert "name another folder" in fails(train.main, "--masktune", finished, "--out", finished)(capsys) and (finished / "best.pt").is_file()
    goes_on = lambda folder: fails(train.main, "--masktune", folder, "--out", tmp_path / "out")(capsys)
    assert "config.json" in goes_on(tmp_path)
    for settings, words in (({"method": "pdiscoformer"}, "take a run of erm, frozen, ifam"), ({"swap": 0.5}, "take a run without"), ({"masktune": "runs/x"}, "went on from runs/x"), ({}, "not trained to its end")):
        folder = tmp_path / "other"
        folder.mkdir(exist_ok=True)
        config = json.loads((finished / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **settings}))
        assert words in goes_on(folder)
    (folder / "log.jsonl").write_text((finished / "log.jsonl").read_text())
    assert "no best.pt" in goes_on(folder) and not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="^--masktune: x was trained with other groups.*train it again"):
        runs.refuse_other_images({"images": {"groups": [2, "a"]}}, {"groups": [2, "b"]}, 1, "x", "--masktune")
