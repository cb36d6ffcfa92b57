"""leakage.py: each way in which the background can reach a prediction, as a number.

    measure_leakage([stage2_classifier(model)], samples, model.selector.backbone)   # repaint, gradient, swap, ...
    place_of_mask(model, train, samples)                 # the clean contrast: only the place of the mask moves

Floor: measuring. Read ifam.py before (Predictor: where a mask acts), and README's glossary (repaint, swap, admitted).
For an early, hard mask repaint and gradient are exactly 0, whatever the image. A second run draws the same noise.
Letters: ifam.py.
"""
import math
from collections import deque
from functools import partial
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from baselines import FoundMask, RandomMask, TrueMask
from benchmarks.samples import patch_keep
from ifam import Predictor, discretize, masked_mean, paint, pixels
from measure.metrics import accuracies, over
from measure.probes import FEW, linear_head, linear_probe
from measure.shape import shape_probes
from settings import progress


# ---------------------------------------------------------------- a classifier under test
class Classifier(NamedTuple):
    """A classifier under test: how it finds its mask, and what it makes of an image while that mask is held fixed."""
    find: Callable       # images, true masks (B, 1, S, S) -> (keep (B, N) in {0, 1}, what to hold fixed)
    features: Callable   # images, what is held fixed -> (B, D), the final representation
    head: Callable       # features -> logits (B, C)
    mask: str            # where its mask comes from, for the report

    def __call__(self, images, truth=None):
        """-> logits (B, C), under the mask that it finds for these images."""
        return self.head(self.features(images, self.find(images, truth)[1]))


class Trimmed(NamedTuple):
    """What is held fixed of a mask that is finer than patches: inside kept ones, only some pixels are shown."""
    keep: torch.Tensor   # (B, N)
    shown: torch.Tensor  # (B, 1, S, S) in {0, 1}

    def __getitem__(self, images):
        return Trimmed(*(x[images] for x in tuple(self)))


class Seen:
    """What a selector makes of images, remembered for the last two batches, which are compared by value.

    Both stages are measured on the same images and on the same swapped ones, and stage 1 is most of the cost.
    """

    def __init__(self, selector):
        self.selector, self.last = selector, deque(maxlen=2)

    def known(self, images):
        """The Selection of these images if it was asked for lately and has no gradient to give; else None."""
        same = lambda known: not images.requires_grad and torch.equal(known, images)
        return next((first for known, first in self.last if same(known)), None)

    def __call__(self, images):
        first = self.known(images)
        if first is None:
            first = self.selector(images)
            self.last.append((images, first))
        return first


def stage2_classifier(model, seen=None):
    """Stage 2 with its mask held fixed. A model without a mask (erm) is measured under the true one.

    seen: a Seen of the model's selector, shared with the other stage.
    """
    features, head = model.predictor.features, model.predictor.head
    true_keep = lambda truth: None if truth is None else told_keep(model, truth[:, 0])
    if model.trim != "none":
        return trimmed_classifier(model, true_keep, seen or Seen(model.selector))
    if model.needs_truth:
        return Classifier(lambda images, truth: (true_keep(truth),) * 2, features, head, "truth")
    if isinstance(model, FoundMask):
        return Classifier(lambda images, truth: (model.find(images),) * 2, features, head, "found")
    if model.selector is None:
        return Classifier(lambda images, truth: (true_keep(truth), None), lambda images, held: features(images), head,
                          "truth, the model has none")
    seen = seen or Seen(model.selector)

    def find(images, truth):                             # a soft mask hides what a hard one would drop
        first = seen(images)
        return model.mask(first), model.mask(first, hard=model.predictor.hardness == "hard")
    return Classifier(find, features, head, "found")


def trimmed_classifier(model, true_keep, seen):
    """Stage 2 of a model that is shown some pixels of its patches: mask and pixels are held fixed."""
    def find(images, truth):
        keep = true_keep(truth) if model.selector is None else model.mask(seen(images))
        shown = truth.float() if model.trim == "truth" else model.shown_pixels(seen(images), images.shape[2:])
        return keep, Trimmed(keep, shown)
    features = lambda images, held: model.predictor.features(paint(images, held.shown), held.keep)
    return Classifier(find, features, model.predictor.head, "truth" if model.selector is None else "found")


