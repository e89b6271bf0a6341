"""The two languages of instructions, and the names that folders and file formats have for them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """name: of the folder with the templates. code: ISO 639-1, as locales and datasets have it. gedit: GEdit-Bench's.
    """

    name: str
    code: str
    gedit: str


ENGLISH = Language("english", "en", "en")
CHINESE = Language("chinese", "zh", "cn")
LANGUAGES = (ENGLISH, CHINESE)
