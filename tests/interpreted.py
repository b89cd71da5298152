"""A CudaRunner on a CPU: its kernels interpreted, its graphs computed anew at each replay."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import define, field, frozen
from fakes import resolved
from gpu import DEVICE, HAS_GPU

from agentrt.cache import PrefixCache
from agentrt.config import EngineConfig, ResolvedConfig
from agentrt.cuda_runner import CudaRunner
from agentrt.kernels.cuda import CudaOps
from agentrt.kernels.dispatch import Compute
from agentrt.loop import Loop
from agentrt.models.llama import LlamaModel, expected_shapes
from agentrt.models.load import load_model
from agentrt.request import Request, State
from agentrt.scheduler import Plan, Scheduler
from agentrt.speculate import Drafter
from agentrt.step_device import Captured, CudaDevice, StepDevice

VOCAB = 272  # room for the byte tokenizer
SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@frozen
class InterpretedDevice:
    """See `agentrt.step_device.StepDevice`: what is launched is done at once."""

    def capture(self, compute: Callable[[], torch.Tensor], pool: Any = None) -> Captured:
        logits = compute()

        @torch.inference_mode()
        def replay() -> None:
            logits.copy_(compute())

        return Captured(replay, logits)

    def event(self) -> "InterpretedDevice":
        return self

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


def step_device() -> StepDevice:
    """The GPU if there is one."""
    return CudaDevice() if HAS_GPU else InterpretedDevice()


def open_runner(folder: Path, config: ResolvedConfig, *, deterministic: bool = False) -> CudaRunner:
    """Of a model with weights that are the same each time; `folder` is for its config.json."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    plain = EngineConfig(device="cpu", dtype="bfloat16", random_weights=True)
    spec = load_model(folder, plain).model.spec
    ops = CudaOps(DEVICE, pdl=HAS_GPU, deterministic=deterministic)
    generator = torch.Generator().manual_seed(1)

    def tensors():
        for name, shape in expected_shapes(spec).items():
            weight = torch.randn(shape, generator=generator) * (0.4 if len(shape) > 1 else 1)
            yield name, weight.to(DEVICE, torch.bfloat16)

    model = LlamaModel.build(spec, ops, tensors(), config.max_context_tokens)
    compute = Compute(device=DEVICE, dtype=torch.bfloat16, ops=ops, weights="bfloat16")
    return CudaRunner.open(model, compute, config, step_device())


def small_config(**changes: int) -> ResolvedConfig:
    return resolved(**({"num_blocks": 48, "block_tokens": 16, "step_tokens": 64} | changes))


@define
class Drive:
    """A loop that runs in the test's own thread, above a new cache."""

    runner: CudaRunner
    drafter: Drafter | None
    plans: list[Plan] = field(factory=list, init=False)
    num_ahead: int = field(default=0, init=False)
    ended: list[Any] = field(factory=list, init=False)
    loop: Loop = field(init=False)

    def __attrs_post_init__(self) -> None:
        config = self.runner.config
        cache = PrefixCache(config.num_blocks, config.block_tokens)
        scheduler = Scheduler(config, cache, drafter=self.drafter)
        self.loop = Loop(scheduler, self, lambda events: self.ended.extend(events))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def launch(self, plan: Plan) -> Any:
        self.loop.scheduler.check()
        self.plans.append(plan)
        ticket = self.runner.launch(plan)
        self.num_ahead += ticket.runs_ahead
        return ticket

    def run(self, requests: Sequence[Request]) -> list[list[int]]:
        """The outputs, in the order of the requests."""
        for request in requests:
            self.loop._accept(request)
        while any(request.state is not State.FINISHED for request in requests):
            self.loop._step()
        return [request.output.tolist() for request in requests]
