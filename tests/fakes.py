"""Fakes for the borders of an engine: a device that remembers, a gate before it, a clock."""

import asyncio
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
import xxhash
from attrs import define, field
from tokenizers import decoders, models, pre_tokenizers

from agentrt import Engine, EngineConfig, GenerateOptions
from agentrt.cache import Copy, PrefixCache
from agentrt.cache.keys import Fingerprint
from agentrt.chat import Chat, NoText
from agentrt.config import ResolvedConfig
from agentrt.engine_parts import EngineParts, build_loop
from agentrt.grammar_masks import MaskThread
from agentrt.models.base import ModelSpec, RopeSpec
from agentrt.output import OutputText
from agentrt.poster import poster
from agentrt.precedence import Precedence
from agentrt.request import PENDING, Request
from agentrt.runner import Computed, begin_masks, collect_computed
from agentrt.sampler import Sampled, is_plain
from agentrt.scheduler import Plan, Work
from agentrt.speculate import CPU_LIMITS, DraftLimits
from agentrt.template import ChatTemplate
from agentrt.tokenizer import Tokenizer, load_tokenizer
from agentrt.transfer import HostCopier

VOCAB = 64
CONTEXT = 256
BLOCK_TOKENS = 4
TOKEN_BYTES = 16
CHUNK_TOKENS = 8  # of the tiers below the device
EOS = 0

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def logits_after(tokens: Sequence[int], vocab_size: int = VOCAB) -> np.ndarray:
    """What the fake model says after `tokens`: any other prefix gives something else."""
    seed = xxhash.xxh3_64_intdigest(np.asarray(tokens, dtype=np.int64).tobytes())
    logits = np.random.Generator(np.random.PCG64(seed)).standard_normal(vocab_size)
    return logits.astype(np.float32)


def greedy_after(prompt: Iterable[int], num_tokens: int, *, ignore_eos: bool = True) -> list[int]:
    """The fake model's greedy output, without any engine."""
    tokens, output = list(prompt), []
    for _ in range(num_tokens):
        output.append(int(logits_after(tokens).argmax()))
        tokens.append(output[-1])
        if output[-1] == EOS and not ignore_eos:
            break
    return output


