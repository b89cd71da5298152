"""The step thread: commands in, events out. The only file where threads meet asyncio."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from attrs import define, field, frozen

from agentrt.cache import Copy
from agentrt.deferred import Deferred, settle
from agentrt.errors import AgentrtError, EngineClosed, EngineFailed, RequestInvalid
from agentrt.metrics import Counters
from agentrt.mover import Job
from agentrt.observer import Observers
from agentrt.poster import Sink
from agentrt.precedence import Precedence
from agentrt.request import Request, State
from agentrt.runner import Runner, Ticket
from agentrt.sampler import Sampled
from agentrt.scheduler import Plan, Scheduler, Work
from agentrt.transfer import TransferThread
from agentrt.types import Finished, FinishReason, TextDelta, TokenLogprob

T = TypeVar("T")


@frozen
class Launched:
    """A step on the device, not collected yet."""

    ticket: Ticket
    begin_s: float
    plan: Plan


@define(eq=False)
class Loop:
    """Runs steps on a thread of its own while there is work.

    `_lock` guards `_inbox`, `_closed` and `_failure`: all that callers' threads touch. Everything
    else (requests, scheduler, cache, runner, counters) belongs to the step thread; callers reach
    it through `call`. Events go to `post`, once a step.
    """

    scheduler: Scheduler
    runner: Runner
    post: Callable[[list[tuple[Sink, Any]]], None]  # thread-safe; delivers on the event loop
    clock: Callable[[], float] = time.monotonic
    counters: Counters = field(factory=Counters)
    transfers: TransferThread | None = None  # where there are tiers below the device
    observers: Observers = field(factory=Observers)
    precedence: Precedence = field(factory=Precedence)  # over background work, where it waits there
    at_end: list[Callable[[], None]] = field(factory=list)  # called once no transfer runs any more
    _inbox: deque[Callable[[], None]] = field(factory=deque, init=False)
    _lock: threading.Condition = field(factory=threading.Condition, init=False)
    _closed: bool = field(default=False, init=False)
    _failure: BaseException | None = field(default=None, init=False)
    _live: dict[str, Request] = field(factory=dict, init=False)
    _events: list[tuple[Sink, Any]] = field(factory=list, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _is_idle: bool = field(default=True, init=False)  # nothing can run before a command comes
    _in_flight: Launched | None = field(default=None, init=False)
    _deferred: Deferred = field(factory=Deferred, init=False)
    _collected_s: float = field(default=0.0, init=False)  # when the last step was collected

    def start(self) -> None:
        """Run the steps on a new thread."""
        self._thread = threading.Thread(target=self._main, name="agentrt-step", daemon=True)
        self._thread.start()

    def adopt_thread(self) -> Callable[[], None]:
        """Make the current thread the step thread: it must call what this returns."""
        self._thread = threading.current_thread()
        return self._main

    # ---- called from any thread

    def submit(self, request: Request) -> None:
        """Queue a request. Raises EngineClosed or EngineFailed."""
        with self.observers.submission(request):
            self._command(lambda: self._accept(request))

    def cancel(self, request_id: str) -> None:
        """End a request before the next step. One that has ended already is left alone."""
        self.tell(lambda: self._cancel(request_id))

    def tell(self, command: Callable[[], None]) -> None:
        """Run a command on the step thread, between steps; not at all once the loop has ended,
        when there is nothing left that it could change."""
        with suppress(AgentrtError):
            self._command(command)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function on the step thread, between steps."""
        future: Future[T] = Future()
        self._command(lambda: settle(future, function))
        return future

    def call_after_transfers(self, function: Callable[[], T]) -> Future[T]:
        """The same, once the transfers that are planned or under way now have ended."""
        future: Future[T] = Future()
        mover = self.scheduler.mover

        def begin() -> None:
            jobs = set() if mover is None else mover.jobs()
            self._deferred.add(jobs, lambda: settle(future, function), future.set_exception)
            self._run_deferred()

        self._command(begin)
        return future

    def close(self) -> None:
        """Ask the thread to end; requests still alive get EngineClosed. Never waits."""
        with self._lock:
            self._closed = True
            self._lock.notify()

    def join(self) -> None:
        """Wait for the thread."""
        if self._thread is not None:
            self._thread.join()

    @property
    def num_queued(self) -> int:
        """Requests that are alive or on their way in."""
        return len(self._live) + len(self._inbox)

    def _command(self, command: Callable[[], None]) -> None:
        with self._lock:
            if self._failure is not None:
                raise EngineFailed("the engine's step thread failed") from self._failure
            if self._closed:
                raise EngineClosed("the engine is closed: open a new one")
            self._inbox.append(command)
            self.precedence.work()
            self._lock.notify()

    # ---- the step thread

    def _main(self) -> None:
        cause: BaseException | None = None
        try:
            while self._wait_for_work():
                self._step()
        except BaseException as exc:
            cause = exc
        self._end(cause)

    def _wait_for_work(self) -> bool:
        """Run the commands that came. False when the engine closes."""
        with self._lock:
            while self._is_idle and not self._inbox and not self._closed:
                self.precedence.rest(is_awaited=self.scheduler.is_awaited)
                if not self._lock.wait(self.scheduler.idle_s(self.clock())):
                    break
            closed, is_lull = self._closed, self._is_idle and not self._inbox
        self.precedence.work()
        while self._inbox:  # one at a time: should one fail, `_end` finds the others
            self._inbox.popleft()()
        self.scheduler.pauses.tick(self.clock())
        if self.scheduler.mover is not None:
            self.scheduler.mover.tiers.poll(most_writes=0)
        if is_lull:
            self._tend()
        self._start_transfers()
        self._flush()
        return not closed

    def _tend(self) -> None:
        """Do a little of what nobody waits for: while the device works, or nothing comes."""
        self.scheduler.admissions.catch_up()
        if self.scheduler.mover is not None:
            self.scheduler.mover.tend()
            self._start_transfers()

    def _move_blocks(self) -> None:
        """Copy what the device evicts out of its blocks, before anything is written there."""
        mover = self.scheduler.mover
        if mover is None or self.transfers is None:
            return
        for demotion in mover.take_demotions():
            self.transfers.save_now(demotion)
        if copies := mover.take_copies():
            self.runner.copy(copies)

    def _start_transfers(self, copies: Sequence[Copy] = ()) -> None:
        """Hand over what was planned, when all that must be copied before was copied."""
        self._move_blocks()
        if copies:
            self.runner.copy(copies)
        if self.scheduler.mover is not None and self.transfers is not None:
            for job in self.scheduler.mover.drain():
                self.transfers.submit(job)

    def transferred(self, job: Job, result: dict[str, float] | Exception | None) -> None:
        """A job has ended; called on the thread that did it, also while the engine closes."""

        def note() -> None:
            if isinstance(result, Exception):
                raise result
            assert self.scheduler.mover is not None
            self.scheduler.mover.finished(job, result, self.clock())
            self._deferred.ended(job)
            self._run_deferred()

        with self._lock:
            self._inbox.append(note)
            self._lock.notify()

    def _run_deferred(self) -> None:
        self._move_blocks()  # else what one of these wipes would come back
        self._deferred.run_ready()

    def _end(self, cause: BaseException | None) -> None:
        """Fail whoever still waits: nobody is left hanging."""
        with self._lock:
            self._closed = True
            self._failure = cause
        while self._inbox:
            # After a failure the scheduler may be in any state: a cancel that trips over it must
            # not keep the others from hearing. Its own request is told below.
            with suppress(Exception):
                self._inbox.popleft()()
        for request in list(self._live.values()):
            error: AgentrtError = EngineClosed("the engine was closed while the request ran")
            if cause is not None:
                error = EngineFailed(f"the engine's step thread failed: {cause!r}")
                error.__cause__ = cause
            self._send(request, error, self.clock())
        self._live.clear()
        self._flush()
        self.precedence.rest(is_awaited=False)
        if cause is None:
            self._end_transfers()
        elif self.transfers is not None:
            self.transfers.close()
        self._deferred.fail(EngineFailed("the engine's step thread failed"))
        for close in self.at_end:
            close()
        self.runner.close()

    def _end_transfers(self) -> None:
        """Save what finished turns left, so that the next start finds it."""
        if self.transfers is not None:
            assert self.scheduler.mover is not None
            self.scheduler.mover.jobs()  # plans them
            self._start_transfers()
            self.transfers.close()
            while self._inbox:
                self._inbox.popleft()()
            self.scheduler.mover.tiers.close()

    def _accept(self, request: Request) -> None:
        self._live[request.id] = request
        self.scheduler.submit(request)

    def _cancel(self, request_id: str) -> None:
        request = self._live.get(request_id)
        if request is not None:
            self.counters.cancelled += 1
            self._finish(request, "cancelled", self.clock())

    def _step(self) -> None:
        """Launch a step, then take the tokens of the one before: while the caller's side of that
        is done, the device works. A step whose tokens the next plan needs is collected at once.
        """
        begin = self.clock()
        plan = self.scheduler.plan(begin)
        self._start_transfers(plan.copies)
        self._is_idle = not plan.work and self._in_flight is None
        if self._is_idle:
            return
        previous, self._in_flight = self._in_flight, None
        if plan.work:
            self._in_flight = self._launch(plan)
            self._tend()
        if previous is not None:
            self._collect(previous)
        if self._in_flight is not None and not self._in_flight.ticket.runs_ahead:
            launched, self._in_flight = self._in_flight, None
            self._collect(launched)
        # Before a caller hears of the step: its `stats()` must add up.
        end = self.clock()
        self.counters.step_s += end - begin
        self._flush()
        self.counters.step_s += self.clock() - end

    def _launch(self, plan: Plan) -> Launched:
        """Hand a plan to the device. What it computes counts as computed from now on: the device
        does one step after the other."""
        counters, begin = self.counters, self.clock()
        counters.steps += 1
        counters.last_batch_rows = plan.num_rows
        counters.preempted = self.scheduler.num_preempted
        ticket: Ticket = self.runner.launch(plan)
        now = self.clock()
        counters.forward_s += now - begin
        for work in plan.work:
            self.scheduler.computed(work, now)
        self.observers.tell(lambda each: each.launched(plan, begin))
        if ticket.runs_ahead:
            for work in ticket.sampling:
                work.request.expect()
        return Launched(ticket, begin, plan)

    def _collect(self, launched: Launched) -> None:
        """Take a step's tokens; requests that ended since get none."""
        forward = self.clock()
        self.precedence.rest(is_awaited=self.scheduler.is_awaited)
        sampled = self.runner.collect(launched.ticket)
        self.precedence.work()
        now = self.clock()
        self.counters.forward_s += now - forward
        mover, seconds = self.scheduler.mover, now - max(launched.begin_s, self._collected_s)
        # Without a token to sample, `collect` need not have waited for the device.
        if mover is not None and launched.ticket.sampling:
            mover.note_step(launched.plan.chunks, launched.plan.num_rows, seconds)
        self._collected_s = now
        for work, results in zip(launched.ticket.sampling, sampled, strict=True):
            if work.request.state is not State.FINISHED:
                self._take_run(work, results, now)
        for work in launched.plan.work:
            if work.request.is_read:
                self._finish(work.request, "length", now)
        self.observers.tell(lambda each: each.collected(launched.plan, now))

    def _take_run(self, work: Work, results: Sequence[Sampled], now: float) -> None:
        """A step's tokens of one request came, or an error that is this request's alone."""
        request = work.request
        self.scheduler.checked(work, len(results) - 1)
        for index, result in enumerate(results):
            if request.state is State.FINISHED:
                return
            if index:
                request.num_computed += 1  # as the token before was drafted
            if isinstance(result, RequestInvalid):
                self._fail(request, result, now)
            else:
                self._take_token(request, *result, now, is_newest=index + 1 == len(results))

    def _fail(self, request: Request, error: RequestInvalid, now: float) -> None:
        request.drop_pending()
        self.scheduler.finish(request, now)
        del self._live[request.id]
        self._send(request, error, now)

    def _send(self, request: Request, end: Finished | AgentrtError, now: float) -> None:
        """A request's last event."""
        reason = end.completion.finish_reason if isinstance(end, Finished) else end
        self.observers.tell(lambda each: each.ended(request, reason, now))
        self._events.append((request.sink, end))

    def _take_token(
        self,
        request: Request,
        token_id: int,
        logprob: TokenLogprob | None,
        now: float,
        *,
        is_newest: bool,
    ) -> None:
        """Note a token, and end the request if it was the last."""
        if request.first_token_s is None:
            request.first_token_s = now
        request.append(token_id)
        if logprob is not None:
            request.logprobs.append(logprob)
        reason = request.limit_reached(token_id, is_newest=is_newest)
        is_control = reason == "stop" and (
            token_id in request.eos_token_ids or token_id in request.options.stop_token_ids
        )
        text = "" if is_control else request.text.push(token_id)
        if request.text.stopped:
            reason = "stop"
        logprobs = () if logprob is None else (logprob,)
        self._events.append((request.sink, TextDelta(text, (token_id,), logprobs)))
        if reason is not None:
            self._finish(request, reason, now)

    def _finish(self, request: Request, reason: FinishReason, now: float) -> None:
        rest = request.text.finish()
        if rest:
            self._events.append((request.sink, TextDelta(rest, ())))
        request.drop_pending()
        self.scheduler.finish(request, now)
        del self._live[request.id]
        self.counters.finished += not request.is_prefill
        self.counters.output_tokens += request.num_output_tokens
        self._send(request, Finished(request.completion(reason, now)), now)

    def _flush(self) -> None:
        if self._events:
            events, self._events = self._events, []
            self.post(events)
