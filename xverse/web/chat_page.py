"""MESSAGES <-> BUBBLES. The chat page: one conversation a tab, answered as it is written."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import gradio as gr

from xverse.engine.request import Sampling
from xverse.web.client import Client, paced
from xverse.web.controls import chat_sampling, chat_sliders
from xverse.web.conversation import Conversation
from xverse.web.door import visitor_key
from xverse.web.sessions import Sessions, told
from xverse.web.words import Words

Shown = list[gr.ChatMessage]
Growing = Iterator[tuple[Shown, Conversation]]
MATH: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]


class ChatPage:
    """What the page does. It holds no conversation: Gradio keeps one for each tab, and hands it to
    each call. `build` lays the page out and joins the two."""

    def __init__(self, client: Client, words: Words, sessions: Sessions) -> None:
        self.client, self.words, self.sessions = client, words, sessions

    def take(self, box: str, exec: str, request: gr.Request) -> tuple[str, str, str, str]:
        """What stays in the two boxes, and what is sent of them: a result of a call goes alone."""
        with told():
            self.sessions.refuse_if_busy(request.session_hash)
            Conversation().asked(box, exec=exec)
        return (box, "", "", exec) if exec.strip() else ("", "", box, "")

    def chat(
        self,
        message: str,
        system: str,
        exec: str,
        max_new_tokens: float,
        temperature: float,
        top_k: float,
        top_p: float,
        repetition_penalty: float,
        talk: Conversation,
        request: gr.Request,
    ) -> Growing:
        """Send a message, and get the conversation as the answer grows. The conversation of a
        session goes on with each call. `system` counts on its first turn; `exec`, unless empty, is
        sent as the result of a function call instead of the message."""
        sliders = (max_new_tokens, temperature, top_k, top_p, repetition_penalty)
        with told():
            asked = talk.asked(message, system=system, exec=exec)
            yield from self._answer(talk, asked, chat_sampling(sliders), request)

    def retry(
        self,
        data: gr.RetryData,
        system: str,
        max_new_tokens: float,
        temperature: float,
        top_k: float,
        top_p: float,
        repetition_penalty: float,
        talk: Conversation,
        request: gr.Request,
    ) -> Growing:
        """Answer a message once more, and forget what followed it."""
        sliders = (max_new_tokens, temperature, top_k, top_p, repetition_penalty)
        with told():
            asked = talk.asked_again(_place(data), system=system)
            yield from self._answer(talk, asked, chat_sampling(sliders), request)

    def edit(
        self,
        data: gr.EditData,
        system: str,
        max_new_tokens: float,
        temperature: float,
        top_k: float,
        top_p: float,
        repetition_penalty: float,
        talk: Conversation,
        request: gr.Request,
    ) -> Growing:
        """Answer what a message now says, and forget what followed it."""
        sliders = (max_new_tokens, temperature, top_k, top_p, repetition_penalty)
        with told():
            asked = talk.asked_again(_place(data), system=system, text=str(data.value))
            yield from self._answer(talk, asked, chat_sampling(sliders), request)

    def stop(self, request: gr.Request) -> None:
        """End the answer; what there is of it stays."""
        self.sessions.stop(request.session_hash)

    def reset(self, request: gr.Request) -> tuple[Shown, Conversation, str, str]:
        """Forget the conversation, and end the answer if one is being made."""
        self.sessions.stop(request.session_hash, forget=True)
        return [], Conversation(), "", ""

    def build(self) -> None:
        """Lay the page out, inside of a `gr.Blocks`."""
        words = self.words
        talk = gr.State(Conversation())
        chatbot = gr.Chatbot(
            show_label=False,
            elem_id="talk",
            scale=1,
            height=None,
            editable="user",
            buttons=["copy"],
            layout="bubble",
            latex_delimiters=MATH,
            feedback_options=None,
            placeholder=f"<h2>{words.welcome}</h2>",
            examples=[
                {"text": each.text, "display_text": f"{each.title}\n{each.text}"}
                for each in words.examples
            ],
        )
        # What Gradio's API calls `message` and `exec`: the boxes are emptied before they are sent.
        message = gr.Textbox("", visible=False)
        result = gr.Textbox("", visible=False)
        with gr.Row(elem_id="ask"):
            box = gr.Textbox(
                "",
                placeholder=words.write_here,
                label=words.message,
                show_label=False,
                container=False,
                lines=1,
                max_lines=8,
                scale=1,
                autofocus=True,
                elem_id="box",
            )
            reset = gr.Button(words.reset, elem_id="reset", scale=0)
            send = gr.Button(words.send, variant="primary", elem_id="send", scale=0)
            stop = gr.Button(words.stop, variant="stop", elem_id="stop", scale=0, visible=False)
        with gr.Accordion(words.advanced, open=False, elem_id="settings"):
            with gr.Row():
                system = gr.Textbox(
                    "", label=words.system, info=words.system_info, lines=2, elem_id="system"
                )
                exec = gr.Textbox(
                    "", label=words.exec, info=words.exec_info, lines=2, elem_id="exec"
                )
            with gr.Row():
                sliders = chat_sliders(words, self.client.defaults, self.client.context)
        gr.HTML(f'<div class="hint">{words.hint}</div>', padding=False)

        settings = [*sliders, talk]
        grown = [chatbot, talk]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        hidden = {**quiet, "queue": False}
        answer: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
        buttons = [send, stop]
        taken = gr.on(
            [box.submit, send.click],
            self.take,
            [box, exec],
            [box, exec, message, result],
            **quiet,  # through the queue: only so are errors shown in words
            concurrency_limit=None,
        )
        picked = chatbot.example_select(_picked, None, [message, result], **hidden)
        for first, visibility in ((taken, "public"), (picked, "private")):
            busy = first.success(_busy, None, buttons, **hidden)
            said = busy.then(
                self.chat,
                [message, system, result, *settings],
                grown,
                api_name="chat",
                api_visibility=visibility,
                **answer,
            )
            said.success(_idle, None, buttons, **hidden)
            back = [message, result, box, exec]
            said.failure(_give_back, back, [box, exec, *buttons], **hidden)
        for event, again in ((chatbot.retry, self.retry), (chatbot.edit, self.edit)):
            event(_busy, None, buttons, **hidden)
            said = event(again, [system, *settings], grown, api_visibility="private", **answer)
            said.success(_idle, None, buttons, **hidden)
            said.failure(_idle, None, buttons, **hidden)
        stop.click(self.stop, None, None, **hidden)
        for event in (reset.click, chatbot.clear):
            event(self.reset, None, [chatbot, talk, box, exec], **hidden)

    def _answer(
        self, talk: Conversation, asked: Conversation, sampling: Sampling, request: gr.Request
    ) -> Growing:
        """`asked` with the answer as it grows; back to `talk` where there comes an error of it."""
        with self.sessions.answering(request.session_hash) as running:
            text, finish = "", None
            yield _shown(asked), asked
            try:
                client = self.client.of(visitor_key(request.headers))
                with closing(paced(client.stream_chat(asked.messages(), sampling))) as pieces:
                    for piece in pieces:
                        text, finish = text + piece.text, piece.finish
                        if running.stopped:
                            break
                        yield _shown(asked.answered(text)), asked.answered(text)
            except Exception:
                yield _shown(talk), talk
                raise
            if running.forgotten:
                # Whichever arrives last at the page, this or what Reset returned, it is empty.
                yield [], Conversation()
            elif running.stopped:
                yield _shown(asked.answered(text)), asked.answered(text)
            elif finish == "length":
                gr.Info(self.words.cut)


def _shown(talk: Conversation) -> Shown:
    """As the chatbot takes it; results of calls stand on the user's side, under their role."""
    return [
        gr.ChatMessage(
            role="assistant" if turn.role == "assistant" else "user",
            content=turn.content,
            metadata={"title": turn.role} if turn.role == "exec" else {},
        )
        for turn in talk.turns
    ]


def _place(data: gr.RetryData | gr.EditData) -> int:
    return data.index if isinstance(data.index, int) else data.index[0]


def _picked(data: gr.SelectData) -> tuple[str, str]:
    return str(data.value["text"]), ""


def _busy() -> tuple[gr.Button, gr.Button]:
    return gr.Button(visible=False), gr.Button(visible=True)


def _idle() -> tuple[gr.Button, gr.Button]:
    return gr.Button(visible=True), gr.Button(visible=False)


def _give_back(
    message: str, result: str, box: str, exec: str
) -> tuple[str, str, gr.Button, gr.Button]:
    """What could not be sent, back in its box, unless something new is written there."""
    return box or message, exec or result, *_idle()
