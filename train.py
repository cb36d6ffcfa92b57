"""train.py: train iFAM, or what it is compared with. One process or many, one step readable from top to bottom.

    python train.py --data waterbirds --mini                            # offline, minutes on a laptop
    torchrun --nproc_per_node=8 train.py --data waterbirds              # the paper's settings, data under ./data
    python train.py --data waterbirds --mini --method erm --seed 1      # the comparison

A run lives in runs/<name>: config.json, log.jsonl, last.pt (to resume), best.pt (to evaluate). Every default can be
seen with --help; a benchmark's preset replaces defaults, the command line replaces both.
"""
import copy
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import ifam
from baselines import GIVEN, METHODS, PRETRAINED, TAKES, FoundMask, build
from evaluate import given_mask, pick_device, predict, read_checkpoint
from metrics import accuracies
from samples import Plan
from settings import RunError, UsageError, opt, parse, run_script, write_json, write_whole
from weights import load_pretrained


@dataclass
class Config:
    data: str = opt("waterbirds", f"benchmark ({data.overview()})", choices=tuple(data.BENCHMARKS))
    root: str = opt("data", "folder that holds the unpacked benchmarks")
    mini: bool = opt(False, "use the miniature of the benchmark: drawn on first use, no download")
    limit: int = opt(0, "use only N training and evaluation samples, spread evenly (0: all)")
    val_share: float = opt(0.0, "hold out this share of the training images of each class as validation, where a "
                                "benchmark has none, such as 0.1 (0: none)")

    method: str = opt("ifam", "ifam, or a baseline", choices=METHODS)
    arch: str = opt("b", "size of the vision transformers", choices=tuple(ifam.ARCHS))
    registers: int = opt(4, "register tokens; 0 for weights without registers")
    weights: str = opt("dinov2", "start of all backbones: dinov2 or rad-dino (downloaded once), mini (weights/mini.pt, "
                                 "for --arch mini), a file of DINOv2, timm or Hugging Face, or none")
    size: int = opt(518, "image side in pixels, a multiple of the patch")
    selector_size: int = opt(0, "side at which stage 1 looks at the image, smaller is faster (0: --size)")
    selector_arch: str = opt("", "a smaller ViT for stage 1: s where --arch is b, or b/6 for the first 6 blocks of b "
                                 "(if not given, that of --arch)")
    k: int = opt(8, "foreground parts")
    masking: str = opt("early", "where the mask acts", choices=("early", "late"))
    hardness: str = opt("hard", "binary mask, or any weight in [0, 1]", choices=("hard", "soft"))
    pooling: str = opt("cls", "what stage 2 classifies from: class token, mean of the kept patches (the default of "
                              "early-* and late-*), or their sum over the number of all patches (late-*, as published)",
                       choices=("cls", "mean", "mean-all"))
    joint: bool = opt(True, "let the stage-2 loss reach stage 1 through the mask, as in the paper")
    shaping: bool = opt(True, "the losses that shape parts; without them ifam is a joint amortised model (JAM)")
    stage1_class: bool = opt(True, "the class loss of stage 1")
    freeze_stage2: bool = opt(False, "of the backbone of stage 2 train class token, registers and positions only")
    train_backbone: bool = opt(False, "ep and aim: train the backbone too")
    train_tokens: bool = opt(True, "train class token, registers and positions of a pretrained stage 1, as in the "
                                   "paper")
    tau: float = opt(1.0, "temperature of the part assignment")
    part_dropout1: float = opt(0.3, "share of parts dropped before the stage-1 classifier")
    part_dropout2: float = opt(0.3, "share of parts dropped in the mask of stage 2")

    epochs: int = opt(90, "passes over the training set")
    batch: int = opt(16, "images per step over all processes and accumulation steps")
    micro: int = opt(0, "most images at once in a process; more are accumulated, and the presence loss takes its "
                        "maximum within each portion (0: no limit)")
    lr: float = opt(1e-6, "learning rate at batch 16 of the backbone that trains, scaled by sqrt(batch / 16)")
    lr_tokens: float = opt(1e-6, "the same for the tokens of a frozen stage 1")
    lr_prototypes: float = opt(1e-3, "the same for the prototypes")
    lr_heads: float = opt(1e-2, "the same for modulation, fc_norm and classifiers")
    warmup: int = opt(0, "steps of linear warm-up of stage 2, so that it learns little before there are parts")
    weight_decay: float = opt(0.05, "multiplied by sqrt(1 / steps); matrices only")
    clip: float = opt(2.0, "largest gradient norm")
    ema: float = opt(0.0, "decay of an exponential moving average of the weights, which is then evaluated (0: none)")
    amp: str = opt("auto", "autocast: auto is bf16 on a GPU that has it, fp16 on others, off elsewhere",
                   choices=("auto", "bf16", "fp16", "off"))

    weight_class1: float = opt(1.0, "loss weight: class, stage 1")
    weight_class2: float = opt(1.0, "loss weight: class, stage 2")
    weight_presence: float = opt(1.0, "loss weight: every part occurs in the batch")
    weight_background: float = opt(2.0, "loss weight: background in every image, at its border")
    weight_orthogonality: float = opt(1.0, "loss weight: parts have different features")
    weight_equivariance: float = opt(1.0, "loss weight: parts move with the image")
    weight_variation: float = opt(1.0, "loss weight: neighbouring patches agree")
    weight_entropy: float = opt(1.0, "loss weight: patches are sure of their part")
    weight_concentration: float = opt(0.0, "loss weight: parts are compact (PDiscoNet)")

    seed: int = opt(0, "decides initial weights, order, augmentation, noise and dropout")
    device: str = opt("auto", "auto, cpu, cuda or mps")
    compile: bool = opt(False, "torch.compile both stages")
    workers: int = opt(4, "processes that load data, per training process")
    out: str = opt("", "folder of the run (default runs/<data>, with -mini and -<method> where they apply)")
    resume: bool = opt(False, "go on from last.pt of this run")
    save_every: int = opt(500, "steps between saves of last.pt (it is also saved after every epoch)")
    log_every: int = opt(20, "steps between log lines")

    def __post_init__(self):
        suffix = "-mini" * self.mini + f"-{self.method}" * (self.method != "ifam")
        self.out = self.out or f"runs/{self.data}{suffix}"


