"""A step's work as rows, on the host: what each row reads, which rows give a token, and how those
are drawn; and back, from the rows' tokens to each request's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from agentrt.decode_works import DecodeWorks
from agentrt.sampler import MIN_TEMPERATURE, Sampled, draw_seed, is_drawn_on_device, sample
from agentrt.scheduler import Work

if TYPE_CHECKING:
    from torch import Tensor

    from agentrt.grammar import MaskRow
    from agentrt.kernels.cuda import Chunk
    from agentrt.request import Request

Array = NDArray[np.int32]


@frozen(kw_only=True)
class MixedWork:
    """What a mixed step computes, in the host's memory; `agentrt.kernels.cuda` has the meanings."""

    decode: tuple[Array, Array, Array]  # token ids, slots and positions of the decode rows
    prefill: tuple[Array, Array, Array]  # of the chunks' rows
    starts: Array  # [decode rows + 1], of the tiles that are a row's own
    common: Array  # [2]: see `kernels.attention_decode.DecodeRows`
    chunks: list[Chunk]
    outputs: tuple[Array, Array, Array, Array]  # rows, slots, seeds, temperatures (as int32)

    @classmethod
    def nothing(cls) -> MixedWork:
        """No work at all: every row idle."""
        none = np.zeros(0, dtype=np.int32)
        rows, outputs = (none, none, none), (none, none, none, none)
        starts, common = np.zeros(1, dtype=np.int32), np.zeros(2, dtype=np.int32)
        return cls(
            decode=rows, prefill=rows, starts=starts, common=common, chunks=[], outputs=outputs
        )

    @classmethod
    def of_chunk(cls, position: int, num_rows: int, slot: int) -> MixedWork:
        """Rows of token 0 from `position` on, of which the last gives a token."""
        zero, rows = np.zeros(1, dtype=np.int32), np.arange(num_rows, dtype=np.int32)
        return evolve(
            cls.nothing(),
            prefill=(0 * rows, 0 * rows + slot, rows + position),
            chunks=[(0, position, num_rows, slot)],
            outputs=(rows[-1:], zero + slot, zero, zero),
        )


def mixed_work(
    works: Sequence[Work], decode: DecodeWorks, slots: Sequence[int], *, most_checked_rows: int = 0
) -> MixedWork:
    """Flatten works, those of one token first, which are decode rows: `decode` is about them.

    But where there are drafts and at most `most_checked_rows` rows in all, each work is a chunk: a
    graph without decode rows is smaller, and attention to a few rows reads a context once.
    """
    counts = [work.num_tokens for work in works]
    if any(work.num_draft for work in works) and sum(counts) <= most_checked_rows:
        decode = DecodeWorks.of((), 1)
    num_decode = len(decode.works)
    ends = np.cumsum(counts)
    by_work = np.array(slots, dtype=np.int32)
    arrays = (
        np.concatenate([w.request.tokens[w.start : w.start + w.num_tokens] for w in works]),
        np.repeat(by_work, counts),
        np.concatenate([np.arange(w.start, w.start + w.num_tokens) for w in works]),
    )
    rows = [np.split(a.astype(np.int32), [num_decode]) for a in arrays]
    of_decode, of_chunks = zip(*rows, strict=True)
    placed = list(zip(works, ends.tolist(), slots, strict=True))
    return MixedWork(
        decode=of_decode,
        prefill=of_chunks,
        starts=decode.starts,
        common=np.array([decode.num_common, decode.common_tiles], dtype=np.int32),
        chunks=[
            (end - work.num_tokens - num_decode, work.start, work.num_tokens, slot)
            for work, end, slot in placed[num_decode:]
        ],
        outputs=_outputs(placed),
    )


def _outputs(placed: Sequence[tuple[Work, int, int]]) -> tuple[Array, Array, Array, Array]:
    """Rows that give a token, of works that end before a row and have a slot: the last one of each
    that samples, and those before it that check its draft."""
    sampling = [one for one in placed if one[0].samples]
    rows = [row for work, end, _ in sampling for row in range(end - 1 - work.num_draft, end)]
    slots = [slot for work, _, slot in sampling for _ in range(1 + work.num_draft)]
    seeds, temperatures = draws([work for work, _, _ in sampling])
    return (
        np.array(rows, dtype=np.int32),
        np.array(slots, dtype=np.int32),
        seeds,
        temperatures.view(np.int32),
    )


def draws(works: Sequence[Work]) -> tuple[Array, NDArray[np.float32]]:
    """Seeds and temperatures of the rows that give a token, one after the other; 0 degrees for what
    the device does not draw. A seed is that of the token's position, whatever row gives it."""
    num_rows = sum(1 + work.num_draft for work in works)
    seeds = np.zeros(num_rows, dtype=np.int32)
    temperatures = np.zeros(num_rows, dtype=np.float32)
    row = 0
    for work in works:
        request: Request = work.request
        after = row + 1 + work.num_draft
        if request.options.temperature > 0 and is_drawn_on_device(request):
            seeds[row:after] = [
                draw_seed(request, work.num_known + ahead) for ahead in range(1 + work.num_draft)
            ]
            temperatures[row:after] = max(request.options.temperature, MIN_TEMPERATURE)
        row = after
    return seeds, temperatures


def right_run(tokens: Sequence[int], request: Request) -> list[int]:
    """Of the tokens that a request's row and those behind it gave, for the draft behind its tokens:
    each one up to the first that is not the draft's."""
    draft = request.tokens[request.num_tokens : request.num_tokens + len(tokens) - 1]
    wrong = np.flatnonzero(draft != tokens[:-1])
    return list(tokens[: int(wrong[0]) + 1] if len(wrong) else tokens)


def sampled_runs(
    works: Sequence[Work],
    tokens: Sequence[int],
    logits: Tensor,
    masks: Sequence[MaskRow | None] | None,
) -> list[list[Sampled]]:
    """Each work's tokens: those that the device drew, or where it cannot, those that its logits
    give, of all such works at once. tokens, logits and masks: of each row."""
    ends = np.cumsum([1 + work.num_draft for work in works], dtype=int).tolist()
    pieces = [
        (work, slice(end - 1 - work.num_draft, end)) for work, end in zip(works, ends, strict=True)
    ]
    others = [piece for piece in pieces if not is_drawn_on_device(piece[0].request)]
    found = iter(_sampled_here(others, logits, masks) if others else ())
    return [
        [(token, None) for token in right_run(tokens[rows], work.request)]
        if is_drawn_on_device(work.request)
        else next(found)
        for work, rows in pieces
    ]


def _sampled_here(
    works: list[tuple[Work, slice]], logits: Tensor, masks: Sequence[MaskRow | None] | None
) -> list[list[Sampled]]:
    read = [
        row
        for work, rows in works
        for row in range(rows.start + work.request.num_unread(work.num_draft), rows.stop)
    ]
    own = None if masks is None else [mask for _, rows in works for mask in masks[rows]]
    requests, num_drafts = zip(*((work.request, work.num_draft) for work, _ in works), strict=True)
    return sample(logits[read], requests, num_drafts, own)
