"""The JSON-schema test suite: what llguidance supports of it, and whether outputs fit.

    pip download --no-deps --no-binary :all: jsonschema==4.23.0    # its source holds the suite
    python benchmarks/schema_suite.py jsonschema-4.23.0.tar.gz [--walks 5] [--draft 2020-12]

Each is read as the draft that its `$schema` names; where a schema of an older draft has none, that
draft's is added, as the suite means it. For each schema that compiles, random walks through the
token masks write outputs, as a model of pure chance would; each must validate with `jsonschema`. Of
the suite's own instances, those that are invalid must be refused, in the layout of `json.dumps`;
how many of the valid ones are taken is counted too (an order of keys other than the schema's is
not, and bounds are ours where the schema has none). No model runs.
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

MOST_TOKENS = 400
REASONS = {  # how the library's message begins, and what it is about
    "Resource '": "$ref to another document",
    "Anchor '": "$ref to an anchor",
    "Pointer '": "$ref that leads nowhere here",
    "oneOf": "oneOf that may not be anyOf",
    "Unknown format": "format that is not known",
    "the pattern": "pattern",
    "patternProperty": "patternProperties that overlap",
    "Unsatisfiable": "nothing fits",
}
DIALECTS = {
    "7": "http://json-schema.org/draft-07/schema#",
    "6": "http://json-schema.org/draft-06/schema#",
    "4": "http://json-schema.org/draft-04/schema#",
}
VALIDATORS = {
    "2020-12": jsonschema.Draft202012Validator,
    "2019-09": jsonschema.Draft201909Validator,
    "7": jsonschema.Draft7Validator,
    "6": jsonschema.Draft6Validator,
    "4": jsonschema.Draft4Validator,
}


def schemas(archive: Path, draft: str) -> Iterator[tuple[str, Any, list[dict[str, Any]]]]:
    """Each schema of a draft, by the file and the case that it is of; and instances."""
    folder = f"/json/tests/draft{draft}/"
    with tarfile.open(archive) as files:
        for member in sorted(files.getmembers(), key=lambda member: member.name):
            if folder not in member.name or not member.name.endswith(".json"):
                continue
            opened = files.extractfile(member)
            assert opened is not None
            for group in json.loads(opened.read()):
                name = f"{member.name.split(folder)[1]}: {group['description']}"
                yield name, group["schema"], group["tests"]


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


def takes(constraint: Constraint, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the grammar takes the whole text, and may end there."""
    return all(map(constraint.accept, tokenizer.encode(text))) and constraint.may_end


def check(validator: Any, text: str) -> str | None:
    """What is wrong with an output. Raises re.error where Python cannot read the schema's regex."""
    try:
        validator.validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as exc:
        return str(exc).splitlines()[0]
    return None


def outcome(validator: Any, text: str | None, name: str) -> str:
    """Which count an output belongs to."""
    if text is None:
        return "too long"
    try:
        wrong = check(validator, text)
    except re.error:
        return "not checked, by Python's re"
    if wrong is None:
        return "valid"
    print(f"WRONG {name}: {text!r}: {wrong}", flush=True)
    return "wrong"


def reason_of(error: GrammarInvalid) -> str:
    """What a schema was refused for: a keyword or two where the library names them."""
    said = str(error).splitlines()[0]
    if keys := re.search(r"Unimplemented keys: (.*)", said):
        return keys[1]
    said = re.sub(r".*failed to compile JSON schema: ", "", said)
    for start, name in REASONS.items():
        if said.startswith(start):
            return name
    return said[:100]


def judged(taken: bool, instance: dict[str, Any], name: str) -> str:
    """Which count an instance of the suite belongs to."""
    if instance["valid"]:
        return "valid instances taken" if taken else "valid instances not taken"
    if taken:
        print(f"TAKEN {name}: {instance['description']}: {instance['data']!r}", flush=True)
    return "invalid instances taken" if taken else "invalid instances refused"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help="jsonschema-*.tar.gz")
    parser.add_argument("--walks", type=int, default=5, help="outputs of each schema")
    parser.add_argument("--draft", choices=VALIDATORS, default="2020-12")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokenizer = load_tokenizer(locate("smollm2-135m", default_cache_dir()))
    compiler = GrammarCompiler(tokenizer.backend, tokenizer.vocab_size, tokenizer.eos_token_ids)
    ends = np.array(
        [*tokenizer.eos_token_ids, *(tokenizer.encode(mark)[0] for mark in ['"', "}", "]", "1"])]
    )
    validator_class = VALIDATORS[options.draft]
    chance = np.random.default_rng(options.seed)
    count: collections.Counter[str] = collections.Counter()
    refused: collections.Counter[str] = collections.Counter()
    for name, schema, instances in schemas(options.archive, options.draft):
        if not isinstance(schema, dict):
            continue
        count["schemas"] += 1
        if options.draft in DIALECTS:
            schema = {"$schema": DIALECTS[options.draft], **schema}
        try:
            grammar = output_form(schema).grammar
            compiler.compile(grammar)
        except GrammarInvalid as exc:
            refused[reason_of(exc)] += 1
            continue
        count["supported"] += 1
        validator = validator_class(schema, format_checker=validator_class.FORMAT_CHECKER)
        for _ in range(options.walks):
            text = walk(compiler.compile(grammar), tokenizer, ends, chance)
            count[outcome(validator, text, name)] += 1
        for instance in instances:
            text = json.dumps(instance["data"], ensure_ascii=False)
            taken = takes(compiler.compile(grammar), tokenizer, text)
            count[judged(taken, instance, name)] += 1
    print(f"draft {options.draft}: {', '.join(f'{name} {num}' for name, num in count.items())}")
    for reason, number in refused.most_common():
        print(f"  refused {number:3}  {reason}")


if __name__ == "__main__":
    main()
