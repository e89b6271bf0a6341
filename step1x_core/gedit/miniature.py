"""A miniature of GEdit-Bench, drawn here: each of the 11 task types once in English and once in Chinese.

It tries out the whole way from the dataset to the report; its scores mean nothing.
"""

from functools import partial

from PIL import Image, ImageDraw

from ..tasks import TASK_TYPES
from .dataset import LANGUAGES, Item

SIZE = (160, 120)
# In the order of TASK_TYPES.
INSTRUCTIONS = (
    ("change the background to a night sky", "把背景换成夜空"),
    ("make the circle green", "把圆形变成绿色"),
    ("make the square look like wood", "让方块看起来像木头"),
    ("move the circle to the right", "把圆形移到右边"),
    ("make the person smile", "让这个人微笑"),
    ("turn the picture into a watercolour", "把图片变成水彩画"),
    ("add a yellow star to the sky", "在天空中加一颗黄色的星星"),
    ("remove the circle", "去掉圆形"),
    ("replace the square with a triangle", "把方块换成三角形"),
    ('replace the word "STOP" with "OPEN"', "把文字“STOP”换成“OPEN”"),
    ("make it look like evening", "变成傍晚的色调"),
)
PAPER = ("#dce8f0", "#f0e6d8", "#e2eedd", "#eee0ea")
INK = ("#c03028", "#2858b0", "#208048", "#a06010", "#703090")


def draw(number: int) -> Image.Image:
    """The scene of one task type: a circle and a square on a ground, with a word on it."""
    width, height = SIZE
    picture = Image.new("RGB", SIZE, PAPER[number % len(PAPER)])
    canvas = ImageDraw.Draw(picture)
    canvas.rectangle((0, height * 2 // 3, width, height), fill="#8a9a70")
    left = 16 + 6 * number
    canvas.ellipse((left, 24, left + 40, 64), fill=INK[number % len(INK)])
    canvas.rectangle((100, 60, 140, 100), fill=INK[(number + 2) % len(INK)])
    canvas.text((12, height - 26), "STOP", fill="#ffffff", font_size=18)
    return picture


def miniature() -> list[Item]:
    """22 items. The Chinese ones have the pictures of the English ones; two of three types are in the intersection."""
    return [
        Item(
            f"{language}{number:02}",
            task_type,
            language,
            INSTRUCTIONS[number][index],
            number % 3 != 2,
            partial(draw, number),
        )
        for number, task_type in enumerate(TASK_TYPES)
        for index, language in enumerate(LANGUAGES)
    ]
