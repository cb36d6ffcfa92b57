"""A smaller stage 1: the mask is stage 2's, its gradient flows, the guarantee holds, and every script takes it."""
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import agrees
from models import TINY, pictures, tiny
from tiny import fails
from tiny import train as run

import evaluate
from vit import build_vit
import runs
import ifam
import intervene
from measure import leakage
import train
from baselines import build
from ifam import Noise, discretize
from settings import parse
from weights import load_backbone, load_pretrained


def small(**settings):
    return tiny(**{"selector_size": 42, **settings})     # 3 x 3 cells on 5 x 5 patches of stage 2


def seen(keep, patch=14, grid=(5, 5)):
    return leakage.pixels(keep, grid, patch).bool()


@pytest.mark.parametrize("size, cells", [(42, 3), (56, 4), (70, 5), (14, 1)])
def test_every_patch_of_stage_2_has_the_value_of_the_cell_in_which_its_centre_lies(size, cells):
    model, x = small(selector_size=size), pictures(3)
    first = model.selector(x)
    assert first.maps.shape == (3, 5, cells, cells)
    own = discretize(first.part_logits).view(3, cells, cells)
    for b in range(3):
        for row in range(5):
            for column in range(5):
                cell = own[b, (2 * row + 1) * cells // 10, (2 * column + 1) * cells // 10]
                assert model.mask(first)[b, row * 5 + column] == cell
    assert torch.equal(model(x).keep, model.mask(first))


def test_stage_1_sees_the_shrunk_image_and_nothing_else():
    model, x = small(), pictures(3)
    alone = tiny(size=42)
    alone.selector.load_state_dict(model.selector.state_dict())
    shrunk = F.interpolate(x, (42, 42), mode="bilinear", antialias=True)
    for ours, expected in zip(model.selector(x), alone.selector(shrunk)):
        assert torch.equal(ours, expected)


def test_the_same_size_is_the_model_without_the_option():
    model, plain, x = small(selector_size=70), tiny(), pictures(3)
    plain.load_state_dict(model.state_dict())
    for ours, expected in zip(model(x, per_part=True), plain(x, per_part=True)):
        assert ours is expected is None or torch.equal(ours.nan_to_num(), expected.nan_to_num())


def test_the_stage_2_loss_reaches_a_smaller_stage_1_as_the_sum_over_the_patches_of_a_cell():
    model, x = small().double(), pictures(3).double()
    first = model.selector(x)
    keep = model.mask(first)
    loss = F.cross_entropy(model.predictor(x, keep), torch.tensor([0, 1, 2]))
    by_patch, by_logit = torch.autograd.grad(loss, (keep, first.part_logits), retain_graph=True)
    rows = torch.tensor([(2 * i + 1) * 3 // 10 for i in range(5)])
    cell = (rows[:, None] * 3 + rows).flatten()                                  # of every patch
    by_cell = torch.zeros(3, 9, dtype=torch.float64).index_add_(1, cell, by_patch)
    slope = first.part_logits.softmax(1)[:, :-1].sum(1)
    expected, = torch.autograd.grad((slope * by_cell).sum(), first.part_logits)
    agrees(by_logit, expected, 1e-10)
    loss.backward()
    assert all(t.grad.abs().max() > 0 for t in (model.selector.prototypes, model.selector.backbone.pos_embed))


def test_the_mask_of_a_training_step_stays_exactly_binary_and_losses_act_on_the_grid_of_stage_1():
    model, x = small().train(), pictures(2)
    noise = Noise.draw(4, 9, generators=[torch.Generator().manual_seed(i) for i in range(4)])
    out, warped = model.forward_pair(x, pictures(2, seed=2), noise)
    assert out.keep.shape == (2, 25) and ((out.keep == 0) | (out.keep == 1)).all() and 0 < out.keep.mean() < 1
    assert out.maps.shape == warped.shape == (2, 5, 3, 3) and out.keep.requires_grad


@pytest.mark.parametrize("settings", [{}, {"selector_arch": dict(TINY, patch=7, width=16), "selector_size": None}], ids=["size", "arch"])
def test_no_dropped_pixel_reaches_a_logit_when_stage_1_is_smaller(settings):
    model, x = small(**settings), pictures(4)
    keep = model(x).keep
    assert 0 < keep.mean() < 1
    logits = model(x, keep).logits
    for paint in (5 * torch.randn_like(x), x.roll(1, 0), torch.zeros_like(x)):
        assert torch.equal(logits, model(torch.where(seen(keep), x, paint), keep).logits)
    gradient, = torch.autograd.grad(model(x.requires_grad_(), keep).logits.sum(), x)
    assert gradient[~seen(keep).expand_as(x)].eq(0).all() and gradient.abs().max() > 0


@pytest.mark.parametrize("make, message", [
    (lambda: small()(pictures(2, 84)), "images are 84x84 pixels, the model was built for 70x70"),
    (lambda: small(selector_size=45), "45x45 is not a multiple of the patch size 14"),
    (lambda: small()(pictures(2), keep=torch.ones(2, 9)), r"keep is \(2, 9\), not \(2, 25\)"),
    (lambda: build_vit("q", 70), "'q' is no architecture"), (lambda: build_vit("s/", 70), "'s/' is no architecture"),
    (lambda: build_vit("s/0", 70), "s has 12 blocks"), (lambda: build_vit("mini/5", 96), "mini has 4 blocks")])
def test_sizes_and_architectures_that_do_not_fit_are_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_first_blocks_of_a_file_are_loaded_and_a_file_with_too_many_is_still_an_error():
    torch.manual_seed(0)
    whole, part = build_vit("mini", 96), build_vit("mini/2", 48)
    with pytest.raises(ValueError, match="unexpected blocks.2"):
        load_backbone(part, whole.state_dict())
    load_backbone(part, whole.state_dict(), 2)
    assert len(part.blocks) == 2 and part.grid == (6, 6)
    for name, value in part.state_dict().items():
        assert name == "pos_embed" or torch.equal(value, whole.state_dict()[name]), name


def test_each_stage_starts_from_the_weights_of_its_own_size(monkeypatch):
    asked = []

    def fetch(url, cached):
        asked.append(cached.name)
        return build_vit("s" if "vits" in cached.name else "b", 518).state_dict()
    monkeypatch.setattr("weights.fetch", fetch)
    model = ifam.IFAM(2, arch="b", size=28, selector_arch="s/1", selector_size=14)
    load_pretrained(model, "dinov2", "b", 4, "s/1")
    assert asked == ["dinov2_vits14_reg4_pretrain.pth", "dinov2_vitb14_reg4_pretrain.pth"]
    assert model.selector.backbone.width == 384 and len(model.selector.backbone.blocks) == 1 and model.predictor.backbone.width == 768


def test_a_run_from_before_these_options_had_their_defaults():
    cfg = parse(runs.Config, "", ["--mini"], runs.preset)
    old = {name: value for name, value in vars(cfg).items() if not name.startswith("selector")}
    assert runs.differences(old, cfg) == {}
    model = build(old, 2)
    assert model.selector.given is None and model.selector.backbone.grid == model.grid == (12, 12)
    cfg.selector_size = 48
    assert runs.differences(old, cfg) == {"selector_size": (0, 48)}


# ---------------------------------------------------------------- the scripts
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "run", "--selector-size", 56, "--selector-arch", "mini/2")


def test_a_checkpoint_with_a_smaller_stage_1_is_evaluated_and_leaks_exactly_nothing(trained):
    import json
    evaluate.main(["--ckpt", str(trained / "best.pt"), "--limit", "32", "--speed"])
    report = json.loads((trained / "report-limit32.json").read_text())
    assert report["leakage"]["repaint"]["max_logit_change"] == 0 and report["leakage"]["gradient"]["max_abs"] == 0
    assert 0 <= report["localisation"]["foreground_iou"] <= 1 and report["localisation"]["nmi"] is not None
    assert report["leakage"]["place_of_mask"]["weights"] == "stage 1"
    assert report["speed"]["gflops"]["stage1"] < 0.25 * report["speed"]["gflops"]["dense"]
    model, state = runs.load_model(trained / "best.pt")
    assert (state["config"]["selector_size"], state["config"]["selector_arch"]) == (56, "mini/2")
    assert model.selector.backbone.grid == (7, 7) and model.grid == (12, 12)


def test_parts_of_a_smaller_stage_1_can_be_removed(trained):
    intervene.main(["--ckpt", str(trained / "best.pt"), "--limit", "16", "--drop", "0", "--q", "0.9"])
    evaluate.main(["--ckpt", str(trained / "best.pt"), "--limit", "16", "--intervention", str(trained / "intervention.json")])
    assert (trained / "intervention-part-1.png").stat().st_size > 10_000


@pytest.mark.parametrize("flags, words", [
    (("--selector-size", 50), ("50x50 is not a multiple of the patch size 8",)), (("--selector-size", 104), ("larger than the image", "96")),
    (("--selector-arch", "s", "--selector-size", 84), ("--weights mini", "s")), (("--selector-arch", "minni"), ("'minni' is no architecture",)),
    (("--method", "erm", "--selector-size", 48), ("--selector-size", "means nothing", "ifam"))], ids=str)
def test_a_stage_1_that_cannot_be_is_one_line(flags, words, tmp_path, capsys):
    line = fails(train.main, "--mini", "--limit", 64, "--out", tmp_path / "run", *flags)(capsys)
    assert all(w in line for w in words), line
