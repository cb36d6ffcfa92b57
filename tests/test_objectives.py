"""Objectives: what each sample weighs, checked against sums written out, numbers of the specification, and plain training."""
import pytest
import torch

from benchmarks.files import read_groups, write_groups
from benchmarks.samples import Samples
from settings import UsageError


def split(labels=(0, 0, 1, 1), places=(), groups=None, name="waterbirds"):
    ids = [f"{i}, a bird.jpg" for i in range(len(labels))]
    return Samples(name, "train", 96, ("landbird", "waterbird"), ids, ids, labels, places, groups)


# ---------------------------------------------------------------- files of groups
def test_groups_that_were_written_are_read_whatever_the_order_of_the_lines(tmp_path):
    samples, groups = split(), ["wrong", "right", "right", "wrong"]
    write_groups(tmp_path / "a.csv", samples.ids, groups)
    names, read = read_groups(tmp_path / "a.csv", samples)
    assert names == ["right", "wrong"] and [names[g] for g in read] == groups
    head, *lines = (tmp_path / "a.csv").read_text().splitlines()
    (tmp_path / "b.csv").write_text("\n".join([head, *reversed(lines)]))
    assert torch.equal(read_groups(tmp_path / "b.csv", samples)[1], read)


@pytest.mark.parametrize("change, words", [
    (lambda lines: lines[:-1], "3, a bird.jpg of waterbirds train is missing"), (lambda lines: [*lines, '"x.jpg",a'], "x.jpg is no sample"),
    (lambda lines: [*lines, lines[1]], "a second time"), (lambda lines: [line.replace(",b", ",a") for line in lines], "there must be two groups"),
    (lambda lines: [line.replace("group", "cluster") for line in lines], "no column group"), (lambda lines: [*lines[:-1], lines[-1][:-1]], "expected a name")])
def test_a_groups_file_that_is_not_of_the_split_is_one_line(change, words, tmp_path):
    samples = split()
    write_groups(tmp_path / "a.csv", samples.ids, ["a", "b", "a", "b"])
    (tmp_path / "a.csv").write_text("\n".join(change((tmp_path / "a.csv").read_text().splitlines())))
    with pytest.raises(UsageError, match=words) as error:
        read_groups(tmp_path / "a.csv", samples)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="no such file"):
        read_groups(tmp_path / "none.csv", samples)
