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
:root { --page: 56rem; }
footer { display: none !important; }
.gradio-container { max-width: 100% !important; padding: 0 !important; }
.gradio-container > main, main.fillable { padding: 0 !important; max-width: 100% !important; }
.page { width: 100%; max-width: var(--page); margin: 0 auto !important; padding: 0 1rem 1rem; }

#top { width: 100%; max-width: var(--page); margin: 0 auto; padding: .9rem 1rem .5rem;
  flex: none; overflow: visible; }
#top .bar { display: flex; align-items: center; gap: .75rem; }
#top .mark { font-weight: 750; letter-spacing: .12em; font-size: 1.05rem;
  background: linear-gradient(90deg, #2563eb, #7c3aed 60%, #db2777);
  -webkit-background-clip: text; background-clip: text; color: transparent; }
#top .model { color: var(--body-text-color-subdued); font-size: .9rem; white-space: nowrap;
  overflow: hidden; text-overflow: ellipsis; padding-left: .75rem;
  border-left: 1px solid var(--border-color-primary); }
#top .right { margin-left: auto; display: flex; align-items: center; gap: .15rem; flex: none; }
#top a, #top button { color: var(--body-text-color-subdued); text-decoration: none;
  font-size: .82rem; line-height: 1; padding: .45rem .55rem; border-radius: 999px; border: 0;
  background: none; cursor: pointer; }
#top a:hover, #top button:hover { background: var(--background-fill-secondary);
  color: var(--body-text-color); }
#top a[aria-current] { color: var(--body-text-color); font-weight: 650; }

#talk { border: 0 !important; background: none !important; box-shadow: none !important;
  min-height: 16rem; }
#talk .bubble-wrap { background: none !important; padding-top: .5rem; }
#talk .message-wrap { padding: 0 !important; }
#talk .user.message, #talk .user .message-content { font-size: 1rem; }
#talk .bot.message { background: none !important; border: 0 !important; box-shadow: none !important;
  padding-left: 0 !important; }
#talk .user.message { border: 0 !important; border-radius: 1.15rem 1.15rem .35rem 1.15rem !important;
  box-shadow: none !important; }
#talk .example { border-radius: .9rem; }

#ask { align-items: flex-end; gap: .5rem; padding: .4rem .45rem .4rem .35rem; flex-wrap: nowrap;
  border: 1px solid var(--border-color-primary); border-radius: 1.4rem;
  background: var(--block-background-fill); box-shadow: 0 1px 10px rgb(15 23 42 / .07);
  flex: none; overflow: visible; }
#ask:focus-within { border-color: var(--color-accent); }
#ask .block, #ask .form { background: none; border: 0 !important; box-shadow: none !important;
  padding: 0; min-width: 0 !important; }
#ask textarea { background: none !important; border: 0 !important; box-shadow: none !important;
  padding: .5rem .6rem; font-size: 1rem; }
#ask button { border-radius: 999px; min-width: 4.6rem; flex: none; height: 2.5rem; }
#settings { border-radius: 1rem; flex: none; }
.hint { color: var(--body-text-color-subdued); font-size: .78rem; text-align: center; flex: none; }

#written textarea, #prompt textarea { font-size: 1rem; line-height: 1.6; }
.buttons { gap: .5rem; }

@media (max-width: 640px) {
  .page { padding: 0 .6rem .6rem; }
  #top { padding: .6rem .7rem .3rem; }
  #top .model { font-size: .8rem; }
  #top a, #top button { padding: .45rem .4rem; }
  #ask button { min-width: 3.6rem; padding: 0 .7rem; }
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
