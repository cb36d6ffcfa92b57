"""groups.py: groups that nobody labelled: what a first model gets wrong, or clusters of what it has learned.

    python groups.py --ckpt runs/waterbirds-mini-erm/best.pt --by errors             # JTT
    python groups.py --ckpt runs/waterbirds-mini-erm/best.pt --by clusters           # GEORGE
    python groups.py --ckpt runs/waterbirds-mini/best.pt --by background             # from iFAM's own mask
    python train.py --data waterbirds --mini --method erm --objective group-dro --groups FILE

Writes groups-<by>.csv beside the checkpoint, a line of id and group for each training image, and a .json of the same
name that says of which checkpoint it is. The true groups are read by no part of this but the table that is printed: how
well they agree is a measurement. Nothing depends on chance: two runs write the same file.

Floor: commands. Read predict.py first. Letters: n images, d numbers of each, k clusters; others as in ifam.py.
"""
import json
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch

import data
from benchmarks.files import digest_of_groups, write_groups
from ifam import masked_mean, regrid
from measure.clusters import cluster
from measure.metrics import ari, over
from measure.retrain import read_by_head
from predict import OnCheckpoint, own_splits, predict
from runs import hash_of, load_model, pick_device
from settings import UsageError, may_write, opt, parse, run_script, write_json


@dataclass(kw_only=True)                                 # --by is required
class Config(OnCheckpoint):
    by: str = opt(MISSING, "errors: right and wrong in the evaluation view; clusters: of each class, in what the head "
                           "reads; background: of what the mask refuses, over all classes, crossed with them",
                  choices=("errors", "clusters", "background"), group="groups")
    clusters: int = opt(0, "how many clusters, of each class or of the backgrounds (0: 2 to 5, those with the best "
                           "silhouettes)", at_least=0, at_most=100, refused={1: "that is no clustering; take 2"})
    out: str = opt("", "file to write (default groups-<by>.csv beside the checkpoint)", group="output")
    force: bool = opt(False, "replace files that this script did not write")

    def __post_init__(self):
        super().__post_init__()
        self.out = self.out or str(Path(self.ckpt).parent / f"groups-{self.by}.csv")


# ---------------------------------------------------------------- what is clustered
@torch.no_grad()
def backgrounds(model, samples, device="cpu", batch=32, workers=0):
    """What stage 1's backbone makes of refused patches -> (their mean feature (n, D), share that is refused (n,)).

    It sees nothing else: kept patches are hidden from it by a hard, early mask, so that no pixel of the object can move
    these features.
    """
    selector = model.selector

    def measure(part):
        images = part["image"].to(device)
        kept = model.mask(selector(images))
        refused = 1 - regrid(kept[:, None], model.grid, selector.backbone.grid)[:, 0]
        patches = selector.backbone(selector.shrink(images), refused)[:, selector.backbone.prefix:]
        return {"features": masked_mean(patches, refused).float().cpu(), "share": refused.mean(1).cpu()}
    found = over(samples, measure, batch, workers)
    return found["features"], found["share"]


def by_errors(model, samples, cfg, **how):
    """"right" or "wrong" for each sample: JTT's error set, of one fixed model -> (names, {})."""
    wrong = samples.answers(predict(model, samples, **how)["logits"]) != samples.labels
    if wrong.all() or not wrong.any():
        advice = "it is no classifier yet: train it for more" if wrong.all() else \
            "there is nothing to weigh: train it for fewer"
        raise UsageError(f"{cfg.ckpt} has {'everything' if wrong.all() else 'nothing'} wrong in training, and {advice} "
                         "epochs")
    return ["wrong" if x else "right" for x in wrong], {}


def by_clusters(model, samples, cfg, **how):
    """Clusters of each class, as GEORGE has them -> (names, {class: silhouette}).

    Of two classes: clusters of one number, the distance to the decision boundary, which is the difference of the two
    logits up to a factor. Of more: of what the head reads.
    """
    if samples.outputs == 2:
        logits = predict(model, samples, **how)["logits"]
        x = logits[:, 1:] - logits[:, :1]
    else:
        x = read_by_head(model, samples, **how)
    names, scores = [""] * len(samples), {}
    for label, name in enumerate(samples.classes):
        mine = (samples.labels == label).nonzero()[:, 0]
        if len(mine):
            found, scores[name] = cluster(x[mine], cfg.clusters)
            for i, c in zip(mine.tolist(), found.tolist()):
                names[i] = f"{name}, cluster {c}"
    if not any(score is not None for score in scores.values()):
        raise UsageError(f"{cfg.ckpt}: no class of {samples.name} falls into {cfg.clusters or 'two'} clusters; take "
                         "another checkpoint" + " or another number of --clusters" * bool(cfg.clusters))
    return names, scores


