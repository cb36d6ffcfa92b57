"""baselines.py: what iFAM is compared with, and the one place where settings become a model.

Every model returns an ifam.Output from forward(images, keep=None, noise=None), and for training a pair from
forward_pair(images, warped, noise), so that one loop trains and one program measures them all. What a model is told
about where the object is goes to both: measure.leakage.given has it.

Floor: the lesson, its last chapter. Read ifam.py first; its letters are used here.
"""
import os
import zlib
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ifam import WEIGHTS, IFAM, Noise, Output, Predictor, Selector, paint
from vit import build_vit


# ---------------------------------------------------------------- a backbone and a head
class ERM(nn.Module):
    """Empirical risk minimisation (Vapnik, 1991): a ViT and a linear head on the class token.

    "DinoV2" in the paper's tables; with frozen=True its frozen backbone, where only the head trains. It is iFAM's
    second stage without a mask. choices: ifam.Predictor; its norm and bias make the head that of the paper's baseline
    or that of iFAM's second stage. keep (B, N) hides patches from it; only measurements use that.
    """
    selector = None
    needs_truth = False
    trim = "none"

    def __init__(self, classes, arch="b", size=518, registers=4, frozen=False, **choices):
        super().__init__()
        self.predictor = self.make_predictor(build_vit(arch, size, registers), classes, **choices)
        self.predictor.backbone.requires_grad_(not frozen)

    make_predictor = Predictor

    def forward(self, images, keep=None, noise=None):
        return Output(self.predictor(images, keep), keep=keep)

    def forward_pair(self, images, warped, noise, **told):
        return self(images, **told), None


# ---------------------------------------------------------------- attentive probes
class Probe(nn.Module):
    """A backbone, learned pooling over its patch features after the final norm, and a linear head. No mask.

    The head is one of torch's layers, started as torch starts it.
    """

    def __init__(self, backbone, classes, pool, bias):
        super().__init__()
        self.backbone, self.pool = backbone, pool
        self.head = nn.Linear(backbone.width, classes, bias=bias)

    def features(self, images, keep=None):
        """What the head reads: images (B, 3, S, S) -> (B, D). ValueError if there is a mask: a probe has none."""
        if keep is not None:
            raise ValueError("an attentive probe reads every patch: keep cannot be given")
        return self.pool(self.backbone(images)[:, self.backbone.prefix:])

    def forward(self, images, keep=None):
        """-> logits (B, C)."""
        return self.head(self.features(images, keep))


class EfficientPooling(nn.Module):
    """Efficient probing (Psomas et al., ICLR 2026): learned queries, each with a slice of the values.

    patches (B, N, D) -> (B, D). No key projection, no bias, one head: Q queries of D channels and one D x D value
    projection, which starts as torch's layers do, are all that it has. Q is 32 as published, which divides the width of
    every backbone here, mini (128) included. ValueError otherwise.
    """

    def __init__(self, width, queries=32):
        super().__init__()
        if width % queries:
            raise ValueError(f"efficient probing: width {width} is not a multiple of its {queries} queries")
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.value = nn.Linear(width, width, bias=False)

    def attention(self, patches):
        """(B, N, D) -> (B, Q, N): what each query weighs each patch; every row sums to 1."""
        return (self.queries @ patches.mT * patches.shape[2] ** -0.5).softmax(2)

    def forward(self, patches):
        attention = self.attention(patches)
        values = self.value(patches).unflatten(2, (len(self.queries), -1))       # (B, N, Q, D/Q)
        return torch.einsum("bqn,bnqd->bqd", attention, values).flatten(1)


