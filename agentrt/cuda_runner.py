"""The device side of an engine on CUDA: decode steps as graphs, mixed steps kernel by kernel.

A step is launched without waiting for anything: its inputs go up in one transfer, its tokens come
down behind it, and a request whose last token is still being sampled finds it on the device. Only a
step that checks drafts is waited for: how many of them are right decides what comes next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from attrs import define, field, frozen
from numpy.typing import NDArray
from torch import Tensor

from agentrt.cache import Copy
from agentrt.config import ResolvedConfig
from agentrt.cuda_inputs import NUM_BUFFERS, BlockTables, Uploader
from agentrt.decode_graph import BUCKETS, Contexts, DecodeGraphs, DecodeInputs, parts
from agentrt.decode_works import DecodeWorks, find_common
from agentrt.grammar_masks import Filling, MaskThread
from agentrt.kernels.attention_decode import FEW_ROWS, tile_tokens
from agentrt.kernels.attention_prefill import plan_tiles
from agentrt.kernels.attention_prefix import (
    PREFIX_TOKENS,
    attend_prefix,
    lengths_to_plan,
    prefix_tokens,
)
from agentrt.kernels.cuda import CudaOps, Scratch
from agentrt.kernels.cuda_products import Rows
from agentrt.kernels.dispatch import Compute
from agentrt.kernels.sample import sample_rows
from agentrt.mixed_graph import MOST_CHECKED_ROWS, MixedGraphs
from agentrt.models.llama import LlamaModel
from agentrt.runner import begin_masks, copy_blocks, kv_pool
from agentrt.sampler import Sampled, is_drawn_on_device
from agentrt.scheduler import Plan, Work
from agentrt.speculate import DraftLimits
from agentrt.step_device import CudaDevice, Event, StepDevice, no_collection
from agentrt.step_rows import MixedWork, draws, mixed_work, sampled_runs
from agentrt.transfer_cuda import CudaCopier

Array = NDArray[np.int32]

# A decode step is bound by the weights: up to 16 rows cost as much as two, and the look-ahead that
# a step with drafts gives up costs more than they do. 8 rows (1B shape, H100) with room for one
# guess each took 1.62 ms a token in one run of three, and 1.19 without: so at least two must be
# expected to be right. With guesses for 32 rows, whose search takes the host as long as the device
# needs for a step, a token took 1.82 ms, not 1.61.
CUDA_LIMITS = DraftLimits(
    guess_rows=16,
    most_rows=MOST_CHECKED_ROWS,
    min_match_tokens=3,
    least_tokens=7,
    guesses_a_request=2.0,
)
# Keys and values that a decode step reads in a layer, from which on its contexts count as long (see
# `choose_stages`): between 32 rows of 1,024 tokens (1B shape, 76 MB) and 8 of 16,384 (270).
LONG_KV_BYTES = 128 << 20


@frozen
class CudaTicket:
    """A launched step. `tokens` are page-locked, and valid once `done` has happened."""

    sampling: tuple[Work, ...]
    runs_ahead: bool
    tokens: Tensor  # of the works' rows, one after the other, each with its draft's behind it
    logits: Tensor
    done: Event
    filling: Filling | None = None  # the masks of its grammars


@define
class CudaRunner:
    """See `agentrt.runner.Runner`. Owns the KV pool, the graphs and all memory of the steps.

    Only the step thread calls it. At most two steps are launched and not collected, so that the
    rings of page-locked buffers (NUM_BUFFERS long) never overwrite what is in use.
    """

    model: LlamaModel
    ops: CudaOps
    config: ResolvedConfig
    kv: Tensor
    scratch: Scratch
    tables: BlockTables
    inputs: DecodeInputs
    graphs: DecodeGraphs
    mixed: MixedGraphs
    uploader: Uploader
    device: StepDevice
    masks: MaskThread = field(factory=MaskThread)
    draft_limits: ClassVar[DraftLimits | None] = CUDA_LIMITS
    _tickets: deque[tuple[int, Event]] = field(init=False)  # the first is the next one

    @classmethod
    def open(
        cls,
        model: LlamaModel,
        compute: Compute,
        config: ResolvedConfig,
        device: StepDevice | None = None,
    ) -> CudaRunner:
        """Allocate, compile and capture. Raises ConfigError on a shape that is not served."""
        device = device or CudaDevice()
        ops, spec = compute.ops, model.spec
        assert isinstance(ops, CudaOps)
        ops.check(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
        )
        width = max(config.max_batch, BUCKETS[-1])
        most_outputs = width + MOST_CHECKED_ROWS
        scratch = Scratch.allocate(
            model.geometry,
            vocab_size=spec.vocab_size,
            max_batch=most_outputs,
            device=compute.device,
            deterministic=ops.deterministic,
        )
        num_blocks = config.max_context_tokens // config.block_tokens + 2
        tables = BlockTables(config.max_batch, num_blocks, compute.device)
        inputs = DecodeInputs.allocate(width, compute.device, most_outputs)
        kv = kv_pool(spec, config, compute)
        graphs = DecodeGraphs(
            model, ops, kv, scratch, inputs, tables.tables, tables.last_tokens, device
        )
        idle = np.zeros(len(inputs.flat), dtype=np.int32)
        idle[width : 2 * width] = tables.idle_slot
        inputs.ring.copy_(torch.from_numpy(idle))
        uploader = Uploader(compute.device)
        mixed = MixedGraphs(
            model,
            ops,
            kv,
            scratch,
            tables.tables,
            tables.last_tokens,
            inputs.outbox,
            tables.idle_slot,
            device,
        )
        with torch.inference_mode(), no_collection():
            graphs.capture(config.max_batch)
            if config.decode_launch == "persistent":
                graphs.use_persistent()
            mixed.capture(config.step_tokens)
        runner = cls(
            model, ops, config, kv, scratch, tables, inputs, graphs, mixed, uploader, device
        )
        runner._prepare_long()
        return runner

    @_tickets.default
    def _ring(self) -> deque[tuple[int, Event]]:
        return deque((place, self.device.event()) for place in range(NUM_BUFFERS))

    @torch.inference_mode()
    def copy(self, copies: Sequence[Copy]) -> None:
        copy_blocks(self.kv, copies)

    def copier(self) -> CudaCopier:
        return CudaCopier.over(self.kv)

    @torch.inference_mode()
    def _prepare_long(self) -> None:
        """Let cuDNN plan what long prompts need, for the calling thread, which is the step thread,
        and compile what no graph has: else the first one waits for that (1B shape: 1.1 s)."""
        rows, block_tokens = self.config.step_tokens, self.config.block_tokens
        if not self.ops.cudnn or PREFIX_TOKENS % block_tokens:
            return
        geometry = self.model.geometry
        shape = (geometry.num_kv_heads, rows, self._group, geometry.head_dim)
        query = self.model.embedding.new_zeros(shape)
        scales = None if self.ops.kv_scales is None else self.ops.kv_scales[0]
        most_tokens = min(self.config.max_context_tokens, self.config.num_blocks * block_tokens)
        lengths = lengths_to_plan(*self._head_shape, rows, most_tokens)
        for num_tokens in lengths:
            table = torch.arange(
                num_tokens // block_tokens, dtype=torch.int32, device=self.kv.device
            )
            attend_prefix(query, rows, self.kv[0], table, scales)
        if lengths and lengths[0] + rows <= most_tokens:
            # The pool is empty: what the idle slot's table names may be overwritten.
            work = MixedWork.of_chunk(lengths[0], rows, self.tables.idle_slot)
            self._without_graph(work, self._prefix_blocks(work))

    @torch.inference_mode()
    def launch(self, plan: Plan) -> CudaTicket:
        chunks = [work for work in plan.work if work.num_tokens > 1]
        singles = [work for work in plan.work if work.num_tokens == 1]
        is_decode = not chunks and all(work.samples for work in singles)
        has_graph = is_decode and len(singles) <= self.graphs.max_rows
        decode = self._decode_works(singles, has_graph=has_graph)
        works = (*decode.works, *chunks)
        slots, cells, blocks = self.tables.place(works)
        updates = (np.array(cells, dtype=np.int32), np.array(blocks, dtype=np.int32))
        if has_graph:
            logits = self._decode(decode, slots, updates)
        else:
            logits = self._mixed(works, decode, slots, updates)
        return self._ticket(tuple(work for work in works if work.samples), logits)

    @torch.inference_mode()
    def collect(self, ticket: CudaTicket) -> list[list[Sampled]]:
        masks = None if ticket.filling is None else ticket.filling.masks()
        ticket.done.synchronize()  # also without a token: the rings rely on it
        self.graphs.check()
        num_rows = sum(1 + work.num_draft for work in ticket.sampling)
        tokens = ticket.tokens[:num_rows].tolist()
        if ticket.runs_ahead:
            return [[(token, None)] for token in tokens]
        return sampled_runs(ticket.sampling, tokens, ticket.logits, masks)

    def _ticket(self, sampling: tuple[Work, ...], logits: Tensor) -> CudaTicket:
        index, done = self._tickets[0]
        self._tickets.rotate(-1)
        done.record()
        runs_ahead = all(is_drawn_on_device(w.request) and not w.num_draft for w in sampling)
        filling = begin_masks(self.masks, sampling)  # beside the device
        tokens = self.inputs.outbox[index]
        return CudaTicket(sampling, runs_ahead, tokens, logits, done, filling)

    @property
    def _outbox_at(self) -> int:
        """Where this step's tokens come down."""
        return self._tickets[0][0] * self.inputs.outbox.shape[1]

    def _decode_works(self, works: list[Work], *, has_graph: bool) -> DecodeWorks:
        """Works of one token, and what they have in common, if they read much. `has_graph`: they
        are a step that only decodes."""
        decode, num = DecodeWorks.of(works, self.model.geometry.head_dim), len(works)
        if num <= FEW_ROWS or not self.ops.shares_common(self.model.geometry):
            return decode
        if has_graph and not self.graphs.shares_common(num):
            return decode
        if not self._is_long(decode):
            return decode
        dim = self.model.geometry.head_dim
        return find_common(decode, self.config.block_tokens, dim, self._group)

    def _decode(self, decode: DecodeWorks, slots: list[int], updates: tuple[Array, ...]) -> Tensor:
        """Rows of one token each: one graph."""
        works = decode.works
        width, num = self.inputs.width, len(works)
        flat = np.zeros(len(self.inputs.flat), dtype=np.int32)
        fields, starts, common, outbox_at = parts(flat, width)
        fields[0, :num] = [work.request.tokens[work.start] for work in works]
        fields[1] = self.tables.idle_slot
        fields[1, :num] = slots
        fields[2, :num] = [work.start for work in works]
        fields[3, :num], temperatures = draws(works)
        fields[4, :num] = temperatures.view(np.int32)
        starts[: num + 1] = decode.starts
        starts[num + 1 :] = starts[num]
        common[:] = decode.num_common, decode.common_tiles
        outbox_at[:] = self._outbox_at
        self._update_tables(updates)
        self.inputs.write(flat)
        contexts: Contexts = "long" if self._is_long(decode) else "short"
        graph = self.graphs.get(num, "common" if decode.num_common else contexts)
        graph.replay()
        return graph.logits

    def _is_long(self, decode: DecodeWorks) -> bool:
        """Whether these are mostly reading their contexts."""
        dim = self.model.geometry.head_dim
        token_bytes = 2 * self.model.geometry.num_kv_heads * dim * self.kv.itemsize
        return int(decode.tiles.sum()) * tile_tokens(dim) * token_bytes > LONG_KV_BYTES

    def _mixed(
        self,
        works: Sequence[Work],
        decode: DecodeWorks,
        slots: list[int],
        updates: tuple[Array, ...],
    ) -> Tensor:
        """Decode rows, drafts and prefill chunks, or more decode rows than a graph has."""
        work = mixed_work(works, decode, slots, most_checked_rows=MOST_CHECKED_ROWS)
        self._update_tables(updates)
        prefix_blocks = self._prefix_blocks(work)
        is_plain = prefix_blocks is not None or self._ends_early(work)
        graph = None if is_plain else self.mixed.get(work)
        if graph is None:
            return self._without_graph(work, prefix_blocks)
        tiles = plan_tiles(work.chunks, self._group, graph.layout.shape.rows)
        flat = graph.layout.fill(work, tiles, self.tables.idle_slot, self._outbox_at)
        self.uploader.upload_to(graph.flat, flat)
        graph.replay()
        return graph.logits

    def _ends_early(self, work: MixedWork) -> bool:
        """Whether the rows, as they give no token, end in the last layer's attention, and are so
        many that it pays to launch them one by one: graphs are for steps with outputs."""
        return not len(work.outputs[0]) and 2 * len(work.prefill[0]) >= self.config.step_tokens

    @property
    def _head_shape(self) -> tuple[int, int]:
        return self.model.geometry.num_heads, self.model.geometry.head_dim

    @property
    def _group(self) -> int:
        geometry = self.model.geometry
        return geometry.num_heads // geometry.num_kv_heads

    def _prefix_blocks(self, work: MixedWork) -> Tensor | None:
        """The full blocks before a long chunk that comes alone, where cuDNN is faster."""
        if not self.ops.cudnn or len(work.chunks) != 1:
            return None
        _, position, num_rows, slot = work.chunks[0]
        num_tokens = prefix_tokens(*self._head_shape, num_rows, position, self.config.step_tokens)
        if not num_tokens or PREFIX_TOKENS % self.config.block_tokens:
            return None
        return self.tables.tables[slot, : num_tokens // self.config.block_tokens]

    def _without_graph(self, work: MixedWork, prefix_blocks: Tensor | None) -> Tensor:
        """Kernel by kernel: what no graph has room for, or cuDNN serves."""
        shape, tiles = self.ops.plan_chunks(work.chunks, self.model.geometry)
        described = np.array(tiles, dtype=np.int32).reshape(-1)
        joined = [np.concatenate(pair) for pair in zip(work.decode, work.prefill, strict=True)]
        place = np.array([self._outbox_at], dtype=np.int32)
        parts = self.uploader.upload(
            [*joined, work.starts, described, *work.outputs, place, work.common]
        )
        rows = Rows(
            token_ids=parts[0],
            slots=parts[1],
            positions=parts[2],
            tables=self.tables.tables,
            last_tokens=self.tables.last_tokens,
        )
        step = self.ops.plan_rows(
            rows,
            parts[3],
            parts[4].view(-1, 4),
            shape,
            self.kv,
            self.model.geometry,
            self.scratch,
            parts[5],
            prefix_blocks,
            self.config.step_tokens,
            parts[10] if work.common[0] else None,
        )
        logits = self.model.run(step)
        if len(parts[5]):
            sample_rows(
                logits,
                parts[8].view(torch.float32),
                parts[7],
                parts[6],
                self.tables.last_tokens,
                self.inputs.outbox,
                self.scratch.sample,
                place=parts[9],
            )
        return logits

    def _update_tables(self, updates: tuple[Array, ...]) -> None:
        cells, blocks = updates
        if len(cells):
            where, values = self.uploader.upload([cells, blocks])
            self.tables.tables.view(-1).index_copy_(0, where.long(), values)

    def close(self) -> None:
        self.masks.close()
        self.device.synchronize()
        self.kv = torch.empty(0)
        del self.graphs, self.mixed, self.scratch, self.tables, self.inputs, self.model
