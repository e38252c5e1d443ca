"""Measure how fast `molcli data sample` writes text from a parent, and whether it is the parent's.

    python tests/bench/sampling.py SmolLM2.gguf --tokens 1.5M --length 512

Prints one JSON line: tokens a second of the second of two runs with the same seed, opening the
parent included; whether both wrote the same file; and for `--checked` documents the mean negative
log-likelihood of the sampled tokens under the parent beside the parent's mean entropy, in nats a
token. The two agree, within chance, where the text is drawn from the parent's distribution.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from json_lines import machine

from molcli.cli.plan import parse_count
from molcli.config.sections import SampleConfig
from molcli.families.parent import Parent, open_parent
from molcli.model.checkpoint import default_device
from molcli.model.parent import load_dense
from molcli.model.precision import fast_dtype
from molcli.stages.sample import sample


@torch.no_grad()
def likelihood(parent: Parent, documents: list[list[int]]) -> dict[str, float]:
    """Return mean negative log-likelihood and mean entropy of all tokens but the first ones."""
    model = load_dense(parent, fast_dtype(default_device()), default_device())
    likelihoods, entropies = [], []
    for ids in documents:
        tokens = torch.tensor(ids, device=model.device)
        odds = model(tokens[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
        likelihoods.append(-odds.gather(1, tokens[1:, None])[:, 0])
        entropies.append(-(odds.exp() * odds).sum(-1))
    found = torch.cat(likelihoods), torch.cat(entropies)
    deviation = (found[0] - found[1]).std() / len(found[0]) ** 0.5
    names = "negative_log_likelihood", "entropy", "standard_error"
    values = *(x.mean().item() for x in found), deviation.item()
    return dict(zip(names, values, strict=True))


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parent")
    parser.add_argument("--tokens", type=parse_count, default=1_500_000)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--checked", type=int, default=256, help="documents")
    args = parser.parse_args(words)
    parent, seconds = open_parent(args.parent), 0.0
    config = SampleConfig(tokens=args.tokens, length=args.length)
    with TemporaryDirectory(prefix="molcli-bench-") as folder:
        files = [Path(folder) / f"{i}.jsonl" for i in range(2)]
        for file in files:  # the first run compiles kernels
            start = time.perf_counter()
            sample(parent, config, file)
            seconds = time.perf_counter() - start
        texts = [file.read_text(encoding="utf-8") for file in files]
    documents = [json.loads(line)["input_ids"] for line in texts[0].splitlines()]
    tokens = sum(map(len, documents))
    row = {
        "tokens": tokens,
        "length": args.length,
        "tokens_per_second": round(tokens / seconds),
        "equal_runs": texts[0] == texts[1],
        **likelihood(parent, [ids for ids in documents if len(ids) > 1][: args.checked]),
        "command": " ".join(sys.argv),
        **machine(),
    }
    print(json.dumps(row))
    return row


if __name__ == "__main__":
    main()
