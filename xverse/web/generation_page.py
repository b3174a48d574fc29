"""A BEGINNING -> ITS CONTINUATION. The text generation page, with the published sliders."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import gradio as gr

from xverse.web.client import Client, paced
from xverse.web.controls import generation_sampling, generation_sliders
from xverse.web.door import visitor_key
from xverse.web.sessions import Sessions, told
from xverse.web.words import Words


class GenerationPage:
    """What the page does; `build` lays it out."""

    def __init__(self, client: Client, words: Words, sessions: Sessions) -> None:
        self.client, self.words, self.sessions = client, words, sessions

    def generate(
        self,
        prompt: str,
        max_new_tokens: float,
        temperature: float,
        top_k: float,
        top_p: float,
        request: gr.Request,
    ) -> Iterator[str]:
        """Continue a text; the continuation as it grows. temperature 0 is greedy, top_k 0 off."""
        sliders = (max_new_tokens, temperature, top_k, top_p)
        with told(), self.sessions.answering(request.session_hash) as running:
            sampling, text = generation_sampling(sliders), ""
            yield text
            client = self.client.of(visitor_key(request.headers))
            with closing(paced(client.stream_text(prompt, sampling))) as pieces:
                for piece in pieces:
                    if running.stopped:
                        break
                    text += piece.text
                    yield text
            if running.forgotten:
                yield ""

    def stop(self, request: gr.Request) -> None:
        """End the continuation; what there is of it stays."""
        self.sessions.stop(request.session_hash)

    def clear(self, request: gr.Request) -> tuple[str, str]:
        """Empty both boxes, and end the continuation if one is being made."""
        self.sessions.stop(request.session_hash, forget=True)
        return "", ""

    def build(self) -> None:
        """Lay the page out, inside of a `gr.Blocks`."""
        words = self.words
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                prompt = gr.Textbox(
                    "",
                    label=words.prompt,
                    placeholder=words.prompt_here,
                    lines=5,
                    max_lines=16,
                    autofocus=True,
                    elem_id="prompt",
                )
                with gr.Row(elem_classes="buttons"):
                    clear = gr.Button(words.clear, elem_id="clear")
                    start = gr.Button(words.generate, variant="primary", elem_id="generate")
                    stop = gr.Button(words.stop, variant="stop", elem_id="halt", visible=False)
                written = gr.Textbox(
                    "",
                    label=words.written,
                    placeholder=words.written_here,
                    lines=9,
                    max_lines=24,
                    interactive=False,
                    buttons=["copy"],
                    elem_id="written",
                )
            with gr.Column(scale=2, min_width=260):
                sliders = generation_sliders(words)
                gr.Examples([[text] for text in words.prompts], [prompt], label=words.try_one)

        hidden: dict[str, Any] = {
            "show_progress": "hidden",
            "api_visibility": "private",
            "queue": False,
        }
        start.click(_busy, None, [start, stop], **hidden)
        wrote = start.click(
            self.generate,
            [prompt, *sliders],
            written,
            api_name="generate",
            show_progress="hidden",
            concurrency_limit=None,
        )
        wrote.success(_idle, None, [start, stop], **hidden)
        wrote.failure(_idle, None, [start, stop], **hidden)
        stop.click(self.stop, None, None, **hidden)
        clear.click(self.clear, None, [prompt, written], **hidden)


def _busy() -> tuple[gr.Button, gr.Button]:
    return gr.Button(visible=False), gr.Button(visible=True)


def _idle() -> tuple[gr.Button, gr.Button]:
    return gr.Button(visible=True), gr.Button(visible=False)
