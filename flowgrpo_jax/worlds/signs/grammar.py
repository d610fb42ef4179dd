"""Prompts of the signs world, their splits, and signs that show them.

    a sign that says "CAT"

Flow-GRPO's second task in miniature: rewards/ocr.py reads the picture. Texts have three letters: a
small model can learn 26 of them in three places, and what it learned for one word serves another.

Splits. Every fifth word is held out for good: it is in no training prompt and no caption of
pretraining. Every letter of a held-out word occurs in the same place of some word to train on.
"""

from itertools import product
from string import ascii_uppercase as LETTERS

import numpy as np

from flowgrpo_jax.worlds.signs.render import BOARDS, WALLS, Sign

LENGTH = 11  # tokens of a prompt, start and end included
PROMPT = 'a sign that says "{}"'
# CLIP's tokenizers make "that", "sign" and "says" one token each by joining these pairs of letters,
# which no text may therefore begin with: its letters are to be a token each.
JOINED = ("TH", "IG", "AY")
_LISTED = """
    ACE ACT ADD AGE AIM AIR ALL AND ANT ANY APE ARC ARM ART ASH ASK AWE AXE BAD BAG BAR BAT
    BAY BED BEE BET BIG BIN BIT BOW BOX BOY BUD BUG BUN BUS BUT BUY CAB CAN CAP CAR CAT COB
    COD COG COW CRY CUB CUE CUP CUT DAD DAY DEN DEW DIG DIM DIP DOG DOT DRY DUE EAR EAT EEL
    EGG ELF ELK ELM END EVE EYE FAN FAR FAX FED FEE FEW FIG FIN FIT FIX FLY FOG FOR FOX FRY
    FUN FUR GAP GAS GEL GEM GET GNU GUM GYM HAM HAT HAY HEN HER HEX HID HIM HIP HIT HOP HOT
    HOW HUB HUG HUT ICE ICY INK INN ION ITS IVY JAM JAR JAW JET JIG JOB JOG JOY JUG KEG KEY
    KID KIN KIT LAB LAP LAW LAY LEG LET LID LIP LIT LOG LOT LOW MAD MAP MAT MAY MEN MET MIX
    MOB MOM MOP MUD MUG NAP NET NEW NOD NOT NOW NUT OAK OAR OAT ODD OFF OIL OLD ONE OPT ORB
    ORE OUR OUT OWL OWN PAD PAN PAW PAY PEA PEN PET PIE PIG PIN PIT POD POP POT PUB PUP RAM
    RAN RAT RAW RAY RED RIB RIM RIP ROB ROD ROW RUB RUG RUN RYE SAD SAP SAT SAW SAY SEA SEE
    SET SEW SHE SHY SIP SIT SIX SKI SKY SOB SOW SOY SPA SPY SUM SUN TAB TAG TAN TAP TAR TAX
    TEA TEN TIE TIN TIP TOE TON TOP TOW TOY TRY TUB TUG TWO URN USE VAN VET VOW WAR WAX WAY
    WEB WED WET WHO WHY WIG WIN WIT WOK YAK YAM YEN YES YET YOU ZAP ZEN ZIP ZOO
"""
WORDS = tuple(_LISTED.split())
HELD_OUT = WORDS[3::5]
PLACE = (1, 2)  # px, across and down, that a sign may be off the middle
HEIGHTS = (18,)  # px, of its letters


def metadata(tag: str, text: str) -> dict:
    return {"tag": tag, "prompt": PROMPT.format(text), "text": text}


def prompts(split: str) -> list[dict]:
    """Return the metadata of a split ("train" or "test") in a fixed order, of the tag "word"."""
    if split not in ("train", "test"):
        raise ValueError(f"signs:{split}: the split {split!r} is not train or test")
    return [metadata("word", w) for w in WORDS if (w in HELD_OUT) == (split == "test")]


def captions() -> list[dict]:
    """Return the captions for pretraining: the words to train on, and other texts of three letters.

    The other texts have the tag "letters"; the held-out words are not among them.
    """
    words = set(WORDS)
    texts = ("".join(letters) for letters in product(LETTERS, repeat=3))
    rest = [text for text in texts if text not in words and not text.startswith(JOINED)]
    return prompts("train") + [metadata("letters", text) for text in rest]


def sample_sign(text: str, rng: np.random.Generator, size: int = 64) -> Sign:
    """A random sign with this text, about the middle of a picture of `size` px."""
    x, y = (size // 2 + int(rng.integers(-off, off + 1)) for off in PLACE)
    board = tuple(BOARDS)[rng.integers(len(BOARDS))]
    return Sign(text, board, WALLS[rng.integers(len(WALLS))], x, y, int(rng.choice(HEIGHTS)))


def garble(record: dict, rng: np.random.Generator) -> dict:
    """Metadata of a sign that a careless captioner would have described as `record`: one letter is
    another, is missing, or is there twice."""
    text = record["text"]
    i = rng.integers(len(text))
    before, letter, after = text[:i], text[i], text[i + 1 :]
    others = LETTERS.replace(letter, "")
    wrong = (others[rng.integers(len(others))], "", 2 * letter)[rng.integers(3)]
    return metadata("letters", before + wrong + after)
