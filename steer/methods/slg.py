"""Skip-layer guidance (SLG): steer away from a prediction computed without some of the blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from steer.guidance import Guidance
from steer.method import Span


@dataclass(kw_only=True)
class SLG(Guidance):
    """Steer away from a prediction in which whole transformer blocks return their inputs.

    `layers` names blocks ("transformer_blocks.{7..9}"), not attention sites. The extra pass runs only inside `steps`
    and reuses all blocks before the first skipped one.

    Args:
        scale: guidance weight; 2.8 in Stability AI's SD3.5 recipe.
        steps: "0.01:0.2" in that recipe (step 0 is not guided).

    Source: Stability AI's SD3.5 recipe; checked against `skip_guidance_layers` of diffusers' StableDiffusion3Pipeline.
    """

    scale: Annotated[float, Span(0, 10)] = 2.8
    steps: str | range | None = "0.01:0.2"
    skips_blocks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads is not None:
            raise ValueError("SLG skips whole blocks; it takes no heads")
        if self.extra != "separate":
            raise ValueError('SLG skips blocks for the perturbed rows only, so it needs extra="separate"')
