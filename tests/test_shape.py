"""The mask's shape: the largest connected part against a flood fill, and probes of masks that tell by one property alone."""
import math

import pytest
import torch

import ifam
from measure import probes, shape


def flood(keep, h, w):
    """Connected parts of a mask (h*w,) of 0 and 1 -> lists of patches, in reading order of their first; one by one."""
    todo, found = {i for i, x in enumerate(keep.tolist()) if x}, []
    while todo:
        stack, part = [min(todo)], []
        todo.discard(stack[0])
        while stack:
            i = stack.pop()
            part.append(i)
            y, x = divmod(i, w)
            for a, b in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= a < h and 0 <= b < w and a * w + b in todo:
                    todo.discard(a * w + b)
                    stack.append(a * w + b)
        found.append(sorted(part))
    return found


def test_the_largest_component_is_that_of_a_flood_fill():
    g = torch.Generator().manual_seed(0)
    for h, w in ((1, 1), (1, 9), (7, 1), (4, 5), (12, 12)):
        keep = (torch.rand(60, h * w, generator=g) < torch.rand(60, 1, generator=g)).float()
        for mask, ours in zip(keep, ifam.largest_component(keep, (h, w))):
            parts = flood(mask, h, w)
            expected = max(parts, key=len, default=[])                           # max: the first of equals
            assert ours.nonzero()[:, 0].tolist() == expected


def test_a_component_that_winds_through_the_whole_grid_is_found_whole_and_a_corner_connects_nothing():
    snake = torch.ones(9, 9)
    for row in range(1, 9, 2):
        snake[row] = 0
        snake[row, 8 if row % 4 == 1 else 0] = 1
    assert torch.equal(ifam.largest_component(snake.view(1, -1), (9, 9)), snake.view(1, -1))
    diagonal = torch.eye(3).view(1, -1).double()
    assert ifam.largest_component(diagonal, (3, 3)).tolist() == [[1, 0, 0, 0, 0, 0, 0, 0, 0]]
    assert ifam.largest_component(diagonal, (3, 3)).dtype == torch.float64
    assert not ifam.largest_component(torch.zeros(2, 9), (3, 3)).any()


GRID = (9, 10)


def blob(row, column, height, width):
    mask = torch.zeros(GRID)
    mask[row:row + height, column:column + width] = 1
    return mask.flatten()


def planted(kind, count=300):
    """Masks whose place is told by one property alone -> keep (n, N), place (n,)."""
    g = torch.Generator().manual_seed(0)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))
    masks, place = [], torch.arange(count) % 2
    place = place[torch.randperm(count, generator=g)]
    for p in place.tolist():
        row, column = draw(2, 4), draw(2, 5)
        if kind == "area":
            mask = blob(row, column, 2 + p, 2)
        elif kind == "position":
            mask = blob(row, draw(0, 2) + 5 * p, 2, 3)
        elif kind == "extra":                            # both have a small piece more, and its size is the same
            mask = blob(3, 3 + draw(0, 1), 2, 3)
            mask[0 if p else 90 - 10] = 1
        elif kind == "hole":                             # the same box, and as many patches
            mask = blob(2, 3, 4, 4)
            if p:
                mask[34 + draw(0, 1)] = 0
            else:
                mask[22 + draw(1, 2)] = 0
        masks.append(mask)
    return torch.stack(masks), place


def test_area_alone_is_read_from_the_area_and_not_from_the_centroid():
    keep, place = planted("area")
    found = shape.shape_probes(keep, place, GRID)
    assert found["area"] == 1 and found["centred"] == 1 and found["extent"] == 1
    assert found["position"] < 0.65 and abs(found["holes"] - .5) < .1 and abs(found["removed"] - .5) < .1 and found["pieces"] == 1


def test_position_alone_is_read_from_the_centroid_and_not_from_what_is_moved_to_the_middle():
    keep, place = planted("position")
    found = shape.shape_probes(keep, place, GRID)
    assert found["position"] == found["mask"] == found["largest"] == 1 and found["lost"] == 0
    for name in ("area", "centred", "largest_centred", "extent", "holes", "removed"):
        assert abs(found[name] - 0.5) < 0.1, name
        assert abs(found["kernel"][name] - 0.5) < 0.1, name


def test_an_extra_component_is_read_from_what_is_removed_and_not_from_the_largest():
    keep, place = planted("extra")
    found = shape.shape_probes(keep, place, GRID)
    assert found["removed"] == found["mask"] == 1 and found["pieces"] == 2
    for name in ("area", "largest", "largest_centred", "holes"):
        assert abs(found[name] - 0.5) < 0.1, name


def test_a_hole_is_read_from_the_holes():
    keep, place = planted("hole")
    found = shape.shape_probes(keep, place, GRID)
    assert found["holes"] == found["mask"] == 1
    for name in ("area", "extent", "removed"):
        assert abs(found[name] - 0.5) < 0.1, name


def test_what_is_not_linear_in_the_area_is_read_by_the_kernel_alone():
    g = torch.Generator().manual_seed(0)
    place = torch.randint(2, (300,), generator=g)
    small_or_large = torch.where(torch.rand(300, generator=g) < .5, 5., 25.) + torch.randint(-2, 3, (300,), generator=g)
    size = torch.where(place == 0, small_or_large, 15. + torch.randint(-2, 3, (300,), generator=g))
    assert probes.linear_probe(size[:, None], place) < 0.7 and probes.linear_probe(size[:, None], place, probes.kernel_head) == 1


def random_masks(count=200, generator=torch.Generator().manual_seed(3)):
    return (torch.rand(count, 90, generator=generator) < torch.rand(count, 1, generator=generator)).double()


def test_properties_are_those_of_loops_over_patches():
    keep = random_masks()
    keep[0], keep[1] = 0, 1
    found = shape.properties(keep, GRID)
    for i, mask in enumerate(keep):
        there = [divmod(n, 10) for n in mask.nonzero()[:, 0].tolist()]
        rows, columns = [y for y, _ in there], [x for _, x in there]
        middle = lambda values, side: sum(values) / len(values) - (side - 1) / 2 if values else 0
        span = lambda values: max(values) - min(values) + 1 if values else 0
        assert found["area"][i].item() == len(there)
        assert found["position"][i].tolist() == pytest.approx([middle(rows, 9), middle(columns, 10)])
        assert found["extent"][i].tolist() == [span(rows), span(columns)]
        empty = flood(1 - mask, *GRID)                   # a hole: a part of what is not kept that touches no border
        inner = [n for part in empty if all(0 < n // 10 < 8 and 0 < n % 10 < 9 for n in part) for n in part]
        assert found["holes"][i].nonzero()[:, 0].tolist() == sorted(inner)
        moved = torch.zeros(GRID).double()
        down, right = (math.floor(0.5 - x) for x in (middle(rows, 9), middle(columns, 10)))
        for y, x in there:
            if 0 <= y + down < 9 and 0 <= x + right < 10:
                moved[y + down, x + right] = 1
        assert torch.equal(found["centred"][i], moved.flatten())
    assert torch.equal(found["removed"] + found["largest"], keep)


def test_a_mask_that_is_moved_is_the_same_once_it_is_in_the_middle():
    mask = torch.zeros(9, 10, dtype=torch.float64)
    mask[0, :3], mask[1:4, 1], mask[2, 2] = 1, 1, 1
    moved = torch.stack([mask.roll((y, x), (0, 1)).flatten() for y in range(6) for x in range(8)])
    assert len(shape.centred(moved, GRID).unique(dim=0)) == 1
