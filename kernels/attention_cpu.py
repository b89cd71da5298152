"""Paged causal attention on a CPU: flash calls over runs of KV blocks, merged by log-sum-exp.

Each KV block is one tile at an absolute position. A row's result is the sum over its tiles, in
ascending order, of `exp(lse_tile - max) * out_tile`, divided by the sum of those weights (the split
softmax of Flash-Decoding). Tiles never depend on the batch, on where a prefill chunk began, or on
which rows are beside a row, so neither do the bits of its result. These facts of torch's flash
kernel and the sgemm below it carry that; `test_attention_cpu.py` checks them:
- a product's rows have the same bits for any number of rows >= 4: so rows are padded to fours;
- keys hidden by a mask add an exact 0 if the tile's length is a multiple of 16: so a partly
  filled tile is read up to the next multiple of 16 and masked;
- batching tiles of equal shape in one call leaves each one's bits alone;
- `Tensor.sum` has an order that depends on the shape: so tiles are added one by one.
"""

from __future__ import annotations

from operator import attrgetter

import torch
from attrs import frozen
from torch import Tensor

from agentrt.kernels import Segment

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
MIN_ROWS = 4
KEY_MULTIPLE = 16


def padding(num_rows: int) -> int:
    """How many rows to add so that their number is a multiple of MIN_ROWS."""
    return -num_rows % MIN_ROWS


@frozen
class Tile:
    """Rows of a segment against consecutive blocks, of which `num_keys` keys each are read.

    Only a single block has a mask: where several are read, every row sees every key.
    """

    index: int  # of the first block within the context
    num_tiles: int
    first_row: int  # within the segment: earlier rows see nothing of these blocks
    keys: tuple[Tensor, ...]  # a layer: [tiles, kv_heads, num_keys, dim], a view of the pool
    values: tuple[Tensor, ...]
    mask: Tensor | None  # [rows padded to fours, num_keys], 0 or -inf


@frozen
class SharedTile:
    """Blocks that every one of some decode rows reads in full."""

    rows: tuple[int, ...]
    tile: Tile


@frozen
class SegmentPlan:
    """One segment's rows, the tiles that they read, and where their own keys go.

    The full tiles of decode rows are in `CpuPlan.shared` instead.
    """

    rows: slice
    num_tiles: int
    tiles: tuple[Tile, ...]
    targets: tuple[tuple[slice, tuple[Tensor, ...]], ...]  # rows; a layer: [2, kv_heads, rows, dim]


@frozen
class CpuPlan:
    """See `agentrt.kernels.plain.AttentionPlan`.

    Decode rows (segments of one row) come first in the batch and are merged together.

    `outs` and `lses` are scratch of the decode rows, used anew by every layer: a row writes the
    same tiles each time, and what it never writes keeps lse -inf. `outs[..., dim]` is 1, so that
    one sum gives both the weighted values and the sum of the weights.
    """

    decode: tuple[SegmentPlan, ...]
    shared: tuple[SharedTile, ...]
    chunks: tuple[SegmentPlan, ...]
    queries: Tensor  # scratch [decode rows, kv_heads, groups padded to MIN_ROWS, dim]
    outs: Tensor  # scratch [tiles, decode rows, kv_heads, padded groups, dim + 1]
    lses: Tensor  # scratch [tiles, decode rows, kv_heads, padded groups]
    groups: int

    def append_kv(self, layer: int, key_value: Tensor) -> None:
        by_head = key_value.permute(1, 2, 0, 3)
        for segment in (*self.decode, *self.chunks):
            for rows, places in segment.targets:
                places[layer].copy_(by_head[:, :, rows])

    def attend(self, layer: int, query: Tensor) -> Tensor:
        num_decode = len(self.decode)
        if not self.chunks:
            return _attend_decode(self, layer, query)
        out = query.new_empty(query.shape)
        if num_decode:
            out[:num_decode] = _attend_decode(self, layer, query[:num_decode])
        for chunk in self.chunks:
            out[chunk.rows] = _attend_chunk(chunk, layer, query[chunk.rows], self.groups)
        return out


