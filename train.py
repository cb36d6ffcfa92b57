"""train.py: train iFAM, or what it is compared with. One process or many, one step readable from top to bottom.

    python train.py --data waterbirds --mini                            # offline, minutes on a laptop
    torchrun --nproc_per_node=8 train.py --data waterbirds              # the paper's settings, data under ./data
    python train.py --data waterbirds --mini --method erm --seed 1      # the comparison
    python train.py --config runs/waterbirds-mini/config.json --seed 1 --out runs/seed-1     # another run's settings

A run lives in runs/<name>: config.json, log.jsonl, last.pt (to resume), best.pt (to evaluate), curves.png, and with
--film the masks of a few images while it trained. The preset of a benchmark replaces the defaults, --config the preset,
the command line all of them.

Floor: commands. Read ifam.py (the model and its losses) and runs.py (settings, checkpoints) first, then from
`gradients`, which is one step, to `train`, which is all of them.
"""
import copy
import itertools
import math
import os
import sys
import time
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import data
import ifam
import objectives
import settings
import vit
from augment import Finder, Swap, find_masks, hide, teach_finder
from baselines import SEGMENT, FoundMask, RandomMask, Segmenter, build, patch_targets
from benchmarks.samples import Plan, balanced, boxes_of, patch_share, spread_over_groups
from measure.leakage import given
from measure.metrics import accuracies
from predict import predict
from runs import (SELECT, Config, Log, check, claim, earlier_state, finished_state, loss_weights, owned, pick_device,
                  preset, read_film, read_settings, recipe_text, refuse_other_images, save)
from settings import RunError, Stopped, UsageError, leave_signals, parse, progress, run_script, signals, write_json
from weights import load_pretrained, reader


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
    return ifam.Noise.draw(cfg.k, patches, cfg.part_dropout1, cfg.part_dropout2, generators,
                           cfg.mask_dilate == "random")


# ---------------------------------------------------------------- parameters
def freeze_backbone(stage, train_tokens=True):
    """Pretrained blocks of a stage stay; its class token, registers and positions train (paper, appendix A.1)."""
    tokens = {id(t) for t in stage.backbone.tokens() if train_tokens}
    for p in stage.backbone.parameters():
        p.requires_grad_(id(p) in tokens)


def role_of(name, cfg):
    """The part that a parameter plays: its learning rate is that of cfg.lr_<role>, of "backbone" cfg.lr."""
    return ("prototypes" if "prototypes" in name else "heads" if ".backbone." not in name else
            "tokens" if cfg.stage1_starts_from() != "none" and name.startswith("selector.") else "backbone")


def parameter_groups(model, cfg, steps):
    """AdamW groups (paper, appendix A.1): a learning rate by role, weight decay on matrices only."""
    scale = math.sqrt(cfg.batch / 16)
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        role = role_of(name, cfg)
        token = name.endswith(("cls_token", "register_tokens", "pos_embed", ".queries"))
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


def average_over_processes(tensors, world):
    """Replace a few numbers by their mean over processes, in one message."""
    if world > 1:
        flat = torch.stack(tensors)
        dist.all_reduce(flat)
        for x, mean in zip(tensors, flat / world):
            x.copy_(mean)


