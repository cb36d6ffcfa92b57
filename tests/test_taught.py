"""Masks that teach and are never given: patches that answer, a supervised selector; and what a mask hides must not do."""
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_augment import batch_of, config

import evaluate
import ifam
import objectives
import train
from baselines import ERM, Segmenter, patch_targets
from benchmarks.samples import boxes_of, patch_share
from models import TINY, pictures, there, tiny
from settings import UsageError
from tiny import fails
from tiny import TINY as FLAGS
from tiny import train as run


def some_masks(count=4, size=70, seed=0):
    masks = torch.zeros(count, size, size, dtype=torch.uint8)
    g = torch.Generator().manual_seed(seed)
    for mask in masks[:-1]:                              # the last is empty
        for _ in range(2):
            r, c = torch.randint(0, size - 12, (2,), generator=g).tolist()
            mask[r:r + 9, c:c + 12] = 1
    return masks


# ---------------------------------------------------------------- masks as patches and as boxes
def test_a_box_holds_its_mask_and_touches_it_on_every_side_and_is_its_own_box():
    masks = some_masks()
    boxes = boxes_of(masks)
    assert (boxes >= masks).all() and torch.equal(boxes_of(boxes), boxes) and boxes.dtype == masks.dtype
    for mask, box in zip(masks[:-1], boxes):
        rows, columns = (mask.any(axis).nonzero()[:, 0] for axis in (1, 0))
        by_hand = torch.zeros_like(mask)
        by_hand[rows.min():rows.max() + 1, columns.min():columns.max() + 1] = 1
        assert torch.equal(box, by_hand)
    assert not boxes[-1].any()


def test_the_share_of_a_patch_is_counted_pixel_by_pixel_on_any_grid():
    masks = some_masks()
    shares = patch_share(masks, (5, 5))
    for b in range(4):
        for n in range(25):
            r, c = divmod(n, 5)
            assert shares[b, n].item() == pytest.approx(masks[b, 14 * r:14 * r + 14, 14 * c:14 * c + 14].float().mean().item(), abs=1e-6)
    assert patch_share(masks, (3, 4)).shape == (4, 12)


def test_a_patch_answers_the_class_for_its_share_of_object_and_none_or_the_first_class_for_the_rest():
    shares, labels = torch.tensor([[0.25, 1.0], [0.0, 0.5]]), torch.tensor([1, 0])
    targets = patch_targets(shares, labels, 2)
    assert torch.equal(targets, torch.tensor([[[0, .25, .75], [0, 1., 0]], [[0, 0, 1.], [.5, 0, .5]]]))
    first = patch_targets(shares, labels, 2, outside=0)
    assert torch.equal(first, torch.tensor([[[.75, .25, 0], [0, 1., 0]], [[1., 0, 0], [1., 0, 0]]]))
    assert torch.equal(targets.sum(2), torch.ones(2, 2)) and torch.equal(first.sum(2), torch.ones(2, 2))


# ---------------------------------------------------------------- patches that answer
def segmenter(seed=0):
    torch.manual_seed(seed)
    return Segmenter(3, TINY, 70)


def test_the_mean_of_the_patches_logits_is_the_images_answer_in_training_and_in_evaluation():
    model, x = segmenter().double(), pictures().double()
    targets = patch_targets(torch.rand(3, 25).double(), torch.arange(3), 3)
    out, _ = model.forward_pair(x, None, None, targets=targets)
    torch.testing.assert_close(out.logits, out.patch_logits.mean(1)[:, :3])
    torch.testing.assert_close(model(x).logits, out.logits)
    torch.testing.assert_close(model.predictor.head(model.predictor.features(x)), out.logits)
    assert len(there(model(x))) == 1                     # logits alone: scoring knows of no mask


