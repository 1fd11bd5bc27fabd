// Owns the page: what is on the wall, the mouse and keys, loading, and the link that restores a view.

import * as api from "./api.js";
import { heat } from "./colours.js";
import { kernel } from "./dot.js";
import * as kept from "./kept.js";
import * as link from "./link.js";
import { SceneMap } from "./map.js";
import { draw, forgetDrawn, HINTS, timing } from "./modes.js";
import { Tile } from "./tile.js";

const $ = (id) => document.getElementById(id);
const STEPS = [256, 576, 1600, 4096]; // patches of the slider "Detail"
const FIRST = 256; // shown at once, while more are computed
const MOVE = " Drag to move, wheel or + and − to zoom.";
const SAMPLES = ["chelsea.jpg", "astronaut.jpg", "coffee.jpg"];

const state = { ...link.read(location.hash), images: [], hover: null, sign: 1, painted: "" };
const wanted = { held: state.held, pins: state.pins }; // of the link, until their images are there
state.held = null;
state.pins = [];
let model = null, collection = null, map = null, due = false, touched = false;
window.densedino = { state, timing, kernel };

const toast = (text) => {
  $("toast").textContent = text;
  $("toast").classList.add("on");
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => $("toast").classList.remove("on"), 4500);
};

function redraw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    const scale = draw(state, $("lines"));
    readout(scale);
  });
}

function changed({ fresh = false } = {}) {
  if (fresh) forgetDrawn(state);
  history.replaceState(null, "", `#${link.write(state, map?.view)}`);
  redraw();
}

function readout(scale) {
  const at = state.hover || state.held, times = timing().slice(-31).sort((a, b) => a - b), last = times[times.length >> 1];
  const patches = state.images.reduce((n, image) => n + (image.field?.count || 0), 0);
  $("readout").textContent = at?.image.grid
    ? `patch ${Math.floor(at.patch / at.image.grid[1])}, ${at.patch % at.image.grid[1]} of ${at.image.name}` : "";
  $("meter").textContent = at && scale ? `${patches.toLocaleString("en")} patches compared in ${last.toFixed(1)} ms (${kernel()})` : "";
  document.querySelector(".legend").classList.toggle("on", Boolean(scale));
}

// ---- images ----

async function add(entry) {
  const there = state.images.find((image) => image.id === entry.id);
  if (there) return there;
  const image = { ...entry, version: 0 };
  image.tile = new Tile(image, $("wall"), { remove: () => remove(image), again: () => load(image) });
  listen(image);
  state.images.push(image);
  arrange();
  changed();
  await load(image);
  return image;
}

function remove(image) {
  image.abort?.abort();
  image.tile.root.remove();
  state.images = state.images.filter((other) => other !== image);
  state.pins = state.pins.filter((pin) => pin.image !== image);
  if (state.held?.image === image) state.held = null;
  if (state.hover?.image === image) state.hover = null;
  arrange();
  changed({ fresh: true });
}

// ---- the map of a scene ----

function openMap(scene) {
  document.body.classList.add("mapped");
  map = new SceneMap(scene, $("wall"), {
    add: (image) => {
      listen(image);
      state.images.push(image);
      return load(image);
    },
    drop: (image) => {
      image.abort?.abort();
      image.tile.root.remove();
      state.images = state.images.filter((other) => other !== image);
      if (state.hover?.image === image) state.hover = null;
      state.painted = "";
      redraw();
    },
    moved: () => changed(),
  });
  if (state.view) map.view = state.view;
  map.update();
  setMode(state.mode);
}

function arrange() {
  document.body.classList.toggle("empty", !state.images.length);
  markLibrary();
  layOut();
}

// The largest height of a row at which all images are seen at once, if they can be.
function layOut() {
  if (map) return;
  const wall = $("wall"), width = wall.clientWidth - 36, aspects = state.images.map((image) => image.tile.aspect), gap = 15, caption = 32;
  const below = $("library").offsetHeight + document.querySelector("footer").offsetHeight + ($("results").offsetHeight || 0);
  const room = innerHeight - wall.getBoundingClientRect().top - scrollY - below - 28;
  const height = (row) => {
    let rows = 1, used = -gap;
    for (const aspect of aspects) {
      if (used + gap + aspect * row > width && used > 0) { rows++; used = -gap; }
      used += gap + aspect * row;
    }
    return used > width ? Infinity : rows * (row + caption) + (rows - 1) * gap;
  };
  let row = 620;
  while (row > 200 && height(row) > room) row -= 4;
  wall.style.setProperty("--row", `${row}px`);
}

