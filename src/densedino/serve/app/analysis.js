// Owns what is computed of many patches: principal components, groups, thresholds, matches, and masks in pixels.

// A generator of its own, so that the same images always look the same.
function random(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

// Up to `most` valid tokens of all fields, evenly spread, as one Float32Array [n × dim].
function sample(images, most) {
  const dim = images[0].field.dim, places = [];
  images.forEach((image, k) => image.valid.forEach((ok, i) => ok && places.push([k, i])));
  const n = Math.min(most, places.length), out = new Float32Array(n * dim);
  for (let j = 0; j < n; j++) {
    const [k, i] = places[Math.floor((j * places.length) / n)];
    images[k].field.unit(i, out.subarray(j * dim, (j + 1) * dim));
  }
  return { rows: out, n, dim };
}

// Three principal components, by power iteration, of all images together: equal colours mean equal features.
// Returns for each image [3 × count] in units of the standard deviation.
export function components(images, most = 2400) {
  const { rows, n, dim } = sample(images, most);
  const mean = new Float32Array(dim);
  for (let i = 0, at = 0; i < n; i++) for (let j = 0; j < dim; j++) mean[j] += rows[at++] / n;
  for (let i = 0, at = 0; i < n; i++) for (let j = 0; j < dim; j++) rows[at++] -= mean[j];
  const next = random(1), axes = [0, 1, 2].map(() => Float32Array.from({ length: dim }, () => next() - 0.5));
  const scores = axes.map(() => new Float32Array(n));
  for (let round = 0; round < 14; round++) {
    axes.forEach((axis, c) => {
      for (let i = 0, at = 0; i < n; i++) {
        let sum = 0;
        for (let j = 0; j < dim; j++) sum += rows[at++] * axis[j];
        scores[c][i] = sum;
      }
      axis.fill(0);
      for (let i = 0, at = 0; i < n; i++) {
        const s = scores[c][i];
        for (let j = 0; j < dim; j++) axis[j] += rows[at++] * s;
      }
      for (let b = 0; b < c; b++) {
        let dot = 0;
        for (let j = 0; j < dim; j++) dot += axis[j] * axes[b][j];
        for (let j = 0; j < dim; j++) axis[j] -= dot * axes[b][j];
      }
      const length = Math.hypot(...axis) || 1;
      for (let j = 0; j < dim; j++) axis[j] /= length;
    });
  }
  const deviation = scores.map((s) => Math.sqrt(s.reduce((a, v) => a + v * v, 0) / n) || 1);
  axes.forEach((axis) => { // the sign is free: make the largest entry positive
    const most = axis.reduce((a, v) => (Math.abs(v) > Math.abs(a) ? v : a), 0);
    if (most < 0) axis.forEach((v, j) => (axis[j] = -v));
  });
  const shift = axes.map((axis) => axis.reduce((a, v, j) => a + v * mean[j], 0));
  const unit = new Float32Array(dim);
  return images.map(({ field }) => {
    const out = new Float32Array(3 * field.count);
    for (let i = 0; i < field.count; i++) {
      field.unit(i, unit);
      for (let c = 0; c < 3; c++) {
        let sum = -shift[c];
        const axis = axes[c];
        for (let j = 0; j < dim; j++) sum += unit[j] * axis[j];
        out[c * field.count + i] = sum / deviation[c];
      }
    }
    return out;
  });
}

// k groups of directions (k-means on the sphere), begun far apart. Returns for each image a Uint8Array of groups.
export function groups(images, k, most = 1600) {
  const { rows, n, dim } = sample(images, most), next = random(7);
  const centres = new Float32Array(k * dim), nearest = new Float32Array(n).fill(4);
  const dot = (a, i, b, c) => {
    let sum = 0;
    for (let j = 0; j < dim; j++) sum += a[i * dim + j] * b[c * dim + j];
    return sum;
  };
  for (let c = 0, pick = 0; c < k; c++) {
    centres.set(rows.subarray(pick * dim, (pick + 1) * dim), c * dim);
    let total = 0;
    for (let i = 0; i < n; i++) total += nearest[i] = Math.min(nearest[i], Math.max(0, 2 - 2 * dot(rows, i, centres, c)));
    let left = next() * total;
    for (pick = 0; pick < n - 1 && (left -= nearest[pick]) > 0; ) pick++;
  }
  const assign = (source, i) => {
    let best = 0, most = -2;
    for (let c = 0; c < k; c++) {
      const s = dot(source, i, centres, c);
      if (s > most) [best, most] = [c, s];
    }
    return best;
  };
  for (let round = 0; round < 8; round++) {
    const sums = new Float32Array(k * dim);
    for (let i = 0; i < n; i++) {
      const c = assign(rows, i);
      for (let j = 0; j < dim; j++) sums[c * dim + j] += rows[i * dim + j];
    }
    for (let c = 0; c < k; c++) {
      const part = sums.subarray(c * dim, (c + 1) * dim), length = Math.hypot(...part);
      if (length) for (let j = 0; j < dim; j++) centres[c * dim + j] = part[j] / length;
    }
  }
  const unit = new Float32Array(dim);
  return images.map(({ field }) => Uint8Array.from({ length: field.count }, (_, i) => assign(field.unit(i, unit), 0)));
}

// The limit that parts values into two groups of least variance within (Otsu), over 128 bins.
export function otsu(values, valid) {
  let low = Infinity, high = -Infinity;
  values.forEach((v, i) => { if (valid[i]) { low = Math.min(low, v); high = Math.max(high, v); } });
  if (!(high > low)) return low;
  const bins = new Float64Array(128);
  let total = 0, weighted = 0;
  values.forEach((v, i) => {
    if (!valid[i]) return;
    const b = Math.min(127, Math.floor((128 * (v - low)) / (high - low)));
    bins[b]++; total++; weighted += b;
  });
  let best = -1, limit = 0, count = 0, sum = 0;
  for (let b = 0; b < 127; b++) {
    count += bins[b]; sum += b * bins[b];
    if (!count || count === total) continue;
    const between = count * (total - count) * (sum / count - (weighted - sum) / (total - count)) ** 2;
    if (between > best) [best, limit] = [between, b + 1];
  }
  return low + ((high - low) * limit) / 128;
}

// Pairs of patches of two images that are each other's nearest, best first, no two of them near one another.
export function matches(a, b, most = 48) {
  const forward = nearest(a, b), back = nearest(b, a), found = [];
  for (let i = 0; i < a.field.count; i++) {
    const j = forward.place[i];
    if (a.valid[i] && b.valid[j] && near(back.place[j], i, a.grid[1])) found.push({ i, j, score: forward.score[i] });
  }
  found.sort((x, y) => y.score - x.score);
  const kept = [], apart = Math.max(2, Math.round(Math.sqrt(a.field.count) / 14)), width = a.grid[1];
  for (const pair of found) {
    const [r, c] = [Math.floor(pair.i / width), pair.i % width];
    if (kept.every((k) => Math.hypot(Math.floor(k.i / width) - r, (k.i % width) - c) >= apart)) kept.push(pair);
    if (kept.length === most) break;
  }
  return kept;
}
const near = (i, j, width) => Math.abs((i % width) - (j % width)) <= 1 && Math.abs(Math.floor(i / width) - Math.floor(j / width)) <= 1;

function nearest(a, b) {
  const values = new Float32Array(b.field.count), place = new Int32Array(a.field.count), score = new Float32Array(a.field.count);
  for (let i = 0; i < a.field.count; i++) {
    b.field.similarity(a.field.vector(i), values);
    let best = 0;
    for (let j = 1; j < values.length; j++) if (values[j] > values[best]) best = j;
    place[i] = best; score[i] = values[best];
  }
  return { place, score };
}

// Values per patch [h × w] as values per pixel [height × width], bilinear; `cover` = pixels of the photo that the grid spans.
export function enlarge(values, [h, w], height, width, [coverH, coverW]) {
  const out = new Float32Array(height * width);
  const left = new Int32Array(width), share = new Float32Array(width);
  for (let x = 0; x < width; x++) {
    const at = Math.min(w - 1, Math.max(0, ((x + 0.5) / coverW) * w - 0.5));
    left[x] = Math.min(Math.floor(at), Math.max(0, w - 2)); share[x] = at - left[x];
  }
  const right = w > 1 ? 1 : 0, down = h > 1 ? w : 0;
  for (let y = 0, o = 0; y < height; y++) {
    const at = Math.min(h - 1, Math.max(0, ((y + 0.5) / coverH) * h - 0.5)), top = Math.min(Math.floor(at), Math.max(0, h - 2));
    const v = at - top, row = top * w;
    for (let x = 0; x < width; x++, o++) {
      const i = row + left[x], u = share[x];
      out[o] = (1 - v) * (values[i] * (1 - u) + values[i + right] * u) + v * (values[i + down] * (1 - u) + values[i + down + right] * u);
    }
  }
  return out;
}

function boxed(source, height, width, radius) {
  const mid = new Float32Array(source.length), out = new Float32Array(source.length);
  const slide = (from, to, start, step, n) => {
    let sum = 0, count = 0;
    for (let i = 0; i < Math.min(radius, n); i++) { sum += from[start + i * step]; count++; }
    for (let i = 0; i < n; i++) {
      if (i + radius < n) { sum += from[start + (i + radius) * step]; count++; }
      if (i - radius - 1 >= 0) { sum -= from[start + (i - radius - 1) * step]; count--; }
      to[start + i * step] = sum / count;
    }
  };
  for (let y = 0; y < height; y++) slide(source, mid, y * width, 1, width);
  for (let x = 0; x < width; x++) slide(mid, out, x, width, height);
  return out;
}

// The guided filter (He, Sun, Tang 2010): values follow the edges of `guide`, a grey photo in [0, 1].
export function follow(values, guide, height, width, radius, smooth = 4e-3) {
  const times = (a, b) => a.map((v, i) => v * b[i]), mean = (a) => boxed(a, height, width, radius);
  const g = mean(guide), v = mean(values), gg = mean(times(guide, guide)), gv = mean(times(guide, values));
  const slope = gv.map((x, i) => (x - g[i] * v[i]) / (gg[i] - g[i] * g[i] + smooth));
  const offset = v.map((x, i) => x - slope[i] * g[i]);
  const [a, b] = [mean(slope), mean(offset)];
  return guide.map((x, i) => a[i] * x + b[i]);
}
