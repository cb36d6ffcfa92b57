"""metashift.py: MetaShift's cats and dogs. Floor: data; read samples.py first."""
import copy
from pathlib import Path

from benchmarks.files import PHOTOS, drawn_masks, files
from benchmarks.samples import Samples, stratified

METASHIFT = {"train": ("cat(sofa)", "cat(bed)", "dog(bench)", "dog(bike)"), "test": ("cat(shelf)", "dog(shelf)")}


def load_metashift(root, size, seed):
    """MetaShift, cat or dog (the version of DISC): these six folders, whatever else an archive has beside them.

    group = 2 * label + outdoors. An id may lie in two contexts of training and counts twice, as published. val is a
    fixed 15 % of the published test images, test the others; test_and_val is all of them, as in the paper.
    """
    base = next((p for p in (root / "MetaDatasetCatDog", root / "metashifts" / "MetaDatasetCatDog") if p.is_dir()),
                root / "MetaDatasetCatDog")

    def split(name, contexts):
        rows = []                                          # label, id, context, path
        for context in contexts:
            animal = context[:3]
            folder = base / name / animal / context
            rows += [(("cat", "dog").index(animal), Path(f).stem, context, folder / f)
                     for f in files(folder, *PHOTOS)]
        rows.sort()
        paths = [path for *_, path in rows]
        return Samples("metashift", name, size, ("cat", "dog"), [f"{context}/{i}" for _, i, context, _ in rows], paths,
                       [label for label, *_ in rows], ("indoors", "outdoors"),
                       [2 * label + (context in ("dog(bench)", "dog(bike)")) for label, _, context, _ in rows],
                       masks=drawn_masks(root, (p.relative_to(base).with_suffix("") for p in paths)), seed=seed)
    found = {name: split(name, contexts) for name, contexts in METASHIFT.items()}
    everything = found["test"]
    for name, indices in zip(("test", "val"), stratified(everything.labels, 0.15)):
        found[name] = copy.copy(everything).keep(indices)
        found[name].split = name
    everything.split = "test_and_val"
    return {**found, "test_and_val": everything}