// One after the other: the server computes one at a time anyway, and first looks at all images come before finer ones.
let line = Promise.resolve();
const inTurn = (ask) => {
  const answer = line.then(ask);
  line = answer.catch(() => {});
  return answer;
};

async function load(image) {
  image.abort?.abort();
  const abort = (image.abort = new AbortController()), { tile } = image, started = performance.now();
  if (!tile.full) {
    tile.say("Reading…");
    try {
      await tile.show(image.file || (await api.getBlob(`${image.path}/image?side=1100`)));
      layOut();
    } catch (error) {
      if (!image.path) return tile.fail(error.message); // a store whose photos are gone can still be looked at
    }
  }
  const clock = setInterval(() => tile.say(`Computing features… ${((performance.now() - started) / 1000).toFixed(0)} s`), 1000);
  tile.say("Computing features…");
  const target = Math.min(STEPS[state.detail], model?.max_tokens ?? Infinity), stored = image.path && collection?.stored;
  const passes = map || image.field || stored || target <= FIRST ? [target] : [FIRST, target];
  try {
    for (const tokens of passes) {
      const busy = (seconds) => tile.say(`The server is busy; again in ${seconds} s…`);
      use(image, await inTurn(() => api.features(image, { tokens, layer: state.layer, busy, signal: abort.signal })));
      image.first ??= performance.now() - started;
      if (tokens !== target) tile.say("Finer…");
    }
    settle(image);
    tile.say("");
  } catch (error) {
    if (error.name !== "AbortError") tile.fail(error.message);
  } finally {
    clearInterval(clock);
  }
}

// New features of an image. Patches that are pointed at stay where they are in the picture.
function use(image, found) {
  const before = image.grid;
  const moved = (patch) => {
    if (!before) return 0;
    const row = Math.floor((((Math.floor(patch / before[1]) + 0.5) / before[0]) * found.grid[0]));
    return row * found.grid[1] + Math.floor((((patch % before[1]) + 0.5) / before[1]) * found.grid[1]);
  };
  for (const at of [state.hover, state.held, ...state.pins]) if (at?.image === image) at.patch = moved(at.patch);
  state.pins.forEach((pin) => pin.maps?.clear());
  Object.assign(image, found, { version: image.version + 1 });
  image.tile.fit();
  layOut();
  changed({ fresh: true });
}

// What the link says about this image.
function settle(image) {
  const count = image.field.count;
  if (wanted.held?.[0] === image.id && Number(wanted.held[1]) < count) {
    state.held = { image, patch: Number(wanted.held[1]) };
    wanted.held = null;
  }
  const mine = wanted.pins.filter((pin) => pin.id === image.id && pin.patch < count);
  wanted.pins = wanted.pins.filter((pin) => pin.id !== image.id);
  state.pins.push(...mine.map(({ patch, sign }) => ({ image, patch, sign })));
  changed({ fresh: mine.length > 0 });
}

async function addFiles(files) {
  if (map) return toast("This is the map of a scene. For images, start densedino serve without one.");
  const images = [...files].filter((file) => file.type.startsWith("image/") || /\.(tiff?|avif|jp2|webp)$/i.test(file.name));
  if (!images.length) return toast("Those are no images.");
  for (const image of state.images.filter((one) => one.sample)) remove(image);
  const entries = await Promise.all(images.slice(0, 12).map(async (file) => ({ id: await kept.identify(file), name: file.name, file })));
  entries.forEach(({ id, name, file }) => kept.keep(id, name, file));
  await Promise.all(entries.map(add));
}

const ofCollection = (item) => ({ id: `c${item.item}`, name: item.name.split("/").pop(), path: `/v1/collection/${item.item}` });

async function restore() {
  const entries = await Promise.all(state.ids.map(async (id) => {
    if (id[0] === "s") return sample(Number(id[1]));
    if (id[0] === "u") return kept.recall(id).then((found) => found && { id, name: found.name, file: found.blob });
    const place = Number(id.slice(1));
    if (place < collection.count) return ofCollection(collection.items[place] || (await api.getJson(`/v1/collection?first=${place}`)).items[0]);
  }));
  const there = entries.filter(Boolean), lost = entries.length - there.length;
  if (lost) toast(`${lost} of this view’s images are not here: they were in another browser, or on another server.`);
  await Promise.all(there.map(add));
}

