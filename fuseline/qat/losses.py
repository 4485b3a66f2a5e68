"""What a student is trained on: its teacher's distribution."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher ‖ student) of logits [..., vocabulary], in nats a position, in float32 at least.

    The teacher gets no gradient. Sources: LLM-QAT (Liu et al., 2023, section 2.2), on logits alone; with another
    temperature than 1, Hinton et al. (2015), multiplied by its square so that gradients keep their size.
    """
    compute = torch.promote_types(student.dtype, torch.float32)
    found, wanted = (
        F.log_softmax(logits.to(compute).flatten(0, -2) / temperature, -1) for logits in (student, teacher.detach())
    )
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True) * temperature**2
