"""Languages by code and English name, as Whisper has them."""

from collections.abc import Collection, Mapping
from typing import Any

from kdexport.errors import SpecError

_LISTED = """
en:english zh:chinese de:german es:spanish ru:russian ko:korean fr:french ja:japanese pt:portuguese tr:turkish
pl:polish ca:catalan nl:dutch ar:arabic sv:swedish it:italian id:indonesian hi:hindi fi:finnish vi:vietnamese
he:hebrew uk:ukrainian el:greek ms:malay cs:czech ro:romanian da:danish hu:hungarian ta:tamil no:norwegian th:thai
ur:urdu hr:croatian bg:bulgarian lt:lithuanian la:latin mi:maori ml:malayalam cy:welsh sk:slovak te:telugu fa:persian
lv:latvian bn:bengali sr:serbian az:azerbaijani sl:slovenian kn:kannada et:estonian mk:macedonian br:breton eu:basque
is:icelandic hy:armenian ne:nepali mn:mongolian bs:bosnian kk:kazakh sq:albanian sw:swahili gl:galician mr:marathi
pa:punjabi si:sinhala km:khmer sn:shona yo:yoruba so:somali af:afrikaans oc:occitan ka:georgian be:belarusian tg:tajik
sd:sindhi gu:gujarati am:amharic yi:yiddish lo:lao uz:uzbek fo:faroese ht:haitian_creole ps:pashto tk:turkmen
nn:nynorsk mt:maltese sa:sanskrit lb:luxembourgish my:myanmar bo:tibetan tl:tagalog mg:malagasy as:assamese tt:tatar
haw:hawaiian ln:lingala ha:hausa ba:bashkir jw:javanese su:sundanese yue:cantonese
"""
NAMES = {code: name.replace("_", " ") for code, _, name in (one.partition(":") for one in _LISTED.split())}
_MULTILINGUAL = 51_865  # tokens: one more than a Whisper of English has
_CODES = {name: code for code, name in NAMES.items()}


def code_of(language: str) -> str:
    """Return the code of a language: `de` for `German`, `de-AT` and `<|de|>`; an unknown name stays as it is."""
    plain = language.strip().strip("<|>").lower()
    return _CODES.get(plain) or plain.replace("_", "-").partition("-")[0]


def shown(code: str) -> str:
    """Format a language: `German (de)`."""
    return f"{NAMES[code].title()} ({code})" if code in NAMES else code


def tokens_of(rules: Mapping[str, Any]) -> dict[str, int]:
    """Return code → token of the languages in a generation_config.json."""
    return {code_of(token): number for token, number in (rules.get("lang_to_id") or {}).items()}


def codes_of(rules: Mapping[str, Any], vocabulary: int) -> list[str]:
    """Return the codes of a Whisper's languages by its generation_config.json; none where that names none."""
    return [*tokens_of(rules)] or (["en"] if vocabulary < _MULTILINGUAL else [])


def known_language(asked: str, model: str, known: Collection[str]) -> str:
    """Return the code of a language; raise SpecError if it is not among those that a Whisper knows."""
    code = code_of(asked)
    if code not in known:
        some = ", ".join([one for one in NAMES if one in known][:6])
        fix = f"Name one of its {len(known)}, such as {some}" if len(known) > 1 else "Name a multilingual Whisper"
        fix = fix if known else "Add lang_to_id to its generation_config.json, which names no languages"
        raise SpecError(f"the language {asked!r} is none that {model} knows", fix)
    return code
