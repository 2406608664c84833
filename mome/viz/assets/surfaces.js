// Surfaces of labelled voxels: naive surface nets (Gibson, MERL TR 1999-24), smoothed as in Taubin (SIGGRAPH 1995).
"use strict";

const momeSurfaces = (() => {
  const MOST_SAMPLES = 3e6; // of the box of one structure; a larger box is sampled with steps (our choice)
  const SMOOTHING_STEPS = 12;
  const SHRINK = 0.5;
  const GROW = -0.53;

  // Counts, boxes and sums of coordinates of every label in one pass.
  // Returns a Map of label → {count, low, high, sum, planes}; `planes` counts the voxels in each plane of every axis.
  function measure(image, dims) {
    const [nx, ny, nz] = dims;
    const found = new Map();
    let index = 0;
    for (let z = 0; z < nz; z++) {
      for (let y = 0; y < ny; y++) {
        for (let x = 0; x < nx; x++, index++) {
          const label = image[index];
          if (label === 0) continue;
          let entry = found.get(label);
          if (!entry) {
            entry = { count: 0, low: [x, y, z], high: [x, y, z], sum: [0, 0, 0],
              planes: [new Uint32Array(nx), new Uint32Array(ny), new Uint32Array(nz)] };
            found.set(label, entry);
          }
          entry.count++;
          const at = [x, y, z];
          for (let axis = 0; axis < 3; axis++) {
            const value = at[axis];
            if (value < entry.low[axis]) entry.low[axis] = value;
            if (value > entry.high[axis]) entry.high[axis] = value;
            entry.sum[axis] += value;
            entry.planes[axis][value]++;
          }
        }
      }
    }
    return found;
  }

  // The voxel of a label that is nearest to its centre of mass.
  function middle(image, dims, label, entry) {
    const centre = entry.sum.map((sum) => sum / entry.count);
    let best = null;
    let bestDistance = Infinity;
    for (let z = entry.low[2]; z <= entry.high[2]; z++) {
      for (let y = entry.low[1]; y <= entry.high[1]; y++) {
        for (let x = entry.low[0]; x <= entry.high[0]; x++) {
          if (image[x + dims[0] * (y + dims[1] * z)] !== label) continue;
          const distance = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2;
          if (distance < bestDistance) {
            bestDistance = distance;
            best = [x, y, z];
          }
        }
      }
    }
    return best;
  }

  // The surface of one label: {points, triangles}, points in mm through `affine` (rows of a 4 × 4 matrix).
  function surface(image, dims, affine, label, entry) {
    const sides = entry.high.map((high, axis) => high - entry.low[axis] + 1);
    let step = 1;
    while (sides.reduce((product, side) => product * Math.ceil(side / step), 1) > MOST_SAMPLES) step++;
    // Two samples outside the box close the surface at the border of the image.
    const [nx, ny, nz] = sides.map((side) => Math.ceil(side / step) + 2);
    const inside = new Uint8Array(nx * ny * nz);
    for (let z = 1; z < nz - 1; z++) {
      for (let y = 1; y < ny - 1; y++) {
        for (let x = 1; x < nx - 1; x++) {
          const [i, j, k] = [x, y, z].map((value, axis) => entry.low[axis] + (value - 1) * step);
          inside[x + nx * (y + ny * z)] = image[i + dims[0] * (j + dims[1] * k)] === label ? 1 : 0;
        }
      }
    }
    const points = [];
    const vertexOf = new Int32Array(nx * ny * nz).fill(-1); // by the low corner of a cell
    const strides = [1, nx, nx * ny];
    for (let z = 0; z < nz - 1; z++) {
      for (let y = 0; y < ny - 1; y++) {
        for (let x = 0; x < nx - 1; x++) {
          const at = x + nx * (y + ny * z);
          const corner = (dx, dy, dz) => inside[at + dx + nx * (dy + ny * dz)];
          let crossings = 0;
          const sum = [0, 0, 0];
          for (let a = 0; a < 2; a++) {
            for (let b = 0; b < 2; b++) {
              if (corner(0, a, b) !== corner(1, a, b)) { crossings++; sum[0] += 0.5; sum[1] += a; sum[2] += b; }
              if (corner(a, 0, b) !== corner(a, 1, b)) { crossings++; sum[0] += a; sum[1] += 0.5; sum[2] += b; }
              if (corner(a, b, 0) !== corner(a, b, 1)) { crossings++; sum[0] += a; sum[1] += b; sum[2] += 0.5; }
            }
          }
          if (crossings === 0) continue;
          vertexOf[at] = points.length / 3;
          points.push(x + sum[0] / crossings, y + sum[1] / crossings, z + sum[2] / crossings);
        }
      }
    }
    const quads = [];
    for (let z = 0; z < nz - 1; z++) {
      for (let y = 0; y < ny - 1; y++) {
        for (let x = 0; x < nx - 1; x++) {
          const low = x + nx * (y + ny * z);
          for (let axis = 0; axis < 3; axis++) {
            if (inside[low] === inside[low + strides[axis]]) continue;
            // The four cells around the edge, counter-clockwise as seen from the far end of the axis.
            const u = strides[(axis + 1) % 3];
            const v = strides[(axis + 2) % 3];
            const quad = [low - u - v, low - v, low, low - u].map((cell) => vertexOf[cell]);
            quads.push(inside[low] ? quad : quad.reverse());
          }
        }
      }
    }
    smooth(points, quads);
    return inMillimetres(points, quads, affine, entry.low, step);
  }

  function smooth(points, quads) {
    const count = points.length / 3;
    const sum = new Float32Array(points.length);
    const neighbours = new Uint16Array(count);
    for (const quad of quads) {
      for (let corner = 0; corner < 4; corner++) neighbours[quad[corner]] += 2;
    }
    for (let step = 0; step < 2 * SMOOTHING_STEPS; step++) {
      sum.fill(0);
      for (const quad of quads) {
        for (let corner = 0; corner < 4; corner++) {
          const here = 3 * quad[corner];
          const before = 3 * quad[(corner + 3) % 4];
          const after = 3 * quad[(corner + 1) % 4];
          for (let axis = 0; axis < 3; axis++) sum[here + axis] += points[before + axis] + points[after + axis];
        }
      }
      const factor = step % 2 === 0 ? SHRINK : GROW;
      for (let vertex = 0; vertex < count; vertex++) {
        if (neighbours[vertex] === 0) continue;
        for (let axis = 0; axis < 3; axis++) {
          const at = 3 * vertex + axis;
          points[at] += factor * (sum[at] / neighbours[vertex] - points[at]);
        }
      }
    }
  }

  function inMillimetres(points, quads, affine, low, step) {
    const placed = new Float32Array(points.length);
    for (let at = 0; at < points.length; at += 3) {
      const voxel = [0, 1, 2].map((axis) => low[axis] + (points[at + axis] - 1) * step);
      for (let row = 0; row < 3; row++) {
        placed[at + row] =
          affine[row][0] * voxel[0] + affine[row][1] * voxel[1] + affine[row][2] * voxel[2] + affine[row][3];
      }
    }
    const [a, b, c] = affine;
    const determinant =
      a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) + a[2] * (b[0] * c[1] - b[1] * c[0]);
    const triangles = new Uint32Array(quads.length * 6);
    quads.forEach(([p, q, r, s], number) => {
      triangles.set(determinant > 0 ? [p, q, r, p, r, s] : [p, r, q, p, s, r], 6 * number);
    });
    return { points: placed, triangles };
  }

  return { measure, middle, surface };
})();