class Buckets:
    """Averages gradients over processes while backward still runs: a message leaves as soon as its 25 MiB are there.

    Parameters are taken from the last to the first, as backward reaches them, and messages leave in one order that all
    processes share, whatever each of them used. A parameter without a gradient is sent as zeros, with a flag that says
    so; one that no process used keeps none, and from the next step on goes last, so that no message waits for it.
    Written out instead of DistributedDataParallel: two stages, a doubled batch and accumulation need no wrapper, and
    the reader sees what is exchanged. parameters: those that do not train are left out.
    """
    BYTES = 25 * 2 ** 20

    def __init__(self, parameters, world):
        self.parameters = [p for p in parameters if p.requires_grad][::-1]
        self.world, self.listening, self.idle = world, False, []
        if world > 1:
            self.fill()
            for p in self.parameters:
                p.register_post_accumulate_grad_hook(self.arrived)

    def fill(self):
        """Share the parameters out, idle ones last."""
        idle = {id(p) for p in self.idle}
        self.buckets, room = [], 0
        for p in sorted(self.parameters, key=lambda p: id(p) in idle):           # a stable sort
            size = p.numel() * p.element_size()
            if size > room:
                self.buckets.append([])
                room = self.BYTES
            self.buckets[-1].append(p)
            room -= size
        self.bucket_of = {id(p): i for i, bucket in enumerate(self.buckets) for p in bucket}

    def start(self):
        """The next backward pass is the last one of a step: gradients leave when they arrive."""
        self.sent, self.missing, self.listening = [], [len(bucket) for bucket in self.buckets], True

    def arrived(self, p):
        """A hook: the gradient of p is whole."""
        if self.listening:
            self.missing[self.bucket_of[id(p)]] -= 1
            while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
                self.send()

    @torch.no_grad()
    def send(self):
        """The next bucket as one tensor, of which its gradients become views, so that none is held twice."""
        bucket = self.buckets[len(self.sent)]
        used = bucket[0].new_ones(len(bucket))
        for i, p in enumerate(bucket):
            if p.grad is None:
                used[i] = 0
        flat = torch.cat([*((torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket), used])
        for p, mean in zip(bucket, flat.split([*(p.numel() for p in bucket), len(bucket)])):
            p.grad = mean.view_as(p)
        self.sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def finish(self):
        """Send what is left, and wait: gradients are means over all processes then."""
        self.listening = False
        while len(self.sent) < len(self.buckets):
            self.send()
        for flat, message in self.sent:
            message.wait()
            flat /= self.world
        used = torch.cat([flat[-len(bucket):] for bucket, (flat, _) in zip(self.buckets, self.sent)]).tolist()
        self.sent, before = [], {id(p) for p in self.idle}
        self.idle = [p for p, share in zip(itertools.chain(*self.buckets), used) if not share]
        for p in self.idle:
            p.grad = None
        if {id(p) for p in self.idle} != before:
            self.fill()


def taught(model, cfg, batch, device):
    """What true masks teach a model, and what is hidden from it -> more arguments of forward_pair, {} for most."""
    told, grid = {}, (model.selector or model.predictor).backbone.grid
    covered = lambda on: patch_share(batch["hidden"].to(device), on) > 0.5
    if cfg.masktune and cfg.hide_with == "patches":
        told["seen" if model.selector else "keep"] = (~covered(model.predictor.backbone.grid)).float()
    by = SEGMENT.get(cfg.method, cfg.supervise)
    if by == "none":
        return told
    masks = batch["mask"].to(device)
    shares = patch_share(boxes_of(masks) if by == "boxes" else masks, grid)
    if model.selector:                                   # a hidden patch is background
        return {**told, "objects": shares.masked_fill(covered(grid), 0) if "seen" in told else shares}
    classes = model.predictor.head.out_features
    return {**told, "targets": patch_targets(shares, batch["label"].to(device), classes, model.outside)}


def gradients(model, cfg, batch, step, rank=0, buckets=None, device="cpu", dtype=None, scaler=None, swap=None):
    """Forward and backward of one step -> "loss", its terms by name and "accuracy", averaged; so is p.grad.

    batch: this process's share of the global batch, as the loader gives it. buckets: Buckets of the model's parameters;
    None without other processes. "weight" and "member" of the batch: what Objective.of gives. swap: augment.Swap, or
    None. All randomness is a function of (seed, step, position in the global batch): one process, many, or accumulation
    compute the same step, except that under accumulation the presence loss takes its maximum within each portion, and
    that backgrounds are swapped within each process's share.
    """
    weights, world = loss_weights(cfg), buckets.world if buckets else 1
    share = len(batch["label"])
    affine = ifam.Affine.draw((cfg.size, cfg.size), generator(cfg.seed, step))    # one for the whole global batch
    sums = {}
    positions = range(rank * share, (rank + 1) * share)
    amp = torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None)
    if swap:
        with amp:
            batch = swap(model, batch, [generator(cfg.seed, step, 4, p) for p in positions], device)
    if isinstance(model, RandomMask):                    # other masks at each step
        generators = [generator(cfg.seed, step, 3, p) for p in positions]
        told = {"keep": model.draw(generators, math.prod(model.predictor.backbone.grid)).to(device)}
    else:
        told = {**given(model, batch, device), **taught(model, cfg, batch, device)}
    parts = torch.arange(share).split(cfg.micro or share)
    for number, part in enumerate(parts, 1):
        images, labels = (batch[key][part].to(device, non_blocking=True) for key in ("image", "label"))
        noise = draw_noise(model, cfg, step, (rank * share + part).tolist())
        with amp:
            warped = None if model.selector is None else ifam.warp(images, affine)
            out, warped_maps = model.forward_pair(images, warped, noise and noise.to(device),
                                                  **{name: x[part] for name, x in told.items()})
            if weights["complement"]:
                out = model.complement(images, out, model.prior)
        terms, weight = {}, len(part) / share
        own = {name: batch[name][part].to(device) for name in ("weight", "member") if name in batch}
        loss = ifam.loss(out, warped_maps, labels, affine, weights,
                         lambda peaks: max_over_processes(peaks, world), terms, cfg.presence_window,
                         own.get("weight"))
        if world > 1 and number == len(parts):
            buckets.start()
        (scaler.scale(loss * weight) if scaler else loss * weight).backward()
        accuracy = (out.logits.argmax(1) == labels).float().mean()
        by_group = objectives.group_losses(out, labels, own["member"]) if "member" in own else {}
        for name, value in {**terms, **by_group, "accuracy": accuracy, "loss": loss}.items():
            sums[name] = sums.get(name, 0.0) + value.detach().float() * weight
    if world > 1:
        buckets.finish()
    average_over_processes(list(sums.values()), world)
    return sums


