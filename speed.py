"""speed.py: what two stages cost beside one vision transformer: prediction, a training step, reading images.

    python speed.py                                      # prediction: ViT-S/14, 224 px, batch 8, random weights
    python speed.py --selector-size 112                  # the same with a smaller stage 1
    python speed.py --scale                              # growth with tokens, K and batch -> docs/scale.json and .png
    python speed.py --training --device cuda --amp bf16  # training steps, 20 % of the patches kept
    python speed.py --reading                            # images/s that one core reads and augments
    python speed.py --sizes                              # parameters and operations of every --arch, counted only
    python speed.py --gpus                               # what 1 to 64 GPUs would exchange: computed, not measured
    python evaluate.py --ckpt runs/waterbirds-mini/best.pt --speed       # a trained model on its own images

Everything is measured in turn, round after round, so that other work on the machine slows all of it alike; a ratio is
the median over rounds of ratios within a round. The clock on a CPU with one thread is CPU time, which other processes
hardly change, else wall time. "Dense" is one ViT over all tokens.

Floor: commands. Read ifam.py (the two stages, and the letters) first, and of train.py `Trainer`.
"""
import gc
import itertools
import json
import math
import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ifam
import train
import vit
from baselines import FoundMask
from benchmarks.files import is_our_picture, read_image
from benchmarks.samples import Samples
from benchmarks.transforms import (BICUBIC, FINE_GRAINED, PHOTOGRAPHS, View, augment, rand_augment, random_box,
                                   to_tensor)
from measure.leakage import given
from runs import Config as RunConfig
from runs import pick_device, small_selector
from settings import UsageError, flag, may_write, opt, parse, progress, run_script, write_json

os.environ.setdefault("KINETO_LOG_LEVEL", "99")          # else the profiler prints a line whenever it starts or stops


@dataclass
class Config:
    scale: bool = opt(False, "time and memory against tokens, K and batch, also with the stage 1 of --recipe fast",
                      group="instead of prediction")
    training: bool = opt(False, "steps of train.py: one ViT, two stages, and two stages of which less trains")
    reading: bool = opt(False, "the input pipeline, its steps alone, and large files with and without --draft")
    sizes: bool = opt(False, "parameters and operations of every --arch at 224 and 512 px: counted, not timed")
    gpus: bool = opt(False, "a training step of two stages on 1 to 64 GPUs: computed on paper, nothing is run")

    arch: str = opt("s", "vision transformers, as train.py has them, or s/3 for the first 3 blocks of s; of --gpus b",
                    group="model", refused=vit.REFUSED)
    size: int = opt(224, "image side in pixels, a multiple of the patch; of --gpus 518", at_least=1)
    k: int = opt(8, "foreground parts", at_least=1)
    selector_size: int = opt(0, "side at which stage 1 looks at the image (0: --size)", at_least=0)
    selector_arch: str = opt("", "vision transformer of stage 1 (if not given, --arch)")

    batch: int = opt(8, "images at once; of --training 4, of --gpus 16 on each", at_least=1, group="measurement")
    rounds: int = opt(7, "times that everything is measured; of --training 10, of --reading 2", at_least=1)
    keep: float = opt(0.2, "share of the patches of every image that stage 2 sees in a training step (0: the mask that "
                           "stage 1 finds)", at_least=0, at_most=1)
    rate: float = opt(400.0, "TFLOP/s that a GPU sustains, an assumption of --gpus", above=0)
    checkpoint: bool = opt(False, "measure training steps with --checkpoint of train.py too")

    device: str = opt("auto", "auto, cpu, cuda or mps", group="run")
    amp: str = opt("off", "autocast, as in train.py", choices=("auto", "bf16", "fp16", "off"))
    compile: bool = opt(False, "torch.compile the dense ViT and both stages")
    out: str = opt("", "file for the numbers, JSON; of --scale docs/scale.json, with the figure beside it")
    force: bool = opt(False, "replace a file that this script did not write")


