"""runs.py: what a run is: its settings, its checkpoints, its log, and the model that comes out of them.

    cfg = parse(Config, __doc__, argv, preset)           # a command line -> the settings of a run
    model, state = load_model("runs/waterbirds-mini/best.pt")            # ready to predict

Floor: what a run is, between data and the commands. Read data.py (the benchmarks) and baselines.py (settings become a
model) first. A run lives in runs/<name>: config.json, log.jsonl, last.pt (to resume), best.pt (to evaluate), and, if it
was asked for, film.json (the masks of a few images while it trained).
"""
import fcntl
import hashlib
import json
import logging
import math
import os
import platform
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

import data
import objectives
import vit
from baselines import GIVEN, METHODS, PRETRAINED, TAKES, build
from benchmarks.transforms import PIPELINES
from ifam import IFAM, WEIGHTS, Static, scaled_window
from settings import (RunError, UsageError, alive, bounded, check_bounds, flag, opt, read_json, read_text, recorded,
                      world, write_json, write_whole)
from weights import (checksum, find_published, load_strictly, read_file, refuse_by_name, rename_published,
                     write_safetensors)


SELECT = {"accuracy": "aa", "worst_group": "worst_group", "worst_class": "worst_class"}      # --select: of accuracies


def loss_weight(term, what):
    """The option of a loss term; its default is the paper's weight."""
    return opt(WEIGHTS[term], f"loss weight: {what}", at_least=0)