def refuse_non_finite(values, step):
    """Stop before the optimizer sees it, naming the first value that is not finite."""
    if not torch.stack(list(values.values())).isfinite().all():
        name = next(n for n, v in values.items() if not v.isfinite())
        raise RunError(f"step {step}: {name} is {values[name].item()}; this step changed no weights. Lower --lr, "
                       "--lr-prototypes or --lr-heads, or try --amp off; last.pt, if there is one, holds the last "
                       "saved step")


# ---------------------------------------------------------------- the loop
def start_processes(cfg):
    """-> rank, number of processes, device, as torchrun set them."""
    rank, world = settings.rank(), settings.world()
    device = pick_device(cfg.device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)                    # collectives of Python objects use the current device
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
        if cfg.batch % world:
            raise UsageError(f"--batch {cfg.batch} does not divide over {world} processes")
    return rank, world, device


def start_model(cfg, classes, read=None):
    """A model with its pretrained weights, where it is built; UsageError for settings or weights that make none."""
    try:
        model = build(asdict(cfg), classes)
    except ValueError as error:
        raise UsageError(f"these settings make no model: {error}") from None
    if model.selector is not None and min(model.selector.backbone.grid) < 3:
        raise UsageError(f"stage 1 looks at {' x '.join(map(str, model.selector.backbone.grid))} patches, and its "
                         "losses need 3 x 3 at least: take a larger --size or --selector-size")
    if model.selector is not None and cfg.presence_window > min(model.selector.backbone.grid):
        raise UsageError(f"--presence-window {cfg.presence_window} is larger than the grid of stage 1, "
                         f"{' x '.join(map(str, model.selector.backbone.grid))} patches: take a smaller one")
    load_pretrained(model, cfg.weights, cfg.arch, cfg.registers, cfg.selector_arch, cfg.selector_weights, read)
    return model


def try_out(cfg):
    """-> a reader of the weights, for build_model, once a model was built and filled with them: errors before data.

    Weights that are to be downloaded are not: their name and the settings tell that they fit. The model has no memory,
    unless it is so small that this costs less.
    """
    read = reader(cfg.registers)
    here = lambda name: "none" if name in ("dinov2", "rad-dino") else name
    own = {"weights": here(cfg.weights), "selector_weights": here(cfg.stage1_starts_from())}
    with torch.device("cpu" if cfg.arch.startswith("mini") else "meta"), warnings.catch_warnings(action="ignore"):
        start_model(Config(**{**vars(cfg), **own}), 2, read)
    return read


