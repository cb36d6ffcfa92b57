"""imagenet.py: ImageNet-1K and ImageNet-9, which evaluates its models. Floor: data; read samples.py first."""
import json
import os
import re

import numpy as np
import torch

from benchmarks.files import PHOTOS, drawn_masks, files, folders, is_miniature
from benchmarks.samples import Names, Samples
from benchmarks.transforms import AS_THEY_ARE, PHOTOGRAPHS
from settings import UsageError


def load_imagenet(root, size, seed):
    """ImageNet-1K: <split>/<wnid>/<file>; a class is the rank of its wnid. val is the test split, as in every paper.

    A miniature has few of the 1000 classes and lists their real numbers in miniature.json: {"wnids": {wnid: class}}.
    """
    base = root / "imagenet"
    there = [split for split in ("train", "val") if (base / split).is_dir()]
    wnids, *others = [folders(base / split) for split in there or ["train"]]
    for odd in sorted(set(wnids).symmetric_difference(*others)) if others else ():
        raise UsageError(f"imagenet: {base / 'train'} and {base / 'val'} differ in {odd}; val needs the same wnid "
                         "folders (its archive is flat: sort it with the usual valprep script)")
    number, classes = {wnid: i for i, wnid in enumerate(wnids)}, wnids
    if is_miniature(root) and (given := json.loads((root / "miniature.json").read_text()).get("wnids")):
        number = given
        if unknown := [wnid for wnid in wnids if wnid not in number]:
            raise UsageError(f"imagenet: {root / 'miniature.json'} has no class for {unknown[0]}; draw it again")
        of = {i: wnid for wnid, i in given.items()}
        classes = [of.get(i, str(i)) for i in range(1000)]

    def split(name, folder):
        blocks = [np.array([os.fsencode(f"{folder}/{wnid}/{f}") for f in files(base / folder / wnid, *PHOTOS)],
                           dtype=bytes) for wnid in wnids]
        names = Names(base, np.concatenate(blocks))
        return Samples("imagenet", name, size, classes, names.ids, names,
                       np.repeat([number[wnid] for wnid in wnids], [len(b) for b in blocks]), pipeline=PHOTOGRAPHS,
                       masks=drawn_masks(root, (p.relative_to(base).with_suffix("") for p in names)), seed=seed)
    return {"test" if folder == "val" else folder: split("test" if folder == "val" else folder, folder)
            for folder in there}


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


def load_imagenet9(root, size, seed):
    """Backgrounds Challenge (Xiao et al., 2021): variants of the same 4,050 images, at the model's size as they are.

    An arg-max over all 1000 outputs is mapped to nine classes; the 630 others are wrong. test is the original images.
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
        if (base / "fg_mask").is_dir() and name in IN9_VARIANTS[:4]:
            # fg_n02085620_01234_bg_n01530575_05678 stands on the mask of n02085620_01234
            stem = lambda path: re.match(r"(?:fg_)?(.*?)(?:_bg_.*)?$", path.stem)[1]
            masks = [base / "fg_mask" / "val" / p.parent.name / f"{stem(p)}.npy" for p in paths]
        return Samples("imagenet9", name, size, [c[3:] for c in IN9], [f"{name}/{p.stem}" for p in paths], paths,
                       [list(IN9).index(p.parent.name) for p in paths], masks=masks, pipeline=AS_THEY_ARE, seed=seed,
                       merge=in9_classes())
    found = {name: variant(name) for name in IN9_VARIANTS
             if name in IN9_VARIANTS[:3] or not drawn or (base / name).is_dir()}
    return {"test": found.pop("original"), **found}
