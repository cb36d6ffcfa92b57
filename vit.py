"""vit.py: the vision transformer, and attention under a mask. The lesson starts here; ifam.py is its second half.

Floor: the lesson, its lower half; it needs torch alone. A hard mask hides patches from every block: `keep` enters
attention, dropped patches are read by nobody, and the gradient of the mask is exact (KeepGradient). Parameters are
named as in DINOv2's files. Where a patch lies is told by a learned embedding (DINOv2) or by a rotation of queries and
keys (DINOv3).

Letters: B images, N = h*w patches, R registers, T = 1+R+N tokens (class token, registers, patches), D width, H heads,
P side of a patch. keep (B, N): 1 = this patch may be read.

    vit = build_vit("b", 518)
    tokens = vit.eval()(images, keep)             # images (B, 3, 518, 518), normalised -> (B, T, D)
"""
import math
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.autograd.function import once_differentiable

MINI = dict(patch=8, width=128, depth=4, heads=4, layer_scale=1.0)
DINOV3 = dict(patch=16, positions="rotary", eps=1e-5)
ARCHS = {  # small ones for the miniatures, the DINOv2 sizes, those of DINOv3
    "mini": MINI,
    "mini-rotary": dict(MINI, positions="rotary"),
    "s": dict(width=384, depth=12, heads=6),
    "b": dict(width=768, depth=12, heads=12),
    "l": dict(width=1024, depth=24, heads=16),
    "g": dict(width=1536, depth=40, heads=24, ffn="swiglu"),
    "s16": dict(DINOV3, width=384, depth=12, heads=6),
    "s16plus": dict(DINOV3, width=384, depth=12, heads=6, ffn="swiglu", hidden=1536),
    "b16": dict(DINOV3, width=768, depth=12, heads=12),
    "l16": dict(DINOV3, width=1024, depth=24, heads=16),
}
REFUSED = {"7b16": "DINOv3's ViT-7B has 6.7 billion parameters, and training one stage of it needs over 100 GB; take "
                   "l16, the largest of its family here"}


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


