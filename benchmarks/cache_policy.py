"""Hit tokens of our eviction against LRU, LFU and Belady's optimum, on two real traces. No model.

    python benchmarks/cache_policy.py --shared ../shared [--half tuning|holdout] [--json FILE]

Traces. `mooncake`: production requests, prefix chains of 512-token blocks, nothing known but the
requests. `airline`: 100 tool agents, blocks of 16 tokens, as the replay driver runs them: so many
agents at a time, each asks for exactly the output that was recorded, then waits for its tool.
A turn takes (new tokens) / (prefill rate) + (output tokens) / (decode rate), whatever the policy
hits, so all policies see the same events and the optimum is defined.

The simulation. A pool of whole blocks. When a turn begins, its prompt's longest resident prefix
is a hit and the rest is added; when it ends, its output is added if its prompt is still there.
After each the pool is cut to its size by leaves alone (a block helps only below its whole
prefix), and what was just added may be what goes. LRU takes the leaf longest unused, LFU the one
of fewest uses since it came, LRU among equals. Belady takes the leaf whose next use by a prompt
is furthest, the deeper among equals; as a parent is used whenever its child is, that is always
the furthest of all blocks, hence the classic optimum. `unbounded` never evicts.

Ours is the product: a PrefixCache with its worth function and queue, told what an engine knows.
That is when turns begin, the length that was asked for, the name of the tool that runs, and
that an agent is gone. Waits are expected as learnt from those that are over (ToolLatencies).
`unknown` is ours without the length asked for: it learns how long turns take.

Two measures. Hit tokens, with TierRates under which all tokens cost the same; and the compute
saved, with those of SmolLM2, where a token at depth 4,096 costs twice one at the beginning.
Each half of the traces can be run alone. PAUSE_QUANTILE was set on `tuning` alone; the constants
in cache/evict.py come from both halves, so for them `holdout` shows stability, no blind test.
"""

import argparse
import gzip
import json
import random
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from attrs import asdict, define, evolve, field, frozen

from agentrt.cache import Lease, PrefixCache, SessionState, TierRates
from agentrt.cache.evict import EvictionQueue
from agentrt.cache.latency import LatencyPrior, ToolLatencies

SHARES = (0.02, 0.05, 0.1, 0.2, 0.5)
MOONCAKE_BLOCK_TOKENS = 512
AIRLINE_BLOCK_TOKENS = 16
ATTENTION_KNEE_TOKENS = 4096
END_OF_PROMPT = -1  # a token no block has: the product never takes a prompt's last token as a hit
# Half of the pauses are none, where the user answers at once; their median hardly counts the tools.
PAUSE_QUANTILE = 0.65
NEVER = 1 << 60
SAME_COST = TierRates(attention_knee_tokens=1e12)


@frozen(kw_only=True)
class Turn:
    """A request comes in; `service_s` is how long it will take."""

    now: float
    agent: str
    blocks: tuple[int, ...]  # ids of the prompt's blocks; equal ids mean equal prefixes
    service_s: float | None = None


@frozen(kw_only=True)
class TurnEnd:
    """Its output is there: `blocks` go on where the turn's did. Then a tool runs, or a user."""

    now: float
    agent: str
    blocks: tuple[int, ...]
    tool: str | None


@frozen(kw_only=True)
class Close:
    """An agent has finished."""

    now: float
    agent: str


Event = Turn | TurnEnd | Close


@frozen(kw_only=True)
class Service:
    """How fast turns are served, in tokens per second of one agent; and how many agents at once."""

    num_agents: int = 24
    prefill_tokens_per_s: float = 8000.0
    decode_tokens_per_s: float = 50.0


@frozen(kw_only=True)
class Trace:
    """Events in order of time, and what a block is."""

    name: str
    block_tokens: int
    events: list[Event]

    def footprint(self) -> int:
        """Number of different blocks."""
        return len({block for e in self.events if not isinstance(e, Close) for block in e.blocks})

    def knee_blocks(self) -> float:
        """The depth at which a block costs twice as much as at the beginning, in SmolLM2."""
        return ATTENTION_KNEE_TOKENS / self.block_tokens

    def asked(self) -> int:
        """Number of blocks in all prompts."""
        return sum(len(event.blocks) for event in self.events if isinstance(event, Turn))


def read_rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path) as file:
        return [json.loads(line) for line in file]


def half_of(rows: list[Any], half: str) -> list[Any]:
    middle = len(rows) // 2
    return {"all": rows, "tuning": rows[:middle], "holdout": rows[middle:]}[half]


