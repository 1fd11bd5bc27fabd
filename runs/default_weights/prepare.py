"""Decode images into memory maps and cache the teachers' maps. prepare.py images | pca | cache SHARD NSHARDS."""

import glob
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from teachers_local import IM_MEAN, IM_STD, ROOT, FocusViT, Lite0

torch.set_num_threads(1)
Image.MAX_IMAGE_PIXELS = None
C = ROOT / "cache"
C.mkdir(exist_ok=True)
DATA = Path("/work/shared/data")


def photos():
    D = ROOT / "debx"
    S = ROOT / "src"
    fs = glob.glob(f"{D}/lomiri*/usr/share/backgrounds/*.jpg") + glob.glob(
        f"{D}/mate*/usr/share/backgrounds/mate/nature/*.jpg"
    )
    drawn = [
        "Altai",
        "IceCold",
        "Flow",
        "Kay",
        "Opal",
        "Patak",
        "Volna",
        "Canopee",
        "Cascade",
        "SafeLanding",
        "Honeywave",
        "Kokkini",
        "Shell",
        "Cluster",
        "MilkyWay",
        "FlyingKonqui",
        "Elarun",
        "PastelHills",
    ]
    fs += [
        f
        for f in glob.glob(f"{D}/plasma*/usr/share/wallpapers/*/contents/images/*x*.jpg")
        if f.split("/")[-4] not in drawn
    ]
    fs += glob.glob(f"{D}/scratch/usr/share/scratch/Media/Backgrounds/[NSOI]*/*.jpg")
    fs += [
        f"{S}/scikit_image/skimage/data/{n}"
        for n in (
            "coffee.png",
            "astronaut.png",
            "motorcycle_left.png",
            "rocket.jpg",
            "chelsea.png",
            "grass.png",
            "gravel.png",
            "brick.png",
        )
    ]
    fs += [f for f in glob.glob(f"{S}/deepforest/deepforest/data/*") if f.lower().endswith((".png", ".jpg"))] + [
        f"{S}/imgaug/imgaug/quokka.jpg"
    ]
    fs += glob.glob(f"{ROOT}/gcompris/*.jpg")
    return sorted(fs)


def images():
    fs = sorted(glob.glob(str(DATA / "imagenette/train/*/*.JPEG")))
    rng = np.random.default_rng(0)
    fs = [fs[i] for i in rng.permutation(len(fs))]
    a = np.lib.format.open_memmap(C / "inet.npy", "w+", np.uint8, (len(fs), 224, 224, 3))
    for i, f in enumerate(fs):
        im = Image.open(f).convert("RGB")
        assert im.size == (224, 224), im.size
        a[i] = np.asarray(im)
    (C / "inet.txt").write_text("\n".join(fs))
    tiles, names = [], []
    for f in photos():
        im = Image.open(f).convert("RGB")
        W, H = im.size
        s = min(W, H)
        if s < 280:
            continue
        for short in (448, 900, 1800):
            if short > 448 and s < short * 1.1:
                break
            r = im.resize((round(W * short / s), round(H * short / s)), Image.BICUBIC)
            nx, ny = max(1, round(r.width / 448 + 0.15)), max(1, round(r.height / 448 + 0.15))
            for y in np.linspace(0, r.height - 448, ny).round().astype(int):
                for x in np.linspace(0, r.width - 448, nx).round().astype(int):
                    t = np.asarray(r.crop((x, y, x + 448, y + 448)))
                    if t.std() < 12:
                        continue
                    tiles.append(t)
                    names.append(f"{f} {short} {x} {y}")
    order = rng.permutation(len(tiles))
    np.save(C / "photo.npy", np.stack([tiles[i] for i in order]))
    (C / "photo.txt").write_text("\n".join(names[i] for i in order))
    print(len(fs), len(tiles), len({n.split(" ")[0] for n in names}))


vit = lite = None


def teachers(im, vsize, lsize):
    """Im uint8 [B,H,W,3] -> z tokens of the ViT [B,384,h,w], stride-16 and stride-32 maps of Lite0."""
    global vit, lite
    if vit is None:
        vit, lite = FocusViT(9, torch.bfloat16), Lite0().to(memory_format=torch.channels_last)
    x = torch.from_numpy(np.ascontiguousarray(im)).permute(0, 3, 1, 2).float()

    def r(s):
        return x if x.shape[-1] == s else F.interpolate(x, size=(s, s), mode="bicubic", antialias=True).clamp(0, 255)

    v = vit((r(vsize) / 255 - IM_MEAN) / IM_STD)[1]
    with torch.autocast("cpu", torch.bfloat16):
        a, b = lite(((r(lsize) - 127) / 128).contiguous(memory_format=torch.channels_last))
    return v, a.float(), b.float()