def plan_attention(segments: tuple[Segment, ...], kv: Tensor, num_heads: int) -> CpuPlan:
    """Split each segment's context into tiles of kv [layers, 2, blocks, kv_heads, tokens, dim]."""
    singles = [segment for segment in segments if segment.num_rows == 1]
    if [segment.first_row for segment in singles] != list(range(len(singles))):
        raise ValueError("segments of one row must come first")
    decode = tuple(_plan_segment(segment, kv, _num_full(segment, kv)) for segment in singles)
    chunks = [segment for segment in segments if segment.num_rows > 1]
    kv_heads, dim = kv.shape[3], kv.shape[5]
    groups = num_heads // kv_heads
    shape = (len(decode), kv_heads, max(groups, MIN_ROWS))
    num_tiles = max(map(attrgetter("num_tiles"), decode), default=0)
    outs = kv.new_zeros(num_tiles, *shape, dim + 1)
    outs[..., dim] = 1
    return CpuPlan(
        decode=decode,
        shared=_shared_tiles(singles, kv),
        chunks=tuple(_plan_segment(segment, kv, 0) for segment in chunks),
        queries=kv.new_zeros(*shape, dim),
        outs=outs,
        lses=kv.new_full((num_tiles, *shape), float("-inf"), dtype=torch.float32),
        groups=groups,
    )


def _num_full(segment: Segment, kv: Tensor) -> int:
    """How many leading blocks every row of the segment sees in full."""
    return (segment.start_position + 1) // kv.shape[4]


