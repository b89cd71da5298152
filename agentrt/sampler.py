"""Logits and options to token ids. What a row draws depends on its own request alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from agentrt.errors import RequestInvalid
from agentrt.types import GenerateOptions, TokenLogprob

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agentrt.grammar import MaskRow
    from agentrt.request import Request

NEVER = float("-inf")
# Below it a draw is greedy in float32 anyway, and the division would overflow.
MIN_TEMPERATURE = 1e-5
# [256, 8]: by a byte of a mask, what is added to the logits of its eight tokens.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_SCORES = np.where(_BITS, 0, -np.inf).astype(np.float32)

Sampled = tuple[int, TokenLogprob | None] | RequestInvalid
# Logits, or the token that they give already, or None where a grammar forces the draft's token.
Row = Tensor | int | None


@torch.inference_mode()
def sample(
    logits: Tensor,
    requests: Sequence[Request],
    num_drafts: Sequence[int] | None = None,
    masks: Sequence[MaskRow | None] | None = None,
) -> list[list[Sampled]]:
    """Each request's next tokens, with log-probabilities where it asks for them; or the error that
    ends this request alone. A grammar moves on with them.

    logits: [rows, vocab] (changed in place): a row for each request, and behind it one for each
    token of its draft, which stands behind its known tokens; but none where the request's
    `num_unread` says so. A row gives a token if all before it gave what the draft says. masks: of
    each row, with those that are left out, what the grammar allows, where that was found out
    already.

    Log-probabilities are those of the distribution after penalties, bias and grammar, before
    temperature and the top-k, top-p and min-p filters.
    """
    runs = _runs(requests, num_drafts or [0] * len(requests), masks)
    is_greedy = all(map(_is_greedy, requests))
    left: Iterator[Row] = iter(_greedy(logits, runs) if is_greedy else logits)
    return [_draw_run(run, [*islice(left, run.num_read)]) for run in runs]


@frozen
class _Run:
    """A request's consecutive rows: one, and one for each token of its draft."""

    request: Request
    num_unread: int
    masks: Sequence[MaskRow | None]

    @property
    def num_read(self) -> int:
        return len(self.masks) - self.num_unread


def _runs(
    requests: Sequence[Request],
    num_drafts: Sequence[int],
    masks: Sequence[MaskRow | None] | None,
) -> list[_Run]:
    each = iter(masks or [None] * (len(requests) + sum(num_drafts)))
    return [
        _Run(request, request.num_unread(num), [*islice(each, 1 + num)])
        for request, num in zip(requests, num_drafts, strict=True)
    ]


def _greedy(logits: Tensor, runs: Sequence[_Run]) -> list[Row]:
    """Of rows whose tokens are the likeliest that their masks allow: these, all at once, since on a
    device a row's own kernels and waits take longer than a step. A row stays as it is where its
    mask is not known yet, or no token is finite."""
    masks = [mask for run in runs for mask in run.masks[run.num_unread :]]
    owners = [run.request for run in runs for _ in range(run.num_read)]
    forbid_all(logits, masks)
    tokens = torch.as_tensor(_argmax(logits))
    best = logits.gather(1, tokens[:, None])[:, 0].tolist()
    return [
        token if math.isfinite(value) and (mask is not None or owner.constraint is None) else row
        for token, value, mask, owner, row in zip(
            tokens.tolist(), best, masks, owners, logits, strict=True
        )
    ]


def _draw_run(run: _Run, read: Sequence[Row]) -> list[Sampled]:
    """Tokens of a request's rows, while the draft is right."""
    request, rows = run.request, [*[None] * run.num_unread, *read]
    drawn: list[Sampled] = []
    for index, (row, mask) in enumerate(zip(rows, run.masks, strict=True)):
        one = _try_row(row, request, index, mask)
        drawn.append(one)
        if isinstance(one, RequestInvalid) or index + 1 == len(rows):
            break
        if one[0] != request.tokens[request.num_tokens + index]:
            break
        if request.constraint is not None and request.constraint.is_finished:
            break  # a request without drafts would end here: the next row gives its end-of-turn
    return drawn