def fit(x, k):  # [n, D]
    m, s = x.mean(0), x.std(0).clamp_min(1e-4)
    z = (x - m) / s
    e, v = torch.linalg.eigh(z.T @ z / len(z))
    e, v = e.flip(0), v.flip(1)
    print(
        "dims",
        x.shape[1],
        "kept",
        k,
        "variance",
        float(e[:k].sum() / e.sum()),
        "top",
        [round(float(i), 2) for i in e[:5]],
    )
    return {"mean": m, "std": s, "proj": v[:, :k].contiguous(), "eig": e}


@torch.inference_mode()
def pca():
    inet, photo = np.load(C / "inet.npy", mmap_mode="r"), np.load(C / "photo.npy", mmap_mode="r")
    V, A, B = [], [], []
    for src, n, vs, ls in ((inet, 300, 336, 320), (photo, 50, 448, 448)):
        for i in range(0, n, 10):
            v, a, b = teachers(src[i : i + 10], vs, ls)
            for L, t in ((V, v), (A, a), (B, b)):
                L.append(t.permute(0, 2, 3, 1).flatten(0, 2))
    torch.save(
        {"vit": fit(torch.cat(V), 192), "s16": fit(torch.cat(A), 112), "s32": fit(torch.cat(B), 256)}, C / "pca.pt"
    )


@torch.inference_mode()
def cache(shard, n):
    """Shard and count only matter for rows of one pass: 0 1 takes all."""
    P = torch.load(C / "pca.pt", weights_only=True)

    def pr(t, p):
        return (
            torch.einsum("bchw,ck->bhwk", (t - p["mean"].view(1, -1, 1, 1)) / p["std"].view(1, -1, 1, 1), p["proj"])
            .half()
            .numpy()
        )

    for name, vs, ls, stop in (("inet", 336, 320, 2400), ("photo", 448, 448, 10**6), ("inet", 336, 320, 10**6)):
        src = np.load(C / f"{name}.npy", mmap_mode="r")
        N = len(src)
        maps = {}
        for key, d, g in (("vit", 192, vs // 14), ("s16", 112, ls // 16), ("s32", 256, ls // 32)):
            path = C / f"{name}_{key}.npy"
            if shard == 0 and not path.exists():
                np.lib.format.open_memmap(path, "w+", np.float16, (N, g, g, d))
            while not path.exists() or path.stat().st_size < N * g * g * d * 2:
                time.sleep(1)
            maps[key] = np.load(path, mmap_mode="r+")
        done = C / f"{name}_done.txt"
        start = int(done.read_text()) if done.exists() else shard * 8
        t0 = time.time()
        for i in range(start, min(N, stop), 8 * n):
            j = min(i + 8, N)
            if np.abs(maps["vit"][i, 0, 0]).sum() > 0:
                continue
            for key, t in zip(("vit",), teachers(src[i:j], vs, ls), strict=False):
                maps[key][i:j] = pr(t, P[key])
            done.write_text(str(i + 8 * n))
            if (i // 8 // n) % 10 == 0:
                print(name, i, N, round(time.time() - t0), flush=True)


@torch.inference_mode()
def litepass():
    """The Lite0 maps alone, of every row that lacks them."""
    P = torch.load(C / "pca.pt", weights_only=True)
    net = Lite0().to(memory_format=torch.channels_last)
    for name, ls in (("inet", 320), ("photo", 448)):
        src = np.load(C / f"{name}.npy", mmap_mode="r")
        N = len(src)
        maps = {}
        for key, d, g in (("s16", 112, ls // 16), ("s32", 256, ls // 32)):
            path = C / f"{name}_{key}.npy"
            maps[key] = (
                np.load(path, mmap_mode="r+")
                if path.exists()
                else np.lib.format.open_memmap(path, "w+", np.float16, (N, g, g, d))
            )
        t0 = time.time()
        for i in range(0, N, 16):
            j = min(i + 16, N)
            if np.abs(maps["s32"][i, 0, 0]).sum() > 0 and np.abs(maps["s32"][j - 1, 0, 0]).sum() > 0:
                continue
            x = torch.from_numpy(src[i:j].copy()).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
            if ls != x.shape[-1]:
                x = F.interpolate(x, size=(ls, ls), mode="bicubic", antialias=True)
            with torch.autocast("cpu", torch.bfloat16):
                ab = net((x.float() - 127) / 128)
            for key, t in zip(("s16", "s32"), ab, strict=False):
                p = P[key]
                Wp = p["proj"] / p["std"][:, None]
                maps[key][i:j] = (t.permute(0, 2, 3, 1).float() @ Wp - p["mean"] @ Wp).half().numpy()
            if i % 320 == 0:
                print("lite", name, i, N, round(time.time() - t0), flush=True)


if __name__ == "__main__":
    {"images": images, "lite": litepass, "pca": pca, "cache": lambda: cache(int(sys.argv[2]), int(sys.argv[3]))}[
        sys.argv[1]
    ]()