class AttentionPooling(nn.Module):
    """AIM's attention pooling (El-Nouby et al., ICML 2024): batch-norm, one learned query, H heads.

    patches (B, N, D) -> (B, D). Learned keys and values without bias, which start as torch's layers do; no projection
    of the output. H is that of the backbone, one head for 64 channels: 12 for ViT-B, as published. differs from
    published for the others: there H is always 12, which does not divide the width of ViT-L, 1024.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.norm, self.heads = BatchNorm(width), heads
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, patches):
        x = self.norm(patches)
        k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.key, self.value))
        q = self.query.to(k.dtype).view(1, self.heads, 1, -1).expand(len(x), -1, -1, -1)
        return F.scaled_dot_product_attention(q, k, v).flatten(1)                # heads side by side


class BatchNorm(nn.Module):
    """Batch-norm without affine over the last dimension of (B, N, D) or (B, D), eps 1e-6, momentum 0.1.

    In training its statistics are those of the whole batch over all processes (torch's own synchronised layer needs
    CUDA), so that two processes take the step of one. Under accumulation they are those of each portion.
    """

    def __init__(self, width, eps=1e-6, momentum=0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.mean.dtype)
            mean, variance = self.mean, self.variance
            if self.training:
                world, others = dist.get_world_size() if dist.is_initialized() else 1, tuple(range(x.ndim - 1))
                mean = AverageOverProcesses.apply(x.mean(others), world)
                variance = AverageOverProcesses.apply((x - mean).square().mean(others), world)
                with torch.no_grad():
                    count = world * x[..., 0].numel()
                    self.mean.lerp_(mean, self.momentum)
                    self.variance.lerp_(variance * count / (count - 1), self.momentum)
            return (x - mean) * (variance + self.eps).rsqrt()


class AverageOverProcesses(torch.autograd.Function):
    """Mean of a tensor over processes. Every loss depends on every share of it, so gradients are averaged likewise."""

    @staticmethod
    def forward(ctx, x, world):
        ctx.world = world
        return average(x, world)

    @staticmethod
    def backward(ctx, grad):
        return average(grad, ctx.world), None


def average(x, world):
    if world == 1:
        return x.clone()
    x = x.contiguous().clone()
    dist.all_reduce(x)
    return x / world


class EfficientProbe(ERM):
    """`ep`: efficient probing and a linear head with bias, on a frozen backbone as in the paper, or a trained one.

    norm=True puts batch-norm between the two, as Psomas et al. do; iFAM's copy of their probe has left it out.
    """

    @staticmethod
    def make_predictor(backbone, classes, norm=False):
        pool = EfficientPooling(backbone.width)
        probe = Probe(backbone, classes, nn.Sequential(pool, BatchNorm(backbone.width)) if norm else pool, bias=True)
        nn.init.trunc_normal_(probe.head.weight, std=0.02)                       # of iFAM's copy too
        return probe


class AttentionProbe(ERM):
    """`aim`: AIM's attention pooling and a linear head without bias, on a backbone that is frozen or trains."""

    @staticmethod
    def make_predictor(backbone, classes):
        return Probe(backbone, classes, AttentionPooling(backbone.width, backbone.blocks[0].attn.heads), bias=False)


# ---------------------------------------------------------------- patches that answer
class PatchProbe(Probe):
    """A linear head with bias on every patch, whose logits are averaged: C classes, and `none` for patches without any.

    Heads are linear, so that the mean of the patches' logits is the logit of their mean.
    """

    def __init__(self, backbone, classes):
        super().__init__(backbone, classes, partial(torch.mean, dim=1), bias=True)
        self.none = nn.Linear(backbone.width, 1)

    def of_patches(self, images):
        """images (B, 3, S, S) -> logits (B, N, C+1), none last."""
        patches = self.backbone(images)[:, self.backbone.prefix:]
        return torch.cat([self.head(patches), self.none(patches)], 2)


class Segmenter(ERM):
    """`seg-erm`, `bbox-erm` (Saab et al., MLHC 2022): patches learn where the object is, their mean answers.

    In training forward_pair is told targets (B, N, C+1), see patch_targets: masks or boxes are read there, and nowhere
    else. outside: the class of a patch without object, None for `none`; where masks mark what makes class 1 and are
    empty without it, it is class 0, as published. differs from published: a ViT's patches instead of a U-Net's pixels,
    more than two classes, chosen on validation accuracy.
    """
    make_predictor, outside = PatchProbe, None

    def forward(self, images, keep=None, noise=None, targets=None):
        if targets is None:
            return super().forward(images, keep)
        logits = self.predictor.of_patches(images)
        return Output(logits.mean(1)[:, :-1], patch_logits=logits, targets=targets)


