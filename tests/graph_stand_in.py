"""A stand-in for a CUDA graph on a processor: it records every operation on tensors, and does them again."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VIEWS = {
    "view",
    "_unsafe_view",
    "as_strided",
    "permute",
    "transpose",
    "t",
    "slice",
    "select",
    "expand",
    "split",
}
VIEWS |= {"unbind", "detach", "alias", "unsqueeze", "squeeze", "narrow", "split_with_sizes", "_reshape_alias"}
READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique2"}


def tensors(values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class Recording(TorchDispatchMode):
    """Records operations with their arguments and results, and puts back what they have changed.

    While a CUDA graph is captured nothing is computed. Here it is, for shapes; `restore` undoes it.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.made, self.before = [], set(), {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords, name = keywords or {}, function._schema.name.partition("::")[2]
        masked = name == "index" and any(tensor.dtype == torch.bool for tensor in tensors(arguments[1]))
        if name in READS or masked:  # the processor has to wait for a value, or for the size of the result
            raise RuntimeError(f"cudaErrorStreamCaptureUnsupported: {name} waits for the device")
        given = dict(zip((argument.name for argument in function._schema.arguments), arguments)) | keywords
        written = [a.name for a in function._schema.arguments if a.alias_info and a.alias_info.is_write]
        written += ["running_mean", "running_var"]  # which batch normalisation changes and does not declare
        self._keep(tensors([given.get(name) for name in written]))
        results = function(*arguments, **keywords)
        if name not in VIEWS:
            known = {id(tensor) for tensor in tensors([arguments, keywords])}
            new = [tensor for tensor in tensors([results]) if id(tensor) not in known]
            self.made |= {tensor.untyped_storage().data_ptr() for tensor in new}
            self.operations.append((function, arguments, keywords, results))
        return results

    def _keep(self, changed):
        for tensor in changed:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.made and storage.data_ptr() not in self.before:
                self.before[storage.data_ptr()] = storage, storage.clone()

    def restore(self):
        for storage, content in self.before.values():
            storage.copy_(content)


class Replay:
    """Captured operations: called, it does them again on the same memory, whatever Python has done since."""

    def __init__(self, function):
        self.count = 0
        recording = Recording()
        try:
            with recording:
                function()
        finally:
            recording.restore()
        self.operations = recording.operations

    @torch.no_grad()
    def __call__(self):
        self.count += 1
        for function, arguments, keywords, results in self.operations:
            again = function(*arguments, **keywords)
            for old, new in zip(tensors([results]), tensors([again]), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
