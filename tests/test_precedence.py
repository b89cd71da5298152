"""Background work waits for the step thread: in which order, and for how long at most."""

import threading
from collections import deque

import numpy as np
import pytest
from fakes import FakeClock, FakeRunner, greedy_after, make_request, resolved

from agentrt.cache import PrefixCache
from agentrt.cache.disk import DiskTier
from agentrt.cache.keys import Fingerprint, chunk_key, root_key
from agentrt.cache.tier import Record
from agentrt.loop import Loop
from agentrt.mover import Job, Part
from agentrt.precedence import Precedence
from agentrt.scheduler import Scheduler
from agentrt.transfer import TransferThread

BOUND_S = 1.0


class Waiting:
    """A gate's condition without threads: each wait is a step of the fake clock, or an event."""

    def __init__(self, clock, events):
        self.clock, self.events = clock, deque(events)
        self.waited_s = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait(self, timeout_s):
        self.waited_s.append(timeout_s)
        if self.events:
            self.events.popleft()()
        else:
            self.clock.now += timeout_s

    def notify_all(self):
        pass


def gate_of(*events):
    clock = FakeClock(10.0)
    gate = Precedence(BOUND_S, clock)
    waiting = gate._changed = Waiting(clock, events)
    return gate, clock, waiting


def test_nothing_waits_while_the_step_thread_rests():
    gate, clock, waiting = gate_of()
    gate.pass_(clock())
    gate.work()
    gate.rest(is_awaited=False)
    gate.pass_(clock())
    assert not waiting.waited_s


@pytest.mark.parametrize("hold", [lambda g: g.work(), lambda g: g.rest(is_awaited=True)])
def test_it_passes_once_the_step_thread_lets_go(hold):
    gate, clock, waiting = gate_of(lambda: gate.rest(is_awaited=False))
    hold(gate)
    gate.pass_(clock())
    assert waiting.waited_s == [BOUND_S]
    assert clock() == 10.0


def test_it_is_held_no_longer_than_the_bound_and_then_not_at_all():
    gate, clock, waiting = gate_of()
    gate.work()
    gate.pass_(since_s=9.75)
    assert waiting.waited_s == [0.75]
    for _ in range(3):  # the units that follow of the same work
        gate.pass_(since_s=9.75)
    assert waiting.waited_s == [0.75]
    assert clock() == 10.75


def test_what_becomes_urgent_passes():
    urgent = []
    gate, clock, waiting = gate_of(lambda: None, lambda: urgent.append(True))
    gate.work()
    gate.pass_(clock(), lambda: bool(urgent))
    assert waiting.waited_s == [BOUND_S, BOUND_S]
    assert clock() == 10.0


class Copier:
    """Notes what is copied, and tells when the n-th copy was made."""

    def __init__(self):
        self.copied, self.ended, self.changed = [], [], threading.Condition()

    def begin(self):
        pass

    def save(self, part, block_ids, after):
        self.note(f"save {part.start}")

    def load(self, part, source, block_ids, after):
        self.note(f"load {part.start}")

    def sync(self):
        pass

    def note(self, what):
        with self.changed:
            self.copied.append(what)
            self.changed.notify_all()

    def until(self, num):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.copied) >= num, 20)
            return list(self.copied)


def job_of(*starts, is_load=False, num_blocks=2):
    parts = tuple(Part(start=s, num_tokens=8, first=s, end=s + 8) for s in starts)
    return Job(
        is_load=is_load, parts=parts, chunks=(), block_ids=tuple(range(num_blocks)), lease=None
    )


class Watched(Precedence):
    """A gate whose bound never comes by itself, and that tells when someone waits at it."""

    def __init__(self):
        super().__init__(most_held_s=1e6)
        self.waits = threading.Semaphore(0)

    def pass_(self, since_s, is_urgent):
        def asked():
            urgent = is_urgent()
            if not urgent:
                self.waits.release()
            return urgent

        super().pass_(since_s, asked)

    def until_someone_waits(self):
        assert self.waits.acquire(timeout=20)


