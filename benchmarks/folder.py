"""folder.py: pictures of one's own, sorted into folders or listed in a table. Floor: data; read samples.py first.

    PATH/{train,val,test}/<class>/**/<picture>           no places are known: the classes are the groups
    PATH/metadata.csv                                    filename, label, split; where they are known place, mask, id

Splits may be missing. load_folder finds the pictures; survey then looks at the files, leaves out what cannot be read,
and says in one line each what is odd about the data.
"""
import math
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

from benchmarks.files import (FILE, PICTURES, TEXT, Kind, NotThere, Unusable, digest_of_rest, exists, folders,
                              has_alpha, listed, look_at, not_empty, one_of, read_rows, say, too_deep)
from benchmarks.samples import Samples
from settings import UsageError

SPLITS = {"train": ("train", "0"), "val": ("val", "valid", "validation", "1"), "test": ("test", "2")}
LAYOUT = ("{train,val,test}/<class>/**/<picture>, or metadata.csv with the columns filename, label (or y), split, and "
          "where they are known place (or a), mask, id")
TABLE = "metadata.csv"


class Row(NamedTuple):
    """One picture of a folder. place: None where the table has no such column; mask: a path, an Alpha, or None."""
    split: str
    id: str
    path: Path
    label: str
    place: str | None = None
    mask: object = None


NO_ALPHA = "its mask is to be its transparency, and it has none; save it with an alpha channel, or name a mask"


class Alpha:
    """A true mask that is the transparency of its picture: what is transparent is background."""

    def __init__(self, path):
        self.path = path

    def image(self):
        """-> PIL image in mode L, upright as the picture."""
        with Image.open(self.path) as picture:
            if not has_alpha(picture):
                raise Unusable(NO_ALPHA)
            return ImageOps.exif_transpose(picture).convert("RGBA").getchannel("A")


def title_of(root):
    """The name of a folder, which its runs and reports have."""
    return Path(root).resolve().name or "folder"


def in_order(words):
    """Labels or places, each once: numbers by their size, all others sorted."""
    def number(word):
        value = float(word)
        if not math.isfinite(value):
            raise ValueError
        return value, word
    words = set(words)
    try:
        return sorted(words, key=number)
    except ValueError:
        return sorted(words)


def named(kind, words):
    """Names of classes or places: a number says what it is a number of."""
    return [f"{kind} {word}" if word[-1].isdecimal() and word.replace(".", "").lstrip("-").isdecimal() else word
            for word in words]


# ---------------------------------------------------------------- the two layouts
def load_folder(root, size, seed):
    """Pictures of one's own -> {split: Samples}, of the splits that there are.

    A label is a word or a number; its class is its place among all of them (in_order), whatever the split. group =
    class * places + place. Raises UsageError for a folder that is laid out in another way, a line of the table that is
    not as expected, and where there is one class only. Files are not opened.
    """
    rows = table_rows(root) if exists(root / TABLE) else folder_rows(root)
    classes = in_order(row.label for row in rows)
    places = in_order(row.place for row in rows if row.place)
    if len(classes) < 2:
        raise UsageError(f"folder: all pictures under {root.resolve()} are of one class, {classes[0]}: there is "
                         "nothing to tell apart; add another class")
    mine = {split: [row for row in rows if row.split == split] for split in SPLITS}
    return {split: samples(title_of(root), split, some, size, seed, classes, places)
            for split, some in mine.items() if some}


def samples(title, split, rows, size, seed, classes, places):
    """The rows of a split -> Samples. Places and masks are used where all of its rows have them."""
    numbers = {name: i for i, name in enumerate(classes)}, {name: i for i, name in enumerate(places)}
    labels, known = [numbers[0][row.label] for row in rows], [row for row in rows if row.place]
    if 0 < len(known) < len(rows):
        bare = next(row for row in rows if not row.place)
        raise UsageError(f"folder: {len(rows) - len(known)} of {len(rows)} rows of {split} have no place, first "
                         f"{bare.id}; give each one, or none of this split")
    groups = [y * len(places) + numbers[1][row.place] for y, row in zip(labels, rows)] if known else None
    masks = [row.mask for row in rows]
    if bare := masks.count(None) * any(masks):
        say(f"{title}: {bare} of {len(rows)} rows of {split} have no mask: its masks are not used")
    found = Samples("folder", split, size, named("class", classes), [row.id for row in rows],
                    [row.path for row in rows], labels, named("place", places) if known else (), groups,
                    None if None in masks else masks, seed=seed)
    found.title, found.partial, found.upright = title, True, True
    return found


