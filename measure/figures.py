"""figures.py: the pictures that reports and notebooks share.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; a part has the same one everywhere, and
so has a kind of mask, whose bars differ in hatching too. With a path a figure is written to it; without, it is left
open, and a notebook shows it under its cell.
"""
import json
import os
import re
import textwrap

import matplotlib

NOTEBOOK = "MPLBACKEND" in os.environ                    # its kernel sets it
if not NOTEBOOK:
    matplotlib.use("Agg")                                # files, no window: also where there is no display
import matplotlib.pyplot as plt
import numpy as np
import torch

from benchmarks.samples import patch_keep
from ifam import refuse
from measure.leakage import pixel_gradient, pixels
from settings import write_whole

if NOTEBOOK:                                             # PNG files of grain are four times as large
    from matplotlib_inline.backend_inline import set_matplotlib_formats
    set_matplotlib_formats("jpeg", pil_kwargs={"quality": 85})

OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")
MASKS = {"none": ("#999999", ""), "late, soft": ("#E69F00", "//"), "late, hard": ("#D55E00", "//"),       # hatching
         "early, soft": ("#56B4E9", ".."), "early, hard": ("#0072B2", ""), "true": ("#009E73", "xx")}


def bar_style(name):
    """Colour and hatching of a kind of mask: that of the first key of MASKS that its name contains, else black."""
    colour, hatch = next((style for mask, style in MASKS.items() if mask in name), ("#000000", ""))
    return dict(color=colour, hatch=hatch, edgecolor="white", linewidth=0)


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


def short(name):
    """A class or group as a title: "012.Yellow_Warbler" -> "Yellow Warbler", a place on its own line."""
    return re.sub(r" (on|with|without) ", r"\n\1 ", re.sub(r"^\d+\.", "", name).replace("_", " "))


def only_kept(picture, keep):
    """What a mask leaves to see: picture (S, S, 3) with light grey where keep (h, w) is 0."""
    keep = spread(np.asarray(keep), len(picture))[..., None]
    return picture * keep + 0.93 * (1 - keep)


def spread_over_groups(samples, count):
    """`count` samples spread evenly over a split that is sorted by group -> list of samples."""
    order = torch.argsort(samples.groups, stable=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(count, len(order))).round().long()].tolist()
    return [samples[i] for i in chosen]


@torch.no_grad()
def parts(model, samples, path=None, device="cpu", count=8):
    """Images, their parts, and what stage 2 sees, for `count` images spread over the split and its groups."""
    batch = spread_over_groups(samples, count)
    out = model(torch.stack([b["image"] for b in batch]).to(device))
    guesses = samples.answers(out.logits.cpu()).tolist()
    (h, w), k = out.maps.shape[2:], out.maps.shape[1] - 1
    figure, axes = plt.subplots(3, len(batch), figsize=(1.6 * len(batch), 5.4), squeeze=False)
    for column, sample in enumerate(batch):
        picture = to_picture(sample["image"], samples.normalisation)
        keep = out.keep[column].clamp(0, 1).view(model.grid).cpu()
        assigned = out.part_logits[column].argmax(0).view(h, w).cpu().numpy()
        for row, shown in enumerate((picture, overlay(picture, assigned, k), only_kept(picture, keep))):
            axes[row, column].imshow(shown, interpolation="nearest")
            axes[row, column].set(xticks=[], yticks=[])
        axes[0, column].set_title(short(samples.group_names[sample["group"]]), fontsize=8)
        sign = "✓" if guesses[column] == sample["label"] else "✗"
        guess = short(samples.classes[guesses[column]]) if guesses[column] >= 0 else "another class"
        axes[2, column].set_xlabel(f"{sign} {guess}", fontsize=8)
    for row, name in enumerate(("image", "parts", "what stage 2 sees" if model.predictor else "patches of parts")):
        axes[row, 0].set_ylabel(name, fontsize=9)
    legend(figure, k)
    save(figure, path)


# ---------------------------------------------------------------- pictures side by side
def grid(rows, titles=(), path=None, side=1.6, k=0):
    """{name: [picture (S, S, 3), ...]} -> a row of pictures for each name. titles: of the columns; k: legend of parts.

    A picture may come with a line of text: (picture, text), written under it. None leaves its place empty.
    """
    columns = max(map(len, rows.values()))
    texts = any(isinstance(picture, tuple) for pictures in rows.values() for picture in pictures)
    figure, axes = plt.subplots(len(rows), columns, squeeze=False, layout="constrained" if not k else None,
                                figsize=(side * columns, (side + 0.25 * texts) * len(rows) + 0.3 + 0.3 * bool(k)))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
    for line, (name, pictures) in zip(axes, rows.items()):
        for axis, picture in zip(line, pictures):
            picture, text = picture if isinstance(picture, tuple) else (picture, "")
            if picture is not None:
                axis.imshow(picture, interpolation="nearest", cmap="magma", vmin=0)
            axis.set_xlabel(text, fontsize=8)
        line[0].set_ylabel(name, fontsize=9)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    if k:
        legend(figure, k)
    save(figure, path)


