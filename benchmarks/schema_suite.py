"""The JSON-schema test suite: what llguidance supports of it, and whether outputs fit.

    pip download --no-deps --no-binary :all: jsonschema==4.23.0    # its source holds the suite
    python benchmarks/schema_suite.py jsonschema-4.23.0.tar.gz [--walks 5]

For each schema of draft 2020-12 that compiles, random walks through the token masks write outputs,
as a model of pure chance would; each must validate with `jsonschema`. No model runs.
"""

import argparse
import collections
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from agentrt.config import default_cache_dir
from agentrt.errors import GrammarInvalid
from agentrt.grammar import Constraint, GrammarCompiler
from agentrt.registry import locate
from agentrt.structured import output_form
from agentrt.tokenizer import Tokenizer, load_tokenizer

FOLDER = "/json/tests/draft2020-12/"
MOST_TOKENS = 400
CHECKER = jsonschema.Draft202012Validator.FORMAT_CHECKER


def schemas(archive: Path) -> Iterator[tuple[str, Any]]:
    """Each schema of the suite, by the file and the case that it is of."""
    with tarfile.open(archive) as files:
        for member in sorted(files.getmembers(), key=lambda member: member.name):
            if FOLDER not in member.name or not member.name.endswith(".json"):
                continue
            opened = files.extractfile(member)
            assert opened is not None
            for group in json.loads(opened.read()):
                name = f"{member.name.split(FOLDER)[1]}: {group['description']}"
                yield name, group["schema"]


def walk(
    constraint: Constraint, tokenizer: Tokenizer, ends: np.ndarray, chance: np.random.Generator
) -> str | None:
    """A text of pure chance, which leans to what ends things; None where it is too long."""
    tokens: list[int] = []
    while not constraint.is_finished:
        bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits)
        likely = np.intersect1d(allowed, ends)
        token = int(chance.choice(likely if len(likely) and chance.random() < 0.5 else allowed))
        assert constraint.accept(token)
        if token in tokenizer.eos_token_ids:
            break
        tokens.append(token)
        if len(tokens) > MOST_TOKENS:
            return None
    return tokenizer.decode(tokens)


def check(schema: dict[str, Any], text: str) -> str | None:
    """What is wrong with an output. Raises re.error where Python cannot read the schema's regex."""
    try:
        value = json.loads(text)
        jsonschema.Draft202012Validator(schema, format_checker=CHECKER).validate(value)
    except (ValueError, jsonschema.ValidationError) as exc:
        return str(exc).splitlines()[0]
    return None


def outcome(schema: dict[str, Any], text: str | None, name: str) -> str:
    """Which count an output belongs to."""
    if text is None:
        return "too long"
    try:
        wrong = check(schema, text)
    except re.error:
        return "not checked, by Python's re"
    if wrong is None:
        return "valid"
    print(f"WRONG {name}: {text!r}: {wrong}", flush=True)
    return "wrong"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help="jsonschema-*.tar.gz")
    parser.add_argument("--walks", type=int, default=5, help="outputs of each schema")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokenizer = load_tokenizer(locate("smollm2-135m", default_cache_dir()))
    compiler = GrammarCompiler(tokenizer.backend, tokenizer.vocab_size, tokenizer.eos_token_ids)
    ends = np.array(
        [*tokenizer.eos_token_ids, *(tokenizer.encode(mark)[0] for mark in ['"', "}", "]", "1"])]
    )
    chance = np.random.default_rng(options.seed)
    count: collections.Counter[str] = collections.Counter()
    refused: collections.Counter[str] = collections.Counter()
    for name, schema in schemas(options.archive):
        if not isinstance(schema, dict):
            continue
        count["schemas"] += 1
        try:
            grammar = output_form(schema).grammar
            compiler.compile(grammar)
        except GrammarInvalid as exc:
            refused[str(exc).split("compiled: ")[-1].splitlines()[0][:60]] += 1
            continue
        count["supported"] += 1
        for _ in range(options.walks):
            text = walk(compiler.compile(grammar), tokenizer, ends, chance)
            count[outcome(schema, text, name)] += 1
    print(", ".join(f"{name} {number}" for name, number in count.items()))
    for reason, number in refused.most_common(12):
        print(f"  refused {number:3}  {reason}")


if __name__ == "__main__":
    main()
