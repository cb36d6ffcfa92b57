"""between.py: inside the object: what one part says alone, and what its representation knows of the other parts.

    each_part_alone(model, samples)              # accuracy of each part alone, agreement, which one the whole follows
    between_parts(model, samples)                # does a part's representation hold the attributes of other parts?

Floor: measuring. Read ifam.py before (IFAM.each_part), leakage.py (linear_probe) and benchmarks/cub.py (Attributes).
Nothing is drawn at random. Letters: n images, A attributes such as the colour of the bill, P landmarks; else ifam.py's.
"""
import copy
from itertools import combinations

import torch
import torch.nn.functional as F

from benchmarks.cub import attributes_missing, read_attributes
from benchmarks.samples import evenly
from ifam import masked_mean, paint, regrid
from measure.metrics import over, share_of
from measure.probes import FEW, linear_probe


# ---------------------------------------------------------------- classes from one part alone
@torch.no_grad()
def each_part_alone(model, samples, device="cpu", batch=32, workers=0):
    """One pass of stage 2 for each part, and what parts_say makes of them -> dict for report.json."""
    def measure(part):
        out = model(part["image"].to(device), per_part=True)
        return {"whole": out.logits.float().cpu(), "parts": out.logits_parts.float().cpu(),
                "patches": (out.keep_parts > 0).sum(2).cpu()}
    found = over(unmasked(samples), measure, batch, workers)
    answers = torch.stack([samples.answers(x) for x in found["parts"].unbind(1)], 1)
    return parts_say(samples.answers(found["whole"]), answers, found["patches"], samples.labels)


def unmasked(samples):
    """The same images without their masks, which nobody reads here."""
    samples = copy.copy(samples)
    samples.masks = None
    return samples


def parts_say(whole, parts, patches, labels):
    """whole (n,), parts (n, K): predicted classes; patches (n, K): how many each part has; labels (n,) -> dict.

    A part without patches says nothing and counts nowhere. parts: of each its accuracy alone, over the n images where
    it has patches, that of the whole on the same images, and `follows`, of the images whose parts disagree. agreement:
    share of the pairs of parts of an image that predict the same class. disagree: the images whose parts do not all
    predict the same; in what share of them the whole says what its largest part says, and what none of its parts says.
    """
    there, right, agrees = patches > 0, parts == labels[:, None], parts == whole[:, None]
    pairs = [(there[:, i] & there[:, j], parts[:, i] == parts[:, j]) for i, j in combinations(range(parts.shape[1]), 2)]
    same = torch.cat([equal[both] for both, equal in pairs]) if pairs else torch.zeros(0, dtype=torch.bool)
    split = torch.stack([both & ~equal for both, equal in pairs]).any(0) if pairs else torch.zeros_like(there[:, 0])
    share = lambda chosen: chosen.double().mean().item() if len(chosen) else None
    of = [{"part": k, "images": share(there[:, k]), "patches": share(patches[there[:, k], k]),
           **share_of(right[there[:, k], k].double()), "whole": share((whole == labels)[there[:, k]]),
           "follows": share(agrees[split & there[:, k], k])} for k in range(parts.shape[1])]
    largest = agrees.gather(1, patches.argmax(1, keepdim=True))[:, 0]
    return {"parts": of, "agreement": {"pairs": len(same), "share": share(same)},
            "disagree": {"images": int(split.sum()), "share": share(split), "largest": share(largest[split]),
                         "none": share(~(agrees & there).any(1)[split])}}


# ---------------------------------------------------------------- what a part knows of the others
PLACES = ("image", "kept", "own")    # how far attention reaches: the whole image, all kept patches, the part alone
LATE = {"stage1": "image", "stage2": "kept"}             # what each stage does
MOST, LEAST = 2000, 100              # images that are looked at; images that a pair of part and attribute needs
FREE = 0.02                          # the class does not tell an attribute that it reads no better than so above chance