def folder_rows(root):
    """{train,val,test}/<class>/**/<picture> -> [Row], sorted by name within a class. Other files are counted."""
    rows, other, empty = [], Counter(), []
    there = {split: [name for name in names if not name.isdecimal() and exists(root / name)]
             for split, names in SPLITS.items()}
    if not any(there.values()):
        raise other_layout(root)
    for split, names in there.items():
        if len(names) > 1:
            raise UsageError(f"folder: {root.resolve()} has {names[0]} and {names[1]}; keep one of them")
        for name in names:
            for label in folders(root / name):
                found = list(below(root, f"{name}/{label}"))
                pictures = [file for file in found if file.lower().endswith(PICTURES)]
                other.update(os.path.splitext(file)[1] or file for file in found if not file.lower().endswith(PICTURES))
                empty += [f"{name}/{label}"] * (not pictures)
                rows += [Row(split, file, root / file, label) for file in pictures]
    if other:
        say(f"{title_of(root)}: left out {other.total()} file{'s' * (other.total() > 1)} with the ending of no picture "
            f"({', '.join(kind for kind, _ in other.most_common(3))})")
    if empty:
        say(f"{title_of(root)}: no pictures in the folder{'s' * (len(empty) > 1)} {several(empty)}")
    if not rows:
        raise UsageError(f"folder: no pictures under {root.resolve()}; expected {LAYOUT}")
    return rows


def below(root, folder, seen=()):
    """Names of all files in a folder under root and in its folders, sorted; a link back to itself leads nowhere."""
    here = os.stat(root / folder)
    mine = (here.st_dev, here.st_ino)
    entries = [] if mine in seen else listed(root / folder)
    for entry in entries:
        name = f"{folder}/{entry.name}"
        if entry.is_dir():
            yield from below(root, name, (*seen, mine))
        else:
            yield name


def other_layout(root):
    """The UsageError for a folder that has no splits and no table, which says what it seems to be."""
    if not exists(root) or not root.is_dir():
        return NotThere(root / "train", root / TABLE)
    here, names = root.resolve(), [entry.name for entry in listed(root)]
    holds = lambda path: exists(path / TABLE) or exists(path / "train")
    if above := too_deep(root, (root / TABLE, root / "train"), levels=2):
        return UsageError(f"folder: --root {root} is too deep, give {above}")
    inside = folders(root)
    if deeper := next((root / name for name in inside if holds(root / name)), None):
        return UsageError(f"folder: --root {root} is not deep enough, give {deeper}")
    has_pictures = lambda names: any(name.lower().endswith(PICTURES) for name in names)
    classes = [name for name in inside if has_pictures(entry.name for entry in listed(root / name))]
    if classes:
        return UsageError(f"folder: {here} has folders of pictures ({several(classes)}) and no train: move them into "
                          f"{here / 'train'}, and those to measure on into test; or write {TABLE}")
    found = "pictures, but no folders of classes" if has_pictures(names) else several(names) or "nothing"
    return UsageError(f"folder: {here} holds {found}; expected {LAYOUT}; name the folder with --root")


COLUMNS = {"filename or img_filename": FILE, "label or y": Kind("a class, a word or a number", not_empty),
           "split": one_of({name: split for split, names in SPLITS.items() for name in names}),
           "place or a": TEXT, "mask": TEXT, "id or img_id": TEXT}


def table_rows(root):
    """metadata.csv -> [Row]. A mask is a file below the folder, or "alpha" (or its picture) for the transparency."""
    table, rows = root / TABLE, []
    for line, file, label, split, place, mask, name in read_rows(table, COLUMNS, True, list(COLUMNS)[3:]):
        try:
            mask = mask and (Alpha(root / file) if mask in ("alpha", file) else root / FILE.read(mask))
        except ValueError:
            raise UsageError(f"{table}, line {line}: mask is {mask!r}, expected {FILE.expected}, or alpha") from None
        rows.append(Row(split, name or file, root / file, label, place or None, mask or None))
    if not rows:
        raise UsageError(f"{table} has no rows; expected {LAYOUT}")
    if twice := [f"{name} of {split}" for (split, name), n in Counter(row[:2] for row in rows).items() if n > 1]:
        raise UsageError(f"{table}: two rows have the same id (or filename, without ids): {several(twice)}; give each "
                         "one of its own, or remove one")
    return rows


# ---------------------------------------------------------------- what is odd about them
def several(names, most=3):
    """The first few of some names."""
    return ", ".join(map(str, names[:most])) + f" and {len(names) - most} more" * (len(names) > most)


