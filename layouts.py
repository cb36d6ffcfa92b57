"""layouts.py: the miniatures of MetaShift, SIIM-ACR, ImageNet and ImageNet-9, each in its benchmark's own layout.

Each is a dataclass of knobs, like those of the birds in miniature.py, which renders them. What they draw: objects.py.
All masks are exact. MetaShift and ImageNet have none in their layout, SIIM-ACR none of the lungs: those lie under
segmentations/.
"""
import csv
import io
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import numpy as np
from PIL import Image

from objects import ALL_KINDS, chest, context_things, foreground, pet_look
from scenes import COAT, Miniature, Row, compose, creature, note, pose, require, save, save_jpeg, scatter
from settings import UsageError, opt


def share(rate, rank, n):
    """True for the first round(rate * n) of n ranks: shares are exact, not drawn."""
    return rank < round(rate * n)


def save_mask(mask, path):
    """Share of each pixel that is covered -> 0 or 255: object where it covers half of a pixel or more."""
    save((mask >= .5).astype(np.uint8) * 255, path)


# ---------------------------------------------------------------- MetaShift
@dataclass(frozen=True)
class MetaShift(Miniature):
    """Cats indoors and dogs outdoors in training; both indoors, at a shelf, in the test set.

    A context is two or three of the thing that names it among small things of a room (sofa, bed, shelf) or a
    street (bench, bike). Training holds no indoor dog and no outdoor cat, as the benchmark: agreement is 100 %.
    One id lies in both folders of the cat: the same picture, because contexts overlap in the benchmark too.
    """
    train: int = opt(2200, "training examples, a quarter in each of the four folders")
    test: int = opt(540, "test examples, half of them cats; the loader holds out its validation set from them")
    size: int = opt(96, "side of a picture in pixels, a multiple of 8")
    things: tuple = opt((13, 17), "fewest and most small things of the room or street, at most 25")
    thing_radius: tuple = opt((0.05, 0.08), "smallest and largest small thing, as a share of the side; sofas: twice")
    pet: tuple = opt((0.18, 0.22), "smallest and largest animal: half a body, as a share of the side")
    cue: float = opt(0.7, "how much cats and dogs differ in ears, muzzle, build, tail and head hue; 0 = not at all")
    coat: float = opt(COAT, "strength of the fine grain that fur has and nothing else has, 0..1")
    hue_noise: float = opt(0.03, "standard deviation of head hues within a class; 1 = the full circle")
    seed: int = opt(0, "a scene depends on (seed, split, index) only")

    SPLITS = ("train", "test")
    GROUPS = ("cat(sofa)", "cat(bed)", "dog(bench)", "dog(bike)", "cat(shelf)", "dog(shelf)")
    PLACES = ("sofa", "bed", "bench", "bike", "shelf")

    def group(self, row):
        return row.place + (row.label if row.place == 4 else 0)

    def rows(self):
        """Ids tell neither class nor split. The last row is the first cat on a sofa once more, in the other folder."""
        n = self.train + self.test
        ids, rows = np.random.default_rng([self.seed, 9]).permutation(n) * 37 + 2_300_000, []
        for i in range(n):
            split, index = (0, i) if i < self.train else (1, i - self.train)
            label, place = (index % 4 // 2, index % 4) if split == 0 else (index % 2, 4)
            rows.append(self.at(Row(int(ids[i]), "", label, place, split, index)))
        return [*rows, self.at(rows[0]._replace(place=1))]

    def at(self, row):
        """The row with the path that its other fields imply."""
        animal = ("cat", "dog")[row.label]
        return row._replace(file=f"{self.SPLITS[row.split]}/{animal}/{self.GROUPS[self.group(row)]}/{row.id}.jpg")

    def scene(self, row):
        rng = np.random.default_rng([self.seed, row.split, row.index])
        place = 0 if row.index == 0 and row.split == 0 else row.place           # the picture that lies in two folders
        body, frame = creature(pet_look(rng, row.label, self.cue, self.hue_noise)), pose(rng, self.pet, shift=.1)
        return compose(rng, self.size, body, frame, self.coat, partial(
            context_things, context=self.PLACES[place], count=self.things, radius=self.thing_radius))

    def prepare(self, root):
        for group in self.GROUPS:
            path = f"{'test' if 'shelf' in group else 'train'}/{group[:3]}/{group}"
            for folder in ("MetaDatasetCatDog", "segmentations"):
                (root / folder / path).mkdir(parents=True)

    def write(self, row, root):
        scene = self.scene(row)
        save_jpeg(scene.image, root / "MetaDatasetCatDog" / row.file)
        save_mask(scene.mask, (root / "segmentations" / row.file).with_suffix(".png"))

    def finish(self, root, rows, drawn):
        note(root, self)


# ---------------------------------------------------------------- SIIM-ACR
UID = "1.2.276.0.7230010.3.1"           # .2 study, .3 series, .4 image
DICOM_SIDE = 1024                       # of the benchmark's images and of its run-length masks


@dataclass(frozen=True)
class Siim(Miniature):
    """Chest radiographs: is there a pneumothorax? A chest tube, the treatment, gives the answer away in training.

    Half of the images of each set are positive. In training the tube agrees with the label in 95 % (the benchmark's
    own training set has no tube labels; among its positives with labels 74 % have a tube, among its negatives 13 %).
    The four (label, tube) cells of the test set are equal, so that its robust half (positive without tube, negative
    with) is as large as the other. The tube lies outside the lungs, on either side at random.
    The fine grain is the markings of the lung, and a pneumothorax has none.

    With pydicom, Kaggle's layout: DICOM as the benchmark's (JPEG, 1024 x 1024: each drawn pixel a block), train-rle.csv
    with several rows for some images, and cxr_tube_dict.csv of the test images. Without, the layout that the published
    code prepares, but .png where it has .dcm, upright masks, and every region in the mask. Both: the lungs, as the
    mask of the object.
    """
    train: int = opt(2200, "training examples, half of them positive")
    test: int = opt(800, "test examples, a quarter of them in each (label, tube) cell")
    size: int = opt(128, "side of a drawing in pixels; with --dicom a divisor of 1024")
    agreement: float = opt(0.95, "share of each label's training examples whose tube agrees with the label")
    depth: tuple = opt((0.08, 0.13), "smallest and largest depth of a pneumothorax, as a share of the side")
    coat: float = opt(0.5, "strength of the fine grain of a lung, 0..1")
    dicom: bool = opt(find_spec("pydicom") is not None, "Kaggle's layout, which needs pydicom; else the prepared one")
    seed: int = opt(0, "a scene depends on (seed, split, index) only")

    SPLITS = ("train", "test")
    GROUPS = ("healthy/no tube", "healthy/tube", "pneumothorax/no tube", "pneumothorax/tube")       # 2 * label + tube

    def __post_init__(self):
        super().__post_init__()
        if self.dicom:
            require(DICOM_SIDE % self.size == 0, "size", f"a divisor of {DICOM_SIDE} with --dicom", self.size)
            if find_spec("pydicom") is None:
                raise UsageError("siim: --dicom needs pydicom: pip install pydicom, or --no-dicom")

    def rows(self):
        """file is the image's UID; UIDs tell neither label nor split."""
        order, rows = np.random.default_rng([self.seed, 9]).permutation(self.train + self.test), []
        for split, n in enumerate((self.train, self.test)):
            for i in range(n):
                label, rank = i % 2, i // 2
                agrees = share(self.agreement if split == 0 else .5, rank, (n + 1 - label) // 2)
                id = int(order[len(rows)]) + 1
                uid = f"{UID}.4.8323329.{id}.{1517875160 + id}.{100000 + id * 7919 % 900000}"
                rows.append(Row(id, uid, label, label if agrees else 1 - label, split, i))
        return sorted(rows, key=lambda row: row.id)

    def scene(self, row):
        rng = np.random.default_rng([self.seed, row.split, row.index])
        return chest(rng, self.size, row.label, row.place, self.depth, self.coat)

    def picture(self, row):
        return np.repeat(self.scene(row).image[..., None], 3, axis=2)

    def sets(self, row):
        """Folders of the prepared layout that hold a row."""
        return ("train_set",) if row.split == 0 else (
            "full_test_set", "non_robust_test_set" if row.label == row.place else "robust_test_set")

    def prepare(self, root):
        names = ["dicom-images-train"] if self.dicom else ["all_masks", *(
            f"{name}/{label}" for label in "01"
            for name in ("train_set", "full_test_set", "robust_test_set", "non_robust_test_set"))]
        for name in (*(f"siim/{name}" for name in names), "segmentations"):
            (root / name).mkdir(parents=True)

    def write(self, row, root):
        """Draw one chest -> its cells in train-rle.csv, one for each row."""
        scene, base = self.scene(row), root / "siim"
        lungs = scene.lungs >= .5
        save_mask(enlarge(lungs) if self.dicom else lungs, root / f"segmentations/{row.file}.png")
        if not self.dicom:
            for name in self.sets(row):
                save(scene.image, base / f"{name}/{row.label}/{row.file}.png")
            if row.label:
                save_mask(scene.mask, base / f"all_masks/{row.file}.png")
            return
        study, series = (row.file.replace(f"{UID}.4", f"{UID}.{level}") for level in (2, 3))
        folder = base / "dicom-images-train" / study / series
        folder.mkdir(parents=True)
        write_dicom(enlarge(scene.image), folder / f"{row.file}.dcm", (study, series, row.file))
        mask = enlarge(scene.mask >= .5)
        return [run_lengths(region) for region in regions(mask, row.index)] if row.label else ["-1"]

    def finish(self, root, rows, drawn):
        note(root, self)
        if self.dicom:
            with open(root / "siim/train-rle.csv", "w", newline="") as file:
                file.write("ImageId, EncodedPixels\n")                  # with blanks, as the first release
                file.writelines(f"{row.file}, {cell}\n" for row, cells in zip(rows, drawn) for cell in cells)
            with open(root / "siim/cxr_tube_dict.csv", "w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(
                    [("ImageId", "chest_tube"), *((r.file, r.place) for r in rows if r.split == 1)])


def enlarge(picture):
    """(S, S) -> (1024, 1024): a pixel becomes a square, which is also JPEG's block when S is 128."""
    times = DICOM_SIDE // len(picture)
    return picture.repeat(times, 0).repeat(times, 1)


def regions(mask, index):
    """Masks whose union is the mask: one, or for every fifth image an upper and a lower one that overlap."""
    ys = mask.any(1).nonzero()[0]
    if index // 2 % 5:
        return [mask]
    row, middle = np.arange(len(mask))[:, None], (ys[0] + ys[-1]) // 2
    return [mask & (row < middle + 20), mask & (row >= middle)]


def run_lengths(mask):
    """A mask as the benchmark writes it: down the columns, offset from the last run's end, length, and so on."""
    flat = np.concatenate([[0], mask.T.ravel().astype(np.int8), [0]])
    edges = np.diff(flat).nonzero()[0]                                  # start, end, start, end, ...
    return " ".join(map(str, np.diff(edges, prepend=0)))


def write_dicom(picture, path, uids):
    """(H, W) uint8 -> DICOM as the benchmark's: baseline JPEG, 8 bits, MONOCHROME2. uids: study, series, image."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit, SecondaryCaptureImageStorage
    jpeg = io.BytesIO()
    Image.fromarray(picture).save(jpeg, "JPEG", quality=90)
    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    file.SOPClassUID, file.Modality = SecondaryCaptureImageStorage, "CR"
    file.StudyInstanceUID, file.SeriesInstanceUID, file.SOPInstanceUID = uids
    file.Rows, file.Columns, file.SamplesPerPixel, file.PhotometricInterpretation = *picture.shape, 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 8, 8, 7, 0
    file.LossyImageCompression = "01"
    file.PixelData = encapsulate([jpeg.getvalue()])
    file["PixelData"].is_undefined_length = True
    file.save_as(path, enforce_file_format=True)


# ---------------------------------------------------------------- ImageNet and ImageNet-9
IN9 = {         # ImageNet-9's classes: (wnid, ImageNet's class index, what is drawn), and the thing around them
    "00_dog": ((("n02085620", 151, "chihuahua"), ("n02106662", 235, "shepherd")), "fence"),
    "01_bird": ((("n01530575", 10, "finch"), ("n01855672", 99, "goose")), "tree"),
    "02_wheeled vehicle": ((("n03770679", 656, "minivan"), ("n02835271", 444, "tandem")), "sign"),
    "03_reptile": ((("n01664065", 33, "turtle"), ("n01728572", 52, "snake")), "cactus"),
    "04_carnivore": ((("n02129604", 292, "tiger"), ("n02132136", 294, "bear")), "rock"),
    "05_insect": ((("n02165456", 301, "ladybug"), ("n02279972", 323, "monarch")), "flower"),
    "06_musical instrument": ((("n02676566", 402, "guitar"), ("n03249569", 541, "drum")), "lamp"),
    "07_primate": ((("n02480855", 366, "gorilla"), ("n02494079", 382, "monkey")), "palm"),
    "08_fish": ((("n01443537", 1, "goldfish"), ("n01484850", 2, "shark")), "coral")}
GROUPS9, THINGS9 = tuple(IN9), tuple(thing for _, thing in IN9.values())
# the first wnid of each group, then the second of each: label % 9 is the group
CLASSES9 = tuple(wnids[i] for i in range(2) for wnids, _ in IN9.values())


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
VARIANTS = ("original", *MIXED, "only_fg", "no_fg", "only_bg_b", "only_bg_t")


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
        for variant in (*VARIANTS, "fg_mask"):
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
        return np.concatenate([np.concatenate([named[v][1] for named in columns], 1) for v in VARIANTS])


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
