// Owns the images kept in this browser (IndexedDB), so that the link of a view works again after a reload.

const MOST = 60;

function open() {
  return new Promise((done, fail) => {
    const request = indexedDB.open("densedino", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("images", { keyPath: "id" });
    request.onsuccess = () => done(request.result);
    request.onerror = () => fail(request.error);
  });
}

async function inStore(mode, act) {
  const base = await open();
  try {
    return await new Promise((done, fail) => {
      const transaction = base.transaction("images", mode), request = act(transaction.objectStore("images"));
      transaction.oncomplete = () => done(request.result);
      transaction.onerror = transaction.onabort = () => fail(transaction.error);
    });
  } finally {
    base.close();
  }
}

export async function keep(id, name, blob) {
  try {
    await inStore("readwrite", (store) => store.put({ id, name, blob, at: Date.now() }));
    const all = await inStore("readonly", (store) => store.getAll());
    for (const old of all.sort((a, b) => b.at - a.at).slice(MOST)) await inStore("readwrite", (store) => store.delete(old.id));
  } catch { /* a private window keeps nothing: the view works, its link does not */ }
}
export const recall = (id) => inStore("readonly", (store) => store.get(id)).catch(() => undefined);
export const forget = () => inStore("readwrite", (store) => store.clear()).catch(() => undefined);

export async function identify(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  if (crypto.subtle) {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    return "u" + Array.from(digest.subarray(0, 6), (b) => b.toString(16).padStart(2, "0")).join("");
  }
  let hash = 0x811c9dc5; // without TLS there is no crypto.subtle
  for (const b of bytes) hash = Math.imul(hash ^ b, 0x01000193) >>> 0;
  return `u${hash.toString(16).padStart(8, "0")}${bytes.length.toString(16)}`;
}