def build_model(cfg, device, classes=None, read=None):
    """classes: if they are not the benchmark's, on a miniature or a part of it. read: what try_out gave."""
    torch.manual_seed(cfg.seed)
    model = start_model(cfg, classes or data.BENCHMARKS[cfg.data].classes, read)
    if isinstance(model, FoundMask):
        model.copy_backbone()
    if cfg.stage1_starts_from() != "none" and model.selector is not None:
        freeze_backbone(model.selector, cfg.train_tokens)
    if cfg.freeze_stage2:
        freeze_backbone(model.predictor)
    if cfg.checkpoint:
        checkpoint_blocks(model)
    model.to(device)
    if cfg.compile:
        compile_stages(model)
    return model


def checkpoint_blocks(model):
    """Every backbone that gradients pass through keeps less for them; a line says so where there is none."""
    passed = [m for m in model.modules() if isinstance(m, vit.ViT) and any(p.requires_grad for p in m.parameters())]
    for backbone in passed:
        backbone.checkpoint = True
    if not passed and settings.rank() == 0:
        print("--checkpoint saves nothing here: no gradient passes through a block")


def compile_stages(model, **how):
    """torch.compile both stages, but for what has another shape in every batch and would be compiled anew."""
    for name in ("_run_packed", "_kept_first"):          # not where they are defined: importing torch.compiler's
        setattr(vit.ViT, name, torch.compiler.disable(getattr(vit.ViT, name)))     # machinery doubles that of torch
    for stage in filter(None, (model.selector, model.predictor)):
        stage.compile(**how)


def autocast_of(cfg, device):
    """-> (dtype of autocast or None, GradScaler). fp16 needs its losses scaled, bf16 does not."""
    amp = cfg.amp
    if amp == "auto":
        # a T4 says that it has bf16, and emulates it
        hardware = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "off" if device.type != "cuda" else "bf16" if hardware else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    return dtype, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def open_data(cfg, rank, world):
    """-> the training split, and the validation split or None. Rank 0 draws a miniature, the others wait for it."""
    if rank == 0:
        data.find_root(cfg.data, cfg.root, cfg.mini)
    if world > 1:
        dist.barrier()
    if rank == 0 and (line := recipe_text(cfg)):
        print(line)
    root = data.find_root(cfg.data, cfg.root, cfg.mini)
    splits = data.load(cfg.data, root, cfg.size, cfg.seed, cfg.limit, ("train", "val"), val_share=cfg.val_share,
                       strict=cfg.strict_data)
    if len(splits["train"]) < cfg.batch:
        raise UsageError(f"--batch {cfg.batch} is larger than the training set ({len(splits['train'])} images)")
    splits["train"].draft = cfg.draft
    return splits["train"], splits.get("val")


def readers_of_masks(cfg):
    """What of a run reads true masks in training -> [(how to call it, what to choose instead, may they tell labels?)].

    A mask that tells the label may supervise: nobody is given it at a test.
    """
    found = [(f"--method {cfg.method}", "another --method", False)] * cfg.method.endswith("-truth")
    found += [("--trim truth", "--trim found or none", False)] * (cfg.trim == "truth")
    found += [(f"--method {cfg.method}", "another --method", True)] * (cfg.method in SEGMENT)
    found += [(f"--supervise {cfg.supervise}", "--supervise none", True)] * (cfg.supervise != "none")
    found += [("--swap-mask true", "--swap-mask found", False)] * (cfg.swap > 0 and cfg.swap_mask == "true")
    return found


def give_truth(samples, cfg):
    """Training samples come with their true masks where these are read.

    UsageError where there are none, where they give labels away to what must not know them, or nobody lends a
    background.
    """
    if cfg.swap and len(samples.labels.unique()) < 2:
        raise UsageError(f"--swap takes backgrounds from other classes, and {samples.name} has one class here; leave "
                         "it out")
    for what, other, may_tell in readers_of_masks(cfg):
        if samples.masks is None:
            raise UsageError(f"{what} needs true masks, and {samples.name} has none here; unpack its segmentations, or "
                             f"choose {other}")
        if samples.masks_tell and not may_tell:
            raise UsageError(f"{what}: the masks of {samples.name} mark the {samples.classes[1]} and are empty "
                             f"without one, which gives the label away; choose {other}")
        samples.train_masks = True


