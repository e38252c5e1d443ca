"""Compiled layers, for training on a GPU."""

from molcli.model.modeling_mol import MoLForCausalLM


def compile_layers(model: MoLForCausalLM) -> None:
    """Compiles the layers, not the model: one graph serves all layers of a kind, and nothing in it
    depends on the batch but the number of documents, which becomes symbolic in the second batch.
    """
    for layer in model.model.layers:
        layer.compile()
