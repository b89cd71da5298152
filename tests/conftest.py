"""Every async test runs on two kinds of event loop, and agentrt must block neither."""

import asyncio
import os
import sys
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: other workers need the other cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from blockbuster import BlockBuster, blockbuster_ctx
from fakes import TEMPLATE, byte_tokenizer
from gpu import dot_in_order

import agentrt
import agentrt.cache
from agentrt.grammar import GrammarCompiler
from agentrt.template import ChatTemplate

if not torch.cuda.is_available():  # before any kernel is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


def debug_loop() -> asyncio.AbstractEventLoop:
    """A loop that finds more: debug checks, and eager tasks where Python has them (3.12)."""
    loop = asyncio.new_event_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 10.0  # seconds; a busy machine is no error
    if sys.version_info >= (3, 12):
        loop.set_task_factory(asyncio.eager_task_factory)
    return loop


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item):
    return {"default": asyncio.new_event_loop, "debug": debug_loop}


@pytest.fixture(scope="session", autouse=True)
def blockbuster() -> Iterator[BlockBuster]:
    """A blocking call below agentrt's own code on an event loop raises BlockingError."""
    with blockbuster_ctx([agentrt, agentrt.cache]) as active:
        yield active


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """A real tokenizer without merges: a token a byte, and the tokens that mark turns."""
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def sums_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `gpu.dot_in_order`; on a GPU the tensor cores do so."""
    if not torch.cuda.is_available():
        from triton.runtime.interpreter import InterpreterBuilder

        monkeypatch.setattr(InterpreterBuilder, "create_dot", dot_in_order())


@pytest.fixture(scope="session")
def compiler(tokenizer) -> GrammarCompiler:
    """Of grammars, for that tokenizer."""
    return GrammarCompiler(tokenizer.backend, tokenizer.vocab_size, tokenizer.eos_token_ids)


@pytest.fixture(scope="session")
def template() -> ChatTemplate:
    return ChatTemplate(TEMPLATE)
