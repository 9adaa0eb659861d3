"""Blocks of other stages, run without values to see what they return and leave."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from paratrain import rng
from paratrain.errors import UserError
from paratrain.parallel import pipeline_places as places
from paratrain.parallel.pipeline_ghost import Ghost, ghost
from paratrain.parallel.pipeline_trace import arguments

_PLAIN = (torch.Tensor, nn.Module, type, int, float, complex, str, bytes, type(None))


class Twin(nn.Module):
    """A block of ghosts. Where its forward asks for values, as that of a mixture of experts, or an operator has no way to run without, it
    runs on zeros on the host: what it returns has the same form."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = {} if places.simple(self) else places.containers(places.roots(self) | arguments(args, kwargs))
        before = places.Before(found)
        fresh = {id(leaf): _copied(leaf) for leaf in tree_leaves((args, kwargs)) if not isinstance(leaf, _PLAIN) and not places.opens(leaf)}
        try:
            return super().forward(*args, **kwargs)
        except (UserError, RuntimeError) as error:
            before.restore()
            if fresh:  # such as a cache, which has keys and values of the first try
                args, kwargs = tree_map(lambda leaf: fresh.get(id(leaf), leaf), (args, kwargs))
            ghosts = [leaf for leaf in places.tensors((args, kwargs)) if isinstance(leaf, Ghost)]
            if not ghosts:
                raise
            try:
                outputs, numbers = self._on_host(0, found, args, kwargs, ghosts[0])
                if numbers:
                    after = places.Before(found)
                    before.restore()
                    _, others = self._on_host(1, found, args, kwargs, ghosts[0])
                    after.restore()
                    if others != numbers:
                        raise UserError(
                            f"parallel.pp: a {type(self).__mro__[2].__name__} returns a number that it computes from its tensors ({numbers} for zeros, {others} "
                            "for ones), which a stage cannot hand to the next; return it as a tensor (without .item()), or write parallel.pp=1"
                        )
            except _Written as written:
                raise UserError(str(written)) from None
            except UserError:
                raise
            except Exception:  # whatever a user's block says to zeros
                before.restore()
                raise error from None
            return outputs

    def _on_host(self, fill: int, found: dict[places.Path, Any], args: Any, kwargs: Any, like: Ghost) -> tuple[Any, list[Any]]:
        """What forward returns where every ghost is a tensor full of `fill`, as ghosts, and the numbers in it."""
        stood_for: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def host(tensor: torch.Tensor) -> torch.Tensor:
            full = torch.full(tensor.shape, fill, dtype=tensor.dtype) if isinstance(tensor, Ghost) else None
            values = tensor.detach().cpu().clone() if full is None else full
            stood_for[id(values)] = values, tensor
            return values

        def back(tensor: torch.Tensor) -> torch.Tensor:
            return stood_for[id(tensor)][1] if id(tensor) in stood_for else ghost(tensor, like.device, like.origin)

        given = places.settle((args, kwargs), host)
        passed = list(stood_for.values())
        held = [
            (store, key, tensor)
            for module in self.modules()
            for store in (module._parameters, module._buffers)
            for key, tensor in store.items()
        ]
        before = places.Before(found)
        try:
            for store, key, tensor in held:
                if tensor is not None:
                    store[key] = host(tensor)  # type: ignore[assignment]
            with rng.preserved(torch.device("cpu")), torch.no_grad():
                outputs = super().forward(*given[0], **given[1])
        finally:
            for store, key, tensor in held:
                store[key] = tensor  # type: ignore[assignment]
            changed = before.changes()
            for container in found.values():
                if isinstance(container, list | dict):
                    places.settle(container, back)
        for change in changed:
            container = next(box for path, box in found.items() if path == change.path)
            if change.kind == "set" and (value := places.settle(change.value, back)) is not change.value:
                places.lay(container, change, value)
        if any(values._version and not isinstance(tensor, Ghost) for values, tensor in passed):
            raise _Written(
                f"parallel.pp: a {type(self).__mro__[2].__name__} writes into a tensor that it is given, which stages that do not run it do not see; let it "
                "return a new one, or write parallel.pp=1"
            )
        numbers = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, int | float | complex)]
        return places.replaced(outputs, back), numbers


def _copied(leaf: Any) -> Any:
    try:
        return copy.deepcopy(leaf)
    except Exception:  # whatever a user's object says to a copy
        return leaf


class _Written(Exception):
    """A block wrote into an argument."""
