"""speed_training.py: what a training step costs beside that of one dense ViT, and how fast images are read.

    python speed_training.py                             # ViT-S/14, 224 px, batch 4: time, memory, both as ratios
    python speed_training.py --keep 0                    # the mask that an untrained stage 1 finds: nearly everything
    python speed_training.py --data                      # the input pipeline: images/s of one core

Steps are those of train.py (forward, losses, backward, clipping, optimizer) on random images and weights, blocks of
stage 1 frozen. All variants take turns in one run, so that other work on the machine slows all of them alike; reported
are medians, and the median of the ratios within a turn. Letters: ifam.py.
"""
import math
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import train
from benchmarks.samples import Samples
from benchmarks.transforms import FINE_GRAINED, PHOTOGRAPHS
from runs import Config as RunConfig
from runs import pick_device
from settings import UsageError, opt, parse, run_script
from speed import counts_of, forced
from vit import ARCHS


@dataclass
class Config:
    arch: str = opt("s", "size of the vision transformers", choices=tuple(ARCHS))
    size: int = opt(224, "image side in pixels, a multiple of the patch")
    batch: int = opt(4, "images per step")
    keep: float = opt(0.2, "share of patches that stage 2 sees, the same number in every image (0: the mask that stage "
                           "1 finds)")
    turns: int = opt(10, "steps of each variant, after one that does not count")
    device: str = opt("auto", "auto, cpu, cuda or mps")
    amp: str = opt("off", "autocast, as in train.py", choices=("auto", "bf16", "fp16", "off"))
    compile: bool = opt(False, "torch.compile both stages")
    data: bool = opt(False, "measure the input pipeline instead: decoding, augmentation and tensor")


VARIANTS = {  # what is measured: settings of train.py
    "one dense ViT, everything trains": dict(method="erm"),
    "two stages": dict(method="ifam"),
    "two stages, no joint gradient": dict(method="ifam", joint=False),
    "two stages, no joint gradient, frozen tokens": dict(method="ifam", joint=False, train_tokens=False),
}
CLASSES = 2


# ---------------------------------------------------------------- one step
def force(model, share):
    """Let the mask keep a share of the patches of each image; its gradient stays that of the mask that was found."""
    discovered = model.mask

    def mask(*found_from):
        found = discovered(*found_from)
        B, N = found.shape
        keep = forced(counts_of(share, share, B, N), N, torch.Generator().manual_seed(0)).to(found)
        return keep + (found - found.detach())
    model.mask = mask


def make_step(cfg, variant):
    """-> a function that takes the training step of this number, always on the same random batch."""
    device = pick_device(cfg.device)
    settings = RunConfig(arch=cfg.arch, size=cfg.size, batch=cfg.batch, amp=cfg.amp, weights="none",
                            **VARIANTS[variant])
    dtype, scaler = train.autocast_of(settings, device)
    model = train.build_model(settings, device, CLASSES).train()
    if model.selector is not None:                       # as with pretrained weights
        train.freeze_backbone(model.selector, settings.train_tokens)
        if cfg.keep:
            force(model, cfg.keep)
    if cfg.compile:
        train.compile_stages(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(train.parameter_groups(model, settings, 1000), fused=device.type in ("cpu", "cuda"))
    batch = {"image": torch.randn(cfg.batch, 3, cfg.size, cfg.size, generator=torch.Generator().manual_seed(0)),
             "label": torch.arange(cfg.batch) % CLASSES}

    def step(number):
        train.gradients(model, settings, batch, number, 0, 1, device, dtype, scaler)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, settings.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return step


def peak_memory(cfg, variant):
    """GiB of two steps: of a process of its own on a CPU, of the allocator on a GPU."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_memory_here, (cfg, variant))


def peak_memory_here(cfg, variant):
    step = make_step(cfg, variant)
    for number in range(2):                              # the optimizer's state is there from the second on
        step(number)
    if pick_device(cfg.device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2 ** 30


def seconds(f, *args):
    """-> time of a call by the clock, and by the processors of all threads, which a busy machine disturbs less."""
    clock, processor = time.perf_counter(), time.process_time()
    f(*args)
    return time.perf_counter() - clock, time.process_time() - processor


def compare_steps(cfg):
    """Print a table: step time, its ratio to that of the first variant, the same of processor time, peak memory."""
    memory = {name: peak_memory(cfg, name) for name in VARIANTS}                 # first: a process starts as its parent
    steps = {name: make_step(cfg, name) for name in VARIANTS}
    turns = [{name: seconds(step, number) for name, step in steps.items()} for number in range(cfg.turns + 1)][1:]
    dense = next(iter(VARIANTS))
    print(f"ViT-{cfg.arch}, {cfg.size} px, batch {cfg.batch}, autocast {cfg.amp}, {torch.get_num_threads()} threads, "
          f"{f'{cfg.keep:.0%} of the patches kept' if cfg.keep else 'the mask as found'}, {cfg.turns} turns")
    print(f"  {'':<46}{'ms a step':>11}{'images/s':>10}{'ratio':>8}{'of processor time':>19}{'peak GiB':>10}")
    for name in VARIANTS:
        clock, processor = (statistics.median(turn[name][i] / turn[dense][i] for turn in turns) for i in (0, 1))
        milliseconds = 1000 * statistics.median(turn[name][0] for turn in turns)
        print(f"  {name:<46}{milliseconds:>11.0f}{1000 * cfg.batch / milliseconds:>10.1f}{clock:>8.2f}"
              f"{processor:>19.2f}{memory[name]:>10.2f}")


# ---------------------------------------------------------------- the input pipeline
def photographs(folder, count, size):
    """Write smooth random JPEGs of `size` (width, height) -> their paths."""
    paths = [Path(folder) / f"{i}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        coarse = np.random.default_rng(i).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    return paths


def measure_data(count=20, turns=2):
    """Print images/s of one core for JPEGs of 500 x 375 pixels, the size of most photographs of CUB and ImageNet.

    By processor time: one thread, and files that have just been written, so nothing waits.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = photographs(folder, count, (500, 375))
        for name, pipeline in (("birds, cats and dogs", FINE_GRAINED), ("ImageNet", PHOTOGRAPHS)):
            for size in (518, 224):
                best = math.inf
                for epoch in range(turns):               # anew: a small split would stay decoded
                    samples = Samples("none", "train", size, ("none",), [p.name for p in paths], paths, [0] * count,
                                      pipeline=pipeline)
                    start = time.process_time()
                    for i in range(count):
                        samples[epoch, i]
                    best = min(best, time.process_time() - start)
                print(f"  {name:<22}{size:>5} px {count / best:>7.0f} images/s and core")


def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    if cfg.keep > 1:
        raise UsageError(f"--keep must be at most 1, not {cfg.keep}")
    measure_data() if cfg.data else compare_steps(cfg)


if __name__ == "__main__":
    run_script(main)
