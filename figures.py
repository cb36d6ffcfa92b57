"""figures.py: the pictures that reports and notebooks share.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; a part has the same one everywhere.
"""
import matplotlib

matplotlib.use("Agg")                                    # files, no window: also where there is no display
import matplotlib.pyplot as plt
import numpy as np
import torch

from settings import write_whole

OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")


def part_colour(k):
    """Colour of part k, RGB in [0, 1]; after eight parts the same hues come again, darker."""
    return np.array(matplotlib.colors.to_rgb(OKABE_ITO[k % 8])) * 0.6 ** (k // 8)


def to_picture(image, normalisation):
    """Normalised (3, S, S) -> (S, S, 3) in [0, 1]."""
    mean, std = (torch.tensor(x)[:, None, None] for x in normalisation)
    return (image.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def spread(patches, size):
    """(h, w, ...) -> (size, size, ...): every patch as a square of its value."""
    return patches.repeat(size // patches.shape[0], 0).repeat(size // patches.shape[1], 1)


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
    h, w = out.maps.shape[2:]
    k = out.maps.shape[1] - 1
    figure, axes = plt.subplots(3, len(batch), figsize=(1.6 * len(batch), 5.4), squeeze=False)
    for column, sample in enumerate(batch):
        picture = to_picture(sample["image"], samples.normalisation)
        keep = spread(out.keep[column].clamp(0, 1).view(h, w).cpu().numpy(), len(picture))[..., None]
        assigned = out.part_logits[column].argmax(0).view(h, w).cpu().numpy()
        guess = samples.classes[out.logits[column].argmax().item()]
        for row, shown in enumerate((picture, overlay(picture, assigned, k), picture * keep + 0.93 * (1 - keep))):
            axes[row, column].imshow(shown, interpolation="nearest")
            axes[row, column].set(xticks=[], yticks=[])
        axes[0, column].set_title(samples.group_names[sample["group"]].replace(" on ", "\non "), fontsize=8)
        sign = "✓" if guess == samples.classes[sample["label"]] else "✗"
        axes[2, column].set_xlabel(f"{sign} {guess}", fontsize=8)
    for row, name in enumerate(("image", "parts", "what stage 2 sees" if model.predictor else "patches of parts")):
        axes[row, 0].set_ylabel(name, fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=part_colour(p)) for p in range(k)]
    names = [f"part {p}" for p in range(k)]
    figure.legend(handles, names, loc="lower center", ncols=min(k, 8), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.05 + 0.03 * ((k - 1) // 8), 1, 1))
    save(figure, path)


def save(figure, path):
    """Write a figure as PNG, whole or not at all."""
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    plt.close(figure)
