"""imagenet.py: miniatures of ImageNet and ImageNet-9, in the layouts that benchmarks/imagenet.py reads. Floor: data."""
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.imagenet import IN9, IN9_VARIANTS
from miniature.objects import ALL_KINDS, foreground
from miniature.scenes import COAT, Miniature, Row, compose, note, pose, require, save_jpeg, save_mask, scatter, share
from settings import opt

GROUPS9 = tuple(IN9)
DRAWN = (       # for each group of ImageNet-9: (wnid, ImageNet's class index, what is drawn), and the thing around them
    ((("n02085620", 151, "chihuahua"), ("n02106662", 235, "shepherd")), "fence"),
    ((("n01530575", 10, "finch"), ("n01855672", 99, "goose")), "tree"),
    ((("n03770679", 656, "minivan"), ("n02835271", 444, "tandem")), "sign"),
    ((("n01664065", 33, "turtle"), ("n01728572", 52, "snake")), "cactus"),
    ((("n02129604", 292, "tiger"), ("n02132136", 294, "bear")), "rock"),
    ((("n02165456", 301, "ladybug"), ("n02279972", 323, "monarch")), "flower"),
    ((("n02676566", 402, "guitar"), ("n03249569", 541, "drum")), "lamp"),
    ((("n02480855", 366, "gorilla"), ("n02494079", 382, "monkey")), "palm"),
    ((("n01443537", 1, "goldfish"), ("n01484850", 2, "shark")), "coral"))
THINGS9 = tuple(thing for _, thing in DRAWN)
# the first wnid of each group, then the second of each: label % 9 is the group
CLASSES9 = tuple(wnids[i] for i in range(2) for wnids, _ in DRAWN)