def survey(found, looked=None):
    """Look at the files of these splits (default: all), and at the labels of all -> lines on what is odd.

    What cannot be read is left out of {split: Samples}. UsageError where training, or measuring, would be meaningless:
    a split without a readable file, a class to measure without training images.
    """
    lacking(found)                                       # before a file is opened
    faults = {split: [] for split in found}
    looks = {split: leave_out(some, faults[split]) for split, some in found.items()
             if looked is None or split in looked}
    try:
        notes = {split: faults[split] + more for split, more in lacking(found).items()}
    except UsageError as error:                          # it was not so before files were left out
        raise UsageError(f"{error} ({'; '.join(line for lines in faults.values() for line in lines)})") from None
    if looked is None:
        duplicates(found, looks, notes)
    for split, some in found.items():
        some.differs = "; ".join(notes[split])
    return [f"{some.title}: {line}" for split, some in found.items() if split in looks for line in notes[split]]


def leave_out(some, notes):
    """Open every picture and mask of a split once; what cannot be read is left out -> [Look] of the pictures kept."""
    looks = look_at(some.paths, f"{some.title} {some.split}")
    faults = {i: f"{some.paths[i]}: {look.fault}" for i, look in enumerate(looks) if look.fault}
    if some.masks:
        masks = [getattr(mask, "path", mask) for mask in some.masks]
        own = [i for i, mask in enumerate(some.masks) if not isinstance(mask, Alpha)]
        faults |= {i: f"{masks[i]}: {NO_ALPHA}" for i in set(range(len(some))) - set(own) - faults.keys()
                   if not looks[i].alpha}
        for i, look in zip(own, look_at([masks[i] for i in own], f"{some.title} {some.split} masks")):
            if look.fault:
                faults.setdefault(i, f"{masks[i]}: {look.fault}")
    faults = dict(sorted(faults.items()))
    if len(faults) == len(some):
        raise UsageError(f"folder: none of the {len(some)} files of {some.split} can be read, first {faults[0]}")
    if faults:
        notes.append(f"{len(faults)} of {len(some)} files of {some.split} cannot be read and are left out: "
                     f"{several(list(faults.values()))}")
        kept = [i for i in range(len(some)) if i not in faults]
        some.keep(kept)
        looks = [looks[i] for i in kept]
    some.checked = True
    return looks


def lacking(found):
    """Classes and groups that a split has and another lacks -> {split: [line]}; UsageError for what is not learned."""
    notes = {split: [] for split in found}
    if "train" not in found:
        return notes
    train = found["train"]
    learned = train.labels.bincount(minlength=len(train.classes))
    if (learned > 0).sum() < 2:
        raise UsageError("folder: train has images of one class only: there is nothing to tell apart")
    for split, some in found.items():
        count = some.labels.bincount(minlength=len(train.classes))
        if never := [some.classes[c] for c in (count * (learned == 0)).nonzero()[:, 0]]:
            raise UsageError(f"folder: {split} has images of {several(never)}, and train has none: this cannot be "
                             "learned; add some, or remove these")
        if absent := [some.classes[c] for c in (count == 0).nonzero()[:, 0]]:
            notes[split].append(f"{split} has no images of {several(absent)}")
        if bool(some.places) != bool(train.places):
            notes[split].append(f"{split} has {'places' if some.places else 'no places'}, unlike train")
        elif some.places:
            here, there = (x.groups.bincount(minlength=len(x.group_names)) for x in (some, train))
            if new := [f"{some.group_names[g]} ({here[g]} image{'s' * (here[g] > 1)})"
                       for g in (here * (there == 0)).nonzero()[:, 0]]:
                notes[split].append(f"{split} has groups that train lacks: {several(new)}")
    return notes


def duplicates(found, looks, notes):
    """The same content in two splits, to notes. Read to the end are only files of the same size and the same head."""
    alike = {}
    for split, seen in looks.items():
        for i, look in enumerate(seen):
            alike.setdefault((look.size, look.head), []).append((split, i))
    twins = {}
    for (size, _), members in alike.items():
        if len({split for split, _ in members}) < 2:
            continue
        contents = {}
        for split, i in members:
            contents.setdefault(digest_of_rest(found[split].paths[i]), {}).setdefault(split, i)
        for where in contents.values():
            first, *others = where
            for other in others:
                twins.setdefault((first, other), []).append((where[first], where[other]))
    for (first, other), pairs in twins.items():
        names = [f"{found[first].ids[i]} = {found[other].ids[j]}" for i, j in pairs]
        notes[other].append(f"{len(names)} file{'s' * (len(names) > 1)} of {other} with the content of one in {first}: "
                            f"{several(names)}")
