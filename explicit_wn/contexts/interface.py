"""How TorchScript is given a module as an argument. torch parses the whole file for it, so the file is short."""

import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from .torchscript import IS_THERE

if TYPE_CHECKING:
    WhatApplyReturns = nn.Module
else:

    class WhatApplyReturns(nn.Module):
        """What `recompute` accepts: a module that can rebuild the weights that bear a label.

        TorchScript's errors show the name, where an `apply` was forgotten.
        """

        def _recompute_normed(self, label: str) -> None:
            pass

    if IS_THERE:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.interface is deprecated, and importing us is silent
            WhatApplyReturns = torch.jit.interface(WhatApplyReturns)