def stage1_classifier(model, seen=None):
    """The late mask: stage 1 with its part maps held fixed, its features recomputed from the whole image."""
    seen = seen or Seen(model.selector)

    def find(images, truth):
        first = seen(images)
        return model.mask(first), first.maps

    def features(images, maps):
        first = seen.known(images)
        if first is None or first.maps is not maps:
            first = model.selector(images, maps=maps)
        parts = first.part_features[:, :-1]
        if model.selector.classifier.in_features > parts.shape[2]:
            return parts.flatten(1)                      # a retrained head reads them side by side
        return parts.mean(1)                             # logits are linear in part features, so means agree
    return Classifier(find, features, model.selector.classifier, "found")


def classifier_of(model):
    """The stage that counts: the second, where there is one."""
    return stage2_classifier(model) if model.predictor else stage1_classifier(model)


def told_keep(model, masks):
    """Masks (B, S, S) as the patches (B, N) that a model is told: by its own rule, or by half of a patch."""
    return patch_keep(masks, model.predictor.backbone.patch, getattr(model, "mask_rule", "half"))


def given(model, batch, device):
    """What a model is told about where the object is in a batch's images -> arguments of its forward, {} for most.

    "keep" (B, N), the true mask as patches, or a random one, for methods that find none, or in training the mask that
    was found in the clean picture; "shown" (B, 1, S, S), the true mask itself, for --trim truth.
    """
    told = {}
    if isinstance(model, RandomMask):
        told["keep"] = model.of(batch["id"], math.prod(model.predictor.backbone.grid)).to(device)
    if isinstance(model, TrueMask):
        told["keep"] = told_keep(model, batch["mask"].to(device))
    if isinstance(model, FoundMask) and "found" in batch:
        told["keep"] = told_keep(model, batch["found"].to(device))
    if model.trim == "truth":
        told["shown"] = batch["mask"].to(device)[:, None].float()
    return told


def shown_under(keep, shown, backbone):
    """The pixels that stage 2 sees: of kept patches (B, N) those that are shown (B, 1, S, S), or all (None)."""
    kept = pixels(keep, backbone.grid, backbone.patch)
    return kept if shown is None else kept * shown


def shown_by(keep, held, backbone):
    """The same of what Classifier.find gives: the mask, and what is held fixed."""
    return shown_under(keep, held.shown if isinstance(held, Trimmed) else None, backbone)


def repaint(classifier, images, held, hidden, logits, generator):
    """Replace masked-out pixels with noise, another image, grey -> largest logit change (B,), share of flips (B,)."""
    noise = torch.randn(images.shape, generator=generator).to(images)
    changes, flips = [], []
    for other in (noise, images.roll(1, 0), torch.zeros_like(images)):
        again = classifier.head(classifier.features(torch.where(hidden, other, images), held))
        changes.append((again - logits).abs().amax(1))
        flips.append((again.argmax(1) != logits.argmax(1)).float())
    return torch.stack(changes).amax(0), torch.stack(flips).mean(0)


def hidden_gradient(classifier, images, held, hidden):
    """Largest |d logit / d pixel| over all logits and masked-out pixels. -> (B,)

    Of more logits than features, gradients are mixtures of those of the features, where the head is affine.
    """
    images = images.detach().requires_grad_()
    values, mixture = classifier.features(images, held), None
    logits = classifier.head(values)
    if logits.shape[1] > values.shape[1] and getattr(classifier.head, "affine", True):
        axes = torch.eye(values.shape[1]).to(values)
        mixture = (classifier.head(axes) - classifier.head(0 * axes)).detach().T
    largest = largest_gradient(logits if mixture is None else values, images, mixture)
    return (largest * hidden[:, 0]).flatten(1).amax(1)


def pixel_gradient(outputs, images):
    """Where do outputs look? Largest |d output / d pixel| over outputs and colours: (B, 3, S, S) -> (B, S, S).

    outputs: a function of the images -> (B, n), each row of its own image alone.
    """
    images = images.detach().requires_grad_()
    return largest_gradient(outputs(images), images)