async function sample(number) {
  const file = await (await fetch(`/app/${SAMPLES[number]}`)).blob();
  return { id: `s${number}`, name: SAMPLES[number], file, sample: true };
}

// ---- pointing ----

function listen(image) {
  const { stage } = image.tile;
  const move = (event) => point(image, image.tile.patchAt(event.clientX, event.clientY));
  stage.addEventListener("pointermove", move);
  stage.addEventListener("pointerdown", move);
  stage.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") point(image, -1); });
  stage.addEventListener("click", (event) => choose(image, image.tile.patchAt(event.clientX, event.clientY), event.shiftKey ? -1 : state.sign));
  stage.addEventListener("contextmenu", (event) => {
    if (state.mode !== "segment") return;
    event.preventDefault();
    choose(image, image.tile.patchAt(event.clientX, event.clientY), -1);
  });
  stage.addEventListener("keydown", (event) => walk(image, event));
}

function point(image, patch) {
  touched = true;
  state.hover = patch < 0 ? null : { image, patch };
  redraw();
}

function choose(image, patch, sign) {
  touched = true;
  if (!image.field || patch < 0) return;
  if (state.mode === "segment") {
    state.pins.push({ image, patch, sign });
    state.hover = null;
  } else {
    const same = state.held?.image === image && state.held.patch === patch;
    state.held = same ? null : { image, patch };
    if (state.mode === "search" && !same) find(image, patch);
  }
  changed();
}

function walk(image, event) {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!image.field) return;
  const [h, w] = image.grid, now = state.hover?.image === image ? state.hover.patch : Math.floor(h / 2) * w + Math.floor(w / 2);
  if (step) {
    const row = Math.min(h - 1, Math.max(0, Math.floor(now / w) + step[0])), column = Math.min(w - 1, Math.max(0, (now % w) + step[1]));
    point(image, row * w + column);
  } else if (event.key === "Enter") choose(image, now, state.sign);
  else return;
  event.preventDefault();
  event.stopPropagation();
}

// Until somebody touches something, the page points at things by itself.
async function demonstrate() {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const stops = [[0, 0.67, 0.4], [0, 0.41, 0.4], [0, 0.51, 0.62], [1, 0.5, 0.2], [1, 0.4, 0.72], [2, 0.45, 0.45], [2, 0.8, 0.75]];
  const at = (image, x, y) => Math.floor(y * image.grid[0]) * image.grid[1] + Math.floor(x * image.grid[1]);
  for (let n = 0; !touched; n++) {
    const [which, x, y] = stops[n % stops.length], image = state.images[which];
    if (!image?.field || state.mode !== "similar") return;
    const [, fromX, fromY] = n && stops[(n - 1) % stops.length][0] === which ? stops[(n - 1) % stops.length] : [0, x + 0.08, y + 0.1];
    const start = performance.now(), length = calm ? 1 : 900;
    while (!touched && performance.now() - start < length) {
      const t = Math.min(1, (performance.now() - start) / length), ease = t * t * (3 - 2 * t);
      state.hover = { image, patch: at(image, fromX + (x - fromX) * ease, fromY + (y - fromY) * ease) };
      redraw();
      await new Promise(requestAnimationFrame);
    }
    if (touched) break;
    state.hover = { image, patch: at(image, x, y) };
    redraw();
    for (let wait = 0; wait < 20 && !touched; wait++) await new Promise((done) => setTimeout(done, 100));
    if (calm) return;
  }
}

// ---- search and collection ----

const thumbs = new Map();
const thumb = (item) => {
  if (!thumbs.has(item)) thumbs.set(item, api.getBlob(`/v1/collection/${item}/image?side=320`).then((blob) => URL.createObjectURL(blob)));
  return thumbs.get(item);
};

async function find(image, patch) {
  $("results").hidden = false;
  $("results").classList.add("busy");
  const vector = Array.from(image.field.unit(patch, new Float32Array(image.field.dim)), (v) => Math.round(v * 1e6) / 1e6);
  try {
    const { results, searched } = await api.search(vector, 24);
    $("searched").textContent = `among ${searched.toLocaleString("en")} of ${collection.count.toLocaleString("en")} images`;
    $("results").querySelector("ol").replaceChildren(...results.map(resultOf));
  } catch (error) {
    toast(error.message);
  } finally {
    $("results").classList.remove("busy");
  }
}

