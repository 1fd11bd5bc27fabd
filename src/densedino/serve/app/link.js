// Owns the link of a view: what it holds, and how it is written after the # of the address.

const MODES = ["similar", "segment", "colours", "groups", "match", "search"];
const whole = (text, low, high, otherwise) => {
  const n = Number(text);
  return text !== null && Number.isInteger(n) && n >= low && n <= high ? n : otherwise;
};

export function write(state, view) {
  const query = new URLSearchParams({ m: state.mode, d: state.detail });
  if (state.layer !== null) query.set("l", state.layer);
  if (state.mode === "groups") query.set("g", state.groups);
  if (state.tolerance) query.set("t", state.tolerance);
  if (!state.snap) query.set("e", 0);
  if (view) query.set("v", view.join("_"));
  else query.set("i", state.images.map((image) => image.id).join("."));
  if (state.held) query.set("h", `${state.held.image.id}.${state.held.patch}`);
  if (state.pins.length) query.set("p", state.pins.map((pin) => `${pin.image.id}.${pin.patch}.${pin.sign > 0 ? 1 : 0}`).join("_"));
  return query.toString();
}

export function read(hash) {
  const query = new URLSearchParams(hash.replace(/^#/, ""));
  const known = (id) => /^(c\d{1,9}|s[0-2]|u[0-9a-f]{8,24})$/.test(id);
  return {
    mode: MODES.includes(query.get("m")) ? query.get("m") : "similar",
    detail: whole(query.get("d"), 0, 3, 2),
    layer: whole(query.get("l"), 0, 200, null),
    groups: whole(query.get("g"), 2, 12, 6),
    tolerance: whole(query.get("t"), -100, 100, 0),
    snap: query.get("e") !== "0",
    ids: (query.get("i") || "").split(".").filter(known).slice(0, 24),
    view: (query.get("v") || "").match(/^(\d{1,9}(?:\.\d)?)_(\d{1,9}(?:\.\d)?)_(\d{1,2}(?:\.\d{1,4})?)$/)?.slice(1).map(Number) ?? null,
    held: (query.get("h") || "").match(/^([cstu][0-9a-f-]+)\.(\d{1,6})$/)?.slice(1) ?? null,
    pins: (query.get("p") || "").split("_").map((pin) => pin.match(/^([cstu][0-9a-f-]+)\.(\d{1,6})\.([01])$/)).filter(Boolean)
      .map(([, id, patch, plus]) => ({ id, patch: Number(patch), sign: plus === "1" ? 1 : -1 })),
  };
}
