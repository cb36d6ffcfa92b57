"""evaluate.py: what a trained model can do, and what its mask really hides.

    python evaluate.py --ckpt runs/waterbirds-mini/best.pt
    python evaluate.py --ckpt runs/waterbirds/best.pt --root /data --split val
    python evaluate.py --ckpt runs/waterbirds-mini/best.pt --encoding   # and what the selection of patches tells
    python evaluate.py --ckpt runs/waterbirds-mini/best.pt --retrain dfr     # with a new last layer: report-dfr.json
    python evaluate.py --ckpt snapshot_best.pt --data cub               # written by the published two-stage code

Writes report.json and parts.png beside the checkpoint: accuracy by group, the parts against true masks and keypoints,
and leakage, that is, each way in which the background can reach a prediction, for the early mask (stage 2) beside the
late one (stage 1). Nothing is drawn at random: two runs write the same report.

Floor: commands. Read predict.py and measure/ first; what is here is the list of measurements. Letters: ifam.py.
"""
import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import speed
import train
from benchmarks.files import is_our_picture
from benchmarks.transforms import normalised
from interventions import apply_intervention, describe_intervention
from measure import between, encoding, figures, retrain
from measure.leakage import (Seen, given, has_place, measure_leakage, place_of_mask, pools_of, stage1_classifier,
                             stage2_classifier)
from measure.metrics import (Landmarks, accuracies, ari, foreground_ious, in_unit_range, keypoint_error, landmarks,
                             landmarks_of, nmi, over)
from measure.shape import SHAPE
from predict import OnCheckpoint, open_split, own_splits, predict, results_of
from runs import Config as RunConfig
from runs import as_published, differences, has, hash_of, load_model, pick_device, read_config, refuse_told, trained
from settings import UsageError, may_write, opt, parse, progress, recorded, run_script, write_json


@dataclass
class Config(OnCheckpoint):
    split: str = opt("test", "which images to measure on", choices=data.SPLITS, group="measures")
    intervention: str = opt("", "intervention.json of intervene.py for this checkpoint, to measure the corrected model")
    retrain: str = opt("", "measure the model with a new last layer: dfr, fitted on validation with its groups; afr, "
                           "the same without groups; pca, a probe on principal components of the features; lle, an "
                           "ensemble of two heads, one for swapped backgrounds", choices=("", *retrain.TITLES))
    leakage: int = opt(500, "images that leakage is measured on, spread evenly over the split (0: all)", at_least=0)
    fitted: bool = opt(True, "also measure what is fitted on the training images first: keypoint regression, and the "
                       "clean contrast (half of the time)")
    kp_normalise: bool = opt(False, "keypoint metrics: normalise images as in training; the published ones are taken "
                             "without")
    per_part: bool = opt(False, "also let stage 2 see one part at a time: what each part says alone, and what its "
                         "representation knows of the other parts")
    speed: bool = opt(False, "also measure time, operations and memory, relative to one dense ViT")
    encoding: bool = opt(False, "also what the selection of patches tells of the answer; trains an evaluator on random "
                         "masks first, once, in the folder encoding beside the checkpoint")
    adversarial: bool = opt(False, "imagenet9: each object on every background until one fools the model (hours)")
    out: str = opt("", "file to write (default report.json beside the checkpoint, or report-<what differs>.json; a "
                       "picture of the parts lies beside it)", group="output")
    force: bool = opt(False, "replace a file that this script did not write")