def patch_targets(shares, labels, classes, outside=None):
    """What patches are to answer: shares of object (B, N), labels (B,) -> (B, N, C+1), sums to 1 for each patch.

    The share goes to the image's class, the rest to `outside`, by default the last, `none`.
    """
    inside = F.one_hot(labels, classes + 1)[:, None] * shares[..., None]
    outside = torch.tensor(classes if outside is None else outside, device=labels.device)
    return inside + F.one_hot(outside, classes + 1) * (1 - shares[..., None])


# ---------------------------------------------------------------- masks that are not learned
class TrueMask(ERM):
    """iFAM's second stage under the true mask, in training and in evaluation: what a perfect first stage would give.

    Aniraj et al., ICCV workshops 2023. masking="early": the mask comes before attention. "late": full attention, and
    only the pooling skips what is masked out. The controlled comparison has pooling="mean" in both; published are
    "cls" for the early and "mean-all" for the late mask. mask_rule: which patches a mask keeps (samples.patch_keep).
    """
    needs_truth = True

    def __init__(self, *args, trim="none", mask_rule="half", **kw):
        super().__init__(*args, **kw)
        self.mask_rule = mask_rule
        if trim == "found":
            raise ValueError("a model that is given the true mask finds none to trim by: --trim truth or none")
        self.trim = trim

    def forward(self, images, keep=None, noise=None, shown=None):
        if keep is None or (shown is None) != (self.trim == "none"):
            raise ValueError("this model is told where the object is: pass keep" + " and shown" * (self.trim != "none"))
        return super().forward(paint(images, shown), keep)._replace(shown=shown)


class FoundMask(ERM):
    """The same under a mask found without labels, in the manner of FOUND (Simeoni et al., CVPR 2023).

    `finder` is a copy of the backbone as it was before training, and stays so. by="seed": FOUND's step without
    training. by="head": its trained head; train_found_head trains it before all else, and it stays as it is then.
    differs from published: theirs is on DINO ViT-S/8, and smooths its targets by a bilateral solver; ours is on the
    same weights as all else, without solver. Attention is the network's own, of which the registers have a share.
    """

    def __init__(self, classes, arch="b", size=518, registers=4, by="seed", mask_rule="half", **choices):
        super().__init__(classes, arch, size, registers, **choices)
        self.finder, self.mask_rule = build_vit(arch, size, registers).requires_grad_(False), mask_rule
        self.finder_head = nn.Linear(self.finder.width, 1).requires_grad_(False) if by == "head" else None
        self.copy_backbone()

    def copy_backbone(self):
        """The finder gets the backbone's weights; once they are loaded, and never again."""
        self.finder.load_state_dict(self.predictor.backbone.state_dict())

    def look(self, images):
        """images (B, 3, S, S) -> keys of the finder's last block (B, N, D), and the mask of the seed step (B, N)."""
        with torch.autocast(images.device.type, enabled=False):                  # a threshold: not in bf16
            attention, keys = self.finder.last_attention(images)
            return keys.transpose(1, 2).flatten(2), background_seed(attention, keys)[0]

    @torch.no_grad()
    def find(self, images):
        """images (B, 3, S, S) -> keep (B, N)."""
        keys, keep = self.look(images)
        if self.finder_head is None:
            return keep
        with torch.autocast(images.device.type, enabled=False):
            return (self.finder_head(keys)[..., 0] > 0).to(keys.dtype)           # a sigmoid above 1/2

    def forward(self, images, keep=None, noise=None):
        return super().forward(images, self.find(images) if keep is None else keep)


class RandomMask(ERM):
    """The same under masks drawn at random: what a classifier knows that no selection has told anything.

    After REAL-X (Jethani et al., AISTATS 2021), whose EVAL-X it is: for each image a share is drawn, uniform in [0, 1],
    and every patch is kept with this probability, so that each set of patches may occur. `evaluate.py --encoding`
    trains it to judge the masks of others. keep (B, N) as for ERM; without it the whole image is seen.
    """

    @staticmethod
    def draw(generators, patches):
        """A mask for each generator -> keep (len(generators), patches) in {0, 1}."""
        draws = torch.stack([torch.rand(1 + patches, generator=g) for g in generators])
        return (draws[:, 1:] < draws[:, :1]).float()

    @staticmethod
    def of(ids, patches):
        """The masks that images with these names have in every evaluation -> keep (len(ids), patches)."""
        seeds = [zlib.crc32(os.fsencode(name)) for name in ids]
        return RandomMask.draw([torch.Generator().manual_seed(seed) for seed in seeds], patches)


