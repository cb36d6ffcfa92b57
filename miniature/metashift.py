"""metashift.py: a miniature MetaShift, in the layout that benchmarks/metashift.py reads. Floor: data."""
from dataclasses import dataclass
from functools import partial

import numpy as np

from miniature.objects import context_things, pet_look
from miniature.scenes import COAT, Miniature, Row, compose, creature, note, pose, save_jpeg, save_mask
from settings import opt


@dataclass(frozen=True)
class MetaShift(Miniature):
    """Cats indoors and dogs outdoors in training; both indoors, at a shelf, in the test set.

    A context is two or three of the thing that names it among small things of a room (sofa, bed, shelf) or a
    street (bench, bike). Training holds no indoor dog and no outdoor cat, as the benchmark: agreement is 100 %.
    One id lies in both folders of the cat: the same picture, because contexts overlap in the benchmark too.
    """
    train: int = opt(2200, "training examples, a quarter in each of the four folders")
    test: int = opt(540, "test examples, half of them cats; the loader holds out its validation set from them")
    size: int = opt(96, "side of a picture in pixels, a multiple of 8")
    things: tuple = opt((13, 17), "fewest and most small things of the room or street, at most 25")
    thing_radius: tuple = opt((0.05, 0.08), "smallest and largest small thing, as a share of the side; sofas: twice")
    pet: tuple = opt((0.18, 0.22), "smallest and largest animal: half a body, as a share of the side")
    cue: float = opt(0.7, "how much cats and dogs differ in ears, muzzle, build, tail and head hue; 0 = not at all")
    coat: float = opt(COAT, "strength of the fine grain that fur has and nothing else has, 0..1")
    hue_noise: float = opt(0.03, "standard deviation of head hues within a class; 1 = the full circle")
    seed: int = opt(0, "a scene depends on (seed, split, index) only")

    SPLITS = ("train", "test")
    GROUPS = ("cat(sofa)", "cat(bed)", "dog(bench)", "dog(bike)", "cat(shelf)", "dog(shelf)")
    PLACES = ("sofa", "bed", "bench", "bike", "shelf")

    def group(self, row):
        return row.place + (row.label if row.place == 4 else 0)

    def rows(self):
        """Ids tell neither class nor split. The last row is the first cat on a sofa once more, in the other folder."""
        n = self.train + self.test
        ids, rows = np.random.default_rng([self.seed, 9]).permutation(n) * 37 + 2_300_000, []
        for i in range(n):
            split, index = (0, i) if i < self.train else (1, i - self.train)
            label, place = (index % 4 // 2, index % 4) if split == 0 else (index % 2, 4)
            rows.append(self.at(Row(int(ids[i]), "", label, place, split, index)))
        return [*rows, self.at(rows[0]._replace(place=1))]

    def at(self, row):
        """The row with the path that its other fields imply."""
        animal = ("cat", "dog")[row.label]
        return row._replace(file=f"{self.SPLITS[row.split]}/{animal}/{self.GROUPS[self.group(row)]}/{row.id}.jpg")

    def scene(self, row):
        rng = np.random.default_rng([self.seed, row.split, row.index])
        place = 0 if row.index == 0 and row.split == 0 else row.place           # the picture that lies in two folders
        body, frame = creature(pet_look(rng, row.label, self.cue, self.hue_noise)), pose(rng, self.pet, shift=.1)
        return compose(rng, self.size, body, frame, self.coat, partial(
            context_things, context=self.PLACES[place], count=self.things, radius=self.thing_radius))

    def prepare(self, root):
        for group in self.GROUPS:
            path = f"{'test' if 'shelf' in group else 'train'}/{group[:3]}/{group}"
            for folder in ("MetaDatasetCatDog", "segmentations"):
                (root / folder / path).mkdir(parents=True)

    def write(self, row, root):
        scene = self.scene(row)
        save_jpeg(scene.image, root / "MetaDatasetCatDog" / row.file)
        save_mask(scene.mask, (root / "segmentations" / row.file).with_suffix(".png"))

    def finish(self, root, rows, drawn):
        note(root, self)
