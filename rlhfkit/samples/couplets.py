"""A small grammar of couplets and the gold judge that goes with it: what RLHF really did, next to what a reward model believes.

A second line is right when it has as many characters as the first, the same parts of speech in the same places, none of its characters, and
a last character of the other tone class (level or oblique, by modern standard pronunciation). The lexicon and the lines are our own.
"""
import random
from functools import lru_cache

# Words by part of speech; in each pair the words ending in a level tone (1, 2) stand first, those in an oblique tone (3, 4) second.
LEXICON = {
    "noun2": ("春风 清风 晚风 白云 浮云 青山 远山 高山 春山 清泉 流泉 明窗 小窗 红楼 高楼 危楼 孤舟 轻舟 渔舟 归舟 垂杨 青松 苍松 寒松 梅花 荷花 桃花 杏花 "
              "飞花 黄莺 流莺 寒星 疏星 残星 朝霞 晚霞 红霞 炊烟 轻烟 寒烟 长江 寒江 春江 古城 江城 柴门 寒门 书声 钟声 琴声 涛声 茶香 墨香 书香 丹心 诗心 童心 "
              "游人 佳人 诗人 归人 新苗 春芽 寒潭 平湖 长堤 沙洲 芳洲",
              "秋月 明月 冷月 晓月 细雨 春雨 夜雨 暮雨 白雪 瑞雪 初雪 飞雪 绿水 流水 碧水 秋水 翠柳 细柳 岸柳 绿柳 古寺 山寺 小径 曲径 石径 落日 红日 晓日 暖日 "
              "野鹤 白鹤 孤鹤 飞燕 紫燕 归燕 花影 疏影 瘦影 画栋 旧梦 好梦 晓梦 古韵 琴韵 雅韵 笔墨 翰墨 皓首 故友 老友 远客 佳客 过客 碧浪 白浪 麦浪 晓露 玉露 "
              "白露 野草 碧草 芳草 老树 古树 玉树 夜幕 画舫 月影"),
    "verb": ("迎 邀 摇 吹 听 闻 穿 传 催 敲 描 临 随 留 藏 涵 浮 凝 飘 推",
             "送 照 映 染 洗 抱 绕 伴 醉 动 过 渡 卷 落 入 望 看 扫 度 抹"),
    "noun1": ("峰 溪 岩 桥 亭 帘 炉 琴 诗 鱼 蝉 莲 蓬 灯 旗 衣 杯 箫 棋 砂",
              "岭 涧 寺 路 殿 瓦 剑 酒 鼓 鼎 画 鸟 燕 杏 桂 叶 笋 杖 井 砚"),
    "adjective": ("新 寒 清 香 闲 幽 深 长 高 微 浓 平", "暖 翠 碧 绿 静 冷 淡 嫩 老 瘦 小 远"),
    "doublet": ("悠悠 依依 融融 盈盈 青青 纷纷 潺潺 绵绵 迢迢 茫茫 苍苍 涓涓 萧萧 重重 团团", "点点 片片 淡淡 袅袅 渺渺 滚滚 朗朗 阵阵 处处 落落 漫漫 脉脉 历历 郁郁 飒飒"),
    "place": ("中 前 旁 间 边", "上 下 里 外 后"),
}
PATTERNS = (
    ("noun2", "verb", "noun1"), ("doublet", "noun2"), ("adjective", "noun1", "verb", "noun1"),
    ("noun2", "verb", "noun2"), ("doublet", "noun2", "verb"), ("adjective", "noun1", "verb", "noun2"),
    ("noun2", "verb", "adjective", "noun2"), ("doublet", "noun2", "verb", "noun1"), ("noun2", "place", "verb", "noun2"),
    ("noun2", "noun2", "verb", "noun2"), ("noun2", "verb", "doublet", "noun2"), ("adjective", "noun1", "noun2", "verb", "noun2"),
)
SHIPPED = 6000          # pairs in raw/couplets.txt; what `make` draws after them is held out
PARTS = {part: tuple(w for side in sides for w in side.split()) for part, sides in LEXICON.items()}
PART_OF = {word: part for part, words in PARTS.items() for word in words}
TONE = {word[-1]: level for sides in LEXICON.values() for level, side in zip(("level", "oblique"), sides)
        for word in side.split()}


