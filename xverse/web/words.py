"""LANGUAGE -> LABELS. Every word of the pages in Chinese, English and Japanese."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A question to begin with: what its card says, and what is asked."""

    title: str
    text: str


@dataclass(frozen=True)
class Words:
    """The words of one language."""

    language: str  # its own name for itself
    tag: str  # and what HTML calls it
    chat: str
    generation: str
    flip: str
    # the form that asks for a key
    key: str
    key_kept: str
    key_wrong: str
    enter: str
    # chat
    welcome: str
    message: str
    write_here: str
    send: str
    stop: str
    reset: str
    advanced: str
    system: str
    system_info: str
    exec: str
    exec_info: str
    hint: str
    cut: str
    examples: tuple[Example, ...]
    # both
    max_new_tokens: str
    temperature: str
    colder: str
    top_k: str
    fewer: str
    top_p: str
    likelier: str
    penalty: str
    rarer: str
    # text generation
    prompt: str
    prompt_here: str
    written: str
    written_here: str
    generate: str
    clear: str
    prompts: tuple[str, ...]
    try_one: str


ZH = Words(
    language="中文",
    tag="zh",
    chat="对话",
    generation="文本续写",
    flip="切换深色与浅色",
    key="API 密钥",
    key_kept="密钥只保存在本浏览器中，关闭浏览器后即失效。",
    key_wrong="此服务器不认识这个密钥。",
    enter="进入",
    welcome="有什么可以帮您？",
    message="消息",
    write_here="输入消息",
    send="发送",
    stop="停止",
    reset="重置",
    advanced="高级设置",
    system="system（系统提示）",
    system_info="只在第一轮对话生效；要更换请先重置。",
    exec="exec（函数调用结果）",
    exec_info="不为空时，以 exec 角色代替用户消息发送。",
    hint="Enter 发送，Shift+Enter 换行。模型可能出错，重要信息请核实。",
    cut="回答达到长度上限而中断，可在高级设置中调高。",
    examples=(
        Example("角色扮演", "请你扮演一位唐代诗人，和我聊聊你最近写的一首诗。"),
        Example("知识问答", "1955年谁是美国总统？他是哪个党派的？"),
        Example("编程", "用 Python 写一个快速排序函数，并解释它的时间复杂度。"),
        Example("数学", "一列火车每小时行驶 90 千米，6 小时行驶多少千米？请写出步骤。"),
        Example("多语言", "把“海内存知己，天涯若比邻”翻译成英语、法语和日语。"),
        Example("写作", "为一家海边的小书店写一段 100 字左右的介绍。"),
    ),
    max_new_tokens="最大生成长度 max_new_tokens",
    temperature="温度 temperature",
    colder="越高越随机；0 总是取最可能的词。",
    top_k="top_k",
    fewer="只在最可能的若干个词中选择；0 为关闭。",
    top_p="top_p",
    likelier="只在累计概率达到此值的词中选择；1 为关闭。",
    penalty="重复惩罚 repetition_penalty",
    rarer="大于 1 时，出现过的词更少再次出现。",
    prompt="开头",
    prompt_here="写一个开头，模型会接着写下去",
    written="续写",
    written_here="续写的文字会出现在这里",
    generate="生成",
    clear="清空",
    prompts=(
        "北京的景点：故宫、天坛、万里长城等。\n深圳的景点：",
        "从前，山脚下住着一位老钟表匠，",
    ),
    try_one="试试这些开头",
)