@dataclass
class Config:
    """Settings of a run, the flags of train.py. Defaults are the paper's (appendix A.1)."""
    data: str = opt("waterbirds", f"benchmark ({data.overview()})", choices=tuple(data.BENCHMARKS), group="data")
    root: str = opt("data", "folder that holds the unpacked benchmarks, or with --data folder your pictures")
    mini: bool = opt(False, "use the miniature of the benchmark: drawn on first use, no download")
    limit: int = opt(0, "use only N training and evaluation samples, spread evenly (0: all)", at_least=0)
    val_share: float = opt(0.0, "hold out this share of the training images of each class as validation, where a "
                                "benchmark has none, such as 0.1 (0: none)", at_least=0, below=1)
    strict_data: bool = opt(False, "refuse a benchmark whose counts are not the published ones, or a folder with files "
                                   "that are odd; else a line says so")

    masktune: str = opt("", "go on from this finished run, its folder, for one epoch in which the patches are hidden "
                            "that its best.pt looks at most (MaskTune); all other settings are those of that run")
    hide_with: str = opt("patches", "of --masktune: hidden patches are black and have no token that anybody sees, or "
                                    "are black pixels alone, as published", choices=("patches", "pixels"))
    masktune_lr: float = opt(0.1, "of --masktune: its learning rates, as shares of those that the run began with; its "
                                  "schedule has ended at 0", above=0)
    swap: float = opt(0.0, "in training, give this share of the images the background of images of another class, from "
                           "the process's share of the batch (0: none)", at_least=0, at_most=1)
    swap_mask: str = opt("true", "what stays of an image whose background is swapped: the true object, what FOUND "
                                 "finds with the untrained backbone, or the own mask of this step (ifam, pdiscoformer)",
                         choices=("true", "found", "own"))
    draft: bool = opt(False, "in training, decode JPEG files that are at least twice as large as --size at 1/2, 1/4 or "
                             "1/8 of their sides: faster, and pixels differ a little; evaluation never does")

    recipe: str = opt("paper", "settings by one word, which flags replace: those of the paper; mini, a small network "
                               "and a short schedule (the default with --mini); or the usual ones with a smaller "
                               "stage 1: fast, at half of the side (of at least 12 patches), or faster, also with half "
                               "of the blocks", choices=("paper", "mini", "fast", "faster"), group="model")
    method: str = opt("ifam", "ifam, or a baseline", choices=METHODS)
    arch: str = opt("b", "size of the vision transformers: DINOv2's, DINOv3's (16), or the miniatures'",
                    choices=tuple(vit.ARCHS), refused=vit.REFUSED)
    registers: int = opt(4, "register tokens; 0 for weights without registers", at_least=0, at_most=1024)
    weights: str = opt("dinov2", "start of all backbones: dinov2 or rad-dino (downloaded once), dinov3 (gated, put "
                                 "there by you), mini, mini-parts, mini-rotary or chest (those of miniature/), "
                                 "a file of DINOv2, DINOv3, NeCo, Franca, timm or Hugging Face, or none")
    selector_weights: str = opt("", "start of stage 1, as --weights has it (if not given, that of --weights)")
    size: int = opt(518, "image side in pixels, a multiple of the patch", at_least=1)
    selector_size: int = opt(0, "side at which stage 1 looks at the image, smaller is faster (0: --size)", at_least=0)
    selector_arch: str = opt("", "a smaller ViT for stage 1: s where --arch is b, or b/6 for the first 6 blocks of b "
                                 "(if not given, that of --arch)")
    freeze_stage2: bool = opt(False, "of the backbone of stage 2 train class token, registers and positions only")
    train_backbone: bool = opt(False, "ep and aim: train the backbone too")
    head: str = opt("published", "erm, frozen, early-* and late-*: a linear head as published (on the features as they "
                                 "are, with a bias but for early-*), or a LayerNorm and a head without bias, as iFAM's "
                                 "stage 2 has", choices=("published", "norm"))
    probe_norm: bool = opt(False, "ep: batch-norm before the head, as in its own paper; iFAM's copy has none")
    train_tokens: bool = opt(True, "train class token, registers and positions of a pretrained stage 1, as in the "
                                   "paper")

    k: int = opt(8, "foreground parts", at_least=1, at_most=4096, group="mask")
    backgrounds: int = opt(1, "prototypes of the background, which is what any of them is nearest to; the paper has "
                              "one", at_least=1, at_most=4096)
    masking: str = opt("early", "where the mask acts", choices=("early", "late"))
    hardness: str = opt("hard", "binary mask, or any weight in [0, 1]", choices=("hard", "soft"))
    pooling: str = opt("cls", "what stage 2 classifies from: class token, mean of the kept patches (the default of "
                              "early-* and late-*), or their sum over the number of all patches (late-*, as published)",
                       choices=("cls", "mean", "mean-all"))
    mask_rule: str = opt("half", "early-* and late-*: the patches that a given mask keeps: those of which it covers "
                                 "more than half (a small object keeps its best one), or those whose centre it covers, "
                                 "as published", choices=("half", "centre"))
    mask_with: str = opt("patches", "early-truth and early-found: what an early mask takes away: patches, which no "
                                    "other token sees, or their pixels, which become 0 (the mean colour) while their "
                                    "tokens stay", choices=("patches", "pixels"))
    finder: str = opt("seed", "early-found and late-found: what finds masks: FOUND's seed step, or FOUND's head, which "
                              "is trained first, on the training images without labels", choices=("seed", "head"))
    find_in: str = opt("picture", "early-found and late-found: where masks of training are found: once in each whole "
                                  "picture, and augmented with it; or anew in every augmented view",
                       choices=("picture", "view"))
    trim: str = opt("none", "paint the background inside kept patches with one colour before stage 2 sees them: where "
                            "the part maps find it, or where the true mask has it (a measurement)",
                    choices=("none", "found", "truth"))
    mask_largest: bool = opt(False, "keep only the largest component of the mask")
    mask_dilate: str = opt("none", "also keep the neighbours of kept patches: always, or for half of the images in "
                                   "training, so that the border tells less", choices=("none", "always", "random"))
    joint: bool = opt(True, "let the stage-2 loss reach stage 1 through the mask, as in the paper")
    supervise: str = opt("none", "also teach stage 1 where the object is, in training alone: by true masks, or by the "
                                 "smallest boxes around them", choices=("none", "masks", "boxes"))
    tau: float = opt(1.0, "temperature of the part assignment", above=0)
    part_dropout1: float = opt(0.3, "share of parts dropped before the stage-1 classifier", at_least=0, below=1)
    part_dropout2: float = opt(0.3, "share of parts dropped in the mask of stage 2", at_least=0, below=1)

    shaping: bool = opt(True, "the losses that shape parts; without them ifam is a joint amortised model (JAM)",
                        group="losses")
    stage1_class: bool = opt(True, "the class loss of stage 1")
    weight_class1: float = loss_weight("class1", "class, stage 1")
    weight_class2: float = loss_weight("class2", "class, stage 2")
    weight_presence: float = loss_weight("presence", "every part occurs in the batch")
    presence_window: int = opt(0, "side of the window, in patches, in which each part must occur (0: round(3/37 of the "
                                  "side of the grid), at least 1, which is the paper's 3 on its grid)", at_least=0)
    weight_background: float = loss_weight("background", "background in every image, at its border")
    weight_orthogonality: float = loss_weight("orthogonality", "parts have different features")
    weight_equivariance: float = loss_weight("equivariance", "parts move with the image")
    weight_variation: float = loss_weight("variation", "neighbouring patches agree")
    weight_entropy: float = loss_weight("entropy", "patches are sure of their part")
    weight_concentration: float = loss_weight("concentration", "parts are compact (PDiscoNet)")
    weight_mask: float = loss_weight("mask", "parts are where --supervise has the object")
    weight_complement: float = loss_weight("complement", "stage 2 knows the class better from kept patches than from "
                                                         "all others, by a margin (COMET, where it is 4)")

    objective: str = opt("erm", "what each training image counts in the class losses, see docs/objectives.md: all "
                                "alike; groups drawn in equal shares, or weighed by 1 over their size; errors of a "
                                "first model more; groups, or clusters, by weights that move with their losses",
                         choices=objectives.OBJECTIVES, group="objective")
    groups: str = opt("", "groups that are not class and place: a csv of id and group, with a line for each training "
                          "image; jtt and george need one, and groups.py writes it")
    upweight: float = opt(100.0, "jtt: how often an error counts, as published for Waterbirds", above=0)
    dro_step: float = opt(0.0, "group-dro and george: step size eta of the weights of groups (0: the published 0.01 "
                               "for 11,100 steps, scaled to the length of the run)", at_least=0)
    dro_adjustment: float = opt(0.0, "the same: C, which adds C / sqrt(images of a group) to its loss where weights "
                                     "move; george has 2 if not given, as published", at_least=0)
    dro_draw: str = opt("balanced", "the same: groups are drawn in equal shares, as published, or each image once an "
                                    "epoch", choices=("balanced", "uniform"))
    select: str = opt("accuracy", "best.pt is of the epoch whose validation has the largest: accuracy, least accuracy "
                                  "of a group, or least accuracy of a class", choices=tuple(SELECT))

    epochs: int = opt(90, "passes over the training set", at_least=1, at_most=10 ** 6, group="schedule")
    batch: int = opt(16, "images per step over all processes and accumulation steps", at_least=1)
    micro: int = opt(0, "most images at once in a process; more are accumulated, and the presence loss takes its "
                        "maximum within each portion (0: no limit)", at_least=0)
    lr: float = opt(1e-6, "learning rate at batch 16 of the backbone that trains, scaled by sqrt(batch / 16)",
                    at_least=0)
    lr_tokens: float = opt(1e-6, "the same for the tokens of a frozen stage 1", at_least=0)
    lr_prototypes: float = opt(1e-3, "the same for the prototypes", at_least=0)
    lr_heads: float = opt(1e-2, "the same for modulation, fc_norm and classifiers", at_least=0)
    warmup: int = opt(0, "steps of linear warm-up of stage 2, so that it learns little before there are parts",
                      at_least=0)
    weight_decay: float = opt(0.05, "multiplied by sqrt(1 / steps); matrices only", at_least=0)
    clip: float = opt(2.0, "largest gradient norm (0: no clipping)", at_least=0)
    ema: float = opt(0.0, "decay of an exponential moving average of the weights, which is then evaluated (0: none)",
                     at_least=0, below=1)
    amp: str = opt("auto", "autocast: auto is bf16 on a GPU that has it, fp16 on others, off elsewhere",
                   choices=("auto", "bf16", "fp16", "off"))

    seed: int = opt(0, "decides initial weights, order, augmentation, noise and dropout", at_least=0, below=2 ** 63,
                    group="run")
    device: str = opt("auto", "auto, cpu, cuda or mps")
    compile: bool = opt(False, "torch.compile both stages")
    checkpoint: bool = opt(False, "less memory for more time, with the same weights to the bit: blocks keep only their "
                                  "inputs for the backward pass, and are computed again there")
    workers: int = opt(4, "processes that load data, per training process", at_least=0)
    out: str = opt("", "folder of the run (default runs/<data>, of a folder of your own runs/<its name>, with -mini "
                       "and -<method> where they apply)")
    resume: bool = opt(False, "go on from last.pt of this run")
    save_every: int = opt(500, "steps between saves of last.pt (it is also saved after every epoch)", at_least=1)
    log_every: int = opt(20, "steps between log lines", at_least=1)
    film: int = opt(0, "keep the masks of N validation images (of training images, where there is no validation) at "
                       "steps 0, 10, 20, 50, 100, 200, 500, ... and the last: film.json and film.png (0: none)",
                    at_least=0, at_most=64)

    def __post_init__(self):
        usual = f"runs/{self.title}" + f"-{self.method}" * (self.method != "ifam")
        if self.masktune:
            usual = f"{os.path.normpath(self.masktune)}-masktune" + "-pixels" * (self.hide_with == "pixels")
        self.out = self.out or usual
        self.workers = bounded(self.workers)

    def stage1_starts_from(self):
        """The weights of stage 1, as --weights has them."""
        return self.selector_weights or self.weights

    @property
    def title(self):
        """What the runs on these data are called."""
        return data.title_of(self.data, self.root) + "-mini" * self.mini


