"""siim.py: SIIM-ACR Pneumothorax: DICOM images, run-length masks, labels, chest tubes. Floor: data.

Unique identifiers (UIDs) hold dots and share prefixes: they are compared whole. Read samples.py first.
"""
import io
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.files import (WORD, Kind, drawn_masks, exists, files, folders, is_miniature, one_of, read_bytes,
                              read_image, read_keyed, read_rows, say, there)
from benchmarks.samples import Samples
from settings import UsageError

SIDE = 1024                                                # pixels of every image and mask
PREPARED = ("train_set", "full_test_set", "robust_test_set", "non_robust_test_set")


class Runs(NamedTuple):
    """A mask as rows of the csv: each "offset length offset length ...", offsets from the end of the run before."""
    rows: tuple
    path = None                                            # it has no file of its own

    def __str__(self):
        return f"({len(self.rows)} rows of train-rle.csv)"

    def image(self):
        """The union of all rows -> PIL mask, 0 or 255. Runs go down columns, so the flat array is the transpose."""
        mask = np.zeros(SIDE * SIDE, np.uint8)
        for row in self.rows:
            edges = np.cumsum([int(x) for x in row.split()])
            for start, end in edges.reshape(-1, 2):
                mask[start:end] = 255
        return Image.fromarray(mask.reshape(SIDE, SIDE).T.copy())


class Mask(NamedTuple):
    """A mask file; those that the published code prepares are transposed."""
    path: Path
    transposed: bool

    def image(self):
        mask = read_image(self.path, "L")
        return mask.transpose(Image.Transpose.TRANSPOSE) if self.transposed else mask


class Row(NamedTuple):
    """An image with a label, wherever it was listed."""
    uid: str
    path: Path
    label: int
    tube: int                                              # None: not known
    mask: object                                           # Runs, Mask or None


def runs_or_none(text):
    """A cell of the csv -> its runs as they are written, "" for -1, which some tools write as -1.0."""
    if re.fullmatch(r"-1(\.0*)?", text):
        return ""
    numbers = [int(x) for x in text.split()]
    if not numbers or len(numbers) % 2 or min(numbers) < 0 or 0 in numbers[1::2] or sum(numbers) > SIDE * SIDE:
        raise ValueError
    return text


CELL = Kind(f"-1, or pairs of an offset and a length above 0 that end within {SIDE} x {SIDE} pixels", runs_or_none)


def read_runs(path):
    """train-rle.csv -> {uid: Runs}, no rows for a negative. Both releases: names and values are stripped.

    An image has a row for each region, or one row "-1"; UsageError for both, or for a cell that is neither.
    """
    found = {}
    for line, uid, runs in read_rows(path, {"ImageId": WORD, "EncodedPixels": CELL}, commas=True):
        rows = found.setdefault(uid, [])
        if rows and "" in (runs, rows[0]) and runs != rows[0]:
            raise UsageError(f"{path}, line {line}: image {uid} has both -1 and a mask; download the file again")
        rows.append(runs)
    return {uid: Runs(tuple(filter(None, rows))) for uid, rows in found.items()}


