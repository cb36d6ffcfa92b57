"""predict.py: a trained model on pictures: files of your own, or a split of a benchmark.

    python predict.py --ckpt runs/waterbirds-mini/best.pt bird.jpg holiday/          # a line and a figure for each
    python predict.py --ckpt runs/waterbirds-mini/best.pt bird.jpg --explain         # and without each part in turn
    python predict.py --weights dinov2 bird.jpg                                      # a backbone alone

    model = runs.load("runs/waterbirds-mini/best.pt")
    out = predict.on(model, ["bird.jpg"])
    out.maps, out.keep, out.names                        # (n, K+1, h, w), (n, N), ["waterbird"]

Writes predictions.csv, predictions.json and a figure per picture to --out. A picture may have any size, orientation and
format that Pillow reads; it is resized and cropped as in evaluation, or squashed with --squash. Files that are no
pictures are named and left out, and the exit status then is 1. train.py, evaluate.py and intervene.py use the lower
half: a model over a split.

Floor: commands, the lowest. Read runs.py first.
"""
import json
from collections import Counter
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps

import data
import runs
import vit
from baselines import background_seed
from benchmarks.files import eight_bits, is_our_picture, read_image, white_of
from benchmarks.transforms import FINE_GRAINED, View, squash, to_tensor, window
from ifam import limits_of
from interventions import apply_intervention
from measure.leakage import given, shown_under, told_keep
from measure.metrics import foreground_counts, pixel_counts
from runs import hash_of, outputs_of, pick_device, refuse_told
from settings import (RunError, UsageError, bounded, may_write, opt, parse, progress, run_script, write_csv, write_json,
                      write_whole)
from weights import load_start, reader


# ---------------------------------------------------------------- pictures of one's own
class Picture(NamedTuple):
    """A picture and what the model sees of it."""
    name: str
    original: Image.Image        # upright, RGB
    seen: tuple                  # left, top, right, bottom of what the model sees, in pixels of the original
    image: torch.Tensor          # (3, S, S), normalised
    normalisation: tuple         # by these means and deviations of the channels
    mask: torch.Tensor | None    # (S, S) in {0, 1}: a mask of one's own


class Prediction(NamedTuple):
    """What a model says of n pictures. A model without parts, or without a second stage, leaves fields None."""
    pictures: list               # of Picture
    classes: tuple               # names
    logits: torch.Tensor                         # (n, C)
    logits_stage1: torch.Tensor | None = None    # (n, C)          what stage 1 alone says
    maps: torch.Tensor | None = None             # (n, K+1, h, w)  part maps, background last
    keep: torch.Tensor | None = None             # (n, N)          1 = stage 2 saw this patch
    part_logits: torch.Tensor | None = None      # (n, K+1, N)     minus squared distance to the prototype of each
    without: torch.Tensor | None = None          # (n, K, C)       logits with each part left out, if asked for
    without_keep: torch.Tensor | None = None     # (n, K, N)       what was kept then
    shown: torch.Tensor | None = None            # (n, 1, S, S)    1 = stage 2 may see this pixel (of --trim); None: any
    grid: tuple = ()                             # (h, w) of keep

    @property
    def names(self):
        """The predicted classes, n names."""
        return [self.classes[c] for c in self.logits.argmax(1)]

    @property
    def parts(self):
        """The part that each patch went to, K for the background: (n, h, w)."""
        return self.part_logits.argmax(1).unflatten(1, self.maps.shape[2:])