def examples(samples, path=None, count=6):
    """The first `count` images of each group, a row each: is the shortcut visible?"""
    rows = {}
    for g, name in enumerate(samples.group_names):
        mine = (samples.groups == g).nonzero()[:, 0]
        if len(mine):
            rows[f"{short(name)}\n(n = {len(mine)})"] = [
                to_picture(samples[i]["image"], samples.normalisation) for i in mine[:count].tolist()]
    grid(rows, path=path, side=1.3)


def outlined(picture, keep):
    """Picture (S, S, 3), three times as large, with a white line around the patches that keep (h, w) keeps."""
    large, shown = picture.repeat(3, 0).repeat(3, 1), spread(keep > 0, 3 * len(picture))
    edge = np.zeros_like(shown)
    edge[1:] |= shown[1:] != shown[:-1]
    edge[:, 1:] |= shown[:, 1:] != shown[:, :-1]
    for thin in (edge, edge.T):                          # four pixels wide: a figure shows every second or so
        thin[1:] |= thin[:-1].copy()
        thin[:-2] |= thin[2:].copy()
    large[edge] = 1
    return large


def signed(values):
    """(h, w) -> (h, w, 3): white is 0, blue below, red above; the largest is the strongest."""
    values = np.asarray(values)
    return matplotlib.colormaps["RdBu_r"](0.5 + 0.5 * values / max(abs(values).max(), 1e-12))[..., :3]


def heat(picture, values, keep=None, largest=None):
    """A heat-map over a grey picture (S, S, 3): values (S, S) >= 0, `largest` (default: theirs) is the brightest.

    keep (h, w), if given, is outlined in white.
    """
    values = np.asarray(values)
    strength = np.sqrt(np.clip(values / max(largest or values.max(), 1e-12), 0, 1))[..., None]   # sqrt: faint is seen
    grey = 0.5 * picture.mean(2, keepdims=True).repeat(3, 2)
    shown = (1 - strength) * grey + strength * matplotlib.colormaps["plasma"](0.35 + 0.65 * strength[..., 0])[..., :3]
    return shown if keep is None else outlined(shown, keep)


@torch.no_grad()
def compare_parts(models, samples, path=None, device="cpu", count=8):
    """The parts of several models on the same images, a row each. models: {name: model with a selector}."""
    batch = spread_over_groups(samples, count)
    images = torch.stack([b["image"] for b in batch])
    pictures = [to_picture(x, samples.normalisation) for x in images]
    rows, most = {"image": pictures}, max(model.selector.k for model in models.values())
    for name, model in models.items():
        assigned = model.selector(images.to(device)).part_logits.argmax(1).unflatten(1, model.selector.backbone.grid)
        rows[name] = [overlay(*both, model.selector.k) for both in zip(pictures, assigned.cpu().numpy())]
    grid(rows, path=path, side=1.2, k=most)


def coarse(values, cell):
    """(S, S) -> (S, S): means over square cells, so that a noisy gradient can be read."""
    means = torch.nn.functional.avg_pool2d(values[None], cell)[0]
    return spread(means.numpy(), len(values))


