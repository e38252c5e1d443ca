"""Sample: write text from the parent's own distribution, for those without a data set."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, cycle, islice, repeat
from math import ceil, sqrt
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)

from molcli.config.sections import SampleConfig
from molcli.config.stages import repeats_in_force
from molcli.data.documents import read_documents
from molcli.data.packing import TokenRows, pack
from molcli.data.repeats import ListTokens, generator_of, list_tokens, repeat_row
from molcli.data.tokenizer import refuse_tokenizer_errors, tokenize
from molcli.errors import MolError
from molcli.families.parent import Parent
from molcli.families.positions import declared_limit
from molcli.files.generation_config import generation_config
from molcli.files.output_file import output_file
from molcli.kernels import backend
from molcli.kernels.draw_tokens import draw_tokens
from molcli.model.checkpoint import default_device
from molcli.model.decoding.sampling import sample_documents, undefined_predictions
from molcli.model.forward_inputs import CACHE_FIELD
from molcli.model.parent import end_tokens, end_tokens_of, load_dense
from molcli.model.precision import fast_dtype
from molcli.progress import Progress, silent

SampleBatch = Callable[..., list[list[int]]]
_CPU_BATCH, _LARGEST_BATCH = 64, 8192  # documents
# Without cuDNN's attention, which makes a new plan for every length, hence for every token.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sample(parent: Parent, config: SampleConfig, out: Path, progress: Progress = silent) -> None:
    """Write documents drawn from the parent's distribution as JSON lines.

    A document starts with a prompt, or with the parent's BOS token (EOS, or token 0, if it has
    none). It ends with an EOS token or after config.length tokens, the prompt included. A line has
    `input_ids`, and `text` without special tokens if the parent has a tokenizer. The same seed
    gives the same file on the same machine. A failed run leaves no file.

    Documents of config.repeats come among the others, and repeat what others of their batch say.

    Args:
        parent: the dense model.
        config: prompts, tokens to write in all, length of a document, temperature, repeats, seed
            and batch size.
        out: file to write.
        progress: called with written and total tokens.

    Raises:
        MolError: `out` exists, documents are longer than the parent has positions, or prompts
            cannot be read or are too long.
    """
    # transformers' own model runs, with sliding windows and all: its positions alone are a limit.
    positions = declared_limit(parent.config.max_position_embeddings, "the parent")
    if config.length == SampleConfig.length:  # a default has to fit every parent
        config = replace(config, length=min(config.length, positions.tokens))
    positions.check(config.length, "sample.length")
    with output_file(out) as file:  # before a model is opened
        _write(parent, config, file, progress)


def _write(parent: Parent, config: SampleConfig, file: TextIO, progress: Progress) -> None:
    prompts = _prompts(parent, config)
    parent.check_weights()
    batch_size, sample_batch = _open(parent, config, default_device())
    tokenizer = parent.tokenizer()
    repeats = _Repeats(parent, config, list_tokens(tokenizer, parent.config.vocab_size))
    tokens = num_documents = 0
    while tokens < config.tokens:
        left = (config.tokens - tokens) * (1 - repeats.share)
        new = _wanted(left, config.length, repeats.tokens_before, num_documents)
        count = min(batch_size, new)
        starts = list(islice(prompts, count))
        num_documents += count

        def report(new: int, most: int, before: int = tokens) -> None:
            # The last batch ends the work, with some more tokens than are wanted: by how many
            # shows when its documents end.
            wanted = config.tokens - before
            progress(before + new * min(wanted, most) // most, config.tokens)

        for ids in repeats.among(sample_batch(starts, report=report)):
            if tokens >= config.tokens:  # a batch has a few documents too many
                break
            row: dict[str, object] = {"input_ids": ids}
            if tokenizer is not None:
                with refuse_tokenizer_errors("the parent's tokenizer fails on sampled tokens"):
                    row["text"] = tokenizer.decode(ids, skip_special_tokens=True)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            tokens += len(ids)


class _Repeats:
    """Adds documents that repeat themselves to sampled ones.

    Attributes:
        share: their part of the tokens.
        tokens_before: sampled so far.
    """

    def __init__(self, parent: Parent, config: SampleConfig, tokens: ListTokens) -> None:
        self.share = repeats_in_force(config.repeats, config.length)
        self.tokens_before = 0
        self._made = 0
        self._length, self._seed = config.length, config.seed
        self._start, self._list_tokens = _start_token(parent.config), tokens
        ends = end_tokens_of(parent.config, generation_config(parent.generation))
        self._outer = {self._start, *ends}

    def among(self, documents: list[list[int]]) -> Iterator[list[int]]:
        """Yield the documents in order, and behind some of them one that repeats their text."""
        rows = self._rows(documents) if self.share else None
        for ids in documents:
            yield ids
            self.tokens_before += len(ids)
            due = self.share / (1 - self.share) * self.tokens_before
            while rows is not None and self._made * self._length < due:
                generator = generator_of(self._seed, self._made)
                drawn = torch.randint(len(rows), (2,), generator=generator)
                text, between = (rows.select(index) for index in drawn.split(1))
                row = repeat_row(self._made, text, between, generator, self._list_tokens)
                self._made += 1
                yield [self._start, *row.tolist()]

    def _rows(self, documents: list[list[int]]) -> TokenRows | None:
        """Text without the tokens that begin and end documents; None if it fills no row."""
        inner = [[token for token in ids if token not in self._outer] for ids in documents]
        texts = [torch.tensor(ids, dtype=torch.int32) for ids in inner]
        length = self._length - 1  # the start token is the first
        return pack(texts, length, seed=None) if sum(map(len, texts)) >= length else None


def _wanted(wanted: float, length: int, tokens: int, num_documents: int) -> int:
    """Return how many documents to sample next.

    A batch takes as many steps as its longest document has tokens, however few documents there are.
    So a few more than the mean length so far asks for keep chance from leaving a small remainder.

    Args:
        wanted: tokens that are still to be sampled.
        length: of the longest document.
        tokens, num_documents: sampled so far.
    """
    if not num_documents:
        return ceil(wanted / length)
    mean = tokens / num_documents
    # Two standard deviations of a sum of lengths between 0 and `length`, at most.
    return ceil((wanted + sqrt(wanted / mean) * length) / mean)


def _open(parent: Parent, config: SampleConfig, device: torch.device) -> tuple[int, SampleBatch]:
    """Load the parent.

    Returns:
        How many documents to sample together, and the function that does so: (starts, report=) ->
        the tokens of each document.
    """
    dtype = fast_dtype(device)
    generator = torch.Generator(device).manual_seed(config.seed)
    model: Any
    kernels = backend.use_triton(torch.empty(0, dtype=dtype, device=device))
    if kernels and config.length <= parent.family.context_limit(parent.config).tokens:
        model = load_dense(parent, dtype, device)
        sample_batch: SampleBatch = partial(
            sample_documents,
            model,
            length=config.length,
            temperature=config.temperature,
            ends=end_tokens_of(parent.config, generation_config(parent.generation)),
            generator=generator,
        )
    else:  # also documents that are longer than a sliding window
        model = _transformers_model(parent, dtype).to(device)  # type: ignore[arg-type]
        sample_batch = partial(_sample_batch, model.eval(), config=config, generator=generator)
    if config.batch_size == "auto":
        return _largest_batch(model, config.length), sample_batch
    return config.batch_size, sample_batch


def _transformers_model(parent: Parent, dtype: torch.dtype) -> PreTrainedModel:
    """Load the parent as transformers' own model."""
    # Not from the folder: of a tensor in two shards, transformers would read the wrong one.
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(parent.config)]
    model: PreTrainedModel = kind.from_pretrained(
        None,
        config=parent.config,
        state_dict=parent.state_dict(),
        generation_config=generation_config(parent.generation),
        dtype=dtype,
    )
    return model


