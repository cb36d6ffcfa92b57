"""figures.py: the pictures that reports and notebooks share.

    python -m measure.figures --ckpt runs/waterbirds-mini/best.pt      # docs/schematic.png and docs/late_early.png
    python -m measure.figures --selectors runs/cub-mini-sweep/*        # docs/selectors.png, of runs of iFAM

Floor: measuring. Read ifam.py before (what maps and masks are) and leakage.py (what it is to hold a mask fixed).
Colours are those of Okabe and Ito, which colour-blind readers can tell apart; a part has the same one everywhere, and
so has a kind of mask, whose bars differ in hatching too. What has a fixed range (maps, masks, weights: 0 to 1) has a
fixed scale; where a scale is a figure's own, a colour bar says what it is. With a path, which may be a string, a figure
is written in the format of its suffix (.png, .pdf, .svg); without, it is left open, and a notebook shows it under its
cell. All formats carry our signature, so that no picture of somebody else is replaced.
"""
import json
import os
import re
import textwrap
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib

NOTEBOOK = "inline" in os.environ.get("MPLBACKEND", "")  # its kernel sets it
if not NOTEBOOK:
    matplotlib.use("Agg")                                # files, no window: also where there is no display
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patheffects import withStroke
from PIL import Image

import data
from benchmarks.files import SIGNATURE, is_our_picture
from benchmarks.samples import evenly, spread_over_groups
from ifam import refuse, unlikeness
from measure import tables
from measure.leakage import given, pixel_gradient, shown_by, shown_under, stage1_classifier, stage2_classifier
from measure.metrics import wilson
from runs import load_model, read_config, read_film
from settings import UsageError, may_write, opt, parse, run_script, write_whole
from vit import build_vit

if NOTEBOOK:                                             # PNG files of grain are four times as large
    from matplotlib_inline.backend_inline import set_matplotlib_formats
    set_matplotlib_formats("jpeg", pil_kwargs={"quality": 85})

plt.rcParams["svg.hashsalt"] = "iFAM"                     # the same figure is the same file
OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")
TEXT, SMALL, LARGE = 10.5, 9.5, 12                       # points: to be read on a slide, too
MASKS = {"none": ("#999999", ""), "late, soft": ("#E69F00", "//"), "late, hard": ("#D55E00", "//"),       # hatching
         "early, soft": ("#56B4E9", ".."), "early, hard": ("#0072B2", ""), "true": ("#009E73", "xx")}