def open_picture(image, size, pipeline=FINE_GRAINED, mask=None, squashed=False):
    """A path or PIL picture -> Picture, as a model of this size and pipeline sees it in evaluation.

    mask: a path or PIL picture of the same size, above 0 where the object is. squashed: the whole picture as a square
    instead. UsageError for what is no picture, or too long and narrow to be cropped.
    """
    original, name = opened(image, "RGB")
    mask = None if mask is None else opened(mask, "L")[0]
    if mask and mask.size != original.size:
        raise UsageError(f"the mask is {mask.width} x {mask.height} pixels, {name} is {original.width} x "
                         f"{original.height}: give a mask of its size")
    fit = squash if squashed else pipeline.evaluate
    if fit is not squash and max(original.size) / min(original.size) * size ** 2 > Image.MAX_IMAGE_PIXELS:
        raise UsageError(f"{name} is {original.width} x {original.height} pixels, too long and narrow to be cropped to "
                         "a square: add --squash, or cut it")
    view = View(original, mask, box=(0, 0, *original.size))
    fit(view, size)
    seen = np.array(window(view, size)) * (*original.size, *original.size)       # in pixels of the original
    mask = torch.from_numpy((np.asarray(view.mask) > 0).astype(np.uint8)) if mask else None
    image = to_tensor(view.image, pipeline.normalisation)
    return Picture(name, original, tuple(map(float, seen)), image, pipeline.normalisation, mask)


def opened(image, mode):
    """A path or a PIL picture -> (upright PIL picture of this mode, its name)."""
    if isinstance(image, Image.Image):
        name = getattr(image, "filename", "") or "the picture"
        return eight_bits(ImageOps.exif_transpose(image), mode, white_of(image)), name
    return read_image(Path(image), mode, upright=True), str(image)


def on(model, images, mask=None, squashed=False, explain=False, batch=32):
    """A model of runs.load on pictures of one's own -> Prediction.

    images: paths, PIL pictures, or what open_picture gave; mask, squashed: see there. Under a mask stage 2 sees the
    patches that are more than half object in it, instead of those that the model finds. explain: also without each part
    in turn. Raises UsageError for a picture that cannot be read, and for what a model does not have.
    """
    pictures = [x if isinstance(x, Picture) else open_picture(x, model.size, model.pipeline, mask, squashed)
                for x in images]
    if not pictures:
        raise UsageError("no pictures to predict")
    refuse_missing(model, pictures[0].mask is not None, explain)
    found = []
    model.eval()
    for start in range(0, len(pictures), batch):
        some = pictures[start:start + batch]
        found.append(run_on(model, some, explain))
        if not found[-1]["logits"].isfinite().all():
            raise RunError(f"{some[0].name}: the model's outputs are not finite; its weights overflowed in training")
    joined = {name: torch.cat([f[name] for f in found]) for name in found[0]}
    return Prediction(pictures, model.classes, grid=(model.predictor or model.selector).backbone.grid, **joined)


def refuse_missing(model, mask, explain):
    """UsageError for what this model cannot do: be told a mask, leave out parts."""
    reads_mask = model.predictor is not None and hasattr(model.predictor, "masking")
    if mask and not reads_mask:
        raise UsageError("--keep: this method has no second stage that sees under a mask; leave it out")
    refuse_told(model, "this model", "use evaluate.py, on a benchmark with true masks")
    if model.needs_truth and not mask:
        raise UsageError("this method is told where the object is: give --keep MASK")
    if explain and model.selector is None:
        raise UsageError("--explain: this method has no parts to leave out")
    if explain and mask:
        raise UsageError("--explain leaves out parts of the mask that the model finds: leave out --keep or --explain")


@torch.no_grad()
def run_on(model, pictures, explain):
    """One batch -> the tensors of a Prediction, on the CPU."""
    device = next(model.parameters()).device
    images = torch.stack([p.image for p in pictures]).to(device)
    keep = None
    if pictures[0].mask is not None:
        keep = told_keep(model, torch.stack([p.mask for p in pictures]).to(device))
    out = model(images, keep)
    found = {name: getattr(out, name) for name in ("logits", "logits_stage1", "maps", "keep", "part_logits", "shown")}
    if model.predictor is None:
        found["logits_stage1"] = None                    # it is the prediction
    if explain:
        features = model.selector.features(images)       # stage 1 is most of the cost
        each = [without(model, images, features, part) for part in range(model.selector.k)]
        found |= {"without": torch.stack([one.logits for one in each], 1),
                  "without_keep": torch.stack([one.keep for one in each], 1)}
    return {name: x.float().cpu() for name, x in found.items() if x is not None}


