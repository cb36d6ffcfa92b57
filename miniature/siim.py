"""siim.py: a miniature SIIM-ACR, in the two layouts that benchmarks/siim.py reads.

Floor: data. Read scenes.py first: what all miniatures share. A chest is not a scene, chest() below draws it.
"""
import csv
import io
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from benchmarks.siim import PREPARED, SIDE
from miniature.objects import Frame, Shape, bar, box, ellipse, paint, poly
from miniature.scenes import (COAT_CELLS, PIXEL_NOISE, PRETRAIN, SUPERSAMPLE, Miniature, Row, in_parallel, save,
                              smooth_noise, with_knobs)
from settings import UsageError

UID = "1.2.276.0.7230010.3.1"           # .2 study, .3 series, .4 image


# ---------------------------------------------------------------- the drawing
class Chest(NamedTuple):
    image: np.ndarray       # (S, S) uint8, white = dense, as a radiograph
    mask: np.ndarray        # (S, S) float, share of each pixel that is pneumothorax; all 0 without one
    lungs: np.ndarray       # (S, S) float, the same of both lungs, pneumothorax included


TORSO = poly((-.98, 1.2), (-1.02, .2), (-.97, -.4), (-.8, -.6), (-.3, -.78), (-.2, -1.2), (.2, -1.2), (.3, -.78),
             (.8, -.6), (.97, -.4), (1.02, .2), (.98, 1.2))
LUNG = np.concatenate([ellipse(-.42, -.1, .33, .6, 180, 360),
                       poly((-.12, .3), (-.2, .46), (-.32, .38), (-.47, .36), (-.62, .44), (-.76, .66))])
TUBE = poly((-1.05, 1.1), (-.98, .7), (-.95, .3), (-.95, 0), (-.93, -.25))


def chest(rng, size, pneumothorax, tube, depth, coat):
    """A frontal chest: ribs, lungs with fine markings, heart; perhaps a pneumothorax, perhaps a tube up the side.

    A pneumothorax is the part of a lung that lies outside the same lung moved down or inwards by depth (a share of
    the side): a dark crescent at the apex or along the side, without markings, behind a thin bright line. Both
    are drawn from numbers that do not depend on the other, so that the same chest can be drawn with and without.
    """
    frame = Frame(.5 + rng.uniform(-.03, .03, 2), rng.uniform(.44, .5), False, np.radians(rng.uniform(-4, 4)))
    stretch = rng.uniform(.93, 1.07, (2, 2))
    side, apex, deep, tube_side = rng.integers(2), rng.integers(2), rng.uniform(*depth) / frame.scale, rng.integers(2)
    heart = ellipse(.14, .24, rng.uniform(.26, .34), rng.uniform(.24, .3))
    noise, grain = rng.normal(0, 255 * PIXEL_NOISE, (size, size)), smooth_noise(rng, COAT_CELLS, size)[..., 0]
    cloud, bend = smooth_noise(rng, 6, size)[..., 0], TUBE + rng.uniform(-.03, .03, TUBE.shape)

    def cover(*outlines, blur=0):
        """(S, S) share of each pixel inside any of the outlines."""
        canvas = Image.new("L", (SUPERSAMPLE * size,) * 2)
        paint(canvas, [Shape(points, 255) for points in outlines], frame)
        return np.asarray(canvas.reduce(SUPERSAMPLE).filter(ImageFilter.GaussianBlur(blur * size))) / 255

    flip = np.array([(1, 1), (-1, 1)])                                      # image left, image right
    lungs = [LUNG * stretch[i] * flip[i] for i in range(2)]
    away = np.array([(0, deep), (.9 * deep, .1 * deep)])[apex] * flip[side]
    inside = cover(heart)
    air = cover(*lungs) * (1 - inside)
    rest = cover(lungs[side] + away, box(-.5, .25, .5, 1.2))                # no gap above the diaphragm
    mask = (cover(lungs[side]) * (1 - rest) * (1 - inside)) * bool(pneumothorax)
    line = (cover(lungs[side] + .75 * away) - rest).clip(0) * (mask > 0)
    ribs = ribs_of(stretch[0], flip[0]) + ribs_of(stretch[1], flip[1])
    picture = 18 + 110 * cover(TORSO, blur=.015) + 60 * cover(box(-.12, -1.2, .12, 1.2), blur=.02) + 25 * cloud
    picture = picture + 40 * cover(poly((-1, .5), (1, .5), (1, 1.2), (-1, 1.2)), blur=.05)
    picture = picture * (1 - air) + (62 + 25 * cloud) * air + 45 * cover(heart, blur=.012) * (1 - air)
    picture = picture + 34 * cover(*ribs, blur=.004)
    picture = picture + (air - mask).clip(0) * 255 * coat * grain - 30 * mask + 60 * line
    if tube:
        path = bend * flip[tube_side]
        picture = picture + 105 * cover(*(bar(a, b, .055) for a, b in zip(path, path[1:])))
    return Chest((picture + noise).round().clip(0, 255).astype(np.uint8), mask, air)


