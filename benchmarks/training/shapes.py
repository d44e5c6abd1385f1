"""Shapeset-3x2 of Glorot and Bengio (2010): small pictures of one or two shapes, as many as are asked for.

With the settings of the generator that its first author released: 32 x 32 pixels; one or two objects, alike often; each
a triangle, a parallelogram or an ellipse (of twenty corners), alike often; a regular polygon within a circle of
diameter 1, turned by at most half the angle between two corners, stretched along the axes by two factors uniform in 0.2
to 0.8 of the picture, the larger one horizontally, turned by any angle, and put anywhere at least one pixel from the
border.  Objects have greys uniform in 0.55 to 1 before a ground of 0 to 0.45, or the other way round, alike often;
greys are mapped to -1 ... 1.  A second object is drawn over the first, and its size and place are drawn again while it
is estimated to hide more than half of the first one's area; a picture in which that fails fifty times keeps its first
object.  The class is the set of the objects: three of one, six of two.

Its own code, without that of the generator, which needs Python 2: a pixel belongs to an object if its centre lies
within, where theirs asks pygame to fill a polygon, and angles are not rounded to one of 255.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIDE = 32
CORNERS = (3, 4, 20)  # triangle, parallelogram, ellipse
NAMES = ("triangle", "parallelogram", "ellipse")
CLASSES = tuple((i,) for i in range(3)) + tuple((i, j) for i in range(3) for j in range(i, 3))
SCALES = (0.2, 0.8)
MOST_REJECTIONS = 50


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ``count`` pictures (count, 1024), values in -1 ... 1, and their classes, of :data:`CLASSES`."""

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    kinds = torch.randint(3, (count, 2), generator=generator)
    two = torch.rand(count, generator=generator) < 0.5
    first, first_sizes, first_places = _placed(kinds[:, 0], generator)
    second, second_sizes, second_places = _placed(kinds[:, 1], generator)
    again = torch.arange(count)
    for _ in range(MOST_REJECTIONS):
        hidden = _hidden_share(
            *(first[again], first_places[again], _area(kinds[again, 0], first_sizes[again])),
            *(second[again], second_places[again], _area(kinds[again, 1], second_sizes[again])),
        )
        again = again[(hidden > 0.5) & two[again]]
        if not len(again):
            break
        second[again], second_sizes[again], second_places[again] = _placed(kinds[again, 1], generator)
    two[again] = False

    light, dark = uniform(count, 3, low=0.55), uniform(count, 3, high=0.45)
    inverted = (torch.rand(count, generator=generator) < 0.5).unsqueeze(1)
    ground = torch.where(inverted, light, dark)[:, :1]
    greys = torch.where(inverted, dark, light)
    pictures = torch.where(_inside(first), greys[:, 1:2], ground)
    pictures = torch.where(_inside(second) & two.unsqueeze(1), greys[:, 2:3], pictures)
    return 2 * pictures - 1, _classes(kinds, two)


def _classes(kinds: Tensor, two: Tensor) -> Tensor:
    table = torch.zeros(3, 3, dtype=torch.long)
    for number, objects in enumerate(CLASSES[3:], 3):
        table[objects[0], objects[1]] = table[objects[1], objects[0]] = number
    return torch.where(two, table[kinds[:, 0], kinds[:, 1]], kinds[:, 0])


def _placed(kinds: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Corners (N, 20, 2) in pixels, counter-clockwise, the last one repeated; the two sizes and the centre of each."""
    count = len(kinds)
    corners = torch.tensor(CORNERS)[kinds].unsqueeze(1)
    numbers = torch.minimum(torch.arange(max(CORNERS)).expand(count, -1), corners - 1)
    turn = (torch.rand(count, 1, generator=generator) - 0.5) / corners
    angles = 2 * math.pi * (0.25 + (numbers + 0.5) / corners + turn)
    sizes = SCALES[0] + (SCALES[1] - SCALES[0]) * torch.rand(count, 2, generator=generator)
    sizes = SIDE * sizes.sort(1, descending=True).values
    x, y = 0.5 * angles.cos() * sizes[:, :1], 0.5 * angles.sin() * sizes[:, 1:]
    turn = 2 * math.pi * torch.rand(count, 1, generator=generator)
    points = torch.stack([x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()], 2)
    low, high = 1 - points.min(1).values, SIDE - 1 - points.max(1).values
    places = low + (high - low) * torch.rand(count, 2, generator=generator)
    return points + places.unsqueeze(1), sizes, places


def _area(kinds: Tensor, sizes: Tensor) -> Tensor:
    """Area of each object, up to one factor for all."""
    corners = torch.tensor(CORNERS)[kinds]
    return sizes.prod(1) * corners * (2 * math.pi / corners).sin()


def _hidden_share(
    first: Tensor, first_places: Tensor, first_area: Tensor, second: Tensor, places: Tensor, area: Tensor
) -> Tensor:
    """The released generator's estimate of the share of the first object that the second one hides.

    From how far both reach along the line between their centres: nothing while they do not meet, and towards all of the
    second one's area the more they do.
    """
    between = places - first_places
    distance = between.norm(dim=1).clamp_min(1e-6)
    direction = (between / distance.unsqueeze(1)).unsqueeze(2)
    reach = ((first - first_places.unsqueeze(1)) @ direction).amax((1, 2))
    reach = reach + (-(second - places.unsqueeze(1)) @ direction).amax((1, 2))
    overlap = 1 - (-math.log(2) * (reach - distance).clamp_min(0) / distance).exp()
    return overlap * area / first_area


def _inside(points: Tensor) -> Tensor:
    """Whether the centre of each pixel lies within the polygon: (N, 1024)."""
    step = points.roll(-1, 1) - points
    line = torch.arange(SIDE) + 0.5
    found = torch.ones(len(points), SIDE, SIDE, dtype=torch.bool)
    for edge in range(points.shape[1]):  # left of every edge; an edge of length zero has all on its left
        dx, dy = step[:, edge, 0].view(-1, 1, 1), step[:, edge, 1].view(-1, 1, 1)
        x, y = line - points[:, edge, 0].view(-1, 1, 1), (line - points[:, edge, 1:]).unsqueeze(2)
        found &= dx * y >= dy * x
    return found.flatten(1)