function resultOf(hit) {
  const entry = document.createElement("li"), button = document.createElement("button"), picture = document.createElement("img"), box = document.createElement("i");
  const [row, column] = hit.patch, [h, w] = hit.grid;
  Object.assign(box.style, { left: `${(100 * column) / w}%`, top: `${(100 * row) / h}%`, width: `${100 / w}%`, height: `${100 / h}%` });
  picture.alt = "";
  thumb(hit.item).then((url) => (picture.src = url), () => picture.classList.add("gone"));
  const frame = document.createElement("span");
  frame.append(picture, box);
  const label = document.createElement("small");
  label.textContent = `${hit.score.toFixed(2)}  ${hit.name.split("/").pop()}`;
  button.title = `Put ${hit.name} on the wall`;
  button.append(frame, label);
  button.addEventListener("click", () => add(ofCollection(hit)));
  entry.append(button);
  return entry;
}

function showLibrary() {
  if (collection.count <= state.images.length && !collection.count) return;
  $("library").hidden = false;
  const strip = $("library").querySelector(".strip");
  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      seen.unobserve(target);
      thumb(Number(target.dataset.item)).then((url) => (target.firstChild.src = url), () => target.firstChild.classList.add("gone"));
    }
  }, { root: strip, rootMargin: "200px" });
  for (const item of collection.items) {
    const button = document.createElement("button"), picture = document.createElement("img");
    button.dataset.item = item.item;
    button.title = item.name;
    picture.alt = item.name;
    button.append(picture);
    button.addEventListener("click", () => {
      const there = state.images.find((image) => image.id === `c${item.item}`);
      there ? remove(there) : add(ofCollection(item));
    });
    strip.append(button);
    seen.observe(button);
  }
  markLibrary();
}

function markLibrary() {
  for (const button of $("library").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", state.images.some((image) => image.id === `c${button.dataset.item}`));
  }
}

// ---- controls ----

function setMode(mode) {
  state.mode = mode;
  for (const tab of $("modes").children) tab.setAttribute("aria-selected", tab.dataset.mode === mode);
  for (const control of $("controls").children) control.hidden = !control.dataset.for.split(" ").includes(mode);
  $("hint").innerHTML = HINTS[mode] + (map ? MOVE : "");
  $("results").hidden = mode !== "search" || !$("results").querySelector("li");
  document.body.dataset.mode = mode;
  changed({ fresh: true });
}

function setSign(sign) {
  state.sign = sign;
  $("plus").setAttribute("aria-checked", sign > 0);
  $("minus").setAttribute("aria-checked", sign < 0);
}

function undo() {
  state.pins.pop();
  changed({ fresh: true });
}

async function exportMasks() {
  const marked = state.images.filter((image) => image.tile.marked?.share > 0);
  if (!marked.length) return toast("Click on something first; the mask is what stays bright.");
  for (const image of marked) {
    const anchor = document.createElement("a");
    anchor.href = URL.createObjectURL(await image.tile.export());
    anchor.download = `${image.name.replace(/\.\w+$/, "")}_mask.png`;
    anchor.click();
    setTimeout(() => URL.revokeObjectURL(anchor.href), 1000);
  }
  toast(`Saved ${marked.length === 1 ? "the mask" : `${marked.length} masks`} as PNG, in the size of the photo.`);
}

