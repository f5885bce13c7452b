"""Find phrases that order a model to leave its instructions, to show them, or to play somebody without any.

Such a phrase is an order about instructions: a verb such as ignore or forget, and what is to be left. The lists hold
the commonest words in English, German, French, Spanish, Italian, Portuguese, Dutch, Polish, Russian, Turkish, Chinese,
Japanese and Korean. An order in other words passes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from components.validate_data.text_words import split_words

Spans = Sequence[tuple[int, int]]

# The patterns are for text in small letters, and begin with a word and not with a boundary: both make a search fast.
_IGNORE = (
    r"(?:ignor(?:e|ing)\b|disregard|forget|override|overrule|bypass|neglect|pay no attention to|pay no heed to"
    r"|do(?: not|n'?t) (?:follow|obey|listen to|comply with)|no longer (?:follow|obey|listen to|comply with)"
    r"|stop (?:follow|obey|listening to|complying with)(?:ing)?\b|quit (?:following|obeying))"
)
# These mean the same of instructions, and of other things something harmless.
_LEAVE = r"(?:skip\b|discard|drop\b|abandon|set aside|put aside|erase|delete|cancel|reset|remove|throw (?:out|away))"
_SHOW = (
    r"(?:reveal|print|show|repeat|output|leak|display|expose|dump|disclose|recite|share|tell (?:me|us)\b|give me\b"
    r"|what(?:'s| is| are)\b|write out|summari[sz]e|translate)"
)
_EARLIER = (
    r"\b(?:previous|prior|above|earlier|preceding|original|initial|foregoing|existing|current|former|past|system|safety"
    r"|old|other|everything|anything|given to you|you (?:were|have been) (?:given|told))\b"
)
_INSTRUCTIONS = (
    r"\b(?:instruct(?:ion)?s?|(?:system )?prompts?|guide ?lines?|guidance|directives?|guardrails?|safeguards?"
    r"|programming)\b"
)
_RULES = (
    rf"(?:{_INSTRUCTIONS}|\b(?:rules?|directions?|commands?|orders|messages?|context|constraints?|restrictions?"
    r"|polic(?:y|ies)|training|conversation|filters?|text)\b)"
)
_NEAR, _NEARER = r"[^.!?\n]{0,30}", r"[^.!?\n]{0,14}"
_LIMITS = r"\b(?:restrictions?|rules|limits?|limitations?|filters?|guidelines|ethics|censorship|constraints?)\b"
_FREE = rf"(?:\b(?:no|without(?: any)?) {_LIMITS}|\b(?:unrestricted|unfiltered|uncensored|dan|jailbroken)\b)"
_OWN = rf"\b(?:all|any|your|the|these|those|its)\b{_NEARER}{_INSTRUCTIONS}"

_ORDERS = re.compile(
    rf"{_IGNORE}(?:{_NEAR}{_EARLIER}{_NEAR}{_RULES}|{_NEARER}{_OWN}|{_NEAR}\byour (?:own )?{_RULES}"
    r"| (?:the|all|everything) above\b"
    rf"| (?:all|everything|anything|whatever|what)\b{_NEAR}\b(?:above|before|previously|so far|earlier)\b"
    r"| (?:everything|all) (?:that )?you(?: know| were| have been|'ve been| learned))"
)
_REMOVALS = re.compile(rf"{_LEAVE}(?:{_NEAR}{_EARLIER}{_NEAR}{_INSTRUCTIONS}|{_NEARER}{_OWN})")
_QUESTIONS = re.compile(
    rf"{_SHOW}{_NEAR}\b(?:(?:system|hidden|initial|secret|developer) (?:prompt|instructions?|message|directives?)"
    r"|your (?:own |full |exact |complete |original )?(?:prompt|guidelines))\b"
    rf"|{_SHOW} (?:the )?(?:words|everything|all) (?:above|before this)\b"
)
_ACTING = re.compile(rf"(?:act|respond|behave|answer|role-?play) (?:as|like)\b{_NEAR}{_FREE}")
_PRETENDING = re.compile(
    rf"pretend (?:that )?(?:you|to be an?)\b{_NEAR}{_FREE}"
    r"|you are (?:now |no longer |in )(?:an? |in |my )?(?:dan\b|(?:dan|developer|god|debug|sudo|admin) mode|jailbroken"
    r"|unrestricted|uncensored|unfiltered|evil|bound by|restricted|free of|free from|subject to)"
    r"|do anything now\b|jailbreak (?:mode|prompt)"
)
_MODES = re.compile(r"(?:enter|enable|activate|go into|switch to) (?:dan|developer|god|jailbreak|unrestricted) mode")
_MARKS = re.compile(
    r"<\|?(?:im_start|system)\|?>|\[/?inst\]\s|<</?sys>>|### ?(?:system|instruction)s?\s?:"
    r"|end of (?:system )?(?:prompt|instructions)\]|begin (?:system )?(?:prompt|instructions)\]"
)
_NEW_ORDERS = re.compile(r"(?:new|updated|real|actual) (?:system )?(?:instructions?|directives?)\s?:")
_VOID_ORDERS = re.compile(
    r"(?:orders|instructions|rules|prompt) (?:are|is) (?:now )?(?:void|null|cancel\w+|obsolete|revoked)\b"
)
_GERMANIC = (
    r"(?:ignorier|vergiss|vergessen sie|missacht|umgeh|überschreib|verwirf|negeer|vergeet)[^.!?\n]{0,40}"
    r"\b(?:anweisung|vorgabe|regel|instruktion|prompt|befehl|richtlinie|bisherige|vorherige|instructies|opdrachten"
    r"|aanwijzingen)|(?:zeig|nenn|verrat|gib|wiederhol|toon)[^.!?\n]{0,30}\b(?:system-?\s?prompt|systemanweisung"
    r"|systemnachricht)"
)
_ROMANCE = (
    r"(?:ignor[aeoi]|oublie|olvid[aeo]|dimentic|esque[çc]|descarta|desconsider|omit[ae]|ne (?:tenez|tiens) (?:pas|plus)"
    r" compte|ne suis plus|fais abstraction|trascura)[^.!?\n]{0,40}\b(?:instrucc|instructions|instruç|consigne"
    r"|directive"
    r"|r[èe]gle|regla|regole|regra|istruzioni|indicaciones|indicazioni|prompt|[óo]rdenes|ordres)"
    r"|(?:montre|affiche|r[ée]v[èe]le|muestra|revela|mostr[ai])[^.!?\n]{0,30}\bprompt\b"
)
_SLAVIC = (
    r"(?:zignoruj|ignoruj|zapomnij|pomiń|игнорир|забудь|не обращай внимания|ігнору)[^.!?\n]{0,40}"
    r"\b(?:instrukc|polece|zasad|wytyczn|инструкци|указани|правил|команд|інструкці|вказівк)"
)
_OTHERS = (
    r"(?:önceki|yukarıdaki|tüm)[^.!?\n]{0,20}(?:talimat|yönerge|kural|komut)\w*[^.!?\n]{0,12}(?:yok say"
    r"|görmezden gel|unut)"
    r"|(?:忽略|无视|忘记|忘掉|不要理会|忽視|無視)[^。!?\n]{0,12}(?:指令|指示|说明|提示|规则|命令|要求)"
    r"|(?:指示|命令|ルール|プロンプト|指令)[^。!?\n]{0,8}(?:無視|忘れ)|(?:지시|명령|규칙|프롬프트)[^.!?\n]{0,10}(?:무시|잊)"
    r"|(?:تجاهل|انس)[^.!?\n]{0,20}(?:التعليمات|الأوامر|القواعد)"
)
# Each pattern with words of which every phrase that it finds has one.
_PATTERNS = (
    (_ORDERS, ("ignore", "ignoring", "disregard", "forget", "overr", "bypass", "neglect", "attention", "heed", "follow",
               "obey", "listen", "comply")),
    (_REMOVALS, ("instruct", "prompt", "guide", "guidance", "directive", "guardrail", "safeguard", "programming")),
    (_QUESTIONS, ("prompt", "instruct", "system message", "directive", "guidelines", "hidden message", "above",
                  "before")),
    (_ACTING, ("restrict", "without", "limit", "filter", "unrestrict", "unfilter", "uncensor", "dan", "jailbroken")),
    (_PRETENDING, ("pretend", "dan", "developer", "god", "debug", "sudo", "admin", "jailbr", "unrestr", "uncens",
                   "unfilt", "evil", "bound", "restricted", "free", "subject", "anything")),
    (_MODES, ("mode",)),
    (_MARKS, ("im_start", "system|", "inst]", "sys>", "system", "instruction", "prompt]", "instructions]")),
    (_NEW_ORDERS, ("instruct", "directive")),
    (_VOID_ORDERS, ("void", "null", "cancel", "obsolete", "revoked")),
    (re.compile(_GERMANIC), ("ignorier", "vergiss", "vergessen", "missacht", "umgeh", "überschreib", "verwirf",
                             "negeer", "vergeet", "system")),
    (re.compile(_ROMANCE), ("instr", "consigne", "directive", "règle", "regle", "regla", "regole", "regra", "istruz",
                            "indica", "prompt", "rdenes", "ordres")),
    (re.compile(_SLAVIC), ("ignoruj", "zignoruj", "zapomnij", "pomiń", "игнорир", "забудь", "внимания", "ігнору")),
    (re.compile(_OTHERS), ("talimat", "yönerge", "kural", "komut", "忽略", "无视", "忘", "理会", "忽視", "無視", "무시",
                           "잊", "تجاهل", "انس")),
)  # fmt: skip
_STEM_LETTERS = 5


def _stems(hints: tuple[str, ...]) -> frozenset[bytes]:
    """Return the beginnings of the hints' first words: a set of them takes a tenth of the time of a search for each."""
    words = [re.findall("[a-z]+", hint)[0] for hint in hints if hint.isascii()]
    return frozenset(word[:_STEM_LETTERS].encode() for word in words)


_PATTERNS_BY_STEMS = [(pattern, _stems(hints)) for pattern, hints in _PATTERNS]
_ALL_STEMS = frozenset[bytes]().union(*(stems for _, stems in _PATTERNS_BY_STEMS))
_UNSEEN = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]")


def find_prompt_injection(text: str) -> Spans:
    """Return the whole text where it orders a model to leave its instructions."""
    if text.isascii():
        words = {word[:_STEM_LETTERS] for word in split_words(text)}
        patterns = [] if _ALL_STEMS.isdisjoint(words) else [p for p, s in _PATTERNS_BY_STEMS if not s.isdisjoint(words)]
        folded = text.lower()
    else:
        # Characters that nobody sees hide the words from a search, and not from a model.
        folded = _UNSEEN.sub("", text.lower()).replace("\u2019", "'")
        patterns = [pattern for pattern, hints in _PATTERNS if any(hint in folded for hint in hints)]
    if patterns and "  " in folded:
        folded = re.sub(" +", " ", folded)
    is_order = any(pattern.search(folded) is not None for pattern in patterns)
    return [(0, len(text))] if is_order else ()
