"""metrics.py: the numbers of the tables.

    accuracies(predict(model, samples), samples)         # average, worst group, each group, with 95 % intervals
    auroc(scores, labels)                                # area under the ROC curve, exact
    foreground_ious(foreground_counts(maps, masks))      # the parts, taken together, against the true mask
    keypoint_error(landmarks(selector, train), landmarks(selector, test))    # do the parts say where the bird's are?
    nmi(a, b), ari(a, b)                                 # agreement of two clusterings

Floor: measuring. Read ifam.py before (what maps and parts are) and benchmarks/samples.py (what a group is).
Protocols: PDiscoFormer's and iFAM's, the keypoints after SCOPS (Hung et al., 2019), without their randomness: centre
crops, no Gumbel noise. All are fractions; the tables of the papers multiply them by 100. Sums are taken in float64.
Letters: n images, K parts, P landmarks, others as in ifam.py.
"""
import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.transforms import UNIT
from settings import UsageError, progress


def over(samples, measure, batch=32, workers=0):
    """What `measure` makes of each batch of a split, {name: rows or None} -> {name: rows of the whole split}."""
    loader = torch.utils.data.DataLoader(samples, batch, num_workers=workers)
    found = [measure(part) for part in progress(loader, f"{samples.name} {samples.split}")]
    return {name: None if x is None else torch.cat([one[name] for one in found]) for name, x in found[0].items()}


# ---------------------------------------------------------------- classification
def auroc(scores, labels):
    """Area under the ROC curve of scores (n,) for labels (n,) in {0, 1}: exact, no thresholds, no bins.

    It is the share of pairs (a 1, a 0) in which the 1 scores higher; a tie counts half (Mann and Whitney, 1947).
    UsageError when a class is missing; ValueError for another label or a score that is NaN.
    """
    scores, positive = scores.double(), labels == 1
    if scores.isnan().any() or not (positive | (labels == 0)).all():
        raise ValueError("a score is NaN, or a label is neither 0 nor 1")
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if not ones or not zeros:
        raise UsageError(f"the area under the ROC curve needs images of both classes: {zeros} are of class 0, {ones} "
                         "of class 1; take a larger --limit or another --split")
    _, place, count = scores.unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2.0)[place]              # from 1; ties share their mean rank
    return (rank[positive].double().sum().item() - ones * (ones + 1) / 2) / (ones * zeros)


def wilson(share, n, z=1.96):
    """95 % interval of a share of n (Wilson, 1927): it stays in [0, 1] and has a width at 0 and 1 too."""
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((share + z * z / (2 * n) + end) / (1 + z * z / n) for end in (-half, half))
    return max(0.0, low), min(1.0, high)                 # rounding may take an end past 0 or 1


def share_of(right):
    """right (n,), 1 for a right answer -> {"n", "accuracy", "low", "high"}: with its interval; None where n is 0."""
    share = right.mean().item() if len(right) else None
    low, high = (None, None) if share is None else wilson(share, len(right))
    return {"n": len(right), "accuracy": share, "low": low, "high": high}


def accuracies(result, samples, key="logits", rare=(), train_groups=None):
    """Accuracy as the tables give it: {"aa", "worst_group", "groups": {name: what share_of says}, ...}.

    aa: share of images that are right. aa_train_weighted: group accuracies weighted by their share in training,
    which is the "average" of many Waterbirds papers. worst_group: least over all groups; worst_group_rare: over
    `rare` only, the paper's definition; worst_class: over classes. Groups without images have accuracy None and count
    nowhere. auroc: times 100, of the softmax probability of class 1, where there are two classes. aa_interval,
    worst_group_interval, worst_group_rare_interval: [low, high] over images, Wilson's; of several worst groups that of
    the smallest.
    """
    right = (samples.answers(result[key]) == samples.labels).double()
    groups = [share_of(right[samples.groups == g]) for g in range(len(samples.group_names))]
    least = lambda some: min((x for x in some if x["n"]), key=lambda x: (x["accuracy"], x["n"]), default=share_of(()))
    named = lambda name, x: {name: x["accuracy"], f"{name}_interval": [x["low"], x["high"]]}
    out = named("aa", share_of(right)) | named("worst_group", least(groups))
    classes = [share_of(right[samples.labels == c]) for c in range(len(samples.classes))] if samples.places else groups
    out["worst_class"] = least(classes)["accuracy"]
    if train_groups is not None:
        counts = torch.bincount(train_groups, minlength=len(groups)).tolist()
        seen = [(n, x["accuracy"]) for n, x in zip(counts, groups) if n and x["n"]]
        out["aa_train_weighted"] = sum(n * share for n, share in seen) / sum(n for n, _ in seen) if seen else None
    if rare:
        out |= named("worst_group_rare", least(groups[g] for g in rare))
    if result[key].shape[1] == 2:
        both = len(samples.labels.unique()) == 2         # a few images may all be of one class
        out["auroc"] = 100 * auroc(result[key].double().softmax(1)[:, 1], samples.labels) if both else None
    return out | {"groups": dict(zip(samples.group_names, groups))}


