"""Headless two-teacher distillation of vitt16. train.py RUN --until HH:MM [--decay MIN] [--init FILE] [--lr F]."""

import argparse
import datetime
import json
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from teachers_local import IM_MEAN, IM_STD, ROOT
from torch import nn
from torchvision.ops import roi_align

import densedino as dd
from densedino.models.rope import RopeAugment
from densedino.pretrain.draws import draw

ap = argparse.ArgumentParser()
ap.add_argument("run")
ap.add_argument("--until", default="15:00")
ap.add_argument("--decay", type=float, default=20)
ap.add_argument("--init", default=str(ROOT / "init.pt"))
ap.add_argument("--lr", type=float, default=5e-4)
ap.add_argument("--wd", type=float, default=0.05)
ap.add_argument("--steps", type=int, default=10**9)
ap.add_argument("--warm", type=int, default=150)
ap.add_argument("--seed", type=int, default=0)
ap.add_argument("--from-stable", action="store_true")
ap.add_argument("--w", default="{}")
ap.add_argument("--small", action="store_true")
args = ap.parse_args()
torch.set_num_threads(1)
RUN = ROOT / args.run
RUN.mkdir(exist_ok=True)
C = ROOT / "cache"
W = {"vit": 1.0, "s16": 0.25, "s32": 0.25, "gram": 1.0, "cls": 1.0, "clsgram": 1.0} | json.loads(args.w)
PCA = torch.load(C / "pca.pt", weights_only=True)
IMG = {k: np.load(C / f"{k}.npy", mmap_mode="r") for k in ("inet", "photo")}
VIT = {k: np.load(C / f"{k}_vit.npy", mmap_mode="r") for k in ("inet", "photo") if (C / f"{k}_vit.npy").exists()}


MAPS = {
    k: {t: np.load(C / f"{k}_{t}.npy", mmap_mode="r") for t in ("vit", "s16", "s32") if (C / f"{k}_{t}.npy").exists()}
    for k in IMG
}


def count_cached():
    """Rows from the first on that have a map, of each source and teacher."""
    return {
        k: {t: int((np.abs(m[:, 0, 0, :4]).sum(-1) > 0).cumprod().sum()) for t, m in MAPS[k].items()}
        | {t: 0 for t in ("vit", "s16", "s32") if t not in MAPS[k]}
        for k in IMG
    }


BUCKETS = [
    ((160, 160), 32, 0.35, 0.12),
    ((224, 224), 16, 0.35, 0.2),
    ((240, 320), 10, 0.075, 0.4),
    ((320, 240), 10, 0.075, 0.3),
    ((288, 416), 7, 0.1, 0.5),
    ((384, 320), 7, 0.05, 0.4),
]


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Linear(192, 192 + 112 + 256)
        self.cls = nn.Linear(192, 256)


def jitter(x, rng):
    if rng.random() < 0.7:
        b, c, sat = rng.uniform(0.7, 1.3), rng.uniform(0.7, 1.3), rng.uniform(0.6, 1.4)
        x = x * b
        m = x.mean()
        x = (x - m) * c + m
        g = x.mean(0, keepdim=True)
        x = (x - g) * sat + g
    if rng.random() < 0.08:
        x = x.mean(0, keepdim=True).expand(3, -1, -1)
    return x.clamp(0, 255)


def box(H, Wd, aspect, rng, lo):
    for _ in range(10):
        a = H * Wd * rng.uniform(lo, 1)
        r = aspect * math.exp(rng.uniform(-0.25, 0.25))
        h, w = round(math.sqrt(a / r)), round(math.sqrt(a * r))
        if h <= H and w <= Wd:
            return int(rng.integers(H - h + 1)), int(rng.integers(Wd - w + 1)), h, w
    if aspect >= 1:
        h = min(H, round(Wd / aspect))
        return int(rng.integers(H - h + 1)), 0, h, Wd
    w = min(Wd, round(H * aspect))
    return 0, int(rng.integers(Wd - w + 1)), H, w


