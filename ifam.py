"""ifam.py: the two-stage model, from pixels to logits, and the losses that shape its parts.

Stage 1, the selector, sees the whole image and gives each patch to one of K parts or to the background.
Stage 2, the predictor, classifies from the patches that stage 1 kept, and from nothing else: dropped patches
are masked out of every attention layer, so no pixel of theirs can reach a logit.

Floor: the lesson; it needs torch and vit.py alone. Read vit.py first: how a mask enters attention.

Letters: B images, N = h*w patches, R registers, T = 1+R+N tokens (class token, registers, patches), D width,
H heads, K parts (index K is the background), M prototypes of the background (1 in the paper), C classes.
keep (B, N): 1 = stage 2 may see this patch.

    model = IFAM(classes=2, k=8, arch="b", size=518)
    out = model.eval()(images)                    # images (B, 3, 518, 518), normalised
    out.logits, out.maps, out.keep                # (B, C), (B, K+1, h, w), (B, N)

    out, warped_maps = model.train().forward_pair(images, warp(images, affine), noise)       # a step of training
    loss(out, warped_maps, labels, affine).backward()                    # affine: Affine.draw, noise: Noise.draw
"""
import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vit import ViT, build_vit


# ---------------------------------------------------------------- stage 1: the selector
class Noise(NamedTuple):
    """The randomness of one training step, drawn outside so that a step is a function of its inputs.

    Gumbel samples are -log(e), e ~ Exponential(1); part masks are 1 = this part survives its dropout.
    """
    maps: torch.Tensor | None = None      # (B, K+1, N) Gumbel sample of the part maps
    keep: torch.Tensor | None = None      # (B, K+1, N) another one, of the discretizer
    parts1: torch.Tensor | None = None    # (B, K) parts that survive before the stage-1 classifier
    parts2: torch.Tensor | None = None    # (B, K) parts that survive in the discretizer
    dilate: torch.Tensor | None = None    # (B,)   1 = this mask is dilated, where that is random

    @staticmethod
    def draw(k, patches, dropout1=0.3, dropout2=0.3, generators=(None,), dilate=False):
        """One sample per generator (None: torch's global one): results do not depend on how a batch is split."""
        def sample(g):
            gumbel = -torch.empty(2, k + 1, patches).exponential_(generator=g).log()
            parts = torch.rand(2, k, generator=g) >= torch.tensor([[dropout1], [dropout2]])
            coin = (torch.rand((), generator=g).round(),) if dilate else ()
            return gumbel[0], gumbel[1], parts[0].float(), parts[1].float(), *coin
        return Noise(*map(torch.stack, zip(*map(sample, generators))))

    def to(self, device):
        return Noise(*(x if x is None else x.to(device) for x in self))

    def of(self, images):
        """The noise of some of the images, a slice."""
        return Noise(*(x if x is None else x[images] for x in self))


class Selection(NamedTuple):
    part_logits: torch.Tensor    # (B, K+1, N)      minus squared distance to the prototype of each; -inf: refused
    maps: torch.Tensor           # (B, K+1, h, w)   their softmax over parts, with Gumbel noise in training
    part_features: torch.Tensor  # (B, K+1, D)      modulated mean feature of each part
    logits: torch.Tensor         # (B, C)           average over foreground parts


