"""HOW THE PAGES LOOK. Theme and style sheet, light and dark; fonts of the reader's own system."""

import gradio as gr

FONTS = (
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Noto Sans CJK SC",
    "sans-serif",
)
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = """
:root { --page: 56rem; --rest: 18.6rem; }
.solo { --rest: 15.4rem; }
footer { display: none !important; }
/* Errors are told in words, at the corner of the page; nothing covers the conversation. */
[data-testid="status-tracker"]:has(.error) { display: none !important; }
.gradio-container .main.fillable { padding: 0 !important; max-width: 100% !important; }
.gradio-container .main .contain > .column { gap: 0; }
.page { width: 100%; max-width: var(--page); margin: 0 auto !important; padding: 0 1rem .75rem; }
.page .tabitem { padding: .75rem 0 0; }
button.lg, button.md { font-weight: 600; font-size: .95rem; }

#top { width: 100%; max-width: var(--page); margin: 0 auto; padding: .8rem 1rem .45rem;
  flex: none; overflow: visible; }
#top .bar { display: flex; align-items: center; gap: .75rem; }
#top .mark { font-weight: 750; letter-spacing: .12em; font-size: 1.05rem;
  background: linear-gradient(90deg, #2563eb, #7c3aed 60%, #db2777);
  -webkit-background-clip: text; background-clip: text; color: transparent; }
#top .model { color: var(--body-text-color-subdued); font-size: .9rem; white-space: nowrap;
  overflow: hidden; text-overflow: ellipsis; padding-left: .75rem; min-width: 0;
  border-left: 1px solid var(--border-color-primary); }
#top .right { margin-left: auto; display: flex; align-items: center; gap: .15rem; flex: none; }
#top a, #top button { color: var(--body-text-color-subdued); text-decoration: none;
  font-size: .82rem; line-height: 1; padding: .45rem .55rem; border-radius: 999px; border: 0;
  background: none; cursor: pointer; }
#top a:hover, #top button:hover { background: var(--background-fill-secondary);
  color: var(--body-text-color); }
#top a[aria-current] { color: var(--body-text-color); font-weight: 650; }

#talk { border: 0 !important; background: none !important; box-shadow: none !important;
  height: calc(100dvh - var(--rest)); min-height: 17rem; }
#talk .top-panel { display: none; }
#talk .bubble-wrap { background: none !important; padding-top: .25rem; }
#talk .message-wrap { padding: 0 .25rem !important; }
#talk .message-row { max-width: 100%; margin: .35rem 0; }
#talk .placeholder-content { justify-content: center; }
#talk .placeholder { flex: 0 0 auto; height: auto; padding-bottom: 1.2rem; }
#talk .bot.message { background: none !important; border: 0 !important; padding-left: 0;
  box-shadow: none !important; max-width: 100%; color: var(--body-text-color); }
#talk .bot-row .flex-wrap { max-width: 100% !important; }
#talk .user.message { border: 0 !important; box-shadow: none !important; padding: .25rem .7rem;
  border-radius: 1.15rem 1.15rem .35rem 1.15rem !important; color: var(--body-text-color); }
#talk .message-buttons, #talk .message-buttons > * { margin: 0 !important; padding: 0 !important; }
#talk .message-buttons .icon-button-wrapper { border: 0; background: none; box-shadow: none; }
#talk .example { border-radius: .9rem; padding: .8rem .95rem; align-items: flex-start; }
#talk .example-text { white-space: pre-line; line-height: 1.45; display: block;
  color: var(--body-text-color-subdued); font-size: .84rem; text-align: left; }
#talk .example-text::first-line { color: var(--body-text-color); font-weight: 600;
  font-size: .92rem; }

#ask { align-items: flex-end; gap: .4rem; padding: .4rem .45rem .4rem .35rem; flex-wrap: nowrap;
  border: 1px solid var(--border-color-primary); border-radius: 1.4rem;
  background: var(--block-background-fill); box-shadow: 0 1px 10px rgb(15 23 42 / .07);
  flex: none; overflow: visible; }
#ask:focus-within { border-color: var(--color-accent); }
#ask .block, #ask .form { background: none; border: 0 !important; box-shadow: none !important;
  padding: 0; min-width: 0 !important; }
#ask textarea { background: none !important; border: 0 !important; box-shadow: none !important;
  padding: .45rem .6rem; font-size: 1rem; }
#ask button { border-radius: 999px; min-width: 4.4rem; flex: none; height: 2.4rem; }
#ask #reset { background: none; color: var(--body-text-color-subdued); }
#ask #reset:hover { background: var(--background-fill-secondary); color: var(--body-text-color); }
#settings { border-radius: 1rem; flex: none; }
.hint { color: var(--body-text-color-subdued); font-size: .78rem; text-align: center; }

#written textarea, #prompt textarea { font-size: 1rem; line-height: 1.6; }
.buttons { gap: .5rem; }

@media (max-width: 640px) {
  .page { padding: 0 .6rem .6rem; }
  #top { padding: .6rem .7rem .3rem; }
  #top .model { font-size: .8rem; padding-left: .5rem; }
  #top .bar { gap: .5rem; }
  #top a, #top button { padding: .45rem .35rem; font-size: .78rem; }
  :root { --rest: 21rem; }
  .solo { --rest: 18rem; }
  #talk .examples { grid-template-columns: 1fr 1fr; gap: .5rem; padding: .25rem; }
  #ask { flex-wrap: wrap; justify-content: flex-end; }
  #ask > .block { flex: 1 0 100% !important; }
  #ask button { height: 2.2rem; }
}
"""

# Gradio follows the system's choice of light or dark; this button changes it for the page.
FLIP = "document.body.classList.toggle('dark')"


def theme() -> gr.themes.Base:
    """Quiet greys with one accent; no font is fetched from anywhere."""
    built = gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        secondary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_lg,
        font=FONTS,
        font_mono=MONO,
    )
    return built.set(
        body_background_fill="white",
        body_background_fill_dark="#0d1117",
        block_background_fill="white",
        block_background_fill_dark="#151b24",
        background_fill_secondary="*neutral_100",
        background_fill_secondary_dark="#1c2430",
        border_color_primary="*neutral_200",
        border_color_primary_dark="#2a3442",
        block_border_width="1px",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_shadow="none",
        input_background_fill="*neutral_50",
        input_background_fill_dark="#10161f",
        color_accent_soft="*primary_50",
        color_accent_soft_dark="#26304a",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_500",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
    )