def tell_classes(model, samples):
    """What a model has to know of the classes before it trains."""
    if isinstance(model, Segmenter) and samples.masks_tell:
        model.outside = 0                                # a patch without what makes class 1 is as in class 0
    if model.selector and model.predictor:
        model.prior = torch.bincount(samples.labels, minlength=len(samples.classes)) / len(samples)


class Trainer:
    """A model and what changes it: optimizer, fp16's scaler, moving average, objective. A call is one training step."""

    def __init__(self, cfg, steps, rank, world, device, classes, read=None, objective=None):
        self.cfg, self.steps, self.rank, self.world, self.device = cfg, steps, rank, world, device
        self.dtype, scaler = autocast_of(cfg, device)
        model = build_model(cfg, device, classes, read)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameter_groups(model, cfg, steps), fused=device.type in ("cpu", "cuda"))
        self.model, self.optimizer, self.scaler, self.skipped = model, optimizer, scaler, 0
        self.averaged = copy.deepcopy(model).requires_grad_(False) if cfg.ema else None
        self.buckets, self.objective = Buckets(self.trained, world), objective
        self.swap = Swap(cfg) if cfg.swap else None
        finds = cfg.swap and cfg.swap_mask == "found" and not isinstance(model, FoundMask)
        self.finder = Finder(model) if finds else None   # in no checkpoint: the weights before training are known

    @property
    def weights(self):
        """What evaluation needs of it: best.pt."""
        return {"model": self.averaged or self.model}

    @property
    def parts(self):
        """What resuming needs of it: last.pt."""
        moves = self.objective if self.objective and self.objective.robust else None
        return {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler, "ema": self.averaged,
                "objective": moves}

    def load(self, state, path):
        """Go on from a checkpoint; UsageError where it is not of this model."""
        try:
            for name, part in self.parts.items():
                if part is not None and (name != "scaler" or state[name]):     # {}: it began without fp16
                    part.load_state_dict(state[name])
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} does not fit its own settings ({name}: "
                             f"{str(error).strip().splitlines()[0]}); start again, or restore the file") from None

    def rates(self):
        """Learning rates as the last step used them, by what they belong to."""
        name_of = {id(p): name for name, p in self.model.named_parameters()}
        return {role_of(name_of[id(group["params"][0])], self.cfg) + ", warmed up" * bool(group["warmup"]): group["lr"]
                for group in self.optimizer.param_groups}

    def __call__(self, batch, step, chosen=None):
        """Take a step on this process's share of the batch -> its averaged terms, the norm of the gradient.

        chosen: indices of the samples of the whole global batch; an objective needs them.
        """
        if self.objective:
            batch = {**batch, **self.objective.of(chosen, self.rank, self.world)}
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * (self.cfg.masktune_lr if self.cfg.masktune else
                                              lr_at(step, self.steps, group["warmup"]))
        terms = gradients(self.model, self.cfg, batch, step, self.rank, self.buckets, self.device, self.dtype,
                          self.scaler, self.swap)
        refuse_non_finite({f"the loss term {name!r}": value for name, value in terms.items()}, step)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained, self.cfg.clip or math.inf)
        if not self.scaler.is_enabled():                 # the scaler of fp16 skips such a step by itself
            refuse_non_finite({"the gradient norm": norm}, step)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped += self.scaler.get_scale() < scale  # fp16: the gradient overflowed, and nothing was learned
        self.optimizer.zero_grad(set_to_none=True)
        if self.objective:
            self.objective.update(terms)
        if self.averaged:
            self.average(step)
        return terms, norm

    def decay(self, step):
        """Of the moving average. It warms up: else a short run would evaluate the untrained start."""
        return min(self.cfg.ema, (1 + step) / (10 + step))

    @torch.no_grad()
    def average(self, step):
        for slow, fast in zip(self.averaged.parameters(), self.model.parameters()):
            slow.lerp_(fast, 1 - self.decay(step))
        for slow, fast in zip(self.averaged.buffers(), self.model.buffers()):
            slow.copy_(fast)                             # statistics of aim's batch-norm: already averages

    def validate(self, val, log, done, epoch):
        """Accuracy on the validation split, logged -> what accuracies() says of it."""
        batch = self.cfg.micro or self.cfg.batch // self.world
        result = predict(self.averaged or self.model, val, batch, self.device, self.cfg.workers)
        score = accuracies(result, val)
        log({"step": done, "epoch": epoch, "val": score},
            f"epoch {epoch}: validation accuracy {score['aa']:.3f}, worst group {score['worst_group']:.3f}")
        self.model.train()
        return score