def batch(step, cached):
    rng = np.random.default_rng([args.seed, step])
    (h, w), B, _, ph = BUCKETS[0 if args.small else rng.choice(len(BUCKETS), p=[b[2] for b in BUCKETS])]
    gh, gw = h // 16, w // 16
    s = max(1, 224 / min(h, w))
    _th, _tw = round(h * s / 32) * 32, round(w * s / 32) * 32
    xs, T, has = [], {"vit": [], "s16": [], "s32": []}, {"vit": [], "s16": []}
    for _ in range(B):
        src = "photo" if rng.random() < ph and cached["photo"]["vit"] else "inet"
        n = cached[src]
        i = int(rng.integers(n["vit"])) if src == "photo" or rng.random() < 0.5 else int(rng.integers(n["s32"]))
        S = IMG[src].shape[1]
        y, x0, bh, bw = box(S, S, w / h, rng, 0.25 if src == "inet" else 0.15)
        c = torch.from_numpy(IMG[src][i, y : y + bh, x0 : x0 + bw].copy()).permute(2, 0, 1)[None]
        x = F.interpolate(c, size=(h, w), mode="bicubic", antialias=True)[0]
        flip = rng.random() < 0.5
        for t, d in (("vit", 192), ("s16", 112), ("s32", 256)):
            if i < n[t]:
                m = MAPS[src][t][i]
                g = m.shape[0] / S  # map cells a pixel; averaged over each of the student's cells
                v = roi_align(
                    torch.from_numpy(m.astype(np.float32)).permute(2, 0, 1)[None],
                    torch.tensor([[0, x0 * g, y * g, (x0 + bw) * g, (y + bh) * g]]),
                    (gh, gw),
                    sampling_ratio=2 if t == "vit" else 1,
                    aligned=True,
                )[0]
            else:
                v = torch.zeros(d, gh, gw)
            T[t].append(v.flip(-1) if flip else v)
        has["vit"].append(i < n["vit"])
        has["s16"].append(i < n["s16"])
        xs.append(jitter((x.flip(-1) if flip else x).float(), rng))
    x = (torch.stack(xs) / 255 - IM_MEAN) / IM_STD
    return (
        x,
        {t: torch.stack(v).flatten(2).transpose(1, 2) for t, v in T.items()},
        {k: torch.tensor(v) for k, v in has.items()},
    )


VAR = {k: float(PCA[k]["eig"][: PCA[k]["proj"].shape[1]].sum()) for k in PCA}
POOL = {}


def fit_err(p, t, var):  # per token: cosine distance and error over variance
    return (1 - F.cosine_similarity(p, t, dim=-1)) + (p - t).pow(2).sum(-1) / var


def gram(f, g):
    f, g = F.normalize(f, dim=-1), F.normalize(g, dim=-1)
    return 4 * (f @ f.mT - g @ g.mT).pow(2).mean()


ROPE = RopeAugment(rescale=1.4, shift=0.1, jitter=1.1)


def losses(m, heads, x, T, has, step):
    draws = draw(m.spec, seed=args.seed, step=step, places=range(len(x)), crops=range(1), rope=ROPE)
    with torch.autocast("cpu", torch.bfloat16):
        cls, tok = m.training_features(x, draws=draws)
        pp, pc = heads.patch(tok), heads.cls(cls)
    cls, tok, pp, pc = cls.float(), tok.float(), pp.float(), pc.float()
    L = {}
    h, l = has["vit"], has["s16"]
    if h.any():
        L["vit"] = fit_err(pp[h][..., :192], T["vit"][h], VAR["vit"]).mean()
        L["gram"] = gram(tok[h], T["vit"][h])
    if l.any():
        L["s16"] = fit_err(pp[l][..., 192:304], T["s16"][l], VAR["s16"]).mean()
        L["s32"] = fit_err(pp[l][..., 304:], T["s32"][l], VAR["s32"]).mean()
        pooled = T["s32"][l].mean(1) - POOL["mean"]
        L["cls"] = fit_err(pc[l], pooled, POOL["var"]).mean()
        c = cls[l]
        L["clsgram"] = gram(c - c.mean(0).detach(), pooled)
    return sum(W[k] * v for k, v in L.items()), L


@torch.no_grad()
def fit_heads(m, heads, cached):
    acc = {k: [] for k in ("vit", "s16", "s32", "cls")}
    for i in range(25):
        x, T, has = batch(10**6 + i, cached)
        with torch.autocast("cpu", torch.bfloat16):
            o = m.forward_features(x)
        cls, tok = o["x_norm_clstoken"].float(), o["x_norm_patchtokens"].float()
        h, l = has["vit"], has["s16"]
        acc["vit"].append((tok[h].flatten(0, 1), T["vit"][h].flatten(0, 1)))
        for k in ("s16", "s32"):
            acc[k].append((tok[l].flatten(0, 1), T[k][l].flatten(0, 1)))
        acc["cls"].append((cls[l], T["s32"][l].mean(1)))
    y = torch.cat([b for _, b in acc["cls"]])
    POOL.update(mean=y.mean(0), var=float(y.var(0).sum()))
    ws, bs = {}, {}
    for k, v in acc.items():
        X, Y = torch.cat([a for a, _ in v]), torch.cat([b for _, b in v])
        Y = Y - POOL["mean"] if k == "cls" else Y
        mx, my = X.mean(0), Y.mean(0)
        Xc = X - mx
        G = Xc.T @ Xc / len(X)
        G += (0.02 if k != "cls" else 0.3) * G.diagonal().mean() * torch.eye(192)
        w = torch.linalg.solve(G, Xc.T @ (Y - my) / len(X)).T
        ws[k], bs[k] = w, my - w @ mx
        print(
            "head",
            k,
            len(X),
            "r2",
            round(float(1 - (Y - X @ w.T - bs[k]).pow(2).sum() / (Y - my).pow(2).sum()), 3),
            flush=True,
        )
    heads.cls.weight.copy_(ws["cls"])
    heads.cls.bias.copy_(bs["cls"])
    heads.patch.weight.copy_(torch.cat([ws[k] for k in ("vit", "s16", "s32")]))
    heads.patch.bias.copy_(torch.cat([bs[k] for k in ("vit", "s16", "s32")]))