def is_plain(request: Request) -> bool:
    """Whether the token is just the row's argmax."""
    return request.constraint is None and _is_greedy(request)


def _is_greedy(request: Request) -> bool:
    """Whether it is the argmax of what a grammar allows, if there is one."""
    return request.options.temperature == 0 and _takes_logits_as_they_are(request.options)


def is_drawn_on_device(request: Request) -> bool:
    """Whether a device can draw the token by itself: the argmax, or softmax at a temperature."""
    options = request.options
    return (
        request.constraint is None
        and _takes_logits_as_they_are(options)
        and (options.temperature == 0 or not has_filters(options))
    )


def _takes_logits_as_they_are(options: GenerateOptions) -> bool:
    """Whether nothing is added to them, and nobody wants to see them."""
    return options.top_logprobs is None and not options.logit_bias and not has_penalties(options)


def has_filters(options: GenerateOptions) -> bool:
    return options.top_k > 0 or options.top_p < 1 or options.min_p > 0


def draw_seed(request: Request, position: int) -> int:
    """The seed of one draw on the device, as int32: of the request's own seed and the position,
    so that a draw depends on nothing else."""
    if request.rng is None:
        seed = request.options.seed
        request.rng = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    mixed = np.random.SeedSequence([request.rng, position]).generate_state(1, np.uint32)
    return int(mixed.view(np.int32)[0])


def has_penalties(options: GenerateOptions) -> bool:
    return (
        options.repetition_penalty != 1
        or options.presence_penalty != 0
        or options.frequency_penalty != 0
    )


def _argmax(logits: Tensor) -> Any:
    """Of each row. On a CPU numpy's: 3 us a row of 49,152, where torch takes 42."""
    return logits.numpy().argmax(-1) if logits.device.type == "cpu" else logits.argmax(-1)


def _try_row(row: Row, request: Request, num_ahead: int, mask: MaskRow | None) -> Sampled:
    try:
        if row is None:
            return _take_forced(request, num_ahead), None
        if isinstance(row, int):
            return row if request.constraint is None else request.constraint.take(row), None
        return _sample_row(row, request, num_ahead, mask)
    except RequestInvalid as exc:  # a grammar's error is one too
        return exc


def _sample_row(
    row: Tensor, request: Request, num_ahead: int, mask: MaskRow | None
) -> tuple[int, TokenLogprob | None]:
    """`num_ahead` tokens of the request's draft count as known."""
    options = request.options
    if has_penalties(options):
        _penalise(row, request, num_ahead)
    for token, bias in options.logit_bias.items():
        row[token] += bias
    if request.constraint is not None:
        forbid(row, request.constraint.mask() if mask is None else mask)
    token = int(_argmax(row))
    if not math.isfinite(float(row[token])):
        raise RequestInvalid(
            "no token can be sampled: logit_bias, penalties and grammar leave none that is finite"
        )
    if options.temperature > 0:
        token = _draw(row, request)
    if request.constraint is not None:
        token = request.constraint.take(token)
    if options.top_logprobs is None:
        return token, None
    return token, _logprob(row, token, options.top_logprobs)


def _take_forced(request: Request, num_ahead: int) -> int:
    """The token that the draft has here, or the one that ends the text in time. A draw is used up
    as if it had been drawn: what comes later must not depend on drafts."""
    assert request.constraint is not None
    if request.options.temperature > 0:
        _next_point(request)
    return request.constraint.take(int(request.tokens[request.num_tokens + num_ahead]))