def gold(prompt, answer):
    """The judge's score in [0, 1] of `answer` as the second line to the first line in `prompt`.

    The product of: same length (0 or 1), share of characters whose part of speech is that of the character above, share of
    characters that are new, and 1 or 1/2 for the tone at the end. `prompt` may carry 上联： before the line and 下联： after it.
    Raises ValueError when the first line is not in the grammar's lexicon, since the rules say nothing there; see `applies`.
    """
    first, second = _line(prompt), _line(answer)
    wanted = parse(first)
    if wanted is None:
        raise ValueError(f"the first line {first!r} has words outside of the judge's lexicon; the judge knows the couplets of "
                         "rlhfkit.samples only; ask rlhfkit.samples.couplets.applies(prompt) first")
    if len(first) != len(second):
        return 0.0
    found = parse(second) or _tags(second)
    same_part = sum(a == b for a, b in zip(wanted, found)) / len(first)
    fresh = sum(c not in first for c in second) / len(first)
    mirrored = 1.0 if TONE.get(second[-1], TONE[first[-1]]) != TONE[first[-1]] else 0.5
    return same_part * fresh * mirrored


def applies(prompt):
    """Whether the judge's rules say anything about this prompt: a first line whose every word is in the lexicon."""
    return "上联" in prompt and parse(_line(prompt)) is not None


@lru_cache(maxsize=100_000)
def parse(line):
    """A line -> one tag a character (part of speech and place in its word), fewest words first; None when a word is unknown."""
    best = {0: ()}
    for end in range(1, len(line) + 1):
        ways = [best[start] + (line[start:end],) for start in range(max(0, end - 2), end)
                if start in best and line[start:end] in PART_OF]
        if ways:
            best[end] = min(ways, key=len)
    words = best.get(len(line))
    return tuple((PART_OF[w], i) for w in words for i in range(len(w))) if words else None


def make(count, seed=0):
    """`count` pairs (first, second) of right couplets, every pattern in turn, the first lines distinct and ending in an oblique tone as
    tradition has it; the same for a seed."""
    rng, pairs = random.Random(seed), {}
    while len(pairs) < count:
        pattern = PATTERNS[len(pairs) % len(PATTERNS)]
        first, second = _draw(pattern, rng), _draw(pattern, rng)
        if first and second and TONE[first[-1]] == "oblique" and first not in pairs and gold(first, second) == 1:
            pairs[first] = second
    return list(pairs.items())


def held_out(count):
    """`count` right pairs (first, second) whose first lines are not in raw/couplets.txt."""
    return make(SHIPPED + count)[SHIPPED:]


def _draw(pattern, rng):
    """One line of `pattern` in which no character comes twice but in a doublet; "" where the draw failed."""
    line = "".join(rng.choice(PARTS[part]) for part in pattern)
    tags = tuple((part, i) for part in pattern for i in range(2 if part in ("noun2", "doublet") else 1))
    repeated = len(set(line)) < len(line) - sum(part == "doublet" for part in pattern)
    return "" if repeated or parse(line) != tags else line


def _tags(line):
    """Tags of a line with unknown words: greedy from the left, two characters before one, unknown ones match nothing."""
    tags, i = [], 0
    while i < len(line):
        word = next((w for w in (line[i:i + 2], line[i]) if w in PART_OF), "")
        tags += [(PART_OF[word], k) for k in range(len(word))] if word else [None]
        i += max(len(word), 1)
    return tuple(tags)


def _line(text):
    """The bare line in a prompt or an answer."""
    return text.split("上联：")[-1].split("下联：")[-1 if text.startswith("下联：") else 0].strip()
