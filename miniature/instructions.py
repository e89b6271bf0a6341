"""How edits are put into words, in English and Chinese: references to objects, and templates."""

from dataclasses import dataclass

import numpy as np

from step1x_core import languages

from .drawing import Scene
from .layout import PLACES, in_place, pick

LANGUAGES = tuple(language.code for language in languages.LANGUAGES)

CHINESE_COLOURS = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
    "white": "白色",
    "black": "黑色",
    "grey": "灰色",
    "beige": "米色",
    "light blue": "浅蓝色",
    "light green": "浅绿色",
    "navy": "深蓝色",
}
CHINESE_SHAPES = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "五角星",
    "ring": "圆环",
    "diamond": "菱形",
    "cross": "十字",
}

ENGLISH_PLACES = {
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "middle": ("in the middle", "in the center"),
    "top left": ("in the top left corner", "in the top left", "in the upper left corner"),
    "top right": ("in the top right corner", "in the top right", "in the upper right corner"),
    "bottom left": ("in the bottom left corner", "in the bottom left", "in the lower left corner"),
    "bottom right": ("in the bottom right corner", "in the bottom right", "in the lower right corner"),
}
CHINESE_PLACES = {
    "left": ("左边", "左侧"),
    "right": ("右边", "右侧"),
    "top": ("上方", "上边"),
    "bottom": ("下方", "下边"),
    "middle": ("中间", "中央"),
    "top left": ("左上角", "左上方"),
    "top right": ("右上角", "右上方"),
    "bottom left": ("左下角", "左下方"),
    "bottom right": ("右下角", "右下方"),
}

# By language and by what is asked for. Slots: {ref} an object of the scene; {colour} and {a_colour} "blue", "a blue";
# {shape} and {thing} "a star", "a red star" (Chinese: without the article); {place}; {old} and {new} quoted words.
TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "recolour": (
            "make {ref} {colour}",
            "turn {ref} {colour}",
            "paint {ref} {colour}",
            "change {ref} to {colour}",
            "recolor {ref} to {colour}",
            "change the color of {ref} to {colour}",
            "give {ref} {a_colour} color",
            "{ref} should be {colour}",
            "please color {ref} {colour}",
        ),
        "replace": (
            "replace {ref} with {shape}",
            "turn {ref} into {shape}",
            "change {ref} into {shape}",
            "swap {ref} for {shape}",
            "transform {ref} into {shape}",
            "put {shape} in place of {ref}",
            "replace {ref} with {shape} of the same color",
            "{ref} should become {shape}",
        ),
        "remove": (
            "remove {ref}",
            "delete {ref}",
            "erase {ref}",
            "take away {ref}",
            "get rid of {ref}",
            "make {ref} disappear",
            "please remove {ref} from the picture",
            "wipe out {ref}",
        ),
        "add": (
            "add {thing} {place}",
            "put {thing} {place}",
            "draw {thing} {place}",
            "place {thing} {place}",
            "insert {thing} {place}",
            "{place}, add {thing}",
            "please paint {thing} {place}",
            "there should be {thing} {place}",
        ),
        "background": (
            "change the background to {colour}",
            "make the background {colour}",
            "turn the background {colour}",
            "paint the background {colour}",
            "set the background color to {colour}",
            "give the picture {a_colour} background",
            "fill the background with plain {colour}",
            "replace the background with {colour}",
        ),
        "invert": (
            "invert the colors of the picture",
            "invert all colors",
            "turn the picture into a negative",
            "make a color negative of the image",
            "show the image as a negative",
            "swap every color for its opposite",
        ),
        "greyscale": (
            "make the picture grayscale",
            "convert the image to grayscale",
            "remove all color from the picture",
            "turn the image into shades of gray",
            "make it a black and white photo",
            "desaturate the whole picture",
        ),
        "pixelate": (
            "pixelate the picture",
            "make the image pixelated",
            "apply a mosaic effect to the picture",
            "turn the picture into pixel art",
            "turn the image into large square pixels",
            "give the whole picture a blocky mosaic look",
        ),
        "text": (
            "change the text {old} to {new}",
            "replace the word {old} with {new}",
            "change {old} to {new}",
            "make the text say {new}",
            "turn the word {old} into {new}",
            "the text should read {new}",
            "rewrite {old} as {new}",
            "swap the word for {new}",
        ),
    },
    "zh": {
        "recolour": (
            "把{ref}变成{colour}",
            "将{ref}改成{colour}",
            "把{ref}涂成{colour}",
            "把{ref}的颜色换成{colour}",
            "将{ref}的颜色改为{colour}",
            "让{ref}变成{colour}",
            "请把{ref}染成{colour}",
            "{ref}改为{colour}",
        ),
        "replace": (
            "把{ref}换成{shape}",
            "将{ref}替换为{shape}",
            "把{ref}变成一个{shape}",
            "将{ref}改成一个{shape}",
            "用一个{shape}代替{ref}",
            "让{ref}变为{shape}",
            "请把{ref}换成同样颜色的{shape}",
        ),
        "remove": ("删除{ref}", "去掉{ref}", "把{ref}删掉", "移除{ref}", "把{ref}擦掉", "请将{ref}去除", "让{ref}消失"),
        "add": (
            "在{place}添加一个{thing}",
            "在{place}画一个{thing}",
            "在{place}放一个{thing}",
            "{place}加一个{thing}",
            "在图片的{place}加上一个{thing}",
            "请在画面{place}添加一个{thing}",
            "给{place}增加一个{thing}",
        ),
        "background": (
            "把背景改成{colour}",
            "将背景换成{colour}",
            "把背景变成{colour}",
            "把背景涂成{colour}",
            "将背景颜色设为{colour}",
            "请把背景颜色改为{colour}",
            "换成{colour}背景",
        ),
        "invert": (
            "将图片反色",
            "把图片的颜色反转",
            "把画面变成负片",
            "将所有颜色取反",
            "给图片做反色处理",
            "把图片改成负片效果",
        ),
        "greyscale": (
            "把图片变成灰度图",
            "将图片转换为灰度",
            "去掉图片的所有颜色",
            "把画面改成黑白照片",
            "将整张图片去色",
            "把图片变成黑白的",
        ),
        "pixelate": (
            "把图片像素化",
            "给图片加上马赛克效果",
            "将画面变成像素画",
            "把整张图片打上马赛克",
            "将图片改成像素风格",
            "让图片变成大块像素",
        ),
        "text": (
            "把文字{old}改成{new}",
            "将{old}换成{new}",
            "把{old}替换为{new}",
            "把单词{old}变成{new}",
            "将文字改为{new}",
            "让文字显示{new}",
            "请把字改成{new}",
        ),
    },
}

