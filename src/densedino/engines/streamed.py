"""Owns running a ViT that is larger than the memory: blocks are read from disk while the one before them computes.

All images of a batch pass a block before the next one is there, so the weights are read once per batch. Matrices are
bfloat16 (or float32), whatever the file has; the residual stream, norms, RoPE and LayerScale are float32, as in
`EagerEngine`.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from densedino.engines.budget import block_bytes, format_bytes, parse_bytes, plan_stream, resident_bytes
from densedino.engines.eager import LayerTokens
from densedino.errors import InputError
from densedino.models.catalog import ViTSpec, create_model
from densedino.models.layers import Block
from densedino.models.vit import VisionTransformer, block_indices

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Future

    from densedino.engines.budget import StreamPlan
    from densedino.engines.eager import Precision
    from densedino.weights.loading import StoredModel

__all__ = ["DEFAULT_MEMORY", "StreamEngine"]

DEFAULT_MEMORY = "3GB"
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class StreamEngine:
    """Pixels of one size in, tokens of the asked blocks out, with the process within `memory`; no gradients."""

    name = "stream"

    def __init__(
        self, source: StoredModel, *, precision: Precision = "bf16", memory: str | int = DEFAULT_MEMORY
    ) -> None:
        """Read what is not in blocks; memory for blocks is taken when the first batch comes.

        Args:
            source: of `load_stored`.
            precision: of matrix products.
            memory: what the process may have in RAM at its peak: "3GB", "2.5GiB", or bytes.

        Raises:
            InputError: a model that is no ViT, or no size.
        """
        spec = source.model.spec
        if not isinstance(spec, ViTSpec) or not isinstance(source.model, VisionTransformer):
            raise InputError(
                f"engine 'stream' runs ViTs, whose blocks are all alike; {spec.name} is none, and fits in memory. Use "
                "engine='eager'."
            )
        self.model = source.model
        self.device = torch.device("cpu")
        self.precision = precision
        self.memory = parse_bytes(memory)
        self._spec = spec
        self._dtype = _DTYPES[precision]
        self._stored = source.tensors
        self._trunk = create_model(replace(spec, depth=0, pruned=()), in_chans=source.model.in_chans, device="meta")
        self._trunk.to_empty(device="cpu")
        for key, value in self._trunk.state_dict().items():
            self._stored[key].read(value)
        self._buffers: list[Block] = []
        self._holds = [0, 0]
        """Whose shape each buffer has."""
        self._lock = threading.Lock()  # one batch at a time: two would need twice the memory

    def __call__(self, pixels: Tensor, *, layers: Sequence[int] = (-1,), norm: bool = True) -> list[LayerTokens]:
        """Run [B, C, H, W] (H and W multiples of the stride) and return the blocks `layers`, in that order, float32.

        Raises:
            InputError: an input or an index that does not fit the model, or a budget that is too small for it.
            WeightsError: the file changed meanwhile.
        """
        wanted = block_indices(layers, self.model.depth)
        grid = self._trunk.grid_size(pixels)
        with self._lock, torch.no_grad():
            plan = self.plan(pixels, layers=layers)
            self._make_buffers(plan.buffers)
            outputs = self._run(pixels, wanted, plan, norm=norm)
        return [self._typed(outputs[number], grid) for number in wanted]

    def plan(self, pixels: Tensor, *, layers: Sequence[int] = (-1,)) -> StreamPlan:
        """How [B, C, H, W] would go through, given what the process holds now.

        Raises:
            InputError: it does not fit in the budget; the message says the least that does.
        """
        height, width = self._trunk.grid_size(pixels)
        held = len(self._buffers) * block_bytes(self._spec, self._dtype)
        return plan_stream(
            self._spec,
            images=len(pixels),
            tokens=1 + self._spec.num_register_tokens + height * width,
            outputs=len(set(block_indices(layers, self.model.depth))),
            dtype=self._dtype,
            budget=self.memory,
            resident=resident_bytes() - held,
        )

    def _make_buffers(self, number: int) -> None:
        del self._buffers[number:]
        while len(self._buffers) < number:
            self._holds[len(self._buffers)] = 0
            self._buffers.append(self._buffer(self._spec.blocks[0]))

    def _buffer(self, shape: tuple[int, int]) -> Block:
        spec, (heads, hidden) = self._spec, shape
        with torch.device("meta"):
            block = Block(
                spec.embed_dim,
                num_heads=heads,
                head_dim=spec.head_dim,
                hidden_dim=hidden,
                ffn=spec.ffn,
                qkv_bias=spec.qkv_bias,
                norm_eps=spec.norm_eps,
            )
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.to(self._dtype)
        return block.to_empty(device="cpu").eval().requires_grad_(False)

    def _fill(self, place: int, number: int) -> Block:
        shapes = self._spec.blocks
        if shapes[number] != shapes[self._holds[place]]:  # of a pruned model
            self._buffers[place] = self._buffer(shapes[number])
        self._holds[place] = number
        block = self._buffers[place]
        for name, value in block.state_dict().items():
            self._stored[f"blocks.{number}.{name}"].read(value)
        return block

    def _blocks(self, number: int) -> Iterator[Block]:
        """The first `number` blocks in turn, of which the next one is read meanwhile, if there are two buffers."""
        with ThreadPoolExecutor(1, thread_name_prefix="densedino-read") as reader:

            def read(turn: int) -> Future[Block]:
                return reader.submit(self._fill, turn % len(self._buffers), turn)

            coming = read(0)
            for turn in range(number):
                block = coming.result()
                ahead = len(self._buffers) > 1
                if ahead and turn + 1 < number:
                    coming = read(turn + 1)
                yield block
                if not ahead and turn + 1 < number:
                    coming = read(turn + 1)

    def _run(self, pixels: Tensor, wanted: list[int], plan: StreamPlan, *, norm: bool) -> dict[int, Tensor]:
        """Tokens [B, T, D] of the wanted blocks."""
        height, width = self._trunk.grid_size(pixels)
        rope = self._trunk.rope_embed(height, width, self.device)
        tokens = self._trunk._embed(pixels.float(), None)
        outputs = {}
        last = max(wanted)
        for number, block in enumerate(self._blocks(last + 1)):
            _advance(block, tokens, rope, plan)
            if number in wanted:
                out = tokens if number == last else tokens.clone()
                if norm:
                    for image in out:
                        image.copy_(self._trunk.norm(image))
                outputs[number] = out
        return outputs

    def _typed(self, tokens: Tensor, grid: tuple[int, int]) -> LayerTokens:
        first = 1 + self._spec.num_register_tokens
        return LayerTokens(tokens[:, first:].unflatten(1, grid), tokens[:, 0], tokens[:, 1:first])

    def __repr__(self) -> str:
        return f"StreamEngine({self._spec.name}, {self.precision}, within {format_bytes(self.memory)})"


def _advance(block: Block, tokens: Tensor, rope: tuple[Tensor, Tensor], plan: StreamPlan) -> None:
    """Replace tokens [B, T, D] by what the block makes of them, a part at a time."""
    for images in tokens.split(plan.attention_images):
        images.add_(block.ls1(block.attn(block.norm1(images), rope)))
    for some in tokens.flatten(0, 1).split(plan.mlp_tokens):
        some.add_(block.ls2(block.mlp(block.norm2(some))))