# ---------------------------------------------------------------- localisation
def localisation(model, result, samples, train=None, kp_normalise=False, known=None, **loading):
    """The parts against what is annotated -> dict, empty without annotations or parts. result: what predict returned.

    Masks: the IoUs. Keypoints: nmi and ari (the part under a keypoint against its name), and kp, which is fitted on
    the training split; where that cannot be done kp is None and "kp_skipped" says why. Protocols: metrics.py. known:
    a function from a split to its landmarks, if they are at hand.
    """
    known = known or (lambda some: landmarks(model.selector, some, kp_normalise, **loading))
    out = foreground_ious(result["foreground"]) if "foreground" in result else {}
    if model.selector is None or not samples.points:
        return out
    test = known(samples)
    visible = test.points[..., 2] > 0
    names = torch.arange(visible.shape[1]).expand_as(visible)[visible]
    both = (names, test.clusters[visible])
    out |= {"kp": None, "nmi": nmi(*both) if len(names) else None, "ari": ari(*both) if len(names) else None,
            "kp_normalise": kp_normalise}
    if train is None:
        out["kp_skipped"] = "the training images are not all on disk, or --no-fitted left them out"
    elif not train.points:
        out["kp_skipped"] = "the training images have no keypoints on disk"
    elif samples.boxes is None or train.boxes is None:
        out["kp_skipped"] = "bounding_boxes.txt is not there"
    else:
        try:
            out["kp"] = keypoint_error(known(train), test)
        except ValueError as reason:                     # few images may not show every landmark
            out["kp_skipped"] = str(reason)
    return out


# ---------------------------------------------------------------- the judge of a selection
def evaluator_of(cfg, state, device):
    """Stage 2 trained on random masks with the settings of the run -> (the model, what the report says of it).

    It lies in the folder `encoding` beside the checkpoint. One that is there is used again, or resumed; if it has other
    settings it is moved aside. Errors are those of train.py.
    """
    folder, method = Path(cfg.ckpt).parent / "encoding", "early-random"
    settings = {name: x for name, x in recorded(RunConfig, state["config"], cfg.ckpt).items() if has(method, name)}
    where = {"root": cfg.root} if cfg.root and not cfg.data else {}
    own = RunConfig(**{**settings, **where, "method": method, "out": str(folder), "device": cfg.device})
    fits = (folder / "config.json").is_file() and not differences(read_config(folder / "config.json"), own)
    if not fits or not trained(folder / "log.jsonl"):
        print(f"--encoding: an evaluator is trained on random masks, in {folder}", flush=True)
        own.resume = fits
        train.train(own)
    model, found = load_model(folder / "best.pt", device)
    return model, {"method": method, "seed": own.seed, "epochs": own.epochs, "step": found["step"],
                   "selection": found["best"], "sha256": hash_of(folder / "best.pt")}


def measure_encoding(cfg, model, evaluator, samples, device):
    """encoding.measure_encoding of a model on a split, under the masks that it finds now -> dict for report.json.

    evaluator: what evaluator_of gave.
    """
    evaluator, about = evaluator
    keep = predict(model, samples, cfg.batch, device, cfg.workers)["keep"]
    return {**encoding.measure_encoding(model, evaluator, samples, keep, device, cfg.batch, cfg.workers),
            "evaluator": about}


# ---------------------------------------------------------------- one pass
def wanted(model, samples, train):
    """What a pass over the split that is measured, and one over the training split, have to find -> two sets of names.

    "predict", "landmarks" and "pools": what predict, landmarks and pool_by_place return.
    """
    here, there = {"predict"}, set()
    if model.selector is not None and samples.points:
        here.add("landmarks")
        if train is not None and train.points and samples.boxes is not None and train.boxes is not None:
            there.add("landmarks")
    if train is not None and has_place(train, samples):
        here, there = here | {"pools"}, there | {"pools"}
    return here, there


@torch.no_grad()
def one_pass(model, samples, names, kp_normalise=False, device="cpu", batch=32, workers=0):
    """A split, each image read once and seen by stage 1 once under each normalisation -> {name of `wanted`: result}.

    The numbers are those of predict, landmarks and pool_by_place, bit for bit: a test compares them.
    """
    if not names:
        return {}
    selector, where = model.selector, f"{samples.name} {samples.split}"
    shown = in_unit_range(samples)
    shown.masks = samples.masks if names - {"landmarks"} else None               # of masks nothing asks
    model.eval()

    def measure(part):
        raw, found = part["image"], {}
        images = normalised(raw, samples.normalisation).to(device)
        features = selector.features(images) if selector and (names - {"landmarks"} or kp_normalise) else None
        first = None if features is None else selector.select(features)
        if "predict" in names:
            told = given(model, part, device)
            out = model.second_stage(images, first, **told) if first else model(images, **told)
            found["predict"] = results_of(model, out, part, where)
        if "landmarks" in names:
            maps = (first if kp_normalise else selector(raw.to(device))).maps
            found["landmarks"] = landmarks_of(maps, part, samples.size)
        if "pools" in names:
            how = (selector.shrink, features) if selector else ()
            found["pools"] = pools_of((selector or model.predictor).backbone, images, part["mask"].to(device), *how)
        return {(name, key): x for name, rows in found.items() for key, x in rows.items()}
    rows, found = over(shown, measure, batch, workers), {name: {} for name in names}
    for (name, key), x in rows.items():
        found[name][key] = x
    return {name: Landmarks(**x) if name == "landmarks" else x for name, x in found.items()}