# ---------------------------------------------------------------- operations, time, memory
def operations(module, *inputs):
    """Floating-point operations per image of module(*inputs), 2 for a multiply-add, as torch counts them.

    Image by image, because torch's table lacks some fused kernels, and plain attention over a batch needs much memory.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        for image in zip(*(x.split(1) for x in inputs)):
            module(*image)
    return counter.get_total_flops() / len(inputs[0])


def clock(device):
    """-> (what it is, a function that gives seconds after waiting for the device)."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return "CPU time of one thread", time.thread_time
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    return "wall time", lambda: (wait(), time.perf_counter())[1]


def in_turn(calls, batch, rounds, device, warm=False):
    """Time calls {name: function} of a batch, all of them in every round, one after the other, after one to warm up.

    warm: they have been called before, and are not once more.
    -> {name: {...}}: medians over rounds; ratios within a round are to the first call, the dense one.
    """
    _, by_clock = clock(device)
    now = lambda: np.array([by_clock(), time.process_time()])                    # and by the processors of all threads
    seconds = {name: np.empty((2, rounds)) for name in calls}
    for call in () if warm else calls.values():
        call()
    for i in progress(range(rounds), "rounds"):
        for name, call in calls.items():
            start = now()
            call()
            seconds[name][:, i] = now() - start
    dense, rows = next(iter(seconds.values())), {}
    for name, own in seconds.items():
        middle, (of_dense, of_processor) = np.median(own[0]).item(), np.median(own / dense, axis=1).tolist()
        rows[name] = {"seconds": middle, "images_per_second": batch / middle, "relative_to_dense": of_dense,
                      "relative_processor_time": of_processor}
    return rows


def shares_of_time(groups, call, device):
    """Seconds of a call spent inside groups of modules {name: [modules]}, relative to those of the group "whole"."""
    now, spent, began, hooks = clock(device)[1], dict.fromkeys(groups, 0.0), {}, []

    def start(module, inputs):
        began[module] = now()

    def stop(name, module, inputs, output):
        spent[name] += now() - began[module]
    for name, group in groups.items():
        for module in group:
            hooks += [module.register_forward_pre_hook(start), module.register_forward_hook(partial(stop, name))]
    call()
    for hook in hooks:
        hook.remove()
    return {name: seconds / spent["whole"] for name, seconds in spent.items() if name != "whole"}


def peak_memory(call, device):
    """Make a call -> bytes that it needs at once beyond what is held before it; None where torch does not count them.

    CUDA: max_memory_allocated. CPU: every allocation of torch's allocator as torch.profiler records it.
    """
    gc.collect()                                         # older garbage, freed meanwhile, would hide what is new
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    if device.type != "cpu":
        call()
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    changes = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    return max(itertools.accumulate((e["args"]["Bytes"] for e in changes), initial=0))


def machine(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "threads": torch.get_num_threads(), "clock": clock(device)[0]}


# ---------------------------------------------------------------- a trained model
def check(model):
    """UsageError for a model whose stages are not those that measure() tells apart."""
    if isinstance(model, FoundMask) or model.predictor and not isinstance(model.predictor, ifam.Predictor):
        raise UsageError("--speed counts the operations of ViTs under a mask or without: not of probes or --method "
                         "early-found, late-found; leave it out")


@torch.no_grad()
def measure(model, images, told={}, rounds=5):
    """What a model costs on these images (B, 3, S, S) -> dict for report.json; told: what leakage.given says.

    Shares: of the time of the whole model, measured module by module in calls of their own; that of stage 1, and those
    of attention and feed-forward in both stages. Operations are per image.
    """
    check(model)
    device, B, stages = images.device, len(images), [stage for stage in (model.selector, model.predictor) if stage]
    dense, whole = partial(stages[-1].backbone, images), partial(model, images, **told)
    kept = whole().keep
    one = partial(model, images[:1], **{name: x[:1] for name, x in told.items()})
    rows = in_turn({"dense": dense, "model": whole, "one image": one}, B, rounds, device)
    blocks = [block for stage in stages for block in stage.backbone.blocks]
    groups = {"stage1": stages[:1] if model.selector else [], "attention": [block.attn for block in blocks],
              "feed_forward": [block.mlp for block in blocks], "whole": [model]}
    share = shares_of_time(groups, lambda: [whole() for _ in range(rounds)], device)
    gflops = {"dense": operations(stages[-1].backbone, images[:1]) / 1e9}
    if model.selector:
        gflops["stage1"] = operations(model.selector, images[:1]) / 1e9
    if model.predictor:
        gflops["stage2"] = operations(model.predictor, images, *([] if kept is None else [kept])) / 1e9
    return {**machine(device), "batch": B, "kept_share": None if kept is None else kept.mean().item(),
            "images_per_second": rows["model"]["images_per_second"],
            "images_per_second_dense": rows["dense"]["images_per_second"],
            "relative_to_dense": rows["model"]["relative_to_dense"], "gflops": gflops, "share_of_time": share,
            "latency_ms": 1e3 * rows["one image"]["seconds"],
            "peak_bytes": {"model": peak_memory(whole, device), "dense": peak_memory(dense, device)}}


