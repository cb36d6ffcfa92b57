"""figures.py: the pictures that reports and notebooks share.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; a part has the same one everywhere.
"""
import matplotlib

matplotlib.use("Agg")                                    # files, no window: also where there is no display
import matplotlib.pyplot as plt
import numpy as np
import torch

from ifam import refuse
from settings import write_whole

OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")


def part_colour(k):
    """Colour of part k, RGB in [0, 1]; after eight parts the same hues come again, darker."""
    return np.array(matplotlib.colors.to_rgb(OKABE_ITO[k % 8])) * 0.6 ** (k // 8)


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


def overlay(picture, parts, k, opacity=0.6):
    """Colour patches by their part: picture (S, S, 3), parts (h, w) with k for the background, which is darkened."""
    colours = np.stack([part_colour(p) for p in range(k)] + [np.zeros(3)])
    return (1 - opacity) * picture + opacity * spread(colours[parts], len(picture))


@torch.no_grad()
def parts(model, samples, path, device="cpu", count=8):
    """Images, their parts, and what stage 2 sees, for `count` images spread over the split and its groups."""
    order = torch.argsort(samples.groups, stable=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(count, len(order))).round().long()].tolist()
    batch = [samples[i] for i in chosen]
    out = model(torch.stack([b["image"] for b in batch]).to(device))
    guesses = samples.answers(out.logits.cpu()).tolist()
    (h, w), k = out.maps.shape[2:], out.maps.shape[1] - 1
    figure, axes = plt.subplots(3, len(batch), figsize=(1.6 * len(batch), 5.4), squeeze=False)
    for column, sample in enumerate(batch):
        picture = to_picture(sample["image"], samples.normalisation)
        keep = spread(out.keep[column].clamp(0, 1).view(model.grid).cpu().numpy(), len(picture))[..., None]
        assigned = out.part_logits[column].argmax(0).view(h, w).cpu().numpy()
        for row, shown in enumerate((picture, overlay(picture, assigned, k), picture * keep + 0.93 * (1 - keep))):
            axes[row, column].imshow(shown, interpolation="nearest")
            axes[row, column].set(xticks=[], yticks=[])
        axes[0, column].set_title(samples.group_names[sample["group"]].replace(" on ", "\non "), fontsize=8)
        sign = "✓" if guesses[column] == sample["label"] else "✗"
        guess = samples.classes[guesses[column]] if guesses[column] >= 0 else "another class"
        axes[2, column].set_xlabel(f"{sign} {guess}", fontsize=8)
    for row, name in enumerate(("image", "parts", "what stage 2 sees" if model.predictor else "patches of parts")):
        axes[row, 0].set_ylabel(name, fontsize=9)
    legend(figure, k)
    save(figure, path)


# ---------------------------------------------------------------- interventions
def framed(picture, left, top, side, colour, width):
    """A copy of picture (S, S, 3) with a square frame just inside left, top, left + side, top + side."""
    picture = picture.copy()
    inner = picture[top + width:top + side - width, left + width:left + side - width].copy()
    picture[top:top + side, left:left + side] = colour
    picture[top + width:top + side - width, left + width:left + side - width] = inner
    return picture


