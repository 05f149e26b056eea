"""The loss scale of float16 training."""

import torch
from torch import Tensor

START = 2.0**16
GROW_AFTER = 2000  # steps taken in a row


class LossScale:
    """A factor on the loss that keeps small float16 gradients above zero: halved by a skipped step, then raised again.

    Micikevicius et al., "Mixed Precision Training", section 3.2, https://arxiv.org/abs/1710.03740. Start, growth and
    backoff are those of torch.amp.GradScaler, which is not used because it hides from the optimizer step whether it
    skips; unlike there, the scale stays at 1 or above. It lives on the device, so no step waits for it.

    Attributes:
        value: scalar float32.
        taken: scalar float32, steps taken since the scale last changed.
        halvings: most consecutive steps that the scale may cost, all the way from START to 1.
    """

    halvings = 16

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), START, device=device)
        self.taken = torch.zeros((), device=device)

    def update(self, skipped: Tensor) -> None:
        """Adapts the scale to a step; `skipped` is 1 if it was skipped, 0 if it was taken."""
        self.taken.add_(1).mul_(1 - skipped)
        grows = self.taken >= GROW_AFTER
        self.value.mul_((1 - skipped / 2) * (1 + grows.float())).clamp_min_(1)
        self.taken.mul_(~grows)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns both tensors themselves, to be saved or overwritten."""
        return {"value": self.value, "taken": self.taken}