# ---------------------------------------------------------------- the report
def predict_more(model, samples, known, **how):
    """Logits as predict() gives them; an image in `known`, {path: its logits by name}, is not computed again."""
    new = [i for i, path in enumerate(samples.paths) if path not in known]
    if new:
        result = predict(model, copy.copy(samples).keep(new), **how)
        remember(known, [samples.paths[i] for i in new], result)
    rows = [known[path] for path in samples.paths]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def remember(known, paths, result):
    logits = {key: x for key, x in result.items() if key.startswith("logits")}
    known.update((path, {key: x[i] for key, x in logits.items()}) for i, path in enumerate(paths))


def measure_sets(model, samples, result, sets, metrics, **how):
    """Accuracy on the other sets of a benchmark, {name: Samples} -> {name: {"images", "stage1", "stage2"}}."""
    known, out = {}, {}
    if sets:
        remember(known, samples.paths, result)
    for name, some in sets.items():
        found = predict_more(model, some, known, **how)
        out[name] = {"images": len(some)}
        for stage, key in stages_of(model):
            out[name][stage] = only(metrics, accuracies(found, some, key))
    return out


def stages_of(model):
    """The stages that classify, first the one that counts: ((name in the report, key of its logits), ...)."""
    both = (("stage2", "logits"), ("stage1", "logits_stage1"))
    return both if model.predictor and model.selector else both[:1] if model.predictor else both[1:]


def only(metrics, numbers):
    """What the benchmark reports, with its intervals, and the groups."""
    return {name: value for name, value in numbers.items() if name.removesuffix("_interval") in (*metrics, "groups")}


def background_gap(found, stage):
    """ImageNet-9's BG-GAP, in points: what a background of a random class costs against one of the same class."""
    return 100 * (found["mixed_same"][stage]["aa"] - found["mixed_rand"][stage]["aa"])


def adversarial(model, originals, backgrounds, device="cpu", batch=32, workers=0):
    """ImageNet-9's adversarial-background challenge -> {"challenge_accuracy", "vulnerable", "classes"}, in percent.

    Every object, cut out by its mask, is pasted on every background until one prediction is not its class: such an
    object is vulnerable, whatever the model says of the original image. Challenge accuracy: 100 - % vulnerable.
    All backgrounds are held in memory: 2.4 GB for the 4,050 of the benchmark.
    """
    read = lambda some, size, what: progress(torch.utils.data.DataLoader(some, size, num_workers=workers), what)
    scenes = [part["image"] for part in read(backgrounds, batch, "backgrounds")]
    vulnerable = torch.tensor([fooled(model, originals, sample, scenes, device)
                               for sample in read(originals, None, "objects on them")], dtype=torch.float64)
    share = lambda some: 100 * (1 - some.mean().item())
    return {"challenge_accuracy": share(vulnerable), "vulnerable": int(vulnerable.sum()), "objects": len(originals),
            "backgrounds": len(backgrounds), "classes": {name: share(vulnerable[originals.labels == c]) for c, name in
                                                         enumerate(originals.classes) if (originals.labels == c).any()}}


@torch.no_grad()
def fooled(model, originals, sample, scenes, device):
    """Does any of the backgrounds, a list of (B, 3, S, S), change the answer? Stops at the first portion that does."""
    mask, image = sample["mask"][None].float(), sample["image"]
    for portion in scenes:
        logits = model((mask * image + (1 - mask) * portion).to(device)).logits.float().cpu()
        if (originals.answers(logits) != sample["label"]).any():
            return True
    return False


