// Owns talking to the server: token, patience when it is busy, and reading safetensors.

import { Field } from "./dot.js";

let token = sessionStorage.getItem("densedino-token") || new URLSearchParams(location.hash.slice(1)).get("token") || "";
let asking = null;

function askForToken() {
  asking ||= new Promise((done) => {
    const dialog = document.getElementById("ask"), input = document.getElementById("token");
    dialog.addEventListener("close", () => {
      token = input.value.trim();
      sessionStorage.setItem("densedino-token", token);
      asking = null;
      done();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

export async function call(path, { body, type, busy = () => {}, signal } = {}) {
  for (;;) {
    const headers = {};
    if (token) headers.authorization = `Bearer ${token}`;
    if (type) headers["content-type"] = type;
    let answer;
    try {
      answer = await fetch(path, { method: body === undefined ? "GET" : "POST", body, headers, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer. Is it still running?");
    }
    if (answer.ok) return answer;
    if (answer.status === 401) { await askForToken(); continue; }
    if (answer.status === 429) {
      const seconds = Number(answer.headers.get("retry-after")) || 1;
      busy(seconds);
      await pause(1000 * seconds);
      continue;
    }
    const text = await answer.json().then((content) => content.error.message, () => `The server said ${answer.status}.`);
    throw new Error(text);
  }
}

export const getJson = async (path) => (await call(path)).json();
export const getBlob = async (path) => (await call(path)).blob();
export const search = async (vector, k) => (await call("/v1/search", { body: JSON.stringify({ vector, k }), type: "application/json" })).json();

// Features of one image as a Field, with its grid and sizes. `source`: { path } of the collection, or { file }.
export async function features(source, { tokens, layer, busy, signal }) {
  const query = new URLSearchParams({ format: "safetensors", dtype: "int8", parts: "patches", tokens });
  if (layer !== null) query.set("layers", layer);
  if (source.path?.startsWith("/v1/scene/")) query.delete("tokens");
  const answer = source.file
    ? await call(`/v1/features?${query}`, { body: source.file, type: "application/octet-stream", busy, signal })
    : await call(`${source.path}/features?${query}`, { busy, signal });
  return read(await answer.arrayBuffer(), layer);
}

function read(buffer, layer) {
  const size = Number(new DataView(buffer).getBigUint64(0, true));
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size)));
  const about = JSON.parse(head.__metadata__.densedino);
  const bytes = (name) => buffer.slice(...head[name].data_offsets.map((at) => 8 + size + at));
  const name = layer === null ? "patches" : `layer${layer}.patches`;
  const [h, w, dim] = head[name].shape;
  const field = new Field(new Int8Array(bytes(name)), new Float32Array(bytes(`${name}.scale`)), h * w, dim);
  const coarse = new Uint8Array(bytes("valid")), [gh, gw] = about.grid, finer = h / gh; // early ConvNeXt stages are finer
  const valid = Uint8Array.from({ length: h * w }, (_, i) => coarse[Math.floor(Math.floor(i / w) / finer) * gw + Math.floor((i % w) / finer)]);
  if (!valid.some(Boolean)) valid.fill(1); // smaller than a patch
  const span = [(gh * about.stride) / about.input_size[0], (gw * about.stride) / about.input_size[1]]; // grid ÷ image
  return { field, valid, grid: [h, w], span, size: about.source_size };
}