def measure_split(model, samples, device, batch):
    """What measure() finds on the first images of a split, at most a batch."""
    images = torch.utils.data.default_collate([samples[i] for i in range(min(batch, len(samples)))])
    return measure(model, images["image"].to(device), given(model, images, device))


def summary(found):
    """What measure() found, as lines."""
    g, share, peak = found["gflops"], found["share_of_time"], found["peak_bytes"]
    stages = " and ".join(f"{g[s]:.3g} in {n}" for s, n in (("stage1", "stage 1"), ("stage2", "stage 2")) if s in g)
    memory = "not counted on this device" if peak["model"] is None else \
        f"{peak['model'] / 1e6:.1f} MB, dense {peak['dense'] / 1e6:.1f} MB"
    return f"""\
  speed at batch {found['batch']}, {found['device']}, {found['threads']} threads, {found['clock']}:
    {found['images_per_second']:.1f} images/s; {found['relative_to_dense']:.3f} of the time of one dense ViT \
({found['images_per_second_dense']:.1f} images/s)
    GFLOPs per image: {stages}, dense {g['dense']:.3g}
    share of the time: {share['stage1']:.0%} in stage 1; in all stages {share['attention']:.0%} in attention, \
{share['feed_forward']:.0%} in feed-forward
    latency at batch 1: {found['latency_ms']:.1f} ms; peak memory beyond the weights: {memory}"""


# ---------------------------------------------------------------- prediction: random weights, kept counts forced
SHARED = ("arch", "size", "k", "selector_size", "selector_arch", "batch", "amp", "compile")      # with train.py
CASES = {"20 % kept": (0.2, 0.2), "5-60 % kept, ragged": (0.05, 0.6), "5 % kept": (0.05, 0.05), "100 % kept": (1, 1)}


def settings_of(cfg, **changes):
    """Settings of train.py: those of cfg, and random weights."""
    return RunConfig(**{"weights": "none", **{name: getattr(cfg, name) for name in SHARED}, **changes})


def make(cfg, device, **changes):
    """Both stages in evaluation mode, and images for them."""
    settings = settings_of(cfg, **{"compile": False, **changes})
    model = train.build_model(settings, device, classes=2).eval()
    return model, torch.randn(settings.batch, 3, settings.size, settings.size).to(device)


def autocast(cfg, device):
    dtype, _ = train.autocast_of(cfg, device)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def forced(low, high, batch, patches):
    """keep (B, N) of patches at random places: shares of an image's patches evenly spread from low to high."""
    counts = (torch.linspace(low, high, batch, dtype=torch.float64) * patches).round()
    order = torch.rand(batch, patches, generator=torch.Generator().manual_seed(0)).argsort(1).argsort(1)
    return (order < counts[:, None]).float()


@torch.no_grad()
def prediction(cfg, device):
    """Both stages under forced masks beside one dense ViT -> {row: {...}}."""
    model, images = make(cfg, device)
    asked = {"dense": (model.predictor.backbone, images), "dense classifier": (model.predictor, images),
             "stage 1": (model.selector, images)}
    for name, (low, high) in CASES.items():
        asked[name] = model, images, forced(low, high, cfg.batch, math.prod(model.grid)).to(device)
    gflops = {name: operations(*call) / 1e9 for name, call in asked.items()}
    if cfg.compile:
        train.compile_stages(model)
        model.predictor.backbone.compile()
    calls = {name: partial(*call) for name, call in asked.items()}
    with autocast(cfg, device):
        return {name: {**row, "gflops": gflops[name], "relative_operations": gflops[name] / gflops["dense"],
                       "peak_bytes": peak_memory(calls[name], device)}
                for name, row in in_turn(calls, cfg.batch, cfg.rounds, device).items()}


