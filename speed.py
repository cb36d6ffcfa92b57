"""speed.py: what two stages cost beside one vision transformer, as ratios within one run.

    python speed.py                                      # ViT-S/14, 224 px, batch 8, random weights, kept counts forced
    python speed.py --selector-size 112                  # the same with a smaller stage 1
    python speed.py --scale                              # time and memory against tokens, K and batch -> docs/scale.png
    python speed.py --arch b --size 518 --batch 64 --device cuda --amp bf16 --compare --profile
    python evaluate.py --ckpt runs/waterbirds-mini/best.pt --speed       # a trained model on its own images

Everything is measured in turn, round after round, and a ratio is the median over rounds of ratios within a round. The
clock on a CPU with one thread is CPU time, which other processes hardly change, else wall time. "Dense" is a forward
of stage 2's ViT over all tokens. Letters: ifam.py.
"""
import json
import math
import os
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import ifam
import train
from vit import ViT, attend_masked
from baselines import FoundMask
from predict import given_mask
from runs import pick_device
from settings import UsageError, opt, parse, run_script, write_json

os.environ.setdefault("KINETO_LOG_LEVEL", "99")          # else the profiler prints a line whenever it starts or stops


@dataclass
class Config:
    arch: str = opt("s", "vision transformers: s, b, l, g, mini, or s/3 for the first 3 blocks of s")
    size: int = opt(224, "image side in pixels")
    batch: int = opt(8, "images at once")
    k: int = opt(8, "foreground parts")
    selector_size: int = opt(0, "side at which stage 1 looks at the image (0: --size)")
    selector_arch: str = opt("", "vision transformer of stage 1 (if not given, --arch)")
    rounds: int = opt(7, "times that everything is measured")
    compare: bool = opt(False, "also other ways for stage 2 to attend: padded, through a nested tensor, not packed")
    scale: bool = opt(False, "instead: time and memory against tokens, K and batch")
    device: str = opt("auto", "auto, cpu, cuda or mps")
    amp: str = opt("off", "autocast", choices=("off", "bf16", "fp16"))
    compile: bool = opt(False, "torch.compile the dense ViT and both stages")
    peak: float = opt(0.0, "TFLOP/s that the device can do, to print which share is reached (0: do not)")
    profile: bool = opt(False, "also print the operations that take most of the time at 20 % kept (torch.profiler)")
    out: str = opt("", "file for the numbers, JSON (default: none; with --scale docs/scale.json, the figure beside it)")


# ---------------------------------------------------------------- operations, counted from shapes
def block_flops(vit, tokens, asked):
    """Floating-point operations of a block, 2 for a multiply-add, where `asked` of its tokens are computed."""
    D, mlp = vit.width, vit.blocks[0].mlp
    hidden = sum(p.numel() for name, p in mlp.named_parameters() if name.endswith("weight"))     # of all its matrices
    return 2 * (2 * asked + 2 * tokens) * D * D + 4 * asked * tokens * D + 2 * asked * hidden


def vit_flops(vit, patches=None, class_only=False):
    """Operations of one image in a ViT that computes this many of its patches (None: all)."""
    patches = math.prod(vit.grid) if patches is None else patches
    T = vit.prefix + patches
    whole = (len(vit.blocks) - 1) * block_flops(vit, T, T) + block_flops(vit, T, 1 if class_only else T)
    return whole + 2 * patches * 3 * vit.patch ** 2 * vit.width


def stage1_flops(selector, classes):
    """Operations of one image in stage 1: backbone, distances to prototypes, part features, classifier."""
    N, D, K = math.prod(selector.backbone.grid), selector.backbone.width, selector.k
    return vit_flops(selector.backbone) + 2 * (2 * (K + 1) * N * D + K * D * classes)


