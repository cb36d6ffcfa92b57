"""python -m miniature.pretrain: the small backbone of the miniatures, from unlabelled scenes: bags of visual words.

    OMP_NUM_THREADS=1 python -m miniature.pretrain   # 35 minutes on one core -> runs/pretrain/mini.pt and mini.json
    python -m miniature.pretrain --resume            # go on after a stop
    python -m miniature.pretrain --arch mini-rotary --out runs/pretrain-rotary     # its twin with rotary positions
    python -m miniature.pretrain --start miniature/mini.pt --weight-pairs 1 --weight-words 0.05 --weight-pasted 1 \
        --weight-ground 0.5 --weight-invariance 0 --lr 1e-3 --steps 5400 --out runs/pretrain-parts   # mini-parts.pt
    python -m miniature.pretrain --start miniature/mini.pt --subject chests ...                      # chest.pt: chest.json
    python -m miniature.pretrain --composites PATH   # learn from a folder that compose.py wrote, not from drawn scenes

Floor: commands, though it stays beside the weights that it makes. Read vit.py and scenes.py first. The scenes show one
creature of any kind among things of any kind, drawn independently. No class, no place and no part is used, and no mask
unless --weight-pasted, --weight-ground or --weight-pairs is given: these are supervision, which mini.pt did not have.

Words. A patch's texture is four numbers: how strong its grey levels vary at two fine scales, as the logarithm of a
mean and as the mean of a logarithm (high where texture is everywhere, low where it is a few edges). k-means of many
patches gives the words (as in MaskFeat, Wei et al. 2022, a target that needs no teacher). Task: from a view whose
colours are changed at random, tell every patch's own word and the bag of words around it (Gidaris et al., CVPR 2020);
and say the same of one scene point in two views that are turned, mirrored, scaled and shifted independently, which
leaves no use for position.

Pairs (--weight-pairs). Two scenes show the same creature in other colours, in another pose and elsewhere, as two
moments of a film would. A patch of it says where it lies in the other scene: of all patches there, the likely ones are
those at the same place of the creature. Neither colour nor ground is the same in both, but which part it is. It needs
the masks and where the creature lies in both. At the end origin and scale of the features are set, inside the last
LayerNorm.

Letters: B scenes (or pairs) a step, V side of a view, g = V / 8 patches a side, N = g*g, D width, W words, F = 4
texture numbers.
"""
import itertools
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from benchmarks import transforms
from benchmarks.files import read_image
from benchmarks.folder import load_folder
from benchmarks.samples import patch_keep
from measure.clusters import k_means
from measure.probes import linear_head
from miniature.scenes import BODY_PLAN, pretraining_pairs, pretraining_scenes
from miniature.siim import pretraining_chests
from runs import pick_device
from settings import UsageError, check_range, flag, opt, parse, progress, recorded, run_script, write_json, write_whole
from train import lr_at
from vit import attend_all, build_vit
from weights import load_strictly, read_file

MEAN, STD = (torch.tensor(x)[:, None, None] for x in transforms.IMAGENET)


@dataclass
class Config:
    scenes: int = opt(12000, "scenes to learn from, or half as many pairs", at_least=2, at_most=10 ** 5,
                      group="data and model")
    subject: str = opt("creatures", "what is drawn: creatures among things, or chests with and without pneumothorax "
                                    "and tube", choices=("creatures", "chests"))
    composites: str = opt("", "learn from the training pictures of this folder, which compose.py wrote, and measure on "
                              "its validation pictures")
    start: str = opt("", "start from these weights, such as miniature/mini.pt (default: at random)")
    steps: int = opt(4500, "training steps", at_least=1, at_most=10 ** 7, group="schedule")
    batch: int = opt(24, "scenes a step, two views of each", at_least=1, at_most=4096)
    view: int = opt(64, "side of a view in pixels, a multiple of 8", at_least=24, at_most=96, a_multiple_of=8)
    arch: str = opt("mini", "the backbone: its positions are learned, or rotary", choices=("mini", "mini-rotary"))
    words: int = opt(32, "visual words", at_least=1, at_most=4096)
    weight_words: float = opt(1.0, "loss weight: a patch tells its own word and the bag of words around it", at_least=0)
    weight_pasted: float = opt(0.0, "loss weight: a patch tells how much of it is object, by the true mask", at_least=0)
    weight_ground: float = opt(0.0, "loss weight: patches without object say the same, by the true mask", at_least=0)
    weight_pairs: float = opt(0.0, "loss weight: a patch of a creature says where it lies in another scene of the same "
                                   "creature, by masks and poses", at_least=0)
    coat: tuple[float, float] = opt((0.3, 0.8), "strength of the creatures' grain in pairs, from the least to the most")
    temperature: float = opt(0.1, "of the cosines of two patches, in pairs", above=0)
    colour: float = opt(1.0, "strength of the random changes of colours", at_least=0, at_most=1)
    weight_invariance: float = opt(0.6, "loss weight: one scene point says the same in two views", at_least=0)
    lr: float = opt(2e-3, "learning rate", at_least=0)
    weight_decay: float = opt(0.05, "of matrices", at_least=0)
    warmup: int = opt(40, "steps of linear warm-up before the cosine", at_least=0)
    spread: float = opt(0.4, "standard deviation of a feature channel after the final scaling", above=0)
    seed: int = opt(0, "decides scenes, initial weights, views and words", at_least=0, below=2 ** 63, group="run")
    every: int = opt(300, "steps between measures and saves", at_least=1)
    device: str = opt("auto", "auto, cpu, cuda or mps")
    out: str = opt("runs/pretrain", "folder of the run")
    resume: bool = opt(False, "go on from last.pt of this run")


