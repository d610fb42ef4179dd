"""Prompts that ask for rendered text, in double quotes, as Flow-GRPO's second task has them.

    ocr:train    20,000 prompts
    ocr:test     1,018 prompts with other texts

The paper (arXiv 2505.05470) had its 20 thousand prompts written by a language model; these come
from word lists and templates, so that they need no download. A text is one to five words, or a
label with a number. No text of `ocr:test`, or of prompts given to be excluded, is asked for in
training, compared as the reward compares: `rewards.ocr.normalised`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import numpy as np

from flowgrpo_jax.rewards.ocr import normalised, target
from flowgrpo_jax.types import Metadata

TRAIN, TEST = 20_000, 1_018
UPPER = 0.25  # share of texts in capitals


def _listed(text: str) -> tuple[str, ...]:
    """Split a text at commas and line ends."""
    return tuple(item.strip() for item in text.replace("\n", ",").split(",") if item.strip())


ADJECTIVES = _listed("""
    Golden, Silver, Hidden, Ancient, Bright, Silent, Wild, Frozen, Secret, Little, Broken,
    Happy, Lucky, Northern, Royal, Electric, Crimson, Gentle, Hungry, Lazy, Velvet, Rusty,
    Lonely, Mighty, Sunny, Purple, Modern, Vintage, Quiet, Flying, Endless, Humble, Brave,
    Crooked, Dusty, Floating
""")
NOUNS = _listed("""
    Harvest, Garden, River, Dragon, Kitchen, Lantern, Mountain, Orchard, Harbor, Library,
    Station, Forest, Castle, Bridge, Rocket, Market, Compass, Anchor, Meadow, Tiger, Falcon,
    Piano, Mirror, Window, Journey, Island, Valley, Bicycle, Candle, Museum, Theater, Thunder,
    Comet, Teapot, Pumpkin, Whale, Robot, Village, Canyon, Festival, Umbrella, Clover, Walnut,
    Beacon
""")
VERBS = _listed("""
    Follow, Protect, Discover, Remember, Explore, Cherish, Paint, Visit, Save, Climb, Imagine,
    Restore, Guard, Celebrate, Cross, Find
""")
SINGLE = _listed("""
    Welcome, Open, Closed, Exit, Danger, Caution, Hello, Thanks, Bakery, Pharmacy, Hotel,
    Bookstore, Coffee, Fresh, Organic, Parking, Reserved, Adventure, Courage, Harmony, Believe,
    Dream, Victory, Freedom, Tomorrow, Gratitude, Wonder, Balance, Chapter, Recipes, Detour,
    Fragile, Lemonade, Tickets, Bonjour, Quarantine, Observatory, Laboratory, Champion,
    Breakfast
""")
OWNERS = _listed("""
    Clara, Hugo, Mabel, Oscar, Ruby, Felix, Nora, Walter, Iris, Theo, Greta, Simon, Olive,
    Victor, Hazel, Jasper
""")
SHOPS = _listed("""
    Bakery, Diner, Flowers, Book Nook, Coffee House, Barber Shop, Toy Shop, Pizza, Garage,
    Antiques, Studio, Ice Cream, Tailoring, Fish Market
""")
LABELS = _listed("""
    Room {}, Platform {}, Highway {}, Apartment {}, Lot {}, Chapter {}, Flight {}, Locker {},
    Page {}, Gate {}, Trail {}, Since 19{}, {} Miles, {} Percent Off, {} Minutes, Speed Limit {}
""")
SEASONS = _listed("""
    Winter, Summer, Autumn, Spring, Midnight, Annual, Weekend, Harbor
""")
THEMES = _listed("""
    Jazz, Book, Science, Film, Dance, Robotics, Poetry, Gardening, Chess, Food
""")
EVENTS = _listed("""
    Festival, Fair, Workshop, Night, Gala, Marathon, Contest
""")
PHRASES = _listed("""
    Mind the Gap, Do Not Disturb, Wet Paint, No Parking, Please Knock, Beware of Dog,
    Made With Love, Out of Order, Keep Off the Grass, Watch Your Step, Time to Dream,
    Under New Management, Just Married, Happy Birthday, Home Sweet Home, Lost and Found,
    Stay Curious, Never Give Up, One Way Only, Work in Progress, All You Need Is Tea,
    Think Before You Print, Handle With Care, Free Wi Fi Inside, Employees Only, Dogs Welcome,
    Quiet Please, Push to Start, Game Over, Dinner Is Ready, See You Soon, To the Lighthouse