class Selector(nn.Module):
    """Stage 1 (paper section 3.2): part discovery from class labels alone, as in PDiscoFormer (Aniraj et al., 2024).

    On its own this is the late, soft mask of the comparison: its features have seen the whole image. backgrounds M:
    the background is the union of the patches that are nearest to any of its M prototypes (see `as_one_background`).
    """

    def __init__(self, backbone, classes, k, tau=1.0, dropout=0.3, given=None, backgrounds=1):
        super().__init__()
        for count, what in ((k, "parts"), (backgrounds, "background prototypes")):
            if count < 1:
                raise ValueError(f"the number of {what} must be at least 1, not {count}")
        self.backbone, self.k, self.tau, self.dropout = backbone, k, tau, dropout
        self.given = given       # (height, width) of the images it is given, where it looks at smaller ones
        self.prototypes = nn.Parameter(torch.empty(k + backgrounds, backbone.width))   # of the background last
        self.modulation = nn.LayerNorm((k + 1, backbone.width), eps=1e-5)
        self.classifier = nn.Linear(backbone.width, classes, bias=False)
        nn.init.uniform_(self.prototypes, -(bound := backbone.width ** -0.5), bound)       # PDiscoFormer starts both so
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        # (K,) while an intervention is on (see `refuse`), which no checkpoint holds: it has a file of its own
        self.register_buffer("limits", None, persistent=False)
        self.score = "distance"  # how an intervention measures that a patch is unlike its part (see `unlikeness`)

    def forward(self, images, noise=Noise(), maps=None, seen=None):
        """images (B, 3, S, S) -> Selection. maps (B, K+1, h, w), if given, replace the discovered ones.

        seen (B, N) in {0, 1}: patches that are 0 there are hidden from this stage, and background.
        """
        return self.select(self.features(images, seen), noise, maps, seen)

    def shrink(self, images):
        """Images or masks (B, c, S, S) as large as the backbone sees them; usually as they are."""
        if self.given is None:
            return images
        if images.shape[2:] != self.given:
            raise ValueError("images are {}x{} pixels, the model was built for {}x{}".format(*images.shape[2:],
                                                                                             *self.given))
        size = tuple(n * self.backbone.patch for n in self.backbone.grid)
        return images if size == self.given else F.interpolate(images, size, mode="bilinear", antialias=True)

    def features(self, images, seen=None):
        """images (B, 3, S, S) -> patch features (B, N, D), N patches of the image that the backbone sees."""
        return self.backbone(self.shrink(images), seen)[:, self.backbone.prefix:]

    def select(self, features, noise=Noise(), maps=None, seen=None):
        """The head of stage 1 alone: patch features (B, N, D) -> Selection."""
        with torch.autocast(features.device.type, enabled=False):                # distances cancel: not in bf16
            features = features.to(self.prototypes.dtype)
            part_logits = 2 * self.prototypes @ features.mT - features.square().sum(-1)[:, None] \
                - self.prototypes.square().sum(-1)[:, None]
            part_logits = as_one_background(part_logits, self.k)
            if seen is not None:
                parts = part_logits[:, :-1].masked_fill(seen[:, None] == 0, -math.inf)
                part_logits = torch.cat([parts, part_logits[:, -1:]], 1)
            if self.limits is not None:
                part_logits = refuse(part_logits, self.limits,
                                     unlikeness(self.score, part_logits, features, self.prototypes))
            if maps is None:
                maps = assign(part_logits, noise.maps, self.tau).unflatten(2, self.backbone.grid)
            # as published: the mean runs over all N positions, it is not divided by the area of the map
            part_features = self.modulation(maps.flatten(2) @ features / features.shape[1])
            foreground = part_features[:, :-1]
            if noise.parts1 is not None:
                foreground = foreground * noise.parts1[..., None] / (1 - self.dropout)
            logits = self.classifier(foreground).mean(1)
        return Selection(part_logits, maps, part_features, logits)


def as_one_background(logits, k):
    """Logits of K parts and of M prototypes of the background (B, K+M, N) -> (B, K+1, N): its nearest one counts.

    So a patch is background exactly when one of the M is the nearest of all K+M, and equal ones count as one: the sum
    of their probabilities would grow with their number, and so would the background. M = 1 changes nothing.
    """
    return torch.cat([logits[:, :k], logits[:, k:].amax(1, keepdim=True)], 1)


def assign(part_logits, gumbel=None, tau=1.0):
    """Soft assignment of patches to parts: softmax over parts of (logits + Gumbel noise) / tau, all (B, K+1, N)."""
    return ((part_logits if gumbel is None else part_logits + gumbel) / tau).softmax(1)


SCORES = ("distance", "margin", "cosine")                # the paper's, and two others


def unlikeness(score, part_logits, features, prototypes):
    """How unlike its part each patch is: part logits (B, K+1, N), features (B, N, D), prototypes (K+M, D) -> (B, N).

    distance: squared distance to the prototype, 0 or more. margin: minus what the logit of the part is above that of
    the background, 0 or less. cosine: 1 - cosine with the prototype, 0 to 2. For features of one length and prototypes
    of one length, distance and cosine put patches in the same order. What patches of the background get, nobody reads.
    """
    nearest, part = part_logits.max(1)
    if score == "cosine":
        return 1 - F.cosine_similarity(features, prototypes[part], dim=2)
    return part_logits[:, -1] - nearest if score == "margin" else -nearest


def refuse(part_logits, limits, unlike=None):
    """Test-time intervention (paper section 3.4): patches too unlike the part they went to become background.

    part_logits (B, K+1, N); unlike (B, N): see `unlikeness`, by default the squared distance, as in the paper; limits
    (K,): how unlike a patch of a part may be, inf for any, -inf for none: that part is removed. A patch's part is the
    arg-max, without noise. -> part logits in which a refused patch has -inf for every part, so that maps, masks and
    pictures all see it as background, and not as its second-best part. Everything else stays as it is.
    differs from published: theirs scores by dot product, swaps the logits while thresholds are on, and finds the
    patches of a removed part from the noisy maps.
    """
    nearest, part = part_logits.max(1)                                           # (B, N), (B, N)
    refused = (-nearest if unlike is None else unlike) > F.pad(limits, (0, 1), value=math.inf)[part]
    return torch.cat([part_logits[:, :-1].masked_fill(refused[:, None], -math.inf), part_logits[:, -1:]], 1)


def limits_of(k, drop=(), thresholds=None):
    """What Selector.limits wants, from thresholds on the unlikeness (K,): inf without one, -inf for removed parts."""
    limits = torch.full((k,), math.inf) if thresholds is None else thresholds.clone()
    limits[list(drop)] = -math.inf
    return limits


