"""ifam.py: the two-stage model, from pixels to logits, and the losses that shape its parts.

Stage 1, the selector, sees the whole image and gives each patch to one of K parts or to the background.
Stage 2, the predictor, classifies from the patches that stage 1 kept, and from nothing else: dropped patches
are masked out of every attention layer, so no pixel of theirs can reach a logit.

Letters: B images, N = h*w patches, R registers, T = 1+R+N tokens (class token, registers, patches), D width,
H heads, K parts (index K is the background), C classes. keep (B, N): 1 = stage 2 may see this patch.

    model = IFAM(classes=2, k=8, arch="b", size=518)
    out = model.eval()(images)                    # images (B, 3, 518, 518), normalised
    out.logits, out.maps, out.keep                # (B, C), (B, K+1, h, w), (B, N)
"""
import math
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

ARCHS = {  # the DINOv2 sizes, and a small one for the miniatures
    "mini": dict(patch=8, width=128, depth=4, heads=4, layer_scale=1.0),
    "s": dict(width=384, depth=12, heads=6),
    "b": dict(width=768, depth=12, heads=12),
    "l": dict(width=1024, depth=24, heads=16),
    "g": dict(width=1536, depth=40, heads=24, ffn="swiglu"),
}


# ---------------------------------------------------------------- attention under a mask
def attend_all(q, k, v):
    """Plain attention. q, k, v (B, T, H, D/H) -> (B, T, H, D/H)."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def attend_masked(q, k, v, mask, hard=True, hidden=()):
    """Attention in which key j weighs m_j: A_ij = m_j exp(s_ij) / sum_k m_k exp(s_ik).

    q, k, v (B, T, H, D/H); mask (B, T), 1 = may be read, 0 = nobody reads it (its own row stays finite), with some
    readable key in every row; in between only if hard is False. The gradient for the mask is exact (KeepGradient).
    hidden: keys and values of further tokens that no image reads, the last ones of mask: for its gradient alone.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                             # (B, H, T, D/H)
    weight = mask.detach()[:, None, None, :k.shape[2]]                           # (B, 1, 1, T), never T x T
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=weight.bool() if hard else weight.log().to(q.dtype))
    if mask.requires_grad:
        k, v = (torch.cat([x, *(y.transpose(1, 2) for y in more)], 2) for x, more in ((k, hidden[:1]), (v, hidden[1:])))
        # differs from the published code, which casts the mask to bool here and so cuts the gradient to stage 1
        out = KeepGradient.apply(out, q.detach(), k.detach(), v.detach(), mask)
    return out.transpose(1, 2)


def attend_packed(q, k, v, lengths, asked=None):
    """Attention within each image of a packed batch. k, v (sum of lengths, H, D/H); lengths: tokens per image.

    q (sum of asked, H, D/H); asked: queries per image, by default all tokens ask.
    """
    if len(set(lengths)) == 1 and len(set(asked or lengths)) == 1:               # as many in each image: one call
        return attend_all(*(x.unflatten(0, (len(lengths), -1)) for x in (q, k, v))).flatten(0, 1)
    split = ((q, asked or lengths), (k, lengths), (v, lengths))
    images = zip(*(x.transpose(0, 1)[None].split(parts, dim=2) for x, parts in split))   # each (1, H, t, D/H)
    return torch.cat([F.scaled_dot_product_attention(*image) for image in images], dim=2)[0].transpose(0, 1)


