"""Text sampled from the parent: the data set of those who have none."""

import json
from collections.abc import Callable, Iterator
from itertools import chain, cycle, islice, repeat
from math import ceil
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from molcli.config.sections import SampleConfig
from molcli.data.documents import read_documents
from molcli.data.tokenizer import tokenize
from molcli.errors import MolError
from molcli.families.parent import Parent
from molcli.model.checkpoint import default_device
from molcli.model.forward_inputs import CACHE_FIELD
from molcli.model.parent import end_tokens
from molcli.model.precision import fast_dtype
from molcli.progress import Progress, silent

_ON_CPU, _MOST = 64, 8192  # documents at a time
# Not cuDNN's attention: it plans anew for every length, that is for every token.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sample(parent: Parent, config: SampleConfig, out: Path, progress: Progress = silent) -> None:
    """Writes documents drawn from the parent's own distribution as JSON lines.

    Each starts with a prompt, or with the parent's BOS (its EOS, or token 0, if it has none), and
    ends with an EOS or after config.length tokens, the prompt's included; there are as many as make
    config.tokens. A line holds `input_ids`, and `text` without special tokens if the parent has a
    tokenizer. The same seed gives the same file on the same machine. Raises MolError if `out`
    exists, or for prompts that cannot be read or leave no room; a failed run leaves nothing there.
    """
    if out.exists():
        raise MolError(f"{out} exists", hint="another path, or remove it first")
    prompts = _prompts(parent, config)
    device = default_device()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        parent.folder, dtype=fast_dtype(device)
    )
    model.to(device).eval()  # type: ignore[arg-type]
    tokenizer = parent.tokenizer()
    generator = torch.Generator(device).manual_seed(config.seed)
    at_once = config.batch_size
    if at_once == "auto":
        at_once = _documents_at_once(model, config.length)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    done = drawn = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            while done < config.tokens:
                # As many as will do at the length seen so far: a batch costs as many steps as its
                # longest document has tokens, however few the documents.
                length = done / drawn if drawn else config.length
                count = min(at_once, ceil((config.tokens - done) / length))
                starts = list(islice(prompts, count))
                drawn += count

                def report(new: int, before: int = done) -> None:
                    progress(min(before + new, config.tokens), config.tokens)

                with sdpa_kernel(_BACKENDS):
                    documents = _documents(model, starts, config, generator, report)
                for ids in documents:
                    row: dict[str, object] = {"input_ids": ids}
                    if tokenizer is not None:
                        row["text"] = tokenizer.decode(ids, skip_special_tokens=True)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    done += len(ids)
        partial.replace(out)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _documents_at_once(model: PreTrainedModel, length: int) -> int:
    """On a GPU, those whose keys, values and odds take half of all memory, whatever else is in it:
    the same seed is to give the same text."""
    if model.device.type != "cuda":
        return _ON_CPU
    config, bytes_each = model.config, model.dtype.itemsize
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * width * bytes_each * length
    # Logits, their float32 copy, odds, and these cumulated in float64.
    odds = config.vocab_size * (bytes_each + 4 + 4 + 8)
    half = torch.cuda.get_device_properties(model.device).total_memory // 2
    return int(max(1, min(_MOST, half // (cache + odds))))


def _prompts(parent: Parent, config: SampleConfig) -> Iterator[list[int]]:
    """What each document begins with, endlessly. The first prompt is read at once: a source that
    gives none fails before a model is opened."""
    if config.prompts is None:
        return repeat([_start_token(parent.config)])
    found = tokenize(
        read_documents(config.prompts),
        parent.tokenizer(),
        vocab_size=parent.config.vocab_size,
        add_eos=False,
    )
    checked = (_with_room(ids[: config.prompt_length].tolist(), config) for ids in found)
    return cycle(chain([next(checked)], checked))


def _with_room(prompt: list[int], config: SampleConfig) -> list[int]:
    if len(prompt) >= config.length:
        raise MolError(
            f"a prompt in {config.prompts} has {len(prompt)} tokens, and a document "
            f"{config.length} (`sample.length`)",
            allowed=f"prompts of at most {config.length - 1} tokens",
            hint="--set sample.prompt_length=16 for the first of each, or a larger sample.length",
        )
    return prompt


@torch.inference_mode()
def _documents(
    model: PreTrainedModel,
    starts: list[list[int]],
    config: SampleConfig,
    generator: torch.Generator,
    report: Callable[[int], None],
) -> list[list[int]]:
    """A document from each start. Those that end leave the batch, so that no step works for them.

    The shortest start is read in one pass; where others go on, their tokens stand in for draws, so
    that no row needs padding.
    report: told the tokens drawn so far.
    """
    ends, count = torch.tensor(end_tokens(model), dtype=torch.int64), len(starts)
    given = torch.tensor([len(start) for start in starts], device=model.device)
    ids = torch.zeros((count, config.length), dtype=torch.int64, device=model.device)
    for row, start in enumerate(starts):
        ids[row, : len(start)] = torch.tensor(start)
    lengths = torch.full((count,), config.length, device=model.device)
    running = torch.arange(count, device=model.device)
    cache = DynamicCache(config=model.config)
    read, known = 0, int(given.min())
    drawn = count * known
    for step in range(known, config.length):
        out = model(
            input_ids=ids[running, read:step],
            use_cache=True,
            logits_to_keep=1,
            **{CACHE_FIELD: cache},
        )
        read, is_given = step, step < given[running]
        odds = (out.logits[:, -1].float() / config.temperature).softmax(-1)
        new = torch.where(is_given, ids[running, step], _draw(odds, generator))
        ids[running, step] = new
        drawn += len(running)
        ended = torch.isin(new, ends.to(new.device)) & ~is_given
        if ended.any():
            lengths[running[ended]] = step + 1
            running = running[~ended]
            if not len(running):
                break
            cache.batch_select_indices((~ended).nonzero()[:, 0])
        report(drawn)
    return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]


def _draw(odds: Tensor, generator: torch.Generator) -> Tensor:
    """One index a row of (B, V) probabilities: (B,) int64.

    By inverting the cumulated odds: torch.multinomial draws a number for every entry, which on a
    CPU takes longer than the model does.
    """
    cumulated = odds.cumsum(-1, dtype=torch.float64)
    uniform = torch.rand(
        (len(odds), 1), generator=generator, dtype=torch.float64, device=odds.device
    )
    above_zero = 1 - uniform  # an entry without odds must not be hit
    return torch.searchsorted(cumulated, above_zero * cumulated[:, -1:])[:, 0]


def _start_token(config: PreTrainedConfig) -> int:
    eos = config.eos_token_id
    for token in (config.bos_token_id, eos[0] if isinstance(eos, list) else eos):
        if token is not None:
            return int(token)
    return 0