def evaluate(model, samples, train=None, rare=(), device="cpu", batch=32, leakage=500, workers=0, sets=None,
             kp_normalise=False, fitted=True):
    """Everything report.json says about a model on a split -> dict.

    train: the training split, where there is one; what is fitted on its images is left out if they are not all on
    disk, or if nobody wants it (fitted). sets: {name: Samples} to measure accuracy on as well.
    """
    comparable = train is not None and train.places == samples.places      # SIIM knows tubes of its test images alone
    train_groups = train.groups if comparable else None
    train = train if fitted and train is not None and train.on_disk() else None
    metrics, loading = data.BENCHMARKS[samples.name].metrics, dict(device=device, batch=batch, workers=workers)
    passes = [(some, one_pass(model, some, names, kp_normalise, **loading))
              for some, names in zip((samples, train), wanted(model, samples, train))]
    known = lambda name: lambda some: next(found for split, found in passes if split is some)[name]
    result = known("predict")(samples)
    report = {"split": samples.split, "images": len(samples)}
    stages = [("stage2", "leakage", "logits", stage2_classifier)] if model.predictor else []
    if model.selector:
        stages.append(("stage1", "leakage_stage1" if stages else "leakage", "logits_stage1", stage1_classifier))
    if "keep" in result:
        kept = result["keep"].sum(1)
        report["mask"] = {"kept_share": kept.mean().item() / result["keep"].shape[1], "empty": int((kept == 0).sum())}
        if "seen" in result:
            report["mask"] |= {"iou": foreground_ious(result["seen"])["foreground_iou"]}
    for stage, _, key, _ in stages:
        report[stage] = only(metrics, accuracies(result, samples, key, rare, train_groups))
    if found := localisation(model, result, samples, train, kp_normalise, known("landmarks")):
        report["localisation"] = found
    if sets:
        report["sets"] = found = measure_sets(model, samples, result, sets, metrics, **loading)
        if {"mixed_same", "mixed_rand"} <= found.keys():
            report["bg_gap"] = {stage: background_gap(found, stage) for stage, _ in stages_of(model)}
    backbone = (model.predictor or model.selector).backbone                      # whose patches a mask hides
    seen = Seen(model.selector)
    leaks = measure_leakage([classifier(model, seen) for *_, classifier in stages], samples, backbone, device, leakage)
    report |= {leak: found for (_, leak, *_), found in zip(stages, leaks)}
    if report["leakage"] and train is not None:
        pools = [found["pools"] for _, found in reversed(passes)] if has_place(train, samples) else None
        report["leakage"]["place_of_mask"] = place_of_mask(model, train, samples, known=pools)
    return report


ROWS = (  # of the table: where a number stands in the report, and what it is
    ("accuracy", "aa"), ("accuracy, groups weighted as in training", "aa_train_weighted"),
    ("worst group", "worst_group"),
    ("worst of the groups that are rare in training", "worst_group_rare"), ("AUROC, times 100", "auroc"),
    ("repaint: largest logit change", "leak.repaint.max_logit_change"),
    ("repaint: predictions flipped", "leak.repaint.flip_rate"),
    ("gradient: largest at a hidden pixel", "leak.gradient.max_abs"),
    ("swap: predictions flipped", "leak.swap.flip_rate"), ("swap: IoU of the two masks", "leak.swap.mask_iou"),
    ("admitted: background in kept patches", "leak.admitted"),
    ("probe: place from the representation", "leak.probe.representation"),
    ("probe: place from the mask alone", "leak.probe.mask"),
    *((f"  from {what}", f"leak.probe.shape.{name}") for name, what in SHAPE.items()),
    ("probe: chance", "leak.probe.chance"))
LOCALISATION = (("foreground IoU", "foreground_iou"), ("foreground IoU, mean over images", "foreground_iou_mean"),
                ("background IoU", "background_iou"), ("keypoint regression: error, in boxes", "kp"),
                ("keypoints: NMI of part and name", "nmi"), ("keypoints: ARI of part and name", "ari"))