def without(model, images, features, part):
    """The Output for images (B, 3, S, S) with one part left out, beside what an intervention leaves out already.

    features (B, N, D): what stage 1 makes of the images, which is the same for every part.
    """
    before = model.selector.limits
    limits = limits_of(model.selector.k, [part]).to(images.device)
    model.selector.limits = limits if before is None else torch.minimum(limits, before)
    try:
        return model.second_stage(images, model.selector.select(features))
    finally:
        model.selector.limits = before


# ---------------------------------------------------------------- a backbone alone
def load_bare(weights, arch, size, registers):
    """--weights as train.py has it -> a ViT without a head. UsageError for weights that do not fit."""
    try:
        backbone = vit.build_vit(arch, size, registers)
    except ValueError as error:
        raise UsageError(f"--arch {arch} with --size {size}: {error}") from None
    load_start(backbone, weights, arch, reader(registers))
    return backbone.eval()


@torch.no_grad()
def look(backbone, pictures):
    """What a backbone alone says of pictures, before anything is trained -> {name: tensor}.

    "class_token" (n, D), "patches" (n, h, w, D); "keep" (n, h, w): the patches that are not background to FOUND's seed
    step; "components" (n, h, w, 3): the first principal components of each picture's patches, scaled to [0, 1].
    """
    images = torch.stack([p.image for p in pictures]).to(backbone.cls_token.device)
    tokens = backbone(images).float()
    patches = tokens[:, backbone.prefix:]
    centred = patches - patches.mean(1, keepdim=True)
    components = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:, :3].mT
    low, high = components.aminmax(dim=1, keepdim=True)
    maps = {"patches": patches, "keep": background_seed(*backbone.last_attention(images))[0],
            "components": (components - low) / (high - low).clamp_min(1e-12)}
    maps = {name: x.unflatten(1, backbone.grid).cpu() for name, x in maps.items()}
    return {"class_token": tokens[:, 0].cpu(), **maps}


# ---------------------------------------------------------------- a split of a benchmark
@dataclass
class OnCheckpoint:
    """The options of every script that takes a checkpoint and runs it on images."""
    ckpt: str = opt(MISSING, "checkpoint of train.py (best.pt or last.pt), or snapshot of the published code",
                    group="checkpoint and images")
    data: str = opt("", "another benchmark for the same model (cub: waterbird200; imagenet: imagenet9; folder: "
                        "pictures of your own, of the same classes); if not given, the one it was trained on, which a "
                        "published snapshot does not say", choices=("", *data.BENCHMARKS))
    root: str = opt("", "folder of the benchmarks, or of your own pictures, if it is not that of training")
    limit: int = opt(0, "use only N images of each split, spread evenly (0: as in training)", at_least=0)
    strict_data: bool = opt(False, "refuse a benchmark whose counts are not the published ones, or a folder with files "
                                   "that are odd; else a line says so")
    batch: int = opt(32, "images at once", at_least=1)
    workers: int = opt(0, "processes that load data", at_least=0)
    device: str = opt("auto", "auto, cpu, cuda or mps")

    def __post_init__(self):
        self.workers = bounded(self.workers)


def results_of(model, out, images, where):
    """What predict() returns of one batch, from the model's Output for it. RunError if a logit is not finite."""
    one, maps = {"logits": out.logits.float()}, out.maps
    if not (fine := one["logits"].isfinite().all(1)).all():
        raise RunError(f"{where}: the model's outputs are not finite, first for image "
                       f"{images['id'][int((~fine).nonzero()[0])]}: its weights overflowed in training")
    if maps is not None:
        one |= {"logits_stage1": out.logits_stage1.float(), "keep": model.mask(out)}
    elif out.keep is not None:                           # a mask without parts: one map for it, one for the rest
        one["keep"] = out.keep
        maps = torch.stack([out.keep, 1 - out.keep], 1).unflatten(2, model.predictor.backbone.grid)
    if maps is not None and "mask" in images:
        true = images["mask"].to(maps.device)
        one["foreground"] = foreground_counts(maps, true)
        seen = shown_under(one["keep"], out.shown, (model.predictor or model.selector).backbone)
        one["seen"] = pixel_counts(seen[:, 0] > 0, true.bool())
    return {name: x.cpu() for name, x in one.items()}


