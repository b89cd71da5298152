"""Attention of a CUDA step: decode rows and chunks over the paged pool."""

from __future__ import annotations

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
        rows, num = self.rows, self.num_decode
        if num:
            assert self.starts is not None
            decode = DecodeRows(
                rows.slots[:num], rows.positions[:num], self.starts, rows.tables, self.common
            )
            decode_attention(
                qkv[:num],
                kv,
                out[:num],
                decode,
                self.work,
                geometry.cos,
                geometry.sin,
                norms=norms,
                eps=geometry.norm_eps,
                num_stages=choose_stages(geometry.head_dim, num, is_long=self.is_long),
                pdl=self.pdl,
                scales=scales,
            )
        if self.tiles is not None:
            assert self.tile_shape is not None
            slots, positions = rows.slots[num:], rows.positions[num:]
            packed = self._packed(qkv[num:], geometry)
            append_heads(
                qkv[num:],
                kv,
                rows.tables,
                slots,
                positions,
                geometry,
                norms,
                packed=packed,
                scales=scales,
            )
            prefill_attention(
                qkv[num:],
                kv,
                out[num:],
                rows.tables,
                self.tiles,
                self.tile_shape,
                self._prefix(packed, len(qkv) - num, kv, scales),
                self.counters,
                scales,
            )
        return out

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