class Film:
    """Parts of a few images while a model trains, in film.json: {"step", "parts"} for each frame, K the background.

    The images are spread over the groups of the split; parts has a list for each, a row of patches as text. Nothing is
    drawn at random and no weight is touched, so that training is the same bit for bit with and without it.
    """

    def __init__(self, cfg, model, samples, rank, start):
        self.path, self.frames = Path(cfg.out) / "film.json", []
        self.count = cfg.film if rank == 0 and model.selector is not None else 0
        if self.count:
            self.chosen = spread_over_groups(samples, self.count)
            self.about = {"data": samples.name, "split": samples.split, "k": cfg.k,
                          "ids": [x["id"] for x in self.chosen]}
            if start and self.path.is_file():            # after --resume: what comes later is filmed again
                self.frames = [x for x in read_film(self.path)["frames"] if x["step"] <= start]
                write_json(self.path, {**self.about, "frames": self.frames})

    @staticmethod
    def due(step, last):
        """Steps 0, 10, 20, 50, 100, 200, 500, 1000, ... and the last."""
        return step in (0, last) or step >= 10 and str(step).rstrip("0") in ("1", "2", "5")

    @torch.no_grad()
    def __call__(self, model, step, last):
        if not self.count or not self.due(step, last) or any(x["step"] == step for x in self.frames):
            return
        selector, training = model.selector, model.training
        model.eval()
        images = torch.stack([x["image"] for x in self.chosen]).to(selector.prototypes.device)
        parts = torch.cat([selector(x[None]).part_logits.argmax(1) for x in images])
        model.train(training)
        rows = parts.unflatten(1, selector.backbone.grid).tolist()
        self.frames.append({"step": step, "parts": [[" ".join(map(str, row)) for row in image] for image in rows]})
        write_json(self.path, {**self.about, "frames": self.frames})


class Pace:
    """How training goes since the last line: right answers, images a second, the share of time that waited for data."""

    def __init__(self, start):
        self.done, self.waited, self.right, self.clock = start, 0.0, 0.0, time.perf_counter()
        self.ready = self.clock                          # for the next batch

    def arrived(self):
        self.waited += time.perf_counter() - self.ready

    def report(self, done, batch, steps):
        """-> share of right answers, images a second, share of the time that waited, minutes left."""
        seconds, since = time.perf_counter() - self.clock, done - self.done
        found = float(self.right / since), since * batch / seconds, self.waited / seconds, \
            (steps - done) * seconds / since / 60
        self.done, self.waited, self.right, self.clock = done, 0.0, 0.0, time.perf_counter()
        return found


def log_step(log, trainer, pace, terms, norm, done, per_epoch):
    """A line of log.jsonl with every number of a step, and the few that a person watches, on 100 columns.

    The accuracy of a step is that of a batch; what is printed is over all steps since the last line.
    """
    cfg, steps = trainer.cfg, trainer.steps
    values = {name: value.item() for name, value in terms.items()}
    right, speed, waiting, left = pace.report(done, cfg.batch, steps)
    skipped = {"skipped_steps": trainer.skipped} if trainer.skipped else {}
    classes = "".join(f"  {name} {values[name]:.3f}" for name in ("class1", "class2") if name in values)
    log({"step": done, "epoch": done / per_epoch, "lr": trainer.rates(), **values,
         "gradient_norm": norm.item() if norm.isfinite() else None, "images_per_second": speed, "waiting": waiting,
         **skipped, **(trainer.objective.record() if trainer.objective else {})},
        f"step {done}/{steps}  loss {values['loss']:.3f}{classes}  accuracy {right:.2f}  {speed:.0f} images/s  "
        f"{left:.0f} min left")


