"""evaluate.py: what a trained model can do, and what its mask really hides. Writes report.json and parts.png beside it.

    python evaluate.py --ckpt runs/waterbirds-mini/best.pt
    python evaluate.py --ckpt runs/waterbirds/best.pt --root /data --split val

Accuracy by group, the mask against the true one, and leakage: each way in which the background can reach a prediction,
for the early mask (stage 2) beside the late one (stage 1). Evaluation draws nothing: two runs write the same report.
Letters: ifam.py.
"""
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import figures
from baselines import build
from ifam import discretize
from settings import UsageError, opt, parse, run_script, write_json


@dataclass
class Config:
    ckpt: str = opt(MISSING, "checkpoint written by train.py: best.pt or last.pt")
    data: str = opt("", "another benchmark with the same classes (default: the one it was trained on)", choices=("", *data.BENCHMARKS))
    root: str = opt("", "folder of the benchmarks, if they moved since training")
    split: str = opt("test", "which images to measure on", choices=("test", "val", "train"))
    limit: int = opt(0, "use only the first N images (0: as in training)")
    leakage: int = opt(500, "images that leakage is measured on, spread evenly over the split (0: all)")
    batch: int = opt(32, "images at once")
    workers: int = opt(0, "processes that load data")
    device: str = opt("auto", "auto, cpu, cuda or mps")


