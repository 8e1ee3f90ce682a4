"""Modules around the user's model that change how it is run, and not what it computes.

`torch.compile`, `DataParallel`, `DistributedDataParallel` and Lightning's Fabric put the model into another module, under
another prefix of its parameters' names. Attribution is about the model inside: its names, so that features are the same
with and without the wrapper, and its own forward pass, whose hooks a compiled or replicated one would leave out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trak.errors import InputError

COMPILED = "_orig_mod."
"""What `torch.compile(module)` puts before the names of the module's tensors."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of wrappers that run it elsewhere or faster, or the model itself.

    Looked into: `torch.compile`, `DataParallel`, `DistributedDataParallel`, Fabric's module, and any of these in another.

    Raises:
        InputError: the model's parameters are spread over processes.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    _refuse_sharded(model)
    return model


def is_compiled(module: nn.Module) -> bool:
    """Whether this is what `torch.compile(module)` returns; compilation in place (`module.compile()`) leaves modules as they are."""
    # Where nothing was compiled, the compiler is not loaded either, and that takes seconds.
    kind = getattr(sys.modules.get("torch._dynamo"), "OptimizedModule", None)
    return kind is not None and isinstance(module, kind)


def run_uncompiled(module: nn.Module) -> None:
    """Let calls of this module run its own forward, with hooks; `vars(module)`, as it was before, undoes that."""
    vars(module).pop("_compiled_call_impl", None)
    if is_compiled(module):
        # Past the wrapper's __setattr__, which would set it on the module inside.
        vars(module)["forward"] = module._modules["_orig_mod"]


def functions_uncompiled() -> AbstractContextManager[Any]:
    """Compiled functions that a forward pass calls run as they were written, where this version of torch can tell them to."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def named_parameters(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:
    """As the model's own, under the names that they would have if no part of it was compiled."""
    yield from _bare(list(model.named_parameters(remove_duplicate=remove_duplicate)))


def named_buffers(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
    """As the model's own, under the names that they would have if no part of it was compiled."""
    yield from _bare(list(model.named_buffers(remove_duplicate=remove_duplicate)))


def _bare(named: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    names = [name.replace(COMPILED, "") for name, _ in named]
    return (
        [(name, tensor) for name, (_, tensor) in zip(names, named)]
        if len(set(names)) == len(names)
        else named
    )


def _inside(model: nn.Module) -> nn.Module | None:
    if is_compiled(model):
        return model._modules["_orig_mod"]
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module
    # By name: Lightning is no dependency. Its module inside may itself be one of the above.
    fabric = any(
        kind.__name__ == "_FabricModule" and kind.__module__.startswith(("lightning", "lightning_fabric"))
        for kind in type(model).__mro__
    )
    return model._modules["_original_module"] if fabric else None


def _refuse_sharded(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel" or any(
            type(parameter).__name__ == "DTensor" for parameter in module._parameters.values()
        ):
            where = f"in {name!r} " if name else ""
            raise InputError(
                f"the model's parameters are spread over processes {where}({type(module).__name__}): each process holds a part of "
                "them only. Build the plain model, and pass full state dicts as checkpoints= (for FSDP: "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)"
            )