def mooncake(shared: Path, half: str) -> Trace:
    rows = half_of(read_rows(shared / "traces/mooncake_conversation.jsonl.gz"), half)
    events: list[Event] = [
        Turn(now=row["timestamp"] / 1e3, agent="", blocks=tuple(row["hash_ids"])) for row in rows
    ]
    return Trace(name="mooncake", block_tokens=MOONCAKE_BLOCK_TOKENS, events=events)


def tool_names(row: dict[str, Any]) -> list[str | None]:
    """The tool that each turn of a recorded conversation ends with, if any."""
    answers = [message for message in row["messages"] if message["role"] == "assistant"]
    return [m["tool_calls"][0]["name"] if m.get("tool_calls") else None for m in answers]


def airline(shared: Path, half: str, service: Service) -> Trace:
    rows = half_of(read_rows(shared / "traces/tau_airline_tokens.jsonl.gz"), half)
    names = {
        row["id"]: tool_names(row) for row in read_rows(shared / "traces/tau_airline.jsonl.gz")
    }
    chains = Chains()
    agents = [agent_steps(row, names[row["id"]], service, chains) for row in rows]
    return Trace(
        name="airline",
        block_tokens=AIRLINE_BLOCK_TOKENS,
        events=list(run_agents(agents, service.num_agents)),
    )


@define
class Chains:
    """Numbers for blocks: one for each different chain of whole blocks from the first token."""

    ids: dict[tuple[int, tuple[int, ...]], int] = field(factory=dict)

    def extend(self, blocks: list[int], token_ids: list[int]) -> None:
        """Append the numbers of the whole blocks that `token_ids` has more than `blocks`."""
        for begin in range(
            len(blocks) * AIRLINE_BLOCK_TOKENS,
            len(token_ids) - AIRLINE_BLOCK_TOKENS + 1,
            AIRLINE_BLOCK_TOKENS,
        ):
            parent = blocks[-1] if blocks else -1
            chain = (parent, tuple(token_ids[begin : begin + AIRLINE_BLOCK_TOKENS]))
            blocks.append(self.ids.setdefault(chain, len(self.ids)))


# What an agent does, and how long after it the next thing comes.
Steps = Iterator[tuple[float, Event]]


def agent_steps(
    row: dict[str, Any], tools: list[str | None], service: Service, chains: Chains
) -> list[tuple[float, Event]]:
    """One agent's events, `now` left at 0, each with the seconds from it to the next."""
    steps: list[tuple[float, Event]] = []
    token_ids: list[int] = []
    blocks: list[int] = []
    num_new = num_turns = 0
    for kind, segment, wait_s in row["segments"]:
        if kind == "out":
            chains.extend(blocks, token_ids)
            service_s = num_new / service.prefill_tokens_per_s
            service_s += len(segment) / service.decode_tokens_per_s
            turn = Turn(now=0.0, agent=row["id"], blocks=tuple(blocks), service_s=service_s)
            token_ids += segment
            chains.extend(blocks, token_ids)
            tool = tools[num_turns]
            end = TurnEnd(now=0.0, agent=row["id"], blocks=tuple(blocks), tool=tool)
            steps += [(service_s, turn), (wait_s, end)]
            num_new, num_turns = 0, num_turns + 1
        else:
            token_ids += segment
            num_new += len(segment)
    return [*steps, (0.0, Close(now=0.0, agent=row["id"]))]


def run_agents(agents: list[list[tuple[float, Event]]], num_at_once: int) -> Iterator[Event]:
    """Merge the agents' events in order of time; another agent begins when one is through."""
    waiting = deque(agents)
    heap: list[tuple[float, int, deque[tuple[float, Event]]]] = []
    serial = 0
    for _ in range(min(num_at_once, len(waiting))):
        heappush(heap, (0.0, serial, deque(waiting.popleft())))
        serial += 1
    while heap:
        now, _, steps = heappop(heap)
        delay_s, event = steps.popleft()
        yield evolve(event, now=now)
        if not steps and waiting:
            steps = deque(waiting.popleft())
        if steps:
            heappush(heap, (now + delay_s, serial, steps))
            serial += 1


@define(eq=False)
class Block:
    """A resident block of the simulated pool."""

    id: int
    depth: int
    parent: "Block | None"
    num_children: int = 0
    num_uses: int = 0
    last_used: int = 0
    key: tuple[float, ...] = ()