# ---------------------------------------------------------------- a model from its checkpoint
def pick_device(name="auto", local_rank=0):
    """"auto", "cpu", "cuda" or "mps" -> torch.device; UsageError for one that is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(n for n in ("cuda", "mps", "cpu") if there[n])
    if not there.get(name):
        raise UsageError(f"--device {name} is not available here (there is: {', '.join(n for n in there if there[n])})")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def read_checkpoint(path):
    """The dict that train.py saved: config, step, best, model, optimizer, ... UsageError if it is not one."""
    if not Path(path).is_file():
        raise UsageError(f"no checkpoint at {path}; train.py writes runs/<name>/best.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                                   # a damaged file can fail in many ways
        raise UsageError(f"{path} is damaged or not a checkpoint ({type(error).__name__}); train again or use last.pt") from None
    if not isinstance(state, dict) or not {"config", "step", "best", "model"} <= state.keys():
        raise UsageError(f"{path} is not a checkpoint of train.py (no config, step, best and model in it)")
    return state


def load_model(path, device="cpu"):
    """-> (model in evaluation mode, its checkpoint). The moving average of the weights is used where there is one."""
    state = read_checkpoint(path)
    try:
        model = build(state["config"], data.BENCHMARKS[state["config"]["data"]].classes)
        model.load_state_dict(state.get("ema") or state["model"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path}: its weights do not fit its settings: {error}") from None
    return model.to(device).eval(), state


# ---------------------------------------------------------------- predictions and accuracy
@torch.no_grad()
def predict(model, samples, batch=32, device="cpu", workers=0):
    """Run a model over a split -> {"logits": (n, C), and where the model has them "logits_stage1": (n, C), "keep": (n, N),
    "foreground": (n, 4) pixel counts}, in the order of the samples.

    Processes share the work and gather by index: every sample is counted once, whatever their number.
    """
    model.eval()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = range(rank, len(samples), world)
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(samples, mine), batch, num_workers=workers)
    found = []
    for images in loader:
        out = model(images["image"].to(device))
        one = {"logits": out.logits.float()}
        if out.maps is not None:
            one |= {"logits_stage1": out.logits_stage1.float(), "keep": out.keep.float()}
            if "mask" in images:
                one["foreground"] = foreground_counts(out.maps, images["mask"].to(device))
        found.append({name: x.cpu() for name, x in one.items()})
    pieces = [(list(mine), {name: torch.cat([f[name] for f in found]) for name in found[0]} if found else {})]
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, pieces[0])
        pieces = [p for p in gathered if p[0]]
    order = torch.tensor([i for indices, _ in pieces for i in indices]).argsort()
    return {name: torch.cat([p[name] for _, p in pieces])[order] for name in pieces[0][1]}


def foreground_counts(maps, masks):
    """Pixels of each image that are (both, found only, true only, neither): maps (B, K+1, h, w), masks (B, S, S) -> (B, 4).

    As in PDiscoFormer's foreground IoU: maps upsampled bilinearly (align_corners), arg-max over parts, not background.
    """
    maps = F.interpolate(maps.float(), masks.shape[1:], mode="bilinear", align_corners=True)
    found, true = maps.argmax(1) < maps.shape[1] - 1, masks.bool()
    cells = (found & true, found & ~true, ~found & true, ~found & ~true)
    return torch.stack([c.flatten(1).sum(1) for c in cells], 1)


def accuracies(result, samples, key="logits", rare=(), train_groups=None):
    """Accuracy as the tables give it: {"aa", "worst_group", "groups": {name: {"n", "accuracy"}}, ...}.

    aa: share of images that are right. aa_train_weighted: group accuracies weighted by their share in training, which is
    the "average" of many Waterbirds papers. worst_group: least over all groups; worst_group_rare: over `rare` only, the
    paper's definition. Groups without images have accuracy None and count nowhere.
    """
    right = (result[key].argmax(1) == samples.labels).double()
    by_group = {g: right[samples.groups == g] for g in range(len(samples.group_names))}
    groups = {g: x.mean().item() if len(x) else None for g, x in by_group.items()}
    least = lambda some: min((groups[g] for g in some if groups[g] is not None), default=None)
    out = {"aa": right.mean().item(), "worst_group": least(groups)}
    if train_groups is not None:
        n = torch.bincount(train_groups, minlength=len(groups)).double()
        seen = [g for g in groups if groups[g] is not None and n[g]]
        out["aa_train_weighted"] = sum(n[g].item() * groups[g] for g in seen) / n[seen].sum().item() if seen else None
    if rare:
        out["worst_group_rare"] = least(rare)
    out["groups"] = {samples.group_names[g]: {"n": len(x), "accuracy": groups[g]} for g, x in by_group.items()}
    return out


# ---------------------------------------------------------------- leakage
class Classifier(NamedTuple):
    """A classifier under test: how it finds its mask, and what it makes of an image while that mask is held fixed."""
    find: Callable       # images, true keep -> (keep (B, N), what to hold fixed)
    features: Callable   # images, what is held fixed -> (B, D), the final representation
    head: Callable       # features -> logits (B, C)
    mask: str            # where its mask comes from, for the report


def stage2_classifier(model):
    """The early mask: stage 2 with `keep` held fixed. A model without a mask (erm) is measured under the true one."""
    if model.selector is None:
        return Classifier(lambda images, truth: (truth, None), lambda images, held: model.predictor.features(images),
                          model.predictor.head, "truth; the model has none")

    def find(images, truth):
        keep = model(images).keep
        return keep, keep
    return Classifier(find, model.predictor.features, model.predictor.head, "found")


def stage1_classifier(model):
    """The late mask: stage 1 with its part maps held fixed, its features recomputed from the whole image."""
    def find(images, truth):
        first = model.selector(images)
        return discretize(first.part_logits), first.maps

    def features(images, maps):                          # logits are linear in parts: their average is that of the features
        return model.selector(images, maps=maps).part_features[:, :-1].mean(1)
    return Classifier(find, features, model.selector.classifier, "found")


def pixels(keep, grid, patch):
    """keep (B, N) -> (B, 1, h*patch, w*patch), each patch filled with its value."""
    return keep.unflatten(1, grid)[:, None].repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def repaint(classifier, images, keep, held, hidden, generator):
    """Replace every masked-out pixel with noise, another image, grey. -> largest logit change (B,), flips (B,) in [0, 1]."""
    logits = classifier.head(classifier.features(images, held))
    noise = torch.randn(images.shape, generator=generator).to(images)
    changes, flips = [], []
    for paint in (noise, images.roll(1, 0), torch.zeros_like(images)):
        again = classifier.head(classifier.features(torch.where(hidden, paint, images), held))
        changes.append((again - logits).abs().amax(1))
        flips.append((again.argmax(1) != logits.argmax(1)).float())
    return torch.stack(changes).amax(0), torch.stack(flips).mean(0)


def hidden_gradient(classifier, images, held, hidden):
    """Largest |d logit / d pixel| over all logits and masked-out pixels. -> (B,)"""
    images = images.detach().requires_grad_()
    logits = classifier.head(classifier.features(images, held))
    largest = torch.zeros(len(images), device=images.device)
    for c in range(logits.shape[1]):
        gradient, = torch.autograd.grad(logits[:, c].sum(), images, retain_graph=True)
        largest = largest.maximum((gradient.abs() * hidden).flatten(1).amax(1))
    return largest


def swap_backgrounds(images, objects):
    """Give every image the background of others: a pixel outside its object comes from the first of up to 7 other images
    of the batch that shows background there. objects (B, 1, S, S) in {0, 1}; a pixel that none can give stays."""
    swapped, todo = images.clone(), objects == 0
    for donor in range(1, min(len(images), 8)):
        give = todo & (objects.roll(donor, 0) == 0)
        swapped = torch.where(give, images.roll(donor, 0), swapped)
        todo = todo & ~give
    return swapped


def mask_iou(a, b):
    """IoU of binary masks (B, N), 1 where both are empty. -> (B,)"""
    both, either = (a * b).sum(1), ((a + b) > 0).sum(1)
    return torch.where(either > 0, both / either.clamp_min(1), torch.ones_like(both))


def linear_probe(x, y, folds=5, penalty=0.1):
    """Cross-validated accuracy of a linear readout of y (n,) from x (n, d): ridge regression on one-hot targets.

    Closed form in float64, standardised features, penalty * n on the diagonal: no randomness, nothing to tune.
    """
    x, target = x.double(), F.one_hot(y).double()
    fold = torch.arange(len(y)) % folds
    right = 0
    for f in range(folds):
        fit, test = fold != f, fold == f
        mean, std = x[fit].mean(0), x[fit].std(0).clamp_min(1e-6)
        a, b = (x[fit] - mean) / std, (x[test] - mean) / std
        centre = target[fit].mean(0)
        w = torch.linalg.solve(a.T @ a + penalty * len(a) * torch.eye(a.shape[1], dtype=a.dtype), a.T @ (target[fit] - centre))
        right += ((b @ w + centre).argmax(1) == y[test]).sum().item()
    return right / len(y)


def measure_leakage(classifier, samples, backbone, device="cpu", batch=32, count=0):
    """The five measures of DESIGN section 11 -> a dict for report.json (None where annotations are missing).

    repaint and gradient hold the mask fixed: for an early, hard mask they are exactly 0. swap, admitted and probe show
    what the guarantee does not cover: the selector's own eyes, patches at the border, and the shape of the mask.
    """
    indices = torch.linspace(0, len(samples) - 1, min(count or len(samples), len(samples))).round().long().tolist()
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(samples, indices), batch)
    rows, features, keeps = {}, [], []
    for number, images in enumerate(loader):
        truth = images["mask"].to(device) if "mask" in images else None
        images = images["image"].to(device)
        with torch.no_grad():
            keep, held = classifier.find(images, None if truth is None else data.patch_keep(truth, backbone.patch))
            if keep is None:
                return None                              # no mask of its own and no true one: nothing to hold fixed
            shown = pixels(keep, backbone.grid, backbone.patch)
            new = dict(zip(("change", "flip"), repaint(classifier, images, keep, held, shown == 0,
                                                       torch.Generator().manual_seed(number))))
            objects = shown if truth is None else truth[:, None].float()
            swapped = swap_backgrounds(images, objects)
            keep2, held2 = classifier.find(swapped, keep)
            x = classifier.features(images, held)
            new["swap"] = (classifier.head(x).argmax(1) != classifier.head(classifier.features(swapped, held2)).argmax(1)).float()
            new["iou"] = mask_iou(keep, keep2)
            if truth is not None:
                area = shown.sum((1, 2, 3))
                new["admitted"] = ((shown * (1 - objects)).sum((1, 2, 3)) / area)[area > 0]
        new["gradient"] = hidden_gradient(classifier, images, held, shown == 0)
        for name, x_ in new.items():
            rows.setdefault(name, []).append(x_.cpu())
        features.append(x.cpu())
        keeps.append(keep.cpu())
    row = {name: torch.cat(x).double() for name, x in rows.items()}
    average = lambda name: row[name].mean().item() if name in row and len(row[name]) else None
    probe = None
    if samples.places:
        place = samples.groups[indices] % len(samples.places)
        probe = {"representation": linear_probe(torch.cat(features), place), "mask": linear_probe(torch.cat(keeps), place),
                 "chance": torch.bincount(place).max().item() / len(place)}
    return {"images": len(indices), "mask": classifier.mask,
            "repaint": {"max_logit_change": row["change"].max().item(), "mean_logit_change": average("change"), "flip_rate": average("flip")},
            "gradient": {"max_abs": row["gradient"].max().item(), "mean_abs": average("gradient")},
            "swap": {"flip_rate": average("swap"), "mask_iou": average("iou") if classifier.mask == "found" else None},
            "admitted": average("admitted"), "probe": probe}


# ---------------------------------------------------------------- the report
def evaluate(model, samples, train_groups=None, rare=(), device="cpu", batch=32, leakage=500, workers=0):
    """Everything report.json says about a model on a split -> dict."""
    result = predict(model, samples, batch, device, workers)
    report = {"split": samples.split, "images": len(samples)}
    has_parts, two_stages = model.selector is not None, model.selector is not None and model.predictor is not None
    backbone = (model.selector or model.predictor).backbone
    stages = [("stage2", "logits", stage2_classifier)] if model.predictor is not None else []
    stages += [("stage1", "logits_stage1", stage1_classifier)] if has_parts else []
    for stage, key, classifier in stages:
        report[stage] = accuracies(result, samples, key, rare, train_groups)
    if has_parts:
        kept = result["keep"].mean(1)
        report["mask"] = {"kept_share": kept.double().mean().item(), "empty": int((result["keep"].sum(1) == 0).sum())}
    if "foreground" in result:
        both, found, true, neither = result["foreground"].double().sum(0).tolist()
        report["localisation"] = {"foreground_iou": both / max(1, both + found + true),
                                  "background_iou": neither / max(1, neither + found + true)}
    for stage, key, classifier in stages:
        name = "leakage_stage1" if stage == "stage1" and two_stages else "leakage"
        report[name] = measure_leakage(classifier(model), samples, backbone, device, batch, leakage)
    return report


def table(report):
    """The report as lines for a terminal: late (stage 1) beside early (stage 2), or the one that there is."""
    columns = [(title, report.get(stage), report.get(leak)) for title, stage, leak in
               (("late: stage 1", "stage1", "leakage_stage1" if "stage2" in report else "leakage"),
                ("early: stage 2" if "stage1" in report else "no mask", "stage2", "leakage")) if stage in report]
    def show(x):
        return "-" if x is None else "0" if x == 0 else f"{x:.4f}" if abs(x) < 0.1 else f"{x:.3f}"
    def row(name, values):
        return f"  {name:<42}" + "".join(f"{v:>16}" for v in values)
    lines = [row("", [title for title, *_ in columns])]
    for key, name in (("aa", "accuracy"), ("aa_train_weighted", "accuracy, groups weighted as in training"),
                      ("worst_group", "worst group"), ("worst_group_rare", "worst of the groups rare in training")):
        if key in columns[0][1]:
            lines.append(row(name, [show(acc[key]) for _, acc, _ in columns]))
    if len(columns[0][1]["groups"]) <= 8:
        for g, one in columns[0][1]["groups"].items():
            lines.append(row(f"  {g} (n = {one['n']})", [show(acc["groups"][g]["accuracy"]) for _, acc, _ in columns]))
    for *keys, name in (("repaint", "max_logit_change", "repaint: largest logit change"), ("repaint", "flip_rate", "repaint: predictions flipped"),
                        ("gradient", "max_abs", "gradient: largest at a hidden pixel"), ("swap", "flip_rate", "swap: predictions flipped"),
                        ("swap", "mask_iou", "swap: IoU of the masks"), ("admitted", "admitted: background in kept patches"),
                        ("probe", "representation", "probe: place from the representation"), ("probe", "mask", "probe: place from the mask alone"),
                        ("probe", "chance", "probe: chance")):
        values = []
        for _, _, leak in columns:
            for key in keys:
                leak = leak and leak.get(key)
            values.append(show(leak))
        lines.append(row(name, values))
    extra = [f"kept {report['mask']['kept_share']:.1%} of the patches, {report['mask']['empty']} empty masks"] if "mask" in report else []
    extra += [f"foreground IoU {report['localisation']['foreground_iou']:.3f}"] if "localisation" in report else []
    return "\n".join(lines + (["  " + "; ".join(extra)] if extra else []))


def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    for name in ("limit", "leakage", "workers"):
        if getattr(cfg, name) < 0:
            raise UsageError(f"--{name} must not be negative, not {getattr(cfg, name)}")
    if cfg.batch < 1:
        raise UsageError(f"--batch must be at least 1, not {cfg.batch}")
    device = pick_device(cfg.device)
    model, state = load_model(cfg.ckpt, device)
    trained = state["config"]
    name = cfg.data or trained["data"]
    if data.BENCHMARKS[name].classes != data.BENCHMARKS[trained["data"]].classes:
        raise UsageError(f"--data {name} has {data.BENCHMARKS[name].classes} classes, the checkpoint was trained on "
                         f"{trained['data']} with {data.BENCHMARKS[trained['data']].classes}")
    root = data.find_root(name, cfg.root or trained["root"], trained["mini"] and not cfg.root)
    splits = data.load(name, root, trained["size"], limit=cfg.limit or trained["limit"], splits=("train", cfg.split))
    if cfg.split not in splits:
        raise UsageError(f"{name} has no split {cfg.split} (it has: {', '.join(splits)})")
    samples, train = splits[cfg.split], splits["train"]
    report = {"data": name + "-mini" * (trained["mini"] and not cfg.root), "method": trained["method"], "seed": trained["seed"],
              "step": state["step"], "selection": state["best"],
              **evaluate(model, samples, train.groups, data.BENCHMARKS[name].rare, device, cfg.batch, cfg.leakage, cfg.workers)}
    folder = Path(cfg.ckpt).parent
    suffix = f"-{name}" * (name != trained["data"]) + f"-{cfg.split}" * (cfg.split != "test")
    chosen = state["best"]["split"]
    print(f"{cfg.ckpt} ({trained['method']}, step {state['step']}, chosen on {chosen}) on {report['data']} {cfg.split}, {len(samples)} images")
    print(table(report))
    write_json(folder / f"report{suffix}.json", report)
    written = [f"report{suffix}.json"]
    if model.selector is not None:
        figures.parts(model, samples, folder / f"parts{suffix}.png", device)
        written.append(f"parts{suffix}.png")
    print("  wrote " + " and ".join(str(folder / w) for w in written))


if __name__ == "__main__":
    run_script(main)