# ---------------------------------------------------------------- every size
def formula(backbone, patches, class_only=False):
    """Operations per image of a ViT that computes this many of its patches, as `operations` counts them."""
    D, T = backbone.width, backbone.prefix + patches
    hidden = sum(p.numel() for name, p in backbone.blocks[0].mlp.named_parameters() if name.endswith("weight"))
    block = lambda asked: 2 * (2 * asked + 2 * T) * D * D + 4 * asked * T * D + 2 * asked * hidden
    last = block(1 if class_only else T)
    return (len(backbone.blocks) - 1) * block(T) + last + 2 * patches * 3 * backbone.patch ** 2 * D


def sizes(cfg, device, sides=(224, 512), kept=0.2):
    """Parameters of one ViT, and operations of it and of both stages, 20 % kept -> {size: {...}}.

    At multiples of the patch that are nearest to `sides`. The rotations of rotary positions, like every other
    elementwise operation, are not counted.
    """
    rows = {}
    for name, arch in vit.ARCHS.items():
        patch = arch.get("patch", 14)
        real = [round(side / patch) * patch for side in sides]
        row = {}
        for side, wanted in zip(real, sides):
            with torch.device("meta"):
                backbone = vit.build_vit(name, side)
            row.setdefault("parameters", sum(p.numel() for p in backbone.parameters()))
            patches, parts = math.prod(backbone.grid), (cfg.k + 1) * backbone.width
            selector = formula(backbone, patches) + 2 * (2 * parts * patches + 2 * cfg.k * backbone.width)
            predictor = formula(backbone, round(kept * patches), class_only=True) + 4 * backbone.width
            row |= {f"gflops_{wanted}": formula(backbone, patches) / 1e9,
                    f"both_{wanted}": (selector + predictor) / 1e9}
        rows[f"{name} (patch {patch}; {real[0]} and {real[1]} px)"] = row
    return rows


# ---------------------------------------------------------------- growth
STEPS = {  # what grows: the setting, its values, and what is fixed meanwhile
    "tokens": ("size", (224, 518, 1022), dict(batch=1)), "K": ("k", (1, 4, 16, 64), dict(batch=4)),
    "batch": ("batch", (1, 2, 4, 8, 16), {})}


def costs(cfg, device, **changes):
    """What prediction, and forward and backward of both stages ("training"), cost, 20 % kept.

    -> tokens of an image, {"prediction": {"seconds", "bytes"}, "training": ...}; then both with the small stage 1.
    """
    tokens, full = cost(cfg, device, **changes)
    _, small = cost(cfg, device, **changes, **small_selector(cfg.arch, changes.get("size", cfg.size)))
    return tokens, {**full, **{f"{what}, small stage 1": found for what, found in small.items()}}


def cost(cfg, device, **changes):
    """costs() of one kind of stage 1."""
    model, images = make(cfg, device, **changes)
    keep = forced(0.2, 0.2, len(images), math.prod(model.grid)).to(device)

    def step():                                          # the mask asks for its gradient: the path of training
        out = model(images, keep.clone().requires_grad_())
        (out.logits.sum() + out.logits_stage1.sum()).backward()
    calls = {"prediction": torch.no_grad()(partial(model, images, keep)), "training": step}
    with autocast(cfg, device):
        rows = in_turn(calls, len(images), cfg.rounds, device)
        return model.predictor.backbone.prefix + keep.shape[1], {
            what: {"seconds": rows[what]["seconds"], "bytes": peak_memory(calls[what], device)} for what in calls}


