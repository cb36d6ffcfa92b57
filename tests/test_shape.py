"""The mask's shape: the largest connected part against a flood fill, and probes of masks that tell by one property alone."""
import torch

import ifam


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
