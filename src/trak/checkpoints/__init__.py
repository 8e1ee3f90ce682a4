"""Reading checkpoints from wherever they are, and telling them apart by their contents.

    source                                           what is read
    mapping of names to tensors                      itself (nested under one known key: unwrapped)
    torch.nn.Module                                  its parameters and saved buffers
    *.safetensors                                    its tensors
    *.pt  *.pth  *.bin  *.ckpt  *.pth.tar            torch.load(weights_only=True), unwrapped
    *.safetensors.index.json  *.bin.index.json       every file it names, put together
    a folder                                         model.safetensors, its index, pytorch_model.bin, its index, a PEFT adapter
                                                     (adapter_model.safetensors or .bin), or the one file in it that is a checkpoint
    a callable without arguments                     what it returns: any of the above

Give callables or paths where there are several checkpoints: then only one is in memory at a time. `list_checkpoints` finds those of a
training run's folder, in order.
"""

from trak.checkpoints.folders import list_checkpoints
from trak.checkpoints.read import (
    NESTED_UNDER,
    PICKLE_SUFFIXES,
    CheckpointSource,
    checkpoint_hash,
    describe,
    load_checkpoint,
)

__all__ = [
    "NESTED_UNDER",
    "PICKLE_SUFFIXES",
    "CheckpointSource",
    "checkpoint_hash",
    "describe",
    "list_checkpoints",
    "load_checkpoint",
]