def discretize(part_logits, gumbel=None, parts=None, tau=1.0, hard=True):
    """Part logits (B, K+1, N) -> keep (B, N): which patches stage 2 may see (paper section 3.3).

    A patch is kept when its best surviving foreground part beats the background. parts (B, K): 1 = survives the
    part dropout (None: all do); survivors are not rescaled, so that dropout hides parts and moves no boundary.
    Forward: that 0/1 mask. Backward: the gradient of the sum of surviving foreground probabilities.
    hard=False: the best surviving foreground probability itself, which is the published soft mask.
    differs from published: noise-free in evaluation (theirs draws a Gumbel sample, so masks change from run to run).
    """
    probabilities = assign(part_logits, gumbel, tau)
    foreground, background = probabilities[:, :-1], probabilities[:, -1]
    if parts is not None:
        foreground = foreground * parts[..., None]
    best = foreground.amax(1)
    if not hard:
        return best
    slope = foreground.sum(1)
    return (best > background).to(best.dtype) + (slope - slope.detach())                 # + 0: exact


@torch.no_grad()
def components(keep, grid):
    """Connected parts of masks: keep (B, N) in {0, 1}, grid (h, w) -> the number of each patch's part (B, N).

    Connected are patches that share a side. The number of a part is that of its first patch in reading order, N where
    nothing is kept. Every patch takes the least number among its neighbours until nothing changes: exact.
    """
    N = math.prod(grid)
    kept = keep.unflatten(1, grid) > 0
    number = torch.arange(N, device=keep.device).view(grid).where(kept, N)
    while True:
        p = F.pad(number, (1, 1, 1, 1), value=N)
        near = torch.stack([number, p[:, :-2, 1:-1], p[:, 2:, 1:-1], p[:, 1:-1, :-2], p[:, 1:-1, 2:]]).amin(0)
        near = near.where(kept, N)
        if torch.equal(near, number):
            return number.flatten(1)
        number = near


def largest_component(keep, grid):
    """The largest connected part of each mask: keep (B, N) in {0, 1}, grid (h, w) -> (B, N) in {0, 1}, without graph.

    Of several largest parts the one that comes first in reading order stays; an empty mask stays empty.
    """
    number = components(keep, grid)
    size = torch.zeros(len(keep), keep.shape[1] + 1, dtype=torch.long, device=keep.device)
    size = size.scatter_add(1, number, torch.ones_like(number))[:, :-1]          # the last are not kept
    return (number == size.argmax(1, keepdim=True)).to(keep.dtype)               # argmax: the first of equals


# ---------------------------------------------------------------- stage 2: the predictor
def masked_mean(patches, weight, over=None):
    """Mean of patches (B, N, D) under weights (B, N), 0 where all are 0 -> (B, D). over: what to divide by instead."""
    return (weight[:, None] @ patches)[:, 0] / (weight.sum(1, keepdim=True).clamp_min(1e-6) if over is None else over)


def paint(images, shown):
    """Images (B, 3, S, S) whose pixels that are not shown (B, 1, S, S) are 0, the mean colour; None: all are shown."""
    return images if shown is None else torch.where(shown > 0, images, 0.)


def regrid(values, grid, other):
    """Values of patches (B, c, N) of one grid -> of another (B, c, N'): each takes the value where its centre lies."""
    return F.interpolate(values.unflatten(2, grid), other, mode="nearest-exact").flatten(2)


def pixels(keep, grid, patch):
    """keep (B, N) -> (B, 1, h*patch, w*patch), each patch filled with its value."""
    return keep.unflatten(1, grid)[:, None].repeat_interleave(patch, 2).repeat_interleave(patch, 3)


