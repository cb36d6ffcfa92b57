"""data.py: benchmarks as they lie on disk -> samples, groups, transforms.

    train = load("waterbirds", root="data", size=518)["train"]
    train[epoch, index]      # {"image": (3, S, S), "label": int, "group": int, "id": str}, the same at every call

Every split of every benchmark is a Samples. Randomness is a function: how a sample is augmented depends on
(seed, epoch, sample id) and on nothing else, so results do not depend on workers, processes or resuming.
Coordinates of keypoints and boxes are x (column), y (row) in pixels.
"""
import csv
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from PIL import Image

import miniature
from settings import UsageError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))     # channel means and deviations of [0, 1] pixels

# (red, green, blue) of blackbodies, 3000 K to 15000 K in steps of 500 K: Zini et al., PlanckianJitter (MIT)
PLANCKIAN = np.array([
    (.6743, .4029, .0013), (.6281, .4241, .1665), (.5919, .4372, .2513), (.5623, .4457, .3154), (.5376, .4515, .3672),
    (.5163, .4555, .4103), (.4979, .4584, .4468), (.4816, .4604, .4782), (.4672, .4619, .5053), (.4542, .4630, .5289),
    (.4426, .4638, .5497), (.4320, .4644, .5681), (.4223, .4648, .5844), (.4135, .4651, .5990), (.4054, .4653, .6121),
    (.3980, .4654, .6239), (.3911, .4655, .6346), (.3847, .4656, .6444), (.3787, .4656, .6532), (.3732, .4656, .6613),
    (.3680, .4655, .6688), (.3632, .4655, .6756), (.3586, .4655, .6820), (.3544, .4654, .6878), (.3503, .4653, .6933)])


# ---------------------------------------------------------------- transforms
class View:
    """An image on its way to the model, with what is annotated on it. Each step changes all of them alike.

    image: PIL RGB; mask: PIL L, 0 = background, or None; points (P, 3): x, y, visible, or None; box (4,): x, y, width,
    height, or None. Coordinates are continuous: 0 is the left edge of the first pixel, the width the right edge of
    the last.
    """

    def __init__(self, image, mask=None, points=None, box=None):
        self.image, self.mask = image, mask
        self.points, self.box = (None if x is None else np.array(x, dtype=np.float64) for x in (points, box))  # copies

    def each(self, step):
        self.image = step(self.image)
        self.mask = self.mask and step(self.mask)

    def move(self, matrix):
        """Move the points by a 2x3 matrix, and the box to the smallest one around its moved corners."""
        if self.points is not None:
            self.points[:, :2] = self.points[:, :2] @ matrix[:, :2].T + matrix[:, 2]
        if self.box is not None:
            corners = self.box[:2] + self.box[2:] * np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
            corners = corners @ matrix[:, :2].T + matrix[:, 2]
            self.box = np.concatenate([corners.min(0), np.ptp(corners, axis=0)])

    def resize(self, size):
        """Shorter side to `size`: bilinear with antialiasing for the image, nearest for the mask."""
        old = self.image.size
        new = tuple(size if n == min(old) else int(size * n / min(old)) for n in old)
        self.image = self.image.resize(new, Image.Resampling.BILINEAR)
        self.mask = self.mask and self.mask.resize(new, Image.Resampling.NEAREST)
        self.move(np.array([[new[0] / old[0], 0, 0], [0, new[1] / old[1], 0]]))

    def flip(self):
        """Mirror left to right."""
        self.each(lambda x: x.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        self.move(np.array([[-1.0, 0, self.image.width], [0, 1, 0]]))

    def recolour(self, illuminant):
        """Planckian jitter: red times r/g and blue times b/g, clipped, cut to whole grey levels."""
        red, green, blue = illuminant
        pixels = np.asarray(self.image) * np.array([red / green, 1, blue / green])
        self.image = Image.fromarray(np.minimum(pixels, 255).astype(np.uint8))

    def affine(self, angle, shift, scale):
        """Turn clockwise by `angle` degrees and scale about the centre, then shift by (x, y) pixels.

        Nearest, black outside.
        """
        turn, centre = np.deg2rad(angle), np.array(self.image.size) / 2
        linear = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        forward = np.column_stack([linear, centre + shift - linear @ centre])
        back = np.linalg.inv(linear)
        inverse = tuple(np.column_stack([back, -back @ forward[:, 2]]).ravel())      # PIL asks where pixels come from
        self.each(lambda x: x.transform(x.size, Image.Transform.AFFINE, inverse, Image.Resampling.NEAREST))
        self.move(forward)

    def crop(self, left, top, size):
        """Cut a square; points outside it become invisible and are moved onto its edge, as is the corner of the box.

        The box keeps its width and height, as in the published keypoint evaluation, which divides by them.
        """
        self.each(lambda x: x.crop((left, top, left + size, top + size)))
        if self.points is not None:
            at = self.points[:, :2] - (left, top)
            self.points[:, 2] *= ((at >= 0) & (at <= size)).all(1)
            self.points[:, :2] = at.clip(0, size)
        if self.box is not None:
            self.box[:2] = (self.box[:2] - (left, top)).clip(0, size)


def augment(view, size, rng):
    """The published "fine-grained" training pipeline (cub_original), in its order."""
    view.resize(size)
    if rng.random() < 0.5:
        view.flip()
    if rng.random() < 0.8:
        view.recolour(PLANCKIAN[rng.integers(len(PLANCKIAN))])
    shift = np.round(rng.uniform(-0.2, 0.2, 2) * view.image.size)
    view.affine(rng.uniform(-90, 90), shift, rng.uniform(0.8, 1.2))
    width, height = view.image.size
    view.crop(int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1)), size)


