"""shape.py: how much a mask may tell by its area, its position and its form alone.

    shape_probes(keep, place, grid)                      # accuracies at reading the place from properties of masks

Floor: measuring. Read probes.py before and ifam.components; leakage.py has the probe of the whole mask, which this
takes apart. An early mask hides every pixel outside it, and shows its own shape: where the background decides what is
kept (water that is taken for a part of the bird, a hole where something stands before it), the mask still tells the
place. Nothing is drawn at random. Letters: n images, N = h*w patches.
"""
import torch
import torch.nn.functional as F

from ifam import components, largest_component
from measure.probes import kernel_head, linear_probe


# ---------------------------------------------------------------- what a mask is
SHAPE = {   # what the probes read, beside the whole mask; as the table of evaluate.py calls it
    "area": "its area", "position": "its centroid", "extent": "height and width of its box",
    "centred": "the mask moved to the middle", "largest": "its largest component",
    "largest_centred": "that component, moved to the middle", "removed": "all but the largest component",
    "holes": "its holes", "true_mask": "the true mask"}


def area(keep):
    """How many patches are kept: (n, N) in {0, 1} -> (n, 1)."""
    return keep.sum(1, keepdim=True)


def position(keep, grid):
    """The centroid of the kept patches, row and column from the middle of the grid: (n, N) -> (n, 2), 0 for none."""
    return torch.stack([(keep * at).sum(1) for at in places(keep, grid)], 1) / area(keep).clamp_min(1)


def places(keep, grid):
    """Row and column of each patch, counted from the middle of the grid: twice (N,)."""
    axes = [torch.arange(n, dtype=keep.dtype, device=keep.device) - (n - 1) / 2 for n in grid]
    return [x.flatten() for x in torch.meshgrid(*axes, indexing="ij")]


def extent(keep, grid):
    """Height and width of the box around the kept patches, in patches: (n, N) -> (n, 2), 0 for none."""
    rows, columns = (keep.unflatten(1, grid).amax(axis) for axis in (2, 1))
    span = lambda x: ((x.cumsum(1) > 0) & (x.flip(1).cumsum(1).flip(1) > 0)).sum(1)
    return torch.stack([span(rows), span(columns)], 1).to(keep.dtype)


def centred(keep, grid):
    """Masks moved by whole patches so that the centroid is nearest to the middle of the grid: (n, N) -> (n, N).

    Of two places as near it takes the lower or the right one. What is moved out of the grid is lost.
    """
    h, w = grid
    down, right = (0.5 - position(keep, grid)).floor().long().unbind(1)
    row = torch.arange(h, device=keep.device) - down[:, None]                    # where each row comes from
    column = torch.arange(w, device=keep.device) - right[:, None]
    there = ((row >= 0) & (row < h))[:, :, None] & ((column >= 0) & (column < w))[:, None]
    source = row.clamp(0, h - 1)[:, :, None] * w + column.clamp(0, w - 1)[:, None]
    return keep.gather(1, source.flatten(1)) * there.flatten(1)


def holes(keep, grid):
    """Patches that are not kept and that kept ones close in: (n, N) -> (n, N) in {0, 1}.

    Closed in: no path over patches that share a side, and are not kept, leads out of the grid.
    """
    free = F.pad(1 - keep.unflatten(1, grid), (1, 1, 1, 1), value=1.0)          # a border that is outside
    outside = components(free.flatten(1), free.shape[1:]) == 0
    outside = outside.unflatten(1, free.shape[1:])[:, 1:-1, 1:-1].flatten(1)
    return (1 - keep) * ~outside


def properties(keep, grid):
    """What the probes read of masks (n, N) in {0, 1} -> {name: (n, d)}."""
    largest = largest_component(keep, grid)
    return {"mask": keep, "area": area(keep), "position": position(keep, grid), "extent": extent(keep, grid),
            "centred": centred(keep, grid), "largest": largest, "largest_centred": centred(largest, grid),
            "removed": keep - largest, "holes": holes(keep, grid)}


# ---------------------------------------------------------------- how much it tells
def shape_probes(keep, place, grid, true=None):
    """How well properties of masks tell the place of an image -> dict for report.json.

    keep (n, N) in {0, 1}, place (n,) numbers, true (n, N): the true masks, where there are any. {property: accuracy of
    linear_probe}, "kernel": the same of a probe that is not linear, "lost": share of the kept patches that `centred`
    moves out of the grid, "pieces": connected parts of a mask, on average. Accuracies are None for few images.
    """
    keep = keep.double()
    found = properties(keep, grid) | ({} if true is None else {"true_mask": true})
    number = components(keep, grid)
    first = number == torch.arange(number.shape[1], device=keep.device)
    return {**{name: linear_probe(x, place) for name, x in found.items()},
            "kernel": {name: linear_probe(x, place, kernel_head) for name, x in found.items()},
            "lost": (1 - found["centred"].sum() / keep.sum().clamp_min(1)).item(),
            "pieces": first.sum(1).double().mean().item()}
