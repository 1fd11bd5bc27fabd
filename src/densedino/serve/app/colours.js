// Owns colours: the heat scale, colours of principal components, and hues of groups that are told apart.

function oklab(lightness, a, b) {
  const l = lightness + 0.3963377774 * a + 0.2158037573 * b;
  const m = lightness - 0.1055613458 * a - 0.0638541728 * b;
  const s = lightness - 0.0894841775 * a - 1.291485548 * b;
  const [x, y, z] = [l ** 3, m ** 3, s ** 3];
  const linear = [
    4.0767416621 * x - 3.3077115913 * y + 0.2309699292 * z,
    -1.2684380046 * x + 2.6097574011 * y - 0.3413193965 * z,
    -0.0041960863 * x - 0.7034186147 * y + 1.707614701 * z,
  ];
  return linear.map((v) => {
    const c = Math.min(1, Math.max(0, v));
    return Math.round(255 * (c <= 0.0031308 ? 12.92 * c : 1.055 * c ** (1 / 2.4) - 0.055));
  });
}

// 256 colours from dark violet to pale yellow, as `densedino view` has them, packed as the canvas wants them.
const table = Array.from({ length: 256 }, (_, i) => {
  const t = i / 255, hue = ((285 + 180 * t) * Math.PI) / 180, chroma = 0.05 + 0.15 * Math.sin(Math.PI * t) ** 0.8;
  return oklab(0.2 + 0.76 * t, chroma * Math.cos(hue), chroma * Math.sin(hue));
});
const pack = ([r, g, b], a) => ((a << 24) | (b << 16) | (g << 8) | r) >>> 0;

// Heat over a dark veil, with an opacity that grows with the value: the photo shows where nothing is alike. The veil is
// in the colours, not a filter on the photo, which would be drawn anew in every frame.
const VEIL = [9, 8, 18], VEILED = 0.64;
export const glow = Uint32Array.from(table, (colour, i) => {
  const a = Math.min(1, (i / 255) * 1.6) ** 1.4 * 0.94, whole = a + VEILED * (1 - a);
  return pack(colour.map((v, c) => Math.round((v * a + VEIL[c] * VEILED * (1 - a)) / whole)), Math.round(255 * whole));
});
export const heat = Uint32Array.from(table, (colour) => pack(colour, 255));

export const groupColour = (g, count, alpha = 205) => {
  const hue = (2 * Math.PI * (g + 0.15)) / count;
  return pack(oklab(0.74 - 0.12 * (g % 2), 0.15 * Math.cos(hue), 0.15 * Math.sin(hue)), alpha);
};
export const lineColour = (t) => {
  const hue = 2 * Math.PI * t;
  return `rgb(${oklab(0.8, 0.14 * Math.cos(hue), 0.14 * Math.sin(hue)).join(" ")})`;
};
export const rgba = (r, g, b, a) => pack([r, g, b], a);
