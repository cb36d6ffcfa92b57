"""augment.py: training images that a mask has changed: other backgrounds, and what a model looks at most hidden.

Also the masks that it takes, found in all training images before the first step.

    swap = Swap(cfg)                                     # --swap 0.5 --swap-mask own
    batch = swap(model, batch, generators)               # half of the images stand before another class's background
    most_attributed(attribution(model, images))          # (B, N): the patches that MaskTune hides

Floor: commands, below train.py, which calls it. Read ifam.py and measure/leakage.py (swap_backgrounds, which also
measures) before. Letters: ifam.py.
"""
import copy
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from baselines import background_seed, train_found_head
from benchmarks.samples import Plan, patch_share
from ifam import constant, paint, pixels
from measure.leakage import DONORS, swap_backgrounds
from runs import load_model
from settings import UsageError, leave_signals, progress, write_whole
from weights import read_file


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
    finds in the whole pictures (find_masks), both augmented with their image; or the hard mask that the model
    finds for these images now, without noise and without a gradient. An image in which no object is found stays as it
    is, and lends nothing. Images are swapped after augmentation and before the warp of equivariance, so that both views
    show one scene.
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
        donors, objects = draw_donors(batch["label"], self.share, generators), self.objects(model, images, batch)
        nothing = (objects == 0).all((1, 2, 3), keepdim=True)
        objects = objects.masked_fill(nothing, 1)        # else an image would become another one, and keep its label
        return {**batch, "image": swap_backgrounds(images, objects, donors)}


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


# ---------------------------------------------------------------- masks of all training images, before the first step
FOUND_STEPS, FOUND_BATCH = 500, 50                       # of FOUND's head, as published
ROOM = 1 << 28                                           # bytes: keys of all pictures that take less are computed once


def teach_finder(model, samples, cfg, rank, world, device):
    """Train FOUND's head of a model on whole training pictures; rank 0 does, and the others get it from there."""
    if rank == 0:
        few = 4 * len(samples) * math.prod(model.finder.grid) * model.finder.width <= ROOM
        plan = Plan(len(samples), min(FOUND_BATCH, len(samples)), 0, FOUND_STEPS, cfg.seed)
        batches = [[i for _, i in batch] for batch in plan]
        order = in_batches(samples, FOUND_BATCH) if few else batches
        parts = loaded(samples.whole(), order, cfg, "FOUND's head")
        seen = (model.look(part["image"].to(device)) for part in parts)
        if few:
            keys, keep = map(torch.cat, zip(*seen))
            seen = ((keys[batch], keep[batch]) for batch in batches)
        train_found_head(model.finder_head, seen)
    for p in model.finder_head.parameters() if world > 1 else ():
        dist.broadcast(p.data, 0)


def find_masks(model, samples, cfg, rank, world, device):
    """Training samples come with the masks that a model finds in the whole pictures -> the share of patches they keep.

    model: what has a finder and find, a FoundMask or a Finder.
    Each process looks at a share of the batches, which are the same however many share them. The masks are a function
    of the weights and the pictures: --resume finds the same ones.
    """
    batches = in_batches(samples, cfg.micro or 16)
    parts = loaded(samples.whole(), batches[rank::world], cfg, "masks of training")
    found = [bits_of(model.find(part["image"].to(device))) for part in parts]
    samples.found = torch.cat(in_order(found, len(batches), world))
    samples.found_grid = model.finder.grid
    patches = math.prod(samples.found_grid)
    return np.unpackbits(samples.found.numpy(), axis=1, count=patches).mean().item()


def bits_of(masks):
    """masks (B, N) -> (B, bytes) uint8, a bit for each."""
    return torch.from_numpy(np.packbits(masks.bool().cpu().numpy(), axis=1))


def in_order(found, count, world):
    """What each process found for batches rank, rank + world, ... -> what was found for all of them, in order."""
    pieces = [found]
    if world > 1:
        pieces = [None] * world
        dist.all_gather_object(pieces, found)
    return [pieces[n % world][n // world] for n in range(count)]


def find_hidden(model, samples, cfg, rank, world, device):
    """What MaskTune hides of each training image, in its evaluation view -> (bits (n, bytes), what the log says of it).

    hidden: share of the patches. in_object: share of the hidden area that is true object, where there are masks;
    of_object: share of the object that is hidden.
    """
    grid, found = model.predictor.backbone.grid, []
    batches = in_batches(samples, cfg.micro or 16)
    for part in loaded(samples, batches[rank::world], cfg, "what to hide"):
        hidden = most_attributed(attribution(model, part["image"].to(device))).cpu()
        object_ = patch_share(part["mask"], grid) if "mask" in part else torch.full(hidden.shape, math.nan)
        sums = torch.stack([hidden.sum(), (hidden * object_).sum(), object_.sum(), torch.tensor(hidden.numel())])
        found.append((bits_of(hidden), sums.double()))
    bits, sums = zip(*in_order(found, len(batches), world))
    hidden, inside, objects, patches = sum(sums).tolist()
    said = {"hidden": hidden / patches}
    if samples.masks is not None:
        said |= {"in_object": inside / hidden if hidden else None, "of_object": inside / objects if objects else None}
    return torch.cat(bits), said


def hide(cfg, samples, log, start, rank, world, device):
    """Training images get what MaskTune hides of them: made once by best.pt of the run that it goes on from, and kept.

    hidden.pt in the folder has it, for --resume.
    """
    path = Path(cfg.out) / "hidden.pt"
    if cfg.resume and path.is_file():
        kept = read_file(path, "hidden.pt of a run with --masktune")
        if not isinstance(kept, dict) or not {"hidden", "grid"} <= kept.keys() or len(kept["hidden"]) != len(samples):
            raise UsageError(f"{path} is not what train.py wrote for these images: start again")
    else:
        model, _ = load_model(Path(cfg.masktune) / "best.pt", device)
        hidden, said = find_hidden(model, samples, cfg, rank, world, device)
        kept = {"hidden": hidden, "grid": list(model.predictor.backbone.grid)}
        if rank == 0:
            write_whole(path, lambda temporary: torch.save(kept, temporary))
        inside = said.get("in_object")
        log({"step": start, "masktune": said}, f"{said['hidden']:.1%} of the patches are hidden"
            + (f", {inside:.0%} of them inside the true object" if inside is not None else ""))
    samples.hidden, samples.hidden_grid = kept["hidden"], tuple(kept["grid"])


def in_batches(samples, size):
    """Indices of all samples in order, in lists of `size`."""
    return [batch.tolist() for batch in torch.arange(len(samples)).split(size)]


def loaded(samples, batches, cfg, title):
    """Evaluation views of samples, by these lists of indices, with a bar."""
    return progress(torch.utils.data.DataLoader(samples, batch_sampler=batches, num_workers=cfg.workers,
                                                worker_init_fn=leave_signals), title)