# ---------------------------------------------------------------- foreground
def foreground_counts(maps, masks):
    """Pixels that are foreground (in both, as found only, in truth only, in neither) -> (B, 4).

    maps (B, K+1, h, w), masks (B, S, S). As in PDiscoFormer's foreground IoU: maps upsampled
    bilinearly (align_corners), arg-max over parts, not background.
    """
    maps = F.interpolate(maps.float(), masks.shape[1:], mode="bilinear", align_corners=True)
    return pixel_counts(maps.argmax(1) < maps.shape[1] - 1, masks.bool())


def pixel_counts(found, true):
    """Pixels of two masks (B, S, S), bool, that are (in both, in the first only, in the second only, in neither)."""
    cells = (found & true, found & ~true, ~found & true, ~found & ~true)
    return torch.stack([c.flatten(1).sum(1) for c in cells], 1)


def foreground_ious(counts):
    """Rows of foreground_counts (n, 4) -> the three IoUs of the report.

    foreground_iou, background_iou: over all pixels of all images, as published ("Fg mIoU"), so large birds weigh more.
    foreground_iou_mean: of each image, then averaged; 1 for an image where nothing is foreground and none was found.
    """
    counts = counts.double()
    both, found, true, neither = counts.sum(0).tolist()
    union = counts[:, :3].sum(1)
    each = torch.where(union > 0, counts[:, 0] / union.clamp_min(1), 1.0)
    return {"foreground_iou": both / max(1, both + found + true), "foreground_iou_mean": each.mean().item(),
            "background_iou": neither / max(1, neither + found + true)}


# ---------------------------------------------------------------- keypoints
class Landmarks(NamedTuple):
    """What the keypoint metrics need of a split; pixels of the S x S image."""
    points: torch.Tensor         # (n, P, 3)  x, y, visible
    boxes: torch.Tensor | None   # (n, 4)     x, y, width, height
    centroids: torch.Tensor      # (n, K, 2)  x, y of each part; NaN where its map is zero everywhere
    active: torch.Tensor         # (n, K)     True: the part's map exceeds a half somewhere
    clusters: torch.Tensor       # (n, P)     part under each point, K for background


@torch.no_grad()
def landmarks(selector, samples, normalise=False, device="cpu", batch=32, workers=0):
    """Parts and keypoints of a split that has keypoints -> Landmarks.

    normalise=False shows the selector pixels in [0, 1], as published, although it was trained on normalised ones.
    """
    samples = copy.copy(samples) if normalise else in_unit_range(samples)        # the caller's keeps its settings
    samples.masks = None                                 # not needed: spare their decoding
    measure = lambda part: landmarks_of(selector(part["image"].to(device)).maps, part, samples.size)
    return Landmarks(**over(samples, measure, batch, workers))


def in_unit_range(samples):
    """The same images without normalisation: pixels in [0, 1]."""
    samples = copy.copy(samples)
    samples.pipeline = samples.pipeline._replace(normalisation=UNIT)
    return samples


def landmarks_of(maps, part, size):
    """The fields of Landmarks for one batch of samples, from its part maps (B, K+1, h, w)."""
    maps = maps.cpu()
    return {"points": part["points"], "boxes": part.get("box"), "centroids": part_centroids(maps, size),
            "active": maps[:, :-1].amax((2, 3)) > 0.5, "clusters": clusters_at(maps, part["points"], size)}


def part_centroids(maps, size):
    """Centre of mass (x, y) of each part in pixels: maps (B, K+1, h, w) -> (B, K, 2), NaN for a map of zeros.

    As published, cell i stands at i * size / h: its edge, not its centre. The regression's mean takes that up.
    """
    maps = maps[:, :-1].double()
    h, w = maps.shape[2:]
    rows, columns = (torch.arange(n, dtype=maps.dtype) for n in (h, w))
    x, y = (maps * columns).sum((2, 3)) * size / w, (maps * rows[:, None]).sum((2, 3)) * size / h
    return torch.stack([x, y], 2) / maps.sum((2, 3))[..., None]