@torch.no_grad()
def between_parts(model, samples, device="cpu", batch=32, workers=0):
    """How much of another part's attribute a part's representation holds, late less early -> dict for report.json.

    r_w(i, k, s): mean of the patches of part k of image i after the final norm of stage w, where attention reached s:
    the whole image, all kept patches, or the part alone. Weights and pooling are the same, attention alone differs.
    acc_w(k, a, s): cross-validated accuracy of linear_probe at reading attribute a from r_w(., k, s), over the images
    in which part k shows none of the landmarks of a and another part shows one. Then

        between_parts(w) = mean over pairs (k, a) of  acc_w(k, a, late) - acc_w(k, a, own)

    with late = the whole image in stage 1 and all kept patches in stage 2. Attributes go together through the class, so
    that a part says something of the others by itself: the own pass takes that out, chance (the largest share of one
    value) would not. `class_alone` is the same probe, given the true class instead of a representation.
    A pair needs LEAST images, of values that occur FEW times. `free`: over the pairs whose attribute the class does
    not tell (class_alone at most FREE above chance). `shown`: over images in which part k itself shows the attribute.
    {"skipped": why} where a benchmark has no attributes, or no pair enough images.
    """
    if why := missing(samples):
        return {"skipped": why}
    some = unmasked(samples).part(samples.split, evenly(torch.arange(len(samples)), MOST))
    known = read_attributes(some.attributes[0][0], [number for _, number in some.attributes])

    def measure(part):
        parts, found = representations(model, part["image"].to(device))
        shown = landmarks_shown(parts, part["points"].to(device), model.grid, samples.size)
        return {"shown": shown.cpu()} | {name: x.float().cpu() for name, x in found.items()}
    found = over(some, measure, batch, workers)
    shown, labels = found.pop("shown"), torch.from_numpy(known.labels)
    cells = [cell for k in range(shown.shape[1]) for a, group in enumerate(known.groups)
             for cell in cells_of(found, shown[:, :, [p - 1 for p in known.parts[a]]].any(2), labels[:, a],
                                  some.labels, k, group)]
    others, own = ([cell for cell in cells if cell["where"] == where] for where in ("elsewhere", "shown"))
    if not others:
        return {"skipped": f"no part and attribute have {LEAST} images in which another part shows it"}
    free = [cell for cell in others if cell["class_alone"] <= cell["chance"] + FREE]
    return {"images": len(some), **summary(others), "free": summary(free), "shown": summary(own), "cells": cells}


def missing(samples):
    """Why a split has no attributes of parts; "" if it has."""
    if not samples.attributes:
        return f"{samples.title} has no attributes of parts"
    return attributes_missing(samples.attributes[0][0]) if samples.points else "parts/part_locs.txt is not there"


def representations(model, images):
    """-> keep_parts (B, K, N) on model.grid; {"stage1.image", ..., "stage2.own": (B, K, D)}, NaN without patches."""
    features = model.selector.features(images)
    first = model.selector.select(features)
    parts = model.split(first, model.mask(first))
    own_grid = regrid(parts, model.grid, model.selector.backbone.grid)
    stages = {"stage1": (model.selector.backbone, model.selector.shrink(images), own_grid)}
    if model.predictor:
        stages["stage2"] = model.predictor.backbone, paint(images, model.shown_pixels(first, images.shape[2:])), parts
    found = {}
    for name, (vit, seen, mine) in stages.items():
        whole = features if name == "stage1" else vit(seen)[:, vit.prefix:]
        found[f"{name}.image"] = means(whole, mine)
        found[f"{name}.kept"] = means(vit(seen, mine.sum(1))[:, vit.prefix:], mine)
        there = mine.any(2)
        alone = masked_mean(vit(seen[there.nonzero()[:, 0]], mine[there])[:, vit.prefix:], mine[there])
        found[f"{name}.own"] = alone.new_full((*there.shape, alone.shape[1]), torch.nan).index_put((there,), alone)
    return parts, found


def means(patches, parts):
    """Mean of the patches (B, N, D) of each part (B, K, N) -> (B, K, D), NaN for a part without patches."""
    return parts @ patches / parts.sum(2, keepdim=True)


def landmarks_shown(parts, points, grid, size):
    """Which part shows which landmark: parts (B, K, N), points (B, P, 3) in pixels of size x size -> (B, K, P) bool."""
    x, y, visible = points.unbind(2)
    inside = (visible > 0) & (x >= 0) & (y >= 0) & (x < size) & (y < size)
    row, column = ((at * n / size).long().clamp(0, n - 1) for at, n in ((y, grid[0]), (x, grid[1])))
    at = (row * grid[1] + column)[:, None].expand(-1, parts.shape[1], -1)
    return (parts.gather(2, at) > 0) & inside[:, None]