def agreed(noted, world, device):
    """The signal that asked to stop, or 0: the same in every process, so that all end after the same step."""
    signal_number = noted[0] if noted else 0
    if world > 1:
        number = torch.tensor(signal_number, device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        signal_number = int(number)
    return signal_number


def loop(cfg, trainer, samples, val, log, start, best, images):
    """Steps from `start` to the end, a line, a validation or a checkpoint where one is due. Stopped by a signal."""
    rank, world, device, steps, folder = trainer.rank, trainer.world, trainer.device, trainer.steps, Path(cfg.out)
    per_epoch, pace = len(samples) // cfg.batch, Pace(start)
    plan = Plan(len(samples), cfg.batch, start, steps, cfg.seed, rank, world,
                trainer.objective and trainer.objective.shares)
    batches = torch.utils.data.DataLoader(samples, batch_sampler=plan, num_workers=cfg.workers,
                                          worker_init_fn=leave_signals, pin_memory=device.type == "cuda")
    dataset = samples.described()
    keep = lambda name, parts: save(folder / name, rank, cfg, done, best, parts, images, done / per_epoch, dataset)
    film = Film(cfg, trainer.model, val or samples, rank, start)
    trainer.model.train()
    film(trainer.averaged or trainer.model, start, steps)
    with signals() as noted:
        for step, batch in enumerate(progress(batches, cfg.method, every=math.inf), start):
            pace.arrived()
            terms, norm = trainer(batch, step, plan.whole(step)[1])
            pace.right += terms["accuracy"]              # on the device, which nobody waits for
            done = step + 1
            film(trainer.averaged or trainer.model, done, steps)
            if done % cfg.log_every == 0 or done == steps:
                log_step(log, trainer, pace, terms, norm, done, per_epoch)
            if end_of_epoch := done % per_epoch == 0:
                if trainer.skipped == done - start:
                    raise RunError(f"step {done}: every step was skipped, for the gradient overflows in fp16; nothing "
                                   "was learned. Try --amp off or bf16")
                epoch = done // per_epoch
                found = chosen(cfg, trainer.validate(val, log, done, epoch) if val else None)
                if not val or best["accuracy"] is None or merit(found) > merit(best):
                    best = {"split": best["split"], "epoch": epoch, **found}
                    keep("best.pt", trainer.weights)
            stop = agreed(noted, world, device)
            if end_of_epoch or stop or done % cfg.save_every == 0:
                keep("last.pt", trainer.parts)
            if stop and done < steps:
                log({"step": done, "stopped": stop}, f"stopped by signal {stop} after step {done}, which is saved in "
                                                     f"{folder / 'last.pt'}: go on with --resume")
                raise Stopped(stop)
            pace.ready = time.perf_counter()


def chosen(cfg, score):
    """What best.pt says of how it was chosen, from what accuracies() says of the validation split, or from None."""
    return {"accuracy": None} if score is None else {"accuracy": score["aa"], "by": cfg.select,
                                                     "score": score[SELECT[cfg.select]]}


def merit(best):
    """What the best epoch has more of than any other; of equal ones the accuracy. Older checkpoints chose by it."""
    return best.get("score", best["accuracy"]), best["accuracy"]


def check_select(cfg, val):
    """UsageError where there is nothing to choose the best epoch by."""
    if cfg.select != "accuracy" and not val:
        raise UsageError(f"--select {cfg.select} chooses on validation images, and {cfg.data} has none: hold some out "
                         "with --val-share 0.1, or leave it out")
    if cfg.select == "worst_group" and (why := objectives.uncrossed(val)):
        raise UsageError(f"--select worst_group needs groups that are more than the classes, and {why} in {val.title} "
                         f"{val.split}: take --select worst_class")


def last_step(cfg, per_epoch, state, before):
    """The step at which a run ends: of --masktune, an epoch after that of the run `before`, on which it goes on."""
    if not cfg.masktune:
        return per_epoch * cfg.epochs
    return before["step"] + per_epoch if before else math.ceil(state["step"] / per_epoch) * per_epoch


def prepare_masks(cfg, trainer, samples, log, start, resumed):
    """What comes before the first step where masks are found: the finder is trained, and looks."""
    how, model = (samples, cfg, trainer.rank, trainer.world, trainer.device), trainer.model
    if cfg.finder == "head" and not resumed:
        teach_finder(model, *how)
        if trainer.averaged:
            trainer.averaged.finder_head.load_state_dict(model.finder_head.state_dict())
    if trainer.finder or isinstance(model, FoundMask) and cfg.find_in == "picture":
        share = find_masks(trainer.finder or model, *how)
        trainer.finder = None                            # it has done its work
        log({"step": start, "found_share": share},
            f"masks found in {len(samples)} training pictures, once: they keep {share:.0%} of the patches")


def train(cfg):
    """Train as the settings say, from the start or from last.pt, and write the run's folder."""
    check(cfg)
    rank, world, device = start_processes(cfg)
    folder, best = Path(cfg.out), {"split": "none, this is the last epoch", "epoch": 0, "accuracy": None}
    with ExitStack() as held:
        if cfg.resume and rank == 0:
            held.enter_context(owned(folder, new=False))
        state = earlier_state(cfg) if cfg.resume else None
        before = finished_state(cfg.masktune) if cfg.masktune and not state else None    # the run that it goes on from
        read = try_out(cfg)
        samples, val = open_data(cfg, rank, world)
        if cfg.method == "early-random":                 # a judge of masks must not share the shortcut
            samples.keep(balanced(samples.groups).tolist())
        images = {split.split: [len(split), split.digest()] for split in (samples, val) if split}
        steps = last_step(cfg, len(samples) // cfg.batch, state, before)
        check_select(cfg, val)
        if objective := objectives.start(cfg, samples, steps):
            images |= {"groups": objective.digest()} if cfg.groups else {}
        trainer = Trainer(cfg, steps, rank, world, device, len(samples.classes), read, objective)
        del read                                         # the weights are in the model now
        give_truth(samples, cfg)
        tell_classes(trainer.model, samples)
        for earlier, where, what in ((before, cfg.masktune, "--masktune"), (state, folder, "--resume")):
            if earlier:
                refuse_other_images(earlier, images, steps, where, what)
                trainer.load(earlier, Path(where) / "last.pt")
        start = (state or before or {"step": 0})["step"]
        best = state["best"] if state else {**best, **({"split": "val"} if val else {})}
        if not cfg.resume and rank == 0:
            held.enter_context(owned(folder, new=True))
            claim(cfg)
        log = Log(folder, rank, start)
        log({"step": start, "command": sys.argv, "config": asdict(cfg), "torch": torch.__version__, "processes": world,
             "images": images, **({"data_differs": samples.differs} if samples.differs else {}),
             **({"objective": objective.described()} if objective else {})},
            f"{objective}\n" * bool(objective)
            + f"{cfg.method}: {sum(p.numel() for p in trainer.trained):,} trained parameters, steps {start} to "
            f"{steps} ({cfg.epochs} epoch{'s' * (cfg.epochs > 1)}), {world} process{'es' * (world > 1)} on "
            f"{device.type} -> {folder}")
        if isinstance(trainer.model, FoundMask) or trainer.finder:
            prepare_masks(cfg, trainer, samples, log, start, resumed=bool(state))
        if cfg.masktune:
            hide(cfg, samples, log, start, rank, world, device)
        loop(cfg, trainer, samples, val, log, start, best, images)
        average = {"ema_decay": trainer.decay(steps - 1)} if cfg.ema else {}
        log({"step": steps, "finished": True, **average},            # sweep.py looks for it
            f"the moving average of the weights ended with a decay of {average['ema_decay']:.4f}" if average else None)
        if rank == 0:
            from measure import figures                  # here: training itself needs no matplotlib
            figures.training_curves(folder / "log.jsonl", folder / "curves.png")
            if (folder / "film.json").is_file():
                figures.film(folder / "film.json", val or samples, folder / "film.png")
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()


def main(argv=None):
    train(parse(Config, __doc__, argv, preset, read_settings))


if __name__ == "__main__":
    run_script(main)