def table(report, second="early, hard"):
    """The report as text: stage 1 (late, soft) beside stage 2 (whose mask is `second`), or the one that there is."""
    columns = {}
    if "stage1" in report:
        leak = report["leakage_stage1" if "stage2" in report else "leakage"]
        columns["stage 1: late, soft"] = {**report["stage1"], "leak": leak}
    if "stage2" in report:
        held = (report["leakage"] or {}).get("mask")
        name = f"stage 2: {second}" if columns else {"truth": "true mask", "found": "found mask"}.get(held, "no mask")
        columns[name] = {**report["stage2"], "leak": report["leakage"]}

    def value(numbers, path):
        *above, key = path.split(".")
        for step in above:
            numbers = numbers.get(step) or {}
        if (number := numbers.get(key)) is None:
            return "-"
        text = "0" if number == 0 else f"{number:.{3 if number >= 5e-4 else 5}f}"
        low, high = numbers.get(f"{key}_interval") or (numbers.get("low"), numbers.get("high"))
        return text if low is None else f"{text} ({low:.2f}-{high:.2f})"

    line = lambda name, values: f"  {name:<46}" + "".join(f"{v:>23}" for v in values)
    rows = {name: [value(c, path) for c in columns.values()] for name, path in ROWS}
    rows = {name: values for name, values in rows.items() if set(values) != {"-"}}
    lines = [line("", columns)] + [line(name, values) for name, values in rows.items()]
    groups = next(iter(columns.values()))["groups"]
    after = 1 + sum("leak." not in path for name, path in ROWS if name in rows)
    extra = [(f"{part} (n = {numbers['images']})", part) for part, numbers in report.get("sets", {}).items()]
    stages = [stage for stage in ("stage1", "stage2") if stage in report]
    for metric, title in (("aa", "accuracy"), ("worst_group", "worst group"), ("auroc", "AUROC, times 100")):
        each = lambda part: [value(report["sets"][part][stage], metric) for stage in stages]
        lines[after:after] = [line(f"  {title}: {name}", each(part)) for name, part in extra
                              if metric in report["sets"][part][stages[0]]]
    if len(groups) <= 9:
        each = lambda name: [value(c["groups"][name], "accuracy") for c in columns.values()]
        lines[after:after] = [line(f"  {name} (n = {group['n']})", each(name)) for name, group in groups.items()]
    if "bg_gap" in report:
        lines.append(line("BG-GAP, in points", [f"{report['bg_gap'][stage]:.1f}" for stage in stages]))
    if "mask" in report:
        lines.append(line("patches kept", [f"{report['mask']['kept_share']:.1%}"]))
        lines.append(line("images without any", [report["mask"]["empty"]]))
        if "iou" in report["mask"]:
            lines.append(line("IoU of object and what stage 2 sees", [value(report["mask"], "iou")]))
    if found := report.get("localisation"):
        lines += [line(name, [value(found, key)]) for name, key in LOCALISATION if key in found]
        if "kp_skipped" in found:
            lines.append(f"  no keypoint regression: {found['kp_skipped']}")
    if place := (report["leakage"] or {}).get("place_of_mask"):
        name = {"aa": "accuracy", "worst_group": "worst group"}[place["measure"]]
        lines.append(f"  true mask on frozen weights of {place['weights']}, linear head, {name}: "
                     + ", ".join(f"{place[p]:.3f} {p}" for p in ("none", "late", "early")))
    return "\n".join(lines)