def stage2_flops(predictor, patches=None):
    """Operations of one image in stage 2 that sees this many patches (None, or under a late mask: all)."""
    vit = predictor.backbone
    pooling = 0 if predictor.pooling == "cls" else 2 * math.prod(vit.grid) * vit.width
    return (vit_flops(vit, patches if predictor.masking == "early" else None, predictor.pooling == "cls") + pooling
            + 2 * vit.width * predictor.head.out_features)


# ---------------------------------------------------------------- time
def clock(device):
    """-> (what it is, a function that gives seconds after waiting for the device)."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return "CPU time of one thread", time.thread_time
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    return "wall time", lambda: (wait(), time.perf_counter())[1]


def in_turn(functions, rounds, device):
    """Seconds of every function in every round, {name: [seconds]}, one after the other; a call each to warm up."""
    now, found = clock(device)[1], {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = now()
            function()
            found[name].append(now() - start)
    return found


def ratio(seconds, name, of="dense"):
    """Median over rounds of the time of one thing relative to another."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[of]))


@contextmanager
def stopwatch(modules, device):
    """Seconds spent in groups of modules, {name: [modules]} -> {name: seconds}, filled while inside."""
    now, spent, began, hooks = clock(device)[1], dict.fromkeys(modules, 0.0), {}, []

    def start(module, inputs):
        began[module] = now()

    def stop(name):
        def hook(module, inputs, output):
            spent[name] += now() - began[module]
        return hook
    for name, group in modules.items():
        for module in group:
            hooks += [module.register_forward_pre_hook(start), module.register_forward_hook(stop(name))]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


