"""Inside the object: what one part says alone, and what its representation holds of the other parts."""
import pytest
import torch
from models import pictures, tiny

from baselines import ERM, PDiscoFormer
from models import TINY

KINDS = {"as published": {}, "a smaller stage 1": dict(size=84, selector_size=42), "a late mask": dict(masking="late", pooling="mean"),
         "a soft mask": dict(hardness="soft")}


# ---------------------------------------------------------------- one pass of stage 2 per part
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_per_part_is_a_pass_under_the_mask_of_that_part(kind):
    model, images = tiny(**KINDS[kind]), pictures(5, KINDS[kind].get("size", 70))
    with torch.no_grad():
        out = model(images, per_part=True)
        there = out.keep_parts.any(2)
        for k in range(4):
            alone = model(images, out.keep_parts[:, k]).logits
            torch.testing.assert_close(out.logits_parts[there[:, k], k], alone[there[:, k]])
        assert torch.equal(out.logits, model(images).logits) and model(images).logits_parts is None
    assert out.logits_parts[~there].isnan().all() and out.logits_parts[there].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_disjoint_and_their_union_is_the_mask(kind):
    model, images = tiny(**KINDS[kind]), pictures(5, KINDS[kind].get("size", 70))
    with torch.no_grad():
        out = model(images, per_part=True)
    assert torch.equal(out.keep_parts.sum(1), out.keep) and ((out.keep_parts > 0).sum(1) <= 1).all()
    assert (out.keep_parts.any(2).sum(1) > 1).any(), "nothing to tell apart"
    if model.selector.given is None:                     # one grid: the part is that of the noise-free maps
        best = out.part_logits[:, :-1].argmax(1)
        assert all(out.keep_parts[i, best[i, n], n] == out.keep[i, n] for i in range(5) for n in range(out.keep.shape[1]))


def test_no_pixel_outside_a_part_moves_a_bit_of_what_it_says():
    model, images = tiny(), pictures(4)
    with torch.no_grad():
        out = model(images, per_part=True)
        for k in range(4):
            hidden = (out.keep_parts[:, k] == 0).unflatten(1, model.grid)[:, None].repeat_interleave(14, 2).repeat_interleave(14, 3)
            painted = torch.where(hidden, torch.full_like(images, 7.0), images)
            again = model.each_part(painted, out)        # the parts held fixed
            there = out.keep_parts[:, k].any(1)
            assert torch.equal(again.logits_parts[there, k], out.logits_parts[there, k])
            assert not torch.equal(again.logits_parts.nan_to_num(), out.logits_parts.nan_to_num())


def test_a_given_mask_is_split_by_the_parts_too_and_a_part_outside_it_says_nothing():
    model, images = tiny(), pictures(3)
    with torch.no_grad():
        out = model(images)
        part = model.split(out, out.keep)[:, 1]
        again = model(images, part, per_part=True)
    assert torch.equal(again.keep_parts[:, 1], part) and again.logits_parts[:, [0, 2, 3]].isnan().all()
    torch.testing.assert_close(again.logits_parts[:, 1][part.any(1)], again.logits[part.any(1)])


def test_in_training_no_patch_belongs_to_a_part_that_was_dropped_and_gradients_reach_stage_1():
    model, images = tiny().train(), pictures(4)
    noise = model.draw_noise(4)._replace(parts2=torch.tensor([[1., 0, 1, 0]] * 4))
    out = model(images, noise=noise, per_part=True)
    assert not out.keep_parts[:, [1, 3]].any() and torch.equal(out.keep_parts.sum(1), out.keep)
    out.logits_parts[out.keep_parts.any(2)].sum().backward()
    assert model.selector.prototypes.grad.abs().max() > 0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_removed_part_says_nothing():
    model, images = tiny(), pictures(3)
    model.selector.limits = torch.tensor([float("inf"), -float("inf"), float("inf"), float("inf")])
    with torch.no_grad():
        out = model(images, per_part=True)
    assert out.logits_parts[:, 1].isnan().all() and torch.equal(out.keep_parts.sum(1), out.keep)


def test_a_model_without_a_second_stage_or_without_parts_has_no_pass_per_part():
    with pytest.raises(ValueError, match="no second stage"):
        PDiscoFormer(3, 4, TINY, 70).eval()(pictures(2), per_part=True)
    with pytest.raises(TypeError):
        ERM(3, TINY, 70)(pictures(2), per_part=True)