class Predictor(nn.Module):
    """Stage 2: a ViT classifier under a mask. Each choice below varies alone; the defaults are the paper's.

    masking   "early": dropped patches are never attended to. "late": they are, and only the pooling skips them.
    hardness  "hard": the mask is 0 or 1. "soft": any weight in [0, 1].
    pooling   "cls": the class token. "mean": mean of the patches weighted by the mask; zero where nothing is kept.
              "mean-all": the same sum over the number of all patches, kept or not, as late masks were published
              (Aniraj et al., ICCV workshops 2023): its length tells how large the mask is. Only without norm does the
              head see it, as theirs does.
    norm      a LayerNorm of its own before the head, which iFAM's stage 2 has and its baselines have not.
    bias      does the head have one? Published for classifiers without a mask and under a late one.
    mask_with "patches": an early mask takes tokens away. "pixels": they stay, and the pixels of dropped patches are 0,
              the mean colour.
    """

    def __init__(self, backbone, classes, masking="early", hardness="hard", pooling="cls", norm=True, bias=False,
                 mask_with="patches"):
        super().__init__()
        for value, known in ((masking, ("early", "late")), (hardness, ("hard", "soft")),
                             (pooling, ("cls", "mean", "mean-all")), (mask_with, ("patches", "pixels"))):
            if value not in known:
                raise ValueError(f"{value!r} is not one of {known}")
        if mask_with == "pixels" and (masking, hardness) != ("early", "hard"):
            raise ValueError(f"only an early, hard mask can be laid on pixels, and this one is {masking}, {hardness}")
        if masking == "late" and pooling == "cls":
            raise ValueError('a late mask acts on the pooling of patches: masking="late" needs pooling="mean" or '
                             '"mean-all"')
        self.backbone, self.masking, self.hardness, self.pooling = backbone, masking, hardness, pooling
        self.mask_with = mask_with
        self.fc_norm = nn.LayerNorm(backbone.width, eps=1e-5) if norm else nn.Identity()
        self.head = nn.Linear(backbone.width, classes, bias=bias)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        if bias:
            nn.init.zeros_(self.head.bias)

    def features(self, images, keep=None):
        """What the head reads: images (B, 3, S, S), keep (B, N) or None for everything -> (B, D)."""
        on_pixels = self.mask_with == "pixels" and keep is not None
        if on_pixels:
            images = paint(images, pixels(keep, self.backbone.grid, self.backbone.patch))
        tokens = self.backbone(images, keep if self.masking == "early" and not on_pixels else None,
                               self.hardness == "hard", class_only=self.pooling == "cls")
        if self.pooling == "cls":
            return self.fc_norm(tokens[:, 0])
        patches = tokens[:, self.backbone.prefix:]
        weight = torch.ones_like(patches[..., 0]) if keep is None else keep.to(patches.dtype)
        return self.fc_norm(masked_mean(patches, weight, None if self.pooling == "mean" else weight.shape[1]))

    def forward(self, images, keep=None):
        """-> logits (B, C)."""
        return self.head(self.features(images, keep))


# ---------------------------------------------------------------- both
class Output(NamedTuple):
    """What every model of the project returns; a model without parts or a mask leaves those fields None."""
    logits: torch.Tensor                         # (B, C)          the prediction: stage 2
    logits_stage1: torch.Tensor | None = None    # (B, C)          stage 1, a late-masked classifier
    maps: torch.Tensor | None = None             # (B, K+1, h, w)  part maps, background last
    keep: torch.Tensor | None = None             # (B, N)          1 = stage 2 saw this patch
    part_logits: torch.Tensor | None = None      # (B, K+1, N)     minus squared distance to the prototype of each
    part_features: torch.Tensor | None = None    # (B, K+1, D)     modulated part features
    shown: torch.Tensor | None = None            # (B, 1, S, S)    1 = stage 2 may see this pixel; None: any
    keep_parts: torch.Tensor | None = None       # (B, K, N)       keep, by part; None unless asked for, as the next one
    logits_parts: torch.Tensor | None = None     # (B, K, C)       stage 2 on one part alone; NaN where it has no patch
    objects: torch.Tensor | None = None          # (B, N of stage 1)  told in training: how much of a patch is object
    contrast: torch.Tensor | None = None         # (B, 2, C)       what `complement` says of kept and of other patches
    patch_logits: torch.Tensor | None = None     # (B, N, C+1)     of a model whose patches answer, in training
    targets: torch.Tensor | None = None          # (B, N, C+1)     what they are to answer: sums to 1 for each patch