def clusters_at(maps, points, size):
    """Part, or K for background, at each point: maps (B, K+1, h, w), points (B, P, 3) in pixels -> (B, P).

    Maps are upsampled bilinearly to size x size; the pixel under the point decides.
    differs from published: a point on the right or lower edge takes the last pixel; theirs can read the zeros outside.
    """
    maps = F.interpolate(maps.float(), (size, size), mode="bilinear", align_corners=False)
    at = 2 * points[:, None, :, :2].float() / size - 1
    return F.grid_sample(maps, at, mode="nearest", padding_mode="border", align_corners=False)[:, :, 0].argmax(1)


def scale_of(x):
    """Mean and deviation of the columns of x (n, D), NaN left out; 1 for a column that does not vary.

    The rule for "does not vary" is that of scikit-learn's StandardScaler: a variance within rounding error of zero.
    """
    there = ~x.isnan()
    n = there.sum(0).clamp_min(1)
    mean = torch.where(there, x, 0).sum(0) / n
    variance = torch.where(there, (x - mean) ** 2, 0).sum(0) / n
    eps = torch.finfo(x.dtype).eps
    return mean, torch.where(variance <= n * eps * variance + (n * mean * eps) ** 2, 1, variance.sqrt())


def keypoint_error(fit, test):
    """Keypoint regression: how far off are landmarks that are guessed from the centroids of the parts?

    fit, test: Landmarks with boxes. One least-squares fit per landmark on the images that show it -> mean distance
    over all visible landmarks of test, in units of the bird's box; lower is better. Centroids and landmarks are taken
    relative to the box and standardised; a part that is not active counts as being where it is on average.
    ValueError when no landmark of test is visible, or one that no image of fit shows.
    """
    inputs, targets = [], []
    for s in (fit, test):
        corner, extent = s.boxes.double()[:, None].split(2, -1)
        inputs.append(((s.centroids - corner) / extent).flatten(1))          # (n, 2K)
        targets.append((s.points[..., :2].double() - corner) / extent)       # (n, P, 2)
    idle = [~s.active.repeat_interleave(2, 1) for s in (fit, test)]
    distances, visible = [], [s.points[..., 2] > 0 for s in (fit, test)]
    for p in visible[1].any(0).nonzero()[:, 0].tolist():
        known, asked = (shown[:, p] for shown in visible)
        if not known.any():
            raise ValueError(f"no training image shows landmark {p + 1}")
        mean, deviation = scale_of(inputs[0][known])
        # idle parts, whose centroids may be NaN, become 0 here: before anything is summed
        a, b = (((x[rows] - mean) / deviation).masked_fill(off[rows], 0)
                for x, off, rows in zip(inputs, idle, (known, asked)))
        middle, spread = scale_of(targets[0][known, p])
        weights = torch.linalg.lstsq(a, (targets[0][known, p] - middle) / spread, driver="gelsd").solution
        distances.append((b @ weights * spread + middle - targets[1][asked, p]).norm(dim=1))
    if not distances:
        raise ValueError("no landmark is visible")
    return torch.cat(distances).mean().item()


# ---------------------------------------------------------------- clusterings
def contingency(a, b):
    """How often each label of a (n,) meets each label of b (n,) -> counts (labels of a, labels of b)."""
    a, b = (x.unique(return_inverse=True)[1] for x in (a, b))
    rows, columns = int(a.max()) + 1, int(b.max()) + 1
    return torch.bincount(a * columns + b, minlength=rows * columns).view(rows, columns)


def nmi(a, b):
    """Normalised mutual information of two labellings (n,), n > 0: information over the mean of the two entropies.

    1: they agree up to names (two that do not split at all agree); 0: they are independent.
    """
    joint = contingency(a, b).double() / len(a)
    entropy = lambda p: -(p[p > 0] * p[p > 0].log()).sum().item()
    of_a, of_b = entropy(joint.sum(1)), entropy(joint.sum(0))
    if joint.numel() == 1:
        return 1.0
    return max(0.0, of_a + of_b - entropy(joint)) / ((of_a + of_b) / 2)      # rounding may take it below 0


def ari(a, b):
    """Rand index of two labellings (n,), n > 0, adjusted for chance (Hubert and Arabie, 1985).

    1: they agree up to names; 0 is expected of random labels. Pairs are counted in whole numbers of any size.
    """
    table = contingency(a, b)
    pairs = lambda counts: sum(math.comb(n, 2) for n in counts.flatten().tolist())
    together, in_a, in_b, every = pairs(table), pairs(table.sum(1)), pairs(table.sum(0)), math.comb(len(a), 2)
    if in_a == in_b == together:                         # the same pairs: agreement, also where there are none
        return 1.0
    # (together - expected) / (mean - expected), expected = in_a * in_b / every, times 2 * every
    return 2 * (together * every - in_a * in_b) / ((in_a + in_b) * every - 2 * in_a * in_b)