def background_seed(attention, keys, threshold=0.3):
    """FOUND's training-free step: what does not look like the least attended patch -> keep (B, N), seed (B,).

    attention (B, H, N) of the class token to the patches, keys (B, H, N, D/H), both of the last block. Heads weigh
    beta_h = log(sum_g Q_g / Q_h), Q_h the share of patches that head h attends to more than the image's mean: heads
    that look at little count more. Background are the patches whose weighted, normalised keys have a cosine above
    `threshold` with the seed's.
    """
    share = (attention > attention.mean((1, 2), keepdim=True)).to(attention.dtype).mean(2) + 1e-10       # (B, H)
    beta = (share.sum(1, keepdim=True) / share).log()
    seed = (beta[..., None] * attention).sum(1).argmin(1)
    described = F.normalize((beta[..., None, None] * keys).transpose(1, 2).flatten(2), dim=2)            # (B, N, D)
    cosine = (described @ described[torch.arange(len(seed)), seed][..., None])[..., 0]
    return (cosine <= threshold).to(attention.dtype), seed


def found_loss(logits, keep, step):
    """What FOUND's head learns from at a step: its logits (B, N), the mask of the seed step (B, N) -> scalar.

    BCE to the seed's mask, plus 1.5 times BCE to the head's own answer, a mask again; from step 100 on 4 times the
    latter alone. differs from published: there the first two targets are smoothed by a bilateral solver, and the second
    of them stays to the end.
    """
    own = F.binary_cross_entropy_with_logits(logits, (logits > 0).to(logits.dtype))
    return F.binary_cross_entropy_with_logits(logits, keep) + 1.5 * own if step < 100 else 4 * own


def train_found_head(head, seen):
    """Train FOUND's head (Simeoni et al., CVPR 2023), a layer D -> 1, in place, and freeze it. No label enters.

    seen: for each step what FoundMask.look says of some images. AdamW at 5e-2, times 0.95 every 50 steps, as published.
    """
    optimizer = torch.optim.AdamW(head.requires_grad_(True).parameters(), lr=5e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.95)
    for step, (keys, keep) in enumerate(seen):
        optimizer.zero_grad()
        found_loss(head(keys)[..., 0], keep, step).backward()
        optimizer.step()
        schedule.step()
    head.requires_grad_(False)


# ---------------------------------------------------------------- one stage
class PDiscoFormer(IFAM):
    """iFAM's first stage alone (Aniraj et al., ECCV 2024): soft part maps over features of the whole image.

    The paper's "no second stage": a late, soft mask. keep says where a part beats the background; nothing uses it.
    """
    predictor = None

    def __init__(self, classes, k=8, arch="b", size=518, registers=4, tau=1.0, dropout1=0.3, backgrounds=1):
        nn.Module.__init__(self)
        self.selector = Selector(build_vit(arch, size, registers), classes, k, tau, dropout1,
                                 backgrounds=backgrounds)
        self.dropout2 = 0.0

    def second_stage(self, images, first, noise=Noise(), keep=None, shown=None):
        keep = self.mask(first) if keep is None else keep
        return Output(first.logits, first.logits, first.maps, keep, first.part_logits, first.part_features)