class Policy(Protocol):
    """Least key goes first. A block's key changes only when an event uses the block."""

    def key(self, block: Block) -> tuple[float, ...]: ...


class Recency:
    def key(self, block: Block) -> tuple[float, ...]:
        return (block.last_used,)


class Frequency:
    def key(self, block: Block) -> tuple[float, ...]:
        return (block.num_uses, block.last_used)


class Belady:
    """Knows all uses by prompts, by the number of the event."""

    def __init__(self, events: list[Event]) -> None:
        self._uses: defaultdict[int, deque[int]] = defaultdict(deque)
        for number, event in enumerate(events):
            if isinstance(event, Turn):
                for block in event.blocks:
                    self._uses[block].append(number)

    def key(self, block: Block) -> tuple[float, ...]:
        uses = self._uses[block.id]
        while uses and uses[0] <= block.last_used:
            uses.popleft()
        return (-uses[0] if uses else -NEVER,)


class Pool:
    """The simulated pool: whole blocks, evicted from the leaves by a policy's key."""

    def __init__(self, num_blocks: int, policy: Policy) -> None:
        self._num_blocks = num_blocks
        self._policy = policy
        self._resident: dict[int, Block] = {}
        self._heap: list[tuple[tuple[float, ...], int, int, Block]] = []
        self._serial = 0

    def num_resident(self, blocks: tuple[int, ...]) -> int:
        """Length of the longest resident prefix."""
        for position, block in enumerate(blocks):
            if block not in self._resident:
                return position
        return len(blocks)

    def use(self, blocks: tuple[int, ...], number: int, *, is_prompt: bool) -> None:
        """Use a chain of blocks in event `number`, add what is missing, evict what is too much."""
        parent: Block | None = None
        chain = []
        for depth, block_id in enumerate(blocks):
            block = self._resident.get(block_id)
            if block is None:
                block = self._resident[block_id] = Block(block_id, depth, parent)
                if parent is not None:
                    parent.num_children += 1
            block.last_used = number
            block.num_uses += is_prompt
            chain.append(block)
            parent = block
        for block in chain:
            self._offer(block)
        while len(self._resident) > self._num_blocks:
            self._evict()

    def _offer(self, block: Block) -> None:
        block.key = self._policy.key(block)
        if not block.num_children:
            self._serial += 1
            heappush(self._heap, (block.key, -block.depth, self._serial, block))

    def _evict(self) -> None:
        while True:
            key, _, _, block = heappop(self._heap)
            is_resident = self._resident.get(block.id) is block
            if is_resident and block.key == key and not block.num_children:
                break
        del self._resident[block.id]
        if block.parent is not None:
            block.parent.num_children -= 1
            self._offer(block.parent)


@define
class Hits:
    """What a policy saved: blocks, and the compute for them in blocks at depth 0."""

    knee_blocks: float
    num_blocks: int = 0
    compute: float = 0.0

    def add(self, num_blocks: int) -> None:
        """Count a prefix of so many blocks."""
        self.num_blocks += num_blocks
        self.compute += num_blocks * (1 + num_blocks / 2 / self.knee_blocks)


def simulate(trace: Trace, num_blocks: int, policy: Policy) -> Hits:
    """What a pool of `num_blocks` saves."""
    pool = Pool(num_blocks, policy)
    prompts: dict[str, tuple[int, ...]] = {}
    hits = Hits(trace.knee_blocks())
    for number, event in enumerate(trace.events):
        if isinstance(event, Turn):
            prompts[event.agent] = event.blocks
            hits.add(pool.num_resident(event.blocks))
            pool.use(event.blocks, number, is_prompt=True)
        elif isinstance(event, TurnEnd):
            prompt = prompts[event.agent]
            if pool.num_resident(prompt) == len(prompt):
                pool.use(event.blocks, number, is_prompt=False)
    return hits