@dataclass(frozen=True)
class Groups9(Miniature):
    """Base: an object of one of ImageNet-9's nine groups among things of one kind, each group's own in 95 %."""
    size: int = opt(96, "side of a picture in pixels, a multiple of 8")
    wnids: int = opt(1, "ImageNet classes in each of the nine groups, 1 or 2")
    agreement: float = opt(0.95, "share of each class's examples that lie among the things of their group")
    things: tuple = opt((7, 11), "fewest and most things around an object, at most 25")
    thing_radius: tuple = opt((0.06, 0.1), "smallest and largest thing, as a share of the side")
    object: tuple = opt((0.19, 0.23), "smallest and largest object: a third of its length, as a share of the side")
    coat: float = opt(COAT, "strength of the fine grain that objects have, cars too, and nothing else has, 0..1")
    hue_noise: float = opt(0.15, "standard deviation of hues within a class; 1 = the full circle: only shapes tell")
    seed: int = opt(0, "a scene depends on (seed, split, index) only")

    USE = 0                     # of the seed: split 0 of one benchmark is not that of another

    def __post_init__(self):
        super().__post_init__()
        require(self.wnids in (1, 2), "wnids", "1 or 2", self.wnids)
        for name in set(self.COUNTS) & set(vars(self)):
            least = 18 * self.wnids                 # ImageNet-9 needs another picture of each group
            require(getattr(self, name) >= least, name, f"at least {least}, two of each class", getattr(self, name))

    @property
    def classes(self):
        return CLASSES9[:9 * self.wnids]

    def example(self, split, n, index):
        """Row of one of the n examples of a split; its file is not named yet. Shares are exact."""
        C = len(self.classes)
        label, rank = index % C, index // C
        home = share(self.agreement, rank, (n + C - 1 - label) // C)
        return Row(index + 1, "", label, label % 9 if home else (label + 1 + rank % 8) % 9, split, index)

    def scene(self, row):
        """The thing's kind says nothing about object, backdrop and noise, and they ignore it."""
        rng = np.random.default_rng([self.seed, self.USE + row.split, row.index])
        body, frame = foreground(rng, self.classes[row.label][2], self.hue_noise), pose(rng, self.object, shift=.08)
        return compose(rng, self.size, body, frame, self.coat, partial(
            scatter, kinds=[THINGS9[row.place]], count=self.things, radius=self.thing_radius, table=ALL_KINDS))

    def finish(self, root, rows, drawn):
        note(root, self, wnids={wnid: index for wnid, index, _ in self.classes})


@dataclass(frozen=True)
class ImageNet(Groups9):
    """Nine of ImageNet's 1000 classes, one of each group of ImageNet-9 (or eighteen), under their real wnids.

    Around an object lie things of one kind: fences around dogs, trees around birds and so on. In training and
    validation they are those of the object's group in 95 %; ImageNet-9 tells whether a model relies on them.
    miniature.json says which of the 1000 classes each wnid is, for there are too few folders to count.
    """
    train: int = opt(2250, "training examples, as many of each class")
    val: int = opt(450, "validation examples, as many of each class, made as those of training")

    SPLITS = ("train", "val")

    @property
    def GROUPS(self):
        return tuple(f"{wnid} {kind}" for wnid, _, kind in self.classes)

    def group(self, row):
        return row.label

    def rows(self):
        rows = [self.example(split, n, i) for split, n in enumerate((self.train, self.val)) for i in range(n)]
        return [row._replace(file=self.name(row)) for row in rows]

    def name(self, row):
        wnid = self.classes[row.label][0]
        stem = f"ILSVRC2012_val_{row.id:08d}" if row.split else f"{wnid}_{row.id}"
        return f"{self.SPLITS[row.split]}/{wnid}/{stem}.JPEG"

    def prepare(self, root):
        for folder in ("imagenet", "segmentations"):
            for split in self.SPLITS:
                for wnid, *_ in self.classes:
                    (root / folder / split / wnid).mkdir(parents=True)

    def write(self, row, root):
        scene = self.scene(row)
        save_jpeg(scene.image, root / "imagenet" / row.file)
        save_mask(scene.mask, (root / "segmentations" / row.file).with_suffix(".png"))


MIXED = ("mixed_same", "mixed_rand", "mixed_next")


@dataclass(frozen=True)
class ImageNet9(Groups9):
    """The Backgrounds Challenge for models of the miniature ImageNet: new pictures of the same kind, and variants.

    only_bg_b: the object's box is black; only_bg_t: it is tiled with the largest strip beside it; no_fg: the object is
    black; only_fg: all else is. mixed_*: the object on the only_bg_t of another picture, of the same, a random or
    the next group. Pictures have the model's size, for nothing resizes them.
    """
    test: int = opt(450, "pictures of each variant, as many of each class")

    SPLITS = ("test",)
    GROUPS = GROUPS9
    USE = 20

    def group(self, row):
        return row.label % 9

    def rows(self):
        rows = [self.example(0, self.test, i) for i in range(self.test)]
        return [row._replace(file=f"{self.classes[row.label][0]}_{row.id:05d}") for row in rows]

    def variants(self, row, rows):
        """-> {variant: (stem, picture)}, mask (S, S) bool."""
        scene = self.scene(row)
        image, mask = scene.image, scene.mask >= .5
        black, inside = np.zeros_like(image), np.zeros_like(mask)
        inside[box_of(mask)] = True
        pictures = {"original": image, "only_fg": np.where(mask[..., None], image, black),
                    "no_fg": np.where(mask[..., None], black, image),
                    "only_bg_b": np.where(inside[..., None], black, image), "only_bg_t": without(image, mask)}
        named = {name: (row.file, picture) for name, picture in pictures.items()}
        rng, group = np.random.default_rng([self.seed, self.USE + 1, row.index]), self.group(row)
        for name, wanted in zip(MIXED, (group, rng.integers(9), (group + 1) % 9)):
            others = [r for r in rows if self.group(r) == wanted and r != row]
            other = others[rng.integers(len(others))]
            there = self.scene(other)
            ground = without(there.image, there.mask >= .5)
            named[name] = f"fg_{row.file}_bg_{other.file}", np.where(mask[..., None], image, ground)
        return named, mask

    def prepare(self, root):
        for variant in (*IN9_VARIANTS, "fg_mask"):
            for group in GROUPS9:
                (root / "bg_challenge" / variant / "val" / group).mkdir(parents=True)

    def write(self, row, root):
        named, mask = self.variants(row, self.rows())
        for variant, (stem, picture) in named.items():
            save_jpeg(picture, root / "bg_challenge" / variant / "val" / GROUPS9[self.group(row)] / f"{stem}.JPEG")
        np.save(root / "bg_challenge/fg_mask/val" / GROUPS9[self.group(row)] / f"{row.file}.npy", mask.astype(np.uint8))

    def sheet(self):
        """(8 S, 9 S, 3) uint8: a line for each variant, a column for each group."""
        rows = self.rows()
        columns = [self.variants(row, rows)[0] for row in rows[:9]]
        return np.concatenate([np.concatenate([named[v][1] for named in columns], 1) for v in IN9_VARIANTS])


def box_of(mask):
    """Slices (rows, columns) of the smallest box around a mask's pixels."""
    ys, xs = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    return slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1)


def without(image, mask):
    """The image with the box around the mask tiled with the largest strip above, below or beside it."""
    ys, xs = box_of(mask)
    strips = image[:ys.start], image[ys.stop:], image[:, :xs.start], image[:, xs.stop:]
    strip, hole, result = max(strips, key=lambda s: s.size), image[ys, xs], image.copy()
    times = [-(-a // b) for a, b in zip(hole.shape[:2], strip.shape[:2])]           # rounded up
    result[ys, xs] = np.tile(strip, (*times, 1))[:len(hole), :hole.shape[1]]
    return result