def check(cfg, model, state, samples, sets):
    """UsageError for what this model or these images cannot have, before anything is measured."""
    if model.needs_truth and samples.masks is None:
        raise UsageError(f"{cfg.ckpt} is of the method {state['config']['method']}, which needs true masks, and "
                         f"{samples.name} {cfg.split} has none here; unpack its segmentations, or name another --ckpt")
    if cfg.per_part and not (model.selector and model.predictor):
        raise UsageError(f"--per-part: {cfg.ckpt} is of the method {state['config']['method']}, which has no "
                         f"{'second stage' if model.selector else 'parts'}; leave it out, or name a checkpoint of ifam")
    if cfg.per_part:
        refuse_told(model, f"--per-part: {cfg.ckpt}", "leave it out")
    if cfg.speed:
        speed.check(model)
    if cfg.encoding:
        encoding.check(model, cfg.ckpt)
        if state["step"] is None:
            raise UsageError(f"--encoding trains an evaluator as the model was trained, and {cfg.ckpt}, a published "
                             "snapshot, does not say how: leave it out")
    if cfg.retrain and cfg.encoding:
        raise UsageError("--encoding judges a selection by the head that was trained with it: leave it out, or leave "
                         "out --retrain")
    if cfg.adversarial and model.needs_truth:
        raise UsageError(f"--adversarial pastes objects on backgrounds, and {cfg.ckpt} is told where the object is: "
                         "leave it out")
    if cfg.adversarial and samples.masks is None:
        raise UsageError("--adversarial needs bg_challenge/fg_mask; unpack it")
    if cfg.adversarial and "only_bg_t" not in sets:
        raise UsageError("--adversarial is of --data imagenet9, --split test, and needs its variant only_bg_t")


def new_head(cfg, model, state, samples, sets, device):
    """Give the model the head that --retrain asks for -> (what the report says of it, the sets that remain).

    UsageError where the images that are measured are those that it is fitted on; other sets that have some of them are
    left out, with a line.
    """
    wanted = retrain.SPLITS[cfg.retrain]
    splits = own_splits(cfg, state, wanted)
    retrain.check(cfg.retrain, model, splits, cfg.ckpt)
    fitted = set().union(*(splits[split].paths for split in wanted))
    if not fitted.isdisjoint(samples.paths):
        raise UsageError(f"--retrain {cfg.retrain} fits on images of {' and '.join(wanted)}, and {samples.split} has "
                         "some of them: measure on another --split")
    if shared := [name for name, some in sets.items() if not fitted.isdisjoint(some.paths)]:
        print(f"{samples.title}: left out, for the new head is fitted on images of theirs: {', '.join(shared)}")
    about = retrain.retrain(cfg.retrain, model, splits, device, cfg.batch, cfg.workers, cfg.ckpt)
    return about, {name: some for name, some in sets.items() if name not in shared}


def outputs(cfg, name, trained_on, pictures):
    """-> paths of the report and of its pictures, which have these names. UsageError, before anything is measured, if
    they are not free: what is not a whole measurement of best.pt has a name of its own.
    """
    ckpt = Path(cfg.ckpt)
    differs = [ckpt.stem * (ckpt.stem != "best"), name * (name != trained_on), cfg.split * (cfg.split != "test"),
               f"limit{cfg.limit}" * bool(cfg.limit), Path(cfg.intervention).stem, cfg.retrain]
    suffix = "".join(f"-{word}" for word in differs if word)
    report = Path(cfg.out) if cfg.out else ckpt.with_name(f"report{suffix}.json")
    may_write(report, lambda path: {"split", "images"} <= json.loads(path.read_text()).keys(), cfg.force)
    drawn = [report.with_name(f"{report.stem}-{x}.png" if cfg.out else f"{x}{suffix}.png") for x in pictures]
    for picture in drawn:
        may_write(picture, is_our_picture, cfg.force)
    return [report, *drawn]


def epoch_of(state, path):
    """Of which epoch the weights of a checkpoint are; None where an older one does not say."""
    known = state["best"]["epoch"] if Path(path).stem == "best" else None
    return state.get("epoch", known)