# data.BENCHMARKS says what differs from Config's defaults by benchmark (--recipe paper), this for --recipe mini: --mini
# is this recipe on drawings. --recipe fast and faster set what SMALLER names: stage 1 has half of the side, and SMALL
# says which share of the blocks.
MINI = dict(arch="mini", size=96, weights="mini-parts", k=4, epochs=1, batch=8, lr=7e-4, lr_tokens=1e-5,
            lr_prototypes=2.5e-3, lr_heads=1e-2, warmup=240, weight_class2=0.1, weight_presence=3.0, presence_window=2,
            weight_variation=0.33, dro_step=0.02, workers=0, film=4)
SMALLER = ("selector_size", "selector_arch")
SMALL = {"fast": 1, "faster": 0.5}
LEAST = 12                                               # patches on a side of stage 1: with fewer the mask gets worse
# A setting, and what switches it off: --no-shaping every loss but those of the classes.
SWITCHES = {"lr_tokens": "train_tokens", "weight_class1": "stage1_class", "presence_window": "shaping",
            **{f"weight_{name}": "shaping" for name in WEIGHTS
               if name not in ("class1", "class2", "mask", "complement")}}
# A setting, and the one without which it means nothing, with an example.
NEEDS = {"swap_mask": ("swap", "--swap 0.5"), "weight_mask": ("supervise", "--supervise masks"),
         **dict.fromkeys(("hide_with", "masktune_lr"), ("masktune", "--masktune RUN"))}
EARLIER = {"head": "norm", "find_in": "view"}            # settings that runs from before them had, where no default
# What may change on --resume, for it changes no result; of groups the path, what is in the file is compared.
FREE = {"root", "groups", "strict_data", "recipe", "device", "workers", "out", "resume", "save_every", "log_every",
        "compile", "checkpoint", "film"}


def preset(typed, earlier=None):
    """What was typed, and the settings of --config -> those of the benchmark that replace Config's defaults.

    UsageError for a setting that was typed and that the method does not have, or that another one switches off.
    """
    for name, switch in SWITCHES.items():
        if name in typed and typed.get(switch) is False:
            raise UsageError(f"{flag(name)} means nothing with --no-{flag(switch)[2:]}: leave one of them out")
    if typed.get("masktune"):
        return of_masktune(typed, earlier)
    known = {"data": Config.data, "mini": Config.mini, "method": Config.method, **(earlier or {}), **typed}
    for name, methods in TAKES.items():
        if name in typed and known["method"] in METHODS and known["method"] not in methods:
            raise UsageError(f"{flag(name)} means nothing to --method {known['method']}, only to {', '.join(methods)}; "
                             "leave it out")
    if "mask_rule" in typed and known.get("find_in") == "view" and has(known["method"], "find_in"):
        raise UsageError("--mask-rule means nothing with --find-in view, whose masks are patches from the start: leave "
                         "one of them out")
    for name, (other, example) in NEEDS.items():
        if name in typed and known.get(other, "none") in (0, "", "none"):
            raise UsageError(f"{flag(name)} means nothing without {flag(other)}: add {example}, or leave it out")
    for name in [name for name in earlier or {} if not has(known["method"], name)]:
        del earlier[name]                                # of another method than that of --config
    objective = known.get("objective", Config.objective)
    own = objectives.defaults(typed, {} if earlier is None else earlier, objective)
    if known["data"] not in data.BENCHMARKS:             # parse() says so
        return {}
    recipe = known.get("recipe") or usual_recipe(known["mini"])
    if "recipe" in typed and earlier:                    # what this recipe sets is no longer what --config says
        for name in {*SMALLER, *(MINI if recipe not in SMALL else ()), *data.BENCHMARKS[known["data"]].settings}:
            earlier.pop(name, None)
    settings = {**of_recipe(recipe, {**(earlier or {}), **typed}, known), **own}
    if known["method"] in GIVEN:                         # early and late read the same, so that one thing differs
        settings = {**settings, "pooling": "mean"}
    return {"recipe": recipe, **{name: x for name, x in settings.items() if has(known["method"], name)
                                 and objective in objectives.TAKES.get(name, (objective,))}}


def of_masktune(typed, earlier):
    """The settings of the run that --masktune goes on from. UsageError for one of them that was typed differently."""
    run, own = typed["masktune"], {"masktune", "hide_with", "masktune_lr"}
    if earlier:
        raise UsageError("--config means nothing with --masktune, which takes the settings of its run: leave it out")
    settings = read_settings(Path(run) / "config.json")
    if Path(typed.get("out", "")).resolve() == Path(run).resolve():
        raise UsageError(f"--out {typed['out']} is the run that --masktune goes on from: name another folder")
    if settings.get("masktune"):
        raise UsageError(f"--masktune {run}: it is a run of --masktune already, and went on from "
                         f"{settings['masktune']}; take that one")
    if settings["method"] not in TAKES["masktune"]:
        raise UsageError(f"--masktune {run}: --method {settings['method']} has no stage that reads what is left of an "
                         f"image; take a run of {', '.join(TAKES['masktune'])}")
    if settings.get("swap"):
        raise UsageError(f"--masktune {run}: it was trained with --swap, and a swapped background would show again "
                         "what is hidden; take a run without")
    for name in typed.keys() - own - FREE - {"micro", "amp"}:
        if typed[name] != (then := settings.get(name, getattr(Config, name))):
            raise UsageError(f"{flag(name)} {typed[name]} with --masktune {run}, where it is {then}: leave it out")
    return {name: value for name, value in settings.items() if name not in own}


