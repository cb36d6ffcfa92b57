"""imagenet.py: ImageNet-1K and ImageNet-9, which evaluates its models. Floor: data; read samples.py first."""
import os
import re
from collections import Counter

import numpy as np
import torch

from benchmarks.files import PHOTOS, TEXT, WORD, drawn_masks, exists, files, folders, is_miniature, read_keyed
from benchmarks.samples import Names, Samples
from settings import UsageError, read_json


WNID = r"n\d{8}"                                           # WordNet's number of a class: the name of its folder
CLASSES = 1000


def class_folders(path):
    """The wnids that have a folder under path, sorted; UsageError for folders that are numbers, and for none."""
    names = folders(path)
    wnids = [name for name in names if re.fullmatch(WNID, name)]
    if numbers := [name for name in names if name.isdecimal()]:
        raise UsageError(f"imagenet: {path} has folders named by number ({numbers[0]}), which may count in any order; "
                         "expected wnids such as n01440764")
    if not wnids and files(path, *PHOTOS):
        raise UsageError(f"imagenet: {path} has images and no folders, as the archive of the validation set; sort them "
                         "into a folder for each wnid with valprep.sh (github.com/soumith/imagenetloader.torch)")
    if not wnids:
        raise UsageError(f"imagenet: {path} has no folders named by wnid, such as n01440764; unpack the archive and "
                         "those in it")
    return wnids


def numbered(root):
    """{wnid: class} as a file beside the images says, or None without one.

    It is the miniature.json of a miniature, {"wnids": {wnid: class}}, or LOC_synset_mapping.txt as Kaggle ships it: a
    line for each of the 1000 wnids, sorted, with its names.
    """
    drawn, kaggle = root / "miniature.json", root / "LOC_synset_mapping.txt"
    if exists(drawn):
        content = read_json(drawn, "what was drawn")
        known = content.get("wnids", {}) if isinstance(content, dict) else None
        if not isinstance(known, dict) or not all(type(i) is int and 0 <= i < CLASSES for i in known.values()):
            raise UsageError(f"{drawn}: expected an object with wnids: {{wnid: class}}; draw it again")
        return known or None
    if not exists(kaggle):
        return None
    wnids = list(read_keyed(kaggle, {"wnid": WORD, "names": TEXT}))
    if wnids != sorted(wnids) or len(wnids) != CLASSES:
        raise UsageError(f"{kaggle}: {len(wnids)} wnids, expected {CLASSES}, sorted")
    return {wnid: i for i, wnid in enumerate(wnids)}


def load_imagenet(root, size, seed):
    """ImageNet-1K: <split>/<wnid>/<file>; a class is the rank of its wnid. val is the test split, as in every paper.

    A part of the 1000 classes is read where a file tells which they are.
    """
    base, known = root / "imagenet", numbered(root)
    there = [split for split in ("train", "val") if exists(base / split)]
    wnids, *others = [class_folders(base / split) for split in there or ["train"]]
    for odd in sorted(set(wnids).symmetric_difference(*others)) if others else ():
        raise UsageError(f"imagenet: {base / 'train'} and {base / 'val'} differ in {odd}; both need the same wnids")
    if known is None and len(wnids) != CLASSES:
        raise UsageError(f"imagenet: {len(wnids)} classes under {base}, not {CLASSES}: a label is the place of a wnid "
                         "among all of them, which a part does not tell; unpack the others, or put Kaggle's "
                         f"LOC_synset_mapping.txt into {root}")
    known = known or {wnid: i for i, wnid in enumerate(wnids)}
    if unknown := [wnid for wnid in wnids if wnid not in known]:
        raise UsageError(f"imagenet: {base} has the folder {unknown[0]}, which has no class among those listed under "
                         f"{root}")
    wnid_of, drawn = {i: wnid for wnid, i in known.items()}, is_miniature(root)

    def split(name, folder):
        blocks = [np.array([os.fsencode(f"{folder}/{wnid}/{f}") for f in files(base / folder / wnid, *PHOTOS)],
                           dtype=bytes) for wnid in wnids]
        if empty := [wnid for wnid, block in zip(wnids, blocks) if not len(block) and not drawn]:
            raise UsageError(f"imagenet: no images in {base / folder / empty[0]} (nor in {len(empty) - 1} others); "
                             "unpack the archive again")
        names = Names(base, np.concatenate(blocks))
        found = Samples("imagenet", name, size, [wnid_of.get(i, str(i)) for i in range(CLASSES)], names.ids, names,
                        np.repeat([known[wnid] for wnid in wnids], [len(b) for b in blocks]),
                        masks=drawn_masks(root, (p.relative_to(base).with_suffix("") for p in names)), seed=seed)
        found.partial = len(wnids) < CLASSES
        if found.partial and not drawn:
            first = ", ".join(f"{wnid} ({known[wnid]})" for wnid in wnids[:5]) + ", ..." * (len(wnids) > 5)
            found.differs = f"{len(wnids)} of {CLASSES} classes: {first}"
        return found
    return {name: split(name, folder) for name, folder in (("train", "train"), ("test", "val")) if folder in there}