@define
class Engine:
    """What an engine knows of its sessions: their states, and how long waits took so far."""

    knows_lengths: bool
    tools: ToolLatencies = field(factory=ToolLatencies)
    users: ToolLatencies = field(factory=lambda: ToolLatencies(LatencyPrior(median_s=30.0)))
    turns: ToolLatencies = field(factory=ToolLatencies)  # and the pauses between turns
    ended: dict[str, TurnEnd] = field(factory=dict)
    began: dict[str, float] = field(factory=dict)

    def begin(self, turn: Turn) -> float | None:
        """Learn from the pause that is over; seconds to the turn after this one."""
        if turn.service_s is None:
            return None
        self.began[turn.agent] = turn.now
        if (end := self.ended.pop(turn.agent, None)) is not None:
            pause_s = turn.now - end.now
            self.turns.observe("pause", pause_s)
            if end.tool is None:
                self.users.observe("", pause_s)
            else:
                self.tools.observe(end.tool, pause_s)
        service_s = turn.service_s if self.knows_lengths else self.turns.expected("turn")
        return service_s + self.turns.expected("pause", PAUSE_QUANTILE)

    def end(self, end: TurnEnd) -> tuple[SessionState, float]:
        """The session's state from now on, and the seconds that it is expected to take."""
        self.ended[end.agent] = end
        self.turns.observe("turn", end.now - self.began[end.agent])
        if end.tool is None:
            return SessionState.IDLE, self.users.expected("")
        return SessionState.TOOL_PENDING, self.tools.expected(end.tool)


class Product:
    """A PrefixCache that holds blocks as its tokens, with room beside the pool for one request."""

    def __init__(
        self, trace: Trace, num_blocks: int, rates: TierRates, knows_lengths: bool
    ) -> None:
        self._num_spare = max(len(e.blocks) for e in trace.events if not isinstance(e, Close))
        self._cache = PrefixCache(num_blocks + self._num_spare, 1, rates)
        self._engine = Engine(knows_lengths)
        self._logs: dict[str, np.ndarray] = {}
        self.hits = Hits(trace.knee_blocks())

    def run(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Turn):
                self._begin(event)
            elif isinstance(event, TurnEnd):
                self._end(event)
            else:
                self._cache.mark(self._logs.pop(event.agent), SessionState.CLOSED, event.now)
            self._shrink(event.now)

    def _begin(self, turn: Turn) -> None:
        log = np.array(turn.blocks, np.int32)
        expected_s = self._engine.begin(turn)
        self._mark(log, turn, SessionState.RUNNING, expected_s)
        self.hits.add(self._serve(log, turn.now))
        self._mark(log, turn, SessionState.RUNNING, expected_s)
        self._logs[turn.agent] = log

    def _end(self, end: TurnEnd) -> None:
        state, expected_s = self._engine.end(end)
        prompt = self._logs[end.agent]
        log = self._logs[end.agent] = np.array(end.blocks, np.int32)
        if self._cache.peek(prompt) == len(prompt):
            self._serve(log, end.now)
        self._mark(log, end, state, expected_s)

    def _mark(
        self, log: np.ndarray, event: Event, state: SessionState, expected_s: float | None
    ) -> None:
        if event.agent:
            self._cache.mark(log, state, event.now, expected_s=expected_s)

    def _serve(self, log: np.ndarray, now: float) -> int:
        taken = self._cache.acquire(np.append(log, END_OF_PROMPT), num_tokens=len(log), now=now)
        assert taken is not None, "the spare blocks have room for any request"
        lease, _ = taken
        num_hits = lease.num_tokens
        self._cache.commit(lease, log, now)
        self._cache.release(lease)
        return num_hits

    def _shrink(self, now: float) -> None:
        """Cut the pool to its size: ask for the spare blocks, and give them back."""
        taken = self._cache.acquire(np.empty(0, np.int32), num_tokens=self._num_spare, now=now)
        assert taken is not None, "nothing else holds a lease"
        lease: Lease = taken[0]
        self._cache.release(lease)


def run_product(trace: Trace, num_blocks: int, rates: TierRates, *, knows_lengths: bool) -> Hits:
    """What the product saves with a pool of `num_blocks`."""
    product = Product(trace, num_blocks, rates, knows_lengths)
    product.run(trace.events)
    return product.hits


def compare(trace: Trace, share: float) -> dict[str, Any]:
    """One row of the table: all policies at one size of the pool."""
    num_blocks = int(trace.footprint() * share)
    lru = simulate(trace, num_blocks, Recency())
    belady = simulate(trace, num_blocks, Belady(trace.events))
    ours = run_product(trace, num_blocks, SAME_COST, knows_lengths=True)
    unknown = run_product(trace, num_blocks, SAME_COST, knows_lengths=False)
    rates = TierRates(attention_knee_tokens=trace.knee_blocks())
    deep = run_product(trace, num_blocks, rates, knows_lengths=True)
    hits = {
        "lru": lru,
        "lfu": simulate(trace, num_blocks, Frequency()),
        "belady": belady,
        "ours": ours,
        "unknown": unknown,
    }
    return {
        "trace": trace.name,
        "share": share,
        "pool_tokens": num_blocks * trace.block_tokens,
        **{name: count.num_blocks * trace.block_tokens for name, count in hits.items()},
        "unbounded": simulate(trace, NEVER, Recency()).num_blocks * trace.block_tokens,
        "way": way(lru.num_blocks, ours.num_blocks, belady.num_blocks),
        "way_unknown": way(lru.num_blocks, unknown.num_blocks, belady.num_blocks),
        "compute_of_lru": deep.compute / lru.compute,
    }