class IFAM(nn.Module):
    """Inherently faithful attention maps: selector, discretizer, masked predictor (paper section 3).

    classes C, k parts, arch as build_vit has it, size in pixels. joint=False cuts the gradient of the stage-2 loss at
    the mask, which is what the published code does. selector_arch, selector_size: a smaller stage 1, which looks at the
    image at a smaller size; its part maps have its own grid, the mask has that of stage 2. trim, largest, dilate: what
    is done against what a mask tells (see `shown_pixels` and `less_telling`). backgrounds: how many prototypes the
    background has (see Selector). All of these go past the paper. ValueError for settings that do not fit.
    """

    largest, dilate, trim = False, "none", "none"
    prior = None        # (C,): how frequent the classes are in training, which training knows (see `complement`)
    needs_truth = property(lambda self: self.trim == "truth")        # is the model told where the object is?

    def __init__(self, classes, k=8, arch="b", size=518, registers=4, masking="early", hardness="hard", pooling="cls",
                 joint=True, tau=1.0, dropout1=0.3, dropout2=0.3, selector_arch=None, selector_size=None,
                 largest=False, dilate="none", trim="none", backgrounds=1):
        super().__init__()
        if (largest or dilate != "none") and hardness != "hard":
            raise ValueError("a soft mask has no components and no border: --mask-largest and --mask-dilate are for "
                             "hardness hard")
        if trim != "none" and (masking, hardness) != ("early", "hard"):
            raise ValueError(f"--trim paints what a hard, early mask would show, and this mask is {masking}, "
                             f"{hardness}")
        small = build_vit(selector_arch or arch, selector_size or size, registers)
        given = ((size, size) if isinstance(size, int) else tuple(size)) if selector_size or selector_arch else None
        self.selector = Selector(small, classes, k, tau, dropout1, given, backgrounds)
        self.predictor = Predictor(build_vit(arch, size, registers), classes, masking, hardness, pooling)
        self.joint, self.dropout2 = joint, dropout2
        self.largest, self.dilate, self.trim = largest, dilate, trim

    def forward(self, images, keep=None, noise=None, shown=None, per_part=False):
        """images (B, 3, S, S), normalised -> Output.

        keep (B, N): use this mask instead of the discovered one; 0/1 unless hardness is "soft".
        noise: the randomness of this call; None draws it in training and means no randomness in evaluation.
        shown (B, 1, S, S): pixels that stage 2 may see, where trim is "truth" the true object; 0/1.
        per_part: also a pass of stage 2 for each part, which sees the kept patches of that part and nothing else.
        """
        noise = noise or self.draw_noise(len(images))
        out = self.second_stage(images, self.selector(images, noise), noise, keep, shown)
        return self.each_part(images, out, noise) if per_part else out

    def forward_pair(self, images, warped, noise, keep=None, shown=None, objects=None, seen=None):
        """Training: (Output of images, part maps of the warped images), stage 1 on both in one doubled batch.

        noise holds 2B samples. objects (B, N of stage 1): how much of each patch is object, for the loss term "mask".
        seen (B, N): 0 where a patch is hidden from both stages; warped images are to hide it in their pixels.
        Stage 2 never runs on warped images (the published code runs it there and throws the result away).
        """
        B, there = len(images), None
        if seen is not None:
            own = regrid(seen[:, None], self.grid, self.selector.backbone.grid)[:, 0]
            there = torch.cat([own, torch.ones_like(own)])
        both = self.selector(torch.cat([images, warped]), noise, seen=there)
        first, noise = Selection(*(x[:B] for x in both)), noise.of(slice(B))
        if seen is not None and keep is None:
            keep = seen * self.mask(first, noise, self.predictor.hardness == "hard")
        return self.second_stage(images, first, noise, keep, shown)._replace(objects=objects), both.maps[B:]

    def second_stage(self, images, first, noise=Noise(), keep=None, shown=None):
        """Mask (discovered from the stage-1 Selection, or given) and prediction -> Output."""
        if keep is None:
            keep = self.mask(first, noise, self.predictor.hardness == "hard")
        elif keep.shape != (len(images), math.prod(self.grid)):
            raise ValueError(f"keep is {tuple(keep.shape)}, not {(len(images), math.prod(self.grid))}")
        elif self.predictor.hardness == "hard" and not ((keep == 0) | (keep == 1)).all():
            raise ValueError('keep has values other than 0 and 1; a soft mask needs hardness="soft"')
        if shown is None:
            shown = self.shown_pixels(first, images.shape[2:], noise)
        logits = self.predictor(paint(images, shown), keep if self.joint else keep.detach())
        return Output(logits, first.logits, first.maps, keep, first.part_logits, first.part_features, shown)

    def each_part(self, images, out, noise=Noise()):
        """An Output with keep_parts and logits_parts: what stage 2 says of each part alone. ValueError without one.

        Passes are packed into one call; a part without patches in an image gets none, and NaN instead of logits.
        """
        if self.predictor is None:
            raise ValueError("this model has no second stage, which could see one part alone")
        parts = self.split(out, out.keep, noise)
        there = parts.any(2)                                                     # (B, K)
        keep = parts[there] if self.joint else parts[there].detach()
        alone = self.predictor(paint(images, out.shown)[there.nonzero()[:, 0]], keep)
        logits = alone.new_full((*there.shape, alone.shape[1]), math.nan)
        return out._replace(keep_parts=parts, logits_parts=logits.index_put((there,), alone))

    def complement(self, images, out, prior=None):
        """An Output with contrast: what stage 2 says under its mask, and what it says of all that the mask hides.

        Its weights count as constants here, so that a loss of the two moves the mask alone. Where nothing is hidden,
        the rest answers with prior (C,), how frequent the classes are; None: all alike. For the loss term "complement".
        """
        keep = torch.cat([out.keep, 1 - out.keep])
        both = constant(self.predictor)(torch.cat([paint(images, out.shown), images]), keep)
        kept, rest = both.to(torch.promote_types(both.dtype, torch.float32)).chunk(2)
        prior = torch.ones_like(rest[0]) if prior is None else prior.to(rest)
        rest = torch.where((out.keep.detach() < 1).any(1, keepdim=True), rest, prior.log())
        return out._replace(contrast=torch.stack([kept, rest], 1))

    def split(self, first, keep, noise=Noise()):
        """keep (B, N) by part -> (B, K, N): parts are disjoint and their sum is keep. first: all that has part_logits.

        A kept patch belongs to its best foreground part (in training to the best that survives), on the grid of stage
        2, as in `mask`.
        """
        best = first.part_logits[:, :-1] if noise.keep is None else (first.part_logits + noise.keep)[:, :-1]
        if noise.parts2 is not None:
            best = best.masked_fill(noise.parts2[..., None] == 0, -math.inf)
        own = F.one_hot(best.argmax(1), best.shape[1]).mT.to(keep.dtype)                         # (B, K, N of stage 1)
        return self.on_own_grid(own) * keep[:, None]

    @property
    def grid(self):
        """(h, w) of masks: the patches of stage 2, or of stage 1 where it is alone."""
        return (self.predictor or self.selector).backbone.grid

    def mask(self, first, noise=Noise(), hard=True):
        """The mask of a stage-1 Selection on the grid of stage 2: keep (B, N). first: all that has part_logits."""
        keep = discretize(first.part_logits, noise.keep, noise.parts2, self.selector.tau, hard)
        return self.less_telling(self.on_own_grid(keep[:, None])[:, 0], noise)

    def on_own_grid(self, values):
        """Values of the patches of stage 1 (B, c, N1) -> of those of stage 2 (B, c, N).

        A hard mask stays hard (see `regrid`).
        """
        if self.selector.given is None:
            return values
        return regrid(values, self.selector.backbone.grid, self.grid)

    def less_telling(self, keep, noise=Noise()):
        """What is done to the shape of a hard mask, so that it tells less: keep (B, N) -> (B, N).

        largest: only the largest component stays. dilate: the eight neighbours of a kept patch are kept too, "always",
        or "random", for half of the images in training. The gradient stays that of the mask as it was found. A mask is
        hard before and after, so whatever it hides stays hidden.
        """
        new = keep.detach()
        if self.largest:
            new = largest_component(new, self.grid)
        if self.dilate == "always" or noise.dilate is not None:
            wider = F.max_pool2d(new.unflatten(1, self.grid)[:, None], 3, 1, 1).flatten(1)
            new = wider if noise.dilate is None else torch.where(noise.dilate[:, None] > 0, wider, new)
        return keep + (new - keep.detach()) if new is not keep else keep

    def shown_pixels(self, first, size, noise=Noise()):
        """Pixels that stage 2 may see inside kept patches, as trim has it -> (B, 1, *size) in {0, 1}, or None for all.

        "found": those where a surviving part beats the background once the part maps, without Gumbel noise, are
        enlarged to pixels (bilinear). "truth" raises ValueError, for then they must be given.
        """
        if self.trim == "truth":
            raise ValueError("this model is told where the object is: pass shown")
        if self.trim == "none":
            return None
        maps = assign(first.part_logits.detach(), None, self.selector.tau).unflatten(2, self.selector.backbone.grid)
        maps = F.interpolate(maps, size, mode="bilinear")
        parts = maps[:, :-1] if noise.parts2 is None else maps[:, :-1] * noise.parts2[..., None, None]
        return (parts.amax(1, keepdim=True) > maps[:, -1:]).to(maps.dtype)

    def draw_noise(self, count):
        """Noise of `count` images in training (from torch's global generator), none in evaluation."""
        if not self.training:
            return Noise()
        patches = math.prod(self.selector.backbone.grid)
        noise = Noise.draw(self.selector.k, patches, self.selector.dropout, self.dropout2, [None] * count,
                           self.dilate == "random")
        return noise.to(self.selector.prototypes.device)