def test_under_masks_of_ones_patches_learn_as_a_classifier_of_every_patch_does():
    model, x, labels = segmenter().double(), pictures().double(), torch.tensor([2, 0, 1])
    out, _ = model.forward_pair(x, None, None, targets=patch_targets(torch.ones(3, 25).double(), labels, 3))
    by_hand = F.cross_entropy(out.patch_logits.flatten(0, 1).float(), labels.repeat_interleave(25))
    assert ifam.loss(out, None, labels, None).item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_the_order_of_patches_changes_no_answer():
    model, x = segmenter(), pictures()
    model.predictor.backbone.pos_embed.data[:, 1:] = 0
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    patches = x.unflatten(2, (5, 14)).unflatten(4, (5, 14)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, order]
    mixed = patches.unflatten(1, (5, 5)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    torch.testing.assert_close(model(mixed).logits, model(x).logits, atol=1e-5, rtol=1e-4)


def test_every_image_counts_in_an_objective_by_what_its_patches_lose():
    model, x, labels = segmenter(), pictures(), torch.tensor([2, 0, 1])
    out, _ = model.forward_pair(x, None, None, targets=patch_targets(torch.rand(3, 25), labels, 3))
    losses = torch.stack([F.cross_entropy(out.patch_logits[i], out.targets[i]) for i in range(3)])
    weigh = torch.tensor([3.0, 0.0, 0.5])
    torch.testing.assert_close(ifam.loss(out, None, labels, None, each=weigh), (weigh * losses).mean())
    torch.testing.assert_close(objectives.group_losses(out, labels, 3 * torch.eye(3))["group 1"], losses[1].detach())


def test_a_run_of_boxes_learns_from_boxes_and_one_of_masks_from_masks():
    batch = batch_of(4)
    told = {method: train.taught(segmenter(), config("--method", method), {**batch, "mask": some_masks()}, "cpu") for method in ("seg-erm", "bbox-erm")}
    for method, change in (("seg-erm", lambda x: x), ("bbox-erm", boxes_of)):
        expected = patch_targets(patch_share(change(some_masks()), (5, 5)), batch["label"], 3)
        assert told[method].keys() == {"targets"} and torch.equal(told[method]["targets"], expected)
    assert train.taught(ERM(3, TINY, 70), config("--method", "erm"), batch, "cpu") == {}


def test_masks_that_tell_the_label_may_teach_and_then_the_first_class_is_where_they_are_not():
    tell = SimpleNamespace(name="siim", masks=[], masks_tell=True, classes=("healthy", "sick"), labels=torch.tensor([0, 1, 0]), train_masks=False)
    model = segmenter()
    train.give_truth(tell, config("--method", "seg-erm"))
    train.tell_classes(model, tell)
    assert tell.train_masks and model.outside == 0
    train.give_truth(tell, config("--supervise", "boxes"))
    for flags, words in ((("--method", "seg-erm"), "--method seg-erm needs true masks"), (("--supervise", "masks"), "--supervise masks needs true masks")):
        with pytest.raises(UsageError, match=words):
            train.give_truth(SimpleNamespace(name="a folder", masks=None), config(*flags))


# ---------------------------------------------------------------- a supervised selector
def test_the_mask_loss_is_that_of_a_classifier_of_patches_into_parts_and_background():
    logits, objects = torch.randn(2, 5, 9, dtype=torch.float64), torch.rand(2, 9, dtype=torch.float64)
    total = 0.0
    for b in range(2):
        for n in range(9):
            p = logits[b, :, n].exp() / logits[b, :, n].exp().sum()
            total -= objects[b, n] * p[:-1].sum().log() + (1 - objects[b, n]) * p[-1].log()
    assert ifam.mask_loss(logits, objects).item() == pytest.approx(total.item() / 18, rel=1e-6)
    sure = torch.zeros(1, 5, 2).index_put((torch.tensor([0, 0]), torch.tensor([1, 4]), torch.tensor([0, 1])), torch.tensor(30.0))
    assert ifam.mask_loss(sure, torch.tensor([[1.0, 0.0]])).item() < 1e-9


def step(batch, *flags):
    cfg = config(*flags)
    model = train.build_model(cfg, torch.device("cpu")).train()
    model.prior = torch.tensor([0.7, 0.3])
    terms = train.gradients(model, cfg, batch, 0)
    return terms, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def batch():
    return batch_of(4)


@pytest.fixture(scope="module")
def plain(batch):
    return step(batch)


def test_supervision_adds_its_loss_beside_the_others_and_moves_stage_1_alone(batch, plain):
    terms, grads = step(batch, "--supervise", "masks")
    assert terms.keys() - plain[0].keys() == {"mask"} and all(torch.equal(x, terms[name]) for name, x in plain[0].items() if name != "loss")
    torch.testing.assert_close(terms["loss"], plain[0]["loss"] + terms["mask"])
    for name, grad in plain[1].items():
        if name.startswith("predictor."):
            assert torch.equal(grad, grads[name]), name
    assert not torch.equal(grads["selector.prototypes"], plain[1]["selector.prototypes"])
    boxes, _ = step(batch, "--supervise", "boxes")
    assert not torch.equal(boxes["mask"], terms["mask"])


def test_a_smaller_stage_1_is_taught_on_its_own_grid(batch):
    cfg = config("--supervise", "masks", "--selector-size", 72)
    model = train.build_model(cfg, torch.device("cpu"))
    assert train.taught(model, cfg, batch, "cpu")["objects"].shape == (4, 81)
    assert train.gradients(model.train(), cfg, batch, 0)["mask"].isfinite()


def test_stage_1_alone_may_be_taught_too(batch):
    terms, grads = step(batch, "--method", "pdiscoformer", "--supervise", "masks")
    assert "mask" in terms and grads


@pytest.mark.parametrize("flags", [("--method", "seg-erm"), ("--supervise", "masks", "--no-shaping")], ids=lambda f: f[1])
def test_what_masks_taught_is_evaluated_without_one(flags, tmp_path, monkeypatch):
    folder = run(tmp_path / "run", *flags, "--limit", 16)
    seen = []
    given = evaluate.given
    monkeypatch.setattr(evaluate, "given", lambda *how: seen.append(given(*how)) or seen[-1])
    evaluate.main(["--ckpt", str(folder / "best.pt")])
    assert seen == [{}] * len(seen) and 0 <= json.loads((folder / "report.json").read_text())["stage2"]["aa"] <= 1


# ---------------------------------------------------------------- what is hidden must not suffice
def contrast(model, x, labels, **how):
    out, _ = model.forward_pair(x, x, ifam.Noise.draw(4, 25, generators=[None] * 2 * len(x)))
    out = model.complement(x, out, **how)
    return out, ifam.complement_loss(out.contrast, labels)


def test_the_contrast_is_what_stage_2_says_of_what_is_kept_and_of_what_is_hidden():
    model, x = tiny().train(), pictures()
    out, _ = contrast(model, x, torch.arange(3))
    with torch.no_grad():
        for at, keep in enumerate((out.keep, 1 - out.keep)):
            torch.testing.assert_close(out.contrast[:, at], model.predictor(x, keep.detach()), atol=1e-5, rtol=1e-4)
    assert 0 < out.keep.mean() < 1


def test_a_complement_that_is_useless_by_the_margin_costs_nothing():
    sure = torch.tensor([[9.0, 0, 0], [0, 9.0, 0]])
    useless = torch.stack([sure, torch.zeros(2, 3)], 1)                          # CE about 0 and log 3: not yet 2 apart
    labels = torch.tensor([0, 1])
    expected = F.cross_entropy(sure, labels) - torch.tensor(3.0).log() + 2
    assert ifam.complement_loss(useless, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    wrong = torch.stack([sure, sure.flip(0)], 1)
    assert ifam.complement_loss(wrong, labels) == 0
    assert ifam.complement_loss(wrong.flip(1), labels).item() == pytest.approx(11, rel=1e-3)


def test_the_gradient_of_the_complement_reaches_the_selector_and_nothing_else():
    model, x = tiny().train(), pictures()
    contrast(model, x, torch.arange(3))[1].backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"selector"}


def test_the_gradient_of_the_mask_is_that_of_both_passes_with_stage_2_held_fixed():
    model, x, labels = tiny().double().train(), pictures().double(), torch.arange(3)
    keep = (torch.rand(3, 25, generator=torch.Generator().manual_seed(1)) > 0.5).double().requires_grad_()
    out = model.complement(x, ifam.Output(None, keep=keep))
    ifam.complement_loss(out.contrast, labels).backward()
    again = keep.detach().clone().requires_grad_()
    kept, rest = (F.cross_entropy(model.predictor(x, m), labels, reduction="none") for m in (again, 1 - again))
    by_hand, = torch.autograd.grad((kept - rest + 2).clamp_min(0).mean(), again)
    torch.testing.assert_close(keep.grad, by_hand)


def test_where_everything_is_kept_the_rest_answers_with_how_frequent_the_classes_are():
    model, x, prior = tiny(), pictures(), torch.tensor([0.5, 0.3, 0.2])
    keep = torch.ones(3, 25)
    keep[1, 3] = 0
    found = model.complement(x, ifam.Output(None, keep=keep), prior).contrast[:, 1]
    for i in (0, 2):
        torch.testing.assert_close(F.cross_entropy(found[i:i + 1], torch.tensor([1])), -prior[1].log())
    assert not torch.allclose(found[1].softmax(0), prior, atol=1e-3)
    none = model.complement(x, ifam.Output(None, keep=torch.ones(3, 25))).contrast[:, 1]
    torch.testing.assert_close(none.softmax(1), torch.full((3, 3), 1 / 3))


def test_trimmed_images_are_painted_for_what_is_kept_and_whole_for_the_rest():
    model, x = tiny(trim="found").eval(), pictures()
    with torch.no_grad():
        out = model.complement(x, model(x))
        torch.testing.assert_close(out.contrast[:, 0], out.logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(out.contrast[:, 1], model.predictor(x, 1 - out.keep), atol=1e-5, rtol=1e-4)


def test_without_a_weight_a_step_is_what_it_was_bit_for_bit_and_with_one_only_stage_1_feels_it(batch, plain):
    terms, grads = step(batch, "--weight-complement", 0)
    assert all(torch.equal(x, terms[name]) for name, x in plain[0].items()) and all(torch.equal(x, grads[name]) for name, x in plain[1].items())
    for flags in ((), ("--checkpoint",), ("--micro", 2)):
        terms, grads = step(batch, "--weight-complement", 4, *flags, *(("--weight-presence", 0) if "--micro" in flags else ()))
        assert terms["complement"] >= 0 and terms.keys() >= {"complement"}
        if "--micro" not in flags:
            assert all(torch.equal(x, grads[name]) for name, x in plain[1].items() if name.startswith("predictor."))
        assert not torch.equal(grads["selector.prototypes"], plain[1]["selector.prototypes"])


@pytest.mark.parametrize("flags, words", [(("--supervise", "masks", "--weight-mask", 0), "teaches nothing"), (("--supervise", "masks", "--draft"), "as large as its picture")])
def test_teaching_that_teaches_nothing_is_refused(flags, words, tmp_path, capsys):
    assert words in fails(train.main, *FLAGS, *flags, "--out", tmp_path / "run")(capsys) and not (tmp_path / "run").exists()
