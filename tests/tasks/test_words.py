"""Words in any script: combining marks stay with their letters, and scripts without blanks are split by character."""

from __future__ import annotations

import unicodedata

import pytest

from kdexport import spec
from kdexport.distill.augment import views
from kdexport.tasks.inputs.words import words_in

CASES = {
    "Hindi": ("राम और सीता।", ["राम", "और", "सीता", "।"]),
    "decomposed": ("un cafe\u0301, l'e\u0301te\u0301", ["un", "cafe\u0301", ",", "l'e\u0301te\u0301"]),
    "Chinese": ("我爱北京2024年。", ["我", "爱", "北", "京", "2024", "年", "。"]),
    "Japanese": ("Tokyoへ行くー", ["Tokyo", "へ", "行", "く", "ー"]),
    "Thai": ("ที่นี่ 12", ["ที่", "นี่", "12"]),
    "Persian": ("می\u200cخواهم بروم", ["می\u200cخواهم", "بروم"]),
    "Arabic": ("كِتَابٌ جديد", ["كِتَابٌ", "جديد"]),
    "Korean": ("한국어 문장", ["한국어", "문장"]),
}


@pytest.mark.parametrize("script", CASES)
def test_words_are_those_of_the_script(script):
    text, words = CASES[script]
    assert words_in(text) == words
    assert words_in(text, 2) == words[:2]


def test_no_mark_is_a_word_character_by_itself():
    marks = [c for c in map(chr, range(0x110000)) if unicodedata.category(c)[0] == "M"]
    assert not [c for c in marks if c.isalnum()]  # or patterns of words could match in many ways


@pytest.mark.parametrize("script", ["Hindi", "decomposed", "Chinese"])
def test_augmentation_takes_whole_words(script):
    text, words = CASES[script]
    how = spec.Augment(views=8, kinds=["mask"], share=0.3)
    for copy in views([text], how, 0, mask="[M]")[0]:
        left = copy
        for word in words:
            left = left.replace(word, "")
        assert not left.replace("[M]", "").strip(), copy