async function share() {
  try {
    await navigator.clipboard.writeText(location.href);
    toast("The link to this view is copied. Uploaded images stay in this browser; those of the collection open anywhere.");
  } catch {
    toast("The address bar has the link to this view.");
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("densedino-theme", theme);
}

const toggleTheme = () => setTheme(document.documentElement.dataset.theme === "light" ? "dark" : "light");

function slider(id, get, set, text, { live = true } = {}) {
  const input = $(id), output = input.nextElementSibling;
  const show = () => { input.value = get(); output.textContent = text(Number(input.value)); };
  input.addEventListener(live ? "input" : "change", () => { set(Number(input.value)); show(); });
  if (!live) input.addEventListener("input", () => (output.textContent = text(Number(input.value))));
  show();
}

function controls() {
  const layers = collection.stored ? [...collection.layers, null] : [...Array(model.depth - 1).keys(), null];
  $("layer").max = layers.length - 1;
  $("layer").closest("label").classList.toggle("useless", layers.length < 2);
  const reload = () => { changed(); state.images.forEach(load); };
  slider("layer", () => Math.max(0, layers.indexOf(state.layer)), (v) => { state.layer = layers[v]; reload(); }, (v) => (layers[v] === null ? "last" : `${layers[v] + 1}`), { live: false });
  slider("detail", () => state.detail, (v) => { state.detail = v; reload(); }, (v) => `${Math.sqrt(STEPS[v])}²`, { live: false });
  slider("tolerance", () => state.tolerance, (v) => { state.tolerance = v; changed(); }, (v) => (v > 0 ? `+${v}` : `${v}`));
  slider("groups", () => state.groups, (v) => { state.groups = v; changed({ fresh: true }); }, String);
  $("snap").checked = state.snap;
  $("snap").addEventListener("change", () => { state.snap = $("snap").checked; changed(); });
}

function wire() {
  $("modes").addEventListener("click", (event) => {
    const tab = event.target.closest("button");
    if (tab && !tab.disabled) setMode(tab.dataset.mode);
  });
  $("plus").addEventListener("click", () => setSign(1));
  $("minus").addEventListener("click", () => setSign(-1));
  $("undo").addEventListener("click", undo);
  $("export").addEventListener("click", exportMasks);
  $("share").addEventListener("click", share);
  $("theme").addEventListener("click", toggleTheme);
  $("help").addEventListener("click", () => $("about").showModal());
  $("forget").addEventListener("click", () => kept.forget().then(() => toast("Forgotten. Links to views with uploaded images no longer work.")));
  $("add").addEventListener("click", () => $("files").click());
  $("files").addEventListener("change", () => { addFiles($("files").files); $("files").value = ""; });
  addEventListener("paste", (event) => event.clipboardData?.files.length && addFiles(event.clipboardData.files));
  addEventListener("dragover", (event) => { event.preventDefault(); $("drop").hidden = false; });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
  addEventListener("drop", (event) => { event.preventDefault(); $("drop").hidden = true; touched = true; addFiles(event.dataTransfer.files); });
  addEventListener("resize", () => { layOut(); redraw(); });
  addEventListener("scroll", redraw, { passive: true });
  addEventListener("keydown", keys);
  addEventListener("keyup", (event) => event.key === " " && document.body.classList.remove("bare"));
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.matches("input[type=text], input[type=password]")) return;
  const tab = $("modes").children[Number(event.key) - 1];
  const act = {
    p: () => setSign(1), n: () => setSign(-1), Backspace: undo, e: exportMasks, s: share, t: toggleTheme,
    a: () => $("files").click(), "?": () => $("about").showModal(),
    Escape: () => { state.held = state.hover = null; changed({ fresh: state.mode !== "segment" }); },
    " ": () => document.body.classList.add("bare"),
  }[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (tab && !tab.disabled) setMode(tab.dataset.mode);
  else if (act && !(event.key === " " && event.target.matches("button, input"))) act();
  else return;
  if (event.key === " " || event.key === "Backspace") event.preventDefault();
}

function drawLegend() {
  const context = $("scale").getContext("2d"), pixels = context.createImageData(128, 1);
  new Uint32Array(pixels.data.buffer).set(heat.filter((_, i) => i % 2));
  context.putImageData(pixels, 0, 0);
}

async function begin() {
  setTheme(localStorage.getItem("densedino-theme") || (matchMedia("(prefers-color-scheme: light)").matches ? "light" : "dark"));
  wire();
  drawLegend();
  setSign(1);
  arrange();
  $("hint").innerHTML = HINTS[state.mode];
  let scene = null;
  try {
    [model, collection] = await Promise.all([api.getJson("/v1/models").then((answer) => answer.models[0]), api.getJson("/v1/collection")]);
    if (collection.scene) scene = await api.getJson("/v1/scene");
  } catch (error) {
    toast(error.message);
    return;
  }
  $("model").textContent = `${model.id} · ${model.embed_dim} numbers per patch · ${model.engine} ${model.precision}`;
  if (model.untrained) { $("model").textContent = `${model.id}: UNTRAINED, features are noise`; $("model").classList.add("alarm"); }
  const tab = document.querySelector("[data-mode=search]");
  tab.disabled = !collection.count;
  tab.title = collection.count ? "" : "Start with a folder or a store to search it: densedino serve photos/";
  if (tab.disabled && state.mode === "search") state.mode = "similar";
  controls();
  setMode(state.mode);
  if (collection.count) showLibrary();
  if (scene) openMap(scene);
  else if (state.ids.length) await restore();
  else if (collection.count) await Promise.all(collection.items.slice(0, 4).map((item) => add(ofCollection(item))));
  else await Promise.all((await Promise.all([0, 1, 2].map(sample))).map(add));
  if (!map && !state.held && !state.pins.length) demonstrate();
}

begin();
