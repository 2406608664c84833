"""Closed contours around the pixels of a mask, holes included, from which every reader can rasterise the mask again."""

from __future__ import annotations

import numpy as np

_Loop = list[tuple[int, int]]


def plane_contours(mask: np.ndarray) -> list[np.ndarray]:
    """Returns the outlines of a mask, one polygon per connected piece.

    Marching squares at the level 0.5 (`skimage.measure.find_contours`) puts every vertex half-way between a pixel of
    the mask and its neighbour outside. A pixel's centre is inside a polygon exactly where the mask holds the pixel, so
    rasterising by centres gives the mask back. Pixels that touch at a corner alone are separate pieces.

    A hole is joined to the outline around it by a channel of no width, the "keyhole" technique of DICOM PS3.3
    C.8.8.6.3. The channel runs through the mask, a quarter of a pixel beside the centres, so that no centre lies on it.
    Unlike separate inner contours, such a polygon is right both for readers that unite the contours of a slice and for
    readers that combine them by exclusive or.

    Args:
        mask: (rows, columns) of 0 and 1.

    Returns:
        Per piece (points, 2) of row and column in pixels, the first point not repeated; integers are pixel centres.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return []
    first = (int(rows[0]), int(columns[0]))
    # A border of background closes the outlines of pieces that touch the border of the image.
    piece = np.pad(mask[first[0] : int(rows[-1]) + 1, first[1] : int(columns[-1]) + 1].astype(np.uint8), 1)
    lines, is_hole = _lines(piece)
    if any(is_hole):
        loops = [list(map(tuple, line.tolist())) for line in lines]
        bridges = _bridges(piece, loops, is_hole)
        lines = [_walk(loops, bridges, index) for index in range(len(loops)) if not is_hole[index]]
    return [_without_straight_points(line) / 4 + (first[0] - 1, first[1] - 1) for line in lines]


def _lines(piece: np.ndarray) -> tuple[list[np.ndarray], list[bool]]:
    """Returns the closed lines between mask and background, in quarter pixels, and which of them surround a hole."""
    from skimage.measure import find_contours

    lines, is_hole = [], []
    for line in find_contours(piece, 0.5, fully_connected="low", positive_orientation="low"):
        points = np.rint(4 * line[:-1]).astype(np.int64)
        after = np.roll(points, -1, axis=0)
        area = int((points[:, 0] * after[:, 1] - points[:, 1] * after[:, 0]).sum())
        # find_contours runs counter-clockwise around low values; around high values the signed area has the other sign.
        is_hole.append(area > 0)
        lines.append(points)
    return lines, is_hole


def _bridges(piece: np.ndarray, loops: list[_Loop], is_hole: list[bool]) -> dict[tuple[int, int], tuple[int, int]]:
    """Returns for every hole where its channel begins and ends; both ends are added to the loops as points.

    The channel runs from the left side of the hole along a row to the next background on the left. That lies outside,
    or in another hole whose own channel begins farther left, so that no circle arises.

    Returns:
        (loop, vertex) at the left end → (hole, vertex) at the right end.
    """
    holes = [index for index, found in enumerate(is_hole) if found]
    if not holes:
        return {}
    owner = {point: (loop, vertex) for loop, points in enumerate(loops) for vertex, point in enumerate(points)}
    added: list[dict[int, tuple[int, int]]] = [{} for _ in loops]  # per loop: vertex → the point that follows it
    ends = []
    for hole in holes:
        # Vertices on a row of pixel centres lie beside a pixel; the leftmost is on the left side of the hole.
        row, column = min((point for point in loops[hole] if point[0] % 4 == 0), key=lambda point: point[::-1])
        background = int(np.flatnonzero(piece[row // 4, : (column + 2) // 4] == 0)[-1])
        right = _point_below(loops, owner[row, column], added)
        left = _point_below(loops, owner[row, 4 * background + 2], added)
        ends.append((left, right))
    for loop, points in enumerate(loops):
        loops[loop] = [p for v, point in enumerate(points) for p in (point, added[loop].get(v)) if p is not None]
    owner = {point: (loop, vertex) for loop, points in enumerate(loops) for vertex, point in enumerate(points)}
    return {owner[left]: owner[right] for left, right in ends}


def _point_below(
    loops: list[_Loop], vertex: tuple[int, int], added: list[dict[int, tuple[int, int]]]
) -> tuple[int, int]:
    """Adds the point of a loop that lies a quarter of a pixel below a vertex, and returns it."""
    loop, index = vertex
    points = loops[loop]
    row, column = points[index]
    before, after = (index - 1) % len(points), (index + 1) % len(points)
    below = points[after] if points[after][0] > row else points[before]
    # The line goes down straight, or at 45°.
    point = (row + 1, column + int(np.sign(below[1] - column)))
    added[loop][index if below is points[after] else before] = point
    return point


def _walk(loops: list[_Loop], bridges: dict[tuple[int, int], tuple[int, int]], outline: int) -> np.ndarray:
    """Returns the points along an outline with its holes, (points, 2) in quarter pixels."""
    points: _Loop = []
    stack = [(outline, 0, 0)]  # a loop, the vertex it was entered at, and how many of its vertices are done
    while stack:
        loop, start, done = stack.pop()
        vertices = loops[loop]
        if done:
            points.append(vertices[(start + done - 1) % len(vertices)])  # back from a hole
        while done < len(vertices):
            vertex = (start + done) % len(vertices)
            points.append(vertices[vertex])
            done += 1
            if (loop, vertex) in bridges:
                stack.append((loop, start, done))
                loop, start = bridges[loop, vertex]
                vertices, done = loops[loop], 0
        if stack:
            points.append(vertices[start])
    return np.asarray(points)


def _without_straight_points(closed: np.ndarray) -> np.ndarray:
    """Returns a closed line without the points at which it runs straight on."""
    before, after = closed - np.roll(closed, 1, axis=0), np.roll(closed, -1, axis=0) - closed
    straight = before[:, 0] * after[:, 1] == before[:, 1] * after[:, 0]
    return closed[~(straight & ((before * after).sum(axis=1) > 0))]