def _plan_segment(segment: Segment, kv: Tensor, first_block: int) -> SegmentPlan:
    """Plan the tiles from the context's `first_block`-th block on."""
    end = segment.start_position + segment.num_rows
    num_full = _num_full(segment, kv)
    num_tiles = -(-end // kv.shape[4])
    pairs = list(enumerate(segment.block_ids))
    tiles = [
        _tile(kv, index, block, length, kv.shape[4], 0, None)
        for index, block, length in _runs(pairs[first_block:num_full])
    ]
    tiles += [_masked_tile(segment, index, kv) for index in range(num_full, num_tiles)]
    rows = slice(segment.first_row, segment.first_row + segment.num_rows)
    return SegmentPlan(rows, num_tiles, tuple(tiles), _targets(segment, kv))


def _shared_tiles(segments: list[Segment], kv: Tensor) -> tuple[SharedTile, ...]:
    """Each full block that decode rows read, once for all rows that read it: agents with one
    system prompt read its keys and values from memory once a step."""
    readers: dict[tuple[int, int], list[int]] = {}
    for row, segment in enumerate(segments):
        for pair in enumerate(segment.block_ids[: _num_full(segment, kv)]):
            readers.setdefault(pair, []).append(row)
    by_rows: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for pair, rows in readers.items():
        by_rows.setdefault(tuple(rows), []).append(pair)
    return tuple(
        SharedTile(rows, _tile(kv, index, block, length, kv.shape[4], 0, None))
        for rows, pairs in by_rows.items()
        for index, block, length in _runs(pairs)
    )


def _runs(pairs: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(index, block, length) of the runs in which index and block id grow together by one.

    `pairs` are (index within the context, block id), in order of index.
    """
    runs: list[tuple[int, int, int]] = []
    for index, block in pairs:
        if runs:
            first_index, first_block, length = runs[-1]
            if (index - first_index, block - first_block) == (length, length):
                runs[-1] = (first_index, first_block, length + 1)
                continue
        runs.append((index, block, 1))
    return runs


def _tile(
    kv: Tensor, index: int, block: int, length: int, num_keys: int, row: int, mask: Tensor | None
) -> Tile:
    blocks = kv[:, :, block : block + length, :, :num_keys]
    return Tile(index, length, row, blocks[:, 0].unbind(0), blocks[:, 1].unbind(0), mask)


def _masked_tile(segment: Segment, index: int, kv: Tensor) -> Tile:
    block_tokens = kv.shape[4]
    begin = index * block_tokens
    end = segment.start_position + segment.num_rows
    first_row = max(begin - segment.start_position, 0)
    seen = min(end - begin, block_tokens)
    num_keys = min(-(-seen // KEY_MULTIPLE) * KEY_MULTIPLE, block_tokens)
    num_rows = segment.num_rows - first_row
    first_key = segment.start_position + first_row - begin
    last_key = torch.arange(first_key, first_key + num_rows + padding(num_rows))
    hidden = torch.arange(num_keys)[None, :] > last_key.clamp(max=seen - 1)[:, None]
    mask = torch.zeros(hidden.shape, dtype=kv.dtype).masked_fill_(hidden, float("-inf"))
    return _tile(kv, index, segment.block_ids[index], 1, num_keys, first_row, mask)


def _targets(segment: Segment, kv: Tensor) -> tuple[tuple[slice, tuple[Tensor, ...]], ...]:
    """The places of the segment's own keys and values, one a block that it reaches into."""
    block_tokens = kv.shape[4]
    targets = []
    position, end = segment.start_position, segment.start_position + segment.num_rows
    while position < end:
        index, offset = divmod(position, block_tokens)
        num = min(block_tokens - offset, end - position)
        row = segment.first_row + position - segment.start_position
        place = kv[:, :, segment.block_ids[index], :, offset : offset + num]
        targets.append((slice(row, row + num), place.unbind(0)))
        position += num
    return tuple(targets)


def _attend_decode(plan: CpuPlan, layer: int, query: Tensor) -> Tensor:
    """One row a request: the query heads of a KV head are the rows of its products."""
    num_rows, heads, dim = query.shape
    padded, outs, lses, groups = plan.queries, plan.outs, plan.lses, plan.groups
    padded[:, :, :groups] = query.view(num_rows, -1, groups, dim)
    width = padded.shape[2]
    for row, segment in enumerate(plan.decode):
        for tile in segment.tiles:
            mask = None if tile.mask is None else tile.mask[:1].expand(width, -1)
            out, lse = _flash_tile(tile, layer, padded[row : row + 1], mask)
            outs[tile.index : tile.index + 1, row, :, :, :dim] = out
            lses[tile.index : tile.index + 1, row] = lse
    for shared in plan.shared:
        tile, rows = shared.tile, list(shared.rows)
        # [1, kv_heads, rows * width, dim]: the rows' queries side by side
        together = padded[rows].transpose(0, 1).flatten(1, 2).unsqueeze(0)
        out, lse = _flash_tile(tile, layer, together, None)
        into = slice(tile.index, tile.index + tile.num_tiles)
        shape = (tile.num_tiles, padded.shape[1], len(rows), width)
        outs[into, rows, :, :, :dim] = out.view(*shape, dim).transpose(1, 2)
        lses[into, rows] = lse.view(shape).transpose(1, 2)
    return _merge_decode(outs, lses, groups).view(num_rows, heads, dim)


def _flash_tile(tile: Tile, layer: int, rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """rows [1, kv_heads, rows, dim] -> out [tiles, kv_heads, rows, dim], lse [tiles, ...]."""
    rows = rows.expand(tile.num_tiles, -1, -1, -1)
    out, lse = _flash(rows, tile.keys[layer], tile.values[layer], 0.0, False, attn_mask=mask)
    return out, lse


def _merge_decode(outs: Tensor, lses: Tensor, groups: int) -> Tensor:
    """outs [tiles, rows, kv_heads, padded groups, dim + 1] -> [rows, kv_heads, groups, dim]."""
    weights = torch.exp(lses - lses.amax(0))
    total, *others = (outs * weights.unsqueeze(-1)).unbind(0)
    for other in others:
        total.add_(other)
    total = total[:, :, :groups]
    merged: Tensor = total[..., :-1] / total[..., -1:]
    return merged


def _attend_chunk(plan: SegmentPlan, layer: int, query: Tensor, groups: int) -> Tensor:
    """Many rows of one request: KV heads are the flash batch, their query heads its heads."""
    num_rows, heads, dim = query.shape
    padded = query.new_zeros(num_rows + MIN_ROWS - 1, heads, dim)  # room from any first row on
    padded[:num_rows] = query
    grouped = padded.view(len(padded), -1, groups, dim).permute(1, 2, 0, 3)
    parts = []
    lses = query.new_full((plan.num_tiles, *grouped.shape[:3]), float("-inf"), dtype=torch.float32)
    for tile in plan.tiles:
        seeing = num_rows - tile.first_row
        rows = slice(tile.first_row, tile.first_row + seeing + padding(seeing))
        pairs = zip(tile.keys[layer], tile.values[layer], strict=True)
        for index, (key, value) in enumerate(pairs, tile.index):
            shared_key = key[:, None].expand(-1, groups, -1, -1)
            shared_value = value[:, None].expand(-1, groups, -1, -1)
            out, lses[index, :, :, rows] = _flash(
                grouped[:, :, rows], shared_key, shared_value, 0.0, False, attn_mask=tile.mask
            )
            parts.append((rows, out))
    return _merge_chunk(parts, lses, num_rows).reshape(num_rows, heads, dim)


def _merge_chunk(parts: list[tuple[slice, Tensor]], lses: Tensor, num_rows: int) -> Tensor:
    """Add the tiles' outputs in ascending order; the sums are the decode rows' sums."""
    lses = lses[..., :num_rows].permute(0, 3, 1, 2)  # [tiles, rows, kv_heads, groups]
    weights = torch.exp(lses - lses.amax(0)).unsqueeze(-1)
    total: Tensor | None = None
    for (rows, out), weight in zip(parts, weights, strict=True):
        kept = slice(rows.start, min(rows.stop, num_rows))
        part = out.permute(2, 0, 1, 3)[: kept.stop - kept.start] * weight[kept]
        if total is None:
            total, divisor = part, weight.clone()
        else:
            total[kept] += part
            divisor[kept] += weight[kept]
    assert total is not None
    merged: Tensor = total / divisor
    return merged