class PlainUnpickler(pickle.Unpickler):
    """Numbers, strings, lists and dicts only: a pickle that names any class or function is refused, not run."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a table of labels does not need")


def read_tubes(path):
    """Chest tubes -> {uid: bool}, from cxr_tube_dict.pkl or from a csv with the columns ImageId,chest_tube."""
    if path.suffix == ".csv":
        tube = one_of({"0": False, "1": True, "false": False, "true": True, "False": False, "True": True})
        return read_keyed(path, {"ImageId": WORD, "chest_tube": tube}, commas=True)
    content = read_bytes(path)
    try:
        tubes = PlainUnpickler(io.BytesIO(content)).load()
        plain = isinstance(tubes, dict) and all(isinstance(k, str) and isinstance(v, bool) for k, v in tubes.items())
        if not plain:
            raise ValueError("it is no dict of str -> bool")
        return tubes
    except Exception as error:                             # a damaged pickle can fail in many ways
        raise UsageError(f"{path}: cannot read chest tubes ({type(error).__name__}: {error}); use the published pickle "
                         "or a csv with the columns ImageId,chest_tube and values 0 or 1") from None


# ---------------------------------------------------------------- the benchmark
def load_siim(root, size, seed):
    """SIIM-ACR Pneumothorax: Kaggle's files with Saab et al.'s chest tubes, or the folders the published code prepares.

    test: every image with a tube label, group = 2 * label + tube; robust, non_robust: the part of it where a tube
    misleads, and where it helps. train: every other image with a label; nobody knows its tubes. The masks are of the
    pneumothorax; those of a miniature are of the lungs, where all evidence lies.
    """
    found = there(*(root / place / folder for folder in ("dicom-images-train", "train_set")
                    for place in ("siim", "siim/pneumothorax", "pneumothorax", ".")))
    rows = siim_prepared(found.parent, is_miniature(root)) if found.name == "train_set" else siim_raw(found.parent)

    def split(name, mine, places=()):
        uids, paths, labels, tubes, masks = zip(*mine) if mine else [()] * 5
        lungs = drawn_masks(root, uids)
        found = Samples("siim", name, size, ("healthy", "pneumothorax"), uids, paths, labels, places,
                        [2 * y + tube for y, tube in zip(labels, tubes)] if places else None,
                        masks=lungs or (masks if all(masks) else None), seed=seed)
        found.masks_tell = lungs is None
        return found
    test = split("test", [r for r in rows if r.tube is not None], ("without tube", "with tube"))
    misleads = (test.labels != test.groups % 2).tolist()                         # the tube is the group's last bit
    return {"train": split("train", [r for r in rows if r.tube is None]), "test": test,
            **{name: test.part(name, [i for i, x in enumerate(misleads) if x == wanted])
               for name, wanted in (("robust", True), ("non_robust", False))}}


def siim_raw(base):
    """Kaggle's layout -> Rows. What has no label is left out, and counted."""
    runs, paths = read_runs(base / "train-rle.csv"), {}
    tubes = read_tubes(there(base / "cxr_tube_dict.pkl", base / "cxr_tube_dict.csv"))
    images = base / "dicom-images-train"
    for path in (images / study / series / file for study in folders(images) for series in folders(images / study)
                 for file in files(images / study / series, ".dcm")):
        if paths.setdefault(path.name[:-len(".dcm")], path) != path:              # a UID has dots: no stem but this
            raise UsageError(f"siim: {path} and {paths[path.name[:-4]]} have the same UID; unpack the archive again")
    say(f"siim: {len(paths)} images; left out: {len(paths.keys() - runs)} without a row in train-rle.csv, "
        f"{len(runs.keys() - paths)} rows and {len(tubes.keys() - paths)} tube labels without an image")
    return [Row(uid, path, int(bool(runs[uid].rows)), tubes.get(uid), runs[uid]) for uid, path in paths.items()
            if uid in runs]


def siim_prepared(base, upright):
    """The published code's folders <set>/<label>/<uid>.dcm -> Rows.

    Its all_masks are transposed (and hold one region an image), but for those of a miniature: `upright`.
    """
    found = {(s, y): {Path(f).with_suffix("").name: base / s / str(y) / f
                      for f in files(base / s / str(y), ".dcm", ".png", ".jpg")}
             for s in PREPARED for y in (0, 1)}
    masks, rows = base / "all_masks", []
    for (s, y), paths in found.items():
        for uid, path in paths.items() if s in PREPARED[:2] else ():
            robust, easy = (uid in found[other, y] for other in PREPARED[2:])
            if s == "full_test_set" and robust == easy:
                raise UsageError(f"siim: {path} is in {'both' if robust else 'neither'} of robust_test_set and "
                                 "non_robust_test_set; prepare the folders again")
            mask = Runs(()) if not y else Mask(masks / f"{uid}.png", not upright) if exists(masks) else None
            rows.append(Row(uid, path, y, None if s == "train_set" else int(robust != bool(y)), mask))
    return sorted(rows, key=lambda row: row.uid)