def ribs_of(stretch, flip):
    """Outlines of the ribs of one side, bows from the spine outwards and down, and of a collar bone."""
    x = np.linspace(-.08, -.84, 9)
    bows = [np.stack([x, y + .5 * (x + .35) ** 2 - .22 * (x + .1)], 1) * stretch * flip
            for y in np.linspace(-.75, .45, 8)]
    collar_bone = np.array([(-.1, -.6), (-.75, -.78)]) * flip
    return [*(bar(a, b, .05) for bow in bows for a, b in zip(bow, bow[1:])), bar(*collar_bone, .07)]


def pretraining_chest(index, seed, size):
    """A chest in which pneumothorax and tube are two throws of a coin -> (S, S, 4) uint8: grey levels, lungs."""
    rng = np.random.default_rng([seed, PRETRAIN, index])
    found = chest(rng, size, rng.integers(2), rng.integers(2), Siim.depth, Siim.coat)
    return np.dstack([found.image] * 3 + [(255 * found.lungs).astype(np.uint8)])


def pretraining_chests(n, seed, size=96):
    """n chests for self-supervision -> (n, S, S, 4) uint8, the last channel the lungs; no part maps."""
    draw = partial(pretraining_chest, seed=seed, size=size)
    return np.stack([*in_parallel(draw, range(n), "pretraining chests")]), None


# ---------------------------------------------------------------- the folders
class Siim(with_knobs(
        Miniature, train=2200, test=800, size=128, agreement=.95, depth=(.08, .13), coat=.5,
        dicom=find_spec("pydicom") is not None, seed=0)):
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
    EVEN = ("test",)
    CLASSES, PLACES = ("healthy", "pneumothorax"), ("no tube", "tube")
    GROUPS = ("healthy/no tube", "healthy/tube", "pneumothorax/no tube", "pneumothorax/tube")

    def __post_init__(self):
        super().__post_init__()
        if self.dicom and SIDE % self.size:
            raise UsageError(f"--size must be a divisor of {SIDE} with --dicom, not {self.size}")
        if self.dicom and find_spec("pydicom") is None:
            raise UsageError("siim: --dicom needs pydicom: pip install pydicom, or --no-dicom")

    def group(self, row):
        return 2 * row.label + row.place

    def rows(self):
        """file is the image's UID; UIDs tell neither label nor split."""
        examples, rows = self.examples(), []
        for i, example in zip(np.random.default_rng([self.seed, 9]).permutation(len(examples)), examples):
            id = int(i) + 1
            uid = f"{UID}.4.8323329.{id}.{1517875160 + id}.{100000 + id * 7919 % 900000}"
            rows.append(Row(id, uid, *example))
        return sorted(rows)

    def scene(self, row):
        rng = np.random.default_rng([self.seed, row.split, row.index])
        return chest(rng, self.size, row.label, row.place, self.depth, self.coat)

    def picture(self, row):
        return np.repeat(self.scene(row).image[..., None], 3, axis=2)

    def folders(self, rows):
        sets = ("all_masks", *(f"{name}/{label}" for name in PREPARED for label in (0, 1)))
        return ["segmentations", *(f"siim/{name}" for name in (("dicom-images-train",) if self.dicom else sets))]

    def write(self, row, root):
        """Draw one chest, save it in one of the layouts -> its cells in train-rle.csv, one for each row."""
        scene, fit = self.scene(row), enlarge if self.dicom else np.asarray
        image, mask, lungs = fit(scene.image), fit(scene.mask >= .5), fit(scene.lungs >= .5)
        save(lungs, root / f"segmentations/{row.file}.png")
        return (self.write_kaggle if self.dicom else self.write_prepared)(row, root / "siim", image, mask)

    def write_prepared(self, row, base, image, mask):
        half = "non_robust_test_set" if row.label == row.place else "robust_test_set"
        for name in ("full_test_set", half) if row.split else ("train_set",):
            save(image, base / f"{name}/{row.label}/{row.file}.png")
        if row.label:
            save(mask, base / f"all_masks/{row.file}.png")

    def write_kaggle(self, row, base, image, mask):
        study, series = (row.file.replace(f"{UID}.4", f"{UID}.{level}") for level in (2, 3))
        folder = base / "dicom-images-train" / study / series
        folder.mkdir(parents=True)
        write_dicom(image, folder / f"{row.file}.dcm", (study, series, row.file))
        return [run_lengths(region) for region in regions(mask, row.index)] if row.label else ["-1"]

    def finish(self, root, rows, drawn):
        super().finish(root, rows, drawn)
        if self.dicom:
            with open(root / "siim/train-rle.csv", "w", newline="") as file:
                file.write("ImageId, EncodedPixels\n")                  # with blanks, as the first release
                file.writelines(f"{row.file}, {cell}\n" for row, cells in zip(rows, drawn) for cell in cells)
            with open(root / "siim/cxr_tube_dict.csv", "w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(
                    [("ImageId", "chest_tube"), *((r.file, r.place) for r in rows if r.split == 1)])


def enlarge(picture):
    """(S, S) -> (1024, 1024): a pixel becomes a square, which is also JPEG's block when S is 128."""
    times = SIDE // len(picture)
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
