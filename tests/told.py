"""A drafter that knows what will come: right drafts and wrong ones, as a test wants them."""

from collections.abc import Sequence

import numpy as np
from attrs import define

from agentrt.cuda_runner import CUDA_LIMITS
from agentrt.speculate import Drafter


@define
class Told(Drafter):
    """Guesses what it was told will follow a prompt; of the output tokens in `wrong`, something
    else."""

    texts: Sequence[tuple[int, list[int]]] = ()  # prompt's length, and prompt and output
    wrong: frozenset[int] = frozenset()
    longest: int = 7

    def _guess(self, request, words, num_tokens):
        num_prompt, text = next(
            one for one in self.texts if one[1][: one[0]] == words[: one[0]].tolist()
        )
        begin = len(words) + request.num_pending
        guess = np.array(text[begin : begin + min(num_tokens, self.longest)], dtype=np.int32)
        for place in range(len(guess)):
            if begin + place - num_prompt in self.wrong:
                guess[place] = (guess[place] + 1) % 250
        return guess


def told(prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], **options) -> Told:
    pairs = zip(prompts, outputs, strict=True)
    texts = [(len(prompt), [*prompt, *output]) for prompt, output in pairs]
    return Told(CUDA_LIMITS, texts=texts, **options)