def main():
    m = dd.create_model("vitt16")
    m.load_state_dict(torch.load(args.init, weights_only=True)) if args.init != "random" else None
    if args.init == "random":
        for b in m.blocks:
            nn.init.constant_(b.ls1.gamma, 1.0)
            nn.init.constant_(b.ls2.gamma, 1.0)
    m.train()
    torch.manual_seed(0)
    heads = Heads()
    ema = {k: v.clone() for k, v in m.state_dict().items()}
    mods = nn.ModuleList([m, heads])
    dec = [p for n, p in mods.named_parameters() if p.ndim >= 2 and "token" not in n]
    nod = [p for n, p in mods.named_parameters() if not (p.ndim >= 2 and "token" not in n)]
    opt = torch.optim.AdamW(
        [{"params": dec, "weight_decay": args.wd}, {"params": nod, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    step, _stable = 0, False
    ck = RUN / ("stable.pt" if args.from_stable else "last.pt")
    seen = 0
    if ck.exists():
        d = torch.load(ck, weights_only=True)
        m.load_state_dict(d["m"])
        heads.load_state_dict(d["h"])
        ema = d["ema"]
        opt.load_state_dict(d["opt"])
        step = d["step"]
        POOL.update(d["pool"])
        seen = d["seen"]
        print("resumed", step)
    hh, mm = map(int, args.until.split(":"))
    end = datetime.datetime.now().replace(hour=hh, minute=mm, second=0).timestamp()
    cached = count_cached()
    print("cached", cached, flush=True)
    if not POOL:
        fit_heads(m, heads, cached)

    def save(name):
        tmp = RUN / (name + ".tmp")
        torch.save(
            {
                "m": m.state_dict(),
                "h": heads.state_dict(),
                "ema": ema,
                "opt": opt.state_dict(),
                "step": step,
                "seen": seen,
                "w": W,
                "pool": POOL,
            },
            tmp,
        )
        os.replace(tmp, RUN / name)

    acc, t0, n0 = {}, time.time(), 0
    log = open(RUN / "log.jsonl", "a")  # noqa: SIM115
    decaying = False
    while step < args.steps:
        left = (end - time.time()) / 60
        if left <= 0:
            break
        if left < args.decay and not decaying:
            decaying = True
            save("stable.pt") if not args.from_stable else None
            print("decay from", step, flush=True)
        lr = args.lr * min(1, step / args.warm + 0.01, max(left / args.decay, 0.0) if args.decay else 1)
        for g in opt.param_groups:
            g["lr"] = lr
        x, T, has = batch(step, cached)
        loss, L = losses(m, heads, x, T, has, step)
        if not torch.isfinite(loss):
            print("non-finite", step)
            step += 1
            continue
        opt.zero_grad()
        loss.backward()
        gn = nn.utils.clip_grad_norm_(mods.parameters(), 3.0)
        opt.step()
        step += 1
        seen += len(x)
        n0 += len(x)
        d = min(0.9985, step / (step + 20))
        with torch.no_grad():
            sd = m.state_dict()
            ks = [k for k in ema if ema[k].is_floating_point()]
            torch._foreach_lerp_([ema[k] for k in ks], [sd[k] for k in ks], 1 - d)
        for k, l in (L | {"loss": loss.detach(), "gn": gn}).items():
            acc.setdefault(k, []).append(float(l.detach()))
        if step % 25 == 0:
            r = {
                "step": step,
                "seen": seen,
                "time": time.strftime("%H:%M:%S"),
                "lr": lr,
                "imgs": round(n0 / (time.time() - t0), 1),
            } | {k: round(float(np.mean(v)), 4) for k, v in acc.items()}
            print(json.dumps(r), flush=True)
            log.write(json.dumps(r) + "\n")
            log.flush()
            acc, t0, n0 = {}, time.time(), 0
        if step % 200 == 0:
            save("last.pt")
            cached = count_cached() if step % 400 == 0 else cached
    save("final.pt")
    print("end", step, cached)


main()
