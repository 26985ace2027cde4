"""What PyTorch documents but keeps in a private module. Tried with PyTorch 2.13.

`tests/unit/training/test_packed.py` fails when a newer version moves it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class RandomOperations(TorchDispatchMode):
    """Notes whether operations draw random numbers, on the meta device too.

    A generator's state would tell as well, but tensors without content leave it alone.
    """

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Fused attention counts as random; with dropout a CPU takes it apart and draws by itself.
        if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in func.name():
            self.seen = True
        return func(*args, **(kwargs or {}))
