"""What `apply` turns a module into: a carrier of derived weights.

A carrier is an instance of a generated subclass of the module's own class, which keeps that class's name. On it

- the parts (`weight_g`, `weight_v`) are ordinary parameters and buffers; the weight itself is neither. It is stored
  beside them, together with the tensors it was computed from;
- reading the weight gives the stored tensor. If other tensors have taken the place of the parts since (after
  `functional_call`, `load_state_dict(assign=True)`, a copy), or the module was moved or loaded, it is computed anew;
  a part that changed *in place*, as an optimizer changes it, is what `recompute` is for;
- an inlined weight is kept only while the forward of its module runs; whoever else reads it gets it computed anew;
- copying and pickling leave the stored weight out; `load_state_dict` takes every spelling of the norm;
- no hook is registered, ever.
"""

from .module import Carrier, bake, carry, forget_all, is_wrapped, rebuild, recipes_of
from .recipe import Recipe, base_of, recipe_for
from .store import Block, Store, Stored, store_of
from .undo import all_or_nothing, values_or_nothing
from .weight import in_use, is_current, refresh

__all__ = [
    "Block",
    "Carrier",
    "Recipe",
    "Store",
    "Stored",
    "all_or_nothing",
    "bake",
    "base_of",
    "carry",
    "forget_all",
    "in_use",
    "is_current",
    "is_wrapped",
    "rebuild",
    "recipe_for",
    "recipes_of",
    "refresh",
    "store_of",
    "values_or_nothing",
]
