"""What a model would say next."""

import torch
from transformers import PreTrainedTokenizerBase

from molcli.model.modeling_mol import MoLForCausalLM


def continue_greedily(
    model: MoLForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    new_tokens: int,
) -> str:
    """The prompt and its likeliest continuation, token by token, as text without special tokens.

    prompt: at least one token. The text ends early at an end-of-text token.
    """
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