# ---------------------------------------------------------------- settings -> model
GIVEN = ("early-truth", "late-truth", "early-found", "late-found")               # methods whose mask is not learned
PRETRAINED = ("frozen", "ep", "aim", "early-found", "late-found")                # a random backbone cannot serve these
SEGMENT = {"seg-erm": "masks", "bbox-erm": "boxes"}      # methods whose patches answer, and what teaches them
METHODS = ("ifam", "pdiscoformer", "erm", "frozen", "ep", "aim", *SEGMENT, *GIVEN, "early-random")
TAKES = {   # settings that only these methods have; all others have no such thing, and refuse the flag
    **dict.fromkeys(("k", "backgrounds", "tau", "part_dropout1", "train_tokens", "shaping", "presence_window",
                     "lr_prototypes", "lr_tokens", "film", "supervise",
                     *(f"weight_{loss}" for loss in WEIGHTS if loss not in ("class2", "complement"))),
                    ("ifam", "pdiscoformer")),
    **dict.fromkeys(("weight_class2", "warmup"), tuple(m for m in METHODS if m != "pdiscoformer")),
    **dict.fromkeys(("part_dropout2", "joint", "masking", "hardness", "stage1_class", "selector_size", "selector_arch",
                     "selector_weights", "mask_largest", "mask_dilate", "weight_complement"), ("ifam",)),
    "freeze_stage2": ("ifam", "early-random"), "trim": ("ifam", "early-truth"),
    **dict.fromkeys(("masktune", "hide_with", "masktune_lr"), ("erm", "frozen", "ifam")),
    **dict.fromkeys(("swap", "swap_mask"), tuple(m for m in METHODS if m != "early-random")),    # it judges masks
    "draft": tuple(m for m in METHODS if not m.endswith(("-truth", "-erm"))),    # a mask is as large as its picture
    "pooling": ("ifam", *GIVEN, "early-random"), "train_backbone": ("ep", "aim"), "probe_norm": ("ep",),
    "head": ("erm", "frozen", *GIVEN), "mask_rule": GIVEN, "mask_with": ("early-truth", "early-found"),
    **dict.fromkeys(("finder", "find_in"), ("early-found", "late-found")),
    "checkpoint": tuple(m for m in METHODS if m != "frozen"),
    # the judge of masks is one and the same for all
    **dict.fromkeys(("objective", "groups", "upweight", "dro_step", "dro_adjustment", "dro_draw", "select"),
                    tuple(m for m in METHODS if m != "early-random"))}


def build(settings, classes):
    """A model from the settings of a run, the dict that a checkpoint carries. ValueError if they do not fit."""
    method = settings["method"]
    shared = dict(classes=classes, arch=settings["arch"], size=settings["size"], registers=settings["registers"])
    # checkpoints from before an option do not have it
    parts = dict(k=settings["k"], tau=settings["tau"], dropout1=settings["part_dropout1"],
                 backgrounds=settings.get("backgrounds", 1))
    norm = settings.get("head", "norm") == "norm"
    if method in ("erm", "frozen"):
        return ERM(**shared, frozen=method == "frozen", norm=norm, bias=not norm)
    if method == "ep":
        return EfficientProbe(**shared, frozen=not settings["train_backbone"], norm=settings.get("probe_norm", False))
    if method == "aim":
        return AttentionProbe(**shared, frozen=not settings["train_backbone"])
    if method in SEGMENT:
        return Segmenter(**shared)
    if method == "early-random":
        return RandomMask(**shared, pooling=settings["pooling"])
    if method in GIVEN:
        masking, source = method.split("-")
        choices = dict(masking=masking, pooling=settings["pooling"], norm=norm, bias=not norm and masking == "late",
                       mask_rule=settings.get("mask_rule", "half"), mask_with=settings.get("mask_with", "patches"))
        if source == "truth":
            return TrueMask(**shared, **choices, trim=settings.get("trim", "none"))
        return FoundMask(**shared, **choices, by=settings.get("finder", "seed"))
    if method == "pdiscoformer":
        return PDiscoFormer(**shared, **parts)
    if method != "ifam":
        raise ValueError(f"no method is called {method!r}: one of {', '.join(METHODS)}")
    return IFAM(**shared, **parts, dropout2=settings["part_dropout2"], joint=settings["joint"],
                masking=settings["masking"], hardness=settings["hardness"], pooling=settings["pooling"],
                selector_arch=settings.get("selector_arch"), selector_size=settings.get("selector_size"),
                largest=settings.get("mask_largest", False), dilate=settings.get("mask_dilate", "none"),
                trim=settings.get("trim", "none"))