def _penalise(row: Tensor, request: Request, num_ahead: int) -> None:
    """Repetition (Keskar et al. 2019) over prompt and output; presence and frequency (OpenAI's
    API) over the output."""
    options, known = request.options, request.tokens[: len(request.known) + num_ahead]
    if options.repetition_penalty != 1:
        seen = torch.from_numpy(np.unique(known).astype(np.int64)).to(row.device)
        scores, penalty = row[seen], options.repetition_penalty
        row[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
    if options.presence_penalty != 0 or options.frequency_penalty != 0:
        output = known[request.num_prompt_tokens :]
        tokens, counts = np.unique(output, return_counts=True)
        where = torch.from_numpy(tokens.astype(np.int64)).to(row.device)
        times = torch.from_numpy(counts).to(row.device, row.dtype)
        row[where] -= options.presence_penalty + options.frequency_penalty * times


def forbid(row: Tensor, mask: MaskRow) -> None:
    """Set the logits of what a grammar does not allow to -inf, and of what its mask is too short
    for. On another device the mask is unpacked there."""
    if row.device.type != "cpu":
        forbid_together(row[None], [0], mask[None])
        return
    num_tokens = min(32 * len(mask), row.shape[0])
    # 13 us a row of 49,152 tokens; unpacked bits and masked_fill take 52.
    scores = _SCORES.take(mask.view(np.uint8), axis=0).reshape(-1)
    row.numpy()[:num_tokens] += scores[:num_tokens]
    row[num_tokens:] = NEVER


def forbid_all(logits: Tensor, masks: Sequence[MaskRow | None]) -> None:
    """The same for rows [rows, vocab]; None forbids nothing. On another device all masks go up
    together, and are unpacked by the same few kernels as one."""
    known = {row: mask for row, mask in enumerate(masks) if mask is not None}
    if logits.device.type == "cpu":
        for row, mask in known.items():
            forbid(logits[row], mask)
    elif known:
        forbid_together(logits, [*known], np.stack([*known.values()]))


def forbid_together(logits: Tensor, rows: list[int], masks: NDArray[np.int32]) -> None:
    """`forbid` of some rows; masks: [those rows, words]."""
    where = torch.tensor(rows, device=logits.device)
    there, num_tokens = logits[where], min(32 * masks.shape[1], logits.shape[1])
    there[:, :num_tokens].masked_fill_(forbidden_there(masks, logits.device)[:, :num_tokens], NEVER)
    there[:, num_tokens:] = NEVER
    logits[where] = there


def forbidden_there(masks: NDArray[np.int32], device: torch.device) -> Tensor:
    """The zeros of masks [..., words] as bool [..., 32 * words], unpacked on the device: an eighth
    of a byte a token goes up."""
    words = torch.from_numpy(masks).to(device)
    bits = words[..., None] >> torch.arange(32, device=device) & 1
    return bits.flatten(-2) == 0


def filter_logits(scores: Tensor, options: GenerateOptions) -> Tensor:
    """Apply top-k, top-p (Holtzman et al. 2020) and min-p (Nguyen et al. 2024) to one row that
    temperature has scaled: tokens that are out get -inf. At least one token stays."""
    if 0 < options.top_k < scores.shape[0]:
        smallest = scores.topk(options.top_k).values[-1]
        scores = scores.masked_fill(scores < smallest, NEVER)
    if options.min_p > 0:
        probabilities = scores.softmax(-1)
        scores = scores.masked_fill(probabilities < options.min_p * probabilities.max(), NEVER)
    if options.top_p < 1:
        ordered, order = scores.softmax(-1).sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        gone = before >= options.top_p
        gone[0] = False  # a tiny top_p is 0 in float32
        scores = scores.index_fill(0, order[gone], NEVER)
    return scores


def _draw(row: Tensor, request: Request) -> int:
    temperature = max(request.options.temperature, MIN_TEMPERATURE)
    scores = filter_logits((row - row.max()) / temperature, request.options)
    # torch.multinomial draws a number a token: 1,000 us a row of 49,152; this takes 60. In float64
    # the sums are exact enough; a place below the last sum is a token of a share above 0.
    sums = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = float(sums[-1])
    place = min(_next_point(request) * total, math.nextafter(total, 0.0))
    return int(torch.searchsorted(sums, place, right=True))


def _next_point(request: Request) -> float:
    """Of the request's own sequence, in [0, 1)."""
    if request.rng is None:
        request.rng = torch.Generator()
        seed = request.options.seed
        request.rng.seed() if seed is None else request.rng.manual_seed(seed)
    return float(torch.rand((), generator=request.rng, dtype=torch.float64))


def _logprob(row: Tensor, token: int, num_top: int) -> TokenLogprob:
    logprobs = row.log_softmax(-1)
    values, tokens = logprobs.topk(num_top)
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)