STOPS = {"en": (".", "!"), "zh": ("。", "！")}


@dataclass(frozen=True)
class Reference:
    """What an instruction says about the object it means; None is left unsaid."""

    shape: str
    colour: str | None = None
    place: str | None = None


def matching(reference: Reference, scene: Scene) -> list[int]:
    """Indices of the scene's objects that the reference describes."""
    return [index for index, thing in enumerate(scene.things)
            if thing.shape == reference.shape
            and reference.colour in (None, thing.colour)
            and (reference.place is None or in_place(thing, scene, reference.place))]


def is_unique(reference: Reference, scene: Scene) -> bool:
    """Whether exactly one object of the scene can be meant."""
    return len(matching(reference, scene)) == 1


def choose_reference(rng: np.random.Generator, scene: Scene, index: int) -> Reference | None:
    """A reference to that object and to no other one: mostly without a place where none is needed. None if there is no such reference."""
    thing = scene.things[index]
    places = [place for place in PLACES if in_place(thing, scene, place)]
    plain = [Reference(thing.shape), Reference(thing.shape, thing.colour)]
    placed = [Reference(thing.shape, colour, place) for colour in (None, thing.colour) for place in places]
    plain, placed = ([reference for reference in options if is_unique(reference, scene)] for options in (plain, placed))
    if plain and (not placed or rng.random() < 0.75):
        return pick(rng, plain)
    return pick(rng, placed) if placed else None


def refer(rng: np.random.Generator, language: str, reference: Reference) -> str:
    """The reference in words: "the red circle on the left", "the left red circle", "左边的红色圆形"."""
    if language == "zh":
        place = pick(rng, CHINESE_PLACES[reference.place]) + "的" if reference.place else ""
        return place + _chinese_thing(rng, reference.shape, reference.colour)
    words = [reference.colour, reference.shape]
    if reference.place and rng.random() < 0.3:
        words.insert(0, reference.place)
    elif reference.place:
        words.append(pick(rng, ENGLISH_PLACES[reference.place]))
    return " ".join(["the", *filter(None, words)])


def name_thing(rng: np.random.Generator, language: str, shape: str, colour: str | None = None) -> str:
    """A new object for the slots {shape} and {thing}."""
    return (
        _chinese_thing(rng, shape, colour)
        if language == "zh"
        else with_article(" ".join(filter(None, (colour, shape))))
    )


def name_colour(language: str, colour: str) -> str:
    return CHINESE_COLOURS[colour] if language == "zh" else colour


def name_place(rng: np.random.Generator, language: str, place: str) -> str:
    return pick(rng, (CHINESE_PLACES if language == "zh" else ENGLISH_PLACES)[place])


def _chinese_thing(rng: np.random.Generator, shape: str, colour: str | None) -> str:
    if colour is None:
        return CHINESE_SHAPES[shape]
    return CHINESE_COLOURS[colour] + ("的" if rng.random() < 0.5 else "") + CHINESE_SHAPES[shape]


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def quote(rng: np.random.Generator, *words: str) -> list[str]:
    """The words in straight or, sometimes, curly quotation marks, alike for all of them."""
    opening, closing = "“”" if rng.random() < 0.35 else '""'
    return [opening + word + closing for word in words]


def phrase(rng: np.random.Generator, language: str, wish: str, **slots: str) -> str:
    """One of the wish's templates filled in, sometimes capitalised, sometimes with a stop."""
    text = pick(rng, TEMPLATES[language][wish]).format(**slots)
    if language == "en" and rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    stop, mark = STOPS[language]
    return text + rng.choice(("", stop, mark), p=(0.66, 0.32, 0.02)).item()