@torch.no_grad()
def predict(model, samples, batch=32, device="cpu", workers=0):
    """Run a model over a split -> tensors by name, a row a sample, in the order of the samples.

    "logits" (n, C), and where the model has them "logits_stage1" (n, C), "keep" (n, N) in {0, 1}, and where there are
    true masks "foreground" (n, 4), pixel counts of the parts, or of the mask that stage 2 was given, and "seen" (n, 4),
    those of what stage 2 sees. Processes share the work and gather by index: every sample is counted once, whatever
    their number.
    """
    model.eval()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = range(rank, len(samples), world)
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(samples, mine), batch, num_workers=workers)
    found = []
    for images in progress(loader, f"{samples.name} {samples.split}"):
        out = model(images["image"].to(device), **given(model, images, device))
        found.append(results_of(model, out, images, f"{samples.name} {samples.split}"))
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
    looked = {cfg.split, *here.sets} if not own else {"train", "val", cfg.split}  # images of other splits may be away
    splits = data.load(name, root, trained["size"], limit=cfg.limit or trained["limit"], check=looked,
                       val_share=trained.get("val_share", 0.0) * same, strict=cfg.strict_data)
    samples = data.measured(splits, cfg.split, next(f for f in fields(cfg) if f.name == "split").metadata["choices"])
    refuse_other_classes(cfg, state, samples, model)
    sets = {n: splits[n] for n in here.sets if n in splits and cfg.split == "test"}
    return data.report_name(samples, trained["mini"]), samples, splits.get("train"), sets


def own_splits(cfg, state, looked):
    """Training and validation split of the data that a checkpoint was trained on, whatever --data says.

    -> {name: Samples}. looked: the splits whose images must be there. --root is used where it holds these data, and not
    where it is another folder of one's own.
    """
    trained = state["config"]
    name, title = trained["data"], data.title_of(trained["data"], trained["root"])
    moved = cfg.root and ((cfg.data or name) != "folder" or data.title_of("folder", cfg.root) == title)
    root = data.find_root(name, cfg.root if moved else trained["root"], trained["mini"] and not moved)
    return data.load(name, root, trained["size"], limit=cfg.limit or trained["limit"], splits=("train", "val"),
                     check=looked, val_share=trained.get("val_share", 0.0), strict=cfg.strict_data)


def refuse_other_classes(cfg, state, samples, model):
    """UsageError unless the outputs of a model are the classes of these samples."""
    outputs = outputs_of(model)
    if samples.outputs != outputs:
        raise UsageError(f"--data {samples.name} needs {samples.outputs} classes, the checkpoint has {outputs}; "
                         "evaluate it on the data it was trained on")
    known = (state.get("dataset") or {}).get("classes", samples.classes)         # a published snapshot does not say
    if samples.name == "folder" and list(known) != list(samples.classes):
        differ = next((a, b) for a, b in zip(known, samples.classes) if a != b)
        raise UsageError(f"{samples.title} has other classes than {cfg.ckpt}, or in another order: {differ[1]} where "
                         f"the checkpoint has {differ[0]}; name its folders, or labels, as in training")


