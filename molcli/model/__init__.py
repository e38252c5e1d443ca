"""Mixture of Layers models. Importing this makes the Auto classes of transformers know them."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from molcli.model.configuration_mol import MoLConfig
from molcli.model.modeling_mol import MoLForCausalLM, MoLModel
from molcli.model.routing.router import Routing

__all__ = ["MoLConfig", "MoLForCausalLM", "MoLModel", "Routing"]

AutoConfig.register("mol", MoLConfig, exist_ok=True)
AutoModel.register(MoLConfig, MoLModel, exist_ok=True)
AutoModelForCausalLM.register(MoLConfig, MoLForCausalLM, exist_ok=True)