def largest_gradient(values, images, mixture=None, chunk=32):
    """pixel_gradient of values (B, n) that were computed from the images; mixture (m, n): of m sums of them instead."""
    blocks = (torch.autograd.grad(column.sum(), images, retain_graph=True)[0][None] for column in values.unbind(1))
    if mixture is not None:
        each = torch.cat(list(blocks))                   # (n, B, 3, S, S)
        blocks = (torch.tensordot(weights, each, 1) for weights in mixture.split(chunk))
    largest = torch.zeros_like(images[:, 0])
    for block in blocks:
        largest = largest.maximum(block.abs().amax((0, 2)))
    return largest


DONORS = 7                 # so many images lend one a background, at most


def swap_backgrounds(images, objects, donors=None):
    """Give images (B, 3, S, S) the background of others. objects (B, 1, S, S) in {0, 1}.

    A pixel outside the object comes from the first of its donors that shows background there, and stays as it is where
    none does. donors (B, n): who lends to each image, the first first; by default up to DONORS other images of the
    batch. An image that is its own donor stays as it is.
    """
    if donors is None:
        B = len(images)
        donors = (torch.arange(B)[:, None] - torch.arange(1, min(B, DONORS + 1))) % B
    swapped, todo = images.clone(), objects == 0
    for donor in donors.to(images.device).unbind(1):
        give = todo & (objects[donor] == 0)
        swapped = torch.where(give, images[donor], swapped)
        todo = todo & ~give
    return swapped


def admitted(shown, objects):
    """Share of the pixels in kept patches that are background: (B, 1, S, S) in {0, 1}, twice -> (B,), NaN for none."""
    return (shown * (1 - objects)).sum((1, 2, 3)) / shown.sum((1, 2, 3))


def mask_iou(a, b):
    """IoU of binary masks (B, N), 1 where both are empty. -> (B,)"""
    both, either = (a * b).sum(1), ((a + b) > 0).sum(1)
    return torch.where(either > 0, both / either.clamp_min(1), torch.ones_like(both))


LEAKAGE_GROUP = 16         # images that lend each other backgrounds: fixed, so that --batch changes no number
GRADIENT_BATCH = 4         # images whose graph is in memory at once: about a gigabyte each, of ViT-B at 518 px
GRADIENTS = 1000           # backward passes of images, at most: many classes mean fewer images


