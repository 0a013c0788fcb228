"""The tab of pictures: a prompt drawn without and with a method, from the same seed."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

import steer
from steer.guidance import Guidance
from steer.sparse import Sparse
from steer_demos.app import drawing, forms
from steer_demos.app.jobs import Jobs, in_words
from steer_demos.app.sharing import Shared, connect
from steer_demos.app.stage import Stage
from steer_demos.generate import PICTURE_PROMPTS

MODELS = ("emoji-mmdit", "emoji-unet")
EXAMPLES = {
    "PAG": {"prompt": PICTURE_PROMPTS[0], "method": "PAG", "settings": {"scale": 2.0}},
    "SoftPAG": {
        "prompt": PICTURE_PROMPTS[1],
        "method": "PAG",
        "settings": {"scale": 3.0, "mode": "all", "strength": 0.5},
    },
    "SEG": {"prompt": PICTURE_PROMPTS[5], "method": "SEG", "settings": {"scale": 3.0, "sigma": 1.0}},
    "SLG": {"prompt": PICTURE_PROMPTS[4], "method": "SLG", "settings": {"scale": 2.0, "steps": "0.1:0.6"}},
}


def methods() -> list[str]:
    """Methods that change how pictures are drawn: guidance, and sparse attention that needs no video."""
    return [
        name
        for name, method in steer.methods().items()
        if issubclass(method, Guidance) or (issubclass(method, Sparse) and not method.needs_video)
    ]


def tab(stage: Stage, jobs: Jobs) -> Shared:
    """Draw the tab; its inputs, to be shared."""

    @in_words
    def image(
        model: str,
        prompt: str,
        seed: float,
        steps: float,
        guidance_scale: float,
        method: str,
        settings: dict[str, Any],
        saved: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (Gradio looks for it there)
    ) -> tuple[Image.Image, Image.Image, Image.Image, str, str, str]:
        """Draw a prompt without and with a method.

        Returns: the two pictures, their difference, figures, where the method acted, and the code.
        """
        with jobs.running(request, progress) as job, stage.holding(model, "pictures", job) as loaded:
            chosen, number = forms.steering(stage.sources, model, method, settings, saved), drawing.seed_of(seed)
            found = drawing.draw_pair(
                loaded, chosen, prompt, job, seed=number, steps=steps, guidance_scale=guidance_scale
            )
        before, after = found.baseline.images[0], found.steered.images[0]
        call = {"num_inference_steps": int(steps), "guidance_scale": guidance_scale}
        code = drawing.python(loaded, forms.in_python(model, chosen, settings, saved), prompt, number, call)
        pictures = [drawing.enlarged(picture) for picture in (before, after, drawing.difference(before, after))]
        figures = drawing.table({"seed": str(number), **drawing.figures(found, chosen)})
        return *pictures, figures, found.summary, code  # type: ignore[return-value]

    examples = gr.Row(elem_classes="examples")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            model = forms.model_box(MODELS, stage.sources)
            prompt = gr.Textbox(PICTURE_PROMPTS[0], label="Prompt", lines=2, max_length=drawing.LONGEST_PROMPT)
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, info="-1: a new one", min_width=90)
                steps = gr.Slider(1, 50, 20, step=1, label="Steps", min_width=140)
            scale = gr.Slider(1, 15, 3, step=0.5, label="guidance_scale", info="Classifier-free guidance; 1 is off.")
            chosen = forms.chooser(methods(), "PAG")
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                run = gr.Button("Draw", variant="primary", scale=3)
                stop = gr.Button("Stop", scale=1, min_width=80)
            shown = {"format": "png", "interactive": False, "min_width": 140, "buttons": ["download", "fullscreen"]}
            with gr.Row():
                before = gr.Image(label="Without", alt_text="drawn without a method", **shown)
                after = gr.Image(label="With the method", alt_text="drawn with the method", **shown)
                apart = gr.Image(label="Difference", alt_text="how far the two are apart", **shown)
            figures = gr.Markdown(label="Figures", elem_id="image-figures")
            with gr.Accordion("Where it acted, and the same in Python", open=False):
                summary = gr.Textbox(label="Where it acted", lines=3, max_lines=12, interactive=False)
                code = gr.Code(label="The same in Python", language="python", interactive=False, elem_id="image-code")
            inputs = [model, prompt, seed, steps, scale, *chosen.inputs]
            names = ("model", "prompt", "seed", "steps", "guidance_scale", *chosen.names)
            shared = Shared("image", dict(zip(names, inputs, strict=True)), chosen.start, EXAMPLES)
            outputs = [before, after, apart, figures, summary, code]
            connect(shared, image, outputs, jobs, run=run, stop=stop, submit=[prompt], examples=examples)
    return shared