# ---------------------------------------------------------------- an image as a picture
def part_colour(k):
    """Colour of part k, RGB in [0, 1]; after eight parts the same hues come again, darker.

    The eighth is a violet, because grey could not be told from the picture.
    """
    return np.array(matplotlib.colors.to_rgb((*OKABE_ITO[:7], "#7A4FC4")[k % 8])) * 0.6 ** (k // 8)


def to_picture(image, normalisation):
    """Normalised (3, S, S) -> (S, S, 3) in [0, 1]."""
    mean, std = (torch.tensor(x)[:, None, None] for x in normalisation)
    return (image.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def as_seen(selector, image, normalisation):
    """The picture of an image as large as stage 1 sees it, so that its patches are whole pixels."""
    return to_picture(selector.shrink(image[None])[0], normalisation)


def spread(patches, size):
    """(h, w, ...) -> (size, size, ...): every patch as a square of its value, as nearly as whole pixels allow."""
    rows, columns = (np.arange(size) * n // size for n in patches.shape[:2])
    return patches[rows][:, columns]


def grey(picture):
    """The picture (S, S, 3) without its colours."""
    return picture.mean(2, keepdims=True).repeat(3, 2)


def overlay(picture, parts, k, opacity=0.6):
    """Colour patches by their part: picture (S, S, 3), parts (h, w) with k for the background, which is darkened.

    The picture is greyed first, so that a part has one colour on every animal.
    """
    colours = np.stack([part_colour(p) for p in range(k)] + [np.zeros(3)])
    return (1 - opacity) * grey(picture) + opacity * spread(colours[parts], len(picture))


def numbered(parts, k):
    """Where to write the number of each part that occurs in parts (h, w) -> [(x, y, text)], in shares of the picture.

    That is the patch of the part that is nearest to the middle of its patches.
    """
    (h, w), found = parts.shape, []
    for part in occurring([parts], k):
        mine = np.argwhere(parts == part)
        row, column = mine[((mine - mine.mean(0)) ** 2).sum(1).argmin()]
        found.append(((column + 0.5) / w, (row + 0.5) / h, str(part)))
    return found


def only_kept(picture, keep):
    """What a mask leaves to see: picture (S, S, 3) with light grey where keep (h, w) is 0."""
    keep = spread(np.asarray(keep), len(picture))[..., None]
    return picture * keep + 0.93 * (1 - keep)


def framed(picture, left, top, side, colour, width):
    """A copy of picture (S, S, 3) with a square frame just inside left, top, left + side, top + side."""
    frame = np.zeros((*picture.shape[:2], 1), bool)
    frame[top:top + side, left:left + side] = True
    frame[top + width:top + side - width, left + width:left + side - width] = False
    return np.where(frame, colour, picture)


def outlined(picture, keep):
    """Picture (S, S, 3), three times as large, with a white line around the patches that keep (h, w) keeps."""
    large, kept = picture.repeat(3, 0).repeat(3, 1), torch.from_numpy(spread(keep > 0, 3 * len(picture)))[None].float()
    around = lambda x: torch.nn.functional.max_pool2d(x, 5, 1, 2)                        # two pixels on either side
    large[(around(kept) != -around(-kept))[0].numpy()] = 1
    return large


def signed(values, largest=None):
    """(h, w) -> (h, w, 3): white is 0, blue below, red above; `largest` (default: theirs) is the strongest."""
    values = np.asarray(values)
    return matplotlib.colormaps["RdBu_r"](0.5 + 0.5 * values / max(largest or abs(values).max(), 1e-12))[..., :3]


HEAT = matplotlib.colors.ListedColormap(matplotlib.colormaps["plasma"](np.linspace(0.35, 1, 256)))


def heat(picture, values, keep=None, largest=None):
    """A heat-map over a grey picture (S, S, 3): values (S, S) >= 0, `largest` (default: theirs) is the brightest.

    keep (h, w), if given, is outlined in white.
    """
    values = np.asarray(values)
    strength = np.sqrt(np.clip(values / max(largest or values.max(), 1e-12), 0, 1))[..., None]   # sqrt: faint is seen
    shown = (1 - strength) * 0.5 * grey(picture) + strength * HEAT(strength[..., 0])[..., :3]
    return shown if keep is None else outlined(shown, keep)


def coarse(values, cell):
    """(S, S) -> (S, S): means over square cells, so that a noisy gradient can be read."""
    return spread(torch.nn.functional.avg_pool2d(values[None], cell)[0].numpy(), len(values))


def mosaic(tiles, columns, gap=0.04):
    """Square tiles (s, s, 3) of one size -> one picture, `columns` to a row, white between and after the last."""
    space = max(1, round(gap * len(tiles[0])))
    tiles = [np.pad(tile, ((0, space), (0, space), (0, 0)), constant_values=1) for tile in tiles]
    tiles += [np.ones_like(tiles[0])] * (-len(tiles) % columns)
    return np.concatenate([np.concatenate(tiles[i:i + columns], 1) for i in range(0, len(tiles), columns)])


def neighbourhood(picture, patch, row, column, colour, around=2, least=160):
    """The patch at (row, column) of a picture with `around` patches on each side, framed; grey outside the picture."""
    padded = np.pad(picture, ((around * patch,) * 2, (around * patch,) * 2, (0, 0)), constant_values=0.8)
    side = (2 * around + 1) * patch
    zoom = -(-least // side)
    tile = padded[row * patch:row * patch + side, column * patch:column * patch + side].repeat(zoom, 0).repeat(zoom, 1)
    return framed(tile, around * patch * zoom, around * patch * zoom, patch * zoom, colour, max(2, len(tile) // 60))


# ---------------------------------------------------------------- pictures side by side
def short(name):
    """A class or group as a title: "012.Yellow_Warbler" -> "Yellow Warbler", a place on its own line, $ as a dollar."""
    name = re.sub(r"^\d+\.", "", name).replace("_", " ").replace("$", r"\$")
    return re.sub(r" (on|with|without) ", r"\n\1 ", name)


def answer(samples, guess, sample):
    """A guess (class, -1 for another one) as text, with a tick where it is the sample's label."""
    said = short(samples.classes[guess]) if guess >= 0 else "another class"
    return f"{'✓' if guess == sample['label'] else '✗'} {said}"


def opened(samples, batch):
    """A list of samples -> (images (B, 3, S, S), their pictures, their groups as titles)."""
    images = torch.stack([b["image"] for b in batch])
    return (images, [to_picture(x, samples.normalisation) for x in images],
            [short(samples.group_names[b["group"]]) for b in batch])


def grid(rows, titles=(), path=None, side=1.6, parts=(), heading="", largest=1.0, scale=""):
    """{name: [picture (S, S, 3), ...]} -> a row of pictures for each name. titles: of the columns; parts: a legend.

    A picture may come with text, (picture, text), written under it, and with marks, (picture, text, marks), [(x, y,
    text)] in shares of the picture, written on it. None leaves its place empty. A map (h, w) is drawn from 0, black, to
    `largest`, for all maps alike: ValueError for one with values outside. A colour bar is drawn if `largest` is not 1,
    or if `scale` says what the colours are: the name of a colour map of matplotlib and the labels of its two ends.
    """
    cells = {name: [(*x, "", ())[:3] if isinstance(x, tuple) and len(x) < 3 else x if isinstance(x, tuple) else
                    (x, "", ()) for x in pictures] for name, pictures in rows.items()}
    for x in (np.asarray(x) for line in cells.values() for x, *_ in line if x is not None):
        if x.ndim == 2 and not (x.min() >= -1e-4 and x.max() <= largest + 1e-4):
            raise ValueError(f"a map from {x.min():.3g} to {x.max():.3g} does not fit 0 to {largest:g}: pass largest=")
    columns = max(map(len, cells.values()))
    lines = sum(max((text.count("\n") + bool(text) for _, text, _ in line), default=0) for line in cells.values())
    extra = 0.19 * (lines + heading.count("\n") + bool(heading)) + 0.35 * bool(parts) + 0.35
    figure, axes = plt.subplots(len(cells), columns, squeeze=False, layout="constrained",
                                figsize=(side * columns + 0.3, side * len(cells) + extra))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for line, (name, pictures) in zip(axes, cells.items()):
        for axis, (picture, text, marks) in zip(line, pictures):
            if picture is not None:
                axis.imshow(picture, interpolation="nearest", cmap="magma", vmin=0, vmax=largest)
            for x, y, mark in marks:
                axis.text(x, 1 - y, mark, transform=axis.transAxes, ha="center", va="center", fontsize=SMALL,
                          color="white", weight="bold", path_effects=[withStroke(linewidth=2, foreground="black")])
            axis.set_xlabel(text, fontsize=SMALL)
        line[0].set_ylabel(name, fontsize=TEXT)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=TEXT)
    if largest != 1 or scale:
        colour_bar(figure, axes, *(scale or ("magma", "0", f"{largest:.3g}")))
    if len(parts):
        handles = [plt.Rectangle((0, 0), 1, 1, color=part_colour(p)) for p in parts]
        figure.legend(handles, [f"part {p}" for p in parts], loc="outside lower center", ncols=min(len(parts), 8),
                      fontsize=TEXT, frameon=False)
    if heading:
        figure.suptitle(heading, fontsize=LARGE)
    save(figure, path, grain=True)


def colour_bar(figure, axes, colours, low, high):
    """A bar beside the axes that says what the two ends of a colour map stand for."""
    colours = matplotlib.colormaps[colours] if isinstance(colours, str) else colours
    bar = figure.colorbar(matplotlib.cm.ScalarMappable(cmap=colours), ax=axes, shrink=min(0.8, 2 / len(axes)),
                          aspect=15, pad=0.02)
    bar.set_ticks([0, 1], labels=[low, high], fontsize=SMALL)


def occurring(assigned, k):
    """The parts, 0 to k - 1, that some patch of these arrays is assigned to, in order."""
    return [int(p) for p in np.unique(np.concatenate([np.ravel(x) for x in assigned])) if p < k]


@torch.no_grad()
def parts(model, samples, path=None, device="cpu", count=8):
    """Images, their parts with the numbers written in, and what stage 2 sees.

    Of `count` images, spread over the split and its groups.
    """
    images, pictures, titles = opened(samples, batch := spread_over_groups(samples, count))
    told = given(model, torch.utils.data.default_collate(batch), device)
    out, k = model(images.to(device), **told), model.selector.k
    assigned = out.part_logits.argmax(1).unflatten(1, out.maps.shape[2:]).cpu().numpy()
    keep = out.keep.clamp(0, 1).unflatten(1, model.grid).cpu()
    if out.shown is not None:                            # finer than patches
        keep = shown_under(out.keep, out.shown, model.predictor.backbone)[:, 0].cpu()
    guesses = samples.answers(out.logits.cpu()).tolist()
    grid({"image": pictures, "parts": [(overlay(p, a, k), "", numbered(a, k)) for p, a in zip(pictures, assigned)],
          "what stage 2 sees" if model.predictor else "patches of parts": [
              (only_kept(p, m), answer(samples, *x)) for p, m, *x in zip(pictures, keep, guesses, batch)]},
         titles, path, side=1.35, parts=occurring(assigned, k))


@torch.no_grad()
def compare_parts(models, samples, path=None, device="cpu", count=8, side=1.2):
    """The parts of several models on the same images, a row each. models: {name: model with a selector}."""
    images, pictures, _ = opened(samples, spread_over_groups(samples, count))
    rows, found = {"image": pictures}, set()
    for name, model in models.items():
        selector = model.selector
        assigned = selector(images.to(device)).part_logits.argmax(1).unflatten(1, selector.backbone.grid).cpu().numpy()
        rows[name] = [(overlay(p, a, selector.k), "", numbered(a, selector.k)) for p, a in zip(pictures, assigned)]
        found |= {*occurring(assigned, selector.k)}
    grid(rows, path=path, side=side, parts=sorted(found))


def examples(samples, path=None, count=6):
    """The first `count` images of each group, a row each: is the shortcut visible?"""
    rows = {}
    for g, name in enumerate(samples.group_names):
        mine = (samples.groups == g).nonzero()[:, 0].tolist()
        if mine:
            rows[f"{short(name)}\n(n = {len(mine)})"] = opened(samples, [samples[i] for i in mine[:count]])[1]
    grid(rows, path=path, side=1.3)


def gradients(classifiers, samples, backbone, path=None, device="cpu", count=5, indices=None):
    """Where does the largest logit look, the mask held fixed? A row of heat-maps for each {name: leakage.Classifier}.

    Gradients are averaged over quarters of a patch and scaled to their maximum in the image; white lines surround what
    is not hidden; the text is the share of the gradient at hidden pixels. indices: which samples; default: `count`,
    spread over the groups.
    """
    batch = [samples[i] for i in indices] if indices else spread_over_groups(samples, count)
    images, pictures, titles = opened(samples, batch)
    images, rows = images.to(device), {"image": pictures}
    truth = torch.stack([b["mask"] for b in batch])[:, None].float().to(device) if samples.masks else None
    for name, classifier in classifiers.items():
        with torch.no_grad():
            keep, held = classifier.find(images, truth)
        looks = pixel_gradient(lambda x: classifier.head(classifier.features(x, held)).amax(1, keepdim=True), images)
        hidden = shown_by(keep, held, backbone)[:, 0] == 0
        outside = (looks * hidden).sum((1, 2)) / looks.sum((1, 2)).clamp_min(1e-12)
        rows[name.replace(" (", "\n(")] = [
            (heat(picture, coarse(look, backbone.patch // 2), mask), f"{share:.0%} outside")
            for picture, look, mask, share in
            zip(pictures, looks.cpu(), keep.cpu().unflatten(1, backbone.grid).numpy(), outside.tolist())]
    grid(rows, titles, path, side=1.5, scale=(HEAT, "0", "largest\nof the\nimage"))


# ---------------------------------------------------------------- pictures of one's own
def whole(picture, longest=480):
    """A predict.Picture as it is, what the model does not see of it pale -> (h, w, 3)."""
    small = picture.original.copy()
    small.thumbnail((longest, longest))
    left, top, right, bottom = (max(0, round(at * small.width / picture.original.width)) for at in picture.seen)
    opacity = np.full((small.height, small.width, 1), 0.3)
    opacity[top:bottom, left:right] = 1
    return 1 - opacity * (1 - np.asarray(small) / 255)


def prediction(out, i, path=None):
    """Picture i of a predict.Prediction: all of it, its parts, what stage 2 sees; below, without each part in turn."""
    picture, shown = out.pictures[i], to_picture(out.pictures[i].image, out.pictures[i].normalisation)
    said = lambda logits: "{} {:.2f}".format(short(out.classes[logits.argmax()]), logits.softmax(0).max())
    cells = {textwrap.shorten(Path(picture.name).name, 30): whole(picture)}
    there = []
    if out.maps is not None:
        there = occurring([out.parts[i]], K := out.maps.shape[1] - 1)
        alone = "" if out.logits_stage1 is None else f"stage 1 alone: {said(out.logits_stage1[i])}"
        assigned = out.parts[i].numpy()
        cells["parts"] = overlay(shown, assigned, K), alone, numbered(assigned, K)
    if out.keep is None:
        cells["what the model sees"] = shown, said(out.logits[i])
    else:
        alone = out.maps is not None and out.logits_stage1 is None               # one stage: nothing reads its mask
        title = ("patches of parts" if alone else "what stage 2 sees") + f", {out.keep[i].mean():.0%}"
        seen = spread(out.keep[i].clamp(0, 1).view(out.grid).numpy(), len(shown))
        if out.shown is not None:                        # finer than patches
            seen = seen * out.shown[i, 0].numpy()
        cells[title] = only_kept(shown, seen), said(out.logits[i])
    rows = {"": list(cells.values())}
    if out.without is not None:
        rows["without a part"] = [(only_kept(shown, out.without_keep[i, p].clamp(0, 1).view(out.grid)),
                                   f"without part {p}: {said(out.without[i, p])}") for p in there]
    grid(rows, list(cells), path, side=2.6, parts=there)


def backbone_alone(picture, components, keep, path=None):
    """What a backbone without a head sees: principal components of its patches as colours, and FOUND's mask (h, w)."""
    shown = to_picture(picture.image, picture.normalisation)
    cells = {textwrap.shorten(Path(picture.name).name, 30): whole(picture),
             "first three components": spread(components, len(shown)),
             "kept by FOUND's seed step": only_kept(shown, keep)}
    grid({"": list(cells.values())}, list(cells), path, side=2.6)


# ---------------------------------------------------------------- late against early
@torch.no_grad()
def late_against_early(model, samples, path=None, device="cpu", count=6):
    """The same images through a late mask (stage 1) and an early one (stage 2), then repainted outside the mask.

    Which images: `count` of the groups that are rare in training (of all, where none is), in the order of the groups,
    as many of each, spread evenly over its files. Nothing looks at the answers, so wrong ones are in it too. Repainted:
    every pixel outside the mask is noise, the first paint of leakage.repaint (of its three the one that moves late
    answers most, on the miniature); part maps and mask are held fixed. The number is the largest change of a logit.
    """
    groups = data.BENCHMARKS[samples.name].rare or range(len(samples.group_names))
    share = [count // len(groups) + (i < count % len(groups)) for i in range(len(groups))]
    chosen = [i for g, n in zip(groups, share) for i in evenly((samples.groups == g).nonzero()[:, 0], n)]
    images, pictures, titles = opened(samples, batch := [samples[i] for i in chosen])
    images, late, early = images.to(device), stage1_classifier(model), stage2_classifier(model)
    (_, maps), (keep, held) = late.find(images, None), early.find(images, None)
    hidden = shown_by(keep, held, model.predictor.backbone) == 0
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
    shown = torch.where(hidden, noise, images)
    said, again = ([late.head(late.features(x, maps)).cpu(), early.head(early.features(x, held)).cpu()]
                   for x in (images, shown))
    says = [[answer(samples, *x) for x in zip(samples.answers(logits).tolist(), batch)] for logits in said + again]
    moved = [[f"{x:.2f}" if x else "0" for x in (a - b).abs().amax(1).tolist()] for a, b in zip(said, again)]
    texts = [f"late {a},\nby {x}\nearly {b},\nby {y}" for a, b, x, y in zip(*says[2:], *moved)]
    foreground, masks = 1 - maps[:, -1].cpu().numpy(), keep.unflatten(1, model.grid).cpu().numpy()
    painted = opened(samples, [{**b, "image": x} for b, x in zip(batch, shown.cpu())])[1]
    grid({"image": pictures,
          "late: stage 1\nsees all, pools\nunder its maps": [
              (p * (0.3 + 0.7 * spread(m, len(p))[..., None]), x) for p, m, x in zip(pictures, foreground, says[0])],
          "early: stage 2\nsees this alone": [
              (only_kept(p, m), text) for p, m, text in zip(pictures, masks, says[1])],
          "repainted\noutside the mask\n(change of a logit)": [*zip(painted, texts)]}, titles, path, side=1.45)


ART = ("ssssssss", "sssshhss", "sssshhhs", "tsssbbss", "ttbbbbss", "gtbbbbgg", "ggbbbggg", "gggggggg")
TINTS = {"s": "#BFE0F2", "g": "#A9CBA4", "h": OKABE_ITO[5], "b": OKABE_ITO[0], "t": OKABE_ITO[6]}    # sky, ground, bird
INK = "#444444"


def schematic(path=None):
    """The two stages of iFAM as a drawing: what goes forward, what the gradient goes back through, where losses act."""
    figure, axis = plt.subplots(figsize=(10, 4))
    figure.subplots_adjust(0, 0, 1, 1)

    def box(x, y, width, height, text, face, edge=INK, size=11):
        axis.add_patch(matplotlib.patches.FancyBboxPatch((x, y), width, height, facecolor=face, edgecolor=edge, lw=1.2,
                                                         boxstyle="round,pad=0,rounding_size=2"))
        write(x + width / 2, y + height / 2, text, size=size, va="center")

    def write(x, y, text, size=10, va="top", **how):
        axis.text(x, y, text, ha="center", va=va, fontsize=size, linespacing=1.25, **how)

    def arrow(*points, colour=INK, line="-"):
        axis.plot(*zip(*points[:-1]), color=colour, lw=1.6, linestyle=line)
        axis.annotate("", points[-1], points[-2], arrowprops=dict(arrowstyle="-|>", color=colour, lw=1.6, shrinkA=0,
                                                                  shrinkB=0, linestyle=line))

    def picture(x, y, side, tint):
        shown = np.array([[matplotlib.colors.to_rgb(tint(cell)) for cell in row] for row in ART])
        axis.imshow(shown, extent=(x, x + side, y, y + side), interpolation="nearest", zorder=3)
        axis.add_patch(plt.Rectangle((x, y), side, side, fill=False, edgecolor=INK, zorder=4))

    box(117, 2, 71, 60, "", "#EAF4FB", "none")           # what the guarantee is about
    write(152.5, 8, "nothing outside the mask\ncan reach the prediction", 11, "center", color=OKABE_ITO[4],
          weight="bold")
    picture(3, 30, 22, TINTS.get)
    box(34, 30, 22, 22, "stage 1\nViT,\nsees all", "#F6E3C0")
    for i, part in enumerate(("h", "b", "t", "sg")):
        picture(65 + 11.5 * (i % 2), 41.5 - 11.5 * (i // 2), 10.5,
                lambda cell: TINTS[cell] if cell in part else "white")
    picture(96, 34, 14, lambda cell: "white" if cell in "hbt" else INK)
    for i, cell in enumerate(cell for row in ART for cell in row if cell in "hbt"):
        axis.add_patch(plt.Rectangle((121 + 3 * (i % 3), 49.3 - 2.8 * (i // 3)), 2.4, 2.2, facecolor=TINTS[cell],
                                     edgecolor=INK, lw=0.6))
    box(140, 30, 22, 22, "stage 2\nViT", "#CFE3F3")
    box(171, 34, 14, 14, "logits", "white")
    for x, text in ((14, "image"), (76, "part maps:\nK parts, background"), (103, "binary mask\n(white: kept)"),
                    (125, "kept\ntokens")):
        write(x, 27.5, text)
    for start, end in ((25, 34), (56, 65), (87, 96), (110, 121), (130, 140), (162, 171)):
        arrow((start + 1, 41), (end - 1, 41))
    for x, y, text in ((45, 52, "class loss"), (76, 52, "part losses"), (178, 48, "class loss")):
        box(x - 11, 66, 22, 8, text, "#FBE3EE", OKABE_ITO[6], 10)
        arrow((x, y + 1), (x, 65.5), colour=OKABE_ITO[6])
    arrow((151, 29), (151, 15.5), (45, 15.5), (45, 29), colour=OKABE_ITO[5], line="--")
    write(80, 12.5, "gradient of the mask (straight through)", color=OKABE_ITO[5])
    axis.set(xlim=(0, 190), ylim=(0, 76), aspect="equal")
    axis.axis("off")
    save(figure, path)


# ---------------------------------------------------------------- charts
def bar_style(name, other=0):
    """Colour and hatching of a kind of mask: that of the first key of MASKS that its name contains.

    Other names are black, or what comes after it: other counts them.
    """
    others = ("#000000", OKABE_ITO[6], OKABE_ITO[3])
    colour, hatch = next((style for mask, style in MASKS.items() if mask in name), (others[other % 3], ""))
    return dict(color=colour, hatch=hatch, edgecolor="white", linewidth=0)


def above(columns):
    """A legend above a chart, for `chart`: what is inside it may lie on a line."""
    return dict(ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1))


def chart(axis, legend=True, chance=None, **settings):
    """What all charts share: no frame at the top and right, a dotted line at chance, a legend without a frame."""
    axis.set(**settings)
    axis.spines[["top", "right"]].set_visible(False)
    if chance is not None:
        axis.axhline(chance, color="black", lw=0.8, ls=":", label="chance")
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=SMALL, frameon=False, **(legend if isinstance(legend, dict) else {}))


def group_bars(groups, path=None, chance=None):
    """Accuracy by group, a bar for each model, with 95 % intervals over images (Wilson).

    groups: {name of a model: {group: {"n", "accuracy"}}}, as in report.json; the name says which kind of mask it has.
    """
    names = [g for g, x in next(iter(groups.values())).items() if x["n"]]
    figure, axis = plt.subplots(figsize=(min(max(6, 1.9 * len(names)), 10), 3.2), layout="constrained")
    width, before = 0.8 / len(groups), []
    for i, (model, found) in enumerate(groups.items()):
        style = bar_style(model, i)
        share = np.array([found[g]["accuracy"] for g in names])
        low, high = np.transpose([wilson(found[g]["accuracy"], found[g]["n"]) for g in names])
        axis.bar(np.arange(len(names)) + (i - (len(groups) - 1) / 2) * width, share, width * 0.92, label=model,
                 yerr=np.maximum([share - low, high - share], 0), capsize=2, error_kw=dict(lw=1), **style,
                 alpha=0.55 ** before.count(style))      # lighter, where a kind of mask comes again
        before.append(style)
    few = len(names) < 5
    axis.set_xticks(range(len(names)), [short(g) if few else short(g).replace("\n", "") for g in names], fontsize=TEXT,
                    **({} if few else dict(rotation=20, ha="right")))
    chart(axis, above(len(groups) + (chance is not None)), chance, ylabel="accuracy", ylim=(0, 1.02))
    save(figure, path)


def ladder(measures, path=None, n=0, form="", top=0):
    """Small multiples, one for each measure, a bar for each kind of mask: {measure: {name of a mask: number}}.

    n: the numbers are shares of so many images, and get 95 % intervals (Wilson). form: how to write all numbers, such
    as ".1f"; by default two or three digits. top: where the scale of all measures ends; by default each has its own.
    """
    figure, axes = plt.subplots(1, len(measures), figsize=(1.3 + 2.4 * len(measures), 2.6), sharey=True, squeeze=False,
                                layout="constrained")
    for axis, (measure, values) in zip(axes[0], measures.items()):
        largest = top or max(*(wilson(x, n)[1] if n else x for x in values.values()), 1e-9)
        for name, value in values.items():
            axis.barh(name, value, 0.75, **bar_style(name))
            digits = format(value, form) if form else "0" if value == 0 else f"{value:.{3 if value >= 10 else 2}g}"
            low, high = wilson(value, n) if n else (value, value)
            axis.plot([low, high], [name, name], color="black", lw=1)
            axis.text(high + 0.03 * largest, name, digits, va="center", fontsize=SMALL)
        axis.set_title(textwrap.fill(measure, 22), fontsize=TEXT)
        axis.spines["bottom"].set_visible(False)
        chart(axis, False, xlim=(0, 1.3 * largest), xticks=[])
    axes[0, 0].invert_yaxis()                            # the first at the top
    save(figure, path)


def between(found, path=None):
    """Another part's attribute read from a part: attribute x part, late beside early, and the difference.

    found: what between.between_parts measured; of stage 2, where there is one. A cell is the accuracy over so many
    images; a cross is a pair with too few of them. One line of text where nothing was measured.
    """
    if "skipped" in found:
        return one_line(f"left out: {found['skipped']}", path)
    stage, late = ("stage2", "kept") if "stage2" in found else ("stage1", "image")
    cells = {(c["attribute"], c["part"]): c for c in found["cells"] if c["where"] == "elsewhere"}
    attributes, parts = list(dict.fromkeys(a for a, _ in cells)), sorted({k for _, k in cells})
    empty = {"n": 0, stage: dict.fromkeys((late, "own"), np.nan)}
    read = {place: np.array([[cells.get((a, k), empty)[stage][place] for k in parts] for a in attributes])
            for place in (late, "own")}
    titles = {"late: attention over\n" + {"kept": "all kept patches", "image": "the whole image"}[late]: read[late],
              "early: attention over\nthe part alone": read["own"], "late less early": read[late] - read["own"]}
    figure, axes = plt.subplots(1, 3, figsize=(3.2 + 2.1 * len(parts), 1.3 + 0.52 * len(attributes)), sharey=True,
                                layout="constrained", squeeze=False)
    for axis, (title, values) in zip(axes[0], titles.items()):
        signed = title == "late less early"
        ends = dict(cmap="PuOr_r", vmin=-0.5, vmax=0.5) if signed else dict(cmap="Blues", vmin=0, vmax=1.4)
        axis.imshow(values, aspect="auto", **ends)
        for row, column in np.ndindex(values.shape):
            n, value = cells.get((attributes[row], parts[column]), empty)["n"], values[row, column]
            text = f"{value:+.2f}" if signed else f"{value:.2f}\nn = {n}"
            axis.text(column, row, text if n else "x", ha="center", va="center", fontsize=SMALL)
        axis.set_title(title, fontsize=TEXT)
        axis.set_xticks(range(len(parts)), [f"part {k}" for k in parts], fontsize=TEXT)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    axes[0, 0].set_yticks(range(len(attributes)), [a.removeprefix("has_").replace("_", " ") for a in attributes],
                          fontsize=TEXT)
    save(figure, path)


def curves(series, x, y, path=None, chance=None):
    """Lines over 0, 1, 2, ...: {name: [number, ...]}; a name with a kind of mask in it has that mask's colour."""
    figure, axis = plt.subplots(figsize=(5.4, 3.2), layout="constrained")
    for (name, values), marker in zip(series.items(), "os^Dvx"):
        axis.plot(values, marker + "-", ms=5, color=bar_style(name)["color"], label=name)
    chart(axis, above(2), chance, xlabel=x, ylabel=y, xticks=range(max(map(len, series.values()))))
    save(figure, path)


def selectors(found, path=None):
    """What a smaller stage 1 costs: {benchmark: {stage 1: ([time of one dense ViT, ...], [measure of each seed])}}.

    A panel for each benchmark; a large mark is the mean over seeds, a small one a seed.
    """
    kinds = list(dict.fromkeys(kind for sizes in found.values() for kind in sizes))
    style = {kind: dict(color=OKABE_ITO[i % len(OKABE_ITO)], marker="os^Dv<>P"[i % 8]) for i, kind in enumerate(kinds)}
    figure, axes = plt.subplots(1, len(found), figsize=(0.6 + 2.6 * len(found), 3.4), sharex=True, sharey=True,
                                squeeze=False, layout="constrained")
    for axis, (name, sizes) in zip(axes[0], found.items()):
        for kind, (times, values) in sizes.items():
            time = sum(times) / len(times)
            axis.plot([time] * len(values), values, ms=3.5, ls="", alpha=0.5, mec="none", **style[kind])
            axis.plot(time, sum(values) / len(values), ms=8, ls="", **style[kind])
        axis.set_title(name, fontsize=TEXT)
        chart(axis, False, xlabel="time (one dense ViT = 1)")
    axes[0, 0].set_ylabel("share of right answers")
    marks = [plt.Line2D([], [], ls="", ms=8, **style[kind]) for kind in kinds]
    figure.legend(marks, kinds, loc="outside lower center", ncols=min(len(kinds), 4), fontsize=SMALL, frameon=False)
    save(figure, path)


def growth(found, path=None):
    """Time and peak memory against tokens, K and batch, as speed.growth measures them; fitted powers in the legends.

    A dashed line of the same colour is the same with the small stage 1. Axes are logarithmic, with thin lines of
    slope 1 and 2 below; but linear from 0 for K, which costs hardly anything.
    """
    labels = {"tokens": "tokens of an image", "K": "K, foreground parts", "batch": "images in a batch"}
    figure, axes = plt.subplots(2, len(found), figsize=(3.6 * len(found), 6), sharex="col", layout="constrained")
    for (name, rows), column in zip(found.items(), axes.T):
        x, powers = np.array(rows["x"]), rows["exponents"]
        for axis, unit, label, scale in zip(column, ("seconds", "bytes"), ("Time, ms", "Peak memory, MB"), (1e3, 1e-6)):
            curves = {what: scale * np.array(rows[what][unit]) for what in powers if unit in powers[what]}
            for number, (what, y) in enumerate(curves.items()):
                axis.plot(x, y, "o--" if "small" in what else "o-", ms=4, color=OKABE_ITO[4 + number % 2],
                          label=f"power {powers[what][unit]:.2f}")
            low, top = (bound([bound(y) for y in curves.values()] or [1]) for bound in (min, max))
            if name == "K":
                axis.set(ylim=(0, 1.15 * top))
            else:
                axis.set(xscale="log", yscale="log", ylim=(0.3 * low, 20 * top))
                if curves:                               # memory is not counted on every device
                    axis.legend(fontsize=SMALL, frameon=False, loc="upper left", ncols=2, columnspacing=1)
                for slope, offset in ((1, (4, -22)), (2, (-20, -12))):     # from below the lowest point to the edge
                    right = min(x[-1], x[0] * (10 * top / low) ** (1 / slope))
                    end = right, 0.5 * low * (right / x[0]) ** slope
                    axis.plot([x[0], right], [0.5 * low, end[1]], color="0.6", lw=0.8, zorder=0)
                    axis.annotate(f"slope {slope}", end, offset, textcoords="offset points", fontsize=SMALL,
                                  color="0.4", ha="right")
            axis.set(title=f"{label.partition(',')[0]} against {name}", ylabel=label)
            axis.spines[["top", "right"]].set_visible(False)
        column[-1].set_xlabel(labels[name])
        column[-1].set_xticks(x, x)
        column[-1].xaxis.minorticks_off()
    lines = axes[0, 0].get_lines()[:len(powers)]
    figure.legend(lines, list(powers), loc="outside lower center", ncols=len(lines), fontsize=TEXT, frameon=False)
    save(figure, path)


def training_curves(log, path=None):
    """What a run's log.jsonl tells: loss terms, accuracy and worst group of validation, learning rates, over steps."""
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    steps, scores = [x for x in lines if "loss" in x], [x for x in lines if "val" in x]
    known = ("step", "epoch", "lr", "loss", "accuracy", "gradient_norm", "images_per_second", "waiting", "groups")
    figure, axes = plt.subplots(2, 2, figsize=(11, 6), layout="constrained", sharex=True)
    (total, accuracy), (terms, rates) = axes
    for axis in axes.flat:
        axis.set_prop_cycle(plt.cycler(linestyle=["-", "--"]) * plt.cycler(color=OKABE_ITO))
    at = [x["step"] for x in steps]
    total.plot(at, [x["loss"] for x in steps], color="black")
    for name in [x for x in (steps[0] if steps else ()) if x not in known]:
        terms.plot(at, [x[name] for x in steps], label=name)
    accuracy.plot(at, [x["accuracy"] for x in steps], ".", color="0.75", label="training,\none batch")
    for name, label, colour in (("aa", "validation", 4), ("worst_group", "validation,\nworst group", 5)):
        accuracy.plot([x["step"] for x in scores], [x["val"][name] for x in scores], "o-", color=OKABE_ITO[colour],
                      label=label)
    for name in steps[0]["lr"] if steps else ():
        rates.semilogy(at, [x["lr"][name] or None for x in steps], label=name)
    beside = dict(loc="center left", bbox_to_anchor=(1, 0.5))
    chart(total, False, title="loss, the weighted sum", ylim=(0, None))
    chart(accuracy, beside, title="accuracy", ylim=(0, 1.02))
    chart(terms, beside, title="its terms, before weighting", xlabel="step", ylim=(0, None))
    chart(rates, beside, title="learning rate", xlabel="step", ylim=(1e-8, None))
    save(figure, path)


def film(file, samples, path=None, steps=(), columns=8):
    """The parts of a few images while a model was trained with --film, a row each: film.json of a run, and its split.

    steps: which of the frames, by default up to `columns` of them, the first and the last among them. UsageError for a
    step that was not kept, or an image that the split does not have.
    """
    content = read_film(file)
    frames = {frame["step"]: frame["parts"] for frame in content["frames"]}
    steps = steps or [sorted(frames)[i] for i in evenly(torch.arange(len(frames)), columns)]
    places = {name: i for i, name in enumerate(samples.ids) if name in content["ids"]}       # ids may be no list
    if absent := [x for x in (*steps, *content["ids"]) if x not in frames and x not in places]:
        raise UsageError(f"{file} has no {absent[0]}: it has the steps {', '.join(map(str, sorted(frames)))} of images "
                         f"of {content['data']} {content['split']}")
    rows, k = {}, content["k"]
    for n, name in enumerate(content["ids"]):
        sample = samples[places[name]]
        picture = to_picture(sample["image"], samples.normalisation)
        of_step = [np.array([row.split() for row in frames[step][n]], int) for step in steps]
        rows[short(samples.group_names[sample["group"]]) + " " * n] = [picture, *[
            (overlay(picture, parts, k), f"{(parts < k).mean():.0%} kept", numbered(parts, k)) for parts in of_step]]
    used = occurring([np.array([row.split() for image in frames[step] for row in image], int) for step in steps], k)
    grid(rows, ["image", *[f"step {step}" for step in steps]], path, side=1.35, parts=used)


# ---------------------------------------------------------------- interventions
@torch.no_grad()
def part_sheet(model, samples, part, census, title, path=None, device="cpu", columns=8, lines=4):
    """What a part is: the patch that beats the background by most in each of up to 32 images, then 8 whole images.

    The largest margin comes first. The 8 images are spread over those with this part; a patch of it is drawn at random
    in each. census: intervene.Census of the samples. A part without a patch gets one line instead of a sheet.
    """
    k, patch, (h, w) = model.selector.k, model.selector.backbone.patch, model.selector.backbone.grid
    have = (census.count[:, part] > 0).nonzero()[:, 0]
    if not len(have):
        return one_line(f"part {part} is empty: no patch of any of the {len(census.count)} images goes to it", path)
    strongest = have[census.margin[have, part].argsort(descending=True, stable=True)][:lines * columns]
    seen = lambda images: [as_seen(model.selector, x, samples.normalisation) for x in images]
    tile = lambda picture, token: neighbourhood(picture, patch, *divmod(int(token), w), part_colour(part))
    tiles = [tile(picture, census.where[i, part])
             for i, picture in zip(strongest, seen(samples[i]["image"] for i in strongest.tolist()))]
    rows = {f"largest margin,\n{i + 1} to {min(i + columns, len(tiles))}": tiles[i:i + columns]
            for i in range(0, len(tiles), columns)}
    images = torch.stack([samples[i]["image"] for i in evenly(have, columns)])
    assigned, scenes = model.selector(images.to(device)).part_logits.argmax(1).cpu(), seen(images)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.multinomial((a == part).double(), 1, generator=generator) for a in assigned]
    rows["a patch\nat random"] = [tile(*both) for both in zip(scenes, drawn)]
    rows["images with\nthis part"] = scenes
    assigned = assigned.view(-1, h, w).numpy()
    rows["its patches"] = [overlay(x, np.where(a == part, part, k), k) for x, a in zip(scenes, assigned)]
    ranked = f"\nframed: the {len(tiles)} patches with the largest margin over the background, one an image"
    if census.area is not None:
        object_ = short(samples.classes[1]) if samples.masks_tell else "object"
        ranked += (f"; {census.best[strongest, part].mean():.0%} of their area is {object_},\n"
                   f"and {census.area[:, part].sum() / census.count[:, part].sum():.0%} of that of all its patches")
    grid(rows, path=path, side=1.4, heading=title + ranked)


def one_line(text, path=None):
    """A picture of one line of text."""
    figure = plt.figure(figsize=(8, 0.5))
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=LARGE)
    save(figure, path)


@torch.no_grad()
def removals(model, samples, before, steps, path=None, device="cpu", count=8):
    """Images, their parts, and the parts after each step; patches that a step refuses are framed in white.

    before: limits (K,); steps: [(name, limits (K,))], mildest first; both on the selector's score. Half of the images
    lose most in the last step, half are spread over the split.
    """
    selector, k, patch = model.selector, model.selector.k, model.selector.backbone.patch
    h, w = selector.backbone.grid
    pick = evenly(torch.arange(len(samples)), 256)       # enough to find such images
    raw, unlike = [], []
    for i in pick:
        features = selector.features(samples[i]["image"][None].to(device))
        raw.append(selector.select(features).part_logits)
        unlike.append(unlikeness(selector.score, raw[-1], features, selector.prototypes).cpu())
    raw, unlike = torch.cat(raw).cpu(), torch.cat(unlike)
    parts_of = lambda limits: refuse(raw, limits, unlike).argmax(1)                      # (n, N)
    start = parts_of(before)
    most = (parts_of(steps[-1][1]) != start).sum(1).argsort(descending=True, stable=True)[:count // 2].tolist()
    chosen = most + evenly(torch.tensor([i for i in range(len(pick)) if i not in most]), count // 2)
    batch = [samples[pick[i]] for i in chosen]
    pictures = [as_seen(selector, b["image"], samples.normalisation) for b in batch]

    def look(picture, i, assigned):
        own = assigned[i].view(h, w).numpy()
        shown, refused = overlay(picture, own, k), (assigned[i] != start[i]).nonzero()[:, 0]
        for token in refused.tolist():
            shown = framed(shown, token % w * patch, token // w * patch, patch, 1.0, max(1, patch // 8))
        return shown, "" if assigned is start else f"{len(refused)} removed", numbered(own, k)
    rows = {name: [look(*x, assigned) for x in zip(pictures, chosen)]
            for name, assigned in (("parts", start), *((name, parts_of(limits)) for name, limits in steps))}
    grid({"image": pictures, **rows}, [short(samples.group_names[b["group"]]) for b in batch], path,
         parts=occurring([start[chosen]], k),
         heading=f"left: the {len(most)} of {len(pick)} images that lose most; right: others, spread over the split")


# ---------------------------------------------------------------- files
def save(figure, path, grain=False):
    """Write a figure in the format of path's suffix, whole or not at all. path None: leave it open, for a notebook.

    grain: it shows images, which take a third of the bytes as a PNG of the 256 colours that suit them best.
    """
    def write(temporary):
        signed = {"pdf": {"Creator": "iFAM", "CreationDate": None}, "svg": {"Creator": "iFAM", "Date": None}}
        figure.savefig(temporary, dpi=150, format=kind, metadata=signed.get(kind))       # no date: it can be repeated
        if kind == "png":
            shown = Image.open(temporary).convert("RGB")
            if grain:
                colours = shown.resize((shown.width // 3, shown.height // 3), Image.NEAREST).quantize(256, kmeans=1)
                shown = shown.quantize(palette=colours, dither=Image.Dither.NONE)
            shown.save(temporary, "PNG", pnginfo=SIGNATURE)
    if path is not None:
        path = Path(path)
        if (kind := path.suffix[1:].lower()) not in FORMATS:
            raise UsageError(f"{path}: a figure is written as one of {', '.join(FORMATS)}; name a file of one of them")
        write_whole(path, write)
        plt.close(figure)


FORMATS = ("png", "pdf", "svg")


@dataclass
class Config:
    ckpt: str = opt("", "checkpoint of a model of two stages: draws schematic.png and late_early.png")
    selectors: list[Path] = opt((), "runs that differ in stage 1, of each kind one evaluated with --speed: draws "
                                   "selectors.png")
    out: Path = opt(Path("docs"), "folder that pictures are written to")
    format: str = opt("png", "format of the pictures: pdf and svg are sharp at any size", choices=FORMATS)
    force: bool = opt(False, "replace pictures that this program did not draw")


def stage1_of(config):
    """The settings of a run -> "64 px, 4 blocks"."""
    with torch.device("meta"):                           # no weights: it is asked for its blocks alone
        blocks = len(build_vit(config["selector_arch"] or config["arch"], config["size"]).blocks)
    return f"{config['selector_size'] or config['size']} px, {blocks} block{'s' * (blocks > 1)}"


def of_selectors(folders):
    """What `selectors` draws, from the reports of runs. UsageError where nobody measured the time of a stage 1.

    A run is known by the side and the blocks of its stage 1. The time is the mean over the runs that have one. Reports
    of validation, and of corrected models, do not count.
    """
    found = {}
    for run in folders:
        reports = [report for *_, report in tables.read_run(run)
                   if report["split"] != "val" and not {"retrain", "intervention"} & report.keys()]
        kind = stage1_of(read_config(run / "config.json")) if reports else ""
        for report in reports:
            measure = "worst_group" if "worst_group" in tables.stage(report) else "aa"
            title = report["data"].removesuffix("-mini") + ", worst group" * (measure == "worst_group")
            times, values = found.setdefault(title, {}).setdefault(kind, ([], []))
            values.append(tables.stage(report)[measure])
            times += [report["speed"]["relative_to_dense"]] if "speed" in report else []
    if not found:
        raise UsageError(f"{', '.join(map(str, folders))}: no report of a run; make them with sweep.py selectors")
    for title, sizes in found.items():
        for kind, (times, _) in sizes.items():
            if not times:
                raise UsageError(f"{title}: no run with a stage 1 of {kind} has a time: python evaluate.py --ckpt "
                                 "RUN/best.pt --speed")
    return {title: dict(sorted(sizes.items(), key=lambda kind: -sum(kind[1][0]) / len(kind[1][0])))
            for title, sizes in found.items()}


def main(argv=None):
    given = parse(Config, __doc__, argv)
    if bool(given.ckpt) == bool(given.selectors):
        raise UsageError("name what to draw from: --ckpt or --selectors")
    path = lambda name: given.out / f"{name}.{given.format}"
    paths = [path("selectors")] if given.selectors else [path("schematic"), path("late_early")]
    draw = partial(selectors, of_selectors(given.selectors)) if given.selectors else two_stages_of(given.ckpt)
    given.out.mkdir(parents=True, exist_ok=True)
    for picture in paths:
        may_write(picture, is_our_picture, given.force)
    draw(*paths)
    print(f"  wrote {' and '.join(map(str, paths))}")


def two_stages_of(ckpt):
    """-> a function that draws the schematic and late against early, of a checkpoint of two stages."""
    model, state = load_model(ckpt)
    trained = state["config"]
    if not (model.selector and model.predictor):
        raise UsageError(f"{ckpt} is of the method {trained['method']}, which has no two stages to compare; name a "
                         "checkpoint of ifam")
    root = data.find_root(trained["data"], trained["root"], trained["mini"])
    looked = ("test", "val") if trained["data"] == "folder" else ("test",)
    samples = data.measured(data.load(trained["data"], root, trained["size"], limit=trained["limit"], splits=looked,
                                      val_share=trained.get("val_share", 0.0)))
    return lambda drawing, pictures: (schematic(drawing), late_against_early(model, samples, pictures))


if __name__ == "__main__":
    run_script(main)