def usual_recipe(mini):
    return "mini" if mini else "paper"


def has(method, setting):
    """Is there such a setting in a method?"""
    return method in TAKES.get(setting, METHODS)


def of_recipe(recipe, given, known):
    """-> {setting: value} of a recipe, on the benchmark of `known`. given: the settings that it does not replace."""
    benchmark = data.BENCHMARKS[known["data"]]
    settings = {"size": benchmark.size, "k": benchmark.k, **benchmark.settings}
    if "mini" in (recipe, usual_recipe(known["mini"]) if recipe in SMALL else ""):
        # its own network and schedule, the benchmark's loss
        losses = {name: x for name, x in benchmark.settings.items() if name.startswith("weight_")}
        settings = {"size": benchmark.size, "k": benchmark.k, **losses, **MINI}
        if benchmark.settings.get("weights") == "rad-dino":
            settings["weights"] = "chest"                # a backbone that has seen radiographs, here too
    if recipe in SMALL:
        now = {"arch": Config.arch, **settings, **given}
        settings = {**settings, **small_selector(now["arch"], now["size"], recipe)}
    return settings


def small_selector(arch, size, recipe="fast"):
    """The stage 1 of a recipe of SMALL -> {"selector_size", "selector_arch"}, those that are smaller."""
    name, _, blocks = arch.partition("/")
    shape = vit.ARCHS.get(name, {})                      # parse() refuses another
    patch, depth = shape.get("patch", 14), int(blocks) if blocks.isdecimal() else shape.get("depth", 12)
    side, few = max(LEAST, round(size / patch / 2)) * patch, max(1, int(SMALL[recipe] * depth))
    small = {"selector_size": side} if side < size else {}
    return small | {"selector_arch": f"{name}/{few}"} if few < depth else small


def recipe_text(cfg):
    """One line on a recipe that was chosen: what it sets, and what it has that the method has not; "" for the usual."""
    if cfg.recipe == usual_recipe(cfg.mini):
        return ""
    used = [f"{flag(name)} {value}" for name, value in recipe_settings(cfg).items() if has(cfg.method, name)
            and getattr(cfg, name) == value]
    return "; ".join([f"--recipe {cfg.recipe}: {' '.join(used) or 'nothing'}", *filter(None, [left_out(cfg)])])


def recipe_settings(cfg):
    """What the recipe of a run would set for every method -> {setting: value}."""
    own = SMALLER if cfg.recipe in SMALL else None
    found = of_recipe(cfg.recipe, {"size": cfg.size, "arch": cfg.arch}, vars(cfg))
    return {name: value for name, value in found.items() if not own or name in own}


def left_out(cfg):
    """The settings of a recipe that was chosen which the method of a run does not have, as text; "" for none."""
    if cfg.recipe == usual_recipe(cfg.mini):
        return ""
    without = " ".join(f"{flag(name)} {x}" for name, x in recipe_settings(cfg).items() if not has(cfg.method, name))
    return without and f"left out, for --method {cfg.method} has no such setting: {without}"


def of_today(config):
    """The settings of a run, and of those that did not exist then what it had: {name: value} -> {name: value}.

    That is what EARLIER says, and a window of the presence loss of 3 on every grid; where the default means that, the
    default. All others had their default.
    """
    arch = (config.get("selector_arch") or config.get("arch", Config.arch)).partition("/")[0]
    side = (config.get("selector_size") or config.get("size", Config.size)) // vit.ARCHS.get(arch, {}).get("patch", 14)
    then = {**EARLIER, "presence_window": Config.presence_window if scaled_window(side) == 3 else 3}
    method = config.get("method", Config.method)
    return {**{name: value for name, value in then.items() if has(method, name)}, **config}


def read_config(path):
    """config.json of a run -> dict, as it is in the file, and what earlier runs do not say.

    UsageError if its settings are not those of a run.
    """
    content = read_json(path, "the config.json of a run")
    recorded(Config, content, path)
    return of_today(content)


def read_settings(path):
    """config.json of a run -> its settings but those of the folder, for --config. UsageError if it is none."""
    found = recorded(Config, read_config(path), path)
    found.setdefault("recipe", usual_recipe(found.get("mini")))                  # earlier runs do not say
    return {name: value for name, value in found.items() if name not in ("out", "resume")}


def read_log(path):
    """log.jsonl of a run -> [dict, ...]. A last line that a crash tore is left out; UsageError for any other."""
    lines, found = read_text(path, "the log of a run").split("\n"), []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            if number == len(lines):
                break
            raise UsageError(f"{path}, line {number}: expected a JSON object; remove the line") from None
        if record is not None and not (isinstance(record, dict) and isinstance(record.get("step"), int)):
            raise UsageError(f"{path}, line {number}: expected an object with a whole number as step; remove the line")
        found += [record] if record is not None else []
    return found


def read_film(path):
    """film.json of a run, as train.Film writes it -> dict; UsageError if it is not like that."""
    content = read_json(path, "the film.json of a run")
    listed = lambda x: isinstance(x, list) and len(x) > 0
    whole = lambda x: type(x) is int and x >= 0
    image = lambda rows: listed(rows) and all(isinstance(row, str) for row in rows)
    frame = lambda x: isinstance(x, dict) and whole(x.get("step")) and listed(x.get("parts")) and \
        len(x["parts"]) == len(content["ids"]) and all(map(image, x["parts"]))
    fault = wrong_field(content, [
        ("data", lambda x: x in data.BENCHMARKS, "the name of a benchmark"),
        ("split", lambda x: isinstance(x, str), "the name of a split"), ("k", whole, "a number of parts"),
        ("ids", listed, "names of images"),
        ("frames", lambda x: listed(x) and all(map(frame, x)), "a list of step and parts of each image")])
    if fault:
        raise UsageError(f"{path} is not as train.py writes it: {fault}; remove it, or train again with --film")
    return content


