"""siim.py: the files of SIIM-ACR Pneumothorax: DICOM images, run-length masks, labels, chest tubes.

data.load_siim puts them together. Unique identifiers (UIDs) hold dots and share prefixes: they are compared whole.
"""
import csv
import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from settings import UsageError

SIDE = 1024                                                # pixels of every image and mask
PREPARED = ("train_set", "full_test_set", "robust_test_set", "non_robust_test_set")


def read_dicom(path, pixels=True):
    """An 8-bit grey DICOM -> PIL image in mode L, white = dense; pixels=False reads its header only and returns None.

    UsageError without pydicom, for more than 8 bits (a cast would wrap), and for a file that is none or is damaged.
    """
    try:
        import pydicom
    except ImportError:
        raise UsageError(f"{path} is a DICOM file and pydicom is not installed: pip install pydicom") from None
    try:
        file = pydicom.dcmread(path, stop_before_pixels=not pixels)
        bits, samples = int(file.BitsStored), int(file.SamplesPerPixel)
        inverted = file.PhotometricInterpretation == "MONOCHROME1"              # there 0 is white
        grey = file.pixel_array if pixels and bits == 8 and samples == 1 else None
    except Exception as error:                             # pydicom and its decoders raise many kinds
        raise UsageError(f"cannot read image {path}: {error}; replace the file") from None
    if (bits, samples) != (8, 1):
        raise UsageError(f"cannot read image {path}: {bits} bits and {samples} samples a pixel, expected 8 and 1 as in "
                         "SIIM-ACR; convert it")
    return Image.fromarray(255 - grey if inverted else grey) if pixels else None


class Runs(NamedTuple):
    """A mask as rows of the csv: each "offset length offset length ...", offsets from the end of the run before."""
    rows: tuple

    def __str__(self):
        return f"({len(self.rows)} rows of train-rle.csv)"

    def image(self):
        """The union of all rows -> PIL mask, 0 or 255. Runs go down columns, so the flat array is the transpose."""
        mask = np.zeros(SIDE * SIDE, np.uint8)
        for row in self.rows:
            numbers, end = [int(x) for x in row.split()], 0
            for offset, length in zip(numbers[::2], numbers[1::2], strict=True):
                mask[end + offset:end + offset + length] = 255
                end += offset + length
            if end > len(mask):
                raise ValueError(f"its runs end at pixel {end} of {len(mask)}")
        return Image.fromarray(mask.reshape(SIDE, SIDE).T.copy())


class Mask(NamedTuple):
    """A mask file; those that the published code prepares are transposed."""
    path: Path
    transposed: bool

    def image(self):
        with Image.open(self.path) as mask:
            return mask.convert("L").transpose(Image.Transpose.TRANSPOSE) if self.transposed else mask.convert("L")


def read_runs(path):
    """train-rle.csv -> {uid: Runs}, no rows for a negative. Both releases: names and values are stripped.

    An image has a row for each region, or one row "-1"; UsageError for both, or for a file without the columns.
    """
    found = {}
    with open(path, newline="") as file:
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        if header[:2] != ["ImageId", "EncodedPixels"]:
            raise UsageError(f"{path}: its columns are {header}, expected ImageId and EncodedPixels; download it again")
        for uid, row, *_ in filter(None, reader):
            found.setdefault(uid.strip(), []).append(row.strip())
    for uid, rows in found.items():
        if "-1" in rows and set(rows) != {"-1"}:
            raise UsageError(f"{path}: image {uid} has both -1 and a mask; download the file again")
    return {uid: Runs(() if "-1" in rows else tuple(rows)) for uid, rows in found.items()}


class PlainUnpickler(pickle.Unpickler):
    """Numbers, strings, lists and dicts only: a pickle that names any class or function is refused, not run."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a table of labels does not need")


def read_tubes(path):
    """Chest tubes -> {uid: bool}, from cxr_tube_dict.pkl or from a csv with the columns ImageId,chest_tube."""
    try:
        if path.suffix == ".csv":
            with open(path, newline="") as file:
                rows = [{k.strip(): v.strip() for k, v in row.items()} for row in csv.DictReader(file)]
            known = {"0": False, "1": True, "false": False, "true": True}
            return {row["ImageId"]: known[row["chest_tube"].lower()] for row in rows}
        with open(path, "rb") as file:
            tubes = PlainUnpickler(file).load()
        plain = isinstance(tubes, dict) and all(isinstance(k, str) and isinstance(v, bool) for k, v in tubes.items())
        if not plain:
            raise ValueError("it is no dict of str -> bool")
        return tubes
    except Exception as error:                             # a damaged pickle can fail in many ways
        raise UsageError(f"{path}: cannot read chest tubes ({type(error).__name__}: {error}); use the published pickle "
                         "or a csv with the columns ImageId,chest_tube and values 0 or 1") from None
