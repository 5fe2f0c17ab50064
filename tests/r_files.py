"""Files of torch for R: the ones that R wrote, in `r_reference`, and the writing of more in its way.

`r_reference/verbs.safetensors` has, for each case `LAYER/DTYPE/DIM` with R's dim, a layer's parameters before
(`orig/weight`, `orig/bias`), its parts and weight after `apply` (`g`, `v`, `w`), and after g and v were changed (`g2`,
`v2`; `w2` by `recompute`, `cw` by `compute_weight`, `wclone` by a clone's `recompute`, `wremoved` by `remove`), the
output `y` for the input `x`, and the gradients `gg` and `gv` of `sum(w2 · C) + sum(y²)`. `verbs.json` has the shape of
g and the order of the parameters. `saved-NAME.pt` is a module from `torch_save`, its entry `__robj__` cut to one byte;
`saved-NAME-xy.safetensors` is an input, and R's output for it.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "r_reference"

DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.uint8: "U8"}


def write_as_r(path: Path, state: dict[str, Tensor], kind: str = "module") -> None:
    """Writes what `torch_save(module, path)` of torch for R does; the header is not padded.

    The last entry is the serialized R object, which is of no use here; any bytes will do.
    """
    tensors = state | {"__robj__": torch.arange(7, dtype=torch.uint8)}
    about = {"type": kind, "version": 3, "requires_grad": dict.fromkeys(state, True)}
    header: dict[str, object] = dict.fromkeys(tensors) | {"__metadata__": {"__r__": json.dumps(about)}}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.nbytes
        header[name] = {"shape": list(tensor.shape), "dtype": DTYPES[tensor.dtype], "data_offsets": [position, end]}
        position = end
    written = json.dumps(header, separators=(",", ":")).encode()
    buffers = b"".join(tensor.detach().numpy().tobytes() for tensor in tensors.values())
    path.write_bytes(len(written).to_bytes(8, "little") + written + buffers)
