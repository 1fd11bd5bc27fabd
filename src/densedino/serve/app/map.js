// Owns the map of a scene: which tiles are in view at which level, where they lie, and moving about in it.

import { Tile } from "./tile.js";

const SHOWN = 11; // pixels of the screen that a patch should have, about
const MOST = 40; // tiles kept at once

export class SceneMap {
  // `scene` as /v1/scene has it; the wall is the element it fills; `add` loads an image, `drop` forgets one.
  constructor(scene, wall, { add, drop, moved }) {
    Object.assign(this, { scene, wall, add, drop, moved });
    this.tiles = new Map();
    this.world = document.createElement("div");
    this.world.className = "world";
    wall.append(this.world);
    const [h, w] = scene.grid;
    this.zoom = Math.min(wall.clientWidth / w, wall.clientHeight / h); // pixels of the screen per patch at full size
    this.least = this.zoom * 0.6;
    this.centre = [w / 2, h / 2];
    this.listen();
  }

  get view() {
    return [...this.centre.map((v) => Math.round(v * 10) / 10), Math.round(this.zoom * 1e4) / 1e4];
  }

  set view([x, y, zoom]) {
    this.centre = [x, y];
    this.zoom = zoom;
    this.keepInside();
  }

  keepInside() {
    const [h, w] = this.scene.grid;
    this.zoom = Math.min(64, Math.max(this.least, this.zoom));
    this.centre = [Math.min(w, Math.max(0, this.centre[0])), Math.min(h, Math.max(0, this.centre[1]))];
  }

  place() {
    const { clientWidth: width, clientHeight: height } = this.wall;
    const [x, y] = [width / 2 - this.centre[0] * this.zoom, height / 2 - this.centre[1] * this.zoom];
    for (const image of this.tiles.values()) {
      const [left, top, right, bottom] = image.extent.map((v, i) => Math.round(v * this.zoom + (i % 2 ? y : x))); // whole pixels: no gaps
      Object.assign(image.tile.root.style, { left: `${left}px`, top: `${top}px`, width: `${right - left}px`, height: `${bottom - top}px` });
    }
  }

  update() {
    this.place();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => { this.fetch(); this.moved(); }, 140);
  }

  // Tiles that should be there now, from the middle outwards.
  wanted() {
    const { grid, tile, levels } = this.scene, { clientWidth: width, clientHeight: height } = this.wall;
    const level = Math.min(levels - 1, Math.max(0, Math.round(Math.log2(SHOWN / this.zoom)))), side = tile * 2 ** level;
    const span = (middle, pixels, most) => [Math.max(0, Math.floor((middle - pixels / 2 / this.zoom) / side)), Math.min(Math.ceil(most / side) - 1, Math.floor((middle + pixels / 2 / this.zoom) / side))];
    const [left, right] = span(this.centre[0], width, grid[1]), [top, bottom] = span(this.centre[1], height, grid[0]), found = [];
    for (let r = top; r <= bottom; r++) for (let c = left; c <= right; c++) found.push([level, r, c]);
    const far = ([, r, c]) => Math.hypot((r + 0.5) * side - this.centre[1], (c + 0.5) * side - this.centre[0]);
    return found.sort((a, b) => far(a) - far(b)).slice(0, MOST);
  }

  fetch() {
    const wanted = this.wanted(), ids = new Set(wanted.map((place) => `t${place.join("-")}`));
    for (const place of wanted) {
      const id = `t${place.join("-")}`;
      if (!this.tiles.has(id)) this.tiles.set(id, this.make(id, place));
    }
    for (const [id, image] of this.tiles) if (!ids.has(id) && !image.field) this.forget(id); // not worth waiting for
    this.tidy(ids);
    this.place();
  }

  // What lies under tiles that have come, or out of sight, goes.
  tidy(ids) {
    const here = [...ids].every((id) => this.tiles.get(id)?.field);
    if (here) for (const id of this.tiles.keys()) if (!ids.has(id)) this.forget(id);
  }

  forget(id) {
    this.drop(this.tiles.get(id));
    this.tiles.delete(id);
  }

  make(id, [level, row, column]) {
    const { grid, tile } = this.scene, side = tile * 2 ** level;
    const image = { id, name: `tile ${row}, ${column} at 1:${2 ** level}`, path: `/v1/scene/${level}/${row}/${column}`, version: 0 };
    image.extent = [column * side, row * side, Math.min((column + 1) * side, grid[1]), Math.min((row + 1) * side, grid[0])];
    image.tile = new Tile(image, this.world, { remove: () => {}, again: () => {} });
    image.tile.root.style.zIndex = 30 - level;
    this.add(image).then(() => this.tidy(new Set(this.wanted().map((place) => `t${place.join("-")}`))));
    return image;
  }

  zoomAt(clientX, clientY, factor) {
    const box = this.wall.getBoundingClientRect(), before = this.zoom;
    const [dx, dy] = [clientX - box.left - box.width / 2, clientY - box.top - box.height / 2];
    this.zoom = Math.min(64, Math.max(this.least, this.zoom * factor));
    this.centre = [this.centre[0] + dx / before - dx / this.zoom, this.centre[1] + dy / before - dy / this.zoom];
    this.keepInside();
    this.update();
  }

  listen() {
    const fingers = new Map();
    let dragged = 0;
    this.wall.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoomAt(event.clientX, event.clientY, Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)));
    }, { passive: false });
    this.wall.addEventListener("pointerdown", (event) => { fingers.set(event.pointerId, [event.clientX, event.clientY]); dragged = 0; });
    addEventListener("pointermove", (event) => {
      const last = fingers.get(event.pointerId);
      if (!last) return;
      const now = [event.clientX, event.clientY], other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
      dragged += Math.hypot(now[0] - last[0], now[1] - last[1]);
      if (dragged < 4) return;
      fingers.set(event.pointerId, now);
      if (other) {
        const apart = (a) => Math.hypot(a[0] - other[0], a[1] - other[1]) || 1;
        this.zoomAt((now[0] + other[0]) / 2, (now[1] + other[1]) / 2, apart(now) / apart(last));
      } else {
        this.centre = [this.centre[0] - (now[0] - last[0]) / this.zoom, this.centre[1] - (now[1] - last[1]) / this.zoom];
        this.keepInside();
        this.update();
      }
    });
    for (const end of ["pointerup", "pointercancel"]) addEventListener(end, (event) => fingers.delete(event.pointerId));
    this.wall.addEventListener("click", (event) => { if (dragged > 4) event.stopPropagation(); }, { capture: true }); // a drag is no click
    addEventListener("keydown", (event) => {
      if (event.target.matches("input") || !["+", "=", "-"].includes(event.key)) return;
      const box = this.wall.getBoundingClientRect();
      this.zoomAt(box.left + box.width / 2, box.top + box.height / 2, event.key === "-" ? 1 / 1.5 : 1.5);
    });
    new ResizeObserver(() => this.update()).observe(this.wall);
  }
}