# ---------------------------------------------------------------- memory
def peak_memory(function, device):
    """Bytes that a call needs at once beyond what is held before it: torch's own count.

    CUDA: max_memory_allocated. CPU: every allocation of torch's allocator as torch.profiler records it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if device.type != "cpu":
        return None                                      # torch counts no peak on mps
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


# ---------------------------------------------------------------- a trained model
def check(model):
    """UsageError for a model whose operations are not counted."""
    if isinstance(model, FoundMask) or model.predictor and not isinstance(model.predictor, ifam.Predictor):
        raise UsageError("--speed counts the operations of ViTs under a mask or without: not of probes or --method "
                         "early-found, late-found; leave it out")


@torch.no_grad()
def measure(model, images, truth=None, rounds=5):
    """What a model costs on these images (B, 3, S, S) -> dict for report.json; truth: keep, where a model is given it.

    Shares: of the time of the whole model, measured module by module in calls of their own; that of stage 1, and those
    of attention and feed-forward in both stages. Operations are per image.
    """
    device, (B, *_) = images.device, images.shape
    check(model)
    vit = (model.predictor or model.selector).backbone
    whole = lambda x=images, keep=truth: model(x, keep)
    kept = whole().keep
    one = lambda: whole(images[:1], truth if truth is None else truth[:1])
    seconds = in_turn({"dense": lambda: vit(images), "model": whole, "one image": one}, rounds, device)
    blocks = [b for stage in (model.selector, model.predictor) if stage for b in stage.backbone.blocks]
    groups = {"stage1": [model.selector] if model.selector else [], "attention": [b.attn for b in blocks],
              "feed_forward": [b.mlp for b in blocks], "whole": [model]}
    with stopwatch(groups, device) as spent:
        for _ in range(rounds):
            whole()
    share = {name: spent[name] / spent["whole"] for name in groups if name != "whole"}
    classes = (model.predictor.head if model.predictor else model.selector.classifier).out_features
    gflops = {"dense": vit_flops(vit) / 1e9}
    if model.selector:
        gflops["stage1"] = stage1_flops(model.selector, classes) / 1e9
    if model.predictor:
        counts = [None] if kept is None else (kept > 0).sum(1).tolist()
        gflops["stage2"] = statistics.mean(stage2_flops(model.predictor, n) for n in counts) / 1e9
    peak = {"model": peak_memory(whole, device), "dense": peak_memory(lambda: vit(images), device)}
    return {"device": name_of(device), "threads": torch.get_num_threads(), "clock": clock(device)[0], "batch": B,
            "kept_share": None if kept is None else kept.mean().item(),
            "images_per_second": B / statistics.median(seconds["model"]),
            "images_per_second_dense": B / statistics.median(seconds["dense"]),
            "relative_to_dense": ratio(seconds, "model"), "gflops": gflops, "share_of_time": share,
            "latency_ms": 1e3 * statistics.median(seconds["one image"]), "peak_bytes": peak}


def measure_split(model, samples, device, batch):
    """What measure() finds on the first images of a split, at most a batch."""
    images = torch.utils.data.default_collate([samples[i] for i in range(min(batch, len(samples)))])
    return measure(model, images["image"].to(device), given_mask(model, images, device))


def summary(found):
    """What measure() found, as lines."""
    g, share = found["gflops"], found["share_of_time"]
    stages = " and ".join(f"{g[s]:.3g} in {n}" for s, n in (("stage1", "stage 1"), ("stage2", "stage 2")) if s in g)
    memory = "not counted on this device" if found["peak_bytes"]["model"] is None else \
        "{:.1f} MB, dense {:.1f} MB".format(*(found["peak_bytes"][n] / 1e6 for n in ("model", "dense")))
    return "\n".join((
        f"  speed at batch {found['batch']}, {found['device']}, {found['threads']} threads, {found['clock']}:",
        f"    {found['images_per_second']:.1f} images/s; {found['relative_to_dense']:.3f} of the time of one dense ViT "
        f"({found['images_per_second_dense']:.1f} images/s)",
        f"    GFLOPs per image: {stages}, dense {g['dense']:.3g}",
        f"    share of the time: {share['stage1']:.0%} in stage 1; in all stages {share['attention']:.0%} "
        f"in attention, {share['feed_forward']:.0%} in feed-forward",
        f"    latency at batch 1: {found['latency_ms']:.1f} ms; peak memory beyond the weights: {memory}"))


def name_of(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# ---------------------------------------------------------------- random weights, kept counts forced
def attend_padded(q, k, v, lengths, asked=None):
    """attend_packed by padding every image to the longest."""
    mask = torch.arange(max(lengths), device=q.device) < torch.tensor(lengths, device=q.device)[:, None]
    q, k, v = (pad_sequence(x.split(n), batch_first=True).transpose(1, 2)
               for x, n in ((q, asked or lengths), (k, lengths), (v, lengths)))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]).transpose(1, 2)
    return torch.cat([image[:n] for image, n in zip(out, asked or lengths)])


def attend_nested(q, k, v, lengths, asked=None):
    """attend_packed through a nested tensor: on CUDA this is the variable-length flash kernel."""
    def jagged(x, n):
        offsets = F.pad(torch.tensor(n).cumsum(0), (1, 0)).to(x.device)
        return torch.nested.nested_tensor_from_jagged(x.contiguous(), offsets, min_seqlen=min(n),
                                                      max_seqlen=max(n)).transpose(1, 2)
    out = F.scaled_dot_product_attention(jagged(q, asked or lengths), jagged(k, lengths), jagged(v, lengths))
    return out.transpose(1, 2).values()


OTHERS = {"padded to the longest": attend_padded, "nested tensor": attend_nested}


@contextmanager
def replaced(owner, name, other):
    """A function of ifam.py is another one that computes the same."""
    ours = getattr(owner, name)
    setattr(owner, name, other)
    try:
        yield
    finally:
        setattr(owner, name, ours)


def not_packed(vit, images, keep, class_only):
    """ViT._run_packed without packing: every token is computed, and dropped ones are masked out of attention."""
    mask, rows = F.pad(keep.float(), (vit.prefix, 0), value=1.0), (lambda x: x[:, :1]) if class_only else None
    return vit._run(vit.embed(images), lambda q, k, v: attend_masked(q, k, v, mask), rows)


def forced(counts, patches, generator):
    """A mask that keeps this many patches of each image, at random places: keep (B, N)."""
    order = torch.rand(len(counts), patches, generator=generator).argsort(1).argsort(1)
    return (order < torch.tensor(counts)[:, None]).float()


def counts_of(low, high, batch, patches):
    """Kept patches of each image: shares evenly spread from low to high."""
    return [round(share * patches) for share in torch.linspace(low, high, batch).tolist()]


CASES = {"20 % kept": (0.2, 0.2), "5-60 % kept, ragged": (0.05, 0.6), "5 % kept": (0.05, 0.05), "100 % kept": (1, 1)}


def make(cfg, **changes):
    """A model with random weights, in evaluation mode, and images for it."""
    torch.manual_seed(0)
    cfg, device = replace(cfg, **changes), pick_device(cfg.device)
    try:
        model = ifam.IFAM(2, cfg.k, cfg.arch, cfg.size, selector_arch=cfg.selector_arch,
                          selector_size=cfg.selector_size)
    except ValueError as error:
        raise UsageError(f"these settings make no model: {error}") from None
    return model.eval().to(device), torch.randn(cfg.batch, 3, cfg.size, cfg.size).to(device)


@torch.no_grad()
def forced_masks(cfg):
    """Time of the whole model under forced masks relative to a dense ViT -> {row: {...}}, and what was profiled."""
    model, images = make(cfg)
    device, vit, N = images.device, model.predictor.backbone, math.prod(model.grid)
    if cfg.compile:
        train.compile_stages(model)
        vit.compile()
    draw = torch.Generator().manual_seed(0)
    counts = {name: counts_of(*shares, cfg.batch, N) for name, shares in CASES.items()}
    keeps = {name: forced(n, N, draw).to(device) for name, n in counts.items()}
    flops = {"dense": cfg.batch * vit_flops(vit), "stage 1": cfg.batch * stage1_flops(model.selector, 2),
             "dense classifier": cfg.batch * stage2_flops(model.predictor)}
    calls = {"dense": lambda: vit(images), "dense classifier": lambda: model.predictor(images),
             "stage 1": lambda: model.selector(images)}
    for name, keep in keeps.items():
        calls[name] = lambda keep=keep: model(images, keep)
        flops[name] = flops["stage 1"] + sum(stage2_flops(model.predictor, n) for n in counts[name])
    for name in list(CASES)[:2] if cfg.compare else ():
        for other, attend in OTHERS.items():
            def call(keep=keeps[name], attend=attend):
                with replaced(sys.modules["vit"], "attend_packed", attend):
                    return model(images, keep)
            calls[f"{name}, {other}"], flops[f"{name}, {other}"] = call, flops[name]

        def call(keep=keeps[name]):
            with replaced(ViT, "_run_packed", not_packed):
                return model(images, keep)
        calls[f"{name}, not packed"] = call
        flops[f"{name}, not packed"] = flops["stage 1"] + flops["dense classifier"]
    with autocast(cfg, device):
        seconds = in_turn(calls, cfg.rounds, device)
        hottest = profiled(calls["20 % kept"], device) if cfg.profile else None
        peak = {name: peak_memory(call, device) for name, call in calls.items()}
    rows = {name: {"relative_to_dense": ratio(seconds, name), "seconds": statistics.median(seconds[name]),
                   "images_per_second": cfg.batch / statistics.median(seconds[name]),
                   "relative_operations": flops[name] / flops["dense"], "gflops": flops[name] / cfg.batch / 1e9,
                   "tflops": flops[name] / statistics.median(seconds[name]) / 1e12,
                   "peak_bytes": peak[name]} for name in calls}
    return rows, hottest


def autocast(cfg, device):
    dtype, _ = train.autocast_of(cfg, device)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def profiled(function, device, rows=6):
    """The operations that take most of the time, as torch.profiler prints them."""
    on_gpu = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=kinds) as profile:
        function()
    by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=by, row_limit=rows, max_name_column_width=50)


# ---------------------------------------------------------------- growth
STEPS = {"tokens": ("size", (224, 518, 1022)), "K": ("k", (1, 4, 16, 64)), "batch": ("batch", (1, 2, 4, 8, 16))}


def exponent(x, y):
    """Slope of a straight line through (log x, log y), by least squares."""
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (x, y))
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def growth(cfg):
    """Time and peak memory of prediction, and of forward and backward of both stages ("training"), 20 % kept, each
    against tokens, K and batch.

    -> {"tokens": {"x": [...], "prediction": {"seconds": [...], "bytes": [...]}, "training": ..., "exponents": ...}}
    """
    found = {}
    for name, (setting, values) in STEPS.items():
        base = {"size": 224, "k": 8, "batch": 1 if name == "tokens" else 4 if name == "K" else 0}
        rows = {}
        for value in values:
            model, images = make(cfg, **{**base, setting: value})
            N = math.prod(model.grid)
            keep = forced(counts_of(0.2, 0.2, len(images), N), N, torch.Generator().manual_seed(0)).to(images)

            @torch.no_grad()
            def predict():
                return model(images, keep)

            def step():                                  # the mask asks for its gradient: the path of training
                out = model(images, keep.clone().requires_grad_())
                (out.logits.sum() + out.logits_stage1.sum()).backward()
            with autocast(cfg, images.device):
                seconds = in_turn({"prediction": predict, "training": step}, cfg.rounds, images.device)
                rows[1 + 4 + N if name == "tokens" else value] = {
                    what: {"seconds": min(seconds[what]), "bytes": peak_memory(function, images.device)}
                    for what, function in (("prediction", predict), ("training", step))}
        found[name] = {"x": list(rows), "exponents": {}}
        for what in ("prediction", "training"):
            curves = {unit: [row[what][unit] for row in rows.values()] for unit in ("seconds", "bytes")}
            found[name][what] = curves
            found[name]["exponents"][what] = {unit: exponent(list(rows), y) for unit, y in curves.items()
                                              if None not in y}
    return found


# ---------------------------------------------------------------- the command
def main(argv=None):
    cfg = parse(Config, __doc__, argv)
    device = pick_device(cfg.device)
    print(f"{name_of(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}; {clock(device)[0]}")
    head = {"command": vars(cfg), "device": name_of(device), "threads": torch.get_num_threads(),
            "clock": clock(device)[0]}
    if cfg.scale:
        for name in ("size", "k", "batch", "compare", "profile", "peak", "compile"):
            if getattr(cfg, name) != getattr(Config, name):
                raise UsageError(f"--scale goes through sizes, K and batches of its own: leave out --{name}")
        import figures                                   # here: the rest needs no matplotlib
        found, path = growth(cfg), Path(cfg.out or "docs/scale.json")
        for name, rows in found.items():
            for what, powers in rows["exponents"].items():
                print(f"  {what} grows with {name} to the power of "
                      + ", ".join(f"{power:.2f} ({unit})" for unit, power in powers.items()))
        write_json(path, {**head, "growth": found})
        figures.growth(found, path.with_suffix(".png"))
        print(f"  wrote {path} and {path.with_suffix('.png')}")
        return
    rows, hottest = forced_masks(cfg)
    for name, row in rows.items():
        share = f"  {row['tflops'] / cfg.peak:.0%} of peak" if cfg.peak else ""
        share += f"  {row['peak_bytes'] / 1e6:.0f} MB" if row["peak_bytes"] is not None else ""
        print(f"  {name:<44}{row['relative_to_dense']:>7.3f} of dense  {row['images_per_second']:>8.1f} images/s  "
              f"{row['gflops']:>8.2f} GFLOPs an image, {row['relative_operations']:.3f} of dense{share}")
    if hottest:
        print(hottest)
    if cfg.out:
        write_json(Path(cfg.out), {**head, "rows": rows})


if __name__ == "__main__":
    run_script(main)
