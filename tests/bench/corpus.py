"""Divide a corpus into the texts of an experiment, one source left out of training and fitting.

    python tests/bench/corpus.py CORPUS.jsonl.xz OUT --unseen SOURCE

CORPUS has one document a line, with the fields `source`, `split` (train or heldout) and `text`.
Writes wiki.jsonl (train documents of sources with "wiki" in their name), docs.jsonl (those of all
other sources but the unseen), heldout-wiki.jsonl, heldout-docs.jsonl and unseen.jsonl (held-out
documents of the unseen sources), and prints how many documents each has.
"""

import argparse
import json
import lzma
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

NAMES = "wiki", "docs", "heldout-wiki", "heldout-docs", "unseen"


def text_of(document: dict[str, Any], unseen: list[str]) -> str | None:
    """Return the name of the text that a document belongs to, None for none."""
    held = document["split"] == "heldout"
    if document["source"] in unseen:
        return "unseen" if held else None
    name = "wiki" if "wiki" in document["source"] else "docs"
    return f"heldout-{name}" if held else name


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--unseen", action="append", default=[], metavar="SOURCE")
    args = parser.parse_args(words)
    args.out.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        opened: Any = lzma.open if args.corpus.suffix == ".xz" else open
        lines = stack.enter_context(opened(args.corpus, "rt", encoding="utf-8"))
        files = {
            name: stack.enter_context((args.out / f"{name}.jsonl").open("w", encoding="utf-8"))
            for name in NAMES
        }
        for line in lines:
            document = json.loads(line)
            name = text_of(document, args.unseen)
            if name is not None:
                files[name].write(json.dumps({"text": document["text"]}) + "\n")
                counts[name] += 1
    print(*(f"{name} {counts[name]}" for name in NAMES), sep="\n")


if __name__ == "__main__":
    main()
