"""Several prototypes of the background, and the window of the presence loss: identities, slow loops, earlier runs."""
import json
from dataclasses import asdict

import pytest
import torch
from conftest import agrees
from models import pictures, there, tiny
from tiny import fails, train

import evaluate
import ifam
import intervene
import interventions
import runs
import train as trainer
from baselines import build
from ifam import Affine, Noise, presence, scaled_window
from settings import UsageError, parse


def several(M=3, **settings):
    """A small random model with M prototypes of the background, some patches nearest to each."""
    return tiny(backgrounds=M, **settings)


def step(model, noise):
    """Output, loss and gradients of a training step, the gradient of the prototypes by itself."""
    out, warped = model.train().forward_pair(pictures(), pictures(seed=2), noise)
    value = ifam.loss(out, warped, torch.tensor([0, 2, 1]), Affine())
    model.zero_grad()
    value.backward()
    return out, value, {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "prototypes" not in name}, \
        model.selector.prototypes.grad


NOISE = Noise.draw(4, 25, generators=[torch.Generator().manual_seed(seed) for seed in range(6)])


# ---------------------------------------------------------------- several backgrounds
def test_equal_prototypes_of_the_background_give_the_bits_of_one_and_share_its_gradient():
    one, three = several(1), several(3)
    state = one.state_dict()
    state["selector.prototypes"] = torch.cat([state["selector.prototypes"], *2 * [state["selector.prototypes"][4:]]])
    three.load_state_dict(state)
    (out, value, gradients, of_one), (same, again, theirs, of_three) = step(one, NOISE), step(three, NOISE)
    assert all(map(torch.equal, there(out), there(same))) and torch.equal(value, again)
    assert torch.equal(of_one[:4], of_three[:4]) and gradients.keys() == theirs.keys()
    agrees(of_three[4:], of_one[4:].expand(3, -1) / 3)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name in gradients:                               # thirds are added up on the way to the features
        torch.testing.assert_close(theirs[name], gradients[name], rtol=1e-5, atol=1e-6 * largest)


def test_a_prototype_of_the_background_that_is_far_from_every_patch_changes_nothing_and_gets_no_gradient():
    one, two = several(1), several(2)
    state = one.state_dict()
    state["selector.prototypes"] = torch.cat([state["selector.prototypes"], torch.full((1, 32), 50.0)])
    two.load_state_dict(state)
    (out, value, _, of_one), (same, again, _, of_two) = step(one, NOISE), step(two, NOISE)
    assert all(map(torch.equal, there(out), there(same))) and torch.equal(value, again)
    assert torch.equal(of_one, of_two[:5]) and of_two[5].eq(0).all() and of_one[4].abs().max() > 0


@pytest.mark.parametrize("noise, tau", [(False, 1.0), (True, 0.5)])
def test_the_mask_of_several_backgrounds_is_that_of_a_loop_over_all_prototypes(noise, tau):
    model = several(3, tau=tau).double()
    features = model.selector.features(pictures().double())
    gumbel = NOISE.keep[:3].double() if noise else torch.zeros(3, 5, 25).double()
    first = model.selector.select(features)
    keep, split = (f(first, *more, Noise(keep=gumbel)) for f, more in ((model.mask, ()), (model.split, (torch.ones(3, 25).double(),))))
    used = set()
    for b in range(3):
        for n in range(25):
            scores = [-(features[b, n] - p).square().sum().item() + gumbel[b, min(j, 4), n].item()       # the backgrounds share one sample
                      for j, p in enumerate(model.selector.prototypes)]
            nearest = max(range(7), key=scores.__getitem__)
            used.add(nearest)
            assert keep[b, n].item() == float(nearest < 4)
            assert split[b, :, n].argmax().item() == max(range(4), key=scores.__getitem__)
    assert {4, 5, 6} <= used and used & {0, 1, 2, 3}
    if not noise:
        assert torch.equal(first.maps.argmax(1).flatten(1) < 4, keep > 0)        # maps, masks and pictures agree


def test_part_logits_have_the_distance_to_the_nearest_prototype_of_the_background():
    model, x = several(3).double(), pictures().double()
    distances = torch.cdist(model.selector.prototypes, model.selector.features(x)).square()
    out = model(x)
    agrees(out.part_logits, -torch.cat([distances[:, :4], distances[:, 4:].amin(1, keepdim=True)], 1), 1e-10)
    assert out.maps.shape == (3, 5, 5, 5) and out.part_features.shape == (3, 5, 32)
    agrees(out.maps.sum(1), torch.ones(3, 5, 5).double(), 1e-12)


@pytest.mark.parametrize("score", ifam.SCORES)
def test_interventions_refuse_patches_of_parts_and_none_of_any_background(score):
    model, x = several(3), pictures()
    before = model(x)
    part = before.part_logits.argmax(1)
    model.selector.score, model.selector.limits = score, ifam.limits_of(4, [part[part < 4].mode().values.item()])
    gone = part == part[part < 4].mode().values
    after = model(x)
    assert gone.any() and torch.equal(after.keep, before.keep * ~gone)
    assert torch.equal(after.part_logits[:, 4], before.part_logits[:, 4])


@pytest.mark.parametrize("settings", [{}, {"trim": "found"}, {"selector_size": 42}, {"pooling": "mean"}])
def test_the_packed_path_of_several_backgrounds_equals_the_path_of_training(settings):
    model, x = several(3, **settings), pictures()
    keep = model(x).keep.detach()
    packed, dense = model(x, keep.clone()), model(x, keep.clone().requires_grad_())
    agrees(packed.logits, dense.logits)
    assert 0 < keep.mean() < 1


