"""files.py: what lies on disk: folders listed, tables read line by line, pictures opened; an error says what is wrong.

Floor: data. Nothing needs to be read before. Benchmarks read everything through it; whoever wants to know how a
picture becomes pixels reads `read_image`. Every error is one line that names the file, the line of a table, and what
was expected there.
"""
import csv
import functools
import hashlib
import io
import multiprocessing
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from settings import UsageError, may_write, progress, rank, write_csv, write_whole

PHOTOS = (".jpeg", ".jpg", ".png")                         # what the published archives hold
PICTURES = (*PHOTOS, ".avif", ".bmp", ".dcm", ".gif", ".jfif", ".jp2", ".pgm", ".ppm", ".tif", ".tiff", ".webp")


def say(line):
    """Print a line about the data, from one process alone."""
    if not rank() and multiprocessing.parent_process() is None:
        print(line)


say_once = functools.cache(say)


# ---------------------------------------------------------------- files and folders
class NotThere(UsageError):
    """A file or folder of a benchmark is not where it belongs; data.read says which archive brings it."""

    def __init__(self, path, *others):
        self.path, self.paths = path, (path, *others)    # any of them would do
        above = next((p for p in path.parents if exists(p)), path)
        super().__init__(f"looked for {os.path.abspath(path)}, which is not there"
                         + f": {above} is a file, not a folder" * above.is_file())


def refused(path, error):
    """An OSError while a path was looked at -> the UsageError that gives the system's own reason."""
    return UsageError(f"cannot read {path}: {error.strerror or error}")


def exists(path):
    try:
        return path.exists()
    except OSError as error:
        raise refused(path, error) from None


def there(*paths):
    """The first of these that exists; NotThere names the first."""
    for path in paths:
        if exists(path):
            return path
    raise NotThere(*paths)


def too_deep(root, paths, levels=4):
    """The nearest folder above `root` that has one of these paths, looked for under root in vain; None if none has."""
    above = root.resolve().parents[:levels] if root.is_dir() else ()             # --root data/CUB_200_2011/images
    return next((up for up in above for path in paths if exists(up / path.relative_to(root))), None)


