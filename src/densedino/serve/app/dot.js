// Owns comparing one patch with all others: int8 dot products in WebAssembly SIMD, or in plain loops where there is none.

const leb = (n) => (n < 128 ? [n] : [(n & 127) | 128, ...leb(n >>> 7)]);
const section = (id, body) => [id, ...leb(body.length), ...body];
const get = (i) => [0x20, i], set = (i) => [0x21, i], tee = (i) => [0x22, i];
const add = 0x6a, load = [0xfd, 0x00, 0x00, 0x00];
const plus = (i, n) => [...get(i), 0x41, n, add];

// d(query, tokens, count, dim, out): out[i] = query · tokens[i], of int8 vectors; dim is a multiple of 16.
// Locals: 0 query, 1 token, 2 count, 3 dim, 4 out, 5 end of the token, 6 place in the query, 7 sum, 8 and 9 the factors.
// A product is at most 127², so that two of them fit in 16 bits.
const code = [
  0x03, 0x40,
  ...get(0), ...set(6), ...get(1), ...get(3), add, ...set(5), 0x41, 0x00, 0xfd, 0x11, ...set(7),
  0x03, 0x40,
  ...get(6), ...load, ...set(8), ...get(1), ...load, ...set(9), ...get(7),
  ...get(8), ...get(9), 0xfd, 0x9c, 0x01, ...get(8), ...get(9), 0xfd, 0x9d, 0x01, 0xfd, 0x8e, 0x01, // low + high products
  0xfd, 0x7e, 0xfd, 0xae, 0x01, ...set(7), // widened in pairs, added to the sum
  ...plus(6, 16), ...set(6), ...plus(1, 16), ...tee(1), ...get(5), 0x49, 0x0d, 0x00,
  0x0b,
  ...get(4),
  ...get(7), 0xfd, 0x1b, 0, ...get(7), 0xfd, 0x1b, 1, add, ...get(7), 0xfd, 0x1b, 2, add, ...get(7), 0xfd, 0x1b, 3, add,
  0x36, 0x02, 0x00,
  ...plus(4, 4), ...set(4), ...get(2), 0x41, 0x01, 0x6b, ...tee(2), 0x0d, 0x00,
  0x0b, 0x0b,
];
const locals = [2, 2, 0x7f, 3, 0x7b];
const body = [...locals, ...code];
const bytes = new Uint8Array([
  0, 0x61, 0x73, 0x6d, 1, 0, 0, 0,
  ...section(1, [1, 0x60, 5, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0]),
  ...section(2, [1, 1, 0x65, 1, 0x6d, 2, 0, 1]), // (import "e" "m" (memory 1))
  ...section(3, [1, 0]),
  ...section(7, [1, 1, 0x64, 0, 0]), // (export "d")
  ...section(10, [1, ...leb(body.length), ...body]),
]);

let module = null;
try {
  module = new WebAssembly.Module(bytes);
} catch {
  module = null;
}
export const kernel = () => (module ? "WebAssembly SIMD" : "JavaScript");
export const useJavaScript = () => { module = null; }; // for the test that both agree

const PAGE = 65536;

// The quantised tokens of one image: unit vectors as int8 [count × dim], with the scale of each.
export class Field {
  constructor(tokens, scale, count, dim) {
    this.count = count;
    this.dim = dim;
    this.scale = scale;
    this.padded = Math.ceil(dim / 16) * 16;
    const out = this.padded, first = Math.ceil((out + 4 * count) / 16) * 16, size = first + count * this.padded;
    this.places = [out, first];
    let buffer;
    if (module) {
      const memory = new WebAssembly.Memory({ initial: Math.ceil(size / PAGE) });
      this.run = new WebAssembly.Instance(module, { e: { m: memory } }).exports.d;
      buffer = memory.buffer;
    } else buffer = new ArrayBuffer(size);
    this.query = new Int8Array(buffer, 0, this.padded);
    this.sums = new Int32Array(buffer, out, count);
    this.tokens = new Int8Array(buffer, first, count * this.padded);
    if (this.padded === dim) this.tokens.set(tokens);
    else for (let i = 0; i < count; i++) this.tokens.set(tokens.subarray(i * dim, (i + 1) * dim), i * this.padded);
  }

  // A token as a query for any field of the same model.
  vector(i) {
    return { values: this.tokens.slice(i * this.padded, (i + 1) * this.padded), scale: this.scale[i] };
  }

  // Cosine of every token to `query`, into the Float32Array `into`.
  similarity(query, into) {
    const { count, padded, sums, scale } = this;
    this.query.set(query.values);
    if (this.run) this.run(0, this.places[1], count, padded, this.places[0]);
    else {
      const tokens = this.tokens, q = query.values;
      for (let i = 0, at = 0; i < count; i++) {
        let sum = 0;
        for (let j = 0; j < padded; j++) sum += q[j] * tokens[at++];
        sums[i] = sum;
      }
    }
    for (let i = 0; i < count; i++) into[i] = sums[i] * scale[i] * query.scale;
    return into;
  }

  // A token in floats, of length 1.
  unit(i, into) {
    const at = i * this.padded, s = this.scale[i];
    for (let j = 0; j < this.dim; j++) into[j] = this.tokens[at + j] * s;
    return into;
  }
}