def _largest_batch(model: PreTrainedModel, length: int) -> int:
    """Number of documents whose keys, values and probabilities fill half of a GPU's memory.

    It does not depend on what else is in memory, so that the same seed gives the same text.
    """
    if model.device.type != "cuda":
        return _CPU_BATCH
    config, bytes_each = model.config, model.dtype.itemsize
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * width * bytes_each * length
    # Logits, their float32 copy, probabilities, and their cumulative sum in float64.
    probabilities = config.vocab_size * (bytes_each + 4 + 4 + 8)
    half = torch.cuda.get_device_properties(model.device).total_memory // 2
    return int(max(1, min(_LARGEST_BATCH, half // (cache + probabilities))))


def _prompts(parent: Parent, config: SampleConfig) -> Iterator[list[int]]:
    """Yield the first tokens of each document, without end.

    The first prompt is read immediately, so that a source without any fails before a model is
    opened.
    """
    if config.prompts is None:
        return repeat([_start_token(parent.config)])
    documents = tokenize(
        read_documents(config.prompts, vocab_size=parent.config.vocab_size),
        parent.tokenizer(),
        vocab_size=parent.config.vocab_size,
        add_eos=False,
    )
    checked = (_check_length(ids[: config.prompt_length].tolist(), config) for ids in documents)
    return cycle(chain([next(checked)], checked))


def _check_length(prompt: list[int], config: SampleConfig) -> list[int]:
    if len(prompt) >= config.length:
        raise MolError(
            f"a prompt in {config.prompts} has {len(prompt)} tokens, and a document "
            f"{config.length} (`sample.length`)",
            allowed=f"prompts of at most {config.length - 1} tokens",
            hint="--set sample.prompt_length=16 for the first of each, or a larger sample.length",
        )
    return prompt


@torch.inference_mode()
@sdpa_kernel(_BACKENDS)
def _sample_batch(
    model: PreTrainedModel,
    starts: list[list[int]],
    config: SampleConfig,
    generator: torch.Generator,
    report: Callable[[int, int], None],
) -> list[list[int]]:
    """Sample one document from each start with transformers' own model, for CPUs and for windows.

    Documents that have ended leave the batch, so that no step computes them. The first pass reads
    as many tokens as the shortest start has. In longer starts, the start's own tokens then replace
    the sampled ones, so that no row needs padding.

    Args:
        model: the parent.
        starts: first tokens of each document.
        config: length and temperature.
        generator: on the model's device.
        report: called with the number of tokens so far, and the most that they can become.
    """
    ends, count = torch.tensor(end_tokens(model), dtype=torch.int64), len(starts)
    start_lengths = torch.tensor([len(start) for start in starts], device=model.device)
    ids = torch.zeros((count, config.length), dtype=torch.int64, device=model.device)
    for row, start in enumerate(starts):
        ids[row, : len(start)] = torch.tensor(start)
    lengths = torch.full((count,), config.length, device=model.device)
    running = torch.arange(count, device=model.device)
    cache = DynamicCache(config=model.config)
    read, known = 0, int(start_lengths.min())
    tokens = count * known
    for step in range(known, config.length):
        out = model(
            input_ids=ids[running, read:step],
            use_cache=True,
            logits_to_keep=1,
            **{CACHE_FIELD: cache},
        )
        read, in_start = step, step < start_lengths[running]
        uniform = torch.rand(
            len(running), generator=generator, dtype=torch.float64, device=model.device
        )
        drawn = draw_tokens(out.logits[:, -1], uniform, config.temperature)
        new = torch.where(in_start, ids[running, step], drawn)
        ids[running, step] = new
        tokens += len(running)
        ended = torch.isin(new, ends.to(new.device)) & ~in_start
        # One transfer for both questions.
        any_undefined, any_ended = torch.stack([(drawn < 0).any(), ended.any()]).tolist()
        if any_undefined:
            raise undefined_predictions(step)
        if any_ended:
            lengths[running[ended]] = step + 1
            running = running[~ended]
        report(tokens, tokens + len(running) * (config.length - 1 - step))
        if not len(running):
            break
        if any_ended:
            cache.batch_select_indices((~ended).nonzero()[:, 0])
    lengths_by_row = lengths.tolist()
    return [row[:length].tolist() for row, length in zip(ids.cpu(), lengths_by_row, strict=True)]


def _start_token(config: PreTrainedConfig) -> int:
    eos = config.eos_token_id
    for token in (config.bos_token_id, eos[0] if isinstance(eos, list) else eos):
        if token is not None:
            return int(token)
    return 0
