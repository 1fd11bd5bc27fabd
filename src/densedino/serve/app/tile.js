// Owns one image on the wall: its photo, the layers drawn over it, marks, and what it says while it waits.

import { enlarge, follow } from "./analysis.js";
import { glow, rgba } from "./colours.js";

const PHOTO = 1100; // pixels of the longer side that are kept for drawing
const make = (tag, className, parent) => {
  const node = document.createElement(tag);
  node.className = className;
  parent.append(node);
  return node;
};

export class Tile {
  constructor(image, wall, { remove, again }) {
    this.image = image;
    const root = (this.root = make("figure", "tile loading", wall));
    root.dataset.id = image.id;
    this.stage = make("div", "stage", root);
    this.stage.tabIndex = 0;
    this.stage.setAttribute("role", "application");
    this.stage.setAttribute("aria-label", `${image.name}; arrow keys move from patch to patch`);
    this.photo = make("canvas", "photo", this.stage);
    this.layer = make("canvas", "layer", make("div", "clip", this.stage));
    this.mask = make("canvas", "mask", this.stage);
    this.cursor = make("div", "cursor", this.stage);
    this.best = make("div", "best", this.stage);
    this.pins = make("div", "pins", this.stage);
    this.wait = make("div", "wait", this.stage);
    this.wait.setAttribute("role", "status");
    const caption = make("figcaption", "", root);
    make("span", "name", caption).textContent = image.name;
    this.note = make("span", "note", caption);
    const close = make("button", "close", caption);
    close.textContent = "×";
    close.setAttribute("aria-label", `Remove ${image.name}`);
    close.addEventListener("click", remove);
    this.again = again;
    this.shape(3 / 2);
  }

  shape(aspect) {
    this.aspect = aspect;
    this.root.style.setProperty("--aspect", aspect);
  }

  say(text) {
    this.wait.textContent = text;
    this.root.classList.toggle("waiting", Boolean(text));
  }

  fail(message) {
    this.root.classList.add("failed");
    this.root.classList.remove("loading");
    this.wait.replaceChildren(message);
    this.root.classList.add("waiting");
    const button = make("button", "", this.wait);
    button.textContent = "Try again";
    button.addEventListener("click", () => { this.root.classList.remove("failed"); this.again(); });
  }

