"""The tab of language models: an answer, the sinks of a prompt and a pass key, without and with a method."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

import steer
from steer.guidance import Guidance
from steer_demos.app import drawing, forms, language_answers, language_looks
from steer_demos.app.jobs import Jobs, in_words
from steer_demos.app.language_answers import Part
from steer_demos.app.sharing import Shared, connect, draw_sharing
from steer_demos.app.stage import Stage

MODELS = ("smollm2-135m-instruct",)
MODES = {"chat": "Answer it", "completion": "Continue it"}
PARTS = {"answer": "What it writes", "sinks": "Where it looks", "passkey": "Find a pass key"}
MEASURES = {"first": "attention on the first token", "sinks": "sinks after it"}
QUESTION = "Why is the sky blue?"
STORY = (
    "The lighthouse keeper climbs the stairs every evening with a lamp in one hand and a bag of bread in the other. "
    "The gulls know him and follow him. Tonight there is a light on the sea that he has never seen before, and"
)
EXAMPLES: dict[str, dict[str, dict[str, Any]]] = {
    "answer": {
        "ACT on a question": {"prompt": QUESTION, "mode": "chat", "method": "ACT", "settings": {}},
        "StreamingLLM, 24 tokens": {
            "prompt": STORY,
            "mode": "completion",
            "method": "StreamingLLM",
            "settings": {"n_recent": 24},
        },
        "StreamingLLM without sinks": {
            "prompt": STORY,
            "mode": "completion",
            "method": "StreamingLLM",
            "settings": {"n_recent": 24, "n_sink": 0},
        },
    },
    "sinks": {
        "ACT on all heads": {
            "prompt": STORY,
            "mode": "completion",
            "measure": "sinks",
            "method": "ACT",
            "settings": {"heads": list(range(9))},
        },
        "StreamingLLM, 24 tokens": {
            "prompt": STORY,
            "mode": "completion",
            "measure": "first",
            "method": "StreamingLLM",
            "settings": {"n_recent": 24},
        },
    },
    "passkey": {
        "Lost: StreamingLLM": {
            "tokens": 600,
            "depth": 0.3,
            "method": "StreamingLLM",
            "settings": {"n_recent": 256},
        },
        "Kept: DuoAttention": {
            "tokens": 600,
            "depth": 0.3,
            "method": "DuoAttention",
            "settings": {"sink": 4, "recent": 256},
        },
        "Lost: without its retrieval heads": {
            "tokens": 400,
            "depth": 0.5,
            "method": "RetrievalHeads",
            "settings": {"k": 5},
        },
    },
}


def methods() -> list[str]:
    """Methods for causal attention that need no pictures."""
    return [
        name
        for name, method in steer.methods().items()
        if "causal" in method.kinds and not method.needs_pictures and not issubclass(method, Guidance)
    ]


def tab(stage: Stage, jobs: Jobs) -> Shared:
    """Draw the tab; its inputs, to be shared."""

    @in_words
    def language(
        model: str,
        prompt: str,
        mode: str,
        new_tokens: float,
        temperature: float,
        seed: float,
        method: str,
        settings: dict[str, Any],
        saved: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (Gradio looks for it there)
    ) -> tuple[list[Part], list[Part], str, str, str]:
        """Answer or continue a prompt without and with a method.

        Returns: both texts with the first difference marked; figures; where the method acted; and the code.
        """
        chat, number = is_chat(mode), drawing.seed_of(seed)
        with jobs.running(request, progress) as job, stage.holding(model, "text", job) as loaded:
            chosen = forms.steering(stage.sources, model, method, settings, saved)
            writing: dict[str, Any] = {"chat": chat, "new_tokens": new_tokens, "temperature": temperature}
            pair = language_answers.answer_pair(loaded, chosen, prompt, job, seed=number, **writing)
            before, after = pair.marked(loaded.processor)
        made = forms.in_python(model, chosen, settings, saved)
        code = language_answers.python(loaded, made, prompt, chat, int(new_tokens), temperature)
        drawn = {"seed": str(number)} if temperature > 0 else {}
        return before, after, drawing.table({**pair.figures(chosen), **drawn}), pair.summary, code

    @in_words
    def sinks(
        model: str,
        prompt: str,
        mode: str,
        measure: str,
        method: str,
        settings: dict[str, Any],
        saved: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Image.Image, Image.Image, str]:
        """Where the attention of a prompt goes without and with a method.

        Returns: the prompt with the attention that each token gets, a picture of all heads, and figures.
        """
        chat = is_chat(mode)
        with jobs.running(request, progress) as job, stage.holding(model, "text", job) as loaded:
            chosen = forms.steering(stage.sources, model, method, settings, saved)
            text, heads, figures = language_looks.sinks(loaded, chosen, prompt, job, chat=chat, measure=measure)
        return text, heads, drawing.table(figures)

    @in_words
    def passkey(
        model: str,
        tokens: float,
        depth: float,
        key_seed: float,
        method: str,
        settings: dict[str, Any],
        saved: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[str, Image.Image, str, str, list[Part]]:
        """Hide a number in a long text, and ask for it without and with a method.

        Returns: whether it was found, where the answer looks and what the method keeps, both answers, and the text.
        """
        number = drawing.seed_of(key_seed)
        with jobs.running(request, progress) as job, stage.holding(model, "text", job) as loaded:
            chosen = forms.steering(stage.sources, model, method, settings, saved)
            found = language_looks.trial(loaded, chosen, job, tokens=tokens, depth=depth, seed=number)
        answers = [f"The pass key is{answer.text}" for answer in (found.before, found.after)]
        return drawing.table(found.figures(chosen)), found.draw(chosen), *answers, found.parts  # type: ignore[return-value]

    part = gr.Radio([(label, name) for name, label in PARTS.items()], value="answer", label="What to see")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            model = forms.model_box(MODELS, stage.sources)
            with gr.Group() as asks:
                prompt = gr.Textbox(QUESTION, label="Prompt", lines=3, max_length=language_answers.LONGEST_PROMPT)
                mode = gr.Radio([(label, name) for name, label in MODES.items()], value="chat", label="The model shall")
            with gr.Group() as writes:
                new_tokens = gr.Slider(1, language_answers.MOST_NEW, 40, step=1, label="New tokens")
                with gr.Row():
                    temperature = gr.Slider(
                        0,
                        language_answers.MOST_TEMPERATURE,
                        0,
                        step=0.1,
                        label="Temperature",
                        info="0: the likeliest",
                        min_width=140,
                    )
                    seed = gr.Number(0, label="Seed", precision=0, info="-1: a new one", min_width=90)
            with gr.Group(visible=False) as looks:
                measure = gr.Radio(
                    [(label, name) for name, label in MEASURES.items()], value="first", label="Of each head, show"
                )
            with gr.Group(visible=False) as hides:
                tokens = gr.Slider(
                    language_looks.LEAST_KEY, language_answers.MOST_TOKENS, 600, step=50, label="Tokens of the text"
                )
                depth = gr.Slider(0, 1, 0.3, step=0.05, label="Depth", info="Share of the text before the pass key.")
                key_seed = gr.Number(0, label="Seed", precision=0, info="Of text and key; -1: a new one")
            chosen = forms.chooser(methods(), "StreamingLLM")
        method = dict(zip(chosen.names, chosen.inputs, strict=True))
        asked = {"model": model, "prompt": prompt, "mode": mode}
        with gr.Column(scale=3, min_width=300):
            with gr.Column(min_width=280) as answer_part:
                examples = gr.Row(elem_classes="examples")
                run, stop = _buttons("Write")
                colour = {
                    "color_map": {language_answers.DIFFERS: "orange"},
                    "show_legend": True,
                    "elem_classes": "marked",
                }
                with gr.Row():
                    before = gr.HighlightedText(label="Without", min_width=240, **colour)
                    after = gr.HighlightedText(label="With the method", min_width=240, **colour)
                figures = gr.Markdown(label="Figures", elem_id="language-figures")
                with gr.Accordion("Where it acted, and the same in Python", open=False):
                    summary = gr.Textbox(label="Where it acted", lines=3, max_lines=12, interactive=False)
                    code = gr.Code(label="The same in Python", language="python", interactive=False)
                sampling = {"new_tokens": new_tokens, "temperature": temperature, "seed": seed}
                this = Shared("language", {**asked, **sampling, **method}, chosen.start, EXAMPLES["answer"])
                outputs = [before, after, figures, summary, code]
                connect(this, language, outputs, jobs, run=run, stop=stop, examples=examples, share=False)
            with gr.Column(visible=False, min_width=280) as sinks_part:
                examples = gr.Row(elem_classes="examples")
                run, stop = _buttons("Look")
                picture = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}
                text = gr.Image(
                    label="Attention on each token of the prompt",
                    alt_text="the prompt, with the attention on each token as colour, without and with the method",
                    **picture,
                )
                heads = gr.Image(
                    label="All heads: layers down, heads across",
                    alt_text="a map of all heads without the method beside one with it",
                    height=480,
                    **picture,
                )
                figures = gr.Markdown(label="Figures", elem_id="sinks-figures")
                this = Shared("sinks", {**asked, "measure": measure, **method}, chosen.start, EXAMPLES["sinks"])
                outputs = [text, heads, figures]
                connect(this, sinks, outputs, jobs, run=run, stop=stop, examples=examples, share=False)
            with gr.Column(visible=False, min_width=280) as passkey_part:
                examples = gr.Row(elem_classes="examples")
                run, stop = _buttons("Hide and ask")
                figures = gr.Markdown(label="Figures", elem_id="passkey-figures")
                view = gr.Image(
                    label="The text from its beginning to its end",
                    alt_text="attention on each part of the text as the answer begins, and which heads still see it",
                    **picture,
                )
                with gr.Row():
                    dense = gr.Textbox(label="Answer without", interactive=False, min_width=200)
                    steered = gr.Textbox(label="Answer with the method", interactive=False, min_width=200)
                with gr.Accordion("The text", open=False):
                    whole = gr.HighlightedText(
                        label="The text", show_legend=False, color_map={"pass key": "orange"}, elem_classes="marked"
                    )
                hiding = {"model": model, "tokens": tokens, "depth": depth, "key_seed": key_seed}
                this = Shared("passkey", {**hiding, **method}, chosen.start, EXAMPLES["passkey"])
                outputs = [figures, view, dense, steered, whole]
                connect(this, passkey, outputs, jobs, run=run, stop=stop, examples=examples, share=False)
            everything = {"part": part, **asked, **sampling, "measure": measure, **hiding, **method}
            shared = Shared("language", everything, chosen.start)
            draw_sharing(shared)
    seen = {
        asks: ("answer", "sinks"),
        writes: ("answer",),
        answer_part: ("answer",),
        looks: ("sinks",),
        sinks_part: ("sinks",),
        hides: ("passkey",),
        passkey_part: ("passkey",),
    }

    def show(part: str) -> list[Any]:
        return [gr.update(visible=part in parts) for parts in seen.values()]

    part.change(show, part, list(seen), api_visibility="private", queue=False, show_progress="hidden")
    return shared


def is_chat(mode: str) -> bool:
    """Whether a prompt is a message.

    Raises:
        ValueError: no such mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} does not exist; choose from {', '.join(MODES)}")
    return mode == "chat"


def _buttons(label: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        return gr.Button(label, variant="primary", scale=3), gr.Button("Stop", scale=1, min_width=80)
