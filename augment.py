"""augment.py: training images that a mask has changed: other backgrounds, and what a model looks at most hidden.

    swap = Swap(cfg)                                     # --swap 0.5 --swap-mask own
    batch = swap(model, batch, generators)               # half of the images stand before another class's background
    most_attributed(attribution(model, images))          # (B, N): the patches that MaskTune hides

Floor: commands, below train.py, which calls it. Read ifam.py and measure/leakage.py (swap_backgrounds, which also
measures) before. Letters: ifam.py.
"""
import copy

import torch

from baselines import background_seed
from ifam import constant, paint, pixels
from measure.leakage import DONORS, swap_backgrounds


# ---------------------------------------------------------------- other backgrounds
def draw_donors(labels, share, generators):
    """Who lends whom a background: labels (B,), a generator for each image -> donors (B, DONORS), in order.

    An image takes part with the probability `share`. Its donors are drawn from the images of other classes; an image
    that takes no part, or has fewer donors, lends to itself.
    """
    donors = torch.arange(len(labels))[:, None].repeat(1, DONORS)
    for i, g in enumerate(generators):
        swaps = torch.rand((), generator=g) < share
        order = torch.randperm(len(labels), generator=g)
        others = order[labels[order] != labels[i]][:DONORS]
        if swaps:
            donors[i, :len(others)] = others
    return donors


class Finder:
    """FOUND's seed step, on a copy of a model's backbone as it is now: before training, for --swap-mask found."""

    def __init__(self, model):
        self.finder = copy.deepcopy((model.predictor or model.selector).backbone).requires_grad_(False)

    @torch.no_grad()
    def find(self, images):
        """images (B, 3, S, S) -> keep (B, N)."""
        return background_seed(*self.finder.last_attention(images))[0]


class Swap:
    """`--swap`: in training, some images get the background of images of another class, and keep their label.

    x' = m x_i + (1 - m) x_j with a mask m in {0, 1}, as in BG Aug (Li et al., CVPR 2023), with the arithmetic of the
    measurement `swap`: a pixel that shows an object in x_j comes from the next donor. m is the true mask, or what FOUND
    finds in the whole pictures (train.find_masks), both augmented with their image; or the hard mask that the model
    finds for these images now, without noise and without a gradient. Images are swapped after augmentation and before
    the warp of equivariance, so that both views show one scene.
    """

    def __init__(self, cfg):
        self.share, self.source, self.most = cfg.swap, cfg.swap_mask, cfg.micro

    @torch.no_grad()
    def objects(self, model, images, batch):
        """What stays of images (B, 3, S, S) -> (B, 1, S, S) in {0, 1}."""
        if self.source != "own":
            return batch["mask" if self.source == "true" else "found"].to(images.device)[:, None].float()
        keep = torch.cat([model.mask(model.selector(some)) for some in images.split(self.most or len(images))])
        backbone = (model.predictor or model.selector).backbone
        return pixels(keep, backbone.grid, backbone.patch)

    def __call__(self, model, batch, generators, device="cpu"):
        """A process's share of a batch -> the same with other images, on the device."""
        images = batch["image"].to(device, non_blocking=True)
        donors = draw_donors(batch["label"], self.share, generators)
        return {**batch, "image": swap_backgrounds(images, self.objects(model, images, batch), donors)}


# ---------------------------------------------------------------- what a model looks at most, hidden
def attribution(model, images):
    """How much each patch speaks for the model's answer: images (B, 3, S, S) -> (B, N), 0 or more; 0 if it is hidden.

    <gradient of the predicted logit, token> of each patch, clipped at 0, on the last tokens that the answer reads: with
    the class token what the last block's attention reads, after its LayerNorm; with a mean of patches the final tokens.
    On a ViT this is what XGradCAM is in the last convolutions. Before a LayerNorm it would be 0 for every patch, whose
    length the LayerNorm takes away. No label enters.
    """
    with torch.no_grad():
        out = model(images)
    stage, held = constant(model.predictor).eval(), []
    stage.backbone.packed = stage.backbone.checkpoint = False

    def hold(norm, inputs, tokens):
        held.append(tokens.detach().requires_grad_())
        return held[0]
    last = stage.backbone.blocks[-1].norm1 if stage.pooling == "cls" else stage.backbone.norm
    last.register_forward_hook(hold)
    with torch.enable_grad():
        answer = stage(paint(images, out.shown), out.keep).amax(1)
        gradient, = torch.autograd.grad(answer.sum(), held)
    heat = (gradient * held[0].detach()).sum(2)[:, stage.backbone.prefix:].clamp_min(0)
    return heat if out.keep is None else heat * out.keep


def most_attributed(heat):
    """heat (B, N) -> the patches above the mean + 2 deviations of the positive ones (B, N), True. MaskTune's rule."""
    heat = heat.double()
    positive = (heat > 0).double()
    count = positive.sum(1, keepdim=True).clamp_min(1)
    mean = (heat * positive).sum(1, keepdim=True) / count
    deviation = ((heat - mean).square() * positive).sum(1, keepdim=True).div(count).sqrt()
    return heat * positive > mean + 2 * deviation