def listed(path):
    """What lies directly under a folder, hidden things aside, sorted by name -> list of DirEntry."""
    try:
        return sorted((e for e in os.scandir(path) if not e.name.startswith(".")), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        raise NotThere(path) from None
    except OSError as error:
        raise refused(path, error) from None


def folders(path):
    """Names of the folders directly under path, sorted."""
    return [entry.name for entry in listed(path) if entry.is_dir()]


def files(path, *suffixes):
    """Names of the files directly under path with one of these endings, whatever their case, sorted."""
    return [e.name for e in listed(path) if e.name.lower().endswith(suffixes) and not e.is_dir()]


def is_miniature(root):
    """A miniature's counts are not its benchmark's. It has a miniature.json, or (Waterbirds) the name of one alone."""
    return exists(root / "miniature.json") or bool(re.fullmatch(r"waterbirds-[0-9a-f]{10}", root.resolve().name))


def drawn_masks(root, names):
    """A miniature's true masks of the object, where its benchmark has none -> their paths, or None.

    names: the images', relative to segmentations/; an iterable that is read only if the masks are there.
    """
    masks = root / "segmentations"
    there = is_miniature(root) and masks.is_dir()
    return [masks / f"{name}.png" for name in names] if there else None


# ---------------------------------------------------------------- tables
class Kind(NamedTuple):
    """What a field of a table must be. read: its text -> its value; ValueError or KeyError if it is something else."""
    expected: str
    read: Callable


def within(convert, low, high):
    """A number between two bounds, which no NaN and no infinity is."""
    def read(text):
        if not low <= (value := convert(text)) <= high:
            raise ValueError
        return value
    return Kind(f"a {'whole ' * (convert is int)}number from {low} to {high}", read)


def one_of(values):
    """One of these texts, {text: value}."""
    return Kind(f"one of {', '.join(values)}", values.__getitem__)


def not_empty(text):
    if not text:
        raise ValueError
    return text


def word(text):
    (one,) = text.split()
    return one


def file_name(text):
    parts = text.split("/")
    if "\0" in text or any(part in ("", ".", "..") or len(os.fsencode(part)) > 255 for part in parts):
        raise ValueError
    return text


ID = Kind("a whole number", lambda text: str(int(text)))
WORD = Kind("a word without blanks", word)
TEXT = Kind("text", str)
NAME = Kind("a name", not_empty)
FILE = Kind("the name of a file below the folder of the images", file_name)


def read_bytes(path):
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise NotThere(path) from None
    except OSError as error:
        raise refused(path, error) from None


def read_rows(path, columns, commas=False, optional=()):
    """A text table -> [(line number, a value of each column)]. columns: {name: Kind}, in the order of the values.

    Blanks separate the fields, and the last one is the rest of its line. commas: as a csv, whose first line names the
    columns, in any order and with others among them; "label or y" is the first of these that it has, and the value of
    an `optional` column that it does not have is None. Blank lines are skipped. UsageError with file and line.
    """
    content = read_bytes(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else f"the byte {content[error.start]:#x}"
        raise UsageError(f"{path}, line {content[:error.start].count(10) + 1}: found {found}, expected "
                         f"{', '.join(columns)} as UTF-8 text") from None
    lines = enumerate(text.split("\n"), 1)
    rows = csv_rows(path, text, columns, optional) if commas else (
        (number, line.strip().split(None, len(columns) - 1)) for number, line in lines if line.strip())
    return [(number, *values(path, number, fields, columns)) for number, fields in rows]


def values(path, number, fields, columns):
    """The fields of a line -> their values."""
    if len(fields) != len(columns):
        raise UsageError(f"{path}, line {number}: {len(fields)} of {len(columns)} fields, expected "
                         f"{', '.join(columns)}")
    try:
        return [None if field is None else kind.read(field) for kind, field in zip(columns.values(), fields)]
    except (ValueError, KeyError):
        for (name, kind), field in zip(columns.items(), fields):
            try:
                kind.read(field)
            except (ValueError, KeyError):
                shown = repr(field if len(field) <= 60 else field[:60] + "...")
                raise UsageError(f"{path}, line {number}: {name} is {shown}, expected {kind.expected}") from None


def csv_rows(path, text, columns, optional=()):
    """The lines of a csv below its first -> (line number, texts of these columns), blanks around them dropped.

    None for an optional column that is not there.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        known = {column: next((name for name in column.split(" or ") if name in names), None) for column in columns}
        if absent := [column for column, name in known.items() if name is None and column not in optional]:
            found = next((f"{sign!r} between them" for sign in ";\t|" if any(sign in name for name in names)),
                         f"the columns {', '.join(names)}" if names else "nothing")
            raise UsageError(f"{path}, line 1: has no column {absent[0]}; found {found}, expected {', '.join(columns)} "
                             "with commas between them")
        for row in filter(None, reader):
            if len(row) != len(names):
                raise UsageError(f"{path}, line {reader.line_num}: {len(row)} fields, expected {len(names)} as in "
                                 "line 1")
            of = dict(zip(names, row))
            yield reader.line_num, [None if name is None else of[name].strip() for name in known.values()]
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: {error}; expected {', '.join(columns)} with commas between "
                         "them") from None


def read_keyed(path, columns, commas=False):
    """read_rows by the first column, which no two rows may share -> {its value: the other value, or all others}."""
    found = {}
    for number, key, *others in read_rows(path, columns, commas):
        if key in found:
            raise UsageError(f"{path}, line {number}: {next(iter(columns))} {key} a second time")
        found[key] = others[0] if len(others) == 1 else others
    return found


def read_groups(path, samples, advice={}):
    """A groups file, a csv of id and group with a line for each sample of a split -> (names, groups (n,) long).

    names: of the groups, sorted; groups: of each sample, in the order of the split. advice: {name: what to do} where
    every sample is in the group of that name. UsageError for that, for a sample that is missing or stands there twice,
    and for one of others.
    """
    path, where = Path(path), f"{samples.name} {samples.split}"
    if not path.is_file():
        raise UsageError(f"{path}: no such file; expected a csv of id and group with a line for each sample of {where}")
    found = read_keyed(path, {"id": NAME, "group": NAME}, commas=True)
    ids = [name.strip() for name in samples.ids]
    if missing := next((name for name in ids if name not in found), None):
        raise UsageError(f"{path}: sample {missing} of {where} is missing; write it again for these {len(ids)} images")
    if len(found) > len(ids):
        other = min(found.keys() - set(ids))
        raise UsageError(f"{path}: {other} is no sample of {where}; write it again for these {len(ids)} images")
    names = sorted(set(found.values()))
    if len(names) < 2:
        raise UsageError(f"{path}: every sample is in the group {names[0]}, and there must be two groups"
                         + advice.get(names[0], ""))
    number = {name: g for g, name in enumerate(names)}
    return names, torch.tensor([number[found[name]] for name in ids])


def write_groups(path, ids, groups):
    """Write a groups file, as read_groups reads it. ids and groups: names, of each sample."""
    write_csv(path, [{"id": name, "group": group} for name, group in zip(ids, groups, strict=True)])


def digest_of_groups(groups):
    """What tells groups of a split, their names in order, from others: how many, and 16 digits of a SHA-256."""
    return [len(set(groups)), hashlib.sha256("\n".join(groups).encode()).hexdigest()[:16]]


# ---------------------------------------------------------------- pictures
# What lies behind transparent pixels: white paper behind a picture; in a mask they are background.
BEHIND = {"RGB": "white", "L": "black"}


def read_image(path, mode=None, upright=False, least=0):
    """Open and decode as mode "RGB" (a picture) or "L" (a mask), or look at the header only; UsageError if it is none.

    Also DICOM files, masks that are arrays (.npy, 1 = object), and anything that has a picture to give (image()).
    upright: turn it as its EXIF orientation says, which is right for people's own photographs. The benchmarks are read
    as they are stored: their annotations are in stored pixels, and the published code reads them so. least: decode a
    JPEG file at 1/2, 1/4 or 1/8 of its sides, as long as both keep so many pixels (JPEG's "draft"); 0: as it is.
    """
    try:
        if not isinstance(path, Path):
            return path.image()
        with quiet():
            return decoded(path, path, mode, upright, least)
    except (UsageError, MemoryError):
        raise
    except Exception as error:                           # decoders raise many kinds
        raise UsageError(f"cannot read image {getattr(path, 'path', path)}: {why_not(error)}") from None


@contextmanager
def quiet():
    """Inside, what libraries warn of is either refused or harmless."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def decoded(file, path, mode=None, upright=False, least=0):
    """What read_image gives of a file, which is open or is its path; raises what the decoders do."""
    if path.suffix == ".dcm":
        image = read_dicom(file, pixels=bool(mode))
        return image and image.convert(mode)
    if path.suffix == ".npy":
        return read_array(file)
    with Image.open(file) as image:
        white = white_of(image)
        if not mode:
            return None
        if least:
            image.draft(None, (least, least))            # nothing happens to other files, and to smaller ones
        image = ImageOps.exif_transpose(image) if upright else image
        return eight_bits(image, mode, white)


def why_not(error):
    """What a decoder raised -> why a file cannot be read and what to do, as the end of a line."""
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, ImportError):
        return "it is a DICOM file and pydicom is not installed: pip install pydicom"
    reason = str(error) or type(error).__name__
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"{reason.split(',')[0]}; make it smaller"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is no picture; replace the file"
    if isinstance(error, OSError) and error.errno:
        return error.strerror
    return reason if isinstance(error, Unusable) else f"{reason}; replace the file"


HEAD = 4096                     # bytes of a file that are read to look at it; most headers are shorter


class Look(NamedTuple):
    """What the head of a file says."""
    fault: str                  # why it cannot be read; "" if it can
    size: int = 0
    head: bytes = b""           # digest of the first HEAD bytes
    alpha: bool = False         # has it transparency?


def look(path):
    """Open a picture once and read its header -> Look."""
    try:
        with open(path, "rb") as file:
            size, head = os.fstat(file.fileno()).st_size, hashlib.blake2b(file.read(HEAD), digest_size=16).digest()
            file.seek(0)
            if path.suffix in (".dcm", ".npy"):
                decoded(file, path)
                return Look("", size, head)
            with Image.open(file) as image:
                white_of(image)
                return Look("", size, head, has_alpha(image))
    except MemoryError:
        raise
    except Exception as error:
        return Look(why_not(error))


def look_at(paths, title, at_once=8, portion=256):
    """look() at many files -> [Look] in their order. Several at once: a disk that is far away answers late."""
    portions = [range(start, min(start + portion, len(paths))) for start in range(0, len(paths), portion)]
    with quiet(), ThreadPoolExecutor(at_once) as pool:   # warnings are those of the process: set once, not by thread
        found = pool.map(lambda numbers: [look(paths[i]) for i in numbers], portions)
        return [one for some in progress(found, title, len(portions)) for one in some]


def digest_of_rest(path):
    """What follows the first HEAD bytes of a file, digested."""
    with open(path, "rb", buffering=0) as file:
        file.seek(HEAD)
        return hashlib.file_digest(file, "sha256").digest()


class Unusable(ValueError):
    """An intact file that holds something else than was expected."""


def white_of(image):
    """The value of white in an opened picture of more than 8 bits a channel; None for all others, whose white is 255.

    Unusable where neither the format nor the file says it.
    """
    if image.mode == "F":
        return 1.0
    if image.mode == "I" and image.format not in ("PNG", "PPM"):                # of these, Pillow makes it 16 bits
        raise Unusable("32-bit whole numbers, of which nothing says what is white; save it with 8 or 16 bits")
    if image.mode[0] != "I":
        return None
    bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]                      # a TIFF says how many it uses
    say_once(f"greyscale of {bits} bits: 0 is taken as black and {2 ** bits - 1} as white, here and in all such "
             "pictures")
    return 2 ** bits - 1


def has_alpha(image):
    """May pixels of a picture be transparent?"""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def eight_bits(image, mode, white=None):
    """A picture of any kind -> PIL image of this mode. white: as white_of says.

    In a mask of more than 8 bits all that is above 0 is object. A transparent picture lies on BEHIND.
    """
    if white:
        pixels = np.asarray(image, dtype=np.float64)
        low, high = pixels.min(), pixels.max()
        if mode == "L":
            return Image.fromarray((pixels > 0).astype(np.uint8) * 255)
        if not 0 <= low <= high <= white:
            raise Unusable(f"its values go from {low:g} to {high:g}, expected 0 (black) to {white:g} (white)")
        if white == 65535 and 0 < high < 4096:
            raise Unusable(f"its values go up to {high:g} of 65535: it seems to use fewer than 16 bits, and nothing "
                           "says how many; save it with 8 bits, or with white at 65535")
        return Image.fromarray(np.rint(pixels * (255 / white)).astype(np.uint8)).convert(mode)
    if mode == "RGBA":
        return image.convert(mode)
    if has_alpha(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BEHIND[mode]), image)
    return image.convert(mode)