def growth(cfg, device):
    """costs() against tokens, K and batch, and the power of it that each grows with: a line through logarithms.

    -> {"tokens": {"x": [...], "prediction": {"seconds": [...], "bytes": [...]}, "training": ..., "exponents": ...}}
    """
    curves = {}
    for name, (setting, values, fixed) in STEPS.items():
        tokens, found = zip(*(costs(cfg, device, **{**fixed, setting: value}) for value in values))
        x = list(tokens if name == "tokens" else values)
        curves[name] = {"x": x, "exponents": {}}
        for what in found[0]:
            of = {unit: [each[what][unit] for each in found] for unit in ("seconds", "bytes")}
            powers = {unit: np.polyfit(np.log(x), np.log(y), 1)[0].item() for unit, y in of.items() if None not in y}
            curves[name][what], curves[name]["exponents"][what] = of, powers
            print(f"  {what} grows with {name} to the power of "
                  + ", ".join(f"{power:z.2f} ({unit})" for unit, power in powers.items()))
    if cfg.out:                                          # the figure lies beside it
        from measure import figures                      # here: the rest needs no matplotlib
        figures.growth(curves, Path(cfg.out).with_suffix(".png"))
    return curves


# ---------------------------------------------------------------- a training step
VARIANTS = {  # what is measured: settings of train.py
    "one dense ViT, everything trains": dict(method="erm"),
    "two stages": dict(method="ifam"),
    "two stages, no joint gradient": dict(method="ifam", joint=False),
    "two stages, no joint gradient, frozen tokens": dict(method="ifam", joint=False, train_tokens=False)}


def force(model, share):
    """Let the mask keep a share of the patches of each image; its gradient stays that of the mask that was found."""
    discovered = model.mask

    def mask(*found_from):
        found = discovered(*found_from)
        return forced(share, share, *found.shape).to(found) + (found - found.detach())
    model.mask = mask


def variants(cfg):
    """-> {name: settings}: VARIANTS; with --checkpoint the first as a measure, and then all of them with it."""
    if not cfg.checkpoint:
        return VARIANTS
    return dict(itertools.islice(VARIANTS.items(), 1)) | {
        f"{name}, --checkpoint": {**own, "checkpoint": True} for name, own in VARIANTS.items()}


def make_step(cfg, device, changes):
    """-> a function that takes a step of train.py, on the same random batch again, the blocks of stage 1 frozen."""
    settings = settings_of(cfg, **changes)
    trainer = train.Trainer(settings, steps=1000, rank=0, world=1, device=device, classes=2)
    if trainer.model.selector is not None:               # as with pretrained weights
        train.freeze_backbone(trainer.model.selector, settings.train_tokens)
        if cfg.keep:
            force(trainer.model, cfg.keep)
    for p in trainer.trained:                            # the state of the optimizer is there from the first step on
        p.grad = torch.zeros_like(p)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    images = torch.randn(cfg.batch, 3, cfg.size, cfg.size, generator=torch.Generator().manual_seed(0))
    batch, numbers = {"image": images, "label": torch.arange(cfg.batch) % 2}, itertools.count()
    return lambda: trainer(batch, next(numbers))


def training(cfg, device):
    """Training steps beside that of one dense ViT -> {variant: {...}}.

    Peak memory is all that training needs: weights, gradients, state of the optimizer, and what a step computes.
    """
    steps = {}

    def begin(variant, changes):
        steps[variant] = make_step(cfg, device, changes)
        steps[variant]()
    peak = {variant: peak_memory(partial(begin, variant, own), device) for variant, own in variants(cfg).items()}
    rows = in_turn(steps, cfg.batch, cfg.rounds, device, warm=True)
    return {variant: {**row, "peak_bytes": peak[variant]} for variant, row in rows.items()}


# ---------------------------------------------------------------- many GPUs, on paper
LINKS = (25, 400)        # GB/s between two neighbours: a network card of 200 Gbit/s, links inside one machine


def linear(backbone):
    """Weights of a block's linear layers: (those of queries, keys and values, all others)."""
    D, mlp = backbone.width, backbone.blocks[0].mlp
    return 3 * D * D, D * D + sum(p.numel() for name, p in mlp.named_parameters() if name.endswith("weight"))


def stage1_step(backbone, k):
    """Operations of stage 1 in a training step, blocks frozen, tokens training -> (forward, backward) of one image.

    The way back through a frozen layer has the gradient of its input alone; attention has those of two inputs.
    """
    D, N, L = backbone.width, math.prod(backbone.grid), len(backbone.blocks)
    T = backbone.prefix + N
    layers, attention = 2 * T * sum(linear(backbone)), 4 * T * T * D
    heads = 2 * 2 * (k + 1) * D * N                      # distances to the prototypes, features of the parts
    return L * (layers + attention) + heads + 6 * backbone.patch ** 2 * D * N, L * (layers + 2 * attention) + 2 * heads