# ---------------------------------------------------------------- rotary positions
def rotations(grid, prefix, channels, base=100.0, device=None):
    """The rotations that tell queries and keys where their patch lies: (1, T, 2, 1, channels), cosines and sines.

    grid: (h, w) patches; prefix: tokens before them, which are not turned; channels: of a head, a multiple of 4. Axial,
    as in DINOv3 (Simeoni et al., 2025): a patch's centre has coordinates in [-1, 1] on each axis of its image; the
    first quarter of the channels turns with the row, the next with the column, by 2 pi coordinate / period, with
    periods base^(4i / channels); the other half is their partners. DINOv3 is pretrained with coordinates rescaled at
    random in each step; here they never are, so that a patch is where it is in training too.
    """
    centres = [(torch.arange(n, device=device) + 0.5) / n * 2 - 1 for n in grid]
    where = torch.stack(torch.meshgrid(*centres, indexing="ij"), -1).view(-1, 2, 1)                  # (N, 2, 1)
    periods = base ** (torch.arange(channels // 4, device=device) * 4 / channels)
    angles = F.pad((2 * math.pi * where / periods).flatten(1).tile(2), (0, 0, prefix, 0))            # (T, channels)
    return torch.stack([angles.cos(), angles.sin()], 1)[None, :, :, None]


def rotate(x, turn):
    """Queries or keys x (..., T, H, D/H), turned by rows of `rotations`; None: as they are."""
    if turn is None:
        return x
    cos, sin = turn.unbind(-3)                                                   # (..., T, 1, D/H) each
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


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

    def project(self, x, turn=None):
        """-> queries, keys, values, each (..., H, D/H). turn: the rotations of x's tokens, if positions are rotary."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return rotate(q, turn), rotate(k, turn), v

    def forward(self, x, attend, rows=None, turn=None):
        """rows: a function that takes the rows that ask out of x; None: all do. turn: as in project."""
        if rows is None:
            return self.proj(attend(*self.project(x, turn)).flatten(-2))
        parts = [w.split(x.shape[-1]) for w in (self.qkv.weight, self.qkv.bias)]         # of queries, keys, values
        q, k, v = (F.linear(y, *part).unflatten(-1, (self.heads, -1)) for y, part in zip((rows(x), x, x), zip(*parts)))
        q = rotate(q, turn if turn is None else rows(turn))
        return self.proj(attend(q, rotate(k, turn), v).flatten(-2))


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
    def __init__(self, width, heads, hidden, ffn, layer_scale, eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = {"mlp": Mlp, "swiglu": SwiGLU}[ffn](width, hidden)
        self.ls2 = LayerScale(width, layer_scale)

    def forward(self, x, attend, rows=None, turn=None):
        """rows: a function that takes out of x the rows that anybody will read; only they are computed."""
        return self.add(x if rows is None else rows(x), self.attn(self.norm1(x), attend, rows, turn))

    def add(self, x, attended):
        """The residual stream x (B, T, D) after what attention found, and what the feed-forward layer makes of it."""
        x = x + self.ls1(attended)
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Vision transformer with registers (DINOv2; Darcet et al., ICLR 2024; DINOv3; Simeoni et al., 2025).

    size: image side, or (height, width), in pixels; a multiple of patch. grid: the (h, w) of its patches.
    hidden: width of the feed-forward layer, by default that of DINOv2 for the kind of ffn ("mlp" or "swiglu").
    positions: "learned", an embedding added to the first block's input, whose number of patches is part of the weights;
    or "rotary" (see rotations), which has no weights, so that they fit every size. eps: that of every LayerNorm.
    """

    def __init__(self, size=518, patch=14, width=768, depth=12, heads=12, registers=4, ffn="mlp", hidden=None,
                 layer_scale=1e-5, positions="learned", eps=1e-6):
        super().__init__()
        height, across = (size, size) if isinstance(size, int) else size
        if height % patch or across % patch or min(height, across) < patch:
            near = max(height, across) // patch * patch or patch
            raise ValueError(f"image size {height}x{across} is not a multiple of the patch size {patch}, as {near} is")
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of the number of heads {heads}")
        if positions not in ("learned", "rotary"):
            raise ValueError(f"positions are learned or rotary, not {positions!r}")
        if positions == "rotary" and width // heads % 4:
            raise ValueError(f"rotary positions need a multiple of 4 channels a head, not {width // heads}")
        self.patch, self.width, self.grid = patch, width, (height // patch, across // patch)
        self.grid_is_known = True                        # False: the number of positions is, their shape is not yet
        self.packed = True                               # False: shapes never depend on what a mask keeps (ifam.Static)
        self.checkpoint = False                          # True: blocks keep only their inputs for the way back
        hidden = hidden or {"mlp": 4 * width, "swiglu": (int(4 * width * 2 / 3) + 7) // 8 * 8}[ffn]
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.register_tokens = nn.Parameter(torch.randn(1, registers, width) * 0.02) if registers else None
        self.pos_embed = (nn.Parameter(torch.randn(1, 1 + self.grid[0] * self.grid[1], width) * 0.02)
                          if positions == "learned" else None)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, ffn, layer_scale, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)
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
        first = self.cls_token[0] if self.pos_embed is None else self.cls_token[0] + self.pos_embed[0, :1]
        return first if self.register_tokens is None else torch.cat([first, self.register_tokens[0]])

    def embed(self, images):
        """images (B, 3, h*patch, w*patch) -> tokens (B, T, D) before the first block."""
        self.fit(images)
        patches = self.patch_embed(images)
        if self.pos_embed is not None:
            patches = patches + self.pos_embed[:, 1:]
        return torch.cat([self.before_patches().expand(len(images), -1, -1), patches], dim=1)

    def turn(self):
        """The rotations of all T tokens (see rotations), or None if positions are learned. Read after fit."""
        if self.pos_embed is not None:
            return None
        channels, own = self.width // self.blocks[0].attn.heads, self.cls_token
        turn = rotations(self.grid, self.prefix, channels, device=own.device)
        return turn.to(torch.promote_types(own.dtype, torch.float32))

    def forward(self, images, keep=None, hard=True, class_only=False):
        """images (B, 3, S, S), keep (B, N) or None for all -> tokens (B, T, D) after the final norm.

        class_only: only the class token, (B, 1, D); then the last block computes nothing for the others but the keys
        and values that it reads. A hard mask that needs no gradient takes the packed path: only kept tokens are
        computed, and the rows of dropped patches are returned as zeros. What is kept equals the dense path to rounding;
        self.packed = False takes that one.
        """
        rows = (lambda x: x[:, :1]) if class_only else None
        if keep is None:
            return self._run(self.embed(images), attend_all, rows)
        mask = self.mask_of(keep)
        if not hard or not self.packed:
            return self._run(self.embed(images), lambda q, k, v: attend_masked(q, k, v, mask, hard), rows)
        if mask.requires_grad:
            return self._run_joint(self.embed(images), mask, class_only)
        return self._run_packed(images, keep.bool(), class_only)

    def mask_of(self, keep):
        """keep (B, N) -> (B, T): the class token and the registers may always be read."""
        return F.pad(keep.to(torch.promote_types(keep.dtype, torch.float16)), (self.prefix, 0), value=1.0)

    def _run(self, x, attend, rows=None, turn=None):
        """turn: the rotations of x's tokens, by default those of all T."""
        turn = self.turn() if turn is None else turn
        for block in self.blocks[:-1]:
            x = self._through(block, x, attend, turn=turn)
        return self.norm(self._through(self.blocks[-1], x, attend, rows, turn))

    def _through(self, block, *inputs, **more):
        """block(*inputs), or with self.checkpoint the same bits in less memory: it is computed anew on the way back.

        Only the inputs are kept until then (activation checkpointing; Chen et al., 2016). A block draws nothing.
        """
        if not self.checkpoint or not torch.is_grad_enabled():
            return block(*inputs, **more)
        return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **more)

    def _run_joint(self, x, mask, class_only):
        """forward() with the gradient of the mask, but gradients of tokens only where there are any.

        Nobody reads a dropped token, so nothing flows back into one; the gradient of the mask needs its keys and
        values, but not theirs. Tokens that every image drops therefore run without autograd: backward costs what is
        kept. The others, of which an image may drop some, take masked attention.
        """
        order, count = self._kept_first(mask.detach())                           # the class token stays the first
        mask, tokens = mask.gather(1, order), x.take_along_dim(order[..., None], 1)
        head, tail = tokens[:, :count], tokens[:, count:].detach()
        turn = self.turn()
        own, others = (None, None) if turn is None else turn[0][order].split([count, x.shape[1] - count], 1)
        for block in self.blocks:
            one = class_only and block is self.blocks[-1]
            head, tail = self._through(partial(self._joint_block, block), head, tail, mask, own, others, one)
        if class_only:
            return self.norm(head)
        return self.norm(torch.cat([head, tail], 1)).take_along_dim(order.argsort(dim=1)[..., None], 1)

    def _joint_block(self, block, head, tail, mask, own, others, one):
        """A block of _run_joint: head and tail (B, ., D), with autograd and without. one: only the class token asks."""
        q, k, v = block.attn.project(block.norm1(head), own)
        with torch.no_grad():
            asked, *hidden = block.attn.project(block.norm1(tail), others)
        if one:
            q, head = q[:, :1], head[:, :1]
        head = block.add(head, block.attn.proj(attend_masked(q, k, v, mask, hidden=hidden).flatten(-2)))
        if not one:                                      # last: a checkpoint stops before what no gradient needs
            with torch.no_grad():
                found = attend_masked(asked, k, v, mask[:, :k.shape[1]].detach())
                tail = block.add(tail, block.attn.proj(found.flatten(-2)))
        return head, tail

    def _kept_first(self, mask):
        """mask (B, T) in {0, 1} -> order (B, T) of its tokens, kept ones first, and the most that an image keeps."""
        return mask.argsort(dim=1, descending=True, stable=True), int((mask > 0).sum(1).max())

    def layers(self, images, keep=None):
        """The tokens before the first block and after each, one (B, T, D) after the other. keep: a hard mask."""
        attend = attend_all if keep is None else partial(attend_masked, mask=self.mask_of(keep))
        x = self.embed(images)
        yield x
        turn = self.turn()
        for block in self.blocks:
            x = block(x, attend, turn=turn)
            yield x

    def last_attention(self, images, keep=None):
        """What the last block looks at: images (B, 3, S, S) -> attention (B, H, N), keys (B, H, N, D/H).

        attention is that of the class token to the patches; with the class token and the registers it sums to 1. keys
        are those before any rotation: what a patch looks like, and not where it lies. keep: as in layers.
        """
        last, x = self.blocks[-1], next(islice(self.layers(images, keep), len(self.blocks) - 1, None))
        q, k, _ = last.attn.project(last.norm1(x))
        q, k, turned = (y.transpose(1, 2) for y in (q, k, rotate(k, self.turn())))                   # (B, H, T, D/H)
        scores = q[:, :, :1] @ turned.mT * q.shape[-1] ** -0.5                   # the class token is not turned
        if keep is not None:
            scores = scores + self.mask_of(keep).log()[:, None, None]
        return scores.softmax(-1)[:, :, 0, self.prefix:], k[:, :, self.prefix:]

    def _run_packed(self, images, keep, class_only):
        """forward() for keep (B, N) of True and False: the tokens of all images one after the other, no padding."""
        self.fit(images)
        B, P, patch = len(images), self.prefix, keep.nonzero()[:, 1]
        own = self.patch_embed.some(images, keep)                                                # (kept, D)
        if self.pos_embed is not None:
            own = own + self.pos_embed[0, 1 + patch]
        tokens = torch.cat([self.before_patches().to(own.dtype).repeat(B, 1), own])
        where = torch.cat([torch.arange(B * P, device=keep.device).view(B, P),                   # (B, T), in `tokens`
                           B * P - 1 + keep.flatten().cumsum(0).view(keep.shape)], dim=1)
        readable = F.pad(keep, (P, 0), value=True)
        turn = self.turn()
        turn = turn if turn is None else turn[0][readable.nonzero()[:, 1]]                       # (sum of lengths, ...)
        lengths = readable.sum(1)
        first, lengths = lengths.cumsum(0) - lengths, lengths.tolist()
        asked, rows = ([1] * B, lambda x: x[first]) if class_only else (None, None)
        one = lambda q, k, v: attend_packed(q, k, v, lengths, asked if len(q) == B else None)
        packed = self._run(tokens[where[readable]], one, rows, turn)
        return packed[:, None] if class_only else packed.new_zeros(*where.shape, self.width).masked_scatter(
            readable[..., None], packed)


def build_vit(arch, size, registers=4):
    """A ViT: arch is a name in ARCHS, "b/6" for the first 6 blocks of one, or a dict of ViT's arguments."""
    if isinstance(arch, str):
        name, slash, blocks = arch.partition("/")
        if name in REFUSED:
            raise ValueError(f"{name} is refused: {REFUSED[name]}")
        if name not in ARCHS or slash and not blocks.isdecimal():
            raise ValueError(f"{arch!r} is no architecture: one of {', '.join(ARCHS)}, or b/6 for the first 6 blocks "
                             "of b")
        arch = {"depth": 12, **ARCHS[name]}
        if slash and not 1 <= int(blocks) <= arch["depth"]:
            raise ValueError(f"{name}/{blocks}: {name} has {arch['depth']} blocks")
        arch["depth"] = int(blocks or arch["depth"])
    return ViT(size=size, **{"registers": registers, **arch})