def constant(module):
    """A copy of a module with the same tensors, none of which takes a gradient."""
    tensors = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, tensors | {id(b): b for b in module.buffers()})     # modules are copied, no tensor


# ---------------------------------------------------------------- for export
class Static(nn.Module):
    """A trained model of the project with fixed shapes, for torch.export, torch.compile(fullgraph=True) and ONNX.

        program = torch.export.export(Static(model), (images,))

    forward(images, keep=None) -> (logits, maps, keep), as Output has them, None where the method has no such thing.
    Masked attention runs over all tokens instead of packing the kept ones: equal to rounding, slower where few are
    kept. keep (B, N) must be given to a model that is told the true mask. Evaluation only: no noise, no gradients. It
    shares its weights with `model`, and has the intervention that is on now. ValueError for a model whose grid is not
    known before its first images.
    """

    def __init__(self, model):
        super().__init__()
        if not all(vit.grid_is_known for vit in model.modules() if isinstance(vit, ViT)):
            raise ValueError("the shape of the patch grid is not known yet: run the model on images first")
        self.model = constant(model).eval()
        for module in self.modules():
            if isinstance(module, ViT):
                module.packed = False

    def forward(self, images, keep=None):
        out = self.model(images, keep)
        return out.logits, out.maps, out.keep


# ---------------------------------------------------------------- the loss of a step
# Terms and their weights in the paper (appendix A.1). class1 and class2 are the cross entropies of the two stages. The
# last two are not of the paper: mask is of a model that is told true masks in training, complement is COMET's.
WEIGHTS = {"class1": 1.0, "class2": 1.0, "presence": 1.0, "background": 2.0, "orthogonality": 1.0, "equivariance": 1.0,
           "variation": 1.0, "entropy": 1.0, "concentration": 0.0, "mask": 1.0, "complement": 0.0}


