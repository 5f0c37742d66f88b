"""`learner.sharding: fsdp2`: every rank holds only its part of the frozen base weights, gathered layer by layer when they are used.

Only the weights inside the decoder layers are cut. Whole on every rank stay:
- the adapter, so that optimizer, clipping, checkpoints and publishing are those of one rank;
- embeddings, head and the last norm: the head's weight is read outside its own forward, where nothing would gather it.
  They cost 2 * vocabulary * width numbers per rank, half of it when they are tied.
"""

from typing import Any

from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ftb_llm.errors import ConfigError


def shard(peft_model: PeftModel, *, count: int, device_type: str) -> None:
    """Cut the base weights over all ranks. Layers move to the device one at a time, so no device ever holds the whole model.

    Every rank must then run as many forward and backward passes as the others, since each of them gathers weights from all.
    """
    base: Any = peft_model.get_base_model()
    layers = decoder_layers(base)
    mesh = init_device_mesh(device_type, (count,))
    adapter = {parameter for parameter in peft_model.parameters() if parameter.requires_grad}
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=adapter, reshard_after_forward=True)
    # The decoder's body owns no weight here; it is the common root by which a layer's weights are fetched while the one before computes.
    fully_shard(base.get_decoder(), mesh=mesh, ignored_params=_outside(base.get_decoder(), layers) | adapter, reshard_after_forward=True)


def decoder_layers(base: Any) -> list[nn.Module]:
    """The repeated layers of the model, found by the names that transformers itself keeps together."""
    names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.get_decoder().modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigError("learner.sharding", f"fsdp2 does not know the decoder layers of {type(base).__name__}; it must be replicated")
    return layers


def _outside(body: nn.Module, layers: list[nn.Module]) -> set[nn.Parameter]:
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return {parameter for parameter in body.parameters() if id(parameter) not in inside}
