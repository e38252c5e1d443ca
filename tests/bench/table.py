"""A markdown table of the rows of tests/bench/upcycle.py."""

from typing import Any

Rows = list[dict[str, Any]]
SPEEDS = {"prefill": "prefill/s", "decode_1": "decode/s", "decode_32": "decode of 32/s"}


def table(rows: Rows) -> str:
    """Return a line per case, settings, training tokens and learning rates, and a caption.

    Of rows that differ in their figures alone, the last one counts.
    """
    rows = list({(*_group(row), row.get("seed")): row for row in rows}.values())
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        for one in _with_peer(row):
            groups.setdefault(_group(one), []).append(one)
    texts = list(dict.fromkeys(name for row in rows for name in row.get("texts", {})))
    keys = _distinct(groups)
    timed = any("speed" in row for row in rows)
    lines: list[list[str]] = []
    for (parent, case, settings, tokens, text, rates), own in groups.items():
        line = {"parent": parent} if "parent" in keys else {}
        line |= {"case": case}
        line |= {"settings": " ".join(settings)} if "settings" in keys else {}
        line["trained on"] = f"{tokens:,}"
        line |= {"text": text} if "text" in keys else {}
        line["rates"] = rates
        line["seeds"] = str(len({row.get("seed") for row in own}))
        line["total"] = f"{own[0]['total'] / 1e6:.0f}M"
        line["share"] = f"{own[0]['share']:.1%}"
        for name in texts:
            line[f"KL {name}"] = spread(
                [row["texts"][name]["kl"] for row in own if name in row.get("texts", {})]
            )
        line |= {"gap": _mean(own, "gap"), "same": _mean(own, "agreement")}
        line |= {"recall": recall(own), "greedy": _mean(own, "greedy", 1)}
        line |= {"s": _mean(own, "seconds", 0), "trained/s": _mean(own, "tokens_per_second", 0)}
        line["GB"] = _mean(own, "peak_gb", 1)
        if timed:
            found = [row["speed"] for row in own if "speed" in row]
            line |= {head: _mean(found, name, 0) for name, head in SPEEDS.items()}
        if not lines:
            lines += [list(line), ["---"] * len(line)]
        lines.append(list(line.values()))
    shown = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([*shown, *_captions(rows, texts)])


def _group(row: dict[str, Any]) -> tuple[Any, ...]:
    settings, text = tuple(row.get("settings", ())), row.get("train_data", row.get("data", ""))
    if not isinstance(text, str):
        text = ", ".join(f"{source}={weight:g}" for source, weight in text.items())
    key = row.get("parent", ""), row["case"], settings, row["train_tokens"], text
    return *key, row.get("rates", "–")


def _with_peer(row: dict[str, Any]) -> Rows:
    """Return the row, and for a parent one with the speed of its transformers model."""
    peer = row.get("speed", {}).get("transformers")
    if peer is None:
        return [row]
    return [row, row | {"case": f"{row['case']}, transformers", "speed": peer}]


def _distinct(groups: dict[tuple[Any, ...], Rows]) -> set[str]:
    """Return which of parent, settings and text tell lines apart."""
    parts = {"parent": 0, "settings": 2, "text": 4}  # in a group; what is before it is the same
    return {
        name
        for name, i in parts.items()
        if len({group[: i + 1] for group in groups}) > len({group[:i] for group in groups})
    }


def _captions(rows: Rows, texts: list[str]) -> list[str]:
    """Return the figures of each parent on the texts."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        own = found.setdefault(row.get("parent", ""), {})
        for name in texts:
            figures = row.get("texts", {}).get(name, {})
            if "parent_ce" in figures:
                own[f"cross-entropy {name}"] = f"{figures['parent_ce']:.3f}"
        if parent := recall([row], of_parent=True).strip("–"):
            own["recall"] = parent
    lines = []
    for parent, figures in found.items():
        if figures:
            name = f"{parent}: " if len(found) > 1 else "The parent: "
            lines += ["", name + ", ".join(f"{key} {value}" for key, value in figures.items())]
    return lines


def recall(rows: Rows, *, of_parent: bool = False) -> str:
    """Format the model's recall in percent, by distance, as the mean over rows."""
    found = [row["recall"] for row in rows if row.get("recall")]
    if not found:
        return "–"
    means = (sum(r[d][-1 if of_parent else 0] for r in found) / len(found) for d in found[0])
    return " / ".join(f"{100 * mean:.0f}" for mean in means)


def _mean(rows: Rows, name: str, digits: int = 3) -> str:
    return spread([row[name] for row in rows if row.get(name) is not None], digits)


def spread(values: list[float], digits: int = 3) -> str:
    """Format the mean, and half the range of several values."""
    if not values:
        return "–"
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean:,.{digits}f}" + (f" ± {half:,.{digits}f}" if len(values) > 1 else "")