def test_a_checkpoint_from_before_there_were_several_has_one():
    cfg = parse(runs.Config, "", ["--mini", "--presence-window", "3"], runs.preset)
    old = {name: value for name, value in vars(cfg).items() if name not in ("backgrounds", "presence_window")}
    assert build(old, 2).selector.prototypes.shape == (5, 128) and runs.differences(old, cfg) == {}
    cfg.backgrounds = 3
    assert runs.differences(old, cfg) == {"backgrounds": (1, 3)} and build(asdict(cfg), 2).selector.prototypes.shape == (7, 128)
    assert build({**asdict(cfg), "method": "pdiscoformer"}, 2).selector.prototypes.shape == (7, 128)
    with pytest.raises(ValueError, match="background prototypes must be at least 1, not 0"):
        several(0)


def test_a_run_with_three_backgrounds_is_evaluated_and_corrected(tmp_path, capsys):
    folder = train(tmp_path / "a", "--backgrounds", 3, "--film", 0, "--limit", 16)
    ckpt, out = str(folder / "best.pt"), str(folder / "intervention.json")
    model, state = runs.load_model(ckpt)
    assert state["config"]["backgrounds"] == 3 and model.selector.prototypes.shape == (7, 128)
    intervene.main(["--ckpt", ckpt, "--limit", "8", "--drop", "0", "--q", "0.9", "--score", "cosine", "--out", out])
    evaluate.main(["--ckpt", ckpt, "--limit", "4", "--leakage", "2", "--intervention", out])
    assert interventions.apply_intervention(model, out, ckpt)["drop"] == [0] and model.selector.limits.shape == (4,)
    assert "parts removed: 0" in capsys.readouterr().out


# ---------------------------------------------------------------- the window of the presence loss
def test_the_window_is_the_published_one_on_the_papers_grid_and_scales_with_others():
    assert {n: scaled_window(n) for n in (3, 12, 16, 18, 19, 28, 30, 31, 37, 74)} == {
        3: 1, 12: 1, 16: 1, 18: 1, 19: 2, 28: 2, 30: 2, 31: 3, 37: 3, 74: 6}
    assert parse(runs.Config, "", [], runs.preset).presence_window == 0 and scaled_window(518 // 14) == 3
    maps = torch.rand(2, 5, 37, 37, generator=torch.Generator().manual_seed(0))
    found = []
    for how in ({}, {"window": 0}, {"window": 3}):
        x = maps.clone().requires_grad_()
        presence(x, **how).backward()
        found.append((presence(maps, **how), x.grad))
    assert all(torch.equal(value, found[0][0]) and torch.equal(gradient, found[0][1]) for value, gradient in found)


@pytest.mark.parametrize("window, sides", [(1, (1, 1)), (2, (2, 2)), (3, (3, 3)), (4, (4, 4)), (0, (1, 2))])
def test_presence_is_the_largest_average_over_windows_inside_the_map(window, sides):
    maps = torch.rand(2, 4, 9, 20, generator=torch.Generator().manual_seed(1)).double()
    a, b = sides
    peaks = [max(maps[i, part, y:y + a, x:x + b].mean().item() for i in range(2) for y in range(10 - a) for x in range(21 - b))
             for part in range(3)]
    assert presence(maps, window=window).item() == pytest.approx(1 - sum(peaks) / 3, abs=1e-12)
    terms = {}
    out = ifam.Output(torch.zeros(2, 2), torch.zeros(2, 2), maps)
    ifam.loss(out, None, None, None, {"presence": 1.0}, terms=terms, window=window)
    assert torch.equal(terms["presence"], presence(maps, window=window))


def test_training_takes_the_window_that_was_asked_for():
    batch = {"image": pictures(2, 96), "label": torch.tensor([0, 1])}
    terms = []
    for window in (3, 1, 0):
        cfg = parse(runs.Config, "", ["--mini", "--device", "cpu", "--presence-window", str(window)], runs.preset)
        terms.append(trainer.gradients(trainer.build_model(cfg, torch.device("cpu"), 2), cfg, batch, 0))
    assert terms[1]["presence"] == terms[2]["presence"] < terms[0]["presence"]   # 0 is 1 on 12 x 12 patches
    assert all(found["entropy"] == terms[0]["entropy"] for found in terms)


@pytest.mark.parametrize("flags, then", [
    ([], None), (["--size", "224"], 3), (["--recipe", "fast"], 3), (["--mini"], 3), (["--data", "metashift"], None),
    (["--data", "imagenet"], None), (["--mini", "--presence-window", "3"], None), (["--method", "erm", "--size", "224"], None)])
def test_a_run_from_before_the_setting_had_three_patches_and_goes_on_where_that_is_so_now(flags, then, tmp_path):
    cfg = parse(runs.Config, "", flags, runs.preset)
    old = {name: value for name, value in runs.plain(asdict(cfg)).items() if name != "presence_window"}
    assert runs.differences(old, cfg) == ({} if then is None else {"presence_window": (3, cfg.presence_window)})
    (tmp_path / "config.json").write_text(json.dumps(old))
    again = parse(runs.Config, "", ["--config", str(tmp_path / "config.json"), *["--mini"] * cfg.mini], runs.preset, runs.read_settings)
    assert not runs.differences(old, again)              # as it was, whatever the default is now


def test_a_window_larger_than_the_grid_is_refused_where_the_model_is_built(tmp_path, capsys):
    line = fails(trainer.main, "--mini", "--presence-window", 13, "--out", tmp_path / "a")(capsys)
    assert "--presence-window 13" in line and "12 x 12 patches" in line and not (tmp_path / "a").exists()
    with pytest.raises(UsageError, match="means nothing with --no-shaping"):
        parse(runs.Config, "", ["--no-shaping", "--presence-window", "2"], runs.preset)
