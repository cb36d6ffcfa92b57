"""retrain.py: a new last layer for a trained model, which reads the same features under the same mask.

    about = retrain("dfr", model, {"val": samples})      # model.predictor.head is another one now

Floor: measuring. Read leakage.given (what a model is told) and evaluate.py --retrain (what is measured then) with it.
What is left of a worst group under iFAM may be in the head, in the features or in the mask: here only the head changes.
It reads what the old one read, so what a mask hides stays hidden. DFR: Kirichenko et al., ICLR 2023. AFR: Qiu et al.,
ICML 2023. LLE: Li et al., CVPR 2023. The PCA probe is our reading of Darbinyan et al., SCIS workshop 2023, who do not
say how their numbers are made. Everything is fitted in float64 and draws nothing but DFR's subsets, from a fixed seed.
Letters: n images, F numbers that the head reads (D, or K*D of parts side by side), others as in ifam.py.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from baselines import FoundMask
from measure.leakage import LEAKAGE_GROUP, given, shown_under, swap_backgrounds
from measure.metrics import over
from settings import RunError, UsageError

TITLES = {"dfr": "DFR", "afr": "AFR", "pca": "PCA probe", "lle": "LLE"}          # in tables
SPLITS = {"dfr": ("val",), "afr": ("val",), "pca": ("train", "val"), "lle": ("train",)}       # what a head is fitted on
STRENGTHS = (1, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)         # of DFR, as published, as the number of retrains
RETRAINS = 20
AFR = dict(penalty=0.2, lr=0.02, steps=500)              # published for Waterbirds, with gamma 14
GAMMAS = (14.0, 7.0, 4.0, 2.0, 1.0, 0.0)
DECAY = 1e-4               # weight decay of the probes: published of LLE


# ---------------------------------------------------------------- the head of a model
class Head(nn.Module):
    """Linear heads with biases, their logits weighted by a linear shift predictor; of one head there is none.

    heads: [(weight (C, F), bias (C,))]; shift: (weight (heads, F), bias (heads,)). (B, F) -> (B, C). Parts (B, K, D),
    F = K*D, are read side by side -> (B, 1, C), of which a selector takes the mean.
    """

    def __init__(self, heads, shift=None):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.stack(x).float(), requires_grad=False) for x in zip(*heads))
        for name, x in zip(("shift_weight", "shift_bias"), shift or (None, None)):
            self.register_parameter(name, None if x is None else nn.Parameter(x.float(), requires_grad=False))
        self.out_features, self.in_features = self.weight.shape[1:]

    affine = property(lambda self: len(self.weight) == 1)        # the weights of several depend on what is read

    def forward(self, x):
        if x.dim() == 3:
            return self(x.flatten(1))[:, None]
        logits = torch.einsum("bf,scf->bsc", x, self.weight) + self.bias
        if self.affine:
            return logits[:, 0]
        return (F.linear(x, self.shift_weight, self.shift_bias).softmax(1)[..., None] * logits).sum(1)


def head_of(model):
    """-> (the module that holds a model's head, its name there): of stage 2, where there is one."""
    return (model.predictor, "head") if model.predictor else (model.selector, "classifier")


@torch.no_grad()
def read_by_head(model, samples, device="cpu", batch=32, workers=0, images=None):
    """What the head of a model reads of a split, under the mask that the model finds or is given -> (n, F), float64.

    images: a function of the model, a batch and its images -> the images to show instead. RunError for what is not
    finite.
    """
    read, model = [], model.eval()
    hook = getattr(*head_of(model)).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].flatten(1)))

    def measure(part):
        shown = part["image"].to(device)
        if images is not None:
            shown = images(model, part, shown)
        read.clear()
        model(shown, **given(model, part, device))
        return {"x": read[-1].cpu().double()}
    try:
        x = over(samples, measure, batch, workers)["x"]
    finally:
        hook.remove()
    if not x.isfinite().all():
        raise RunError(f"{samples.name} {samples.split}: the model's features are not finite; its weights overflowed "
                       "in training")
    return x