# ---------------------------------------------------------------- what is written
def row_of(out, i):
    """What predictions.json says of picture i of a Prediction -> dict."""
    def best(logits, count=1):
        p, order = logits.softmax(0).sort(descending=True)
        return [{"class": out.classes[c], "probability": p[n].item()} for n, c in enumerate(order[:count].tolist())]
    row = {"file": out.pictures[i].name, "prediction": best(out.logits[i])[0]["class"],
           "probability": best(out.logits[i])[0]["probability"]}
    if len(out.classes) > 2:
        row["best"] = best(out.logits[i], 5)
    if out.logits_stage1 is not None:
        row["stage1"] = best(out.logits_stage1[i])[0]
    if out.keep is not None:
        row["kept"] = out.keep[i].mean().item()
    if out.maps is not None:
        assigned = out.part_logits[i].argmax(0)
        row["parts"] = [(assigned == part).float().mean().item() for part in range(out.maps.shape[1] - 1)]
    if out.without is not None:
        chosen = out.logits[i].argmax()
        row["without"] = [{**best(logits)[0], "probability_of_prediction": logits.softmax(0)[chosen].item()}
                          for logits in out.without[i]]
    return row


def line_of(row, width, names):
    """A row as a line of the terminal; width: of the files' names, names: of the classes."""
    said = lambda answer, name="prediction": f"{answer[name][:names]:<{names}} {answer['probability']:.3f}"
    words = [f"{row['file'][-width:]:<{width}}"]
    words += [said(row)] if "prediction" in row else []
    words += [f"stage 1: {said(row['stage1'], 'class')}"] if "stage1" in row else []
    words += [f"kept {row['kept']:4.0%}"] if "kept" in row else []
    if "parts" in row:
        there = " ".join(f"{part}:{share:.0%}" for part, share in enumerate(row["parts"]) if share)
        words.append(f"parts {there or 'none'}")
    if "best" in row:
        words.append("then " + ", ".join(f"{b['class']} {b['probability']:.3f}" for b in row["best"][1:]))
    if "without" in row:
        there = [(p, answer) for p, answer in enumerate(row["without"]) if row["parts"][p]]
        words.append("without " + ", ".join(f"{p}: {a['class']} {a['probability']:.3f}" for p, a in there))
    return "  ".join(words)


def flat(row):
    """A row of predictions.json as one of predictions.csv."""
    cells = {key: row[key] for key in ("file", "prediction", "probability") if key in row}
    for n, best in enumerate(row.get("best", ())[1:], 2):
        cells |= {f"prediction_{n}": best["class"], f"probability_{n}": best["probability"]}
    if "stage1" in row:
        cells |= {"stage1": row["stage1"]["class"], "stage1_probability": row["stage1"]["probability"]}
    cells |= {"kept": row["kept"]} if "kept" in row else {}
    cells |= {f"part_{part}": share for part, share in enumerate(row.get("parts", ()))}
    for part, answer in enumerate(row.get("without", ())):
        cells |= {f"without_{part}": answer["class"], f"without_{part}_probability": answer["probability"]}
    return cells


def arrays_of(out, i):
    """What --arrays writes of picture i: the tensors of a Prediction that are there, by name."""
    found = {name: getattr(out, name) for name in ("logits", "logits_stage1", "maps", "part_logits", "without")}
    found = {name: x[i].numpy() for name, x in found.items() if x is not None}
    keep = {} if out.keep is None else {"keep": out.keep[i].view(out.grid).numpy()}
    return {"classes": np.array(out.classes), **found, **keep}