# Config's defaults are the paper's (appendix A.1); data.BENCHMARKS says what differs by benchmark, this by miniature.
MINI = dict(arch="mini", size=96, weights="mini", k=4, epochs=2, batch=8, lr=7e-4, lr_tokens=1e-5, lr_prototypes=2.5e-3,
            lr_heads=1e-2, warmup=240, weight_class2=0.1, weight_presence=3.0, weight_variation=0.33, workers=0)
FREE = {"root", "device", "workers", "out", "resume", "save_every", "log_every", "compile"}   # may change on --resume


def preset(given):
    """What was typed -> the settings of its benchmark that replace Config's defaults."""
    benchmark = data.BENCHMARKS[given.get("data", Config.data)]
    settings = benchmark.settings
    if given.get("mini"):                                # its own network and schedule, the benchmark's loss
        settings = {**{name: x for name, x in settings.items() if name.startswith("weight_")}, **MINI}
    if given.get("method") in GIVEN:                     # early and late read the same, so that one thing differs
        settings = {**settings, "pooling": "mean"}
    refuse_foreign(given)
    return {"size": benchmark.size, "k": benchmark.k, **settings}


def refuse_foreign(given):
    """UsageError for a setting that was typed and that the method does not have."""
    method = given.get("method", Config.method)
    for name, methods in TAKES.items():
        if name in given and method in METHODS and method not in methods:
            raise UsageError(f"--{name.replace('_', '-')} means nothing to --method {method}, only to "
                             f"{', '.join(methods)}; leave it out")