# ---------------------------------------------------------------- logistic regression
def logits_of(v, a):
    """Parameters v (P, F+1), P = 1 for two classes, else C; a (n, F+1) ends in ones -> (n, C)."""
    z = a @ v.T
    return torch.cat([-z, z], 1) / 2 if len(v) == 1 else z


def slopes(v, a, target):
    """Gradient of the summed cross entropies in v; target (n, C) one-hot -> (P, F+1)."""
    off = logits_of(v, a).softmax(1) - target
    return (off[:, 1:] if len(v) == 1 else off).T @ a


def violation(v, slope, ridge):
    """By how much the conditions of the optimum are missed, the largest; slope: gradient of the smooth part (P, F+1).

    L1: where a weight is 0 the slope is at most 1, elsewhere it is 1 against the weight's sign. Ridge: it is minus the
    weight. The slope of an intercept is 0.
    """
    w, s = v[:, :-1], slope[:, :-1]
    missed = (s + w).abs() if ridge else torch.where(w == 0, s.abs() - 1, (s + w.sign()).abs())
    return torch.cat([missed, slope[:, -1:].abs()], 1).amax().item()


def logistic(x, y, classes, strength, ridge=False, start=None, tolerance=1e-4, most=200_000):
    """Penalised logistic regression of y (n,) on x (n, F) -> v (P, F+1), intercepts last.

    Minimises |w|_1, or with ridge |w|^2 / 2, plus strength times the summed cross entropies; intercepts are free. Two
    classes have one row, more are multinomial. FISTA (Beck and Teboulle, 2009) with restarts, until no condition of the
    optimum is missed by more than `tolerance`, in units of the penalty's slope, with ridge of the largest slope at 0.
    start: v to start from. RunError after `most` steps.
    """
    a, target = torch.cat([x, torch.ones_like(x[:, :1])], 1), F.one_hot(y, classes).to(x)
    v = x.new_zeros(1 if classes == 2 else classes, a.shape[1]) if start is None else start
    curvature = torch.linalg.eigvalsh(a.T @ a)[-1].item() / (4 if classes == 2 else 2)
    step = 1 / (strength * max(curvature, 1e-12))
    if ridge:
        tolerance *= max(1e-12, strength * slopes(torch.zeros_like(v), a, target).abs().max().item())
    u, t = v, 1.0
    for done in range(most):
        if done % 10 == 0 and violation(v, strength * slopes(v, a, target), ridge) <= tolerance:
            return v
        new = u - step * strength * slopes(u, a, target)
        w = new[:, :-1]
        w = w / (1 + step) if ridge else w.sign() * (w.abs() - step).clamp_min(0)
        new = torch.cat([w, new[:, -1:]], 1)
        if ((u - new) * (new - v)).sum() > 0:            # momentum points uphill
            t = 1.0
        further = (1 + math.sqrt(1 + 4 * t * t)) / 2
        u, v, t = new + (t - 1) / further * (new - v), new, further
    raise RunError(f"logistic regression did not converge in {most} steps; take another --ckpt, or more images")


def as_head(v, mean=0.0, scale=1.0):
    """Parameters for (x - mean) / scale -> (weight (C, F), bias (C,)) for x. Of two classes each gets half."""
    v = torch.cat([-v, v]) / 2 if len(v) == 1 else v
    weight = v[:, :-1] / scale
    return weight, v[:, -1] - (weight * mean).sum(1)


def probe(x, y, classes, start=None):
    """A linear probe without randomness: logistic regression with weight decay DECAY -> v, for x - x.mean(0)."""
    return logistic(x - x.mean(0), y, classes, 1 / (DECAY * len(x)), ridge=True, start=start, tolerance=1e-6)


def worst(head, x, y, groups):
    """Accuracy of a head (weight, bias) on the worst of the groups that are there."""
    right = ((x @ head[0].T + head[1]).argmax(1) == y).double()
    return min(right[groups == g].mean().item() for g in groups.unique())


