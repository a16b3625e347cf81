"""The parameters and buffers of a module, and which tensors of a model go into them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...format.manifest import Record
from .framework import import_torch, tensor_dtype

if TYPE_CHECKING:
    import torch

__all__ = ["ModuleLoad", "ModulePart", "plan_module"]


@dataclass
class ModulePart:
    """The tensors of a module that are loaded onto one device.

    Attributes
    ----------
    names : list of str
        Their names.
    into : dict of str to torch.Tensor
        Those that are read into their own memory.
    beside : dict of str to torch.Tensor
        Those that are copied from a tensor that is loaded beside them, because they have another dtype or layout.
    replaced : dict of str to torch.Tensor
        Those on ``"meta"``, which get another memory.
    """

    names: list[str] = field(default_factory=list)
    into: dict[str, torch.Tensor] = field(default_factory=dict)
    beside: dict[str, torch.Tensor] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)

    def load_overlapping_beside(self) -> None:
        """Move tensors that share memory from `into` to `beside`, where one is written after the other."""
        end, last = 0, ""
        for start, nbytes, name in sorted((each.data_ptr(), each.nbytes, name) for name, each in self.into.items()):
            if nbytes and start < end:
                self.beside[last], self.beside[name] = self.into[last], self.into[name]
            if start + nbytes > end:
                end, last = start + nbytes, name
        self.beside = {name: self.beside[name] for name in self.names if name in self.beside}
        self.into = {name: tensor for name, tensor in self.into.items() if name not in self.beside}


@dataclass
class ModuleLoad:
    """The steps of `ndcache.torch.load_model`.

    Attributes
    ----------
    module : torch.nn.Module
    parts : dict of torch.device to ModulePart
    missing, unexpected : list of str
        Names that only the module has, and that only the model has.
    """

    module: torch.nn.Module
    missing: list[str]
    unexpected: list[str]
    parts: dict[torch.device, ModulePart] = field(default_factory=dict)

    def finish(self, part: ModulePart, loaded: Mapping[str, torch.Tensor]) -> None:
        """Put loaded tensors into the module that were not read into its own memory."""
        torch = import_torch()
        with torch.no_grad():
            for name, tensor in part.beside.items():
                tensor.copy_(loaded[name])
        made: dict[int, Any] = {}
        for name, old in part.replaced.items():
            new = loaded[name].to(old.dtype)
            is_parameter = isinstance(old, torch.nn.Parameter)
            made[id(old)] = torch.nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new
        for module in self.module.modules() if made else ():
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    if id(tensor) in made:
                        tensors[key] = made[id(tensor)]


def plan_module(
    module: torch.nn.Module,
    records: Mapping[str, Record],
    device: torch.device | None,
    *,
    decode: bool,
    strict: bool,
) -> ModuleLoad:
    """Compare a module with a model, and plan what goes where.

    Parameters
    ----------
    module : torch.nn.Module
    records : mapping of str to Record
        The tensors of the model that may be loaded.
    device : torch.device, optional
        Where tensors on ``"meta"`` go. Default: where the others are, or the CPU.
    decode, strict
        See `ndcache.torch.load_model`.

    Raises
    ------
    RuntimeError
        They do not fit, with the text of PyTorch.
    """
    torch = import_torch()
    state = {name: each for name, each in module.state_dict(keep_vars=True).items() if isinstance(each, torch.Tensor)}
    memory = {name: _memory(tensor) for name, tensor in state.items()}
    last: dict[Hashable, str] = {}  # of each tensor's names, the last one that the model has
    for name in state:
        if name in records:
            last[memory[name]] = name
    missing = [name for name in state if memory[name] not in last]
    load = ModuleLoad(module, missing, [name for name in records if name not in state])
    _check(load, state, records, strict=strict)
    devices = {tensor.device for tensor in state.values() if not tensor.is_meta}
    target = device or (devices.pop() if len(devices) == 1 else torch.device("cpu"))
    for name in last.values():
        tensor, record = state[name], records[name]
        part = load.parts.setdefault(target if tensor.is_meta else tensor.device, ModulePart())
        part.names.append(name)
        if tensor.is_meta:
            part.replaced[name] = tensor
        elif _is_like(tensor, record, decode=decode):
            part.into[name] = tensor
        else:
            part.beside[name] = tensor
    for part in load.parts.values():
        part.load_overlapping_beside()
    return load


def _check(load: ModuleLoad, state: Mapping[str, torch.Tensor], records: Mapping[str, Record], *, strict: bool) -> None:
    errors = []
    if strict and load.missing:
        errors.append(f"Missing key(s) in state_dict: {_quoted(load.missing)}. ")
    if strict and load.unexpected:
        errors.append(f"Unexpected key(s) in state_dict: {_quoted(load.unexpected)}. ")
    for name, tensor in state.items():
        if name not in records:
            continue
        if _is_expanded(tensor):
            errors.append(f"{name} cannot be written: its elements share memory, see torch.Tensor.expand.")
        if tuple(tensor.shape) != records[name].shape:
            shape = _size(records[name].shape)
            errors.append(
                f"size mismatch for {name}: copying a param with shape {shape} from checkpoint, "
                f"the shape in current model is {_size(tensor.shape)}."
            )
    if errors:
        listed = "\n\t".join(errors)
        raise RuntimeError(f"Error(s) in loading state_dict for {type(load.module).__name__}:\n\t{listed}")


def _is_like(tensor: torch.Tensor, record: Record, *, decode: bool) -> bool:
    """Return whether a record can be read into a tensor's own memory."""
    torch = import_torch()
    if getattr(torch, record.dtype, None) is None:  # the load will say so
        return False
    is_plain = tensor.layout == torch.strided and tensor.is_contiguous() and not tensor.is_neg()
    return is_plain and tensor.dtype == tensor_dtype(record, decode=decode)


def _is_expanded(tensor: torch.Tensor) -> bool:
    """Return whether several elements are one in memory, so that not all can be written."""
    if tensor.is_meta or tensor.layout != import_torch().strided:
        return False
    return any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _memory(tensor: torch.Tensor) -> Hashable:
    """Return what is equal for tensors that are tied: those that are the same, or have the same memory."""
    if tensor.is_meta or tensor.layout != import_torch().strided or tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _quoted(names: list[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _size(shape: Any) -> str:
    return f"torch.Size({list(shape)})"
