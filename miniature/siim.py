"""siim.py: a miniature SIIM-ACR, in the two layouts that benchmarks/siim.py reads. Floor: data."""
import csv
import io
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from PIL import Image

from benchmarks.siim import SIDE
from miniature.objects import chest
from miniature.scenes import Miniature, Row, note, require, save, save_mask, share
from settings import UsageError, opt

UID = "1.2.276.0.7230010.3.1"           # .2 study, .3 series, .4 image


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
            require(SIDE % self.size == 0, "size", f"a divisor of {SIDE} with --dicom", self.size)
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