def way(lru: int, ours: int, belady: int) -> float:
    """How far ours is on the way from LRU to the optimum; all the way where they are equal."""
    return (ours - lru) / (belady - lru) if belady > lru else 1.0


@define(eq=False)
class Leaf:
    """What the queue needs of a node, for timing it."""

    start: int
    num_hits: int
    state: SessionState | None
    expected_s: float
    last_used_s: float
    marked_s: float
    num_tokens: int = 64
    num_children: int = 0
    is_below: bool = False
    queued: int = 0
    attached: bool = True


def eviction_us(num_leaves: int, num_victims: int) -> float:
    """Microseconds to offer one leaf and take out another, in a queue of leaves of all kinds."""
    generator = random.Random(0)
    states = [None, None, *SessionState]

    def leaf(now: float) -> Leaf:
        return Leaf(
            start=generator.randrange(8192),
            num_hits=generator.randrange(6),
            state=generator.choice(states),
            expected_s=generator.lognormvariate(1.0, 1.5),
            last_used_s=now,
            marked_s=now,
        )

    leaves = [leaf(number / 100) for number in range(num_leaves + num_victims)]
    queue: EvictionQueue[Leaf] = EvictionQueue()
    for fresh in leaves[:num_leaves]:
        queue.offer(fresh)
    begin_s = time.perf_counter()
    for fresh in leaves[num_leaves:]:
        queue.offer(fresh)
        assert queue.pop(fresh.last_used_s) is not None
    return (time.perf_counter() - begin_s) / num_victims * 1e6


COLUMNS = ("lru", "lfu", "belady", "ours", "unknown", "unbounded")


def print_rows(rows: list[dict[str, Any]]) -> None:
    names = "".join(f"{name:>12}" for name in COLUMNS)
    print(f"{'trace':<9}{'pool':>5}{names}{'way':>7}{'unknown':>9}{'compute':>9}")
    for row in rows:
        counts = "".join(f"{row[name]:>12,}" for name in COLUMNS)
        print(
            f"{row['trace']:<9}{row['share']:>5.0%}{counts}"
            f"{row['way']:>7.2f}{row['way_unknown']:>9.2f}{row['compute_of_lru']:>8.2f}x"
        )
    print(
        "\nHit tokens; `way` is how far ours is from LRU to Belady, then the same for `unknown`; "
        "`compute` is what ours saves of it over LRU."
    )


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """The bars that do not hold."""
    below = [f"{r['trace']} {r['share']:.0%}: below LRU" for r in rows if r["ours"] < r["lru"]]
    airline_rows = [row for row in rows if row["trace"] == "airline"]
    return below + [
        f"airline {row['share']:.0%}: not halfway to Belady"
        for row in airline_rows
        if row["way"] < 0.5
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--half", choices=("all", "tuning", "holdout"), default="all")
    parser.add_argument("--agents", type=int, default=Service().num_agents)
    parser.add_argument("--decode", type=float, default=Service().decode_tokens_per_s)
    parser.add_argument("--prefill", type=float, default=Service().prefill_tokens_per_s)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    service = Service(
        num_agents=arguments.agents,
        prefill_tokens_per_s=arguments.prefill,
        decode_tokens_per_s=arguments.decode,
    )
    traces = (
        mooncake(arguments.shared, arguments.half),
        airline(arguments.shared, arguments.half, service),
    )
    rows = [compare(trace, share) for trace in traces for share in SHARES]
    cost_us = eviction_us(10_000, 50_000)
    print_rows(rows)
    print(f"An eviction among 10,000 leaves takes {cost_us:.1f} us.")
    failed = failures(rows)
    for line in failed:
        print(f"FAILED {line}")
    if arguments.json is not None:
        report = {"half": arguments.half, "service": asdict(service), "rows": rows}
        report["eviction_us"] = cost_us
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