def stage2_step(backbone, kept):
    """Operations of stage 2 in a training step with the joint gradient -> (forward, backward) of one image.

    kept: patches that it sees; with the tokens before them they are computed with autograd, all others forward alone
    (ViT._run_joint). The gradient of the mask has two products of kept queries with all keys.
    """
    D, N, L = backbone.width, math.prod(backbone.grid), len(backbone.blocks)
    own, rest = backbone.prefix + kept, N - kept
    T, (qkv, after), patches = own + rest, linear(backbone), 6 * backbone.patch ** 2 * D * N
    block = 2 * own * (qkv + after) + 4 * own * own * D
    last = 2 * own * qkv + 4 * own * D + 2 * after       # the class token alone asks
    forward = (L - 1) * (block + 2 * rest * (qkv + after) + 4 * rest * own * D) + last + 2 * rest * qkv + patches
    return forward, 2 * ((L - 1) * block + last) + 4 * ((L - 1) * own + 1) * T * D + patches


def step_operations(model, kept):
    """Operations of a training step of IFAM -> (forward, backward) of one image; stage 1 sees it and its warp."""
    one, two = stage1_step(model.selector.backbone, model.selector.k), stage2_step(model.predictor.backbone, kept)
    return tuple(2 * first + second for first, second in zip(one, two))


def gpus(cfg, device, counts=(1, 2, 4, 8, 16, 32, 64)):
    """A training step on many GPUs, nothing measured -> {"8 GPUs": {...}}; bytes and seconds of one GPU.

    A ring passes 2 (n - 1) / n of the gradients through every GPU, 4 bytes each. They travel while backward runs, so
    that a step takes forward, and then the longer of backward and exchange. Assumed: every GPU sustains cfg.rate, and a
    message costs no time of its own.
    """
    if not cfg.keep:
        raise UsageError("--gpus --keep 0: nothing is run, so no mask is found; give a share, such as 0.2")
    with torch.device("meta"):
        model = train.build_model(settings_of(cfg, compile=False), torch.device("meta"), classes=2)
    train.freeze_backbone(model.selector)                # as with pretrained weights
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    each = step_operations(model, round(cfg.keep * math.prod(model.grid)))
    forward, backward = (operations / (cfg.rate * 1e12) for operations in each)
    print(f"  {trained / 1e6:.1f} million trained parameters; of one image {each[0] / 1e9:.0f} GFLOPs forward, "
          f"{each[1] / 1e9:.0f} backward\n  ms: of the exchange; busy: share of a step that computes; images: so "
          "many on each GPU hide the exchange")
    rows = {}
    for n in counts:
        sent = 2 * (n - 1) / n * 4 * trained
        row = rows[f"{n} GPU{'s' * (n > 1)}"] = {"sent_bytes": sent, "step": cfg.batch * (forward + backward)}
        for link in LINKS:
            exchange = sent / (link * 1e9)
            whole = cfg.batch * forward + max(cfg.batch * backward, exchange)
            row |= {f"exchange_{link}": exchange, f"computing_{link}": row["step"] / whole,
                    f"hidden_{link}": exchange / backward}
    return rows


# ---------------------------------------------------------------- reading images
def crop_and_stretch(view, size, rng):
    view.crop(*random_box(view.image.size, rng))
    view.stretch((size, size), BICUBIC)


PIPELINES = {  # name: (pipeline, how it comes to the model's size, and what else it does to a picture of that size)
    "birds, cats and dogs": (FINE_GRAINED, lambda view, size, rng: view.resize(size), augment),
    "ImageNet": (PHOTOGRAPHS, crop_and_stretch, lambda view, size, rng: rand_augment(view, rng))}