def measure_leakage(classifiers, samples, backbone, device="cpu", count=0):
    """Five ways for the background to reach a prediction -> for each classifier a dict for report.json.

    None instead of a dict where there are no annotations and no mask.

    repaint and gradient hold the mask fixed: for an early, hard mask they are exactly 0. swap, admitted and probe show
    what that does not cover: the selector's own eyes, patches at the border, and the shape of the mask. Each is
    measured per image and averaged; max_* is the largest over images. count: how many images, spread evenly (0: all).
    """
    indices = torch.linspace(0, len(samples) - 1, min(count or len(samples), len(samples))).round().long()
    indices = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]     # mixed groups
    groups = [g.tolist() for g in indices.tensor_split(math.ceil(len(indices) / LEAKAGE_GROUP))]
    rows, budget = [{} for _ in classifiers], max(1, GRADIENTS // min(samples.outputs, backbone.width))
    loader = torch.utils.data.DataLoader(samples, batch_sampler=groups)
    for number, part in enumerate(progress(loader, "leakage")):
        images, truth = part["image"].to(device), part["mask"].to(device) if "mask" in part else None
        for classifier, mine in zip(classifiers, rows):
            found = leakage_of_group(classifier, images, truth, backbone, number, budget - number * LEAKAGE_GROUP)
            for name, x in found.items():
                mine.setdefault(name, []).append(x.cpu())
    shapes = []
    return [summary(*each, samples, indices, backbone.grid, shapes) for each in zip(classifiers, rows)]


def summary(classifier, rows, samples, indices, grid, shapes):
    """{name: what leakage_of_group measured, group by group} of the images at these indices -> report, or None.

    shapes: [(keep, what it tells)], filled here: two stages with the same masks are probed once.
    """
    if not rows:
        return None                                      # no mask of its own and no true one: nothing to hold fixed
    row = {name: torch.cat(x).double() for name, x in rows.items()}
    mean = lambda name: row[name].mean().item() if name in row and len(row[name]) else None
    probe = None
    place = samples.groups[indices] % max(1, len(samples.places))
    if len(place.unique()) > 1:
        shape = next((known for keep, known in shapes if torch.equal(keep, row["keep"])), None)
        if shape is None:
            shape = shape_probes(row["keep"], place, grid, row.get("true"))
            shapes.append((row["keep"], shape))
        probe = {"representation": linear_probe(row["features"], place),
                 "mask": linear_probe(row["finer"], place) if "finer" in row else shape["mask"],
                 "chance": torch.bincount(place).max().item() / len(place), "shape": shape}
    return {"images": len(indices), "mask": classifier.mask,
            "repaint": {"max_logit_change": row["change"].max().item(), "mean_logit_change": mean("change"),
                        "flip_rate": mean("flip")},
            "gradient": {"max_abs": row["gradient"].max().item(), "mean_max_abs": mean("gradient"),
                         "images": len(row["gradient"])},
            "swap": {"flip_rate": mean("swap"), "mask_iou": mean("iou") if classifier.mask == "found" else None},
            "admitted": mean("admitted"), "probe": probe}


def leakage_of_group(classifier, images, truth, backbone, number, gradients):
    """Per image: what measure_leakage averages. truth: true masks (B, S, S) or None; number seeds the noise.

    gradients: how many of these images the gradient is taken of, at most.
    """
    with torch.no_grad():
        truth = None if truth is None else truth[:, None].float()
        keep, held = classifier.find(images, truth)
        if keep is None:
            return {}
        shown = shown_by(keep, held, backbone)
        features = classifier.features(images, held)
        row = {"features": features, "keep": keep}
        if isinstance(held, Trimmed):                    # a ragged border is a shape, too
            row["finer"] = F.avg_pool2d(shown, backbone.patch // 2).flatten(1)
        noise = torch.Generator().manual_seed(number)
        logits = classifier.head(features)
        row["change"], row["flip"] = repaint(classifier, images, held, shown == 0, logits, noise)
        objects = shown if truth is None else truth
        if len(images) > 1:                              # a single image has nobody to swap with
            swapped = swap_backgrounds(images, objects)
            keep2, held2 = classifier.find(swapped, truth)
            guess = classifier.head(classifier.features(swapped, held2)).argmax(1)
            row["swap"], row["iou"] = (guess != logits.argmax(1)).float(), mask_iou(keep, keep2)
        if truth is not None:
            row["admitted"] = admitted(shown, objects)[shown.any((1, 2, 3))]
            row["true"] = patch_keep(truth[:, 0], backbone.patch)                # what its shape tells, to compare
    if gradients > 0:
        count = min(gradients, len(images))
        some = [slice(i, min(i + GRADIENT_BATCH, count)) for i in range(0, count, GRADIENT_BATCH)]
        row["gradient"] = torch.cat([hidden_gradient(classifier, images[s], held if held is None else held[s],
                                                     shown[s] == 0) for s in some])
    return row


# ---------------------------------------------------------------- the clean contrast
RUNGS = {"none": (None, "hard"), "late, soft": ("late", "soft"), "late, hard": ("late", "hard"),
         "early, soft": ("early", "soft"), "early, hard": ("early", "hard")}


def without_heads(selector):
    """The rungs of the ladder before a head is fitted -> {name: (find, features)}, as a Classifier has them."""
    seen = Seen(selector)

    def find(name, images, truth=None):
        part_logits, (masking, hardness) = seen(images).part_logits, RUNGS[name]
        return discretize(part_logits), discretize(part_logits, hard=hardness == "hard") if masking else None
    return {name: (partial(find, name), Predictor(selector.backbone, 1, masking or "late", hardness, "mean").features)
            for name, (masking, hardness) in RUNGS.items()}


@torch.no_grad()
def ladder_features(selector, samples, batch=32):
    """The features of a split on each rung of the ladder -> {name: (n, D)}."""
    rungs = without_heads(selector)

    def measure(part):
        images = part["image"]
        return {name: features(images, find(images)[1]) for name, (find, features) in rungs.items()}
    return over(samples, measure, batch)


@torch.no_grad()
def ladder(selector, train, known=None):
    """The rungs of the ladder of masks -> {name: Classifier}. Only the place and the hardness of the mask vary.

    The weights are those of stage 1, which never trained under a mask, the masks are those that it finds, the
    features are the mean of the patches, and the head is linear_head, fitted on the split `train`. "none" has no mask;
    what the others hide is what is repainted there too. known: ladder_features of `train`, if they are at hand.
    """
    known = ladder_features(selector, train) if known is None else known
    return {name: Classifier(find, features, linear_head(known[name], train.labels, len(train.classes)), "found")
            for name, (find, features) in without_heads(selector).items()}


@torch.no_grad()
def kept_by_layer(selector, samples, early, batch=32):
    """Mean of the patches that stage 1 keeps, before the first block and after each -> (layers, n, D).

    early: the mask acts in every block; else on this mean alone. The weights are those of stage 1.
    """
    vit = selector.backbone

    def measure(part):
        keep = discretize(selector(part["image"]).part_logits)
        layers = vit.layers(part["image"], keep if early else None)
        return {"means": torch.stack([masked_mean(x[:, vit.prefix:], keep) for x in layers], 1)}
    return over(samples, measure, batch)["means"].transpose(0, 1).contiguous()


@torch.no_grad()
def pool_by_place(backbone, samples, device="cpu", batch=32, workers=0, shrink=lambda images: images):
    """Mean patch feature of each image, {"none", "late", "early"}: (n, D), by where the true mask acts.

    none: nowhere. late: on the pooling alone, after full attention. early: on attention and pooling. shrink: what makes
    images and masks as large as the backbone sees them.
    """
    measure = lambda part: pools_of(backbone, part["image"].to(device), part["mask"].to(device), shrink)
    return over(samples, measure, batch, workers)


def pools_of(backbone, images, masks, shrink=lambda images: images, whole=None):
    """pool_by_place of one batch: images (B, 3, S, S), masks (B, S, S). whole (B, N, D): patch features, if known."""
    images, masks = (shrink(x) for x in (images, masks[:, None].float()))
    keep = patch_keep(masks[:, 0], backbone.patch)
    whole, masked = (backbone(images, k)[:, backbone.prefix:] if x is None else x for k, x in ((None, whole),
                                                                                               (keep, None)))
    return {"none": masked_mean(whole, torch.ones_like(keep)).cpu(), "late": masked_mean(whole, keep).cpu(),
            "early": masked_mean(masked, keep).cpu()}


def has_place(train, samples):
    """Can place_of_mask be measured: are there true masks of the object, and images to fit on?"""
    return not (train.masks is None or samples.masks is None or samples.masks_tell or len(train) < FEW)


def place_of_mask(model, train, samples, device="cpu", batch=32, workers=0, known=None):
    """What the place of the mask does, all else equal -> dict for report.json, None without true masks of the object.

    Frozen weights, true masks, the mean of the patches, a linear head in closed form fitted on the training split; only
    the place of the mask moves. Worst-group accuracy where the benchmark has places, else accuracy. The weights
    are those that never trained under a mask: stage 1's where there is one. known: pool_by_place of train and of
    samples, if they are at hand.
    """
    if not has_place(train, samples):
        return None
    how = (device, batch, workers, *([model.selector.shrink] if model.selector else []))
    fit, test = known or (pool_by_place((model.selector or model.predictor).backbone, s, *how)
                          for s in (train, samples))
    measure = "worst_group" if samples.places else "aa"
    out = {"measure": measure, "weights": "stage 1" if model.selector else "stage 2"}
    for place in fit:
        scores = linear_head(fit[place], train.labels, len(samples.classes))(test[place])
        out[place] = accuracies({"logits": scores}, samples)[measure]
    return out