def check(cfg):
    """UsageError for settings that no part of the program could use."""
    check_bounds(cfg)
    own = {f"weight_{name}": weight for name, weight in loss_weights(cfg).items()
           if cfg.method in TAKES[f"weight_{name}"]}
    if not any(own.values()):
        raise UsageError(f"every loss of --method {cfg.method} has weight 0, and nothing would train: give one of "
                         f"{', '.join(map(flag, own))}")
    refuse_too_large(cfg)
    objectives.check(cfg)
    for weights, arch in ((cfg.weights, cfg.arch), (cfg.stage1_starts_from(), cfg.selector_arch or cfg.arch)):
        if (size := arch.partition("/")[0]) in vit.ARCHS:    # building the model refuses another
            refuse_by_name(weights, size, cfg.registers)
    if where := data.BENCHMARKS[cfg.data].trained_on:
        raise UsageError(f"--data {cfg.data} is for evaluation only: train with --data {where}, then "
                         f"evaluate.py --ckpt runs/{where}/best.pt --data {cfg.data}")
    if cfg.weights == "none" and (cfg.freeze_stage2 or cfg.method in PRETRAINED and not cfg.train_backbone):
        what = "--freeze-stage2" if cfg.freeze_stage2 else f"--method {cfg.method}"
        raise UsageError(f"{what} takes the backbone as it is, and with --weights none it is random: give --weights")
    if cfg.probe_norm and world() * (cfg.batch // world() % (cfg.micro or cfg.batch) or cfg.micro or cfg.batch) < 2:
        raise UsageError("--probe-norm compares the images of a step, and here is one alone: take a larger --batch, or "
                         "a --micro that leaves no single image")
    if cfg.selector_size > cfg.size:
        raise UsageError(f"--selector-size {cfg.selector_size} is larger than the image (--size {cfg.size}): there is "
                         "nothing more to see")
    if cfg.draft and data.BENCHMARKS[cfg.data].pipeline.crops_first:
        raise UsageError(f"--draft: training on {cfg.data} enlarges small parts of its pictures, which need all of "
                         "their pixels; leave it out")
    if cfg.swap:
        check_swap(cfg)
    if cfg.supervise != "none":
        if not cfg.weight_mask:
            raise UsageError(f"--supervise {cfg.supervise} with --weight-mask 0 teaches nothing: leave one of them out")
        if cfg.draft:
            raise UsageError("--draft: --supervise reads pictures with their masks, and a mask is as large as its "
                             "picture; leave one of them out")
    if cfg.mini and cfg.data == "folder":
        data.find_root(cfg.data, cfg.root, cfg.mini)     # says why not
    if cfg.mini and cfg.root != Config.root:
        raise UsageError("--mini draws its own data: leave out --root or --mini")


def check_swap(cfg):
    """UsageError for a --swap that cannot happen."""
    if cfg.swap_mask == "own" and cfg.method not in ("ifam", "pdiscoformer"):
        raise UsageError(f"--swap-mask own: --method {cfg.method} finds no mask of its own while it trains; choose "
                         "found or true")
    if cfg.swap_mask == "found" and cfg.weights == "none":
        raise UsageError("--swap-mask found looks with the backbone as it was before training, and with --weights none "
                         "that is random: give --weights")
    if cfg.swap_mask == "found" and cfg.find_in == "view" and has(cfg.method, "find_in"):
        raise UsageError("--swap-mask found reads the masks that were found in the whole pictures; leave out --find-in "
                         "view")
    if cfg.swap_mask == "true" and cfg.draft:
        raise UsageError("--draft: --swap-mask true reads pictures with their masks, and a mask is as large as its "
                         "picture; leave one of them out")
    if cfg.batch // world() < 2:
        raise UsageError(f"--swap: with --batch {cfg.batch} a process sees one image at a time, and nobody lends it a "
                         "background; take a larger --batch")


def refuse_too_large(cfg):
    """UsageError, with the estimate, for a model and a step that cannot fit into this machine's memory.

    Counted are the parameters of one ViT, the images, and what the blocks of one stage keep for the way back: a floor,
    and only what exceeds all of memory is refused.
    """
    arch = vit.ARCHS[cfg.arch]
    depth, D, patches = arch.get("depth", 12), arch["width"], (cfg.size // arch.get("patch", 14)) ** 2
    tokens = 1 + cfg.registers + patches
    views = 2 * (cfg.train_tokens or cfg.stage1_starts_from() == "none")         # of stage 1: the image and its warp
    views = {"ifam": views, "pdiscoformer": views, "erm": 1, "seg-erm": 1, "bbox-erm": 1, "late-truth": 1,
             "late-found": 1}.get(cfg.method, 0)
    images = min(cfg.batch, cfg.micro or cfg.batch)
    each = 10 * views * depth * tokens * D + 3 * cfg.size ** 2 + (cfg.k + cfg.backgrounds) * tokens
    needed = 4 * (12 * depth * D * D + (tokens + cfg.k + cfg.backgrounds) * D + images * each)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * world()
    if needed > there and pick_device(cfg.device).type == "cpu":
        raise UsageError(f"these settings need about {needed / 2 ** 30:,.0f} GiB of memory, this machine has "
                         f"{there / 2 ** 30:,.0f}: take a smaller --size, --batch, --micro, --registers or --k")


def loss_weights(cfg):
    """-> {name of a loss term: its weight}; 0 for what --no-shaping and --no-stage1-class switch off."""
    names = [f.name for f in fields(Config) if f.name.startswith("weight_") and f.name != "weight_decay"]
    on = lambda name: getattr(cfg, SWITCHES[name]) if name in SWITCHES else \
        name != "weight_mask" or cfg.supervise != "none"
    return {name.removeprefix("weight_"): getattr(cfg, name) * on(name) for name in names}


def as_published(config):
    """Are these the settings of iFAM itself, and not of an ablation? K and the size of the network may be any."""
    default = vars(Config(**preset({"data": config["data"]})))
    own = {name: default[name] for name, methods in TAKES.items() if "ifam" in methods and name not in {"k", *FREE}}
    return config["method"] == "ifam" and all(config.get(name, x) == x for name, x in own.items())


# ---------------------------------------------------------------- files of a run
def plain(value):
    """Tuples to lists, as JSON and checkpoints have them."""
    return json.loads(json.dumps(value))


def differences(config, cfg):
    """Settings of a run that was recorded (a dict) that are not those of cfg -> {name: (then, now)}.

    A setting that did not exist then was as `of_today` says. One that the method does not have is the same, whatever it
    is.
    """
    config = of_today(config)
    both = {f.name: (config.get(f.name, f.default), plain(getattr(cfg, f.name))) for f in fields(Config)
            if f.name not in FREE and has(cfg.method, f.name)}
    return {name: (then, now) for name, (then, now) in both.items() if then != now}


@contextmanager
def owned(folder, new):
    """A run belongs to one process: inside, its lock is held. UsageError that names the owner if there is another.

    new: False where the run must be there already.

    The system frees the lock of a process that dies, so none is ever stale; a file system without locks (some network
    ones) knows the host and number of the owner only, and then whoever is no longer alive on this host counts as gone.
    """
    if not new and not folder.is_dir():
        raise UsageError(f"--resume: no run at {folder} (name it with --out)")
    lock = folder.with_name(f".{folder.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    mine = f"process {os.getpid()} on {platform.node()}"
    with open(lock, "a+") as file:
        file.seek(0)
        owner = file.read().strip()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = False
        except BlockingIOError:
            taken = True
        except OSError:                                  # no locks here
            number, _, host = owner.removeprefix("process ").partition(" on ")
            taken = bool(owner) and (host != platform.node() or number.isdecimal() and alive(int(number)))
        if taken:
            raise UsageError(f"{folder} is in use by {owner or 'another process'}: wait for it, or choose another "
                             f"--out (if that process is gone, delete {lock})")
        file.truncate(0)
        file.write(mine)
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def earlier_state(cfg):
    """The checkpoint that --resume goes on from, None for a run that was killed before its first save.

    UsageError if there is no run, or one with other settings.
    """
    folder = Path(cfg.out)
    if not (folder / "config.json").is_file() and not (folder / "last.pt").is_file():
        raise UsageError(f"--resume: no run at {folder}, it has neither last.pt nor config.json (name it with --out)")
    state = read_checkpoint(folder / "last.pt") if (folder / "last.pt").is_file() else None
    config = state["config"] if state else read_config(folder / "config.json")
    for name, (then, now) in differences(config, cfg).items():
        raise UsageError(f"--resume: {folder} was started with {flag(name)} {then}, not {now}; use the old value, "
                         "or another --out")
    if state and not {"optimizer", "scaler"} <= state.keys():
        raise UsageError(f"--resume: {folder / 'last.pt'} has no state of the optimizer; start again, or copy the "
                         "last.pt that train.py wrote")
    return state


def finished_state(folder):
    """last.pt of a run that --masktune goes on from. UsageError if it is not finished, or not whole."""
    folder = Path(folder)
    if not trained(folder / "log.jsonl"):
        raise UsageError(f"--masktune {folder}: this run is not trained to its end; train it with --resume first")
    if not (folder / "best.pt").is_file():
        raise UsageError(f"--masktune {folder}: it has no best.pt, which says what to hide; train it again")
    state = read_checkpoint(folder / "last.pt")
    if not {"optimizer", "scaler"} <= state.keys():
        raise UsageError(f"--masktune {folder}: its last.pt has no state of the optimizer; copy the last.pt that "
                         "train.py wrote")
    return state


def refuse_other_images(state, images, steps, folder, what="--resume"):
    """UsageError if a run that is gone on from was trained on other images than those that are there now."""
    then = state.get("images") or images                 # older checkpoints do not say
    instead = "start again with another --out" if what == "--resume" else "train it again"
    if then.get("groups") != images.get("groups"):
        raise UsageError(f"{what}: {folder} was trained with other groups than those of --groups now: restore the "
                         f"file, or {instead}")
    for split in then.keys() | images.keys():
        if then.get(split) != images.get(split):
            was, now = (some[split][0] if split in some else 0 for some in (then, images))
            raise UsageError(f"{what}: {folder} was trained with {was} images in {split}, and now there are {now}"
                             f"{' others' * (was == now)}: restore them, or {instead}")
    if state["step"] > steps:
        raise UsageError(f"{what}: {Path(folder) / 'last.pt'} is at step {state['step']} of {steps}; restore the file")


def claim(cfg):
    """Make the folder of a new run. A run that is there is moved aside, not lost; UsageError for other files."""
    folder = Path(cfg.out)
    if (folder / "config.json").is_file():
        old = next(p for n in range(1, 10 ** 6) if not (p := folder.with_name(f"{folder.name}.{n}")).exists())
        folder.rename(old)
        print(f"{folder} was already there: moved to {old}")
    elif folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"--out {folder} holds files that are not those of a run (it has no config.json), such as "
                         f"{next(folder.iterdir()).name}; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder}: cannot make this folder ({error.strerror})") from None
    write_json(folder / "config.json", asdict(cfg))


def save(path, rank, cfg, step, best, parts, images=None, epoch=None, dataset=None):
    """Rank 0 writes a checkpoint, whole or not at all; RunError if anything in it is not finite.

    parts: {name: what has a state_dict, or None}. images: which images the run is trained on, to compare on --resume.
    epoch: how many epochs were done. dataset: Samples.described() of them, to show the model others.
    """
    if rank == 0:
        state = dict(config=plain(asdict(cfg)), step=step, epoch=epoch, best=best, images=images, dataset=dataset,
                     **{name: part.state_dict() for name, part in parts.items() if part is not None})
        tensors = [*state["model"].items(), *state.get("ema", {}).items()]
        if bad := [name for name, x in tensors if not x.isfinite().all()]:
            raise RunError(f"step {step}: the weights are no longer finite, first {bad[0]}; they were not saved. Lower "
                           f"--lr, --lr-prototypes or --lr-heads, or try --amp off; {path.name} is that of an earlier "
                           "step, if there was one")
        write_whole(path, lambda temporary: torch.save(state, temporary))


def trained(log):
    """Did the training of this log.jsonl reach its end? It writes one last line then."""
    return log.is_file() and b'"finished": true' in log.read_bytes().rpartition(b"\n{")[2]


class Log:
    """log.jsonl of a run, one object a line; lines after `step` (of a run that was killed) are dropped on resume."""

    def __init__(self, folder, rank, step):
        self.path = folder / "log.jsonl" if rank == 0 else None
        if self.path and self.path.is_file():
            lines = [json.dumps(line) + "\n" for line in read_log(self.path) if line["step"] <= step]
            write_whole(self.path, lambda temporary: temporary.write_text("".join(lines)))

    def __call__(self, record, text=None):
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
            if text:
                tqdm.write(text)


# ---------------------------------------------------------------- a model from its checkpoint
def pick_device(name="auto", local_rank=0):
    """"auto", "cpu", "cuda" or "mps" -> torch.device; UsageError for one that is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(n for n in ("cuda", "mps", "cpu") if there[n])
    if not there.get(name):
        raise UsageError(f"--device {name} is not available here; choose {' or '.join(n for n in there if there[n])}")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


CHECKPOINT = "a checkpoint of train.py, such as runs/<name>/best.pt"
DESCRIPTION = ("config", "step", "epoch", "best", "images", "dataset")           # what it holds beside tensors


def read_checkpoint(path):
    """The dict that train.py saved: config, step, best, model, optimizer, ... UsageError if it is not one."""
    return checked(path, read_file(path, CHECKPOINT))


def checked(path, state):
    """The content of a file, if it is what train.py saves; else UsageError that names what is not as it should be."""
    if not isinstance(state, dict) or not {"config", "step", "best", "model"} <= state.keys():
        raise UsageError(f"{path} is not a checkpoint of train.py: no config, step, best and model in it")
    recorded(Config, state["config"], f"{path}, config")
    step, best, model = state["step"], state["best"], state["model"]
    if absent := {"data", "method", "arch", "size", "k"} - state["config"].keys():
        raise UsageError(f"{path}, config: {min(absent)} is missing; take a checkpoint that train.py wrote")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise UsageError(f"{path}: step is {step!r}, expected a whole number of at least 0")
    if not isinstance(best, dict) or not {"split", "epoch", "accuracy"} <= best.keys():
        raise UsageError(f"{path}: best is {best!r}, expected split, epoch and accuracy")
    if not isinstance(model, dict) or not all(isinstance(x, torch.Tensor) for x in model.values()):
        raise UsageError(f"{path}: model is no dict of tensors")
    words = lambda x: isinstance(x, list) and all(isinstance(word, str) for word in x)
    named = lambda x: isinstance(x, str) and x in PIPELINES
    fields = [("dataset.classes", words, "names"), ("dataset.places", words, "names"),
              ("dataset.pipeline", named, f"one of {', '.join(PIPELINES)}")]
    if state.get("dataset") and (fault := wrong_field(state, fields)):           # older checkpoints have none
        raise UsageError(f"{path}: {fault}; take a checkpoint that train.py wrote")
    return {**state, "config": of_today(state["config"])}


def from_published(path, state_dict, name):
    """A snapshot of the published two-stage code -> a checkpoint like train.py's, under benchmark `name`.

    It carries no settings: sizes come from the tensors, everything else from the preset of the benchmark it is for.
    """
    if not name:
        raise UsageError(f"{path} is a published snapshot and does not say what it was trained on: add --data")
    try:
        model, sizes = rename_published(state_dict)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    name = data.BENCHMARKS[name].trained_on or name
    classes, (height, width) = sizes.pop("classes"), sizes.pop("size")
    if data.BENCHMARKS[name].classes and classes != data.BENCHMARKS[name].classes:
        raise UsageError(f"{path} is a published snapshot with {classes} classes, --data {name} has "
                         f"{data.BENCHMARKS[name].classes}")
    if height != width:
        raise UsageError(f"{path}: its position embedding is not that of square images, which --data {name} has")
    settings = vars(Config(**{**preset({"data": name}), "data": name}))
    config = {**settings, **sizes, "size": height, "registers": sizes["arch"]["registers"], "weights": str(path),
              "method": "ifam", "seed": None}
    best = {"split": "unknown", "epoch": None, "accuracy": None}
    return {"config": config, "step": None, "best": best, "model": model}


def load_model(path, device="cpu", name=""):
    """-> (model in evaluation mode, its checkpoint). The moving average of the weights is used where there is one.

    path: a checkpoint of train.py, or a snapshot of the published two-stage code, for which `name` is its benchmark.
    """
    state = read_file(path, CHECKPOINT)
    published = find_published(state)
    state = from_published(path, published, name) if published else checked(path, state)
    try:
        heads = [state["model"][key] for key in ("predictor.head.weight", "selector.classifier.weight")
                 if key in state["model"]]               # a miniature may have fewer classes than its benchmark
        model = build(state["config"], len(heads[0]))
        load_strictly(model, state.get("ema") or state["model"])
    except (IndexError, KeyError, ValueError) as error:
        raise UsageError(f"{path}: its weights do not fit its settings: {error}") from None
    model.checkpoint = {name: x for name, x in state.items() if name in DESCRIPTION}      # for save_safetensors, export
    return model.to(device).eval(), state


def outputs_of(model):
    """How many classes a model tells apart."""
    return (model.predictor.head if model.predictor else model.selector.classifier).out_features


def load(path, device="cpu", name=""):
    """load_model -> a model that knows its images: model.classes and model.places (names), model.pipeline, model.size.

    A checkpoint from before they were in it, or a published snapshot, has those of its benchmark; where the benchmark's
    files are not there, its classes are called class 0, class 1, ... and a line says so.
    """
    model, state = load_model(path, device, name)
    config, outputs = state["config"], outputs_of(model)
    known = state.get("dataset")
    if not known:
        try:
            root = data.find_root(config["data"], config.get("root", Config.root), config.get("mini", False))
            known = next(iter(data.read(config["data"], root, config["size"], 0).values())).described()
        except UsageError:
            data.say(f"{path} does not say what its classes are called, and {config['data']} is not there to ask: they "
                     "are numbers")
            known = {"classes": [f"class {c}" for c in range(outputs)], "places": [],
                     "pipeline": data.BENCHMARKS[config["data"]].pipeline.name}
    if len(known["classes"]) != outputs:
        raise UsageError(f"{path} has {outputs} classes, and names of {len(known['classes'])}: take a checkpoint that "
                         "train.py wrote")
    model.classes, model.places = tuple(known["classes"]), tuple(known["places"])
    model.pipeline, model.size = PIPELINES[known["pipeline"]], config["size"]
    return model


def load_published(state_dict, heads=None, **settings):
    """An IFAM from a state dict of the published two-stage code; heads: rename_published.

    The shape of the patch grid is that of the first images. settings: further arguments of IFAM, such as hardness.
    Raises ValueError for anything missing, unexpected, or of another shape.
    """
    state, sizes = rename_published(state_dict, heads)
    model = IFAM(**sizes, **settings)
    model.selector.backbone.grid_is_known = model.predictor.backbone.grid_is_known = False
    load_strictly(model, state)
    return model


# ---------------------------------------------------------------- files for other programs
def save_safetensors(model, path):
    """A trained model as one .safetensors file: weights, and as metadata config, step, best and dataset in JSON.

    model: of load or load_model, or the content of a checkpoint, whose moving average is written where there is one.
    Everything that reads a checkpoint reads this file too; resuming needs last.pt. An intervention stays a file of its
    own. UsageError for a model that is not of a checkpoint of train.py.
    """
    said = model if isinstance(model, dict) else getattr(model, "checkpoint", {})
    if not {"config", "step", "best"} <= said.keys() or said["step"] is None:
        raise UsageError(f"{path}: only a model of a checkpoint of train.py can be written, see runs.load")
    tensors = said.get("ema") or said["model"] if model is said else model.state_dict()
    metadata = {name: json.dumps(said[name]) for name in DESCRIPTION if said.get(name) is not None}
    metadata["sha256"] = checksum(tensors, metadata)
    write_whole(path, lambda temporary: write_safetensors(temporary, tensors, metadata))


def export(model, path, batch=1):
    """A trained model as a file that runs without this repository. What it is, the end of `path` says:

    .pt2          a program of torch.export: torch.export.load(path).module()(images)
    .onnx         the same for ONNX runtimes; needs the package onnxscript
    .safetensors  weights alone, see save_safetensors

    Programs take images (batch, 3, height, width), normalised, always so many and of the size of the model, and give
    logits, maps and keep, as ifam.Static does; a model that is told the true mask takes keep (batch, N) too. They carry
    ifam.json: the checkpoint's settings and, for a model of `load`, names of classes, size and normalisation. The
    program runs on the device where the model is. UsageError for another ending or a missing package.
    """
    path = Path(path)
    if path.suffix not in (".pt2", ".onnx", ".safetensors"):
        raise UsageError(f"{path}: a model is exported to a file that ends in .pt2, .onnx or .safetensors")
    if path.suffix == ".onnx" and not all(map(find_spec, ("onnx", "onnxscript"))):
        raise UsageError(f"{path}: ONNX needs packages that are not installed: pip install onnx onnxscript")
    if path.suffix == ".onnx" and sum(p.numel() * p.dtype.itemsize for p in model.parameters()) > 3 << 29:
        raise UsageError(f"{path}: one ONNX file cannot hold a model of this size; export it as .pt2")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: {path.parent} is no folder; name a file in a folder that exists")
    if path.suffix == ".safetensors":
        return save_safetensors(model, path)
    program, inputs = traced(model, batch)
    said = dict(getattr(model, "checkpoint", {}))
    if hasattr(model, "pipeline"):
        said |= {"classes": model.classes, "size": model.size, "normalisation": model.pipeline.normalisation}
    if path.suffix == ".onnx":
        return write_onnx(path, program, inputs, json.dumps(said))

    def write(temporary):
        with open(temporary, "wb") as file:
            torch.export.save(program, file, extra_files={"ifam.json": json.dumps(said)})
    write_whole(path, write)


def refuse_told(model, what, instead):
    """UsageError for a model of --trim truth where no true mask can be given. what: how to call it."""
    if model.trim == "truth":
        raise UsageError(f"{what} was trained with --trim truth, a measurement that is told where the object is: "
                         f"{instead}")


def traced(model, batch):
    """-> (torch.export's program of ifam.Static(model), {name of an input: an example})."""
    refuse_told(model, "this model", "export it as .safetensors")
    if getattr(model, "largest", False):
        raise UsageError("a model of --mask-largest searches its mask until nothing changes, which a program with "
                         "fixed shapes cannot: export it as .safetensors")
    static = Static(model)
    backbone = (model.predictor or model.selector).backbone
    parameter = next(model.parameters())
    sides = getattr(model.selector, "given", None) or [n * backbone.patch for n in backbone.grid]
    inputs = {"images": parameter.new_zeros(batch, 3, *sides)}
    if model.needs_truth:
        inputs["keep"] = parameter.new_ones(batch, math.prod(backbone.grid))
    return torch.export.export(static, tuple(inputs.values())), inputs


def write_onnx(path, program, inputs, said):
    """torch.export's program as an ONNX file, whole or not at all; what it logs on the way is left out."""
    outputs = ["logits", "maps", "kept" if "keep" in inputs else "keep"]         # an input has the other name
    there = [name for name, spec in zip(outputs, program.graph_signature.user_outputs) if spec is not None]
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            found = torch.onnx.export(program, tuple(inputs.values()), input_names=list(inputs), output_names=there,
                                      dynamo=True, verbose=False)
            found.model.metadata_props["ifam.json"] = said
            write_whole(path, lambda temporary: found.save(temporary, external_data=False))
    finally:
        logging.disable(logging.NOTSET)


# ---------------------------------------------------------------- files that are compared and checked
def hash_of(path):
    """SHA-256 of a file, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_best(report, folder):
    """Is a report of the best.pt that is in the folder now? None where it does not say, or there is no best.pt."""
    checkpoint, best = report.get("checkpoint") if isinstance(report, dict) else None, folder / "best.pt"
    if not isinstance(checkpoint, dict) or not best.is_file():
        return None
    return checkpoint.get("file") == "best.pt" and checkpoint.get("sha256") == hash_of(best)


def wrong_field(content, fields):
    """The first field of a JSON file that is not as expected, as text, or "". fields: [("a.b", test, expected)]."""
    for field, holds, expected in fields:
        value = content
        for key in field.split("."):
            if not isinstance(value, dict) or key not in value:
                return f"{field} is missing, expected {expected}"
            value = value[key]
        if not holds(value):
            return f"{field} is {json.dumps(value)[:60]}, expected {expected}"
    return ""