def gradients(classifiers, samples, backbone, path=None, device="cpu", count=5, indices=None):
    """Where does the largest logit look, the mask held fixed? A row of heat-maps for each {name: leakage.Classifier}.

    Gradients are averaged over quarters of a patch and scaled to their maximum in the image; white lines surround what
    is not hidden; the text is the share of the gradient at hidden pixels. indices: which samples; default: `count`,
    spread over the groups.
    """
    batch = [samples[i] for i in indices] if indices else spread_over_groups(samples, count)
    images = torch.stack([b["image"] for b in batch]).to(device)
    truth = patch_keep(torch.stack([b["mask"] for b in batch]), backbone.patch).to(device) if samples.masks else None
    pictures = [to_picture(x, samples.normalisation) for x in images]
    rows = {"image": pictures}
    for name, classifier in classifiers.items():
        with torch.no_grad():
            keep, held = classifier.find(images, truth)
        looks = pixel_gradient(lambda x: classifier.head(classifier.features(x, held)).amax(1, keepdim=True), images)
        shown = [coarse(x, backbone.patch // 2) for x in looks.cpu()]
        hidden = pixels(keep, backbone.grid, backbone.patch)[:, 0] == 0
        outside = (looks * hidden).sum((1, 2)) / looks.sum((1, 2)).clamp_min(1e-12)
        rows[name.replace(" (", "\n(")] = [
            (heat(*what), f"{share:.0%} outside") for *what, share in
            zip(pictures, shown, keep.cpu().unflatten(1, backbone.grid).numpy(), outside.tolist())]
    grid(rows, [short(samples.group_names[b["group"]]) for b in batch], path, side=1.5)


# ---------------------------------------------------------------- charts
def wilson(share, n, z=1.96):
    """95 % interval of a share of n (Wilson, 1927): it stays in [0, 1] and has a width at 0 and 1 too."""
    middle, half = (share + z * z / (2 * n)), z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def group_bars(groups, path=None, chance=None):
    """Accuracy by group, a bar for each model, with 95 % intervals over images (Wilson).

    groups: {name of a model: {group: {"n", "accuracy"}}}, as in report.json; the name says which kind of mask it has.
    """
    names = [g for g, x in next(iter(groups.values())).items() if x["n"]]
    figure, axis = plt.subplots(figsize=(min(max(6, 1.9 * len(names)), 10), 3.2), layout="constrained")
    width = 0.8 / len(groups)
    for i, (model, found) in enumerate(groups.items()):
        share, n = (np.array([found[g][key] for g in names], float) for key in ("accuracy", "n"))
        low, high = wilson(share, n)
        axis.bar(np.arange(len(names)) + (i - (len(groups) - 1) / 2) * width, share, width * 0.92, label=model,
                 yerr=(np.maximum(share - low, 0), np.maximum(high - share, 0)), capsize=2, error_kw=dict(lw=1),
                 **bar_style(model))
    if chance is not None:
        axis.axhline(chance, color="black", lw=0.8, ls=":")
    few = len(names) < 5
    axis.set_xticks(range(len(names)), [g.replace(" ", "\n", 1) if few else g for g in names], fontsize=9,
                    **({} if few else dict(rotation=20, ha="right")))
    axis.set(ylabel="accuracy", ylim=(0, 1.02))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, ncols=len(groups), loc="lower center", bbox_to_anchor=(0.5, 1))
    save(figure, path)


def ladder(measures, path=None):
    """Small multiples, one for each measure, a bar for each kind of mask: {measure: {name of a mask: number}}."""
    figure, axes = plt.subplots(1, len(measures), figsize=(2.5 * len(measures), 2.4), sharey=True, squeeze=False,
                                layout="constrained")
    for axis, (measure, values) in zip(axes[0], measures.items()):
        largest = max(max(values.values()), 1e-9)
        for name, value in values.items():
            axis.barh(name, value, 0.75, **bar_style(name))
            digits = "0" if value == 0 else f"{value:.3g}" if value >= 10 else f"{value:.2g}"
            axis.text(value + 0.03 * largest, name, digits, va="center", fontsize=8)
        axis.set_title(textwrap.fill(measure, 22), fontsize=9)
        axis.set(xlim=(0, 1.3 * largest), xticks=[])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0, 0].invert_yaxis()                            # the first at the top
    save(figure, path)