def mosaic(tiles, columns, gap=0.04):
    """Square tiles (s, s, 3) of one size -> one picture, `columns` to a row, white between and after the last."""
    side, rows = len(tiles[0]), -(-len(tiles) // columns)
    step = side + max(1, round(gap * side))
    canvas = np.ones((rows * step, columns * step, 3))
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        canvas[row * step:row * step + side, column * step:column * step + side] = tile
    return canvas


def neighbourhood(picture, patch, row, column, colour, around=2, least=160):
    """The patch at (row, column) of a picture with `around` patches on each side, framed; grey outside the picture."""
    padded = np.pad(picture, ((around * patch,) * 2, (around * patch,) * 2, (0, 0)), constant_values=0.8)
    side = (2 * around + 1) * patch
    tile = padded[row * patch:row * patch + side, column * patch:column * patch + side]
    zoom = -(-least // side)
    tile = tile.repeat(zoom, 0).repeat(zoom, 1)
    return framed(tile, around * patch * zoom, around * patch * zoom, patch * zoom, colour, max(2, len(tile) // 60))


@torch.no_grad()
def part_sheet(model, samples, part, census, title, path, device="cpu", columns=8):
    """What a part is: its strongest patch in each of 32 images, closest to the prototype first, and 8 whole images.

    census: closest, where and count, each (n, K), for the n samples. The 8 are spread over the images with this part.
    """
    colour, k, patch = part_colour(part), model.selector.k, model.selector.backbone.patch
    h, w = model.selector.backbone.grid
    have = (census.count[:, part] > 0).nonzero()[:, 0]
    figure, axes = plt.subplots(2, 1, figsize=(11, 9.6), height_ratios=(4, 2))
    if len(have):
        strongest = have[census.closest[have, part].argsort(stable=True)][:4 * columns].tolist()
        picture = {i: as_seen(model.selector, samples[i]["image"], samples.normalisation) for i in strongest}
        axes[0].imshow(mosaic([neighbourhood(picture[i], patch, *divmod(census.where[i, part].item(), w), colour)
                               for i in strongest], columns), interpolation="nearest")
        spread_out = have[torch.linspace(0, len(have) - 1, min(columns, len(have))).round().long()].tolist()
        images = torch.stack([samples[i]["image"] for i in spread_out])
        assigned = model.selector(images.to(device)).part_logits.argmax(1).view(-1, h, w).cpu().numpy()
        scenes = [as_seen(model.selector, x, samples.normalisation) for x in images]
        shown = [overlay(x, np.where(a == part, part, k), k) for x, a in zip(scenes, assigned)]
        blank = [np.ones_like(scenes[0])] * (columns - len(scenes))
        axes[1].imshow(mosaic([*scenes, *blank, *shown], columns), interpolation="nearest")
    axes[0].set_title("its strongest patch (framed) in each of these images, strongest first", fontsize=9, loc="left")
    axes[1].set_title("images with this part, spread over the split; below, its patches", fontsize=9, loc="left")
    for axis in axes:
        axis.axis("off")
    figure.suptitle(title, fontsize=11)
    figure.add_artist(plt.Rectangle((0, 0.985), 1, 0.015, color=colour))                 # the part's colour
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    save(figure, path)


@torch.no_grad()
def removals(model, samples, before, steps, path, device="cpu", count=8):
    """Images, their parts, and the parts after each step; patches that a step refuses are framed in white.

    before: limits (K,); steps: [(name, limits (K,))], mildest first. Half of the images lose most in the last step,
    half are spread over the split.
    """
    h, w = model.selector.backbone.grid
    k, patch, n = model.selector.k, model.selector.backbone.patch, len(samples)
    pick = torch.linspace(0, n - 1, min(n, 256)).round().long().unique().tolist()         # enough to find such images
    raw = torch.cat([model.selector(samples[i]["image"][None].to(device)).part_logits.cpu() for i in pick])
    parts_of = lambda limits: refuse(raw, limits).argmax(1)                              # (n, N)
    start = parts_of(before)
    lost = (parts_of(steps[-1][1]) != start).sum(1)
    most = lost.argsort(descending=True, stable=True)[:count // 2].tolist()
    others = torch.tensor([i for i in range(len(pick)) if i not in most])
    chosen = most + others[torch.linspace(0, len(others) - 1, min(len(others), count // 2)).round().long()].tolist()
    figure, axes = plt.subplots(2 + len(steps), len(chosen), figsize=(1.6 * len(chosen), 1.7 * (2 + len(steps)) + 0.6),
                                squeeze=False)
    rows = [("parts", start), *[(name, parts_of(limits)) for name, limits in steps]]
    for column, i in enumerate(chosen):
        sample = samples[pick[i]]
        picture = as_seen(model.selector, sample["image"], samples.normalisation)
        axes[0, column].imshow(picture, interpolation="nearest")
        axes[0, column].set_title(samples.group_names[sample["group"]].replace(" on ", "\non "), fontsize=8)
        for row, (name, assigned) in enumerate(rows, 1):
            shown = overlay(picture, assigned[i].view(h, w).numpy(), k)
            refused = (assigned[i] != start[i]).nonzero()[:, 0].tolist()
            for token in refused:
                shown = framed(shown, token % w * patch, token // w * patch, patch, 1.0, max(1, patch // 8))
            axes[row, column].imshow(shown, interpolation="nearest")
            if row > 1:
                axes[row, column].set_xlabel(f"{len(refused)} removed", fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for row, name in enumerate(("image", *[name for name, _ in rows])):
        axes[row, 0].set_ylabel(name, fontsize=9)
    figure.suptitle(f"left: the {len(most)} of {len(pick)} images that lose most; right: others, spread over the split",
                    fontsize=9)
    legend(figure, k)
    save(figure, path)


def growth(found, path):
    """Time and peak memory against tokens, K and batch, as speed.growth measures them; slopes in the legends."""
    figure, axes = plt.subplots(2, len(found), figsize=(3.6 * len(found), 6), sharex="col")
    for column, (name, rows) in enumerate(found.items()):
        for row, (unit, label, scale) in enumerate((("seconds", "seconds", 1), ("bytes", "peak memory, MB", 1e6))):
            for what, colour in zip(rows["exponents"], OKABE_ITO[4:]):
                if unit in rows["exponents"][what]:
                    axes[row, column].loglog(rows["x"], [y / scale for y in rows[what][unit]], "o-", color=colour,
                                             label=f"{what}: power {rows['exponents'][what][unit]:.2f}")
            axes[row, column].legend(fontsize=8)
            axes[row, 0].set_ylabel(label)
        axes[1, column].set_xlabel(name)
    figure.tight_layout()
    save(figure, path)


def legend(figure, k):
    """The colours of k parts along the bottom; everything else moves up."""
    handles = [plt.Rectangle((0, 0), 1, 1, color=part_colour(p)) for p in range(k)]
    names = [f"part {p}" for p in range(k)]
    figure.legend(handles, names, loc="lower center", ncols=min(k, 8), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.05 + 0.03 * ((k - 1) // 8), 1, 1))


def save(figure, path):
    """Write a figure as PNG, whole or not at all."""
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    plt.close(figure)
