// Owns what each mode draws on the wall, and how long that takes.

import { components, groups, matches, otsu } from "./analysis.js";
import { groupColour, lineColour, rgba } from "./colours.js";

export const HINTS = {
  similar: "<b>Point at anything.</b> Whatever the model finds alike lights up, in every image. Nobody told it what things are called.",
  segment: "<b>Click what you want to cut out.</b> A few points are enough; Shift-click takes away. The same thing is found in the other images too.",
  colours: "<b>Equal colours mean equal features.</b> The three main directions of all features, shown as red, green and blue.",
  groups: "<b>Patches sorted into groups,</b> without labels or training. Point at one to see it alone.",
  match: "<b>What corresponds to what.</b> Lines join patches of two images that are each other’s nearest.",
  search: "<b>Click a patch</b> to find the images of the collection that have something like it.",
};

const frames = []; // milliseconds of the last drawings
export const timing = () => frames;

const ready = (state) => state.images.filter((image) => image.field);
const values = (image) => (image.values?.length === image.field.count ? image.values : (image.values = new Float32Array(image.field.count)));

// Cosine of all patches of all images to one patch, and the scale that all share.
function compare(images, { image, patch }) {
  const query = image.field.vector(patch);
  let sum = 0, count = 0;
  for (const other of images) {
    const found = other.field.similarity(query, values(other));
    let best = -1;
    for (let i = 0; i < found.length; i++) {
      sum += found[i];
      if (other.valid[i] && (best < 0 || found[i] > found[best])) best = i;
    }
    count += found.length;
    other.nearest = best;
  }
  const mean = sum / count;
  return { low: mean + 0.06 * (1 - mean), high: mean + 0.82 * (1 - mean) };
}

function drawSimilar(state, images, at) {
  if (!at) {
    images.forEach((image) => image.tile.clear());
    return null;
  }
  const scale = compare(images, at);
  images.forEach((image) => image.tile.glow(image.values, scale.low, scale.high));
  return scale;
}

// For each pin, similarity of all patches; kept until the pin or the features go.
function scoresOf(image, pins) {
  const best = (sign) => {
    let out = null;
    for (const pin of pins) {
      if (pin.sign !== sign) continue;
      pin.maps ||= new Map();
      let map = pin.maps.get(image.field);
      if (!map) {
        map = image.field.similarity(pin.image.field.vector(pin.patch), new Float32Array(image.field.count));
        pin.maps.set(image.field, map);
      }
      out = out ? out.map((v, i) => Math.max(v, map[i])) : map.slice();
    }
    return out;
  };
  return { inside: best(1), outside: best(-1) };
}

function drawSegment(state, images, at) {
  const pins = state.pins.filter((pin) => pin.image.field);
  if (!pins.some((pin) => pin.sign > 0)) return drawSimilar(state, images, at);
  const key = [state.tolerance, state.snap, pins.map((p) => `${p.image.id}.${p.patch}.${p.sign}`), images.map((i) => i.version)].join();
  if (key === state.cutKey) return null;
  state.cutKey = key;
  const scores = images.map((image) => scoresOf(image, pins)), own = new Set(pins.filter((pin) => pin.sign > 0).map((pin) => pin.image));
  const pinned = (image) => own.has(image);
  // One limit for all images, from those that have points: an image without the thing then stays empty.
  const limit = Math.max(...[...own].map((image) => otsu(scoresOf(image, pins).inside, image.valid)));
  images.forEach((image, i) => {
    const { inside, outside } = scores[i];
    const alike = inside.map((v) => v - limit), unlike = outside && inside.map((v, j) => v - outside[j]);
    const score = !unlike ? alike : pinned(image) ? unlike : unlike.map((v, j) => Math.min(v, alike[j]));
    image.tile.clear();
    image.tile.cut(score, -0.004 * state.tolerance, state.snap);
    image.tile.draw("mask");
  });
  return null;
}

const sigmoid = (v) => 255 / (1 + Math.exp(-2 * v));