def loss(out, warped_maps, labels, affine, weights=WEIGHTS, gather=None, terms=None, window=3, each=None):
    """The training loss of a step, a scalar: the weighted sum of the terms that the model has.

    out, warped_maps: what forward_pair returns, of any model of the project; labels (B,) class numbers; affine: the
    Affine that warped the images. The last two of a model without parts are read by nobody and may be None.
    weights: {term: weight}, with names of WEIGHTS; a term that is not in it, or has weight 0, is not computed.
    gather, window: as in `presence`. terms: a dict that gets each computed term by name, unweighted and with its graph.
    each (B,): how much each image counts in the class losses; None: all alike.
    A model without stage 1 (out.maps is None) has class2 alone; one without stage 2 (out.logits is its
    out.logits_stage1) has all but class2. mask needs out.objects, complement out.contrast. ValueError for an unknown
    name, if no term is left, and if equivariance is weighted without warped_maps and affine.
    """
    if unknown := weights.keys() - WEIGHTS.keys():
        raise ValueError(f"no loss term is called {min(unknown)!r}: one of {', '.join(WEIGHTS)}")
    known = {}
    if out.logits is not out.logits_stage1:
        known["class2"] = lambda: class_loss(out.logits, labels, each) if out.patch_logits is None else mean_of(
            class_losses(out, labels), each)
    if out.maps is not None:
        if weights.get("equivariance") and (warped_maps is None or affine is None):
            raise ValueError("equivariance compares with warped images: pass warped_maps and affine, or give it "
                             "weight 0")
        known["class1"] = lambda: class_loss(out.logits_stage1, labels, each)
        known["presence"] = lambda: presence(out.maps, gather, window)
        known["background"] = lambda: background_presence(out.maps)
        known["orthogonality"] = lambda: orthogonality(out.part_features)
        known["equivariance"] = lambda: equivariance(out.maps, warped_maps, affine)
        known["variation"] = lambda: total_variation(out.maps)
        known["entropy"] = lambda: entropy(out.maps)
        known["concentration"] = lambda: concentration(out.maps)
    if out.objects is not None:
        known["mask"] = lambda: mask_loss(out.part_logits, out.objects)
    if out.contrast is not None:
        known["complement"] = lambda: complement_loss(out.contrast, labels)
    found = {name: term() for name, term in known.items() if weights.get(name)}
    if not found:
        raise ValueError(f"no term of this model has a weight: it has {', '.join(known)}")
    if terms is not None:
        terms.update(found)
    return sum(weights[name] * value for name, value in found.items())


def class_loss(logits, labels, each=None):
    """Mean cross-entropy of logits (B, C) for labels (B,); each (B,): what every image's is multiplied by before."""
    if each is None:
        return F.cross_entropy(logits.float(), labels)
    return mean_of(F.cross_entropy(logits.float(), labels, reduction="none"), each)


def mean_of(losses, each=None):
    """Mean of losses (B,), each (B,) times."""
    return losses.mean() if each is None else (each * losses).mean()


def class_losses(out, labels):
    """The class loss of each image, of the stage that answers -> (B,). out: an Output, labels (B,).

    Where patches answer it is the mean of their cross-entropies to out.targets.
    """
    if out.patch_logits is None:
        return F.cross_entropy(out.logits.float(), labels, reduction="none")
    return -(out.targets * out.patch_logits.float().log_softmax(2)).sum(2).mean(1)


def mask_loss(part_logits, objects):
    """Foreground is where the object is: mean cross-entropy of part logits (B, K+1, N), parts against background.

    objects (B, N): the share of each patch that is object, the target of the probability of all parts together. No
    Gumbel noise, temperature 1.
    """
    log_p = part_logits.float().log_softmax(1)
    return -(objects * log_p[:, :-1].logsumexp(1) + (1 - objects) * log_p[:, -1]).mean()


def complement_loss(contrast, labels, margin=2.0):
    """What is hidden must not suffice: mean over images of max(CE of kept - CE of hidden + margin, 0).

    contrast (B, 2, C): see IFAM.complement; labels (B,). COMET's term (ECCV 2024), and its margin; there its weight is
    4. The maximum is taken for each image, so that a batch may be split.
    """
    kept, rest = (F.cross_entropy(x.float(), labels, reduction="none") for x in contrast.unbind(1))
    return (kept - rest + margin).clamp_min(0).mean()


# ---------------------------------------------------------------- part losses
def presence(maps, gather=None, window=3):
    """Every foreground part appears somewhere in the batch: 1 - mean over parts of the largest average of its map.

    maps (B, K+1, h, w) -> scalar. Averages are over every window x window patches that lie inside the map; 0: the share
    of the sides that 3 is of the paper's 37 (see `scaled_window`). gather: peaks (K,) -> (K,), the largest over all
    processes, where a batch is spread over them; None where it is not.
    """
    sides = window or [*map(scaled_window, maps.shape[2:])]
    peaks = F.avg_pool2d(maps[:, :-1], sides, stride=1).amax((0, 2, 3))
    return 1 - (gather(peaks) if gather else peaks).mean()


def scaled_window(patches):
    """The window of `presence` on so many patches in a row: 3 of 37 as published, 1 of 12, 2 of 28."""
    return max(1, round(3 * patches / 37))


