"""SmolLM2's greedy text on a GPU in bf16, against transformers in float32 and in bf16.

    python benchmarks/gpu_parity.py --shared DIR [--prompts 50] [--tokens 64]   (needs `accelerate`)

The prompts are those of `parity.py`. agentrt continues them; transformers then reads each prompt
and continuation in one forward, in float32 (no tf32) and in bf16. For every place in these texts,
the token that agentrt wrote and the one that transformers would write in bf16 are compared with
float32's. Fails if more of agentrt's differ.
"""

import asyncio

import torch
from attrs import evolve
from parity import CONFIG, Row, arguments_of, continuations, peer, prompts


def read(dtype: torch.dtype, given: list[list[int]], got: list[Row]) -> list[torch.Tensor]:
    """Log-probabilities [tokens, vocabulary] at each place of the continuations."""
    model, found = peer(dtype, "cuda"), []
    for prompt, row in zip(given, got, strict=True):
        ids = torch.tensor([prompt + [token for token, _ in row]], device="cuda")
        with torch.inference_mode():
            logits = model(ids[:, :-1], logits_to_keep=len(row)).logits[0]
        found.append(logits.float().log_softmax(-1))
    return found


def main() -> None:
    arguments = arguments_of(__doc__)
    given = prompts(arguments.shared, arguments.prompts)
    config = evolve(CONFIG, device="cuda", dtype="bfloat16")
    got = asyncio.run(continuations(given, arguments.tokens, config))
    exact = torch.cat(read(torch.float32, given, got))
    theirs = torch.cat(read(torch.bfloat16, given, got))
    written = torch.tensor([token for row in got for token, _ in row], device="cuda")[:, None]
    told = torch.tensor([logprob for row in got for _, logprob in row], device="cuda")[:, None]
    expected, differ = exact.gather(1, written), {}
    for name, tokens, logprobs in (
        ("agentrt", written, told),
        ("transformers", theirs.argmax(-1, keepdim=True), theirs.gather(1, written)),
    ):
        differ[name] = int((tokens != exact.argmax(-1, keepdim=True)).sum())
        error = float((logprobs - expected).abs().max())
        print(
            f"{name} in bf16: {differ[name]} of {len(written)} tokens are not float32's; largest "
            f"error of a log-probability {error:.3f}"
        )
    raise SystemExit(differ["agentrt"] > differ["transformers"])


if __name__ == "__main__":
    main()
