"""encoding.py: does a selection of patches tell the answer by what it selects?

    measure_encoding(model, evaluator, samples, predict(model, samples)["keep"])     # what evaluate.py --encoding does

Floor: measuring. Read baselines.RandomMask before. A model that chooses its patches with the whole image in view could
write the class into the choice: keep the left half for one class and the right half for the other. No measure of hidden
pixels sees that. The test is that of REAL-X (Jethani et al., AISTATS 2021): an evaluator, the same network trained on
random masks, classifies from the same patches. What the model gets right and the evaluator does not, is encoded.
Letters: n images, N patches, C classes.
"""
import math

import torch

from baselines import FoundMask, RandomMask
from benchmarks.samples import patch_keep
from measure.metrics import accuracies, over
from settings import UsageError

MASKS = {"own": "its own mask", "true": "the true mask", "random": "a random mask", "all": "the whole image"}


def check(model, what):
    """UsageError unless a model classifies from an early, hard mask of its own: a selection. what: how to call it."""
    own = model.selector is not None or model.needs_truth or isinstance(model, FoundMask)
    if not own or not model.predictor or (model.predictor.masking, model.predictor.hardness) != ("early", "hard"):
        raise UsageError(f"--encoding asks what an early, hard mask tells, and {what} has none: leave it out, or name "
                         "a --ckpt of ifam, early-found or early-truth")
    if model.predictor.mask_with != "patches":
        raise UsageError(f"--encoding judges which tokens are there, and {what} was trained with --mask-with pixels, "
                         "which keeps them all: leave it out, or name a --ckpt that was trained without it")
    if model.trim != "none":
        raise UsageError(f"--encoding judges whole patches, and {what} was trained with --trim {model.trim}, which "
                         "paints some of their pixels: leave it out, or name a --ckpt that was trained without --trim")


@torch.no_grad()
def logits_under(predictors, samples, keep, device="cpu", batch=32, workers=0, rule="half"):
    """What classifiers say of a split under each mask -> {(classifier, mask): logits (n, C)}.

    predictors: {name: a function of images and keep, as ifam.Predictor}; keep (n, N): the masks under test. The masks
    are those of MASKS; "true" only where the samples have them, and by the rule of patch_keep. A random mask depends
    on the image's name alone.
    """
    own = iter(keep.split(batch))                        # samples come in order

    def measure(part):
        images = part["image"].to(device)
        masks = {"own": next(own).to(device), "random": RandomMask.of(part["id"], keep.shape[1]).to(device),
                 "all": None}
        if "mask" in part:
            patch = math.isqrt(images.shape[2] * images.shape[3] // keep.shape[1])
            masks["true"] = patch_keep(part["mask"].to(device), patch, rule)
        return {(name, mask): predictor(images, masks[mask]).float().cpu()
                for name, predictor in predictors.items() for mask in MASKS if mask in masks}
    return over(samples, measure, batch, workers)


def difference(a, b):
    """Accuracy of one classifier less that of another on the same images -> {"difference", "low", "high"}.

    a, b (n,), 1 for a right answer. The 95 % interval is over images, which it takes in pairs: half an image is added
    to each of the four cells (both right, one, the other, none), so that no difference has a width too (Agresti and
    Min, 2005). It says nothing of other seeds of the training.
    """
    n, ones, others = len(a), (a > b).sum().item(), (a < b).sum().item()
    if not n:
        return {"difference": None, "low": None, "high": None}
    middle = (ones - others) / (n + 2)
    half = 1.96 * math.sqrt(ones + others + 1 - (ones - others) ** 2 / (n + 2)) / (n + 2)
    return {"difference": (ones - others) / n, "low": max(-1.0, middle - half), "high": min(1.0, middle + half)}


def mean_with_interval(x):
    """Mean of numbers of images (n,) -> {"difference", "low", "high"}; the 95 % interval is the normal one."""
    mean = x.mean().item()
    half = 1.96 * x.std().item() / math.sqrt(len(x)) if len(x) > 1 else 2.0      # of one image nothing is known
    return {"difference": mean, "low": max(-2.0, mean - half), "high": min(2.0, mean + half)}


def measure_encoding(model, evaluator, samples, keep, device="cpu", batch=32, workers=0):
    """How much of the answer the selection keep (n, N) tells the model -> dict for report.json.

    "encoding": accuracy of the model less that of the evaluator under these masks, with its interval; "groups": the
    same of each group; "masks": both classifiers under each of MASKS; "beyond_true": the encoding less what the same
    difference is under the true masks, in which nothing is encoded, where there are any and they do not mark the class.
    model, evaluator: anything with a predictor.
    """
    predictors = {"model": model.predictor, "evaluator": evaluator.predictor}
    logits = logits_under(predictors, samples, keep, device, batch, workers, getattr(model, "mask_rule", "half"))
    right = {at: (samples.answers(x) == samples.labels).double() for at, x in logits.items()}
    masks = {}
    for mask in (m for m in MASKS if ("model", m) in logits):
        masks[mask] = difference(right["model", mask], right["evaluator", mask])
        for name in predictors:
            found = accuracies({"logits": logits[name, mask]}, samples)
            masks[mask][name] = {key: found[key] for of in ("aa", "worst_group") for key in (of, f"{of}_interval")}
    groups = {}
    for g, name in enumerate(samples.group_names):
        here = samples.groups == g
        of = {who: right[who, "own"][here].mean().item() if here.any() else None for who in predictors}
        groups[name] = {"n": int(here.sum()), **of, **difference(right["model", "own"][here],
                                                                  right["evaluator", "own"][here])}
    own, beyond = masks["own"], {}
    if "true" in masks and not samples.masks_tell:
        less = {mask: right["model", mask] - right["evaluator", mask] for mask in ("own", "true")}
        beyond = {"beyond_true": mean_with_interval(less["own"] - less["true"])}
    return {"images": len(samples), "encoding": own["difference"], "encoding_interval": [own["low"], own["high"]],
            **beyond, "groups": groups, "masks": masks}


def summary(found):
    """What measure_encoding found, as lines for the terminal."""
    low, high = found["encoding_interval"]
    lines = [f"  what the selection encodes: {found['encoding']:+.3f} ({low:+.2f} to {high:+.2f}) of accuracy, the "
             "model less an evaluator trained on random masks",
             f"    {'accuracy (worst group) under':<34}{'model':>16}{'evaluator':>16}{'model less evaluator':>26}"]
    both = lambda x: f"{x['aa']:.3f} ({x['worst_group']:.3f})"
    span = lambda x: f"{x['difference']:+.3f} ({x['low']:+.2f} to {x['high']:+.2f})"
    lines += [f"    {MASKS[mask]:<34}{both(x['model']):>16}{both(x['evaluator']):>16}{span(x):>26}"
              for mask, x in found["masks"].items()]
    if "beyond_true" in found:
        lines.append(f"    its own less the true mask{span(found['beyond_true']):>66}")
    if len(found["groups"]) <= 9:
        named = {f"{name} (n = {x['n']})": x for name, x in found["groups"].items() if x["n"]}
        lines += [f"      {name:<32}{x['model']:>16.3f}{x['evaluator']:>16.3f}{span(x):>26}"
                  for name, x in named.items()]
    return "\n".join(lines)