# ---------------------------------------------------------------- the command line
@dataclass
class Config:
    images: list[str] = opt(MISSING, "pictures, or folders of pictures", positional=True)
    ckpt: str = opt("", "checkpoint of train.py (best.pt or last.pt), or snapshot of the published code")
    weights: str = opt("", "instead of --ckpt: a backbone alone, as train.py has it (dinov2, dinov3, mini, a file). It "
                           "has no classes and no parts: shown are principal components of its features and FOUND's "
                           "mask")
    arch: str = opt("b", "of --weights: size of the vision transformer", choices=tuple(vit.ARCHS),
                    refused=vit.REFUSED)
    size: int = opt(518, "of --weights: image side in pixels", at_least=1)
    registers: int = opt(4, "of --weights: register tokens", at_least=0, at_most=1024)
    data: str = opt("", "benchmark of a published snapshot, which does not say it", choices=("", *data.BENCHMARKS))
    keep: str = opt("", "predict under this mask, a picture as large as the others, above 0 where the object is",
                    group="what is asked")
    intervention: str = opt("", "file of intervene.py: predict with these parts or patches removed")
    explain: bool = opt(False, "also predict with each part left out in turn")
    squash: bool = opt(False, "see the whole picture, squashed to a square, instead of its centre")
    out: str = opt("predictions", "folder to write to", group="what is written")
    figures: bool = opt(True, "a figure for each picture")
    arrays: bool = opt(False, "an .npz for each picture: maps, keep, part_logits, logits (of --weights: features)")
    force: bool = opt(False, "replace files that this script did not write")
    batch: int = opt(16, "pictures at once", at_least=1)
    device: str = opt("auto", "auto, cpu, cuda or mps")

    def __post_init__(self):
        if bool(self.ckpt) == bool(self.weights):
            raise UsageError("give either --ckpt (a trained model) or --weights (a backbone alone)")
        asked = [name for name in ("keep", "intervention", "explain", "data") if getattr(self, name)]
        if self.weights and asked:
            raise UsageError(f"--{asked[0]} needs a trained model: give --ckpt instead of --weights")


def find_pictures(given, out):
    """Files, and what lies in folders and their folders (not hidden, not in `out`) -> paths. UsageError for none."""
    found = {}
    for path in map(Path, given):
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder")
        hidden = lambda p: any(part.startswith(".") for part in p.relative_to(path).parts)
        below = [path] if not path.is_dir() else sorted(
            p for p in path.rglob("*") if p.is_file() and not hidden(p) and out.resolve() not in p.resolve().parents)
        if not below:
            raise UsageError(f"{path}: no files in this folder")
        found |= dict.fromkeys(below)
    return list(found)


def named(paths):
    """A name for the files of each picture, all different: its stem, or its whole path where that occurs twice."""
    stems = Counter(p.stem for p in paths)
    names = [p.stem if stems[p.stem] == 1 else "_".join(p.parts).strip("/_") for p in paths]
    count = Counter(names)                               # a/b.jpg and a_b.jpg
    return [name if count[name] == 1 else f"{name}-{i}" for i, name in enumerate(names)]


def ours(path):
    """Did this script write what is at path?"""
    if path.suffix == ".json":
        return {"model", "pictures"} <= json.loads(path.read_text()).keys()
    if path.suffix == ".csv":
        return path.read_text(encoding="utf-8").startswith("file,")
    with np.load(path) as arrays:
        return bool({"logits", "class_token"} & set(arrays.files))


def tables(folder):
    return folder / "predictions.csv", folder / "predictions.json"


