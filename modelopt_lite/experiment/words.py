"""Words and sentences that tasks are made of, drawn from a seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

_ADJECTIVES = (
    "amber ancient bashful brave bright calm careful cheerful clever cloudy copper crimson curious dusty eager "
    "early gentle golden graceful green hidden hollow honest humble icy ivory jolly kind lively lonely loud lucky "
    "mellow misty modest narrow nimble noble pale patient plain polite proud quick quiet rapid rusty scarlet shy "
    "silent silver sleepy slender smooth solemn steady stony sturdy sunny swift tender tidy timid violet warm "
    "weary wild wise wooden"
)
_NOUNS = (
    "anchor apple arrow badger banner barrel basket beacon beaver bell blanket boat bottle bridge bucket button "
    "cabin candle canyon carpet castle cedar chimney clock cloud comet copper corner cradle cricket curtain "
    "desert donkey dragon drum eagle engine falcon feather fiddle field flute forest fountain garden gate glacier "
    "hammer harbor hedgehog helmet heron hill island jacket kettle ladder lantern lemon lily lizard magnet marble "
    "market meadow mill mirror monkey mountain needle oak oar orchard otter owl oyster paddle pebble pepper "
    "pigeon pillow pine planet plum pocket pond potato puppet rabbit raven ribbon river rocket rose saddle sail "
    "salmon sandal shadow shovel spider spoon squirrel stable statue stone stove sugar table teapot thimble "
    "thunder ticket tiger tower trumpet tulip tunnel turtle valley violin wagon walnut whistle willow window "
    "winter wolf zebra"
)
_PEOPLE = (
    "miller baker sailor teacher gardener carpenter doctor painter shepherd tailor farmer clerk judge captain "
    "weaver printer singer mason hunter nurse cook potter smith merchant porter pilot ferryman librarian"
)
_VERBS = (
    "repaired carried painted sold borrowed found measured cleaned moved guarded described bought drew opened "
    "watched polished lost weighed hid counted"
)
_PLACES = (
    "near the river|behind the church|in the market|by the old mill|at the harbor|on the hill|under the "
    "bridge|along the road|beside the school|in the courtyard|at the edge of the village|inside the barn|across "
    "the valley|next to the station|in the garden|on the pier"
)
_TIMES = (
    "In spring|One morning|After the rain|Before noon|On the second day|Late in the evening|During the "
    "harvest|That winter|At dawn|A week later|On a windy day|Before the feast|Some years ago|Toward the end of "
    "May|When the bells rang|In the first hour"
)
ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
PEOPLE = tuple(_PEOPLE.split())
VERBS = tuple(_VERBS.split())
PLACES = tuple(_PLACES.split("|"))
TIMES = tuple(_TIMES.split("|"))


def sentences(generator: random.Random) -> Iterator[str]:
    """Yield plain sentences without end; none of them holds a number."""
    draw = generator.choice
    while True:
        yield (
            f"{draw(TIMES)} the {draw(PEOPLE)} {draw(VERBS)} the {draw(ADJECTIVES)} {draw(NOUNS)} {draw(PLACES)}, and "
            f"the {draw(PEOPLE)} {draw(VERBS)} a {draw(NOUNS)}."
        )


def distinct_words(generator: random.Random, count: int) -> list[str]:
    """Return words that all differ: nouns and adjectives while there are any, then pairs of them, then threes."""
    single = list(dict.fromkeys(NOUNS + ADJECTIVES))
    generator.shuffle(single)
    pairs = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS] if count > len(single) else []
    generator.shuffle(pairs)
    threes = (f"{adjective}-{pair}" for adjective in ADJECTIVES for pair in pairs if adjective not in pair)
    return list(itertools.islice(itertools.chain(single, pairs, threes), count))


def names(generator: random.Random, count: int) -> list[str]:
    """Return names such as ``silver otter`` that share no word."""
    return [
        f"{adjective} {noun}"
        for adjective, noun in zip(generator.sample(ADJECTIVES, count), generator.sample(NOUNS, count), strict=True)
    ]


def codes(generator: random.Random, count: int, letters: int) -> list[str]:
    """Return random words of so many capital letters, all different."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(generator.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(letters))] = None
    return list(found)
