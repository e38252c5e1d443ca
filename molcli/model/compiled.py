"""Compiled layers, for training on a GPU."""

from molcli.model.modeling_mol import MoLForCausalLM

# Fusing a norm's backward pass with the gradient of its weight, torch 2.10 to 2.13 give a wrong
# shape, or wrong numbers without a word, where there are many rows (pytorch #178080, #193061).
_OPTIONS = {"triton.mix_order_reduction": False}


def compile_layers(model: MoLForCausalLM) -> None:
    """Compiles the layers, not the model: one graph serves all layers of a kind, and nothing in it
    depends on the batch but the number of documents, which becomes symbolic in the second batch.
    """
    for layer in model.model.layers:
        layer.compile(options=_OPTIONS)