def outputs(cfg, paths):
    """-> {path of a picture: {"figure": path, "arrays": path}} of what is asked for. UsageError if one is not free."""
    folder = Path(cfg.out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file; name a folder")
    wanted = {"figure": ".png"} if cfg.figures else {}
    wanted |= {"arrays": ".npz"} if cfg.arrays else {}
    written = {path: {kind: folder / f"{name}{suffix}" for kind, suffix in wanted.items()}
               for path, name in zip(paths, named(paths))}
    if folder.is_dir():
        inputs = {path.resolve() for path in paths}
        for path in [*tables(folder), *(p for each in written.values() for p in each.values())]:
            if path.resolve() in inputs:
                raise UsageError(f"{path} would be replaced by its own figure: choose another --out")
            may_write(path, is_our_picture if path.suffix == ".png" else ours, cfg.force)
    return written


class Answers:
    """The command line's model: opened from --ckpt or --weights; a batch of pictures -> rows, arrays and figures."""

    def __init__(self, cfg):
        device = pick_device(cfg.device)
        self.cfg, self.intervention = cfg, None
        if cfg.weights:
            self.model = load_bare(cfg.weights, cfg.arch, cfg.size, cfg.registers).to(device)
            self.size, self.pipeline, self.says = cfg.size, FINE_GRAINED, {"weights": cfg.weights, "arch": cfg.arch}
            print(f"--weights {cfg.weights}: a backbone alone has no classes and no parts; those need --ckpt")
            return
        self.model = runs.load(cfg.ckpt, device, cfg.data)
        self.size, self.pipeline = self.model.size, self.model.pipeline
        self.says = {"file": cfg.ckpt, "sha256": hash_of(cfg.ckpt), "classes": list(self.model.classes)}
        if cfg.intervention:
            self.intervention = apply_intervention(self.model, cfg.intervention, cfg.ckpt)
        refuse_missing(self.model, bool(cfg.keep), cfg.explain)
        if cfg.keep:
            opened(cfg.keep, "L")                        # before the first picture: is it one?

    def open(self, path):
        return open_picture(path, self.size, self.pipeline, self.cfg.keep or None, self.cfg.squash)

    def __call__(self, pictures):
        """-> [(row of predictions.json, arrays, a function that draws the figure to a path)]"""
        from measure import figures                      # here: train.py uses this file without matplotlib
        if self.cfg.weights:
            seen = look(self.model, pictures)
            each = [{name: x[i].numpy() for name, x in seen.items()} for i in range(len(pictures))]
            return [({"file": p.name, "kept": float(found["keep"].mean())}, found,
                     partial(figures.backbone_alone, p, found["components"], found["keep"]))
                    for p, found in zip(pictures, each)]
        out = on(self.model, pictures, explain=self.cfg.explain)
        return [(row_of(out, i), arrays_of(out, i), partial(figures.prediction, out, i)) for i in range(len(pictures))]


def answer_all(cfg, model, paths, written):
    """Answer pictures batch by batch, print and write what is found -> (rows, {path: why it was left out}).

    written: what `outputs` gave, the files of each picture.
    """
    rows, skipped, width = [], {}, min(40, max(len(str(path)) for path in paths))
    names = min(24, max(map(len, model.says.get("classes", [""]))))
    for start in range(0, len(paths), cfg.batch):
        pictures = {}
        for path in paths[start:start + cfg.batch]:
            try:
                pictures[path] = model.open(path)
            except UsageError as error:
                skipped[str(path)] = str(error)
                print(f"left out: {error}")
        for path, (row, arrays, draw) in zip(pictures, model(list(pictures.values())) if pictures else ()):
            Path(cfg.out).mkdir(parents=True, exist_ok=True)
            rows.append({**row, **{kind: str(at) for kind, at in written[path].items()}})
            print(line_of(row, width, names))
            if cfg.arrays:
                write_whole(written[path]["arrays"], partial(save_arrays, arrays))
            if cfg.figures:
                draw(written[path]["figure"])
    return rows, skipped


def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    paths = find_pictures(cfg.images, Path(cfg.out))
    written, model = outputs(cfg, paths), Answers(cfg)
    rows, skipped = answer_all(cfg, model, paths, written)
    if not rows:
        raise UsageError(f"none of {len(paths)} files can be used: {next(iter(skipped.values()))}")
    asked = {name: getattr(cfg, name) for name in ("keep", "squash", "explain")}
    table, report = tables(Path(cfg.out))
    write_csv(table, [flat(row) for row in rows])
    write_json(report, {"model": model.says, **asked, "intervention": model.intervention, "pictures": rows,
                        "left_out": skipped})
    print(f"  wrote {len(rows)} pictures to {table} and {report}")
    if skipped:
        raise RunError(f"{len(skipped)} of {len(paths)} files were left out: {', '.join(list(skipped)[:3])}"
                       + ", ..." * (len(skipped) > 3))


def save_arrays(arrays, path):
    with open(path, "wb") as file:                       # np.savez gives a path that has none its own suffix
        np.savez_compressed(file, **arrays)


if __name__ == "__main__":
    run_script(main)