def read_array(path):
    """A mask as a numpy array (H, W) of numbers or truth values -> PIL image, 255 where it is above 0."""
    array = np.load(path, allow_pickle=False)
    if getattr(array, "ndim", 0) != 2 or array.dtype.kind not in "biuf":
        found = f"shape {array.shape} and type {array.dtype}" if isinstance(array, np.ndarray) else "several arrays"
        raise Unusable(f"{found}, expected a mask of shape (height, width) of numbers")
    return Image.fromarray((array > 0).astype(np.uint8) * 255)


def read_dicom(path, pixels=True):
    """An 8-bit grey DICOM -> PIL image in mode L, white = dense; pixels=False reads its header only and returns None.

    Unusable for more than 8 bits (a cast would wrap); ImportError without pydicom; many kinds for a damaged file.
    """
    import pydicom
    file = pydicom.dcmread(path, stop_before_pixels=not pixels)
    if absent := {"BitsStored", "SamplesPerPixel", "PhotometricInterpretation"} - set(file.dir()):
        raise ValueError(f"it is cut off, or no picture: it has no {min(absent)}")
    bits, samples = int(file.BitsStored), int(file.SamplesPerPixel)
    inverted = file.PhotometricInterpretation == "MONOCHROME1"                  # there 0 is white
    if (bits, samples) != (8, 1):
        raise Unusable(f"{bits} bits and {samples} samples a pixel, expected 8 and 1 as in SIIM-ACR; convert it")
    grey = file.pixel_array if pixels else None
    return Image.fromarray(255 - grey if inverted else grey) if pixels else None


SIGNATURE = PngInfo()           # in every picture that this program draws
SIGNATURE.add_text("Software", "iFAM")


SIGNED = {".pdf": b"/Creator (iFAM)", ".svg": b"<dc:title>iFAM</dc:title>"}      # what "Creator" of matplotlib becomes


def is_our_picture(path):
    """Did this program draw the picture at path? Earlier versions left matplotlib's name in a PNG."""
    if mark := SIGNED.get(Path(path).suffix.lower()):
        return mark in Path(path).read_bytes()
    with Image.open(path) as picture:
        return str(picture.info.get("Software", "")).startswith(("iFAM", "Matplotlib"))


def check_sheet(path, force=False):
    """UsageError unless a sheet of pictures can be written at path; called before it is drawn."""
    may_write(path, is_our_picture, force)
    if Path(path).suffix.lower() != ".png":
        raise UsageError(f"--sheet {path}: name a .png file")


def write_sheet(path, sheet):
    """A PIL picture -> a PNG that says who drew it, whole or not at all."""
    write_whole(path, lambda temporary: sheet.save(temporary, "PNG", pnginfo=SIGNATURE))