def cells_of(found, shown, labels, classes, k, group):
    """Part k and one attribute -> a dict for each of "elsewhere" and "shown" that has images enough.

    found: {name: (n, K, D)}, shown (n, K): which part shows the attribute, labels (n,) with -1 unknown, classes (n,).
    """
    others = shown[:, torch.arange(shown.shape[1]) != k].any(1)
    there = torch.stack([x[:, k, 0].isfinite() for x in found.values()]).all(0) & (labels >= 0)
    for where, chosen in (("elsewhere", there & others & ~shown[:, k]), ("shown", there & shown[:, k])):
        often = torch.bincount(labels[chosen], minlength=1) >= FEW
        chosen = chosen & often[labels.clamp(0, len(often) - 1)]
        if chosen.sum() < LEAST or often.sum() < 2:
            continue
        y = labels[chosen].unique(return_inverse=True)[1]
        read = {}
        for name, x in found.items():
            stage, place = name.split(".")
            read.setdefault(stage, {})[place] = linear_probe(x[chosen, k], y)
        yield {"part": k, "attribute": group, "where": where, "n": len(y), "values": int(often.sum()),
               "chance": torch.bincount(y).max().item() / len(y),
               "class_alone": linear_probe(F.one_hot(classes[chosen]), y), **read}


def summary(cells):
    """Means over pairs of part and attribute; difference: late less early, which is the measure. None without any."""
    if not cells:
        return None
    mean = lambda value: sum(map(value, cells)) / len(cells)
    out = {"pairs": len(cells), "chance": mean(lambda c: c["chance"]), "class_alone": mean(lambda c: c["class_alone"])}
    for stage in (stage for stage in LATE if stage in cells[0]):
        out[stage] = {place: mean(lambda c: c[stage][place]) for place in PLACES}
        out[stage]["difference"] = out[stage][LATE[stage]] - out[stage]["own"]
    return out


# ---------------------------------------------------------------- as text
def table(report):
    """The lines that evaluate.py --per-part prints, from the report's `parts` and leakage's `between_parts`."""
    digits = lambda x: "-" if x is None else f"{x:.3f}"
    lines = ["  one part alone (stage 2 sees its patches and nothing else):",
             f"    {'part':<6}{'images':>8}{'patches':>9}{'accuracy':>20}{'the whole, there':>18}{'followed':>10}"]
    found, between = report["parts"], report["leakage"]["between_parts"]
    for p in found["parts"]:
        interval = f"{digits(p['accuracy'])} ({p['low']:.2f}-{p['high']:.2f})" if p["n"] else "-"
        lines.append(f"    {p['part']:<6}{p['n']:>8}{p['patches'] or 0:>9.1f}{interval:>20}{digits(p['whole']):>18}"
                     f"{digits(p['follows']):>10}")
    agreement, disagree = found["agreement"], found["disagree"]
    lines.append(f"    parts agree: {digits(agreement['share'])} of {agreement['pairs']} pairs; where they disagree "
                 f"({disagree['images']} images),")
    lines.append(f"    the whole says what its largest part says: {digits(disagree['largest'])}, what no part says: "
                 f"{digits(disagree['none'])}")
    if "skipped" in between:
        return "\n".join([*lines, f"  what a part knows of others is left out: {between['skipped']}"])
    lines.append(f"  another part's attribute, read from a part, {between['pairs']} pairs; chance "
                 f"{digits(between['chance'])}, from the true class {digits(between['class_alone'])}:")
    for stage in (stage for stage in LATE if stage in between):
        image, kept, own = (digits(between[stage][place]) for place in PLACES)
        lines.append(f"    stage {stage[-1]}, after attention over the whole image {image}, what is kept {kept}, the "
                     f"part alone {own}; late less early {between[stage]['difference']:+.3f}")
    if free := between["free"]:
        each = ", ".join(f"stage {stage[-1]} {free[stage]['difference']:+.3f}" for stage in LATE if stage in free)
        lines.append(f"    of attributes that the class does not tell, {free['pairs']} pairs, late less early: {each}")
    return "\n".join(lines)