def background_presence(maps):
    """Every image has background, rather at its border: mean_b -log max of (3x3 average * border weight).

    The weight grows with the squared distance from the centre and is 1 in the corners. maps (B, K+1, h, w) -> scalar.
    Published as enforced_presence.
    """
    pooled = F.avg_pool2d(maps[:, -1:], 3, stride=1)[:, 0]                       # (B, h-2, w-2)
    rows, columns = (torch.linspace(-1, 1, n, device=maps.device, dtype=maps.dtype) for n in pooled.shape[1:])
    weight = (rows[:, None].square() + columns.square()) / 2
    return -(pooled * weight).amax((1, 2)).clamp_min(1e-10).log().mean()


def orthogonality(part_features):
    """The K+1 parts of an image differ: mean squared deviation of their cosines from the identity.

    part_features (B, K+1, D) -> scalar. PDiscoFormer's loss. differs from published iFAM, whose trainer transposes the
    features once more, by mistake, and decorrelates channels instead of parts.
    """
    unit = F.normalize(part_features, dim=2)
    return (unit @ unit.mT - torch.eye(unit.shape[1], device=unit.device, dtype=unit.dtype)).square().mean()


def total_variation(maps):
    """Neighbouring patches agree: absolute differences, summed over parts, per position.

    maps (B, K+1, h, w) -> scalar.
    """
    changes = maps.diff(dim=-1).abs().sum() + maps.diff(dim=-2).abs().sum()
    return changes * maps.shape[1] / maps.numel()


def entropy(maps):
    """Every patch is sure of its part: mean over positions of the entropy. maps (B, K+1, h, w) -> scalar."""
    p = maps / maps.sum(1, keepdim=True)                 # renormalised as published: it matters for the gradient
    return -(p * p.clamp_min(torch.finfo(p.dtype).eps).log()).sum(1).mean()


def concentration(maps):
    """A foreground part is compact: squared distance to its centroid, weighted by the map.

    maps (B, K+1, h, w) -> scalar. From PDiscoNet (van der Klis et al., 2023); weight 0 here. As published, rows are
    divided by w and columns by h.
    """
    maps = maps[:, :-1]
    h, w = maps.shape[2:]
    rows = torch.arange(h, device=maps.device, dtype=maps.dtype)[:, None]
    columns = torch.arange(w, device=maps.device, dtype=maps.dtype)
    area = maps.sum((2, 3), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)      # a part may be nowhere at all
    centre = lambda index: (maps * index).sum((2, 3), keepdim=True) / area
    spread = ((rows - centre(rows)) / w).square() + ((columns - centre(columns)) / h).square()
    return (spread * maps).mean()


def equivariance(maps, warped_maps, affine):
    """Parts move with the image: 1 - mean cosine of each part's map with the un-warped map of the warped image.

    maps, warped_maps (B, K+1, h, w); affine: the Affine that warped the images. As published, cells that the warp
    brought in from outside count as zeros, so a perfect model does not reach 0.
    """
    back = unwarp(warped_maps[:, :-1], affine)
    return 1 - F.cosine_similarity(maps[:, :-1].flatten(2), back.flatten(2), dim=2).mean()


class Affine(NamedTuple):
    """Rotation and scaling about the image centre, then translation. Positive angles turn clockwise on screen.

    Shifts are fractions of the width and height, so that one Affine serves images and the smaller maps.
    """
    angle: float = 0.0      # degrees
    right: float = 0.0
    down: float = 0.0
    scale: float = 1.0

    @staticmethod
    def draw(size, generator=None, degrees=90.0, shift=0.11, scale=(0.8, 1.4)):
        """The paper's warp of training images of `size` (height, width): uniform draws, shifts of whole pixels."""
        a, x, y, s = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        pixels = lambda u, side: round((2 * u - 1) * shift * side) / side
        factor = scale[0] + s * (scale[1] - scale[0])
        return Affine((2 * a - 1) * degrees, pixels(x, size[1]), pixels(y, size[0]), factor)


def warp(images, affine, mode="bilinear"):
    """Apply an Affine to images (B, c, height, width); zeros come in from outside."""
    height, width = images.shape[2:]
    angle = math.radians(affine.angle)
    cos, sin = math.cos(angle) / affine.scale, math.sin(angle) / affine.scale
    x, y = 2 * affine.right, 2 * affine.down             # grid_sample counts from -1 to 1
    # it asks where each output pixel comes from, which is the inverse map: p -> R(-angle) (p - t) / scale
    inverse = [[cos, sin * height / width, -cos * x - sin * y * height / width],
               [-sin * width / height, cos, sin * x * width / height - cos * y]]
    theta = torch.tensor(inverse, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, mode=mode, padding_mode="zeros", align_corners=False)


def unwarp(maps, affine):
    """Undo `warp` on maps (B, K, h, w): shift back, then turn and scale back, both nearest, as published."""
    maps = warp(maps, Affine(right=-affine.right, down=-affine.down), "nearest")
    return warp(maps, Affine(angle=-affine.angle, scale=1 / affine.scale), "nearest")