class Gate:
    """Lets the step thread through, so many steps at a time. Open from the beginning."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._permits: int | None = None  # None: open
        self._num_held = 0

    def close(self) -> None:
        with self._changed:
            self._permits = 0

    def open(self) -> None:
        with self._changed:
            self._permits = None
            self._changed.notify_all()

    def allow(self, num_steps: int) -> None:
        with self._changed:
            if self._permits is not None:
                self._permits += num_steps
            self._changed.notify_all()

    @property
    def is_holding(self) -> bool:
        """Whether the step thread waits here with no step allowed."""
        return self._num_held > 0 and self._permits == 0

    def pass_through(self) -> None:
        """Wait for a permit; called on the step thread."""
        with self._changed:
            self._num_held += 1
            self._changed.wait_for(lambda: self._permits != 0)
            self._num_held -= 1
            if self._permits is not None:
                self._permits -= 1


@define
class FakeRunner:
    """A Runner whose KV memory holds the token that each slot was computed for.

    A prefix is read back through the lease's blocks; logits are a hash of all of it, so that a
    wrong block, a missing copy or a slot that was never computed changes the output, and it is an
    error at once. Where `script` gives the token behind a request's first output tokens, that one
    comes instead.
    """

    num_blocks: int
    block_tokens: int = BLOCK_TOKENS
    vocab_size: int = VOCAB
    step_tokens: int | None = None
    fail_at_step: int | None = None
    script: Callable[[Request, int], int | None] = lambda *_: None
    fills_masks: bool = True  # beside the step; a grammar that is none of llguidance's has none
    ahead: bool = False  # tokens come a step later, and until then only the device knows them
    limits: DraftLimits | None = CPU_LIMITS
    before_step: Callable[[], None] = lambda: None
    gate: Gate = field(factory=Gate)
    num_steps: int = field(default=0, init=False)
    num_copies: int = field(default=0, init=False)
    num_logits: int = field(default=0, init=False)  # rows of them
    rows: list[int] = field(factory=list, init=False)
    closed: bool = field(default=False, init=False)
    _memory: np.ndarray = field(init=False)
    _sampled: dict[str, int] = field(factory=dict, init=False)  # by request, its newest token
    _masks: MaskThread = field(factory=MaskThread, init=False)

    @_memory.default
    def _empty(self) -> np.ndarray:
        return np.full((1, 2, self.num_blocks, 1, self.block_tokens, 1), -1, dtype=np.int64)

    def launch(self, plan: Plan) -> Computed:
        self.gate.pass_through()
        self.before_step()
        if self.num_steps == self.fail_at_step:
            raise OSError("the fake device broke")
        self.num_steps += 1
        self.rows.append(plan.num_rows)
        for work in plan.work:
            self._write(work)
        sampling = tuple(work for work in plan.work if work.samples)
        rows = [
            row
            for work in sampling
            for row in self._logits(work)[work.request.num_unread(work.num_draft) :]
        ]
        self.num_logits += len(rows)
        for work in sampling:
            self._sampled[work.request.id] = int(self._logits(work)[-1].argmax())
        logits = np.array(rows, np.float32).reshape(len(rows), self.vocab_size)
        runs_ahead = self.ahead and all(is_plain(w.request) and not w.num_draft for w in sampling)
        filling = begin_masks(self._masks, sampling) if self.fills_masks else None
        return Computed(sampling, torch.from_numpy(logits), runs_ahead, filling)

    @property
    def draft_limits(self) -> DraftLimits | None:
        return self.limits

    def collect(self, ticket: Computed) -> list[list[Sampled]]:
        return collect_computed(ticket)

    def copy(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            self.num_copies += 1
            self._memory[:, :, copy.target, :, : copy.num_tokens] = self._memory[
                :, :, copy.source, :, : copy.num_tokens
            ]

    def copier(self) -> HostCopier:
        return HostCopier(self._memory.view(np.uint8))

    def close(self) -> None:
        self._masks.close()
        self.closed = True

    def _write(self, work: Work) -> None:
        for position in range(work.start, work.start + work.num_tokens):
            block, inside = divmod(position, self.block_tokens)
            place = work.request.lease.block_ids[block]
            self._memory[:, :, place, :, inside] = self._token(work.request, position)

    def _token(self, request: Request, position: int) -> int:
        token = int(request.tokens[position])
        return self._sampled[request.id] if token == PENDING else token

    def _logits(self, work: Work) -> list[np.ndarray]:
        """Of the last known token, and of each that is drafted."""
        end = work.start + work.num_tokens
        expected = [self._token(work.request, position) for position in range(end)]
        for plane in self._memory[0, :, work.request.lease.block_ids, 0, :, 0].swapaxes(0, 1):
            read = plane.reshape(-1)[:end]
            assert np.array_equal(read, expected), f"wrong KV below {work.request.id}"
        rows = []
        for length in range(work.num_known, end + 1):
            scripted = self.script(work.request, length - work.request.num_prompt_tokens)
            if scripted is None:
                rows.append(logits_after(read[:length], self.vocab_size))
            else:
                rows.append(np.eye(1, self.vocab_size, scripted, dtype=np.float32)[0] * 10)
        return rows


def fake_spec(vocab_size: int = VOCAB, context: int = CONTEXT) -> ModelSpec:
    return ModelSpec(
        model_type="llama",
        vocab_size=vocab_size,
        hidden_size=1,
        intermediate_size=1,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=1,
        norm_eps=1e-5,
        max_context_tokens=context,
        rope=RopeSpec(theta=1e4),
        tie_embeddings=True,
        eos_token_ids=frozenset({EOS}),
    )


class FakeEngine(Engine):
    """A whole engine above a FakeRunner: real scheduler, cache, loop, sessions and text."""

    runner: FakeRunner

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        context: int = CONTEXT,
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        checked: bool = True,
        vocab_size: int | None = None,
        ahead: bool = False,
        **config: object,
    ) -> None:
        super().__init__(
            "fake",
            EngineConfig(
                block_tokens=BLOCK_TOKENS,
                device_kv_bytes=num_blocks * BLOCK_TOKENS * TOKEN_BYTES,
                **{"max_batch": 8, "step_tokens": 16, "disk_kv_bytes": 0, **config},
            ),
        )
        if vocab_size is None:
            vocab_size = VOCAB if tokenizer is None else tokenizer.vocab_size
        self.spec = fake_spec(vocab_size, context)
        eos = self.spec.eos_token_ids if tokenizer is None else tokenizer.eos_token_ids
        self.chat = Chat(tokenizer, template, vocab_size, eos)
        self.runner = FakeRunner(num_blocks, vocab_size=vocab_size, ahead=ahead)
        self._checked = checked

    @property
    def gate(self) -> Gate:
        return self.runner.gate

    @property
    def cache(self) -> PrefixCache:
        return self._open.loop.scheduler.cache

    def _open_parts(self, event_loop, abandoned) -> EngineParts:
        config = self.config.resolve(
            device="cpu",
            kv_token_bytes=TOKEN_BYTES,
            model_context_tokens=self.spec.max_context_tokens,
        )
        fingerprint = Fingerprint(
            namespace=self.config.namespace,
            model_digest="fake",
            layout="fake",
            dtype="int64",
            arithmetic="",
            token_bytes=TOKEN_BYTES,
        )
        loop, tiers = build_loop(
            self.config,
            config,
            fingerprint,
            self.runner,
            poster(event_loop),
            Precedence(),
            device="cpu",
            chunk_tokens=CHUNK_TOKENS,
        )
        if self._checked:
            self.runner.before_step = loop.scheduler.check
        return EngineParts(
            loop=loop,
            chat=self.chat,
            spec=self.spec,
            model_name="fake",
            kernels="fake",
            weights="fake",
            disk_problem=tiers.problem,
            disk=tiers.disk,
            fingerprint=fingerprint,
        )

    async def aclose(self) -> None:
        self.gate.open()
        await super().aclose()

    async def until_held(self) -> None:
        """Wait until the step thread stands before the closed gate."""
        await until(lambda: self.gate.is_holding)

    async def leased_blocks(self) -> int:
        """Verify all invariants; the number of blocks that requests hold, once no step runs."""
        await self.check()
        return self.cache.stats().leased_blocks


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does. The test's own time limit ends a wait in vain."""
    while not condition():  # noqa: ASYNC110 - what other threads do sets no asyncio.Event
        await asyncio.sleep(0.0005)


