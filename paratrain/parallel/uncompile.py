"""Models that come wrapped by torch.compile, under the names that they have without it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import nn

from paratrain.compat import compiled_module
from paratrain.config import Config
from paratrain.distributed import rank

log = logging.getLogger(__name__)
_PREFIX = "_orig_mod."


def unwrapped(model: nn.Module, cfg: Config) -> tuple[nn.Module, Mapping[str, str]]:
    """The modules that torch.compile was called on in the places of its wrappers, which put `_orig_mod.` into every name.

    They stay compiled in place, but where a layout follows what forward does with a tensor in parts or with none: the compiler would have
    to see into that, so they run as they are, with a warning.

    Returns:
        The model, and name -> the user's name of every tensor in its state that another one had.
    """
    names = {name.replace(_PREFIX, ""): name for name in model.state_dict(keep_vars=True) if _PREFIX in name}
    follows = max(cfg.parallel.tp, cfg.parallel.pp, cfg.parallel.cp, cfg.parallel.ep) > 1
    dropped = []
    seen: dict[nn.Module, nn.Module] = {}

    def inner(module: nn.Module, path: str) -> nn.Module:
        found = compiled_module(module)
        if found is None:
            return module
        if found[0] not in seen:
            seen[found[0]] = found[0]
            if follows:
                dropped.append(path.replace(_PREFIX, "") or "the model")
            else:
                found[0]._compiled_call_impl = found[1](found[0]._call_impl)
        return inner(found[0], path)

    model = inner(model, "")
    for path, module in list(model.named_modules()):
        for name, child in list(module._modules.items()):
            if child is not None:
                module._modules[name] = inner(child, f"{path}.{name}" if path else name)
        if follows and module._compiled_call_impl is not None:
            module._compiled_call_impl = None
            dropped.append(path or "the model")
    if dropped and rank() == 0:
        log.warning(
            "model: torch.compile of %s is taken off, because parallel.%s follows what its forward does; write compile=true, which compiles what "
            "this layout can",
            ", ".join(dropped[:3]),
            next(axis for axis in ("tp", "pp", "cp", "ep") if getattr(cfg.parallel, axis) > 1),
        )
    return model, names