def centre(view, size):
    """The evaluation pipeline: shorter side to size, centre crop."""
    view.resize(size)
    view.crop(*(round((n - size) / 2) for n in view.image.size), size)


def to_tensor(image, normalisation=IMAGENET):
    """PIL RGB -> normalised float tensor (3, height, width)."""
    mean, std = (np.array(x, dtype=np.float32) for x in normalisation)
    pixels = (np.asarray(image, dtype=np.float32) / 255 - mean) / std
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def patch_keep(masks, patch, share=0.5):
    """True masks (B, S, S) in {0, 1} -> keep (B, N): 1 where more than `share` of a patch is object.

    An object that no patch holds enough of keeps its best patch. A mask without any object keeps nothing.
    """
    cover = torch.nn.functional.avg_pool2d(masks[:, None].float(), patch).flatten(1)
    keep = cover > share
    small = (~keep.any(1) & (cover > 0).any(1)).nonzero()[:, 0]
    keep[small, cover.argmax(1)[small]] = True
    return keep.float()


# ---------------------------------------------------------------- samples
class Samples(torch.utils.data.Dataset):
    """One split of a benchmark. groups[i] = label * len(places) + place; places is () where there are none.

    samples[epoch, i] is sample i as augmented in that epoch; samples[i] the evaluation view, with
    "mask" (S, S) uint8, "points" (P, 3) and "box" (4,) where the benchmark has them. train_masks: True adds the mask
    to augmented samples too. Raises UsageError for an unreadable file.
    """
    train_masks = False

    def __init__(self, name, split, size, classes, ids, paths, labels, places=(), groups=None, masks=None,
                 points=None, normalisation=IMAGENET, seed=0, boxes=None):
        self.name, self.split, self.size, self.seed, self.normalisation = name, split, size, seed, normalisation
        self.classes, self.places = tuple(classes), tuple(places)
        self.ids, self.paths, self.masks = list(ids), list(paths), masks
        self.points, self.boxes = points, boxes
        self.labels = torch.tensor(labels, dtype=torch.long)
        self.groups = torch.tensor(labels if groups is None else groups, dtype=torch.long)
        self.group_names = [f"{c} on {p}" for c in self.classes for p in self.places] or list(self.classes)

    def __len__(self):
        return len(self.ids)

    def first(self, n):
        """The first n samples only; all of them if n is 0."""
        if n:
            for key in ("ids", "paths", "labels", "groups", "masks", "points", "boxes"):
                value = getattr(self, key)
                setattr(self, key, None if value is None else value[:n])
        return self

    def check(self):
        """Every image is there and is one, and so is every mask; or a UsageError names the first that is not.

        Only headers are read: pixels that do not decode stop the run when they are needed.
        """
        for what, paths in (("image", self.paths), ("mask", self.masks or ())):
            for name, path in zip(self.ids, paths):
                if not path.is_file():
                    raise UsageError(f"{self.name}: {what} of sample {name} ({self.split}) is missing: {path}; "
                                     "unpack the archive again or remove its row")
                read_image(path)

    def __getitem__(self, key):
        epoch, i = key if isinstance(key, tuple) else (None, key)
        sample = {"label": int(self.labels[i]), "group": int(self.groups[i]), "id": self.ids[i]}
        annotated = epoch is None or self.train_masks    # most methods train on images and labels alone
        view = View(read_image(self.paths[i], "RGB"), read_image(self.masks[i], "L") if self.masks and annotated else None,
                    *(x[i] if x and epoch is None else None for x in (self.points, self.boxes)))
        if view.mask and view.mask.size != view.image.size:
            raise UsageError(f"mask {self.masks[i]} is {view.mask.size}, its image {view.image.size}; unpack both again")
        if epoch is not None:
            augment(view, self.size, np.random.default_rng([self.seed, epoch, zlib.crc32(self.ids[i].encode())]))
        else:
            centre(view, self.size)
        if view.mask:
            # CUB's masks are soft (how many annotators agree): any agreement is object, as published
            sample["mask"] = torch.from_numpy((np.asarray(view.mask) > 0).astype(np.uint8))
        for name, at in (("points", view.points), ("box", view.box)):
            if at is not None:
                sample[name] = torch.from_numpy(at).float()
        sample["image"] = to_tensor(view.image, self.normalisation)
        return sample


