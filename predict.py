"""predict.py: a trained model over a split: train.py validates with it, evaluate.py and intervene.py begin with it.

    name, samples, train, sets = open_split(cfg, state, model)                   # the images of a checkpoint
    result = predict(model, samples)                     # {"logits": (n, C), "keep": (n, N), ...}

Floor: commands, the lowest. Read runs.py first.
"""
from dataclasses import MISSING, dataclass, fields

import torch
import torch.distributed as dist

import data
from benchmarks.samples import patch_keep
from measure.metrics import foreground_counts
from settings import RunError, UsageError, bounded, opt, progress


@dataclass
class OnCheckpoint:
    """The options of every script that takes a checkpoint and runs it on images."""
    ckpt: str = opt(MISSING, "checkpoint of train.py (best.pt or last.pt), or snapshot of the published code",
                    group="checkpoint and images")
    data: str = opt("", "another benchmark for the same model (cub: waterbird200; imagenet: imagenet9); if not given, "
                        "the one it was trained on, which a published snapshot does not say",
                    choices=("", *data.BENCHMARKS))
    root: str = opt("", "folder of the benchmarks, if they moved since training")
    limit: int = opt(0, "use only N images of each split, spread evenly (0: as in training)", at_least=0)
    strict_data: bool = opt(False, "refuse a benchmark whose counts are not the published ones; else a line says so")
    batch: int = opt(32, "images at once", at_least=1)
    workers: int = opt(0, "processes that load data", at_least=0)
    device: str = opt("auto", "auto, cpu, cuda or mps")

    def __post_init__(self):
        self.workers = bounded(self.workers)


def given_mask(model, batch, device):
    """True mask of a batch's images as patches (B, N), for the baselines that are given it; None for all others."""
    return patch_keep(batch["mask"].to(device), model.predictor.backbone.patch) if model.needs_truth else None


@torch.no_grad()
def predict(model, samples, batch=32, device="cpu", workers=0):
    """Run a model over a split -> tensors by name, a row a sample, in the order of the samples.

    "logits" (n, C), and where the model has them "logits_stage1" (n, C), "keep" (n, N) in {0, 1}, "foreground" (n, 4)
    pixel counts of the parts, or of the mask that stage 2 was given. Processes share the work and gather by index:
    every sample is counted once, whatever their number.
    """
    model.eval()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = range(rank, len(samples), world)
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(samples, mine), batch, num_workers=workers)
    found = []
    for images in progress(loader, f"{samples.name} {samples.split}"):
        out = model(images["image"].to(device), given_mask(model, images, device))
        one = {"logits": out.logits.float()}
        if not (fine := one["logits"].isfinite().all(1)).all():
            raise RunError(f"{samples.name} {samples.split}: the model's outputs are not finite, first for image "
                           f"{images['id'][int((~fine).nonzero()[0])]}: its weights overflowed in training")
        maps = out.maps
        if maps is not None:
            one |= {"logits_stage1": out.logits_stage1.float(), "keep": model.mask(out)}
        elif out.keep is not None:                       # a mask without parts: one map for it, one for the rest
            one["keep"] = out.keep
            maps = torch.stack([out.keep, 1 - out.keep], 1).unflatten(2, model.predictor.backbone.grid)
        if maps is not None and "mask" in images:
            one["foreground"] = foreground_counts(maps, images["mask"].to(device))
        found.append({name: x.cpu() for name, x in one.items()})
    pieces = [(list(mine), {name: torch.cat([f[name] for f in found]) for name in found[0]} if found else {})]
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, pieces[0])
        pieces = [p for p in gathered if p[0]]
    order = torch.tensor([i for indices, _ in pieces for i in indices]).argsort()
    return {name: torch.cat([p[name] for _, p in pieces])[order] for name in pieces[0][1]}


def open_split(cfg, state, model):
    """-> (name for the report, the split to measure on, the training split or None, {name: other sets}).

    state: the checkpoint. A folder of one's own without a test split is measured on its validation split, said so.
    """
    trained = state["config"]
    name = cfg.data or trained["data"]
    here, own = data.BENCHMARKS[name], name == "folder"
    if not own and trained["data"] not in (name, here.trained_on):
        raise UsageError(f"--data {name} has {here.classes} classes that are not those of {trained['data']} "
                         f"({data.BENCHMARKS[trained['data']].classes}), which the checkpoint was trained on; evaluate "
                         f"a model of {here.trained_on or name}")
    if own and trained["data"] != name and not cfg.root:
        raise UsageError(f"--data folder needs --root PATH, the folder: {cfg.ckpt} was trained on {trained['data']}")
    root = data.find_root(name, cfg.root or trained["root"], trained["mini"] and not own and not cfg.root)
    same = data.title_of(name, root) == data.title_of(trained["data"], trained["root"])
    looked = {cfg.split, *here.sets, *["val"] * (own and cfg.split == "test")}   # images of other splits may be away
    splits = data.load(name, root, trained["size"], limit=cfg.limit or trained["limit"], check=looked,
                       val_share=trained.get("val_share", 0.0) * same, strict=cfg.strict_data)
    samples = data.measured(splits, cfg.split, next(f for f in fields(cfg) if f.name == "split").metadata["choices"])
    refuse_other_classes(cfg, state, samples, model)
    sets = {n: splits[n] for n in here.sets if n in splits and cfg.split == "test"}
    title = f"folder {samples.title}" if own else name + "-mini" * trained["mini"]
    return title, samples, splits.get("train"), sets


def refuse_other_classes(cfg, state, samples, model):
    """UsageError unless the outputs of a model are the classes of these samples."""
    outputs = (model.predictor.head if model.predictor else model.selector.classifier).out_features
    if samples.outputs != outputs:
        raise UsageError(f"--data {samples.name} needs {samples.outputs} classes, the checkpoint has {outputs}; "
                         "evaluate it on the data it was trained on")
    known = state.get("dataset", {}).get("classes")
    if samples.name == "folder" and known and list(known) != list(samples.classes):
        differ = next((a, b) for a, b in zip(known, samples.classes) if a != b)
        raise UsageError(f"{samples.title} has other classes than {cfg.ckpt}, or in another order: {differ[1]} where the "
                         f"checkpoint has {differ[0]}; name its folders, or labels, as in training")