# ---------------------------------------------------------------- views
def draw_view(B, view, near=None):
    """View -> scene, both in [-1, 1]: affine maps (B, 2, 3), centres (B, 2); near: rather around these centres."""
    half = (view / 96 * torch.empty(B).uniform_(-.3, .3).exp()).clamp(max=1)
    aim = torch.empty(B, 2).uniform_(-1, 1)
    centre = aim * (1 - half)[:, None] if near is None else near + .5 * aim
    centre = torch.minimum(torch.maximum(centre, (half - 1)[:, None]), (1 - half)[:, None])
    angle = torch.empty(B).uniform_(-math.pi, math.pi)
    mirror, over = (torch.randint(2, (B,)) * 2. - 1 for _ in range(2))
    c, s = half * angle.cos(), half * angle.sin()
    linear = torch.stack([torch.stack([c * mirror, -s * over], 1), torch.stack([s * mirror, c * over], 1)], 1)
    return torch.cat([linear, centre[..., None]], 2), centre


def look(scenes, affine, view):
    """scenes (B, 3, S, S) through views -> (B, 3, V, V)."""
    grid = F.affine_grid(affine, (len(scenes), 3, view, view), align_corners=False)
    return F.grid_sample(scenes, grid, padding_mode="reflection", align_corners=False)


def recolour(x, strength=1.0):
    """x (B, 3, V, V) in [0, 1] -> channels mixed, often permuted, or colour space turned; light changed; normalised.

    strength: the share of the change that is made; 0 normalises only.
    """
    B, before = len(x), x
    mix = torch.eye(3) + .2 * torch.randn(B, 3, 3)
    mix = mix / mix.sum(2, keepdim=True).clamp_min(.3)
    permuted = mix @ torch.eye(3)[torch.stack([torch.randperm(3) for _ in range(B)])]
    mix = torch.where((torch.rand(B) < .5)[:, None, None], permuted, mix)
    rotation = torch.linalg.qr(torch.randn(B, 3, 3))[0]
    turned = torch.einsum("bij,bjhw->bihw", rotation, x - x.mean((2, 3), keepdim=True))
    turned = turned + .5 + .15 * torch.randn(B, 3, 1, 1)
    x = torch.where((torch.rand(B) < .2)[:, None, None, None], turned, torch.einsum("bij,bjhw->bihw", mix, x))
    grey = x.mean((1, 2, 3), keepdim=True)
    x = (x - grey) * (.3 * torch.randn(B, 1, 1, 1)).exp().clamp(.4, 2) + grey + .12 * torch.randn(B, 1, 1, 1)
    x = x * (.15 * torch.randn(B, 3, 1, 1)).exp()
    x = x + .02 * torch.randn_like(x)
    x = x if strength == 1 else before + strength * (x - before)
    return (x.clamp(0, 1) - MEAN) / STD


def view_centres(g):
    """Centres of the patches of a view of g x g patches, (1, N, 2) in [-1, 1]: x, y."""
    line = (torch.arange(g) + .5) / g * 2 - 1
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(1, -1, 2)


