"""metashift.py: a miniature MetaShift, as benchmarks/metashift.py reads it. Floor: data; read scenes.py first."""
import numpy as np

from miniature.objects import scatter
from miniature.scenes import COAT, Miniature, Row, creature, pet_look, pose, with_knobs

INDOOR, OUTDOOR = ("lamp", "cup", "frame", "vase"), ("tree", "grass", "flower", "sign")
CONTEXTS = {"sofa": INDOOR, "bed": INDOOR, "bench": OUTDOOR, "bike": OUTDOOR, "shelf": INDOOR}


class MetaShift(with_knobs(
        Miniature, train=3300, test=540, size=96, things=(18, 24), thing_radius=(.05, .08), pet=(.18, .22), cue=.45,
        coat=COAT, hue_noise=.03, seed=0)):
    """Cats indoors and dogs outdoors in training; both indoors, at a shelf, in the test set.

    A context is two or three of the thing that names it among small things of a room (sofa, bed, shelf) or a
    street (bench, bike). Training holds no indoor dog and no outdoor cat, as the benchmark: agreement is 100 %.
    One id lies in both folders of the cat: the same picture, because contexts overlap in the benchmark too.
    The loader holds out its validation set from the test examples.
    """
    PLACES = tuple(CONTEXTS)
    GROUPS = ("cat(sofa)", "cat(bed)", "dog(bench)", "dog(bike)", "cat(shelf)", "dog(shelf)")
    TOPS = ("MetaDatasetCatDog", "segmentations")

    def group(self, row):
        return row.place + (row.label if row.place == 4 else 0)

    def rows(self):
        """Ids tell neither class nor split. The last row is the first cat on a sofa once more, in the other folder."""
        examples = [(i % 4 // 2, i % 4, 0, i) for i in range(self.train)] + [(i % 2, 4, 1, i) for i in range(self.test)]
        ids = np.random.default_rng([self.seed, 9]).permutation(len(examples)) * 37 + 2_300_000
        rows = [self.at(Row(int(id), "", *example)) for id, example in zip(ids, examples)]
        return [*rows, self.at(rows[0]._replace(place=1))]

    def at(self, row):
        """The row with the path that its other fields imply."""
        context = self.GROUPS[self.group(row)]
        return row._replace(file=f"{self.SPLITS[row.split]}/{context[:3]}/{context}/{row.id}.jpg")

    def subject(self, rng, label):
        return creature(pet_look(rng, label, self.cue, self.hue_noise)), pose(rng, self.pet, shift=.1)

    def things_at(self, place, rng):
        """Two or three of what names the context, twice as large, behind the small things of a room or a street."""
        context, (low, high) = self.PLACES[place], self.thing_radius
        large = scatter(rng, (context,), (2, 3), (1.7 * low, 2 * high))
        return large + scatter(rng, CONTEXTS[context], self.things, self.thing_radius)

    def scene(self, row):
        twice = row.split == row.index == 0                 # the picture that lies in two folders
        return super().scene(row._replace(place=0) if twice else row)