function drawColours(state, images) {
  const key = `colours ${images.map((image) => image.version)}`;
  if (state.painted === key) return;
  state.painted = key;
  const projected = components(images);
  images.forEach((image, k) => {
    const p = projected[k], n = image.field.count;
    image.tile.paint((i) => rgba(sigmoid(p[i]), sigmoid(p[n + i]), sigmoid(p[2 * n + i]), 235));
  });
}

function drawGroups(state, images, at) {
  const key = `groups ${state.groups} ${images.map((image) => image.version)}`;
  if (state.sorted !== key) {
    const sorted = groups(images, state.groups);
    images.forEach((image, i) => (image.group = sorted[i]));
    state.sorted = key;
  }
  const alone = at ? at.image.group[at.patch] : -1, drawn = `${key} ${alone}`;
  if (state.painted === drawn) return;
  state.painted = drawn;
  images.forEach((image) => image.tile.paint((i) => {
    const g = image.group[i];
    return alone < 0 || g === alone ? groupColour(g, state.groups) : rgba(8, 7, 18, 150);
  }));
}

function drawMatch(state, images, at, lines) {
  images.forEach((image) => image.tile.root.dataset.drawn || image.tile.clear());
  const context = lines.getContext("2d"), ratio = devicePixelRatio || 1, page = lines.getBoundingClientRect();
  lines.width = page.width * ratio;
  lines.height = page.height * ratio;
  context.scale(ratio, ratio);
  if (images.length < 2) return;
  const [a, b] = images, key = `${a.id} ${a.version} ${b.id} ${b.version}`;
  if (state.matchKey !== key) [state.matchKey, state.matches] = [key, matches(a, b)];
  const point = (image, patch) => {
    const box = image.tile.stage.getBoundingClientRect(), [left, top, width, height] = image.tile.box(patch);
    return [box.left - page.left + (left + width / 2) * box.width, box.top - page.top + (top + height / 2) * box.height];
  };
  const line = (from, to, colour, width) => {
    context.strokeStyle = context.fillStyle = colour;
    context.lineWidth = width;
    context.beginPath();
    const lift = Math.min(26, Math.hypot(from[0] - to[0], from[1] - to[1]) / 12);
    context.moveTo(...from);
    context.bezierCurveTo(from[0], from[1] - lift, to[0], to[1] - lift, ...to);
    context.stroke();
    for (const [x, y] of [from, to]) { context.beginPath(); context.arc(x, y, width + 2, 0, 7); context.fill(); }
  };
  const most = state.matches[0]?.score ?? 1;
  for (const { i, j, score } of state.matches) {
    context.globalAlpha = (at ? 0.15 : 0.95) * Math.max(0.15, score / most) ** 1.5; // the fainter, the less alike
    line(point(a, i), point(b, j), lineColour((i % a.grid[1]) / a.grid[1]), 1.6);
  }
  if (!at) return;
  context.globalAlpha = 1;
  compare(images, at);
  for (const other of images) if (other !== at.image) line(point(at.image, at.patch), point(other, other.nearest), "#ffd65c", 2.5);
}

export function draw(state, lines) {
  const start = performance.now(), images = ready(state), at = state.hover || state.held;
  const live = at?.image.field && at.patch < at.image.field.count ? at : null;
  lines.hidden = state.mode !== "match";
  let scale = null;
  if (state.mode === "similar" || state.mode === "search") scale = drawSimilar(state, images, live);
  else if (state.mode === "segment") scale = drawSegment(state, images, live);
  else if (state.mode === "colours" && images.length) drawColours(state, images);
  else if (state.mode === "groups" && images.length) drawGroups(state, images, live);
  else if (state.mode === "match") drawMatch(state, images, live, lines);
  const rings = live && (scale || state.mode === "match");
  for (const image of images) {
    image.tile.place(image.tile.cursor, live?.image === image ? live.patch : -1);
    image.tile.place(image.tile.best, rings && live.image !== image ? image.nearest : -1);
    image.tile.showPins(state.mode === "segment" ? state.pins.filter((pin) => pin.image === image) : []);
  }
  frames.push(performance.now() - start);
  if (frames.length > 240) frames.shift();
  return scale;
}

// After a change of mode or images: nothing drawn before counts.
export function forgetDrawn(state) {
  state.painted = state.cutKey = "";
  state.images.forEach((image) => image.tile.clear());
}