def by_background(model, samples, cfg, **how):
    """Clusters of the refused patches over all classes, crossed with the class -> (names, {"background": silhouette}).

    An image of which nothing is refused has no background, and goes with the largest cluster; a line says how many.
    """
    x, share = backgrounds(model, samples, **how)
    some = share > 0
    if not some.any():
        raise UsageError(f"{cfg.ckpt} keeps every patch of every image: there is no background to cluster; take "
                         "another checkpoint")
    if not some.all():
        print(f"{int((~some).sum())} images, of which nothing is refused, go with the largest cluster")
    found = torch.zeros(len(x), dtype=torch.long)
    found[some], score = cluster(x[some], cfg.clusters)
    if score is None:
        raise UsageError(f"{cfg.ckpt}: the backgrounds of {samples.name} do not fall into {cfg.clusters or 'two'} "
                         "clusters; take another checkpoint")
    return [f"{samples.classes[label]}, background {c}" for label, c in zip(samples.labels, found)], \
        {"background": score}


BY = {"errors": by_errors, "clusters": by_clusters, "background": by_background}


# ---------------------------------------------------------------- the command
def training_split(cfg, state):
    """The training images of a checkpoint, as it was trained on them -> Samples."""
    trained = state["config"]["data"]
    if cfg.data not in ("", trained):
        raise UsageError(f"--data {cfg.data}: groups are those of the training images of {cfg.ckpt}, which are of "
                         f"{trained}; leave it out")
    return own_splits(cfg, state, ("train",))["train"]


def check(cfg, model, samples, method):
    """UsageError for groups that this model cannot make, before it runs."""
    if model.needs_truth and samples.masks is None:
        raise UsageError(f"{cfg.ckpt} is of the method {method}, which needs true masks, and {samples.name} train has "
                         "none here; unpack its segmentations, or name another --ckpt")
    if cfg.by == "background" and model.selector is None:
        raise UsageError(f"--by background: {cfg.ckpt} is of the method {method}, which learns no mask; name a "
                         "checkpoint of ifam or pdiscoformer, or another --by")


def outputs(cfg):
    """-> paths of the groups and of what is said of them; UsageError if they are not free."""
    if cfg.clusters and cfg.by == "errors":
        raise UsageError(f"--clusters {cfg.clusters} means nothing with --by errors: leave it out")
    out = Path(cfg.out)
    if out.suffix != ".csv":
        raise UsageError(f"--out {out}: name a file that ends in .csv")
    may_write(out, lambda path: path.read_text(encoding="utf-8").startswith("id,group\n"), cfg.force)
    may_write(out.with_suffix(".json"), lambda path: {"checkpoint", "by"} <= json.loads(path.read_text()).keys(),
              cfg.force)
    return out, out.with_suffix(".json")


def agreement(names, samples):
    """Adjusted Rand index of groups with the true places within each class that has several -> {class: it}."""
    if len(samples.places) < 2:
        return {}
    number = {name: g for g, name in enumerate(dict.fromkeys(names))}
    groups = torch.tensor([number[name] for name in names])
    return {name: ari(groups[mine], samples.groups[mine]) for label, name in enumerate(samples.classes)
            if len(samples.groups[mine := samples.labels == label].unique()) > 1}


def table(names, samples, agree):
    """Groups and their sizes, beside the true groups where there are few -> text."""
    true = samples.group_names if agree and len(samples.group_names) <= 6 else []
    wide = max(map(len, names))
    lines = [f"  {'':{wide}}{'images':>10}" + "".join(f"  {name}" for name in true)]
    for name in sorted(set(names)):
        mine = samples.groups[[other == name for other in names]]
        counts = mine.bincount(minlength=len(samples.group_names)).tolist()
        lines.append(f"  {name:{wide}}{len(mine):>10}" + "".join(f"{n:>{2 + len(at)}}" for n, at in zip(counts, true)))
    if agree:
        lines.append("  adjusted Rand index with the true places, measured afterwards: "
                     + ", ".join(f"{name} {value:.2f}" for name, value in list(agree.items())[:6]))
    return "\n".join(lines)


def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    device = pick_device(cfg.device)
    out, about = outputs(cfg)
    model, state = load_model(cfg.ckpt, device, cfg.data)
    samples = training_split(cfg, state)
    check(cfg, model, samples, state["config"]["method"])
    names, scores = BY[cfg.by](model, samples, cfg, device=device, batch=cfg.batch, workers=cfg.workers)
    agree = agreement(names, samples)
    name = data.report_name(samples, state["config"].get("mini", False))
    print(f"{cfg.ckpt}: groups of {name} train by {cfg.by}")
    print(table(names, samples, agree))
    write_groups(out, samples.ids, names)
    write_json(about, {"checkpoint": {"file": Path(cfg.ckpt).name, "sha256": hash_of(cfg.ckpt)}, "by": cfg.by,
                       "clusters": cfg.clusters, "data": name, "sha256": hash_of(out), "silhouettes": scores,
                       "digest": digest_of_groups(names),
                       "groups": {group: names.count(group) for group in sorted(set(names))},
                       "adjusted_rand_index_measured": agree})
    print(f"  wrote {out}; train with: python train.py ... --groups {out}")


if __name__ == "__main__":
    run_script(main)