def photographs(folder, count, width, height, octaves=1):
    """JPEG files of noise at 1/8 of their sides, enlarged, and so on at 1/4, 1/2, ... with half of the contrast each.

    Enough octaves have the spectrum of a photograph, whose finest details a smaller decoding loses. -> paths
    """
    paths = [Path(folder) / f"{width}-{i}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        rng, picture = np.random.default_rng(i), np.full((height, width, 3), 127.5)
        for octave in range(octaves):
            shape = (height * 2 ** octave // 8, width * 2 ** octave // 8, 3)
            fine = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).resize((width, height), BICUBIC)
            picture += (np.asarray(fine) - 127.5) / 2 ** octave / sum(0.5 ** n for n in range(octaves))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def split_of(paths, pipeline, size, **settings):
    """A new training split of these files: a small one stays decoded."""
    samples = Samples("none", "train", size, ("none",), [p.name for p in paths], paths, [0] * len(paths))
    samples.pipeline = pipeline
    vars(samples).update(settings)
    return samples


def reading_steps(name, size, paths, rounds, device):
    """Images/s of reading these files for training, and of each of its steps alone -> {row: {...}}."""
    pipeline, to_size, rest = PIPELINES[name]
    rng = lambda i: np.random.default_rng(i)
    pictures, count = [read_image(path, "RGB") for path in paths], range(len(paths))

    def stepped(step, before):                           # View makes no copy, and steps make new pictures
        views = [View(picture) for picture in before]
        for i, view in enumerate(views):
            step(view, size, rng(i))
        return [view.image for view in views]
    resized = stepped(to_size, pictures)
    augmented = stepped(rest, resized)
    calls = {"": lambda: [x for x in map(split_of(paths, pipeline, size).__getitem__, ((0, i) for i in count))],
             ": decode": lambda: [read_image(path, "RGB") for path in paths],
             ": to this size": lambda: stepped(to_size, pictures), ": augment": lambda: stepped(rest, resized),
             ": tensor": lambda: [to_tensor(picture) for picture in augmented]}
    return {f"{name}, {size} px{step}": {"images_per_second": row["images_per_second"],
                                         "share_of_reading": row["relative_to_dense"]}
            for step, row in in_turn(calls, len(paths), rounds, device).items()}


def drafts(size, paths, rounds, device):
    """--draft: images/s for these large files with it and without, and how far the pixels are off -> {row: {...}}."""
    read = lambda draft: split_of(paths, FINE_GRAINED, size, draft=draft)
    rows = in_turn({draft: lambda draft=draft: [read(draft)[0, i] for i in range(len(paths))]
                    for draft in (False, True)}, len(paths), rounds, device)
    views = [[View(read_image(path, "RGB", least=least)) for path in paths] for least in (0, size)]
    for view in itertools.chain(*views):
        FINE_GRAINED.evaluate(view, size)
    whole, draft = (np.stack([view.image for view in some]).astype(float) for some in views)
    off = {False: (None, None), True: (abs(whole - draft).mean().item(), abs(whole - draft).max().item())}
    width, height = Image.open(paths[0]).size
    return {f"{width} x {height}, {size} px" + ", --draft" * draft: {
        "images_per_second": row["images_per_second"], "share_of_reading": row["relative_to_dense"],
        "levels_mean": off[draft][0], "levels_most": off[draft][1]} for draft, row in rows.items()}


def reading(cfg, device, count=20, large=(2000, 1500)):
    """Images/s of one core for JPEGs of 500 x 375 pixels, the size of most photographs of CUB and ImageNet, and larger.

    The files have just been written, so nothing waits. Levels are of 0 to 255. -> {row: {...}}
    """
    with tempfile.TemporaryDirectory() as folder:
        usual, rows = photographs(folder, count, 500, 375), {}
        for size, name in itertools.product((518, 224), PIPELINES):
            rows |= reading_steps(name, size, usual, cfg.rounds, device)
        several = photographs(folder, max(1, count // 4), *large, octaves=4)
        for size in (518, 224):
            rows |= drafts(size, several, cfg.rounds, device)
    return {name: {"levels_mean": None, "levels_most": None, **row} for name, row in rows.items()}


# ---------------------------------------------------------------- the command
OF_STEPS = ("keep", "checkpoint", "rate")                 # settings of training steps
MODES = {  # what measures, the settings that it has no use for, and its own defaults
    "prediction": (prediction, OF_STEPS, {}),
    "scale": (growth, ("size", "k", "batch", "selector_size", "selector_arch", *OF_STEPS, "compile"),
              dict(out="docs/scale.json")),
    "training": (training, ("rate",), dict(batch=4, rounds=10)),
    "reading": (reading, (*SHARED, *OF_STEPS, "device"), dict(rounds=2, device="cpu")),
    "sizes": (sizes, (*(name for name in SHARED if name != "k"), "rounds", *OF_STEPS, "device"), dict(device="cpu")),
    "gpus": (gpus, ("amp", "compile", "rounds", "checkpoint", "device"),
             dict(arch="b", size=518, batch=16, device="cpu"))}
COLUMNS = {  # of the table: title, unit, digits
    "seconds": ("    ms", 1e-3, 1), "images_per_second": ("images/s", 1, 1), "relative_to_dense": ("of dense", 1, 3),
    "relative_processor_time": ("of its processor time", 1, 3), "gflops": ("GFLOPs/image", 1, 2),
    "relative_operations": ("of dense", 1, 3), "share_of_reading": ("of its time", 1, 3),
    "levels_mean": ("levels off, mean", 1, 2), "levels_most": ("most", 1, 0), "peak_bytes": ("peak MB", 1e6, 1),
    "parameters": ("M parameters", 1e6, 1),
    **{f"{what}_{side}": (f"GFLOPs, {title}, {side} px", 1, 1) for side in (224, 512)
       for what, title in (("gflops", "dense"), ("both", "iFAM"))},
    "sent_bytes": ("MB sent", 1e6, 1), "step": ("compute, ms", 1e-3, 1),
    **{f"{what}_{link}": (f"{title} at {link} GB/s", unit, digits) for link in LINKS for what, title, unit, digits in (
        ("exchange", "ms", 1e-3, 1), ("computing", "busy", 1, 3), ("hidden", "images", 1, 1))}}


def mode_of(settings):
    """The mode that settings {name: value} ask for. UsageError if they ask for several."""
    modes = [name for name in MODES if settings.get(name)]
    if len(modes) > 1:
        raise UsageError(f"{' and '.join(map(flag, modes))} are measured one at a time: leave out all but one")
    return modes[0] if modes else "prediction"


def preset(typed, earlier=None):
    """What was typed -> the mode's own defaults. UsageError for a setting that it has no use for."""
    mode = mode_of(typed)
    _, unused, own = MODES[mode]
    for name in typed:
        if name in unused:
            users = " and ".join(other for other, (_, without, _) in MODES.items() if name not in without)
            raise UsageError(f"{flag(name)} means nothing to {mode}, only to {users}; leave it out")
    return own


def table(rows):
    """{name: {column: number or None}} -> lines of text."""
    columns = {key: column for key, column in COLUMNS.items() if key in next(iter(rows.values()))}
    text = lambda x, unit, digits: "-" if x is None else f"{x / unit:.{digits}f}"
    wide = max(map(len, rows))
    return [" " * (wide + 2) + "".join(f"{title:>{len(title) + 3}}" for title, *_ in columns.values())] + [
        f"  {name:<{wide}}" + "".join(f"{text(row[key], *how):>{len(title) + 3}}"
                                      for key, (title, *how) in columns.items()) for name, row in rows.items()]


def main(argv=None):
    cfg = parse(Config, __doc__, argv, preset)
    device, mode = pick_device(cfg.device), mode_of(vars(cfg))
    run, unused, _ = MODES[mode]
    if cfg.reading:
        torch.set_num_threads(1)                         # one core
    if cfg.out:                                          # before minutes are spent
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        may_write(cfg.out, lambda path: {"command", "clock"} <= json.loads(path.read_text()).keys(), cfg.force)
        if cfg.scale:
            may_write(Path(cfg.out).with_suffix(".png"), is_our_picture, cfg.force)
    head = {"command": vars(cfg), **machine(device)}
    print(f"{mode}: {head['device']}, {head['threads']} threads, torch {torch.__version__}; {head['clock']}\n  "
          + ", ".join(f"{name} {x}" for name, x in vars(cfg).items() if name not in (*MODES, *unused) and x != ""))
    found = run(cfg, device)
    if not cfg.scale:
        print(*table(found), sep="\n")
    if cfg.out:
        write_json(Path(cfg.out), {**head, "growth" if cfg.scale else "rows": found})
        print(f"  wrote {cfg.out}")


if __name__ == "__main__":
    run_script(main)