class KeepGradient(torch.autograd.Function):
    """Returns the attention output O unchanged; its backward adds the derivative of masked attention in the mask.

        dL/dm_j = sum over heads and queries i of  exp(s_ij - lse_i) <dL/dO_i, v_j - O_i>
        lse_i = log sum_k m_k exp(s_ik)

    which holds at m_j = 0 too: there it says what letting token j in would do (the straight-through
    gradient of the paper, section 3.3). Scores are recomputed for a few queries at a time: memory O(T), not O(T*T).
    """
    CHUNK = 1 << 22    # scores held at once, whatever B, H and T are

    @staticmethod
    def forward(ctx, out, q, k, v, mask):
        ctx.save_for_backward(out, q, k, v, mask)
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        out, q, k, v, mask = ctx.saved_tensors                                   # (B, H, T, D/H) x 4, (B, T)
        wide = torch.promote_types(q.dtype, torch.float32)                       # exp() of bf16 scores would be noise
        with torch.autocast(q.device.type, enabled=False):
            q, k, v, out, wide_grad = (x.to(wide) for x in (q, k, v, out, grad))
            q = q * q.shape[-1] ** -0.5
            log_mask = mask.to(wide).log()[:, None, None]
            along_out = (wide_grad * out).sum(-1, keepdim=True)                  # <dL/dO_i, O_i>, (B, H, T, 1)
            total = torch.zeros_like(mask, dtype=wide)
            rows = max(1, KeepGradient.CHUNK // (mask.numel() * q.shape[1]))
            for i in range(0, q.shape[2], rows):
                part = slice(i, i + rows)
                scores = q[:, :, part] @ k.mT                                    # (B, H, rows, T)
                lse = (scores + log_mask).logsumexp(-1, keepdim=True)
                gain = wide_grad[:, :, part] @ v.mT - along_out[:, :, part]      # <dL/dO_i, v_j - O_i>
                # a dropped key may outweigh all kept ones; beyond exp(60) its sum would overflow in float32
                total += ((scores - lse).clamp_max_(60).exp_() * gain).sum((1, 2))
        return grad, None, None, None, total.to(mask.dtype)


# ---------------------------------------------------------------- the vision transformer, named as in DINOv2's files
class PatchEmbed(nn.Module):
    def __init__(self, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images):
        return self.proj(images).flatten(2).mT                                   # (B, N, D), row by row

    def some(self, images, keep):
        """The rows of forward() where keep (B, N) is True -> (kept, D). No pixel of another patch is read."""
        P = self.proj.kernel_size[0]
        patches = images.unflatten(3, (-1, P)).unflatten(2, (-1, P)).permute(0, 2, 4, 1, 3, 5)   # (B, h, w, 3, P, P)
        return F.linear(patches[keep.view(patches.shape[:3])].flatten(1), self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def project(self, x):
        """-> queries, keys, values, each (..., H, D/H)."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)

    def forward(self, x, attend, rows=None):
        """rows: a function that takes the rows that ask out of x; None: all do."""
        if rows is None:
            return self.proj(attend(*self.project(x)).flatten(-2))
        parts = [w.split(x.shape[-1]) for w in (self.qkv.weight, self.qkv.bias)]         # of queries, keys, values
        q, k, v = (F.linear(y, *part).unflatten(-1, (self.heads, -1)) for y, part in zip((rows(x), x, x), zip(*parts)))
        return self.proj(attend(q, k, v).flatten(-2))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, width, value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width, heads, hidden, ffn, layer_scale):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = {"mlp": Mlp, "swiglu": SwiGLU}[ffn](width, hidden)
        self.ls2 = LayerScale(width, layer_scale)

    def forward(self, x, attend, rows=None):
        """rows: a function that takes out of x the rows that anybody will read; only they are computed."""
        return self.add(x if rows is None else rows(x), self.attn(self.norm1(x), attend, rows))

    def add(self, x, attended):
        """The residual stream x (B, T, D) after what attention found, and what the feed-forward layer makes of it."""
        x = x + self.ls1(attended)
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Vision transformer with registers (DINOv2; Darcet et al., ICLR 2024).

    size: image side, or (height, width), in pixels; a multiple of patch. grid: the (h, w) of the position embedding.
    hidden: width of the feed-forward layer, by default that of DINOv2 for the kind of ffn ("mlp" or "swiglu").
    """

    def __init__(self, size=518, patch=14, width=768, depth=12, heads=12, registers=4, ffn="mlp", hidden=None,
                 layer_scale=1e-5):
        super().__init__()
        height, across = (size, size) if isinstance(size, int) else size
        if height % patch or across % patch or min(height, across) < patch:
            raise ValueError(f"image size {height}x{across} is not a multiple of the patch size {patch}")
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of the number of heads {heads}")
        self.patch, self.width, self.grid = patch, width, (height // patch, across // patch)
        self.grid_is_known = True                        # False: the number of positions is, their shape is not yet
        hidden = hidden or {"mlp": 4 * width, "swiglu": (int(4 * width * 2 / 3) + 7) // 8 * 8}[ffn]
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.register_tokens = nn.Parameter(torch.randn(1, registers, width) * 0.02) if registers else None
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + self.grid[0] * self.grid[1], width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, ffn, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.prefix = 1 + registers                                              # tokens before the patches
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def tokens(self):
        """The parameters that stay trainable when the blocks are frozen (paper, appendix A.1)."""
        return [t for t in (self.cls_token, self.register_tokens, self.pos_embed) if t is not None]

    def fit(self, images):
        """ValueError for images of another size than the model's; the first ones settle a grid that is not known."""
        height, across = images.shape[2:]
        size = (self.grid[0] * self.patch, self.grid[1] * self.patch)
        if (height, across) != size:
            whole = height % self.patch == 0 and across % self.patch == 0
            if self.grid_is_known or not whole or height * across != size[0] * size[1]:
                raise ValueError(f"images are {height}x{across} pixels, the model was built for {size[0]}x{size[1]}")
            self.grid = (height // self.patch, across // self.patch)
        self.grid_is_known = True

    def before_patches(self):
        """Class token and registers before the first block (1+R, D); registers have no position."""
        first = self.cls_token[0] + self.pos_embed[0, :1]
        return first if self.register_tokens is None else torch.cat([first, self.register_tokens[0]])

    def embed(self, images):
        """images (B, 3, h*patch, w*patch) -> tokens (B, T, D) before the first block."""
        self.fit(images)
        patches = self.patch_embed(images) + self.pos_embed[:, 1:]
        return torch.cat([self.before_patches().expand(len(images), -1, -1), patches], dim=1)

    def forward(self, images, keep=None, hard=True, class_only=False):
        """images (B, 3, S, S), keep (B, N) or None for all -> tokens (B, T, D) after the final norm.

        class_only: only the class token, (B, 1, D); then the last block computes nothing for the others but the keys
        and values that it reads. A hard mask that needs no gradient takes the packed path: only kept tokens are
        computed, and the rows of dropped patches are returned as zeros. What is kept equals the dense path to rounding.
        """
        rows = (lambda x: x[:, :1]) if class_only else None
        if keep is None:
            return self._run(self.embed(images), attend_all, rows)
        mask = self.mask_of(keep)
        if not hard:
            return self._run(self.embed(images), lambda q, k, v: attend_masked(q, k, v, mask, hard=False), rows)
        if mask.requires_grad:
            return self._run_joint(self.embed(images), mask, class_only)
        return self._run_packed(images, keep.bool(), class_only)

    def mask_of(self, keep):
        """keep (B, N) -> (B, T): the class token and the registers may always be read."""
        return F.pad(keep.to(torch.promote_types(keep.dtype, torch.float16)), (self.prefix, 0), value=1.0)

    def _run(self, x, attend, rows=None):
        for block in self.blocks[:-1]:
            x = block(x, attend)
        return self.norm(self.blocks[-1](x, attend, rows))

    def _run_joint(self, x, mask, class_only):
        """forward() with the gradient of the mask, but gradients of tokens only where there are any.

        Nobody reads a dropped token, so nothing flows back into one; the gradient of the mask needs its keys and
        values, but not theirs. Tokens that every image drops therefore run without autograd: backward costs what is
        kept. The others, of which an image may drop some, take masked attention.
        """
        order, count = self._kept_first(mask.detach())                           # the class token stays the first
        mask, tokens = mask.gather(1, order), x.take_along_dim(order[..., None], 1)
        head, tail = tokens[:, :count], tokens[:, count:].detach()
        for block in self.blocks:
            one = class_only and block is self.blocks[-1]
            q, k, v = block.attn.project(block.norm1(head))
            with torch.no_grad():
                asked, *hidden = block.attn.project(block.norm1(tail))
                if not one:
                    found = attend_masked(asked, k, v, mask[:, :count].detach())
                    tail = block.add(tail, block.attn.proj(found.flatten(-2)))
            if one:
                q, head = q[:, :1], head[:, :1]
            head = block.add(head, block.attn.proj(attend_masked(q, k, v, mask, hidden=hidden).flatten(-2)))
        if class_only:
            return self.norm(head)
        return self.norm(torch.cat([head, tail], 1)).take_along_dim(order.argsort(dim=1)[..., None], 1)

    def _kept_first(self, mask):
        """mask (B, T) in {0, 1} -> order (B, T) of its tokens, kept ones first, and the most that an image keeps."""
        return mask.argsort(dim=1, descending=True, stable=True), int((mask > 0).sum(1).max())

    def layers(self, images, keep=None):
        """The tokens before the first block and after each, one (B, T, D) after the other. keep: a hard mask."""
        attend = attend_all if keep is None else partial(attend_masked, mask=self.mask_of(keep))
        x = self.embed(images)
        yield x
        for block in self.blocks:
            x = block(x, attend)
            yield x

    def last_attention(self, images, keep=None):
        """What the last block looks at: images (B, 3, S, S) -> attention (B, H, N), keys (B, H, N, D/H).

        attention is that of the class token to the patches; with the class token and the registers it sums to 1.
        keep: as in layers.
        """
        last, x = self.blocks[-1], next(islice(self.layers(images, keep), len(self.blocks) - 1, None))
        q, k, _ = (y.transpose(1, 2) for y in last.attn.project(last.norm1(x)))  # (B, H, T, D/H)
        scores = q[:, :, :1] @ k.mT * q.shape[-1] ** -0.5
        if keep is not None:
            scores = scores + self.mask_of(keep).log()[:, None, None]
        return scores.softmax(-1)[:, :, 0, self.prefix:], k[:, :, self.prefix:]

    def _run_packed(self, images, keep, class_only):
        """forward() for keep (B, N) of True and False: the tokens of all images one after the other, no padding."""
        self.fit(images)
        B, P, patch = len(images), self.prefix, keep.nonzero()[:, 1]
        own = self.patch_embed.some(images, keep) + self.pos_embed[0, 1 + patch]                 # (kept, D)
        tokens = torch.cat([self.before_patches().to(own.dtype).repeat(B, 1), own])
        where = torch.cat([torch.arange(B * P, device=keep.device).view(B, P),                   # (B, T), in `tokens`
                           B * P - 1 + keep.flatten().cumsum(0).view(keep.shape)], dim=1)
        readable = F.pad(keep, (P, 0), value=True)
        lengths = readable.sum(1)
        first, lengths = lengths.cumsum(0) - lengths, lengths.tolist()
        asked, rows = ([1] * B, lambda x: x[first]) if class_only else (None, None)
        one = lambda q, k, v: attend_packed(q, k, v, lengths, asked if len(q) == B else None)
        packed = self._run(tokens[where[readable]], one, rows)
        return packed[:, None] if class_only else packed.new_zeros(*where.shape, self.width).masked_scatter(
            readable[..., None], packed)


# ---------------------------------------------------------------- stage 1: the selector
class Noise(NamedTuple):
    """The randomness of one training step, drawn outside so that a step is a function of its inputs.

    Gumbel samples are -log(e), e ~ Exponential(1); part masks are 1 = this part survives its dropout.
    """
    maps: torch.Tensor | None = None      # (B, K+1, N) Gumbel sample of the part maps
    keep: torch.Tensor | None = None      # (B, K+1, N) another one, of the discretizer
    parts1: torch.Tensor | None = None    # (B, K) parts that survive before the stage-1 classifier
    parts2: torch.Tensor | None = None    # (B, K) parts that survive in the discretizer

    @staticmethod
    def draw(k, patches, dropout1=0.3, dropout2=0.3, generators=(None,)):
        """One sample per generator (None: torch's global one): results do not depend on how a batch is split."""
        def sample(g):
            gumbel = -torch.empty(2, k + 1, patches).exponential_(generator=g).log()
            parts = torch.rand(2, k, generator=g) >= torch.tensor([[dropout1], [dropout2]])
            return gumbel[0], gumbel[1], parts[0].float(), parts[1].float()
        return Noise(*map(torch.stack, zip(*map(sample, generators))))

    def to(self, device):
        return Noise(*(x if x is None else x.to(device) for x in self))


class Selection(NamedTuple):
    part_logits: torch.Tensor    # (B, K+1, N)      minus squared distance to each prototype; -inf: refused
    maps: torch.Tensor           # (B, K+1, h, w)   their softmax over parts, with Gumbel noise in training
    part_features: torch.Tensor  # (B, K+1, D)      modulated mean feature of each part
    logits: torch.Tensor         # (B, C)           average over foreground parts


class Selector(nn.Module):
    """Stage 1 (paper section 3.2): part discovery from class labels alone, as in PDiscoFormer (Aniraj et al., 2024).

    On its own this is the late, soft mask of the comparison: its features have seen the whole image.
    """

    def __init__(self, backbone, classes, k, tau=1.0, dropout=0.3, given=None):
        super().__init__()
        if k < 1:
            raise ValueError(f"the number of parts must be at least 1, not {k}")
        self.backbone, self.k, self.tau, self.dropout = backbone, k, tau, dropout
        self.given = given       # (height, width) of the images it is given, where it looks at smaller ones
        self.prototypes = nn.Parameter(torch.randn(k + 1, backbone.width) * 0.02)
        self.modulation = nn.LayerNorm((k + 1, backbone.width), eps=1e-5)
        self.classifier = nn.Linear(backbone.width, classes, bias=False)
        # (K,) while an intervention is on (see `refuse`), which no checkpoint holds: it has a file of its own
        self.register_buffer("limits", None, persistent=False)

    def forward(self, images, noise=Noise(), maps=None):
        """images (B, 3, S, S) -> Selection. maps (B, K+1, h, w), if given, replace the discovered ones."""
        return self.select(self.features(images), noise, maps)

    def shrink(self, images):
        """Images or masks (B, c, S, S) as large as the backbone sees them; usually as they are."""
        if self.given is None:
            return images
        if images.shape[2:] != self.given:
            raise ValueError("images are {}x{} pixels, the model was built for {}x{}".format(*images.shape[2:],
                                                                                             *self.given))
        size = tuple(n * self.backbone.patch for n in self.backbone.grid)
        return images if size == self.given else F.interpolate(images, size, mode="bilinear", antialias=True)

    def features(self, images):
        """images (B, 3, S, S) -> patch features (B, N, D), N patches of the image that the backbone sees."""
        return self.backbone(self.shrink(images))[:, self.backbone.prefix:]

    def select(self, features, noise=Noise(), maps=None):
        """The head of stage 1 alone: patch features (B, N, D) -> Selection."""
        with torch.autocast(features.device.type, enabled=False):                # distances cancel: not in bf16
            features = features.to(self.prototypes.dtype)
            part_logits = 2 * self.prototypes @ features.mT - features.square().sum(-1)[:, None] \
                - self.prototypes.square().sum(-1)[:, None]
            if self.limits is not None:
                part_logits = refuse(part_logits, self.limits)
            if maps is None:
                maps = assign(part_logits, noise.maps, self.tau).unflatten(2, self.backbone.grid)
            # as published: the mean runs over all N positions, it is not divided by the area of the map
            part_features = self.modulation(maps.flatten(2) @ features / features.shape[1])
            foreground = part_features[:, :-1]
            if noise.parts1 is not None:
                foreground = foreground * noise.parts1[..., None] / (1 - self.dropout)
            logits = self.classifier(foreground).mean(1)
        return Selection(part_logits, maps, part_features, logits)


def assign(part_logits, gumbel=None, tau=1.0):
    """Soft assignment of patches to parts: softmax over parts of (logits + Gumbel noise) / tau, all (B, K+1, N)."""
    return ((part_logits if gumbel is None else part_logits + gumbel) / tau).softmax(1)


def refuse(part_logits, limits):
    """Test-time intervention (paper section 3.4): patches too far from the prototype of their part become background.

    part_logits (B, K+1, N); limits (K,): the largest squared distance at which a patch still belongs to its part, inf
    for any, -inf for none: that part is removed. A patch's part is the arg-max, without noise. -> part logits in which
    a refused patch has -inf for every part, so that maps, masks and pictures all see it as background, and not as its
    second-best part. Everything else stays as it is.
    differs from published: theirs scores by dot product, swaps the logits while thresholds are on, and finds the
    patches of a removed part from the noisy maps.
    """
    nearest, part = part_logits.max(1)                                           # (B, N), (B, N)
    refused = -nearest > F.pad(limits, (0, 1), value=math.inf)[part]
    return torch.cat([part_logits[:, :-1].masked_fill(refused[:, None], -math.inf), part_logits[:, -1:]], 1)


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


# ---------------------------------------------------------------- stage 2: the predictor
def masked_mean(patches, weight, over=None):
    """Mean of patches (B, N, D) under weights (B, N), 0 where all are 0 -> (B, D). over: what to divide by instead."""
    return (weight[:, None] @ patches)[:, 0] / (weight.sum(1, keepdim=True).clamp_min(1e-6) if over is None else over)


class Predictor(nn.Module):
    """Stage 2: a ViT classifier under a mask. Each choice below varies alone; the defaults are the paper's.

    masking   "early": dropped patches are never attended to. "late": they are, and only the pooling skips them.
    hardness  "hard": the mask is 0 or 1. "soft": any weight in [0, 1].
    pooling   "cls": the class token. "mean": mean of the patches weighted by the mask; zero where nothing is kept.
              "mean-all": the same sum over the number of all patches, kept or not, as late masks were published
              (Aniraj et al., ICCV workshops 2023): its length tells how large the mask is, until fc_norm.
    """

    def __init__(self, backbone, classes, masking="early", hardness="hard", pooling="cls"):
        super().__init__()
        for value, known in ((masking, ("early", "late")), (hardness, ("hard", "soft")),
                             (pooling, ("cls", "mean", "mean-all"))):
            if value not in known:
                raise ValueError(f"{value!r} is not one of {known}")
        if masking == "late" and pooling == "cls":
            raise ValueError('a late mask acts on the pooling of patches: masking="late" needs pooling="mean" or '
                             '"mean-all"')
        self.backbone, self.masking, self.hardness, self.pooling = backbone, masking, hardness, pooling
        self.fc_norm = nn.LayerNorm(backbone.width, eps=1e-5)
        self.head = nn.Linear(backbone.width, classes, bias=False)
        nn.init.trunc_normal_(self.head.weight, std=0.02)

    def features(self, images, keep=None):
        """What the head reads: images (B, 3, S, S), keep (B, N) or None for everything -> (B, D)."""
        tokens = self.backbone(images, keep if self.masking == "early" else None, self.hardness == "hard",
                               class_only=self.pooling == "cls")
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
    part_logits: torch.Tensor | None = None      # (B, K+1, N)     minus squared distance to each prototype
    part_features: torch.Tensor | None = None    # (B, K+1, D)     modulated part features


class IFAM(nn.Module):
    """Inherently faithful attention maps: selector, discretizer, masked predictor (paper section 3).

    classes C, k parts, arch as build_vit has it, size in pixels. joint=False cuts the gradient of the stage-2 loss at
    the mask, which is what the published code does. selector_arch, selector_size: a smaller stage 1, which looks at the
    image at a smaller size; its part maps have its own grid, the mask has that of stage 2. Past the paper. ValueError
    for settings that do not fit.
    """

    needs_truth = False      # True for the baselines that are given the true mask

    def __init__(self, classes, k=8, arch="b", size=518, registers=4, masking="early", hardness="hard", pooling="cls",
                 joint=True, tau=1.0, dropout1=0.3, dropout2=0.3, selector_arch=None, selector_size=None):
        super().__init__()
        small = build_vit(selector_arch or arch, selector_size or size, registers)
        given = ((size, size) if isinstance(size, int) else tuple(size)) if selector_size or selector_arch else None
        self.selector = Selector(small, classes, k, tau, dropout1, given)
        self.predictor = Predictor(build_vit(arch, size, registers), classes, masking, hardness, pooling)
        self.joint, self.dropout2 = joint, dropout2

    def forward(self, images, keep=None, noise=None):
        """images (B, 3, S, S), normalised -> Output.

        keep (B, N): use this mask instead of the discovered one; 0/1 unless hardness is "soft".
        noise: the randomness of this call; None draws it in training and means no randomness in evaluation.
        """
        noise = noise or self.draw_noise(len(images))
        return self.second_stage(images, self.selector(images, noise), noise, keep)

    def forward_pair(self, images, warped, noise, keep=None):
        """Training: (Output of images, part maps of the warped images), stage 1 on both in one doubled batch.

        noise holds 2B samples. Stage 2 never runs on warped images (the published code runs it there and throws the
        result away).
        """
        B = len(images)
        both = self.selector(torch.cat([images, warped]), noise)
        first, noise = Selection(*(x[:B] for x in both)), Noise(*(x if x is None else x[:B] for x in noise))
        return self.second_stage(images, first, noise, keep), both.maps[B:]

    def second_stage(self, images, first, noise=Noise(), keep=None):
        """Mask (discovered from the stage-1 Selection, or given) and prediction -> Output."""
        if keep is None:
            keep = self.mask(first, noise, self.predictor.hardness == "hard")
        elif keep.shape != (len(images), math.prod(self.grid)):
            raise ValueError(f"keep is {tuple(keep.shape)}, not {(len(images), math.prod(self.grid))}")
        elif self.predictor.hardness == "hard" and not ((keep == 0) | (keep == 1)).all():
            raise ValueError('keep has values other than 0 and 1; a soft mask needs hardness="soft"')
        logits = self.predictor(images, keep if self.joint else keep.detach())
        return Output(logits, first.logits, first.maps, keep, first.part_logits, first.part_features)

    @property
    def grid(self):
        """(h, w) of masks: the patches of stage 2, or of stage 1 where it is alone."""
        return (self.predictor or self.selector).backbone.grid

    def mask(self, first, noise=Noise(), hard=True):
        """The mask of a stage-1 Selection on the grid of stage 2: keep (B, N). first: all that has part_logits.

        Each patch takes the value where its centre lies, so that a hard mask stays hard.
        """
        keep = discretize(first.part_logits, noise.keep, noise.parts2, self.selector.tau, hard)
        if self.selector.given is None:
            return keep
        own = keep.unflatten(1, self.selector.backbone.grid)[:, None]
        return F.interpolate(own, self.grid, mode="nearest-exact").flatten(1)

    def draw_noise(self, count):
        """Noise of `count` images in training (from torch's global generator), none in evaluation."""
        if not self.training:
            return Noise()
        patches = math.prod(self.selector.backbone.grid)
        noise = Noise.draw(self.selector.k, patches, self.selector.dropout, self.dropout2, [None] * count)
        return noise.to(self.selector.prototypes.device)


def build_vit(arch, size, registers=4):
    """A ViT: arch is a name in ARCHS, "b/6" for the first 6 blocks of one, or a dict of ViT's arguments."""
    if isinstance(arch, str):
        name, slash, blocks = arch.partition("/")
        if name not in ARCHS or slash and not blocks.isdecimal():
            raise ValueError(f"{arch!r} is no architecture: one of {', '.join(ARCHS)}, or b/6 for the first 6 blocks "
                             "of b")
        arch = {"depth": 12, **ARCHS[name]}
        if slash and not 1 <= int(blocks) <= arch["depth"]:
            raise ValueError(f"{name}/{blocks}: {name} has {arch['depth']} blocks")
        arch["depth"] = int(blocks or arch["depth"])
    return ViT(size=size, **{"registers": registers, **arch})


# ---------------------------------------------------------------- part losses
def presence(maps, gather=lambda peaks: peaks):
    """Every foreground part appears somewhere in the batch: 1 - mean over parts of the largest 3x3 average of its map.

    maps (B, K+1, h, w) -> scalar. gather: peaks (K,) -> (K,), where a batch is spread over processes.
    """
    return 1 - gather(F.avg_pool2d(maps[:, :-1], 3, stride=1).amax((0, 2, 3))).mean()


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

    part_features (B, K+1, D) -> scalar. differs from published: their trainer transposes the features by mistake and
    decorrelates channels instead of parts.
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
