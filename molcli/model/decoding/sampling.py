"""Sample many documents side by side on a static cache, with their steps from a CUDA graph."""

from collections.abc import Callable

import torch

from molcli.errors import MolError
from molcli.kernels.draw_tokens import draw_tokens
from molcli.model.decoding.static_cache import StaticStore
from molcli.model.modeling_mol import MoLForCausalLM

# How many steps pass until the host asks which documents have ended: each time it waits.
_CHECK = 16
# Documents that have ended stay in the batch until so many of it are left. A smaller batch costs a
# copy of its cache and a new graph, about as much as a few steps.
_FULL_ENOUGH = 3 / 4
_ROWS = 64  # batches are multiples of this, so that products keep to whole tiles

Report = Callable[[int, int], None]


@torch.no_grad()
def sample_documents(
    model: MoLForCausalLM,
    starts: list[list[int]],
    length: int,
    temperature: float,
    ends: list[int],
    generator: torch.Generator,
    report: Report,
) -> list[list[int]]:
    """Sample one document from each start, from the model's own distribution.

    Args:
        model: predicts the tokens.
        starts: first tokens of each document, at least one and less than `length`.
        length: tokens of a document that no end token ends.
        temperature: divides the logits; above 0.
        ends: tokens that end a document behind its start.
        generator: on the model's device.
        report: called with the number of tokens so far, and the most that they can become.

    Returns:
        The tokens of each document, its start and its end token included.

    Raises:
        MolError: if predictions are not finite.
    """
    batch = _Batch(model, starts, length, temperature, ends, generator)
    for held in range(2, length + 1):  # tokens of a running document after the step
        batch.advance()
        if held % _CHECK and held < length:
            continue
        running, ended_tokens, undefined = batch.numbers()
        if undefined < length:
            raise undefined_predictions(undefined)
        tokens = ended_tokens + running * held
        report(tokens, tokens + running * (length - held))
        if not running:
            break
        if held < length and running <= _FULL_ENOUGH * batch.size:
            batch.shrink(running)
    return batch.documents()


def undefined_predictions(token: int) -> MolError:
    """Return the error of predictions that are not finite, for token `token` of a document."""
    return MolError(
        f"the parent's predictions are not finite (NaN) at token {token} of a document",
        allowed="a parent with finite predictions",
        hint="download its weights again, or use another parent",
    )


class _Batch:
    """Documents of one length so far, all of which a step continues. Nothing waits for the host.

    Attributes:
        size: number of documents B in the batch, some of which may have ended.
        ids: (B, length), tokens; those of a start from the beginning, others once they are drawn.
        lengths: (B,), tokens of each document at its end.
        running: (B,) bool, which ones have not ended; active: the same as int32. The others take
            steps as well, in which attention reads nothing.
        undefined: (1,), the first token whose predictions are not finite, or `length`.
        rows: (B,), the documents' numbers in `all_ids` and `all_lengths`, which hold those that
            have left the batch.
    """

    def __init__(
        self,
        model: MoLForCausalLM,
        starts: list[list[int]],
        length: int,
        temperature: float,
        ends: list[int],
        generator: torch.Generator,
    ) -> None:
        device, self.size = model.device, len(starts)
        self.model, self.temperature = model, temperature
        self.all_ids = torch.zeros(self.size, length, dtype=torch.int64)
        for row, start in enumerate(starts):
            self.all_ids[row, : len(start)] = torch.tensor(start)
        self.all_ids = self.all_ids.to(device)
        self.all_lengths = torch.full((self.size,), length, device=device)
        self.ids, self.lengths = self.all_ids.clone(), self.all_lengths.clone()
        self.start_lengths = torch.tensor([len(start) for start in starts], device=device)
        self.ends = torch.tensor(ends, dtype=torch.int64, device=device)
        # All at once: a recorded step draws no numbers, it reads those of its time.
        self.uniform = torch.rand(
            (self.size, length), generator=generator, dtype=torch.float64, device=device
        )
        self.rows = torch.arange(self.size, device=device)
        self.running = torch.ones(self.size, dtype=torch.bool, device=device)
        self.active = torch.ones(self.size, dtype=torch.int32, device=device)
        self.undefined = torch.full((1,), length, device=device)
        self.ended_tokens = 0  # of documents that have left the batch
        self.store = StaticStore(model.config, self.size, length, model.dtype, device)

    def advance(self) -> None:
        """Continue every document by a token."""
        store = self.store
        if not store.warm or not store.capturable:
            self._step()  # the first one compiles kernels, which recording cannot
            store.warm = True
        else:
            if store.graph is None:
                store.graph = torch.cuda.CUDAGraph()
                with torch.cuda.device_of(self.ids), torch.cuda.graph(store.graph):
                    self._step()
            store.graph.replay()
        store.length.seen += 1

    def _step(self) -> None:
        """Read the token at the store's time, and write the next one. All changes are in place."""
        length = self.store.length
        time = length.filled.long()
        following = time + 1
        with torch.cuda.device_of(self.ids):  # Triton launches on the current device
            x = self.model.model.embed_tokens(self.ids.index_select(1, time)[:, 0])
            hidden, _ = self.model.model.step(x, length.counts, self.active, self.store)
            uniform = self.uniform.index_select(1, time)[:, 0]
            drawn = draw_tokens(self.model.lm_head(hidden), uniform, self.temperature)
        undefined = ((drawn < 0) & self.running).any()
        first = torch.where(undefined, self.undefined.minimum(following), self.undefined)
        self.undefined.copy_(first)
        given = following < self.start_lengths
        known = self.ids.index_select(1, following)[:, 0]
        new = torch.where(given, known, drawn.clamp(min=0))
        self.ids.index_copy_(1, following, new[:, None])
        ended = (new[:, None] == self.ends).any(1) & ~given & self.running
        self.lengths.copy_(torch.where(ended, following + 1, self.lengths))
        self.running &= ~ended
        self.active.copy_(self.running)

    def numbers(self) -> tuple[int, int, int]:
        """Wait for the device: return how many documents run, how many tokens the others have, and
        the first token whose predictions are not finite, or `length`."""
        ended = self.lengths.masked_fill(self.running, 0).sum()
        found = torch.stack([self.running.sum(), ended, self.undefined[0]]).tolist()
        return found[0], self.ended_tokens + found[1], found[2]

    def shrink(self, running: int) -> None:
        """Leave out documents that have ended. running: number of those that have not."""
        size = min(self.size, -(-running // _ROWS) * _ROWS)
        if size == self.size:
            return
        self._keep_ended()
        # Those that run come first; some that have ended fill the last tile.
        kept = self.running.int().sort(descending=True, stable=True).indices[:size]
        ended = self.lengths.masked_fill(self.running, 0)
        self.ended_tokens += int(ended.sum() - ended[kept].sum())
        self.store.narrow(kept)
        self.size, self.rows, self.uniform = size, self.rows[kept], self.uniform[kept]
        self.ids, self.lengths = self.ids[kept], self.lengths[kept]
        self.running, self.active = self.running[kept], self.active[kept]
        self.start_lengths = self.start_lengths[kept]

    def _keep_ended(self) -> None:
        self.all_ids[self.rows], self.all_lengths[self.rows] = self.ids, self.lengths

    def documents(self) -> list[list[int]]:
        """Return the tokens of all documents."""
        self._keep_ended()
        ids, lengths = self.all_ids.cpu(), self.all_lengths.tolist()
        return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
