"""Attention of a CUDA step: decode rows and chunks over the paged pool."""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from agentrt.kernels import Geometry
from agentrt.kernels.attention_decode import (
    DecodeRows,
    DecodeWork,
    choose_stages,
    decode_attention,
)
from agentrt.kernels.attention_prefill import PrefillTiles, Prefix, prefill_attention
from agentrt.kernels.attention_prefix import attend_prefix
from agentrt.kernels.cuda_products import Rows
from agentrt.kernels.ordered_decode import OrderedDecodeWork, ordered_decode
from agentrt.kernels.ordered_prefill import ordered_prefill
from agentrt.kernels.rotary import append_heads


@frozen
class Layer:
    """What a layer gives: rows of queries, keys and values, and its pool; `out` is to be filled."""

    qkv: Tensor
    kv: Tensor
    out: Tensor
    geometry: Geometry
    norms: tuple[Tensor, Tensor] | None
    scales: Tensor | None  # [2, kv_heads], of a pool of 8 bits


@frozen(kw_only=True)
class Attention:
    """Decode rows first (their tiles in `starts`), then the chunks that `tiles` describes."""

    rows: Rows
    num_decode: int
    starts: Tensor | None  # [num_decode + 1]
    tiles: Tensor | None  # [programs, 4]
    tile_shape: PrefillTiles | None
    work: DecodeWork
    pdl: bool
    is_long: bool = False  # the decode rows' contexts, see `choose_stages`
    common: Tensor | None = None  # to the decode rows, see DecodeRows
    ordered: OrderedDecodeWork | None = None  # if the sums have one order
    counters: Tensor | None = None  # of tiles that programs share, zero
    prefix_blocks: Tensor | None = None  # of the only chunk: what `attend_prefix` serves
    most_rows: int = 0  # of any chunk
    side: torch.cuda.Stream | None = None  # for chunks beside decode rows

    def attend(
        self,
        qkv: Tensor,
        kv: Tensor,
        geometry: Geometry,
        norms: tuple[Tensor, Tensor] | None,
        scales: Tensor | None = None,
    ) -> Tensor:
        """Of one layer's `qkv` and pool; `scales` [2, kv_heads] if that is 8 bits wide."""
        out = qkv.new_empty(qkv.shape[0], geometry.num_heads * geometry.head_dim)
        if self.ordered is not None:
            assert scales is None, "no kernel in one order reads 8 bits"
            return self._in_order(qkv, kv, out, geometry, norms, self.ordered)
        layer = Layer(qkv, kv, out, geometry, norms, scales)
        if self.tiles is None:
            self._attend_decode(layer)
        elif not self.num_decode:
            self._attend_chunks(layer)
        else:
            self._attend_both(layer)
        return out

    def _attend_both(self, layer: Layer) -> None:
        """Side by side: decode rows read memory, and end one by one, while chunks multiply.

        The few programs of short chunks begin first, the many of others last. 26 decode rows at
        3,500 tokens beside one chunk of 48 (H200): a step of the 1B shape takes 2.01 ms, not 2.24,
        of the 8B shape 8.02, not 8.30; beside one of 400 rows 3.14 and 15.5, not 3.28 and 15.6.
        """
        if self.side is None:
            self._attend_decode(layer)
            self._attend_chunks(layer)
            return
        assert self.tile_shape is not None
        main, is_short = torch.cuda.current_stream(), self.tile_shape.splits > 1
        self.side.wait_stream(main)
        if not is_short:
            self._attend_decode(layer)
        with torch.cuda.stream(self.side):
            self._attend_chunks(layer)
        if is_short:
            self._attend_decode(layer)
        main.wait_stream(self.side)

    def _attend_decode(self, layer: Layer) -> None:
        assert self.starts is not None
        rows, num, geometry = self.rows, self.num_decode, layer.geometry
        decode = DecodeRows(
            rows.slots[:num], rows.positions[:num], self.starts, rows.tables, self.common
        )
        decode_attention(
            layer.qkv[:num],
            layer.kv,
            layer.out[:num],
            decode,
            self.work,
            geometry.cos,
            geometry.sin,
            norms=layer.norms,
            eps=geometry.norm_eps,
            num_stages=choose_stages(geometry.head_dim, num, is_long=self.is_long),
            pdl=self.pdl,
            scales=layer.scales,
        )

    def _attend_chunks(self, layer: Layer) -> None:
        assert self.tiles is not None
        assert self.tile_shape is not None
        rows, num = self.rows, self.num_decode
        qkv, kv, scales = layer.qkv[num:], layer.kv, layer.scales
        packed = self._packed(qkv, layer.geometry)
        append_heads(
            qkv,
            kv,
            rows.tables,
            rows.slots[num:],
            rows.positions[num:],
            layer.geometry,
            layer.norms,
            packed=packed,
            scales=scales,
        )
        prefill_attention(
            qkv,
            kv,
            layer.out[num:],
            rows.tables,
            self.tiles,
            self.tile_shape,
            self._prefix(packed, len(qkv), kv, scales),
            self.counters,
            scales,
        )

    def append(
        self,
        qkv: Tensor,
        kv: Tensor,
        geometry: Geometry,
        norms: tuple[Tensor, Tensor] | None,
        scales: Tensor | None = None,
    ) -> None:
        """Turn the queries of all rows in place, and write their keys and values into the pool."""
        rows = self.rows
        append_heads(
            qkv,
            kv,
            rows.tables,
            rows.slots,
            rows.positions,
            geometry,
            norms,
            starts=self.starts,
            scales=scales,
            is_exact=self.ordered is not None,
            pdl=self.pdl,
        )

    def _in_order(
        self,
        qkv: Tensor,
        kv: Tensor,
        out: Tensor,
        geometry: Geometry,
        norms: tuple[Tensor, Tensor] | None,
        work: OrderedDecodeWork,
    ) -> Tensor:
        rows, num = self.rows, self.num_decode
        self.append(qkv, kv, geometry, norms)
        if num:
            assert self.starts is not None
            decode = DecodeRows(rows.slots[:num], rows.positions[:num], self.starts, rows.tables)
            ordered_decode(qkv[:num], kv, out[:num], decode, work, pdl=self.pdl)
        if self.tiles is not None:
            assert self.tile_shape is not None
            ordered_prefill(qkv[num:], kv, out[num:], rows.tables, self.tiles, self.tile_shape)
        return out

    def _packed(self, qkv: Tensor, geometry: Geometry) -> Tensor | None:
        """Where the queries go for `attend_prefix`."""
        if self.prefix_blocks is None:
            return None
        group = geometry.num_heads // geometry.num_kv_heads
        rows = max(len(qkv), self.most_rows)
        return qkv.new_empty(geometry.num_kv_heads, rows, group, geometry.head_dim)

    def _prefix(
        self, packed: Tensor | None, num_rows: int, kv: Tensor, scales: Tensor | None
    ) -> Prefix | None:
        if packed is None or self.prefix_blocks is None:
            return None
        return attend_prefix(packed, num_rows, kv, self.prefix_blocks, scales)