def partners(a, b, g):
    """Patch centres of view a -> where they lie in view b (B, N, 2), and which lie inside (B, N)."""
    scene = view_centres(g) @ a[:, :, :2].mT + a[:, None, :, 2]
    there = (scene - b[:, None, :, 2]) @ torch.linalg.inv(b[:, :, :2]).mT
    return there, (there.abs() < 1 - .5 / g).all(-1)


# ---------------------------------------------------------------- words
def blur(x, sigma):
    """Gaussian blur of (B, c, V, V), borders reflected."""
    r = round(3 * sigma)
    kernel = torch.exp(-torch.arange(-r, r + 1.) ** 2 / (2 * sigma ** 2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.conv2d(F.pad(x, (r, r, r, r), mode="reflect"), kernel, groups=x.shape[1])
    return F.conv2d(x, kernel.mT, groups=x.shape[1])


def texture(x):
    """x (B, 3, V, V) in [0, 1] -> texture of its patches (B, N, F)."""
    grey = x.mean(1, keepdim=True)
    levels = [grey, blur(grey, .8), blur(grey, 1.6)]
    energy = torch.cat([(fine - coarse).square() for fine, coarse in zip(levels, levels[1:])], 1)
    log_of_mean = (blur(energy, 2) + 1e-4).log()
    mean_of_log = blur((blur(energy, .7) + 1e-4).log(), 2)
    return F.avg_pool2d(torch.cat([log_of_mean, mean_of_log], 1), 8).flatten(2).mT


class Words:
    """Visual words found in unlabelled views, and what a view says in them."""

    def __init__(self, scenes, cfg):
        batches = (draw_scenes(scenes, 2 * cfg.batch)[0] for _ in range(15))
        views = (look(some[:, :3], draw_view(len(some), cfg.view)[0], cfg.view) for some in batches)
        x = torch.cat([texture(some) for some in views]).flatten(0, 1)
        self.mean, self.scale = x.mean(0), x.std()
        x, draw = (x - self.mean) / self.scale, torch.Generator().manual_seed(cfg.seed)
        self.centres = k_means(x[torch.randperm(len(x), generator=draw)[:10000]], cfg.words, draw)
        share = torch.bincount(torch.cdist(x, self.centres).argmin(1), minlength=cfg.words) / len(x)
        weight = share.clamp_min(1e-3) ** -.3                    # rare words count a little more
        self.weight = weight / (weight * share).sum()

    def __call__(self, views):
        """-> each patch's own word, one-hot, and the bag of the 3x3 words around it, (B, N, W) both."""
        nearest = torch.cdist((texture(views) - self.mean) / self.scale, self.centres).argmin(-1)
        own = F.one_hot(nearest, len(self.centres)).float()
        g = math.isqrt(own.shape[1])
        around = F.avg_pool2d(own.mT.unflatten(2, (g, g)), 3, 1, 1, count_include_pad=False)
        return own, around.flatten(2).mT


# ---------------------------------------------------------------- the step
class Reader(nn.Module):
    """The ViT, and linear heads that read words, and what is object, from its patches. Only the ViT is kept."""

    def __init__(self, words, arch="mini", masks=False):
        super().__init__()
        self.vit = build_vit(arch, 96)
        self.own, self.bag = nn.Linear(self.vit.width, words), nn.Linear(self.vit.width, words)
        self.pasted = nn.Linear(self.vit.width, 1) if masks else None
        if self.vit.pos_embed is None:
            return
        frequency = 10000 ** (-torch.arange(self.vit.width // 4) / (self.vit.width // 4))
        rows, columns = torch.meshgrid(*(torch.arange(float(n)) for n in self.vit.grid), indexing="ij")
        waves = [f(x.reshape(-1, 1) * frequency) for x in (rows, columns) for f in (torch.sin, torch.cos)]
        self.vit.pos_embed.data = F.pad(.05 * torch.cat(waves, 1), (0, 0, 1, 0))[None]

    def patches(self, views):
        """views (B, 3, V, V), not larger than the ViT's images -> (B, N, D); each gets a random window of positions."""
        vit, (B, g) = self.vit, (len(views), views.shape[-1] // self.vit.patch)
        first = torch.randint(0, vit.grid[0] - g + 1, (B, 2))
        rows, columns = (first[:, i:i + 1] + torch.arange(g) for i in (0, 1))
        window = (rows[:, :, None] * vit.grid[1] + columns[:, None]).flatten(1).to(views.device)
        x, turn = vit.patch_embed(views), vit.turn()
        if turn is None:
            x = x + vit.pos_embed[0, 1:][window]
        else:
            turn = turn[0][F.pad(window + vit.prefix, (vit.prefix, 0))]          # those before: as token 0, not at all
        x = torch.cat([vit.before_patches().expand(B, -1, -1), x], 1)
        return vit._run(x, attend_all, turn=turn)[:, vit.prefix:]


def draw_scenes(scenes, count, frames=None):
    """A random batch of scenes (n, S, S, 4) uint8 -> (count, 4, S, S) in [0, 1], the mask last, and None.

    With frames (n, 2, 5), of pairs (n, 2, S, S, 4) -> all first scenes and then all second ones (2 count, 4, S, S), and
    their frames (2 count, 5).
    """
    chosen = torch.randint(len(scenes), (count,)).sort().values.numpy()
    if frames is None:
        return to_images(scenes[chosen]), None
    both = lambda x: np.concatenate([x[chosen, 0], x[chosen, 1]])
    return to_images(both(scenes)), torch.from_numpy(both(frames))


def on_creature(affine, frames, g):
    """Patch centres of views -> where they lie on the creature, in its local coordinates: (B, N, 2).

    affine (B, 2, 3): view -> scene in [-1, 1]; frames (B, 5): (x, y, scale, mirror, turn), see objects.Frame.place.
    """
    place = (view_centres(g) @ affine[:, :, :2].mT + affine[:, None, :, 2] + 1) / 2
    x, y = ((place - frames[:, None, :2]) / frames[:, None, 2:3]).unbind(-1)
    c, s, flip = frames[:, 4:].cos(), frames[:, 4:].sin(), 1 - 2 * frames[:, 3:4]
    return torch.stack([flip * (c * x + s * y), c * y - s * x], -1)


def pairs_loss(z, places, cover, temperature, reach=0.3):
    """Cross-entropy at telling where in the other scene of its pair a patch of the creature lies.

    z (2B, N, D), places (2B, N, 2) on the creature, cover (2B, N): the share of a patch that is creature. The target is
    a Gaussian of `reach` body units around the same place, over patches that show the creature; patches of mostly
    creature count, if the other view shows that place.
    """
    total = 0.0
    (za, zb), (ua, ub), (ca, cb) = (x.chunk(2) for x in (F.normalize(z, dim=-1), places, cover))
    for a, b, at, there, mine, others in ((za, zb, ua, ub, ca, cb), (zb, za, ub, ua, cb, ca)):
        near = (-torch.cdist(at, there).square() / (2 * reach ** 2)).exp() * (others > .3)[:, None]
        mass = near.sum(2)
        counts = (mine > .5) & (mass > .5)
        target = near / mass.clamp_min(1e-6)[..., None]
        each = -(target * (a @ b.mT / temperature).log_softmax(2)).sum(2)
        total = total + each[counts].sum() / counts.sum().clamp_min(1) / 2
    return total


def loss_terms(model, words, scenes, frames, cfg, step, device):
    """The terms of a step. scenes (B, 4, S, S): colours and mask; with frames, both scenes of B pairs (2B, 4, S, S).

    All random numbers are drawn on the CPU.
    """
    if frames is None:
        scenes = torch.cat([scenes, scenes])
        a, centre = draw_view(len(scenes) // 2, cfg.view)
        maps = torch.cat([a, draw_view(len(a), cfg.view, near=centre)[0]])
    else:
        maps, _ = draw_view(len(scenes), cfg.view, near=2 * frames[:, :2] - 1)
    clean = look(scenes, maps, cfg.view)
    clean, masks = clean[:, :3], clean[:, 3:]
    z, g = model.patches(recolour(clean, cfg.colour).to(device)), cfg.view // 8
    variance = (z - z.mean((0, 1))).square().mean()
    ramp, terms = min(1, step / 200), {}     # constant features agree best: first there must be something to agree on
    if cfg.weight_invariance:
        terms["invariance"] = cfg.weight_invariance * ramp * apart(z, *maps.chunk(2), g) / variance
    if cfg.weight_words:
        cross_entropy = lambda scores, target: -(target * scores.log_softmax(-1)).sum() / target.sum()
        own, bag = ((target * words.weight).to(device) for target in words(clean))
        terms["own"] = cfg.weight_words * cross_entropy(model.own(z), own)
        terms["bag"] = cfg.weight_words * cross_entropy(model.bag(z), bag)
    cover = F.avg_pool2d(masks, 8).flatten(1).to(device)
    if model.pasted:
        terms["pasted"] = cfg.weight_pasted * F.binary_cross_entropy_with_logits(model.pasted(z)[..., 0], cover)
        bare = z[cover < .05]
        terms["ground"] = cfg.weight_ground * ramp * (bare - bare.mean(0)).square().mean() / variance
    if frames is not None:
        places = on_creature(maps, frames, g).to(device)
        terms["pairs"] = cfg.weight_pairs * pairs_loss(z, places, cover, cfg.temperature)
    return terms


def apart(z, a, b, g):
    """Mean squared difference of what two views, affine maps a and b (B, 2, 3), say of the same scene points."""
    there, inside = (x.to(z.device) for x in partners(a, b, g))
    first, second = z.chunk(2)
    second = F.grid_sample(second.mT.unflatten(2, (g, g)), there[:, :, None], align_corners=False,
                           padding_mode="border")[..., 0].mT
    return (first - second)[inside].square().mean()


# ---------------------------------------------------------------- measures, with true masks
@torch.no_grad()
def features(vit, images):
    """Normalised images (n, 3, 96, 96) -> patch features (n, N, D) on the CPU."""
    device = vit.cls_token.device
    return torch.cat([vit(part.to(device))[:, vit.prefix:].cpu() for part in images.split(64)])


def position_share(x):
    """Share of the variance of patch features x (n, N, D) that the position of a patch explains."""
    return (x.mean(0).var(0).sum() / x.flatten(0, 1).var(0).sum()).item()


def iou(a, b):
    return (a & b).sum().item() / max(1, (a | b).sum().item())


def parts_of_patches(parts):
    """Part maps (n, S, S) -> what each patch of 8 x 8 shows (n, N), an index into BODY_PLAN; -1 where it is unclear.

    Background: less than a twentieth is creature. A part: at least a quarter is creature, and of it most is this part.
    """
    share = F.avg_pool2d(F.one_hot(parts.long(), len(BODY_PLAN)).float().permute(0, 3, 1, 2), 8).flatten(2)
    creature, best = 1 - share[:, 0], share[:, 1:].argmax(1) + 1
    return torch.where(creature < .05, 0, torch.where(creature >= .25, best, -1))


def recalls(fit, fit_names, test, test_names, classes):
    """Share of the patches of each class that a linear classifier of their features gets right: (classes,).

    It is fitted on as many patches of each class as the rarest has, so that none counts more.
    """
    draw = torch.Generator().manual_seed(0)
    rows = [(fit_names == c).nonzero()[:, 0] for c in range(classes)]
    least = min(map(len, rows))
    chosen = torch.cat([row[torch.randperm(len(row), generator=draw)[:least]] for row in rows])
    said = linear_head(fit[chosen], fit_names[chosen], classes, penalty=1e-3)(test).argmax(1)
    return torch.stack([(said[test_names == c] == c).float().mean() for c in range(classes)])


def measures(vit, images, objects, parts=None):
    """How much of the features is position, and how well they tell objects (n, N) bool and parts (n, S, S).

    Fitted on one half of the images, measured on the other.
    position: share of variance that the position of a patch explains. k_means: IoU of the best union of 5
    clusters. linear: IoU of a ridge regression, cut at its best threshold. parts: mean recall of head, neck, body,
    tail, leg and background, one patch alone.
    """
    x, half = features(vit, images), len(images) // 2
    fit, test = x[:half].flatten(0, 1), x[half:].flatten(0, 1)
    true_fit, true_test = objects[:half].flatten(), objects[half:].flatten()
    draw = torch.Generator().manual_seed(0)
    centres = k_means(fit[torch.randperm(len(fit), generator=draw)[:8000]], 5, draw)
    cluster_fit, cluster_test = (torch.cdist(part, centres).argmin(1) for part in (fit, test))
    unions = [torch.tensor(some) for n in range(1, 5) for some in itertools.combinations(range(5), n)]
    union = max(unions, key=lambda some: iou(torch.isin(cluster_fit, some), true_fit))
    head = linear_head(fit, true_fit.long(), 2, penalty=1e-3)
    objectness = head(fit)[:, 1]
    cut = max(torch.linspace(.2, .7, 26).tolist(), key=lambda c: iou(objectness > c, true_fit))
    return {"position": position_share(x),
            "k_means": iou(torch.isin(cluster_test, union), true_test),
            "linear": iou(head(test)[:, 1] > cut, true_test),
            **({} if parts is None else {"parts": part_recall(x, parts_of_patches(parts), half)})}


def part_recall(x, names, half):
    """Mean recall of BODY_PLAN: features x (n, N, D), names (n, N); fitted on the first `half` images."""
    fit, test = ((x[some].flatten(0, 1), names[some].flatten()) for some in (slice(half), slice(half, None)))
    return recalls(*fit, *test, len(BODY_PLAN)).mean().item()


# ---------------------------------------------------------------- the end: origin and scale
def centre_features(vit, scenes, spread, seed):
    """Set the origin and the channels' mean deviation of the features, in the last LayerNorm.

    Part prototypes start near the origin and are compared by distance: features with a common offset would all be
    nearest to one of them. The origin is the mean of five k-means centres, so that every kind of patch counts once, not
    every patch: with the mean patch, which is nearly backdrop, parts vanish or take the backdrop with some seeds. Views
    are augmented as those that the selector meets in training.
    """
    images = []
    for i, scene in enumerate(scenes):
        view = transforms.View(Image.fromarray(scene.permute(1, 2, 0).mul(255).round().byte().numpy()))
        transforms.augment(view, 96, np.random.default_rng([seed, i]))
        images.append(transforms.to_tensor(view.image))
    x = features(vit, torch.stack(images)).flatten(0, 1)
    draw = torch.Generator().manual_seed(seed)
    origin = k_means(x[torch.randperm(len(x), generator=draw)[:8000]], 5, draw).mean(0).to(vit.norm.bias.device)
    scale = (spread / x.var(0).mean().sqrt()).item()
    with torch.no_grad():
        vit.norm.bias.copy_((vit.norm.bias - origin) * scale)
        vit.norm.weight.mul_(scale)


# ---------------------------------------------------------------- the loop
def to_images(scenes):
    return torch.from_numpy(scenes).permute(0, 3, 1, 2).float() / 255


def earlier(cfg, folder):
    """The state of a run to go on with, or None; a run is never overwritten, nor continued with other settings."""
    if not cfg.resume:
        if folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty: go on with --resume if it holds a run, or choose another --out")
        return None
    state = read_file(folder / "last.pt", "last.pt of a run of miniature.pretrain")
    if not isinstance(state, dict) or not {"config", "step", "seconds", "model", "optimizer", "random"} <= state.keys():
        raise UsageError(f"--resume: {folder / 'last.pt'} is not of miniature.pretrain; name its folder with --out")
    recorded(Config, state["config"], f"{folder / 'last.pt'}, config")
    free = {"resume", "device", "out", "every", "spread"}      # spread acts at the end
    for name, value in asdict(cfg).items():
        then = state["config"].get(name, value)
        if name not in free and value != then:
            raise UsageError(f"--resume: {folder} was started with {flag(name)} {then}")
    return state


def save_state(folder, record, **state):
    """Print and log the measures of a moment, and write all that a resumed run needs."""
    tqdm.write("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()))
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    write_whole(folder / "last.pt", lambda temporary: torch.save(state, temporary))


def start_from(vit, path):
    """Copy the weights of a small backbone, such as mini.pt, into vit; UsageError for another file."""
    try:
        load_strictly(vit, read_file(path, "weights of a small backbone, such as miniature/mini.pt"))
    except (ValueError, AttributeError, TypeError) as error:
        raise UsageError(f"--start {path}: {error}; expected weights as miniature/mini.pt") from None


def find_scenes(cfg):
    """-> what to learn from, its frames or None, scenes to measure on (m, 96, 96, 4), their part maps or None.

    uint8; the last channel is the mask, 255 = object. To learn from: scenes (n, 128, 128, 4), or as large as composites
    are, or pairs (n, 2, 128, 128, 4) with frames (n, 2, 5).
    """
    if not cfg.composites:
        draw = {"creatures": pretraining_scenes, "chests": pretraining_chests}[cfg.subject]
        unseen = draw(min(400, cfg.scenes), cfg.seed + 1, size=96)
        if cfg.weight_pairs:
            return *pretraining_pairs(cfg.scenes // 2, cfg.seed, cfg.coat, size=128), *unseen
        return draw(cfg.scenes, cfg.seed, size=128)[0], None, *unseen
    found = load_folder(Path(cfg.composites), 96, cfg.seed)
    if not all(split in found and found[split].masks for split in ("train", "val")):
        raise UsageError(f"--composites {cfg.composites}: training and validation pictures with masks are needed, as "
                         "compose.py writes them")
    read = lambda some, side: np.stack([picture_and_mask(some, i, side) for i in
                                        progress(range(len(some)), f"reading {some.split}")])
    return read(found["train"].first(cfg.scenes), 0), None, read(found["val"].first(400), 96), None


def picture_and_mask(samples, i, side):
    """Sample i as it is stored, or stretched to `side` -> (S, S, 4) uint8."""
    image, mask = read_image(samples.paths[i], "RGB"), read_image(samples.masks[i], "L")
    if side:
        image, mask = (picture.resize((side, side), Image.Resampling.BOX) for picture in (image, mask))
    return np.dstack([image, mask])


def pretrain(cfg):
    if cfg.weight_pairs and (cfg.composites or cfg.subject != "creatures"):
        raise UsageError("--weight-pairs needs scenes that show one creature twice, and neither --composites nor "
                         "--subject chests has them: leave one of them out")
    if cfg.composites and cfg.subject != "creatures":
        raise UsageError("--composites are pictures of their own: leave out --subject")
    check_range("coat", cfg.coat)
    folder, device = Path(cfg.out), pick_device(cfg.device)
    state = earlier(cfg, folder)
    scenes, frames, unseen, parts = find_scenes(cfg)
    unseen = to_images(unseen)
    test = ((unseen[:, :3] - MEAN) / STD, patch_keep(unseen[:, 3] > .5, 8).bool(),
            None if parts is None else torch.from_numpy(parts))
    single = scenes if frames is None else scenes[:, 0]

    torch.manual_seed(cfg.seed)
    model = Reader(cfg.words, cfg.arch, masks=bool(cfg.weight_pasted or cfg.weight_ground))
    if cfg.start:
        start_from(model.vit, cfg.start)
    words = Words(single, cfg) if cfg.weight_words else None
    model.to(device)
    wide, narrow = ([p for p in model.parameters() if (p.ndim > 1) == many] for many in (True, False))
    optimizer = torch.optim.AdamW([dict(params=wide, weight_decay=cfg.weight_decay),
                                   dict(params=narrow, weight_decay=0.0)], lr=cfg.lr, betas=(.9, .95))
    start, seconds = 0, 0.0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["random"])
    folder.mkdir(parents=True, exist_ok=True)
    clock = time.perf_counter()
    for step in progress(range(start, cfg.steps), "pretrain"):
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * lr_at(step, cfg.steps, cfg.warmup, least=.02)
        terms = loss_terms(model, words, *draw_scenes(scenes, cfg.batch, frames), cfg, step, device)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        if done % cfg.every == 0 or done == cfg.steps:
            seconds += time.perf_counter() - clock              # measuring and saving do not count
            record = {"step": done, "seconds": round(seconds), **{name: x.item() for name, x in terms.items()}}
            save_state(folder, record | measures(model.vit, *test), config=asdict(cfg), step=done, seconds=seconds,
                       model=model.state_dict(), optimizer=optimizer.state_dict(), random=torch.get_rng_state())
            clock = time.perf_counter()
    centre_features(model.vit, to_images(single[:512, ..., :3]), cfg.spread, cfg.seed)
    write_backbone(folder, model.vit, cfg, seconds, measures(model.vit, *test))


def write_backbone(folder, vit, cfg, seconds, found):
    """ARCH.pt, the weights in half precision, and ARCH.json: how they were made, and what they measure."""
    weights = {name: x.detach().cpu().half() for name, x in vit.state_dict().items()}
    write_whole(folder / f"{cfg.arch}.pt", lambda temporary: torch.save(weights, temporary))
    device = vit.cls_token.device.type
    made = {"command": " ".join(["python -m miniature.pretrain", *sys.argv[1:]]), "seed": cfg.seed,
            "seconds": round(seconds),
            "machine": f"{os.cpu_count()} x {platform.machine()}, {torch.get_num_threads()} threads, {device}",
            "torch": torch.__version__, **found}
    write_json(folder / f"{cfg.arch}.json", made)
    print(f"wrote {folder / cfg.arch}.pt and {cfg.arch}.json; to use it in all runs, copy both to miniature/")


def main(argv=None):
    pretrain(parse(Config, __doc__, argv))


if __name__ == "__main__":
    run_script(main)
