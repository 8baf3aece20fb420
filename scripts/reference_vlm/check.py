"""The fast forward pass against the transformers model on image-processor inputs."""

import torch
from torch import nn

from .fast_forward import FastForward
from .model import image_processor
from .tasks import Sampler

MAX_PIXEL_ERROR = 2e-6
MAX_LOGIT_ERROR = 1e-4


def check(model: nn.Module, forward: FastForward, sampler: Sampler) -> None:
    """Print the differences; raise ValueError if one is more than float32 rounding."""
    from PIL import Image

    processor = image_processor()
    for size, n in ((56, 3), (84, 2), (112, 2)):
        batch = sampler.image_chat(1, n, size)
        pictures = [Image.fromarray(x.cpu().numpy()) for x in batch.images]
        inputs = processor(images=pictures, return_tensors="pt").to(batch.ids.device)
        with torch.no_grad():
            expected = model(
                input_ids=batch.ids,
                pixel_values=inputs["pixel_values"],
                image_grid_thw=inputs["image_grid_thw"],
                mm_token_type_ids=(batch.ids == forward.image_pad).int(),
            ).logits
            hidden = forward.hidden(batch.ids, batch.positions, batch.patches, batch.grid)
            logits = model.lm_head(hidden)
        # The processor repeats every patch for the second temporal copy.
        patches = batch.patches.reshape(-1, 3, 1, 196).expand(-1, 3, 2, 196).reshape(-1, 1176)
        pixel_error = (inputs["pixel_values"] - patches).abs().max().item()
        logit_error = (expected - logits).abs().max().item()
        print(
            f"{n} images of {size} px: pixels differ by {pixel_error:.1e}, logits by "
            f"{logit_error:.1e} (largest {expected.abs().max().item():.2f})",
            flush=True,
        )
        if pixel_error > MAX_PIXEL_ERROR or logit_error > MAX_LOGIT_ERROR:
            raise ValueError(
                f"the fast forward pass is off: pixels by {pixel_error:.1e} (at most "
                f"{MAX_PIXEL_ERROR}), logits by {logit_error:.1e} (at most {MAX_LOGIT_ERROR})"
            )