def measure(cfg, model, state, name, samples, train, sets, intervention, retrained, device):
    """Everything that report.json says -> dict."""
    trained, benchmark = state["config"], data.BENCHMARKS[samples.name]
    evaluator = evaluator_of(cfg, state, device) if cfg.encoding else None       # first: train.py may refuse
    normalise = cfg.kp_normalise or bool(intervention and intervention["q"])     # thresholds are of normalised images
    report = {"data": name, "method": trained["method"], "seed": trained["seed"], "step": state["step"],
              "source": "published snapshot" if state["step"] is None else "train.py", "selection": state["best"],
              "checkpoint": {"file": Path(cfg.ckpt).name, "sha256": hash_of(cfg.ckpt), "step": state["step"],
                             "epoch": epoch_of(state, cfg.ckpt)},
              **evaluate(model, samples, train, benchmark.rare, device, cfg.batch, cfg.leakage, cfg.workers, sets,
                         normalise, cfg.fitted)}
    own = not (intervention or retrained)
    comparable = as_published(trained) and cfg.split == "test" and not trained["mini"] and own
    if comparable and trained["k"] in benchmark.paper:
        report |= {"paper": benchmark.paper[trained["k"]], "paper_split": benchmark.paper_split}
    if intervention:
        report["intervention"] = intervention
    if retrained:
        report["retrain"] = retrained
    if samples.differs:
        report["data_differs"] = samples.differs
    if cfg.per_part:
        how = (model, samples, device, cfg.batch, cfg.workers)
        report["parts"] = between.each_part_alone(*how)
        report["leakage"]["between_parts"] = between.between_parts(*how)
    if cfg.adversarial:
        report["adversarial"] = adversarial(model, samples, sets["only_bg_t"], device, cfg.batch, cfg.workers)
    if cfg.encoding:
        report["encoding"] = measure_encoding(cfg, model, evaluator, samples, device)
    if cfg.speed:
        report["speed"] = speed.measure_split(model, samples, device, cfg.batch)
    return report


def text(cfg, state, report, sets):
    """A report as it is printed."""
    trained, best, name, epoch = state["config"], state["best"], report["data"], report["checkpoint"]["epoch"]
    by = best.get("by", "accuracy")
    how = f", chosen on {best['split']}" + f" by {by.replace('_', ' ')}" * (by != "accuracy")
    chosen = report["source"] if state["step"] is None else f"step {state['step']}" if epoch is None else \
        f"epoch {epoch:g}" + how * (epoch == best["epoch"])
    lines = [f"{cfg.ckpt}: {trained['method']}, {chosen}; {name} {report['split']}, {report['images']} images"]
    if "intervention" in report:
        lines.append(f"  {describe_intervention(report['intervention'], name, [report['split'], *sets])}")
    if "retrain" in report:
        lines.append(f"  {retrain.summary(report['retrain'])}")
    lines.append(table(report, f"{trained['masking']}, {trained['hardness']}"))
    if "paper" in report:
        lines.append(f"  the paper's iFAM with K = {trained['k']}, on {report['paper_split']}: "
                     + ", ".join(f"{n} {v}" for n, v in report["paper"].items()))
    if "parts" in report:
        lines.append(between.table(report))
    if "encoding" in report:
        lines.append(encoding.summary(report["encoding"]))
    if "speed" in report:
        lines.append(speed.summary(report["speed"]))
    if "adversarial" in report:
        lines.append("  adversarial backgrounds: challenge accuracy {challenge_accuracy:.1f} ({vulnerable} of "
                     "{objects} objects vulnerable)".format(**report["adversarial"]))
    return "\n".join(lines)


def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    device = pick_device(cfg.device)
    model, state = load_model(cfg.ckpt, device, cfg.data)
    intervention = apply_intervention(model, cfg.intervention, cfg.ckpt) if cfg.intervention else None
    name, samples, train, sets = open_split(cfg, state, model)
    check(cfg, model, state, samples, sets)
    if bare := [part for part, some in sets.items() if model.needs_truth and some.masks is None]:
        print(f"{name}: left out, for they have no true masks: {', '.join(bare)}")
        sets = {part: some for part, some in sets.items() if part not in bare}
    trained_on = data.title_of(state["config"]["data"], state["config"]["root"])
    attributes = cfg.per_part and not between.missing(samples)
    written = outputs(cfg, samples.title, trained_on, ["parts"] * bool(model.selector) + ["between"] * attributes)
    retrained = None
    if cfg.retrain:
        retrained, sets = new_head(cfg, model, state, samples, sets, device)
    report = measure(cfg, model, state, name, samples, train, sets, intervention, retrained, device)
    print(text(cfg, state, report, sets))
    write_json(written[0], report)
    if model.selector:
        figures.parts(model, samples, written[1], device)
    if attributes:
        figures.between(report["leakage"]["between_parts"], written[2])
    print("  wrote " + " and ".join(map(str, written)))


if __name__ == "__main__":
    run_script(main)
