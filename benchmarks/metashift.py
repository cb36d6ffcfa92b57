"""metashift.py: MetaShift's cats and dogs. Floor: data; read samples.py first."""
from pathlib import Path

from benchmarks.files import PHOTOS, drawn_masks, files, there
from benchmarks.samples import Samples, stratified

METASHIFT = {"train": ("cat(sofa)", "cat(bed)", "dog(bench)", "dog(bike)"),
             "test_and_val": ("cat(shelf)", "dog(shelf)")}
OUTDOORS = ("dog(bench)", "dog(bike)")


def load_metashift(root, size, seed):
    """MetaShift, cat or dog (the version of DISC): these six folders, whatever else an archive has beside them.

    group = 2 * label + outdoors. An id may lie in two contexts of training and counts twice, as published. val is a
    fixed 15 % of the published test images, test the others; test_and_val is all of them, as in the paper.
    """
    base = there(root / "MetaDatasetCatDog", root / "metashifts" / "MetaDatasetCatDog")

    def split(name, contexts):
        there = {context: base / name.split("_")[0] / context[:3] / context for context in contexts}
        rows = sorted((("cat", "dog").index(context[:3]), Path(file).stem, context, folder / file)
                      for context, folder in there.items() for file in files(folder, *PHOTOS))
        labels, stems, contexts, paths = zip(*rows) if rows else [()] * 4
        return Samples("metashift", name, size, ("cat", "dog"), [f"{c}/{i}" for i, c in zip(stems, contexts)], paths,
                       labels, ("indoors", "outdoors"), [2 * y + (c in OUTDOORS) for y, c in zip(labels, contexts)],
                       masks=drawn_masks(root, (p.relative_to(base).with_suffix("") for p in paths)), seed=seed)
    found = {name: split(name, contexts) for name, contexts in METASHIFT.items()}
    everything = found.pop("test_and_val")
    test, val = stratified(everything.labels, 0.15)
    return {**found, "test": everything.part("test", test), "val": everything.part("val", val),
            "test_and_val": everything}
