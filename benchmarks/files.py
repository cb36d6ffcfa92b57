"""files.py: what lies on disk: folders listed, pictures opened, and errors that say what is not there.

Floor: data. Benchmarks read through it; whoever wants to know how a picture becomes pixels reads `read_image`.
"""
import csv
import os
from pathlib import Path

import numpy as np
from PIL import Image

from settings import UsageError

PHOTOS = (".jpeg", ".jpg", ".png")


class NotThere(UsageError):
    """A file or folder of a benchmark is not where it belongs; data.load says which archive brings it."""

    def __init__(self, path):
        super().__init__(f"looked for {path.resolve()}, which is not there")


def there(*paths):
    """The first of these that exists; NotThere names the first."""
    for path in paths:
        if path.exists():
            return path
    raise NotThere(paths[0])


def listed(path):
    """What lies directly under path, sorted by name -> list of DirEntry."""
    try:
        return sorted(os.scandir(path), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        raise NotThere(path) from None


def folders(path):
    """Names of the folders directly under path, sorted."""
    return [entry.name for entry in listed(path) if entry.is_dir()]


def files(path, *suffixes):
    """Names of the files directly under path with one of these endings, whatever their case, sorted; no hidden ones."""
    return [e.name for e in listed(path) if e.name.lower().endswith(suffixes) and not e.name.startswith(".")]


def read_csv(path, *columns):
    """A table whose first line names its columns -> [(line number, {column: text})]; blanks around both are dropped."""
    with open(there(path), newline="") as file:
        reader = csv.reader(file)
        names = [name.strip() for name in next(reader, [])]
        for column in columns:
            if column not in names:
                raise UsageError(f"{path} has no column {column}, its columns are {names}; unpack the archive again")
        return [(reader.line_num, dict(zip(names, map(str.strip, row)))) for row in reader if row]


def is_miniature(root):
    """Miniatures whose counts differ from the benchmark's carry a file miniature.json."""
    return (root / "miniature.json").is_file()


def drawn_masks(root, names):
    """A miniature's true masks of the object, where its benchmark has none -> their paths, or None.

    names: the images', relative to segmentations/; an iterable that is read only if the masks are there.
    """
    masks = root / "segmentations"
    there = is_miniature(root) and masks.is_dir()
    return [masks / f"{name}.png" for name in names] if there else None


def read_image(path, mode=None):
    """Open and decode as PIL's mode, or look at the header only; UsageError that names a file that is no image.

    Also DICOM files, masks that are arrays (.npy, 1 = object), and anything that has a picture to give (image()).
    """
    try:
        if not isinstance(path, Path):
            return path.image()
        if path.suffix == ".dcm":
            image = read_dicom(path, pixels=bool(mode))
            return image and image.convert(mode)
        if path.suffix == ".npy":
            return Image.fromarray((np.load(path, allow_pickle=False) > 0).astype(np.uint8) * 255)
        with Image.open(path) as image:
            return image.convert(mode) if mode else None
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"cannot read image {path}: {error}; replace the file") from None


def read_dicom(path, pixels=True):
    """An 8-bit grey DICOM -> PIL image in mode L, white = dense; pixels=False reads its header only and returns None.

    UsageError without pydicom, for more than 8 bits (a cast would wrap), and for a file that is none or is damaged.
    """
    try:
        import pydicom
        file = pydicom.dcmread(path, stop_before_pixels=not pixels)
        bits, samples = int(file.BitsStored), int(file.SamplesPerPixel)
        inverted = file.PhotometricInterpretation == "MONOCHROME1"              # there 0 is white
        grey = file.pixel_array if pixels and (bits, samples) == (8, 1) else None
    except ImportError:
        raise UsageError(f"{path} is a DICOM file and pydicom is not installed: pip install pydicom") from None
    except Exception as error:                             # pydicom and its decoders raise many kinds
        raise UsageError(f"cannot read image {path}: {error}; replace the file") from None
    if (bits, samples) != (8, 1):
        raise UsageError(f"cannot read image {path}: {bits} bits and {samples} samples a pixel, expected 8 and 1 as in "
                         "SIIM-ACR; convert it")
    return Image.fromarray(255 - grey if inverted else grey) if pixels else None