# ---------------------------------------------------------------- functions of the step
def lr_at(step, steps, warmup=0, least=0.0):
    """Factor of the learning rate: linear warm-up, then cosine from 1 to 0, but not below `least`."""
    if step < warmup:
        return (step + 1) / warmup
    return max(least, 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def generator(*numbers):
    """A generator that is a function of whole numbers such as (seed, step, position in the batch)."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def draw_noise(model, cfg, step, positions):
    """Noise of the images at these positions of the global batch, and of their warped copies.

    The position and not the rank decides, so a step is the same however many processes or accumulation steps share it.
    """
    if model.selector is None:
        return None
    generators = [generator(cfg.seed, step, half, p) for half in (1, 2) for p in positions]
    patches = math.prod(model.selector.backbone.grid)
    return ifam.Noise.draw(cfg.k, patches, cfg.part_dropout1, cfg.part_dropout2, generators)


# ---------------------------------------------------------------- parameters
def freeze_backbone(stage, train_tokens=True):
    """Pretrained blocks of a stage stay; its class token, registers and positions train (paper, appendix A.1)."""
    tokens = {id(t) for t in stage.backbone.tokens() if train_tokens}
    for p in stage.backbone.parameters():
        p.requires_grad_(id(p) in tokens)


def parameter_groups(model, cfg, steps):
    """AdamW groups (paper, appendix A.1): a learning rate by role, weight decay on matrices only."""
    scale = math.sqrt(cfg.batch / 16)
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        role = ("prototypes" if "prototypes" in name else "heads" if ".backbone." not in name else
                "tokens" if cfg.weights != "none" and name.startswith("selector.") else "backbone")
        token = name.endswith(("cls_token", "register_tokens", "pos_embed"))
        decays = p.ndim > 1 and not token and role != "prototypes" and "modulation" not in name
        base = {"backbone": cfg.lr, "tokens": cfg.lr_tokens, "prototypes": cfg.lr_prototypes, "heads": cfg.lr_heads}
        lr = base[role] * scale
        wd = cfg.weight_decay * math.sqrt(1 / steps) if decays else 0.0
        warmup = cfg.warmup if name.startswith("predictor.") else 0
        group = dict(params=[], lr=lr, base_lr=lr, weight_decay=wd, warmup=warmup)
        groups.setdefault((role, decays, warmup), group)["params"].append(p)
    return list(groups.values())


# ---------------------------------------------------------------- losses over processes
def max_over_processes(local, world):
    """Elementwise maximum over processes, with the gradient that one process with the whole batch would have.

    Only the process that holds a maximum gets its gradient, times `world` because gradients are averaged later.
    """
    if world == 1:
        return local
    top = local.detach().clone()
    dist.all_reduce(top, dist.ReduceOp.MAX)
    return top + world * (local.detach() == top) * (local - local.detach())


def loss_terms(model, out, warped_maps, labels, affine, wanted, world=1):
    """The loss terms that this model has and that are wanted, by name, unweighted."""
    terms = {}
    if model.predictor is not None:
        terms["class2"] = lambda: F.cross_entropy(out.logits.float(), labels)
    if model.selector is not None:
        terms["class1"] = lambda: F.cross_entropy(out.logits_stage1.float(), labels)
        terms["presence"] = lambda: ifam.presence(out.maps, lambda peaks: max_over_processes(peaks, world))
        terms["background"] = lambda: ifam.background_presence(out.maps)
        terms["orthogonality"] = lambda: ifam.orthogonality(out.part_features)
        terms["equivariance"] = lambda: ifam.equivariance(out.maps, warped_maps, affine)
        terms["variation"] = lambda: ifam.total_variation(out.maps)
        terms["entropy"] = lambda: ifam.entropy(out.maps)
        terms["concentration"] = lambda: ifam.concentration(out.maps)
    return {name: term() for name, term in terms.items() if name in wanted}


def average_over_processes(tensors, world):
    """Replace tensors by their mean over processes, in one message.

    Written out instead of DistributedDataParallel: two stages, a doubled batch and accumulation need no wrapper, and
    the reader sees what is exchanged.
    """
    if world > 1:
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        for x, mean in zip(tensors, (flat / world).split([x.numel() for x in tensors])):
            x.copy_(mean.view_as(x))


def gradients(model, cfg, batch, step, rank=0, world=1, device="cpu", dtype=None, scaler=None):
    """Forward and backward of one step -> every loss term by its name, averaged; p.grad holds the mean gradient.

    batch: this process's share of the global batch, as the loader gives it. All randomness is a function of
    (seed, step, position in the global batch): one process, many, or accumulation compute the same step, except that
    under accumulation the presence loss takes its maximum within each portion.
    """
    wanted = {name: weight for name, weight in weights(cfg).items() if weight}
    share = len(batch["label"])
    affine = ifam.Affine.draw((cfg.size, cfg.size), generator(cfg.seed, step))    # one for the whole global batch
    sums = {}
    keep = given_mask(model, batch, device)
    for part in torch.arange(share).split(cfg.micro or share):
        images, labels = (batch[key][part].to(device, non_blocking=True) for key in ("image", "label"))
        noise = draw_noise(model, cfg, step, (rank * share + part).tolist())
        with torch.autocast(torch.device(device).type, dtype) if dtype else nullcontext():
            warped = None if model.selector is None else ifam.warp(images, affine)
            out, warped_maps = model.forward_pair(images, warped, noise and noise.to(device),
                                                  None if keep is None else keep[part])
        terms = loss_terms(model, out, warped_maps, labels, affine, wanted, world)
        loss = sum(wanted[name] * value for name, value in terms.items()) * (len(part) / share)
        (scaler.scale(loss) if scaler else loss).backward()
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value.detach().float() * (len(part) / share)
    average_over_processes(list(sums.values()) + [p.grad for p in model.parameters() if p.grad is not None], world)
    return sums


def weights(cfg):
    """-> {name of a loss term: its weight}; 0 for what --no-shaping and --no-stage1-class switch off."""
    found = {f.name[len("weight_"):]: getattr(cfg, f.name) for f in fields(Config)
             if f.name.startswith("weight_") and f.name != "weight_decay"}
    on = {"class1": cfg.stage1_class, "class2": True}
    return {name: weight * on.get(name, cfg.shaping) for name, weight in found.items()}


def refuse_non_finite(values, step):
    """Stop before the optimizer sees it, naming the first value that is not finite."""
    if not torch.stack(list(values.values())).isfinite().all():
        name = next(n for n, v in values.items() if not v.isfinite())
        raise RunError(f"step {step}: {name} is {values[name].item()}; this step changed no weights. Lower --lr, "
                       "--lr-prototypes or --lr-heads, or try --amp off; last.pt holds the last saved step")


# ---------------------------------------------------------------- files of a run
def plain(value):
    """Tuples to lists, as JSON and checkpoints have them."""
    return json.loads(json.dumps(value))


def differences(config, cfg):
    """Settings of a run that was recorded (a dict) that are not those of cfg -> {name: (then, now)}.

    A setting that did not exist then had its default.
    """
    both = {f.name: (config.get(f.name, f.default), plain(getattr(cfg, f.name))) for f in fields(Config)
            if f.name not in FREE}
    return {name: (then, now) for name, (then, now) in both.items() if then != now}


def open_run(cfg, rank):
    """The checkpoint to resume from, or None and a new folder. A run that is already there is moved aside, not lost."""
    folder = Path(cfg.out)
    if cfg.resume:
        if not folder.is_dir():
            raise UsageError(f"--resume: no run at {folder} (name it with --out)")
        state = read_checkpoint(folder / "last.pt") if (folder / "last.pt").is_file() else None
        try:                                             # without last.pt it was killed before its first save
            config = state["config"] if state else json.loads((folder / "config.json").read_text())
        except (OSError, ValueError):
            raise UsageError(f"--resume: no run at {folder}, it has neither last.pt nor config.json") from None
        for name, (then, now) in differences(config, cfg).items():
            raise UsageError(f"--resume: {folder} was started with --{name.replace('_', '-')} {then}, not {now}"
                             "; use the old value, or another --out")
        return state
    if rank == 0:
        if (folder / "config.json").is_file():
            old = next(p for n in range(1, 10 ** 6) if not (p := folder.with_name(f"{folder.name}.{n}")).exists())
            folder.rename(old)
            print(f"{folder} was already there: moved to {old}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {folder}: cannot make this folder ({error})") from None
        write_json(folder / "config.json", asdict(cfg))
    return None


def save(path, rank, cfg, step, best, parts):
    """Rank 0 writes a checkpoint, whole or not at all. parts: {name: what has a state_dict, or None}."""
    if rank == 0:
        state = dict(config=plain(asdict(cfg)), step=step, best=best,
                     **{name: part.state_dict() for name, part in parts.items() if part is not None})
        write_whole(path, lambda temporary: torch.save(state, temporary))


class Log:
    """log.jsonl of a run, one object a line; lines after `step` (of a run that was killed) are dropped on resume."""

    def __init__(self, folder, rank, step):
        self.path = folder / "log.jsonl" if rank == 0 else None
        if self.path and self.path.is_file():
            lines = [line for line in self.path.read_text().splitlines(True)
                     if line.endswith("\n") and json.loads(line)["step"] <= step]
            write_whole(self.path, lambda temporary: temporary.write_text("".join(lines)))

    def __call__(self, record, text=None):
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
            if text:
                tqdm.write(text)


# ---------------------------------------------------------------- the loop
def start_processes(cfg):
    """-> rank, number of processes, device, as torchrun set them."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(cfg.device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)                    # collectives of Python objects use the current device
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
        if cfg.batch % world:
            raise UsageError(f"--batch {cfg.batch} does not divide over {world} processes")
    return rank, world, device


def check(cfg):
    """Settings that no part of the program could use."""
    for f in fields(Config):
        value, flag = getattr(cfg, f.name), f"--{f.name.replace('_', '-')}"
        least = int(f.name in ("k", "size", "epochs", "batch", "save_every", "log_every"))
        if f.type in (int, float) and not (math.isfinite(value) and value >= least):
            raise UsageError(f"{flag} must be a number of at least {least}, not {value}")
    if where := data.BENCHMARKS[cfg.data].trained_on:
        raise UsageError(f"--data {cfg.data} is for evaluation only: train with --data {where}, then "
                         f"evaluate.py --ckpt runs/{where}/best.pt --data {cfg.data}")
    for name in ("part_dropout1", "part_dropout2", "ema", "val_share"):
        if not 0 <= getattr(cfg, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be in [0, 1), not {getattr(cfg, name)}")
    if cfg.weights == "none" and (cfg.freeze_stage2 or cfg.method in PRETRAINED and not cfg.train_backbone):
        what = "--freeze-stage2" if cfg.freeze_stage2 else f"--method {cfg.method}"
        raise UsageError(f"{what} takes the backbone as it is, and with --weights none it is random: give --weights")
    if cfg.selector_size > cfg.size:
        raise UsageError(f"--selector-size {cfg.selector_size} is larger than the image (--size {cfg.size}): there is "
                         "nothing more to see")
    if cfg.tau <= 0:
        raise UsageError(f"--tau must be positive, not {cfg.tau}")
    if cfg.mini and cfg.root != Config.root:
        raise UsageError("--mini draws its own data: leave out --root or --mini")


def build_model(cfg, device, classes=None):
    """classes: if they are not the benchmark's, on a miniature or a part of it."""
    torch.manual_seed(cfg.seed)
    try:
        model = build(asdict(cfg), classes or data.BENCHMARKS[cfg.data].classes)
    except ValueError as error:
        raise UsageError(f"these settings make no model: {error}") from None
    load_pretrained(model, cfg.weights, cfg.arch, cfg.registers, cfg.selector_arch)
    if isinstance(model, FoundMask):
        model.copy_backbone()
    if cfg.weights != "none" and model.selector is not None:
        freeze_backbone(model.selector, cfg.train_tokens)
    if cfg.freeze_stage2:
        freeze_backbone(model.predictor)
    model.to(device)
    if cfg.compile:
        compile_stages(model)
    return model


def compile_stages(model, **how):
    """torch.compile both stages, but for what has another shape in every batch and would be compiled anew."""
    for name in ("_run_packed", "_kept_first"):          # not where they are defined: importing torch.compiler's
        setattr(ifam.ViT, name, torch.compiler.disable(getattr(ifam.ViT, name)))     # machinery doubles that of torch
    for stage in filter(None, (model.selector, model.predictor)):
        stage.compile(**how)


def autocast_of(cfg, device):
    """-> (dtype of autocast or None, GradScaler). fp16 needs its losses scaled, bf16 does not."""
    amp = cfg.amp
    if amp == "auto":
        amp = "off" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    return dtype, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def open_data(cfg, rank, world):
    """-> the training split, and the validation split or None. Rank 0 draws a miniature, the others wait for it."""
    if rank == 0:
        data.find_root(cfg.data, cfg.root, cfg.mini)
    if world > 1:
        dist.barrier()
    root = data.find_root(cfg.data, cfg.root, cfg.mini)
    splits = data.load(cfg.data, root, cfg.size, cfg.seed, cfg.limit, ("train", "val"), val_share=cfg.val_share)
    if len(splits["train"]) < cfg.batch:
        raise UsageError(f"--batch {cfg.batch} is larger than the training set ({len(splits['train'])} images)")
    return splits["train"], splits.get("val")


def train(cfg):
    check(cfg)
    rank, world, device = start_processes(cfg)
    dtype, scaler = autocast_of(cfg, device)
    samples, val = open_data(cfg, rank, world)
    model = build_model(cfg, device, len(samples.classes))
    if model.needs_truth:
        if samples.masks is None:
            raise UsageError(f"--method {cfg.method} needs true masks, and {cfg.data} has none here; "
                             "unpack its segmentations, or choose another --method")
        if samples.masks_tell:
            raise UsageError(f"--method {cfg.method}: the masks of {cfg.data} mark the {samples.classes[1]} and are "
                             "empty without one, which gives the label away; choose another --method")
        samples.train_masks = True
    per_epoch = len(samples) // cfg.batch
    steps = per_epoch * cfg.epochs
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameter_groups(model, cfg, steps), fused=device.type in ("cpu", "cuda"))
    averaged = copy.deepcopy(model).requires_grad_(False) if cfg.ema else None
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "ema": averaged}
    start, best = 0, {"split": "val" if val else "none, this is the last epoch", "epoch": 0, "accuracy": None}
    if state := open_run(cfg, rank):
        start, best = state["step"], state["best"]
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state[name])
    folder = Path(cfg.out)
    log = Log(folder, rank, start)
    log({"step": start, "command": sys.argv, "config": asdict(cfg), "torch": torch.__version__, "processes": world},
        f"{cfg.method}: {sum(p.numel() for p in trained):,} trained parameters, steps {start} to "
        f"{steps} ({cfg.epochs} epochs), {world} process{'es' * (world > 1)} on {device.type} -> {folder}")

    plan = Plan(len(samples), cfg.batch, start, steps, cfg.seed, rank, world)
    loader = torch.utils.data.DataLoader(samples, batch_sampler=plan, num_workers=cfg.workers,
                                         pin_memory=device.type == "cuda")
    clock, since, waited = time.perf_counter(), start, 0.0
    ready = clock                                        # for the next batch
    model.train()
    for step, batch in enumerate(tqdm(loader, cfg.method, unit="step", disable=None if rank == 0 else True), start):
        waited += time.perf_counter() - ready
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_at(step, steps, group["warmup"])
        terms = gradients(model, cfg, batch, step, rank, world, device, dtype, scaler)
        refuse_non_finite({f"the loss term {name!r}": value for name, value in terms.items()}, step)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trained, cfg.clip)
        if not scaler.is_enabled():                      # the scaler of fp16 skips such a step by itself
            refuse_non_finite({"the gradient norm": norm}, step)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if averaged:
            with torch.no_grad():
                for slow, fast in zip(averaged.parameters(), model.parameters()):
                    slow.lerp_(fast, 1 - cfg.ema)
                for slow, fast in zip(averaged.buffers(), model.buffers()):
                    slow.copy_(fast)                     # statistics of aim's batch-norm: already averages

        done, end_of_epoch = step + 1, (step + 1) % per_epoch == 0
        if done % cfg.log_every == 0 or done == steps:
            values = {name: value.item() for name, value in terms.items()}
            seconds = time.perf_counter() - clock
            speed, waiting = (done - since) * cfg.batch / seconds, waited / seconds
            clock, since, waited = time.perf_counter(), done, 0.0
            loss = sum(weights(cfg)[name] * value for name, value in values.items())
            log({"step": done, "epoch": done / per_epoch, "lr_factor": lr_at(step, steps), "loss": loss,
                 **values, "gradient_norm": norm.item() if norm.isfinite() else None, "images_per_second": speed,
                 "waiting": waiting},
                f"step {done}/{steps}  loss {loss:.3f}  {'  '.join(f'{n} {v:.3f}' for n, v in values.items())}  "
                f"{speed:.0f} images/s, {waiting:.1%} of the time waiting for data")
        if end_of_epoch:
            now = {"split": best["split"], "epoch": done // per_epoch, "accuracy": None}
            if val:
                result = predict(averaged or model, val, cfg.micro or cfg.batch // world, device, cfg.workers)
                score = accuracies(result, val)
                now["accuracy"] = score["aa"]
                log({"step": done, "epoch": now["epoch"], "val": score},
                    f"epoch {now['epoch']}: validation accuracy {score['aa']:.3f}, "
                    f"worst group {score['worst_group']:.3f}")
                model.train()
            if not val or best["accuracy"] is None or now["accuracy"] > best["accuracy"]:
                best = now
                save(folder / "best.pt", rank, cfg, done, best, parts)
        if end_of_epoch or done % cfg.save_every == 0:
            save(folder / "last.pt", rank, cfg, done, best, parts)
        ready = time.perf_counter()
    log({"step": steps, "finished": True})               # sweep.py looks for it
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def main(argv=None):
    train(parse(Config, __doc__, argv, preset))


if __name__ == "__main__":
    run_script(main)