def read_image(path, mode=None):
    """Open and decode as PIL's mode, or look at the header only; UsageError that names a file that is no image."""
    try:
        with Image.open(path) as image:
            return image.convert(mode) if mode else None
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"cannot read image {path}: {error}; replace the file") from None


class Plan(torch.utils.data.Sampler):
    """Which samples this process sees at each step: a list of (epoch, index) per step, for steps start..stop.

    The global batch of a step is the same however many processes share it; each takes one contiguous slice. The
    samples left over at the end of an epoch are dropped (another set each epoch).
    """

    def __init__(self, count, batch, start, stop, seed=0, rank=0, world=1):
        self.count, self.batch, self.start, self.stop = count, batch, start, stop
        self.seed, self.rank, self.world, self.per_epoch = seed, rank, world, count // batch

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        share = self.batch // self.world
        for step in range(self.start, self.stop):
            epoch, place = divmod(step, self.per_epoch)
            if step == self.start or place == 0:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            first = place * self.batch + self.rank * share
            yield [(epoch, int(i)) for i in order[first:first + share]]


# ---------------------------------------------------------------- loaders
def load(name, root="data", size=None, seed=0, limit=0, splits=("train", "val", "test"), check=True):
    """Read a benchmark -> {"train": Samples, "val": Samples or absent, "test": Samples}.

    root: folder that holds the unpacked archives; size in pixels (default: the benchmark's); limit: only the first
    samples of each split; check: every image must be there. Raises UsageError when something is not where it belongs.
    """
    benchmark = BENCHMARKS[name]
    found = benchmark.load(Path(root), size or benchmark.size, seed)
    found = {split: found[split].first(limit) for split in splits if split in found}
    for samples in found.values():
        if check:
            samples.check()
    return found


def missing(name, path):
    benchmark = BENCHMARKS[name]
    offline = "; or use --mini, which needs no download" if name in miniature.BENCHMARKS else ""
    return UsageError(f"{name}: looked for {path.resolve()}, which is not there. Unpack {benchmark.source} under "
                      f"--root{offline}")


def read_table(path):
    """A text file of CUB, "<id> <rest of line>" -> {id: rest}."""
    try:
        return dict(line.split(" ", 1) for line in path.read_text().splitlines() if line.strip())
    except FileNotFoundError:
        raise missing("cub", path) from None


def read_points(cub):
    """{image id: (15, 3) array of x, y, visible} from parts/part_locs.txt, or None when it is not there."""
    path = cub / "parts" / "part_locs.txt"
    if not path.is_file():
        return None
    rows = np.loadtxt(path, ndmin=2)                                             # image, part, x, y, visible
    points = {str(int(image)): np.zeros((15, 3)) for image in np.unique(rows[:, 0])}
    for image, part, *at in rows:
        points[str(int(image))][int(part) - 1] = at
    return points


def read_boxes(cub, ids):
    """[x, y, width, height] of each CUB image from bounding_boxes.txt, or None when it is not there."""
    if not (cub / "bounding_boxes.txt").is_file():
        return None
    boxes = read_table(cub / "bounding_boxes.txt")
    if absent := [i for i in ids if i not in boxes]:
        raise UsageError(f"{cub / 'bounding_boxes.txt'} has no row of image {absent[0]}; unpack CUB again")
    return [[float(x) for x in boxes[i].split()] for i in ids]