IN9_VARIANTS = ("original", "mixed_same", "mixed_rand", "mixed_next", "only_fg", "no_fg", "only_bg_b", "only_bg_t")
IN9 = {     # class: those of ImageNet's 1000 that belong to it, first-last
    "00_dog": "151-170 173-268",
    "01_bird": "7-24 87-100 127-146",
    "02_wheeled vehicle": "407-408 428 436 444 468 511 547 555 561 565 569 573 586 603 609 612 627 656 661 665 670-671 "
                          "675 690 705 717 734 751 757 791 802-803 817 820 829 847 864 866-867 870 880",
    "03_reptile": "33-68",
    "04_carnivore": "269-280 286-299 356-362 387-388",
    "05_insect": "300-326",
    "06_musical instrument": "401-402 420 432 486 494 513 541 546 558 566 577 579 593-594 641-642 683-684 687 699 776 "
                             "822 875 881 889",
    "07_primate": "365-384",
    "08_fish": "0-6 389-397"}


def in9_classes():
    """(1000,): which of the nine classes each class of ImageNet is, -1 for none."""
    merge = torch.full((1000,), -1)
    for c, ranges in enumerate(IN9.values()):
        for part in ranges.split():
            first, *last = map(int, part.split("-"))
            merge[first:(last or [first])[0] + 1] = c
    return merge


def foreground(path):
    """Whose object an image of any variant shows: fg_n02085620_01234_bg_n01530575_05678 that of n02085620_01234."""
    return re.match(r"(?:fg_)?(.*?)(?:_bg_.*)?$", path.stem)[1]


def load_imagenet9(root, size, seed):
    """Backgrounds Challenge (Xiao et al., 2021): variants of the same 4,050 images, at the model's size as they are.

    An arg-max over all 1000 outputs is mapped to nine classes; the 630 others are wrong. test is the original images.
    A variant that does not show the objects that most of them show is left out, for numbers on it compare with none.
    """
    base, drawn = root / "bg_challenge", is_miniature(root)

    def variant(name):
        folder = base / name / "val"
        there = folders(folder)
        if there != list(IN9) and not (drawn and set(there) <= set(IN9)):
            raise UsageError(f"imagenet9: {folder} has the folders {', '.join(there)}; expected {', '.join(IN9)}; "
                             "unpack the archive again")
        paths = [folder / c / f for c in there for f in files(folder / c, *PHOTOS)]
        masks = None
        if exists(base / "fg_mask") and name in IN9_VARIANTS[:4]:
            masks = [base / "fg_mask" / "val" / p.parent.name / f"{foreground(p)}.npy" for p in paths]
        return Samples("imagenet9", name, size, [c[3:] for c in IN9], [f"{name}/{p.stem}" for p in paths], paths,
                       [list(IN9).index(p.parent.name) for p in paths], masks=masks, seed=seed,
                       merge=in9_classes())
    found = {name: variant(name) for name in IN9_VARIANTS
             if name in IN9_VARIANTS[:3] or not drawn or exists(base / name)}
    shown = {name: frozenset((p.parent.name, foreground(p)) for p in some.paths) for name, some in found.items()}
    ((usual, _),) = Counter(shown.values()).most_common(1)
    notes = []
    for name, objects in shown.items():
        if objects != usual:
            absent, more = usual - objects, objects - usual
            notes.append(f"{name} lacks {len(absent)} of the objects that most variants show, and has {len(more)} "
                         f"others ({'/'.join(min(absent or more))})" + ": left out" * (name != "original"))
            found = {kept: some for kept, some in found.items() if kept == "original" or kept != name}
    found["original"].differs = "; ".join(notes)
    return {"test": found.pop("original"), **found}