""")

TEMPLATES = (
    'A weathered wooden sign at a mountain trailhead that reads "{}"',
    'A storefront on a rainy city street at dusk, its neon sign glowing "{}"',
    'A chalkboard outside a small cafe with "{}" written on it in white chalk',
    'A close-up of a coffee mug on a desk, printed with the words "{}"',
    'A vintage travel poster of a seaside town with the title "{}"',
    'A birthday cake on a kitchen table, decorated with icing that spells "{}"',
    'A hardcover book on a velvet cushion, its cover titled "{}"',
    'A highway billboard in the desert at noon that says "{}"',
    'A cat sitting on a doormat with the text "{}"',
    'A robot in a workshop holding a cardboard sign that reads "{}"',
    'A red brick wall covered with graffiti that says "{}"',
    'A street market stall under a striped awning with a banner reading "{}"',
    'A smartphone on a marble counter, its screen showing the notification "{}"',
    'A protest march in spring, one placard clearly reads "{}"',
    'A steaming cup of soup beside a handwritten note that says "{}"',
    'A train station at night, the departure board displays "{}"',
    'A museum display with an antique vase and a brass plaque engraved "{}"',
    'A white t-shirt on a clothes line, printed with "{}" in bold letters',
    'A hot air balloon over green hills, with "{}" painted across its envelope',
    'A lighthouse on a cliff with "{}" painted on its tower',
    'A science fair project board with the heading "{}"',
    'A classroom blackboard on which the teacher has written "{}"',
    'A yellow taxi in heavy snow, the sign on its roof says "{}"',
    'A glass jar of cookies in a sunlit pantry, labeled "{}"',
    'A movie theater marquee in the evening announcing "{}"',
    'A wooden crate in a warehouse, stamped with "{}"',
    'A fisherman\'s boat in a calm harbor, the name "{}" painted on its bow',
    'An old typewriter with a sheet of paper on which "{}" is typed',
    'An airport arrival hall where a driver holds up a board reading "{}"',
    'An open notebook by a window, one page says "{}" in neat handwriting',
    'A digital clock radio on a nightstand whose display shows "{}"',
    'A garden gate overgrown with roses and a small enamel sign that reads "{}"',
    'A wine bottle on a linen tablecloth, its label says "{}"',
    'A space station corridor with a warning panel that reads "{}"',
    'A bakery window with gold lettering that spells "{}"',
    'A snowman in a park wearing a scarf embroidered with "{}"',
    'A football stadium whose giant scoreboard shows "{}"',
    'A tattoo on a sailor\'s arm, an anchor above a ribbon with "{}"',
    'A newspaper on a park bench with the headline "{}"',
    'A wooden spoon and a recipe card titled "{}"',
)


def texts() -> list[str]:
    """Return the texts, no two of which are equal for the reward, in a fixed shuffled order."""
    numbers = [*range(10, 100, 3), 42]
    found = [*SINGLE, *NOUNS, *PHRASES]
    found += [f"{a} {n}" for a, n in product(ADJECTIVES, NOUNS)]
    found += [f"{v} the {n}" for v, n in product(VERBS, NOUNS)]
    found += [f"{o}'s {s}" for o, s in product(OWNERS, SHOPS)]
    found += [label.format(n) for label, n in product(LABELS, numbers)]
    found += [" ".join(words) for words in product(SEASONS, THEMES, EVENTS)]
    unique = list({normalised(text): text for text in found}.values())
    return [unique[i] for i in np.random.default_rng(0).permutation(len(unique))]


def prompts(split: str, exclude: Iterable[Metadata] = ()) -> list[Metadata]:
    """Return the records of a split, in a fixed order; "target" is the text asked for.

    Args:
      split: train or test.
      exclude: records whose texts must not be asked for in training.
    """
    if split not in ("train", "test"):
        raise ValueError(f"ocr:{split}: the split {split!r} is not train or test")
    every = texts()
    if split == "test":
        return _render(every[:TEST], TEST, seed=1)
    held_out = {target(r["prompt"]) for r in exclude}
    rest = [text for text in every[TEST:] if normalised(text) not in held_out]
    return _render(rest, min(TRAIN, len(rest) * len(TEMPLATES)), seed=0)


def _render(chosen: list[str], n: int, seed: int) -> list[Metadata]:
    """n distinct prompts: the texts in turn, and another template each time a text returns."""
    rng = np.random.default_rng(seed)
    first = rng.integers(len(TEMPLATES), size=len(chosen))
    upper = rng.random(n) < UPPER
    records = []
    for i in range(n):
        turn, row = divmod(i, len(chosen))
        text = chosen[row].upper() if upper[i] else chosen[row]
        template = TEMPLATES[(first[row] + turn) % len(TEMPLATES)]
        records.append({"prompt": template.format(text), "target": text})
    return records