  // The picture itself, from a blob that the browser can decode; without one, features are shown on an empty ground.
  async show(blob) {
    let bitmap;
    try {
      bitmap = await createImageBitmap(blob, { imageOrientation: "from-image" });
    } catch {
      return false;
    }
    const scale = Math.min(1, PHOTO / Math.max(bitmap.width, bitmap.height));
    this.photo.width = Math.max(1, Math.round(bitmap.width * scale));
    this.photo.height = Math.max(1, Math.round(bitmap.height * scale));
    const context = this.photo.getContext("2d", { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0, this.photo.width, this.photo.height);
    this.full = [bitmap.height, bitmap.width];
    this.shape(bitmap.width / bitmap.height);
    bitmap.close();
    this.grey = null;
    this.root.classList.remove("loading");
    return true;
  }

  // Tokens have come: the layer gets one pixel per patch, and is stretched over what the grid covers.
  fit() {
    const { grid, span, size } = this.image;
    [this.layer.height, this.layer.width] = grid;
    this.pixels = new ImageData(grid[1], grid[0]);
    this.packed = new Uint32Array(this.pixels.data.buffer);
    this.layer.style.height = `${100 * span[0]}%`;
    this.layer.style.width = `${100 * span[1]}%`;
    if (!this.full) {
      this.full = size;
      this.shape(size[1] / size[0]);
      this.photo.width = this.photo.height = 1;
    }
    this.root.classList.remove("loading");
    this.note.textContent = `${grid[0]}×${grid[1]}`;
  }

  draw(mode) {
    this.root.dataset.drawn = mode;
    if (this.pixels) this.layer.getContext("2d").putImageData(this.pixels, 0, 0);
  }

  // Values, of which `low` is dark and `high` bright, as a glow.
  glow(values, low, high) {
    const { packed } = this, valid = this.image.valid, span = 255 / Math.max(1e-6, high - low);
    for (let i = 0; i < packed.length; i++) {
      const t = Math.max(0, Math.min(255, (values[i] - low) * span)) | 0;
      packed[i] = valid[i] ? glow[t] : glow[0];
    }
    this.draw("glow");
  }

  paint(colour) {
    const { packed } = this, valid = this.image.valid;
    for (let i = 0; i < packed.length; i++) packed[i] = valid[i] ? colour(i) : 0;
    this.draw("paint");
  }

  clear() {
    if (this.packed) this.packed.fill(0);
    this.draw("");
    this.mask.width = this.mask.height = 0;
    this.marked = null;
  }

  // The patch under a point of the page, as its number; -1 outside.
  patchAt(clientX, clientY) {
    const box = this.stage.getBoundingClientRect(), { grid, span } = this.image;
    if (!grid) return -1;
    const x = (clientX - box.left) / box.width, y = (clientY - box.top) / box.height;
    if (x < 0 || y < 0 || x >= 1 || y >= 1) return -1;
    const row = Math.min(grid[0] - 1, Math.floor((y / span[0]) * grid[0]));
    return row * grid[1] + Math.min(grid[1] - 1, Math.floor((x / span[1]) * grid[1]));
  }

  // Left, top, width and height of a patch as shares of the image.
  box(i) {
    const { grid, span } = this.image, row = Math.floor(i / grid[1]), column = i % grid[1];
    return [(column * span[1]) / grid[1], (row * span[0]) / grid[0], span[1] / grid[1], span[0] / grid[0]];
  }

  place(node, i) {
    node.hidden = i < 0;
    if (i < 0) return;
    const [left, top, width, height] = this.box(i).map((v) => `${100 * v}%`);
    Object.assign(node.style, { left, top, width, height });
  }

  showPins(pins) {
    this.pins.replaceChildren();
    for (const pin of pins) {
      const node = make("span", pin.sign > 0 ? "pin plus" : "pin minus", this.pins);
      const [left, top, width, height] = this.box(pin.patch);
      node.style.left = `${100 * (left + width / 2)}%`;
      node.style.top = `${100 * (top + height / 2)}%`;
    }
  }

  luminance() {
    if (!this.grey && this.photo.width > 1) {
      const { width, height } = this.photo, data = this.photo.getContext("2d").getImageData(0, 0, width, height).data;
      this.grey = new Float32Array(width * height);
      for (let i = 0; i < this.grey.length; i++) this.grey[i] = (0.3 * data[4 * i] + 0.59 * data[4 * i + 1] + 0.11 * data[4 * i + 2]) / 255;
    }
    return this.grey;
  }

  // Where scores are above the limit: what is selected stays, with a bright rim, the rest is veiled.
  cut(scores, limit, snap) {
    const guide = this.luminance(), scale = guide ? 1 : 0;
    const [height, width] = scale ? [this.photo.height, this.photo.width] : [this.image.grid[0] * 8, this.image.grid[1] * 8];
    let values = enlarge(scores, this.image.grid, height, width, [height * this.image.span[0], width * this.image.span[1]]);
    if (snap && guide) values = follow(values, guide, height, width, Math.max(4, Math.round((0.8 * width) / this.image.grid[1])));
    const inside = new Uint8Array(values.length), pixels = new ImageData(width, height), packed = new Uint32Array(pixels.data.buffer);
    let count = 0;
    for (let i = 0; i < values.length; i++) count += inside[i] = values[i] > limit ? 1 : 0;
    const veil = rgba(8, 7, 18, 172), rim = rgba(255, 214, 92, 255), reach = Math.max(1, Math.round(width / 450));
    for (let y = 0, i = 0; y < height; y++) {
      for (let x = 0; x < width; x++, i++) {
        if (!inside[i]) { packed[i] = veil; continue; }
        const edge = (x >= reach && !inside[i - reach]) || (x < width - reach && !inside[i + reach]) || (y >= reach && !inside[i - reach * width]) || (y < height - reach && !inside[i + reach * width]);
        packed[i] = edge ? rim : 0;
      }
    }
    this.mask.width = width;
    this.mask.height = height;
    this.mask.getContext("2d").putImageData(pixels, 0, 0);
    this.marked = { inside, width, height, share: count / values.length };
  }

  // The mask as a PNG in the pixels of the image, white where selected.
  async export() {
    const { inside, width, height } = this.marked, small = new OffscreenCanvas(width, height), pixels = new ImageData(width, height);
    new Uint32Array(pixels.data.buffer).forEach((_, i, all) => (all[i] = inside[i] ? 0xffffffff : 0xff000000));
    small.getContext("2d").putImageData(pixels, 0, 0);
    const whole = new OffscreenCanvas(this.full[1], this.full[0]), context = whole.getContext("2d");
    context.drawImage(small, 0, 0, whole.width, whole.height);
    const data = context.getImageData(0, 0, whole.width, whole.height), packed = new Uint32Array(data.data.buffer);
    for (let i = 0; i < packed.length; i++) packed[i] = (packed[i] & 255) > 127 ? 0xffffffff : 0xff000000; // no grey rim
    context.putImageData(data, 0, 0);
    return whole.convertToBlob({ type: "image/png" });
  }
}