@pytest.fixture
def transfers():
    copier = Copier()
    thread = TransferThread(
        copier, None, lambda job, _: copier.ended.append(job), gate=Watched(), most_held_blocks=5
    )
    yield thread
    thread.close()


def test_a_save_waits_and_a_load_does_not(transfers):
    transfers.gate.work()
    transfers.submit(job_of(0, 8))
    transfers.gate.until_someone_waits()
    transfers.submit(job_of(100, is_load=True))
    assert transfers.copier.until(1) == ["load 100"]
    transfers.gate.until_someone_waits()
    transfers.gate.rest(is_awaited=False)
    assert transfers.copier.until(3) == ["load 100", "save 0", "save 8"]


def test_saves_that_keep_many_blocks_do_not_wait(transfers):
    transfers.gate.work()
    transfers.submit(job_of(0))
    transfers.submit(job_of(8))
    transfers.gate.until_someone_waits()
    assert transfers.copier.copied == []
    transfers.submit(job_of(16))  # 6 blocks: one save must be made, then the others may wait
    assert transfers.copier.until(1) == ["save 0"]
    transfers.gate.until_someone_waits()
    assert transfers.copier.copied == ["save 0"]


def test_the_end_does_not_wait_for_the_gate(transfers):
    transfers.gate.work()
    jobs = [job_of(0, 8), job_of(16)]
    for job in jobs:
        transfers.submit(job)
    transfers.gate.until_someone_waits()
    transfers.close()
    assert transfers.copier.copied == ["save 0", "save 8", "save 16"]
    assert transfers.copier.ended == jobs


@pytest.mark.parametrize("end", [DiskTier.flush, DiskTier.close])
def test_the_disk_writer_waits_until_someone_waits_for_it(tmp_path, end):
    fingerprint = Fingerprint(
        namespace="", model_digest="", layout="", dtype="", arithmetic="", token_bytes=4
    )
    gate = Watched()
    gate.work()
    disk = DiskTier(
        tmp_path, quota_bytes=4 << 20, fingerprint=fingerprint, clock=lambda: 0.0, gate=gate
    )
    tokens = np.arange(8, dtype=np.int32)
    parent = root_key(fingerprint)
    record = Record(
        key=chunk_key(parent, tokens),
        parent=parent,
        token_ids=tokens,
        start=0,
        num_bytes=32,
        last_used_s=0.0,
    )
    assert disk.put(record, [bytes(32)])
    gate.until_someone_waits()
    assert disk.stats().written == 0
    end(disk)
    assert disk.stats().written == 1
    disk.close()


class Told(Precedence):
    """Notes what the step thread says, in order."""

    def __init__(self, said):
        super().__init__()
        self.said = said

    def work(self):
        self.said.append("work")

    def rest(self, *, is_awaited):
        self.said.append("awaits" if is_awaited else "rest")


def test_the_step_thread_holds_from_the_submission_to_the_first_token():
    said = []
    config = resolved(num_blocks=40)
    cache = PrefixCache(config.num_blocks, config.block_tokens)
    runner = FakeRunner(config.num_blocks, before_step=lambda: said.append("launch"))
    ended = threading.Event()

    def post(events):
        for sink, event in events:
            sink(event)

    def sink(event):
        said.append("token" if hasattr(event, "token_ids") and event.token_ids else "end")

    loop = Loop(Scheduler(config, cache), runner, post, precedence=Told(said))

    def last(event):
        sink(event)
        if said[-1] == "end":
            ended.set()

    request = make_request([5, 6, 7], 2, sink=last)
    loop.submit(request)
    loop.start()
    assert ended.wait(20)
    loop.close()
    loop.join()
    assert request.output.tolist() == greedy_after([5, 6, 7], 2)
    short = [each for i, each in enumerate(said) if each != "work" or said[i - 1 : i] != ["work"]]
    first = ["work", "launch", "awaits", "work", "token"]
    assert short[:5] == first, short
    assert short[5:10] == ["work", "launch", "rest", "work", "token"], short
    assert short[-1] == "rest", short