@define
class FakeClock:
    """Seconds that pass only when told to."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def resolved(
    *,
    num_blocks: int,
    max_batch: int = 4,
    step_tokens: int = 8,
    context: int = CONTEXT,
    block_tokens: int = BLOCK_TOKENS,
) -> ResolvedConfig:
    return ResolvedConfig(
        host_kv_bytes=0,
        disk_kv_bytes=0,
        block_tokens=block_tokens,
        num_blocks=num_blocks,
        kv_token_bytes=1,
        max_context_tokens=context,
        max_batch=max_batch,
        max_waiting=100,
        step_tokens=step_tokens,
    )


_numbers = itertools.count()


def make_request(
    prompt: Sequence[int],
    max_tokens: int = 8,
    *,
    options: GenerateOptions | None = None,
    sink: Callable[[object], None] = lambda _: None,
    submitted_s: float = 0.0,
) -> Request:
    """A request as an engine would make it, for a model without text."""
    tokens = np.zeros(len(prompt) + max_tokens, dtype=np.int32)
    tokens[: len(prompt)] = prompt
    return Request(
        id=f"test{next(_numbers)}",
        options=options or GenerateOptions(max_tokens=max(max_tokens, 1), ignore_eos=True),
        namespace="",
        sink=sink,
        text=OutputText(NoText(), ()),
        tokens=tokens,
        num_prompt_tokens=len(prompt),
        eos_token_ids=frozenset({EOS}),
        submitted_s=submitted_s,
    )


def byte_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level tokenizer with no merges, through its file; tokens 0 to 2 are special."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return load_tokenizer(folder)