def curves(series, x, y, path=None, chance=None):
    """Lines over 0, 1, 2, ...: {name: [number, ...]}; a name with a kind of mask in it has that mask's colour."""
    figure, axis = plt.subplots(figsize=(5.4, 3.2), layout="constrained")
    for (name, values), marker in zip(series.items(), "os^Dvx"):
        axis.plot(values, marker + "-", ms=5, color=bar_style(name)["color"], label=name)
    if chance is not None:
        axis.axhline(chance, color="black", lw=0.8, ls=":", label="chance")
    axis.set(xlabel=x, ylabel=y, xticks=range(max(map(len, series.values()))))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
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
def part_sheet(model, samples, part, census, title, path=None, device="cpu", columns=8):
    """What a part is: its strongest patch in each of up to 32 images, closest to the prototype first, and 8 images.

    census: closest, where and count, each (n, K), for the n samples. The 8 are spread over the images with this part.
    """
    colour, k, patch = part_colour(part), model.selector.k, model.selector.backbone.patch
    h, w = model.selector.backbone.grid
    have = (census.count[:, part] > 0).nonzero()[:, 0]
    rows = min(4, -(-len(have) // columns))              # of strongest patches
    figure, axes = plt.subplots(2, 1, figsize=(11, 3.2 + 1.6 * rows), height_ratios=(max(rows, 0.1), 2))
    if len(have):
        strongest = have[census.closest[have, part].argsort(stable=True)][:rows * columns].tolist()
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
        axes[0].set_title("its strongest patch (framed) in each of these images, strongest first", fontsize=9,
                          loc="left")
        axes[1].set_title("images with this part, spread over the split; below, its patches", fontsize=9, loc="left")
    else:
        axes[1].text(0.5, 0.5, "no patch of any image goes to this part", ha="center", fontsize=11)
    for axis in axes:
        axis.axis("off")
    figure.suptitle(title, fontsize=11)
    figure.add_artist(plt.Rectangle((0, 0.985), 1, 0.015, color=colour))                 # the part's colour
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    save(figure, path)


@torch.no_grad()
def removals(model, samples, before, steps, path=None, device="cpu", count=8):
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
        axes[0, column].set_title(short(samples.group_names[sample["group"]]), fontsize=8)
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


def growth(found, path=None):
    """Time and peak memory against tokens, K and batch, as speed.growth measures them; fitted powers in the legends.

    Axes are logarithmic, with thin lines of slope 1 and 2 below; but linear from 0 for K, which costs hardly anything.
    """
    labels = {"tokens": "tokens of an image", "K": "K, foreground parts", "batch": "images in a batch"}
    figure, axes = plt.subplots(2, len(found), figsize=(3.6 * len(found), 6), sharex="col", layout="constrained")
    for (name, rows), column in zip(found.items(), axes.T):
        x, powers = np.array(rows["x"]), rows["exponents"]
        for axis, unit, label, scale in zip(column, ("seconds", "bytes"), ("Time, ms", "Peak memory, MB"), (1e3, 1e-6)):
            curves = {what: scale * np.array(rows[what][unit]) for what in powers if unit in powers[what]}
            for (what, y), colour in zip(curves.items(), OKABE_ITO[4:]):
                fitted = "" if name == "K" else f", power {powers[what][unit]:.2f}"
                axis.plot(x, y, "o-", color=colour, label=what + fitted)
            low, top = (bound([bound(y) for y in curves.values()] or [1]) for bound in (min, max))
            if name == "K":
                axis.set(ylim=(0, 1.4 * top))
            else:
                axis.set(xscale="log", yscale="log", ylim=(0.3 * low, 5 * top))
                for slope, offset in ((1, (4, -14)), (2, (-14, -2))):     # from below the lowest point to the edge
                    right = min(x[-1], x[0] * (10 * top / low) ** (1 / slope))
                    end = right, 0.5 * low * (right / x[0]) ** slope
                    axis.plot([x[0], right], [0.5 * low, end[1]], color="0.6", lw=0.8, zorder=0)
                    axis.annotate(f"slope {slope}", end, offset, textcoords="offset points", fontsize=7, color="0.4",
                                  ha="right")
            axis.set(title=f"{label.partition(',')[0]} against {name}", ylabel=label)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(fontsize=8, frameon=False, loc="upper left")
        column[-1].set_xlabel(labels[name])
        column[-1].set_xticks(x, x)
        column[-1].xaxis.minorticks_off()
    save(figure, path)


def training_curves(log, path=None):
    """What a run's log.jsonl tells: loss terms, accuracy and worst group of validation, learning rates, over steps."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps, scores = [x for x in lines if "loss" in x], [x for x in lines if "val" in x]
    known = ("step", "epoch", "lr", "accuracy", "gradient_norm", "images_per_second", "waiting")
    figure, (losses, accuracy, rates) = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    at = [x["step"] for x in steps]
    for name in steps[0].keys() - {*known} if steps else ():
        losses.plot(at, [x[name] for x in steps], lw=2.5 if name == "loss" else 1, label=name)
    accuracy.plot(at, [x["accuracy"] for x in steps], lw=1, color="0.7", label="training, this step")
    for name, label in (("aa", "validation"), ("worst_group", "validation, worst group")):
        accuracy.plot([x["step"] for x in scores], [x["val"][name] for x in scores], "o-", label=label)
    for name in steps[0]["lr"] if steps else ():
        rates.semilogy(at, [max(x["lr"][name], 1e-12) for x in steps], label=name)
    for axis, title in ((losses, "loss and its terms, unweighted"), (accuracy, "accuracy"), (rates, "learning rate")):
        axis.set(title=title, xlabel="step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    save(figure, path)


def legend(figure, k):
    """The colours of k parts along the bottom; everything else moves up."""
    handles = [plt.Rectangle((0, 0), 1, 1, color=part_colour(p)) for p in range(k)]
    names = [f"part {p}" for p in range(k)]
    figure.legend(handles, names, loc="lower center", ncols=min(k, 8), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.05 + 0.03 * ((k - 1) // 8), 1, 1))


def save(figure, path):
    """Write a figure as PNG, whole or not at all. path None: leave it open, for a notebook."""
    if path is not None:
        write_whole(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
        plt.close(figure)