# ---------------------------------------------------------------- DFR
def halves(groups):
    """Indices (n,) -> two halves, each group halved, by a fixed draw. The first has the odd one."""
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))
    mine = [order[groups[order] == g] for g in groups.unique()]
    cut = [(len(m) + 1) // 2 for m in mine]
    return torch.cat([m[:c] for m, c in zip(mine, cut)]), torch.cat([m[c:] for m, c in zip(mine, cut)])


def balanced_subset(groups, generator):
    """Indices of as many images of each group as the smallest has, drawn without replacement."""
    order = torch.randperm(len(groups), generator=generator)
    mine = [order[groups[order] == g] for g in groups.unique()]
    return torch.cat([m[:min(map(len, mine))] for m in mine])


def standard(x):
    """Mean and deviation of each channel, 1 where it does not vary."""
    scale = x.std(0, correction=0)
    return x.mean(0), torch.where(scale > 1e-12, scale, 1.0)


def dfr(x, y, groups, classes, strengths=STRENGTHS, retrains=RETRAINS):
    """Deep feature reweighting on a held-out set with groups -> ((weight, bias), {"strength", "tuning"}).

    Channels are standardised. The strength is that with the best worst group on one half, fitted on a balanced subset
    of the other; the head is the mean of `retrains` L1 logistic regressions, each on a fresh balanced subset of all.
    """
    def fits(of, strength, count, seed):
        mean, scale = standard(x[of])
        generator, v, found = torch.Generator().manual_seed(seed), None, []
        for _ in range(count):
            some = of[balanced_subset(groups[of], generator)]
            v = logistic((x[some] - mean) / scale, y[some], classes, strength, start=v)
            found.append(v)
        return as_head(torch.stack(found).mean(0), mean, scale)
    tuning = {}
    if len(strengths) > 1:
        one, other = halves(groups)
        tuning = {c: worst(fits(one, c, 1, 1), x[other], y[other], groups[other]) for c in strengths}
    best = max(strengths, key=lambda c: tuning.get(c, 0))        # of several the first, as published
    return fits(torch.arange(len(y)), best, retrains, 2), {"strength": best, "tuning": tuning}


# ---------------------------------------------------------------- AFR
def afr_weights(right, gamma):
    """Weights of images by the probability (n,) that the old head gives to the true class -> (n,), their sum is 1."""
    return (-gamma * right).softmax(0)


def afr(x, y, head, gamma, penalty, lr, steps, start=None):
    """Automatic feature reweighting, which asks for no groups -> (weight, bias).

    Images of which the old head is unsure weigh more: exp(-gamma p). Gradient descent on the weighted cross entropy
    plus `penalty` times the squared distance to the old head, from there, or from another start.
    """
    old = torch.cat([head[0], head[1][:, None]], 1)
    a, target = torch.cat([x, torch.ones_like(x[:, :1])], 1), F.one_hot(y, len(old)).to(x)
    weights = afr_weights((a @ old.T).softmax(1)[torch.arange(len(y)), y], gamma)
    v = old if start is None else torch.cat([start[0], start[1][:, None]], 1)
    for _ in range(steps):
        v = v - lr * (((a @ v.T).softmax(1) - target).mul(weights[:, None]).T @ a + 2 * penalty * (v - old))
    return v[:, :-1], v[:, -1]


def tuned_afr(x, y, head, gammas=GAMMAS):
    """afr on a held-out set without groups -> ((weight, bias), {"gamma", "tuning", ...}).

    gamma is the one with the best worst *class* on one half, fitted on the other; of several the first. The published
    choice, by worst group, needs groups.
    """
    one, other = halves(y)
    tuning = {g: worst(afr(x[one], y[one], head, g, **AFR), x[other], y[other], y[other]) for g in gammas}
    gamma = max(gammas, key=tuning.get)
    return afr(x, y, head, gamma, **AFR), {"gamma": gamma, "tuning": tuning, **AFR}


# ---------------------------------------------------------------- the PCA probe
def pca_probe(x, y, classes, held):
    """A linear probe on some of the principal components of x -> ((weight, bias), {"components", "of", "tuning"}).

    held: features, labels and groups (or labels) of other images: components are those with the best worst group there.
    Tried are all, the first 1, 2, 4, ..., and all but the first 1, 2, 4, ...; of several the first in this order. All
    of them are the plain probe.
    """
    mean = x.mean(0)
    axes = torch.linalg.eigh((x - mean).T @ (x - mean))[1].flip(1)               # (F, F), the largest variance first
    width, powers = len(axes), [2 ** i for i in range(len(axes).bit_length()) if 2 ** i < len(axes)]
    tuning, heads, full = {}, {}, None
    for first, last in [(0, m) for m in (*powers, width)] + [(s, width) for s in powers]:
        some = axes[:, first:last]
        start = None if full is None else torch.cat([full[:, :-1] @ some, full[:, -1:]], 1)      # of the one before
        v = probe((x - mean) @ some, y, classes, start)
        full = torch.cat([v[:, :-1] @ some.T, v[:, -1:]], 1)
        heads[first, last] = as_head(full, mean)
        tuning[first, last] = worst(heads[first, last], *held)
    best = max([(0, width), *tuning], key=tuning.get)
    return heads[best], {"components": list(best), "of": width,
                         "tuning": {f"{first}-{last}": share for (first, last), share in tuning.items()}}


# ---------------------------------------------------------------- LLE
def last_layer_ensemble(sets, y, classes):
    """A head for each of D training sets and a predictor of the set -> Head.

    sets: D features (n, F) of the same images, whose labels are y (n,). Each loss is convex and is minimised by itself:
    the optimum of the published sum of cross entropies with weight decay.
    """
    head = lambda x, target, count: as_head(probe(x, target, count), x.mean(0))
    heads = [head(x, y, classes) for x in sets]
    if len(sets) == 1:
        return Head(heads)
    return Head(heads, head(torch.cat(sets), torch.arange(len(sets)).repeat_interleave(len(y)), len(sets)))


def mixed(labels):
    """An order of images in which neighbours have different classes, as far as there are: (n,) -> indices (n,)."""
    place = torch.zeros(len(labels), dtype=torch.float64)
    for label in labels.unique():
        mine = labels == label
        place[mine] = (torch.arange(int(mine.sum())) + 0.5).double() / mine.sum()
    return place.argsort(stable=True)


def own_mask(model):
    """Does a model find a mask of its own?"""
    return model.selector is not None or isinstance(model, FoundMask)


def on_other_backgrounds(model, part, images):
    """Images of a batch on backgrounds of other classes, under the model's own mask, else under the true one."""
    if own_mask(model):
        out = model(images, **given(model, part, images.device))
        keep = out.keep if model.selector is None else model.mask(out)
        objects = shown_under(keep, out.shown, (model.predictor or model.selector).backbone)
    else:
        objects = part["mask"].to(images.device)[:, None].float()
    return swap_backgrounds(images, objects, lenders(part["label"]))


def lenders(labels):
    """The other images of a batch that are of another class, then the image itself: labels (B,) -> indices (B, B - 1).
    """
    own = torch.arange(len(labels))[:, None]
    order = (own - torch.arange(1, len(labels))) % len(labels)
    other = labels[order] != labels[:, None]
    return torch.where(other, order, own).gather(1, (~other).long().argsort(dim=1, stable=True))


# ---------------------------------------------------------------- all of them
def check(how, model, splits, what):
    """UsageError for what a new head cannot be fitted on. splits: all that there are; what: how to call the model."""
    title, places = (lambda some: (some.title, some.places))(next(iter(splits.values())))
    if how == "dfr" and not places:
        raise UsageError(f"--retrain dfr balances groups, and {title} has none (no places): --retrain afr needs no "
                         "groups")
    if absent := next((split for split in SPLITS[how] if split not in splits), None):
        raise UsageError(f"--retrain {how}: {title} has no {absent} split to fit a head on"
                         + ": train with --val-share 0.1 to have one" * (absent == "val"))
    fit = splits[SPLITS[how][0]]
    if (seen := len(fit.labels.unique())) < len(fit.classes):
        raise UsageError(f"--retrain {how}: {title} {fit.split} has images of {seen} of {len(fit.classes)} classes "
                         "here: take a larger --limit")
    if how == "dfr" and (rare := [n for n, c in zip(fit.group_names, torch.bincount(fit.groups)) if c == 1]):
        raise UsageError(f"--retrain dfr halves every group, and {title} {fit.split} has one image of {rare[0]}: "
                         "take a larger --limit, or --retrain afr")
    if how == "lle" and not own_mask(model):
        if fit.masks is None:
            raise UsageError(f"--retrain lle swaps backgrounds, and {what} finds no mask and {title} has no true "
                             "ones: unpack its segmentations, or name a --ckpt of ifam")
        if fit.masks_tell:
            raise UsageError(f"--retrain lle swaps backgrounds, and the masks of {title} mark what makes the label: "
                             "name a --ckpt that finds its mask, such as one of ifam")


def old_head(model, width):
    """The head that a model has, for `width` numbers -> (weight (C, F), bias (C,)). Of parts it takes the mean."""
    old = getattr(*head_of(model))
    weight, parts = old.weight.double().cpu(), width // old.in_features
    bias = weight.new_zeros(len(weight)) if old.bias is None else old.bias.double().cpu()
    return weight.repeat(1, parts) / parts, bias


def fitted(how, model, splits, read):
    """-> (the new Head, what there is to say of how it was chosen). read: a function of a split -> features (n, F)."""
    fit = splits[SPLITS[how][0]]
    x, y, classes = read(fit), fit.labels, len(fit.classes)
    if how == "dfr":
        head, chosen = dfr(x, y, fit.groups, classes)
        sizes = torch.bincount(fit.groups, minlength=len(fit.group_names)).tolist()
        return Head([head]), {"retrains": RETRAINS, "group_sizes": dict(zip(fit.group_names, sizes)), **chosen}
    if how == "afr":
        head, chosen = tuned_afr(x, y, old_head(model, x.shape[1]))
        return Head([head]), chosen
    if how == "pca":
        held = splits["val"]
        head, chosen = pca_probe(x, y, classes, (read(held), held.labels, held.groups))
        return Head([head]), chosen
    order = mixed(y)
    swapped = read(fit.part(fit.split, order.tolist()), batch=LEAKAGE_GROUP, images=on_other_backgrounds)
    new = last_layer_ensemble([x[order], swapped], y[order], classes)
    return new, {"sets": ["original", "background"], "mask": "own" if own_mask(model) else "true"}


def retrain(how, model, splits, device="cpu", batch=32, workers=0, what="this model"):
    """Give a model a new head -> what a report says of it. how: one of TITLES; splits: {"train", "val": Samples}.

    what: how errors call the model. UsageError where it cannot be fitted on these splits, see `check`.
    """
    check(how, model, splits, what)
    read = lambda some, batch=batch, images=None: read_by_head(model, some, device, batch, workers, images)
    head, chosen = fitted(how, model, splits, read)
    setattr(*head_of(model), head.to(device))
    return {"how": how, "fitted_on": {split: len(splits[split]) for split in SPLITS[how]},
            "groups": how == "dfr" or how == "pca" and bool(splits["val"].places), **chosen}


def summary(about):
    """One line on a head: what it was fitted on, and what was chosen."""
    where = " and ".join(f"{n} images of {split}" for split, n in about["fitted_on"].items())
    there = sum(n > 0 for n in about.get("group_sizes", {}).values())
    used = {"dfr": f" with their {there} groups", "afr": " without their groups"}.get(about["how"], "")
    chosen = {"dfr": "C {strength}, {retrains} balanced retrains",
              "afr": "gamma {gamma:g}, lambda {penalty:g}, {steps} steps",
              "pca": "components {components[0]} to {components[1]} of {of}, chosen on val",
              "lle": "two heads, backgrounds swapped under the {mask} mask"}[about["how"]].format(**about)
    return f"last layer retrained, {TITLES[about['how']]}: {where}{used}; {chosen}"
