"""samples.py: one split of a benchmark, image by image, and the order in which training sees it.

Randomness is a function: how a sample is augmented depends on (seed, epoch, sample id) and on nothing else, so results
do not depend on workers, processes or resuming. Coordinates of keypoints and boxes are x (column), y (row) in pixels.

Floor: data. Read this first of the data, then transforms.py.
"""
import copy
import functools
import hashlib
import math
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.files import exists, read_image
from benchmarks.transforms import FINE_GRAINED, View, squash, to_tensor, window
from settings import UsageError


def patch_keep(masks, patch, rule="half"):
    """Masks (B, S, S) in {0, 1} -> keep (B, N), by one of two rules.

    half: 1 where more than half of a patch is object; an object that no patch holds enough of keeps its best patch.
    centre: 1 where the pixel at a patch's centre is object, which is how iFAM's code reads a mask ("nearest-exact"); a
    small object may keep nothing. A mask without any object keeps nothing.
    """
    if rule == "centre":
        return masks[:, patch // 2::patch, patch // 2::patch].flatten(1).float()
    cover = torch.nn.functional.avg_pool2d(masks[:, None].float(), patch).flatten(1)
    keep = cover > 0.5
    small = (~keep.any(1) & (cover > 0).any(1)).nonzero()[:, 0]
    keep[small, cover.argmax(1)[small]] = True
    return keep.float()


def patch_share(masks, grid):
    """Masks (B, S, S) in {0, 1} -> how much of each patch of a grid (h, w) is object (B, h*w), in [0, 1]."""
    return torch.nn.functional.adaptive_avg_pool2d(masks[:, None].float(), grid).flatten(1)


def boxes_of(masks):
    """Masks (B, S, S) in {0, 1} -> the smallest box around each, filled, of the same kind; an empty one stays empty."""
    def span(some):                                      # (B, S): from the first to the last
        return some.cummax(1).values * some.flip(1).cummax(1).values.flip(1)
    rows, columns = (span((masks > 0).any(axis).long()) for axis in (2, 1))
    return (rows[:, :, None] * columns[:, None]).to(masks.dtype)


class Names:
    """File names in one block of bytes: ImageNet's 1.28 million are one object, not a million.

    names[i] is a Path below `base`, or plain text where that is None (names.ids); names[several] are Names.
    """

    def __init__(self, base, block):
        self.base, self.block, self.ids = base, block, self if base is None else Names(None, block)

    def __len__(self):
        return len(self.block)

    def __getitem__(self, i):
        if not isinstance(i, (int, np.integer)):
            return Names(self.base, self.block[i])
        name = os.fsdecode(bytes(self.block[i]))
        return self.base / name if self.base else name


def pick(values, indices):
    """The entries of a list, a tensor or Names at these indices; None stays None."""
    if values is None or isinstance(values, (torch.Tensor, Names)):
        return values if values is None else values[indices]
    return [values[i] for i in indices]


SMALL = 1 << 27            # bytes: a split whose images take less at the model's size stays decoded, up to as much


class Samples(torch.utils.data.Dataset):
    """One split of a benchmark. groups[i] = label * len(places) + place; places is () where there are none.

    samples[epoch, i] is sample i as augmented in that epoch; samples[i] the evaluation view, with
    "mask" (S, S) uint8, "points" (P, 3) and "box" (4,) where the benchmark has them. train_masks: True adds the mask
    to augmented samples too. found (n, bytes): masks that a model found in the whole pictures, a bit for each of the
    found_grid patches; augmented samples have theirs as "found" (S, S), augmented alike. hidden (n, bytes) and
    hidden_grid: the same of patches of the evaluation view, which are black in augmented samples and "hidden" there.
    merge (outputs,): the class that each output of the model stands for, -1 for none, where a model of another
    benchmark is evaluated. Raises UsageError for an unreadable file.
    """
    train_masks = False
    found = found_grid = hidden = hidden_grid = None
    masks_tell = False          # True: masks mark what makes the label, so that no model may be given them
    partial = False             # True: some of the classes are not there on purpose
    checked = False             # True: every file was looked at (folder.survey)
    draft = False               # True: training decodes large JPEG files smaller, if no mask is asked for
    upright = False             # True: pictures are turned as their EXIF orientation says
    differs = ""                # how this split is not the published one; data.load says it
    pipeline = FINE_GRAINED     # data.read gives that of the benchmark

    def __init__(self, name, split, size, classes, ids, paths, labels, places=(), groups=None, masks=None,
                 points=None, boxes=None, seed=0, merge=None, attributes=None):
        self.name, self.split, self.size, self.seed, self.merge = name, split, size, seed, merge
        self.title = name                                # of a folder of one's own, that of the folder
        self.classes, self.places = tuple(classes), tuple(places)
        self.ids, self.paths, self.masks, self.points, self.boxes = ids, paths, masks, points, boxes
        self.attributes = attributes                     # [(CUB's folder, id there)]: what read_attributes needs
        self.labels = torch.as_tensor(labels, dtype=torch.long)
        self.groups = self.labels if groups is None else torch.as_tensor(groups, dtype=torch.long)
        self.decoded, self.room = {}, SMALL              # (path, mode, least): picture, of a small split; bytes left
        self.group_names = [f"{c} {p}" for c in self.classes for p in self.places] or list(self.classes)

    def __len__(self):
        return len(self.ids)

    @property
    def normalisation(self):
        return self.pipeline.normalisation

    @property
    def outputs(self):
        """Outputs that a model needs to be evaluated here."""
        return len(self.classes) if self.merge is None else len(self.merge)

    def answers(self, logits):
        """The class that each row of logits (n, outputs) votes for, -1 where that is none of these classes."""
        guess = logits.argmax(1)
        return guess if self.merge is None else self.merge[guess]

    def described(self):
        """What a checkpoint says of the images that it was trained on: enough to show it others."""
        return {"classes": list(self.classes), "places": list(self.places), "pipeline": self.pipeline.name}

    def digest(self):
        """What tells these images from others: 16 hexadecimal digits of a SHA-256 of their ids, in order."""
        ids = self.ids.block.tolist() if isinstance(self.ids, Names) else map(os.fsencode, self.ids)
        return hashlib.sha256(b"\n".join(ids)).hexdigest()[:16]

    def keep(self, indices):
        """These samples only, in this order."""
        for key in ("ids", "paths", "labels", "groups", "masks", "found", "hidden", "points", "boxes", "attributes"):
            setattr(self, key, pick(getattr(self, key), indices))
        return self

    def part(self, split, indices):
        """These samples as another split."""
        other = copy.copy(self)
        other.split = split
        return other.keep(indices)

    def first(self, n):
        """Keep n samples only, spread evenly: files are often sorted by class. All of them if n is 0."""
        return self.keep([i * len(self) // n for i in range(n)]) if 0 < n < len(self) else self

    def whole(self):
        """The same pictures without annotations, each squashed whole into the square that a model sees."""
        other = copy.copy(self)
        other.pipeline = self.pipeline._replace(evaluate=squash)
        other.masks = other.points = other.boxes = other.found = other.hidden = None
        return other

    def marks(self, i, view):
        """All masks of picture i in one, which is augmented with it: 1 true object, 2 found, 4 hidden, or their sum."""
        size = view.image.size
        marks = np.zeros(size[::-1], np.uint8) if view.mask is None else np.uint8(np.asarray(view.mask) > 0)
        for bit, masks, grid in ((2, self.found, self.found_grid), (4, self.hidden, self.hidden_grid)):
            if masks is not None:
                patches = np.unpackbits(masks[i].numpy(), count=math.prod(grid)).reshape(grid)
                place = (0, 0, *size) if bit == 2 else self.seen(size)
                layer = Image.new("L", size)
                layer.paste(Image.fromarray(patches).resize((place[2] - place[0], place[3] - place[1]),
                                                            Image.Resampling.NEAREST), place[:2])
                marks = marks + bit * np.asarray(layer)
        return marks

    def seen(self, size):
        """What the evaluation view shows of a picture (width, height) -> left, top, right, bottom in whole pixels."""
        view = View(Image.new("L", size), box=(0, 0, *size))
        self.pipeline.evaluate(view, self.size)
        return tuple(round(share * side) for share, side in zip(window(view, self.size), (*size, *size)))

    def on_disk(self):
        """Are all images there? Names come from listing the folder, so they are."""
        return isinstance(self.paths, Names) or all(exists(path) for path in self.paths)

    def check(self):
        """Every image is there and is one, and so is every mask; or a UsageError names the first that is not.

        Only headers are read: pixels that do not decode stop the run when they are needed. Of Names, which come from
        listing a folder, not even those: a million would take an hour.
        """
        for what, paths in (("image", self.paths), ("mask", self.masks or ())) if not self.checked else ():
            for name, path in zip(self.ids, () if isinstance(paths, Names) else paths):
                path = getattr(path, "path", path)       # None: runs of a csv that has been read
                if path and not exists(path):
                    raise UsageError(f"{self.name}: {what} of sample {name} ({self.split}) is missing: {path}; "
                                     "unpack the archive again or remove its row")
                path and read_image(path)

    def read(self, path, mode, least=0):
        """read_image; a small split keeps its pictures while there is room. They are shared: steps make new ones."""
        if (path, mode, least) in self.decoded:
            return self.decoded[path, mode, least]
        picture = read_image(path, mode, self.upright, least)
        size = len(mode) * picture.width * picture.height                        # "L", "RGB": a byte a letter
        if 3 * self.size ** 2 * len(self) <= SMALL and size <= self.room and isinstance(path, Path):
            self.decoded[path, mode, least], self.room = picture, self.room - size
        return picture

    def __getitem__(self, key):
        epoch, i = key if isinstance(key, tuple) else (None, key)
        mask = self.masks and (epoch is None or self.train_masks)    # most methods train on images and labels alone
        least = self.size if self.draft and epoch is not None and not mask else 0
        view = View(self.read(self.paths[i], "RGB", least), self.read(self.masks[i], "L") if mask else None,
                    *(x[i] if x and epoch is None else None for x in (self.points, self.boxes)))
        if view.mask and view.mask.size != view.image.size:
            raise UsageError(f"mask {self.masks[i]} is {view.mask.size}, its image {view.image.size}; unpack both "
                             "again")
        marked = epoch is not None and (self.found is not None or self.hidden is not None)
        if marked:
            marks = self.marks(i, view)
            view.mask = Image.fromarray(marks)
            view.image = Image.fromarray(np.where(marks[..., None] < 4, np.asarray(view.image), np.uint8(0)))
        if epoch is not None:
            rng = np.random.default_rng([self.seed, epoch, zlib.crc32(os.fsencode(self.ids[i]))])
            self.pipeline.train(view, self.size, rng)
        else:
            try:
                self.pipeline.evaluate(view, self.size)
            except ValueError as error:
                raise UsageError(f"cannot use image {self.paths[i]}: {error}") from None
        sample = {"label": int(self.labels[i]), "group": int(self.groups[i]), "id": self.ids[i],
                  "image": to_tensor(view.image, self.normalisation)}
        if marked:
            marks = np.asarray(view.mask)
            sample |= {name: torch.from_numpy(marks // bit % 2) for name, bit in (("found", 2), ("hidden", 4))
                       if getattr(self, name) is not None}
            view.mask = Image.fromarray(marks % 2) if mask else None
        if view.mask:
            # CUB's masks are soft (how many annotators agree): any agreement is object, as published
            sample["mask"] = torch.from_numpy((np.asarray(view.mask) > 0).astype(np.uint8))
        annotated = {"points": view.points, "box": view.box}
        return sample | {name: torch.from_numpy(at).float() for name, at in annotated.items() if at is not None}


def evenly(indices, count):
    """`count` of these indices, spread evenly; all of them if there are fewer. -> list"""
    return indices[torch.linspace(0, len(indices) - 1, min(count, len(indices))).round().long()].tolist()


def balanced(groups):
    """Indices (m,) of samples with groups (n,) in which each group is as frequent as the largest: rare ones repeat."""
    counts = torch.bincount(groups)
    each = [(groups == g).nonzero()[:, 0] for g in counts.nonzero()[:, 0]]
    return torch.cat([mine[torch.arange(int(counts.max())) % len(mine)] for mine in each]).sort().values


def spread_over_groups(samples, count):
    """`count` samples spread evenly over a split that is sorted by group -> list of samples."""
    return [samples[i] for i in evenly(torch.argsort(samples.groups, stable=True), count)]


def describe(samples):
    """One line: images, classes or groups, and how many of each where they are few."""
    counts = torch.bincount(samples.groups, minlength=len(samples.group_names)).tolist()
    seen, known = len(samples.labels.unique()), len(samples.classes)
    named = f"{seen} of " * (seen < known) + f"{known} classes"
    if len(counts) <= 9:
        named = ", ".join(f"{n} {g}" for n, g in zip(counts, samples.group_names))
    return f"{samples.title} {samples.split}: {len(samples)} images ({named})"


def crosstab(splits):
    """How often each class meets each place, {name: Samples} -> text: a shortcut is a table that is nearly diagonal."""
    places = list(dict.fromkeys(place for samples in splits.values() for place in samples.places or ("all",)))
    wide, column = (max([least, *(len(name) + 2 for name in names)]) for least, names in (
        (18, (name for samples in splits.values() for name in samples.classes)), (16, places)))
    lines = [" " * (14 + wide) + "".join(f"{place:>{column}}" for place in places)]
    for name, samples in splits.items():
        counts = torch.bincount(samples.groups, minlength=len(samples.group_names)).view(len(samples.classes), -1)
        for label in samples.labels.unique().tolist():
            row = dict(zip(samples.places or ("all",), counts[label].tolist()))
            lines.append(f"{name:14}{samples.classes[label]:{wide}}"
                         + "".join(f"{row.get(p, '-'):>{column}}" for p in places))
    return "\n".join(lines)


def stratified(labels, share, seed=0):
    """Hold out `share` of each class, at least one image -> (indices that stay, indices held out), both sorted.

    The seed is that of the split and not of a run: all runs validate on the same images.
    """
    held = []
    for label in labels.unique().tolist():
        mine = np.random.default_rng([seed, label]).permutation((labels == label).nonzero()[:, 0].numpy())
        held += mine[:max(1, round(share * len(mine)))].tolist()
    return sorted(set(range(len(labels))) - set(held)), sorted(held)


AGAIN = 10 ** 6                                          # more than --epochs can be


class Plan(torch.utils.data.Sampler):
    """Which samples this process sees at each step: a list of (epoch, index) per step, for steps start..stop.

    The global batch of a step is the same however many processes share it; each takes one contiguous slice. What is
    left over at the end of an epoch is dropped (another set each epoch). shares (count,): the chance of each sample at
    every draw, with replacement; None: each once an epoch. The second time that an epoch draws a sample it is augmented
    as in epoch + AGAIN, the third time as in epoch + 2 AGAIN, so that copies differ.
    """

    def __init__(self, count, batch, start, stop, seed=0, rank=0, world=1, shares=None):
        self.count, self.batch, self.start, self.stop, self.shares = count, batch, start, stop, shares
        self.seed, self.rank, self.world, self.per_epoch = seed, rank, world, count // batch
        self.order = functools.lru_cache(2)(self.order)  # of the epoch that trains, and of the one that loads

    def __len__(self):
        return self.stop - self.start

    def order(self, epoch):
        """-> the samples of an epoch in their order (count,), and how often each was drawn before (count,)."""
        rng = np.random.default_rng([self.seed, epoch])
        if self.shares is None:
            return rng.permutation(self.count), np.zeros(self.count, int)
        drawn = rng.choice(self.count, self.count, p=self.shares)
        at = np.argsort(drawn, kind="stable")            # equal ones side by side, as they were drawn
        before = np.empty(self.count, int)
        before[at] = np.arange(self.count) - np.searchsorted(drawn[at], drawn[at])
        return drawn, before

    def whole(self, step):
        """The global batch of a step -> the key of each sample's epoch (batch,), indices (batch,)."""
        epoch, place = divmod(step, self.per_epoch)
        drawn, before = (x[place * self.batch:(place + 1) * self.batch] for x in self.order(epoch))
        return epoch + AGAIN * before, drawn

    def __iter__(self):
        share = self.batch // self.world
        mine = slice(self.rank * share, (self.rank + 1) * share)
        for step in range(self.start, self.stop):
            yield [(int(epoch), int(i)) for epoch, i in zip(*(x[mine] for x in self.whole(step)))]