EN = Words(
    language="English",
    tag="en",
    chat="Chat",
    generation="Text generation",
    flip="Switch between dark and light",
    key="API key",
    key_kept="Only this browser keeps it, until it is closed.",
    key_wrong="This server does not know that key.",
    enter="Enter",
    welcome="What can I do for you?",
    message="Message",
    write_here="Write a message",
    send="Send",
    stop="Stop",
    reset="Reset",
    advanced="Advanced settings",
    system="system",
    system_info="Counts only on the first turn; reset to change it.",
    exec="exec",
    exec_info="A function call's result; unless empty, it is sent as role exec, without a message.",
    hint="Enter sends, Shift+Enter is a new line. The model can be wrong; check what matters.",
    cut="The answer was cut at its length limit, which Advanced settings can raise.",
    examples=(
        Example("Role play", "You keep an old lighthouse. Tell me about your quietest night."),
        Example("Questions", "Who was the president of the United States in 1955?"),
        Example("Programming", "Write quicksort in Python and explain how long it takes."),
        Example("Mathematics", "A train covers 90 km an hour. How far in 6 hours? Show the steps."),
        Example("Languages", "Translate “A friend in need is a friend indeed” into French."),
        Example("Writing", "Describe a small bookshop by the sea, in about 80 words."),
    ),
    max_new_tokens="max_new_tokens",
    temperature="temperature",
    colder="Higher is more random; 0 always takes the likeliest token.",
    top_k="top_k",
    fewer="Choose among this many likeliest tokens; 0 is off.",
    top_p="top_p",
    likelier="Choose among the likeliest tokens that together reach this probability; 1 is off.",
    penalty="repetition_penalty",
    rarer="Above 1, tokens seen before become less likely.",
    prompt="Beginning",
    prompt_here="Write a beginning, and the model goes on from there",
    written="Continuation",
    written_here="What the model writes appears here",
    generate="Generate",
    clear="Clear",
    prompts=(
        "Sights of Paris: the Louvre, the Eiffel Tower, Notre-Dame.\nSights of Rome:",
        "Once upon a time an old clockmaker lived at the foot of a mountain, and",
    ),
    try_one="Beginnings to try",
)

JA = Words(
    language="日本語",
    tag="ja",
    chat="チャット",
    generation="文章生成",
    flip="ダークとライトを切り替える",
    key="API キー",
    key_kept="キーはこのブラウザーだけが保持し、閉じると消えます。",
    key_wrong="このサーバーはそのキーを知りません。",
    enter="入る",
    welcome="何をお手伝いしましょうか？",
    message="メッセージ",
    write_here="メッセージを入力",
    send="送信",
    stop="停止",
    reset="リセット",
    advanced="詳細設定",
    system="system（システムメッセージ）",
    system_info="最初のターンでのみ有効です。変えるにはリセットしてください。",
    exec="exec（関数呼び出しの結果）",
    exec_info="空でなければ、メッセージの代わりに exec として送られます。",
    hint="Enter で送信、Shift+Enter で改行。回答は間違うことがあります。",
    cut="回答が長さの上限に達しました。詳細設定で上限を上げられます。",
    examples=(
        Example("ロールプレイ", "あなたは古い灯台の番人です。一番静かだった夜の話をしてください。"),
        Example("質問", "1955年のアメリカ大統領は誰でしたか？"),
        Example("プログラミング", "Python でクイックソートを書き、計算量を説明してください。"),
        Example("数学", "時速90kmの列車は6時間で何km進みますか？途中の式も書いてください。"),
        Example("多言語", "「一期一会」の意味を英語と中国語で説明してください。"),
        Example("文章", "海辺の小さな本屋を100字ほどで紹介してください。"),
    ),
    max_new_tokens="最大生成長 max_new_tokens",
    temperature="温度 temperature",
    colder="高いほどランダムになります。0 は常に最も確からしい語を選びます。",
    top_k="top_k",
    fewer="確からしい順にこの数の語から選びます。0 は無効です。",
    top_p="top_p",
    likelier="合計がこの確率に達するまでの語から選びます。1 は無効です。",
    penalty="繰り返しペナルティ repetition_penalty",
    rarer="1 より大きいと、一度出た語が出にくくなります。",
    prompt="書き出し",
    prompt_here="書き出しを入力すると、モデルが続きを書きます",
    written="続き",
    written_here="モデルの書いた文章がここに現れます",
    generate="生成",
    clear="クリア",
    prompts=(
        "東京の名所：浅草寺、東京タワー、上野公園。\n京都の名所：",
        "むかしむかし、山のふもとに年老いた時計職人が住んでいて、",
    ),
    try_one="書き出しの例",
)

LANGUAGES = {"zh": ZH, "en": EN, "ja": JA}
FALLBACK = "en"


def negotiate(accept_language: str) -> str:
    """The language that a browser's Accept-Language header likes best of ours; else English."""
    wishes: list[tuple[float, str]] = []
    for wish in accept_language.split(",")[:32]:
        tag, _, quality = wish.strip().partition(";")
        language = tag.strip().lower().split("-")[0]
        try:
            weight = float(quality.strip().removeprefix("q=") or 1)
        except ValueError:
            continue
        if language in LANGUAGES and 0 < weight <= 1:
            wishes.append((weight, language))
    return max(wishes, key=lambda wish: wish[0], default=(0.0, FALLBACK))[1]