def annotations(cub, points, ids, files):
    """(mask paths, keypoints) of CUB images; None where CUB's folder or file of them is not there at all.

    points: what read_points returned.
    """
    masks = cub / "segmentations"
    for i in ids:
        if points and i not in points:
            raise UsageError(f"{cub / 'parts' / 'part_locs.txt'} has no rows of image {i}; unpack CUB again")
    return ([masks / Path(f).with_suffix(".png") for f in files] if masks.is_dir() else None,
            [points[i] for i in ids] if points else None)


def load_cub(root, size, seed):
    """CUB-200-2011 (Wah et al., 2011). No validation split; the class list gives the labels."""
    cub = root / "CUB_200_2011"
    files, classes = read_table(cub / "images.txt"), read_table(cub / "classes.txt")
    labels, is_train = read_table(cub / "image_class_labels.txt"), read_table(cub / "train_test_split.txt")
    index, locations = {c: i for i, c in enumerate(sorted(classes, key=int))}, read_points(cub)

    def split(name, flag):
        ids = [i for i in files if is_train[i] == flag]
        masks, points = annotations(cub, locations, ids, [files[i] for i in ids])
        return Samples("cub", name, size, [classes[c] for c in index], ids, [cub / "images" / files[i] for i in ids],
                       [index[labels[i]] for i in ids], masks=masks, points=points, seed=seed,
                       boxes=read_boxes(cub, ids))
    return {"train": split("train", "1"), "test": split("test", "0")}


def load_waterbirds(root, size, seed):
    """Waterbirds (Sagawa et al., 2020): metadata.csv, and CUB's masks and keypoints where CUB is there too.

    group = 2 * y + place. The three species that the original script mislabelled keep the file's y.
    """
    folder = "waterbird_complete95_forest2water2"
    cub = root / "CUB_200_2011"
    base = next((p for p in (cub / folder, root / folder) if p.is_dir()), cub / folder)
    try:
        with open(base / "metadata.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise missing("waterbirds", base / "metadata.csv") from None
    for column in ("img_id", "img_filename", "y", "split", "place"):
        if not rows or column not in rows[0]:
            raise UsageError(f"{base / 'metadata.csv'} has no column {column}; unpack "
                             f"{BENCHMARKS['waterbirds'].source} again")
    for number, row in enumerate(rows, 2):
        for column, known in (("y", "01"), ("place", "01"), ("split", "012")):
            if row[column] is None or row[column] not in tuple(known):
                raise UsageError(f"{base / 'metadata.csv'}, line {number}: {column} is {row[column]!r}, "
                                 f"not one of {', '.join(known)}; unpack the archive again")
    locations = read_points(cub)

    def split(name, number):
        mine = [r for r in rows if r["split"] == number]
        masks, points = annotations(cub, locations, [r["img_id"] for r in mine], [r["img_filename"] for r in mine])
        return Samples("waterbirds", name, size, ("landbird", "waterbird"), [r["img_id"] for r in mine],
                       [base / r["img_filename"] for r in mine], [int(r["y"]) for r in mine], ("land", "water"),
                       [2 * int(r["y"]) + int(r["place"]) for r in mine], masks, points, seed=seed,
                       boxes=read_boxes(cub, [r["img_id"] for r in mine]))
    return {"train": split("train", "0"), "val": split("val", "1"), "test": split("test", "2")}


@dataclass(frozen=True)
class Benchmark:
    """What the command line, the errors and the reports need to know about a benchmark; settings are the paper's."""
    load: Callable               # (root, size, seed) -> {split: Samples}
    classes: int
    size: int                    # pixels
    k: int                       # parts, as in the paper's main tables
    source: str                  # archive and where it comes from
    rare: tuple = ()             # groups that are rare in training: the paper's worst group is the worst of these


BENCHMARKS = {
    "waterbirds": Benchmark(load_waterbirds, 2, 518, 8, "waterbird_complete95_forest2water2.tar.gz "
                            "(nlp.stanford.edu/data/dro; masks and keypoints: CUB_200_2011)", rare=(1, 2)),
    "cub": Benchmark(load_cub, 200, 518, 8, "CUB_200_2011.tgz, and segmentations.tgz "
                     "moved into it (data.caltech.edu/records/65de6-vp158 and w9d68-gec53)"),
}


def find_root(name, root, mini):
    """The folder to read: `root` as it is, or the rendered miniature of the benchmark (rendered on first use)."""
    if not mini:
        return Path(root)
    if name not in miniature.BENCHMARKS:
        raise UsageError(f"there is no miniature of {name} yet (there is one of: {', '.join(miniature.BENCHMARKS)})")
    return miniature.render(name)
