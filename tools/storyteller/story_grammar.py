"""The text that the bundled model learns from: short stories, written by a seeded grammar.

A story is a *plot*; a plot is a list of *beats*; a beat is a list of ways to say one thing. People, objects,
places and promises are drawn once per story and then tracked, so the continuation of a story has to remember
who holds what. Every sentence here was written for this repository. ``train.py`` trains on the
stories, ``evaluate.py`` measures with them.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

Split = Literal["train", "heldout"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# fmt: off -- the word lists and sentences read better packed than one word to a line

# ------------------------------------------------------------------------------------------------------------
# People and objects. An object's noun occurs in no other word list or sentence, so "this name and this noun
# share a text" is something that a test can check.
# ------------------------------------------------------------------------------------------------------------

GIRLS = _words(
    "Mia Zoë Inés Chloé Renée Anaïs Begoña Élodie Freya Hana Ida Juno Kira Lena Nora Odile "
    "Petra Linnea Rosa Sofía Tess Uma Vera Willa Yara Ada Clara Dora Esme Greta Saoirse Priya"
)
BOYS = _words(
    "Tomas José André Søren Jürgen Nuño Óscar Théo Ali Ben Cyrus Dario Emil Finn Gus Hugo "
    "Ivan Jonas Karim Leo Milo Ned Otto Pavel Rafi Sami Tariq Viktor Wes Yusuf Zeke Arlo"
)
NAMES = tuple(name for pair in zip(GIRLS, BOYS, strict=True) for name in pair)

NOUNS_BY_KIND: dict[str, tuple[str, ...]] = {
    "sound": _words(
        "drum flute violin trumpet bell accordion tambourine harmonica banjo rattle horn whistle"
    ),
    "guide": _words("compass map lantern lamp torch telescope candle spyglass"),
    "toy": _words("kite puppet marble ball doll sled hoop balloon puzzle robot piñata scooter"),
    "carry": _words(
        "basket bucket teapot jug satchel suitcase kettle saucepan wheelbarrow purse hamper vase"
    ),
    "wear": _words("scarf hat coat mitten shawl cloak sweater belt ribbon necklace apron poncho"),
    "tool": _words("spoon rope hammer needle ladder broom spade rake umbrella wrench ruler paintbrush"),
}
KIND_OF_NOUN = {noun: kind for kind, nouns in NOUNS_BY_KIND.items() for noun in nouns}
# Every kind's first noun, then every kind's second: the favourites (see ``_pick``) come from all kinds.
NOUNS = tuple(sorted(KIND_OF_NOUN, key=lambda noun: NOUNS_BY_KIND[KIND_OF_NOUN[noun]].index(noun)))

ADJECTIVES = _words(
    "red blue green yellow purple orange white black silver golden brown grey pink striped spotted "
    "painted patched "
    "crooked shiny dusty plain checked faded tiny old turquoise scarlet pale speckled lopsided cheap "
    "beautiful"
)

# What each kind of object is for (after "to ..."), and how it goes wrong (a whole clause).
USES: dict[str, tuple[str, ...]] = {
    "sound": (
        "play a {tune} at {festival}", "practise a {tune} with the {trade}",
        "play {count} songs for the {trade}",
        "wake the {trade} on {street} Street", "teach a {tune} to {animal.a}", "play a {tune} outside {far}",
    ),
    "guide": (
        "find the path to {far} in the fog", "look for a lost {animal} near {far}", "cross {far} after dark",
        "show the {trade} the way to {far}", "reach {far} before the {trade} does", "find {far} at night",
    ),
    "toy": (
        "cheer up a lonely {animal} near {far}", "make the {trade} laugh at {festival}",
        "win the race at {festival}",
        "amuse the {trade} at {far}", "win a bet with the {trade}", "play with the {trade} behind {far}",
    ),
    "carry": (
        "carry {cargo} to {far}", "bring {cargo} to the {trade}", "fetch {cargo} for {festival}",
        "bring the {trade} some {cargo}", "gather {cargo} behind {far}", "sell {cargo} at {festival}",
    ),
    "wear": (
        "look smart at {festival}", "dress up as a {costume} for {festival}", "surprise the {trade} at {far}",
        "keep warm near {far}", "look like a {costume}", "dress up as the {trade}",
    ),
    "tool": (
        "mend the {fixable} near {far}", "help the {trade} with a {fixable}",
        "build a {project} for {festival}",
        "finish a {project} behind {far}", "fix a {fixable} for the {trade}",
        "start a {project} with the {trade}",
    ),
}
FLAWS: dict[str, tuple[str, ...]] = {
    "sound": ("it only squeaked like {animal.a}", "it would not make a sound", "it buzzed like {count} bees"),
    "guide": ("one side was badly dented", "a crack ran across it like a {shape}",
    "it was no use to anybody"),
    "toy": ("one side had come loose", "it was bent like a {shape}", "it fell into {count} pieces"),
    "carry": ("there was a hole as big as a {shape}", "the bottom had come off",
    "it leaked in {count} places"),
    "wear": ("a tear ran down the middle", "it came apart in {count} places",
    "there was a hole like a {shape}"),
    "tool": ("it split in the middle", "the end snapped off", "it broke into {count} pieces"),
}


def is_held_out(name: str, noun: str) -> bool:
    """Whether the pair is one of the tenth that never share a training story (by a hash: it never moves)."""
    digest = hashlib.sha256(f"{name}|{noun}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 10 == 0


HELD_OUT = frozenset((name, noun) for name in NAMES for noun in NOUNS if is_held_out(name, noun))

# ------------------------------------------------------------------------------------------------------------
# Word pools: ``{animal}`` in a template is a fresh draw from POOLS["animal"]; entries may hold slots too.
# ------------------------------------------------------------------------------------------------------------

_ANIMALS = _words(
    "goat fox crow magpie otter heron badger donkey squirrel hedgehog goose cat dog rabbit raven pony lamb "
    "duck jackdaw seagull puppy kitten hen turtle"
)
_BEAST_ADJECTIVES = _words(
    "muddy clever sleepy bold thin fat noisy spotted shy one-eyed grumpy young hungry limping"
)
_PLACES = (
    "the old mill", "the stone bridge", "the duck pond", "the market square", "the lighthouse",
    "the train station", "the library", "the apple orchard", "the little café", "the boathouse",
    "the school gate", "the windmill", "the clock tower", "the fish market", "the bakery",
    "the rose garden", "the harbour", "the river bend", "the post office", "the red barn", "the greenhouse",
    "the theatre", "the ferry landing", "the well", "the castle ruins", "the tram stop", "the honey farm",
    "the museum", "the playing field", "the town hall", "the hay meadow", "the pine wood", "the sand dunes",
    "the crossroads", "the toy shop", "the château", "the quarry", "the swimming pool", "the chess club",
    "the crêpe stand",
)


# Girls and boys alternate in NAMES, so it is pairs of neighbours that are dealt out: every quarter has both.
_QUARTER = {
    word: index // 2 % 4 for pool in (NAMES, NOUNS, ADJECTIVES, _PLACES) for index, word in enumerate(pool)
}


def _pick(rng: random.Random, pool: Sequence[str]) -> str:
    """One of ``pool``, the earlier the likelier. As in any language some words are favourites; besides, a model
    of even choices would leave greedy decoding to toss-ups that rounding can decide."""
    return pool[int(len(pool) * rng.random() ** 1.15)]


def _pick_apart(rng: random.Random, pool: Sequence[str], count: int, first: str | None = None) -> list[str]:
    """``first``, or any word of ``pool``, and ``count - 1`` more, each from another quarter of the full list.

    Merely different words would do for a reader, but a model of a million parameters does not learn "anyone
    except those already here": its Mia now and then met Mia. That Mia meets people of the next quarter, it learns.
    """
    picked = [_pick(rng, pool) if first is None else first]
    for step in range(1, count):
        quarter = (_QUARTER[picked[0]] + step) % 4
        picked.append(_pick(rng, [word for word in pool if _QUARTER[word] == quarter]))
    return picked


def _with_article(phrase: str) -> str:
    return ("an " if _takes_an(phrase) else "a ") + phrase


def _takes_an(phrase: str) -> bool:
    return phrase[0] in "aeiou" and not phrase.startswith("one")


POOLS: dict[str, tuple[str, ...]] = {
    "animal": tuple(_ANIMALS),
    "animal.a": tuple(
        _with_article(f"{adjective} {animal}") for animal in _ANIMALS for adjective in _BEAST_ADJECTIVES
    ),
    "trade": _words(
        "baker miller sailor gardener tailor cobbler postman teacher dentist beekeeper shepherd painter "
        "librarian "
        "mayor doctor barber cook carpenter juggler plumber farmer singer"),
    "colour": _words("red blue green yellow purple orange white black silver brown grey pink golden"),
    "sunny": ("red", "golden", "pink", "orange", "pale", "enormous", "lazy"),
    "count": _words("two three four five six seven eight nine eleven twelve"),
    "ordinal": _words("first second third fourth fifth sixth seventh last"),
    "hour": _words("two three four five six seven eight nine ten eleven"),
    "weekday": _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "month": _words(
        "January February March April May June July August September October November December"),
    "season": ("spring", "summer", "autumn", "winter"),
    "daypart": ("morning", "afternoon", "evening"),
    "street": _words("Cooper Plum Mill Station Lime Harbour Garden Church King Long Bridge Oak Weaver Salt"),
    "tree": _words("oak pine willow apple birch chestnut cherry fig walnut pear elm"),
    "food": _words(
        "plums eggs chestnuts apples potatoes walnuts pears turnips mussels cherries lemons carrots figs "
        "jalapeños"
    ),
    "cargo": _words(
        "plums eggs chestnuts apples potatoes nails onions shells walnuts pears turnips mussels cherries "
        "lemons carrots figs buttons bricks books roses jalapeños"),
    "plural": _words(
        "clouds snails boats pigeons stones chimneys ants bicycles pebbles acorns bees ducks beetles "
        "stars feathers "
        "stamps ferns spiders shells trains moths gulls swallows leaves ghosts windows"),
    "smell": _words(
        "oranges smoke toast salt pine cinnamon hay soap mud coffee mint lavender rain fish bread ginger "
        "paint"),
    "shape": _words(
        "star moon fish leaf heart snail wave crown bee spider anchor snowflake acorn mushroom feather "
        "flower cloud "
        "arrow whale beetle pear wheel triangle swan"),
    "letter": tuple("ABCDEFGHJKLMNOPRSTVWZ"),
    "tune": _words("waltz march lullaby jig polka ballad tango hymn"),
    "costume": _words("pirate king wizard beekeeper gardener ghost sailor dragon lion detective"),
    "fixable": _words("fence roof gate boat window table cart chair door bench"),
    "project": _words("treehouse raft birdhouse footbridge shed scarecrow sandcastle stage"),
    "material": (
        "glue", "string", "{colour} thread", "{colour} paint", "wax", "wire", "{count} nails",
        "a strip of {colour} cloth",
        "a splinter of {tree} wood", "a drop of {smell} oil", "{count} {colour} pins",
        "a patch of {colour} leather",
    ),
    "rel": ("friend", "neighbour", "cousin", "classmate"),
    "near": ("near", "behind", "not far from", "outside", "just past"),
    "said": ("said", "whispered", "called", "replied", "murmured"),
    "asked": ("asked", "whispered", "begged"),
    "time": ("an hour", "{count} hours", "{count} minutes", "half a day", "a whole {daypart}", "a long time"),
    "when": (
        "one {daypart}", "one day", "one {season} {daypart}", "on {weekday} {daypart}", "late one {weekday}",
        "early in {month}",
        "on the {ordinal} {weekday} of {month}", "{count} days before {festival}", "one {weekday} in {month}",
        "on a {colour} {season} {daypart}", "the day after {festival}", "one windy {weekday}",
        "one {month} {daypart}",
    ),
    "soon": (
        "that {daypart}", "on {weekday}", "a little later", "{count} days later", "the next {daypart}",
        "at {hour} o'clock",
        "before {daypart}", "not long after", "the following {weekday}",
    ),
    "weather": (
        "the wind smelled of {smell}", "fog hid the {colour} chimneys", "mist lay under the {tree} trees",
        "the sun came up {sunny} and slow", "thunder grumbled over {street} Street",
        "the air tasted of {smell}",
        "someone had drawn a {shape} on the road", "a cold wind shook the {tree} trees",
        "the river was as {colour} as paint",
        "rain ran down {street} Street", "clouds like {plural} crossed the sky",
        "the mist was full of {plural}",
    ),
    "doing": (
        "counting {plural}", "sketching {plural}", "humming a {tune}", "sweeping {tree} leaves",
        "feeding {animal.a}",
        "peeling {food}", "painting a {fixable} {colour}", "reading about {plural}",
        "arguing with {animal.a}",
        "looking for {plural}", "drinking {flavour} tea", "mending a {fixable}",
        "drawing a {shape} in the sand",
        "eating {snack}", "waiting for the {hour} o'clock train", "teaching {animal.a} to dance",
    ),
    "habit": (
        "collected {plural}", "never passed {animal.a} without saying good morning", "wanted to be a {trade}",
        "drew {plural} on every wall", "knew {count} songs about {plural}", "was afraid of {plural}",
        "kept {count} {plural} on the windowsill", "liked {smell} better than anything",
        "dreamed of {plural}",
        "could talk to {plural}", "always smelled of {smell}", "had once met a {costume}",
        "ate {food} every day",
    ),
    "home": (
        "in a {colour} house on {street} Street", "in the {ordinal} house on {street} Street",
        "above a shop full of {cargo}",
        "at number {count}, {street} Street", "beside a field of {cargo}", "under a roof of {colour} tiles",
        "behind a {colour} gate", "in a house that smelled of {smell}",
    ),
    "snack": (
        "a slice of {fruit} cake", "a bag of {food}", "a crêpe with {flavour} sugar",
        "a loaf of {flavour} bread",
        "a bowl of {fruit} soup", "{count} {fruit} tarts", "a bowl of {flavour} porridge",
        "a jar of {fruit} jam",
        "{count} éclairs", "a plate of {fruit} dumplings", "some {flavour} biscuits", "a handful of {food}",
    ),
    "flavour": _words(
        "cinnamon mint lavender ginger honey lemon vanilla pepper saffron orange cardamom rosemary"
    ),
    "fruit": _words("plum apple pear cherry lemon fig onion pumpkin carrot walnut melon bean"),
    "spot": (
        "under the {ordinal} bench", "behind a crate of {cargo}", "between two {colour} doors",
        "inside a hollow {tree}",
        "under a heap of {tree} leaves", "beside a {colour} boat", "in the grass behind a {colour} gate",
        "below the {ordinal} step", "next to {animal.a}", "under a cart of {cargo}",
        "on the {ordinal} shelf of a {colour} shed",
        "among the {tree} roots", "on a heap of {cargo}", "in a ditch full of {plural}",
    ),
    "nightspot": (
        "on the windowsill", "beside the bed", "on the {ordinal} shelf", "under a {colour} blanket",
        "next to {count} {cargo}",
        "by the kitchen stove", "in a {colour} box", "behind a row of {cargo}", "among the {plural}",
    ),
    "junk": (
        "{count} {cargo}", "a wet {colour} sock", "a {colour} feather", "{animal.a} asleep",
        "a coin from 19{digit}{digit}",
        "an empty snail shell", "a {shape} made of paper", "a note with the letters {letter}{letter}",
        "{count} {plural}",
        "a photograph of {animal.a}", "half of {snack}",
    ),
    "digit": tuple("0123456789"),
    "fell": (
        "slipped on some {cargo}", "tripped over {animal.a}", "stepped into a puddle full of {plural}",
        "ran into a {trade}",
        "was pushed by {animal.a}", "stumbled over {count} {plural}", "fell off a {fixable}",
        "was startled by {animal.a}",
    ),
    "pause": (
        "watch {animal.a}", "count the {plural}", "eat {snack}", "talk to a {trade}", "buy {cargo}",
        "listen to a {tune}",
        "tie a shoe", "help {animal.a}", "look at the {plural}",
    ),
    "gesture": (
        "kicked {count} pebbles", "took a breath that smelled of {smell}", "ate {snack} in silence",
        "looked up at the {plural}",
        "stared at {animal.a}", "hummed a sad {tune}", "counted to {count}",
        "scratched {animal.a} behind the ears",
        "drew a {shape} in the dust", "sat down on a {fixable}", "turned as {colour} as paint",
    ),
    "sigh": (
        "Oh, {plural} and {cargo}", "What a {weekday}", "Of all the days in {month}", "Where can it be",
        "Think, think",
        "It must be somewhere", "I should have stayed in bed", "Never trust a {trade}",
        "This is worse than {cargo}",
    ),
    "soothe": (
        "I have mended worse in {month}", "No need to cry", "It is only a small thing",
        "Sit down and have {snack}",
        "My {trade} taught me how", "That is easier than a {fixable}", "Leave it with me", "Hold my {cargo}",
    ),
    "thanks": (
        "Thank you", "You are kinder than any {trade}", "I will not forget this",
        "You may have all my {plural}",
        "That was well done", "You are as clever as {animal.a}", "I owe you {snack}", "Bless you",
    ),
    "proverb": (
        "A promise is worth more than {count} {plural}", "Nothing is lost while a friend is looking",
        "Even {animal.a} can be honest", "Friends are better than {cargo}",
        "Every {tree} tree was an acorn once",
        "Slow feet see more {plural}", "A good {trade} asks twice", "Rain makes the {cargo} grow",
    ),
    "dusk": (
        "the first star came out", "the sky turned {colour}", "{hour} o'clock", "the {trade} went home",
        "the {plural} were asleep", "the moon stood over {street} Street", "even {animal.a} was yawning",
    ),
    "festival": (
        "the Harbour Fair", "the Plum Festival", "the Winter Market", "the Spring Dance", "the Boat Race",
        "the Fête of Lights", "the Pumpkin Supper", "the Goose Fair", "the Kitchen Concert",
        "the Snow Picnic",
        "the Apple Fair", "the Summer Dance", "the Fish Festival", "the Village Play", "the Cheese Market",
        "the Moon Picnic",
    ),
    "mark": (
        "a {shape} painted on one side", "a {shape} drawn in {colour} ink",
        "a {colour} thread tied around it",
        "the letters {letter} and {letter} on one side", "a stain like a {shape}", "a scratch like a {shape}",
        "a {colour} {shape} on the back", "a smell of {smell}", "the number {count} in {colour} ink",
    ),
    "deadline": (
        "by {hour} o'clock", "before {weekday}", "by {weekday} {daypart}", "before the {hour} o'clock ferry",
        "on {weekday} after supper", "on the {ordinal} of {month}", "before dark", "in {count} days",
        "before {festival}",
    ),
    "vow": (
        "I will bring it back {deadline}, with {treat}", "You shall have it {deadline}, and {treat} too",
        "It will be home {deadline}, and I will add {treat}", "Expect me {deadline} with {treat}",
        "You will see me {deadline}, carrying {treat}",
    ),
    "message": (
        "the {colour} door is open on {weekday}", "the {animal} has eaten the {cargo}",
        "come to {far} at {hour} o'clock",
        "the {fruit} soup needs more {flavour}", "{count} {plural} are not enough",
        "never lend {cargo} to a {trade}",
        "the {trade} knows about the {cargo}", "bring {count} {plural} to {festival}",
        "the {costume} leaves in {month}",
        "there are {plural} in the {fixable}", "the {tree} tree is {colour} again",
        "look behind the {colour} {fixable}",
    ),
}
POOLS["treat"] = POOLS["snack"]
_KIN = ("grandmother", "grandfather", "uncle", "aunt", "mother", "father", "older sister", "little brother")

# ------------------------------------------------------------------------------------------------------------
# Beats that several plots share. ``{A}``, ``{B}``, ``{C}`` are people (``.he .him .his .He .His .kin .job``),
# ``{O}``, ``{P}``, ``{Q}`` objects (``.a .noun .mark .use .flaw``). A ``!`` marks a mention that repeats what
# the story said before, at a place where only memory can supply it.
# ------------------------------------------------------------------------------------------------------------

Beat = tuple[str, ...]


def _maybe(*ways: str) -> Beat:
    """A beat that the story can do without, and in one case of three does."""
    return ways + ("",) * max(1, len(ways) // 2)


OPEN: Beat = (
    "{when}, {A} was {doing} {near} {place}.",
    "{when} {A} was {doing} {near} {place}, because {weather}.",
    "{when}, {weather}, and {A} was {doing} {near} {place}.",
    "{A} lived {home} and {habit}.",
    "{when}, {A} came back from {place} with {snack} and a plan.",
    "There was once a {A.child} called {A}, who lived {home} and {habit}.",
    "{A} woke early {when}, because {weather}.",
    "{near} {place}, {home}, lived {A}. {A.He} {habit}.",
    "{when}, {A} counted {count} {plural} on the way to {place}.",
    "{A}, who {habit}, was {doing} {near} {place} when this story began.",
    "Once upon a time, {A} was {doing} {near} {place}.",
    "Once upon a time there was a {A.child} called {A}, who lived {home}. {A.He} {habit}.",
    '"What a {weekday}!" said {A}, who was {doing} {near} {place}.',
    '"Good {daypart}," said {A} to {animal.a} {near} {place}. It only {gesture.beast}.',
    "{weather} {when}, and {A} had nothing to do but eat {snack} {near} {place}.",
)
OWN: Beat = (
    "{A.He} owned {O.a} with {O.mark}.",
    "{A.His} best treasure was {O.a}; it had {O.mark}.",
    "{A.His} {A.kin} had given {A.him} {O.a}. It had {O.mark}, so nobody could mix it up.",
    "{A.He} carried {O.a} everywhere — the one with {O.mark}.",
    "Nothing in the house was dearer to {A} than {O.a}. You could tell it by {O.mark}.",
    "In {month} {A.he} had bought {O.a} from a {trade}. It had {O.mark}.",
    "{A.He} kept {O.a} {nightspot}. It had {O.mark}.",
)
ASK: Beat = (
    '{soon} {A.his} {rel} {B} came by. "May I borrow your {!O}?" {asked} {B}. "I need it to {O.use}."',
    ('{A.His} {rel} {B}, who lived {home}, looked worried. "Would you lend me your {!O}?" {B.he} asked. '
    '"I have to {O.use}."'),
    '"{A}," said {A.his} {rel} {B}, "could I use your {!O}? I want to {O.use}, and all I have is {snack}."',
    ('Then {A.his} {rel} {B} came running from {place2}. "I must {O.use}," {B.he} {said}, "and I need '
    'your {!O}."'),
    ('{soon} there was a knock. It was {B}, {A.his} {rel}, eating {snack}. "I want to borrow your {!O}," '
    '{B.he} said. '
    '"Without it I cannot {O.use}."'),
)
VOW: Beat = (
    '"Only if you promise," said {A}. "{vow}," said {B}.',
    '{A} {gesture} and handed it over. "{vow}," {said} {B}.',
    '"Be careful with it," said {A}. "{vow}!" called {B}, and {B.he} was off.',
    '{A} looked at the {!O} once more and gave it to {B}. "{vow}," said {B}.',
    '"When shall I see it again?" asked {A}. "{vow}," {said} {B}.',
)
LOSE: Beat = (
    ("But near {place2}, {beast.a} ran across the road, and {S} {fell}. When {S.he} got up, the {!O} was "
    "gone."),
    ("At {place2}, where {weather}, {S} stopped to {pause}. Then {S.he} felt for the {!O}, and it was not "
    "there."),
    ("The trouble came near {place2}. {S} put it down to {pause}, and when {S.he} turned round — no "
    "{!O.noun} anywhere."),
    "All went well as far as {place2}. There {S} {fell}, and {soon} {S.he} saw that the {!O} was missing.",
    "{S} {fell} near {place2}. Only after {time} did {S.he} notice it: {S.he} had dropped the {!O}.",
)
SEARCH: Beat = _maybe(
    "{S} looked {spot} and {spot}, but found only {junk}.",
    "{S} searched {spot}. Nothing! {S} searched {spot}. {S.He} found {junk}, and that was all.",
    '"{sigh}," said {S}, and {S.he} {gesture}.',
    "{S} walked back for {time}, peering {spot}. {S.He} found {junk}.",
    '{S} {gesture}. "{sigh}!" {S.he} said, and looked {spot}.',
    "{S} asked {animal.a}, but it only {gesture.beast}.",
)
POOLS["gesture.beast"] = (
    "yawned", "looked {spot}", "went on eating {food}", "blinked {count} times",
    "ran off towards the {plural}", "sneezed",
)
HELP: Beat = (
    ('{C} the {C.job} was {doing}. "I am looking for {O.a}," said {S}. "It has {!O.mark}." "Look '
    '{found}," said {C}.'),
    ('"What have you lost?" asked {C}, a {C.job} who {habit}. "My {!O.noun}," said {S}. '
    '"I saw something {found}," said {C}.'),
    '"Have you seen the {!O}?" {S} asked {C} the {C.job}, who was {doing}. "Try {found}," said {C}.',
    ('{C} the {C.job} came by with {snack}. "You are looking for something," {C.he} said. "The {!O}," '
    'said {S}. '
    "{C} had seen it {found}."),
)
FIND: Beat = (
    "And {!found} lay the {!O}. {S} knew it by its sign: {!O.mark}.",
    "{S} ran to look {!found}, and there it was, with {!O.mark}.",
    "It took {S} {time}, but the {!O} was {!found}, just as {!C} had said.",
    "{S} found it {!found}, beside {junk}. Yes, it was the {!O}: it had {!O.mark}.",
    'It was {!found}, under {junk}. "{thanks}, {!C}," said {S}, and picked up the {!O}.',
)
ENDING: Beat = (
    "That night the {!W} lay {nightspot}, and {H} dreamed of {plural}.",
    "From then on, whenever {H} saw {plural}, {H.he} thought of {!F}.",
    "{H} and {!F} ate {snack} until {dusk}.",
    "And the {!W}? It stayed {nightspot}, and everyone on {street} Street knew that it belonged to {!H}.",
    "{soon} {H} wrote it all down: {count} {plural}, one {!W} and a friend called {!F}.",
    '"{proverb}," said {F}, and {H} had to agree.',
    "{H} put the {!W} {nightspot} and slept until {hour} o'clock.",
    "To this day {H} keeps the {!W} {nightspot}, and {F} comes every {weekday} to see it.",
    '"Good night, {!F}," said {H}. "Good night," said {F}, "and good night to the {!W}."',
    '{H.His} {H.kin} asked what had happened. "Ask {!F}," said {H}, and {H.he} {gesture}.',
    '"What did you learn?" asked {H.his} {H.kin}. "{proverb}," said {H}, holding the {!W}.',
    "{H} laughed so loudly that {animal.a} looked up. Then {H.he} took the {!W} and {!F} home for {snack}.",
)
ASIDE: Beat = _maybe(
    "{weather}.",
    "Somewhere {animal.a} was {doing.beast}.",
    "A {trade} went by with {cargo}.",
    "It smelled of {smell} and {smell}.",
    "Nobody noticed the {plural}.",
    "The clock struck {hour}.",
)
POOLS["doing.beast"] = (
    "singing", "eating {food}", "chasing {plural}", "digging for {cargo}", "watching the {plural}",
)

# ------------------------------------------------------------------------------------------------------------
# Plots.
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plot:
    """One kind of story; ``roles`` says who fills S, H, W and F of the shared beats: the searcher, the holder
    at the end, what is held, and the holder's friend."""

    name: str
    roles: dict[str, str]
    beats: tuple[Beat, ...]


_LEND_AND_LOSE = Plot("lend_and_lose", {"S": "B", "H": "A", "W": "O", "F": "B"}, (
    OPEN, OWN, ASK, VOW, LOSE, SEARCH, HELP, FIND,
    (
        ('So {B} came back {!deadline}, just as promised. "Here is your {!O}," {B.he} said, "and here is '
        '{!treat}."'),
        '{B} had said "{!vow}," and so it was. {A} took the {!O} back.',
        "{B} gave it back to {!A} {!deadline}. There was {!treat} as well.",
        '"Is that my {!O.noun}?" asked {A}. "It is," said {B}, "and I have brought {!treat}, as I said."',
        '"You came {!deadline}," said {A}, "and you remembered {!treat}." {B} held out the {!O}.',
    ),
    ENDING,
))

_LEND_AND_BREAK = Plot("lend_and_break", {"S": "B", "H": "A", "W": "O", "F": "B"}, (
    OPEN, OWN, ASK, VOW,
    (
        "Near {place2}, {beast.a} startled {B}. Down went the {!O}, and {O.flaw}.",
        ("For {time} all was well. Then {B} {fell} near {place2}, and when {B.he} looked at the {!O}, "
        "{O.flaw}."),
        "At {place2} {B} {fell}. There was a nasty sound — {O.flaw}.",
        "{B} tried to {O.use}. It went badly near {place2}: {O.flaw}.",
    ),
    (
        '{B} carried the {!O} to {C} the {C.job}. "Give me {time} and {m1}," said {C}.',
        '"Can you mend the {!O}?" {B} asked {C}, a {C.job} who {habit}. {C} took {m1} and set to work.',
        '{C} the {C.job} was {doing}. "{soothe}," {C.he} said, and mended it with {m1}.',
        '"{sigh}," said {B}. "{soothe}," said {C} the {C.job}, looking for {m1}. It took {time}.',
    ),
    (
        '{B} went back {!deadline}. "I broke your {!O}," {B.he} said, "and {!C} mended it with {!m1}."',
        '{B} wanted to say nothing. But {B.he} had said "{!vow}," and so {B.he} told {!A} everything.',
        '"It broke near {!place2}," said {B} {deadline}, "and {!C} helped me. But I have brought {!treat}."',
        '{A} saw {!m1} at once. "Who mended my {!O}?" {A.he} asked. "{!C} did," said {B}, "and I am sorry."',
    ),
    _maybe(
        '"It has {!O.mark} and a story as well now," said {A}. "That is {count} times better."',
        '{A} {gesture}, and then {A.he} smiled. "Thank you for telling me, {!B}."',
        '"You could have hidden it," said {A}, "but you did not. Come and eat {snack}, {!B}."',
        '"{proverb}," said {A}, and {A.he} was not angry with {!B} at all.',
    ),
    ENDING,
))

_LOST_AND_FOUND = Plot("lost_and_found", {"S": "A", "H": "A", "W": "O", "F": "B"}, (
    OPEN, OWN, LOSE, SEARCH,
    (
        ('{A.His} {rel} {B} found {A.him} {spot}. "What are you doing?" asked {B}. "Looking for my {!O}," '
        'said {A}.'),
        '"I have lost my {!O}," {A} told {A.his} {rel} {B}. "Let us ask at {far}," said {B}.',
        '{A.His} {rel} {B} was {doing}. "You look sad," said {B}. "It is my {!O}," said {A}. "It is gone."',
    ),
    ASIDE,
    (
        ('Near {far} stood {C} the {C.job}. "I found something {spot}," said {C}. "Whose is it?" '
        '"Mine!" said {A}. "What does it have?" asked {C}. "It has {!O.mark}," said {A} at once.'),
        ('Near {far}, {C} the {C.job} held up {O.a}. "This was {spot}," {C.he} said. '
        '"It belongs to {!A}," said {B}, "because it has {!O.mark}."'),
        ('{C}, a {C.job}, was {doing} near {far}. Beside {C.him} lay {O.a} with {!O.mark}. "Is this '
        'yours?" asked {C}.'),
    ),
    (
        "{C} gave the {!O} to {!A}, and {A} gave {!C} {snack} for it.",
        '"{thanks}," said {A}, and took the {!O} from {!C}.',
        "So the {!O} came back to {!A}, and {C} got {snack} for being honest.",
        '"{thanks}, {!C}!" cried {A}, and {B} {gesture}.',
    ),
    ENDING,
))

_B_OWNS: Beat = (
    "{A.His} {rel} {B} had {P.a} with {P.mark}.",
    "{B}, {A.his} {rel}, had only {P.a}; it had {P.mark}.",
    "Next door lived {B}, who owned {P.a}. It had {P.mark}.",
    "{soon} {A.he} met {A.his} {rel} {B}, who was carrying {P.a} with {P.mark}.",
)
_SWAP: Beat = (
    '{A} said, "I will give you my {!O} for your {!P}." {B} {gesture} and agreed.',
    '{B} said, "I will give you my {!P} for your {!O}, because I want to {O.use}." "Done," said {A}.',
    '"I have always wanted to {P.use}," said {A}. So {B} took the {!O}, and {A} took the {!P}.',
    '"Let us swap," said {B}. {A} held out the {!O}, and {B} held out the {!P}.',
)

_SWAP_AND_KEEP = Plot("swap_and_keep", {"S": "B", "H": "A", "W": "P", "F": "B"}, (
    OPEN, OWN, _B_OWNS, _SWAP,
    (
        "So {A} went home with the {!P}, and {B} went home with the {!O}.",
        "Now {A} had the {!P}, and {B} had the {!O}.",
        "From that day the {!P} belonged to {!A} and the {!O} belonged to {!B}.",
    ),
    _maybe(
        "{A} used it to {P.use}. {B} was busy as well: {B.he} had to {O.use}.",
        '"Are you happy with the {!O}?" {A} asked {soon}. "Very," said {B}. "Now I can {O.use}."',
        ('"Where did you get that {!P.noun}?" asked {C} the {C.job}. "From {!B}," said {A}. "It has '
        '{!P.mark}."'),
        ('{C} the {C.job} saw {B} {near} {place2}. "Is that {!A}\'s {!O}?" {C.he} asked. "We '
        'swapped," said {B}.'),
    ),
    ENDING,
))

_SWAP_AND_REGRET = Plot("swap_and_regret", {"S": "A", "H": "A", "W": "O", "F": "B"}, (
    OPEN, OWN, _B_OWNS, _SWAP,
    (
        "But {A} lay awake and missed {A.his} {!O}.",
        "For {time} {A} was pleased. Then {A.he} tried to {P.use}, and {A.he} missed {A.his} {!O}.",
        '{A.His} {A.kin} frowned at the {!P}. "And where is your {!O}?"',
        "{soon} {A} sat {near} {place2} with the {!P} and {gesture}.",
    ),
    _maybe(
        '"{sigh}," said {A}, and {A.he} {gesture}.',
        "{A} ran to {place2}, where {weather}. There was {B}, running too.",
        "{A} looked for {!B} {spot}, and {B} was looking for {!A} {spot}.",
    ),
    (
        '"I miss my {!P}," said {B}. "And I miss my {!O}," said {A}.',
        '"May I have my {!O} back?" asked {A}. "Only if I get my {!P}," said {B}.',
        '{B} said, "I cannot sleep without {!P.mark} beside me." "And I miss {!O.mark}," said {A}.',
    ),
    (
        "So they swapped again: {A} got the {!O}, and {B} got the {!P}.",
        "The {!P} went back to {!B}, and the {!O} went back to {!A}.",
        "In the end everything was as before. {B} had the {!P}, and {A} had the {!O}.",
    ),
    ENDING,
))

_THIEF = Plot("thief", {"S": "A", "H": "A", "W": "O", "F": "B"}, (
    OPEN, OWN,
    (
        "{soon}, {beast.a} ran up to {A}, snatched the {!O} and made off towards {place2}.",
        "Then {beast.a} came along. It sniffed at the {!O}, picked it up and trotted away to {place2}.",
        "While {A} was {doing}, {beast.a} stole the {!O} and carried it off to {place2}.",
        "{A} turned round to {pause}. At that moment {beast.a} took the {!O} and fled past {place2}.",
    ),
    (
        '"Stop!" cried {A}. {A.His} {rel} {B}, who was {doing}, joined the chase.',
        ('{A.His} {rel} {B} heard {A.him} shout. "Which way did the {!beast} go?" asked {B}. "To '
        '{!place2}," said {A}.'),
        '"{sigh}," said {A}. "We can catch a {!beast}," said {A.his} {rel} {B}. "We only need {treat}."',
        '"That {!beast} has my {!O}!" {A} told {A.his} {rel} {B}. Together they followed it for {time}.',
    ),
    ASIDE,
    (
        "At {!place2} the {!beast} sat {spot}, with the {!O} between its feet.",
        "They found the {!beast} {near} {!place2}. It would not let go of the {!O}.",
        "They saw {!O.mark} shining {spot}, and beside it sat the {!beast}.",
    ),
    (
        "{B} held out {treat}. The {!beast} looked at {!B}, looked at {!treat} and dropped the {!O}.",
        '"Would you like {treat}?" asked {B} politely. The {!beast} would, and {A} picked up the {!O}.',
        "{A} {gesture}, and {B} offered {treat}. It was a fair trade: {treat} for the {!O}.",
        "{B} hummed a {tune}. The {!beast} yawned and fell asleep, and {A} took back the {!O}.",
    ),
    _maybe(
        '"{thanks}, {!B}," said {A}. "It was the {!beast} that was clever," said {B}.',
        '"It was only hungry," said {B}. After that, {A} brought the {!beast} {food} every {weekday}.',
        "The {!beast} followed {A} home, all the way from {!place2}.",
    ),
    ENDING,
))

_ERRAND = Plot("errand", {"S": "A", "H": "B", "W": "O", "F": "A"}, (
    OPEN,
    (
        ('{C} the {C.job} called {A.him} over. "Please take this {O.noun} to {B} at {far}," said {C}. '
        'It was {O.a} with {O.mark}. "And tell {B.him}: {message}."'),
        ('{soon} {C}, the {C.job}, gave {A} {O.a} with {O.mark}. "It is for {B}, who lives near {far}," '
        '{C.he} said. '
        '"Say this: {message}."'),
        ('"I have {O.a} for {B}," said {C} the {C.job}. "It has {O.mark}. Will you carry it to {far}, {!A}? '
        'And tell {B.him}: {message}."'),
    ),
    _maybe(
        '{A} said the words again and again: "{!message}. {!message}."',
        '"{!message}," {A} murmured at every corner, so as not to forget.',
        "{A} {gesture} and set out for {!far}.",
        '"To {!B}, at {!far}," said {A}. "I can do that."',
    ),
    _maybe(
        "Near {place2} {A} {fell}, but {A.he} held on to the {!O}.",
        "At {place2} {A.he} met {animal.a} and gave it {snack}.",
        "{weather}, and {A} had to wait {spot} for {time}.",
        "{beast.a} barred the way at {place2}. {A} {gesture} until it moved.",
        'A {trade} wanted to buy the {!O} for {count} {cargo}. "It is not mine," said {A}. "It is for {!B}."',
    ),
    ASIDE,
    (
        ('{B} was {doing} {near} {!far}. "I bring you {O.a} from {!C}," said {A}, "and I am to say: '
        '{!message}."'),
        'At {!far} {A} found {!B}. "This {!O.noun} is from {!C}, and here are the words: {!message}."',
        '"Are you {!B}?" asked {A} at {!far}. "I am." "Then this is yours. And {!C} says: {!message}."',
    ),
    _maybe(
        '{B} laughed until {dusk}. "Tell {!C} that I understand," {B.he} said, and hugged the {!O}.',
        '"So that is it!" said {B}. "{thanks}, {!A}." And {B.he} wrote it down: "{!message}."',
        '{B} looked for {!O.mark}, found it and smiled. "Only {!C} knows about that."',
        "{B} gave {A} {snack} and put the {!O} {nightspot}.",
    ),
    ENDING,
))

_NOTE = Plot("note", {"S": "A", "H": "A", "W": "O", "F": "C"}, (
    OPEN,
    (
        '{found}, {A.he} found {O.a} with {O.mark}. A paper was tied to it: "This belongs to {C} of {far}."',
        'There, {found}, lay {O.a}. It had {O.mark} and a label: "Property of {C}, near {far}."',
        ('{A} nearly stepped on something {found}: {O.a}. It had {O.mark}, and someone had written on it: "Return to {C}, '
        '{far}."'),
    ),
    (
        '"Who is {!C}?" {A} asked {A.his} {rel} {B}. "A {C.job}," said {B}. "Go to {!far}."',
        '{A.His} {rel} {B} wanted to keep it and {O.use}. "No," said {A}, "it belongs to {!C}."',
        '{A} showed the {!O} to {A.his} {rel} {B}. "I know {!C}," said {B}, "the {C.job} who {habit}."',
    ),
    ASIDE,
    (
        'They found {!C} {near} {!far}, {doing}. "Is this yours?" asked {A}. "It has {!O.mark}."',
        ('At {!far} {A} knocked {count} times. {C} opened. "My {!O}!" {C.he} cried. "Where was it?" '
        '"{!found}," said {A}.'),
        'It was {time} to {!far}. "Are you {!C}?" asked {A}. "I think that I have found your {!O}."',
    ),
    _maybe(
        '{C} {gesture}. "I lost it in {month}," {C.he} said, "when I was going to {O.use}."',
        '"I used it to {O.use}," said {C}, "before you were born."',
        ("{C} told them about {count} {plural}, a {costume} and {festival}, and the {!O} was in every "
        "part of it."),
    ),
    (
        '"Keep it, {!A}," said {C}. "You can {O.use} better than I."',
        '"I am too old to {O.use}," said {C}. "From today the {!O} belongs to {!A}."',
        ('{C} looked at {B} and then at {A}. "The honest one shall have it," {C.he} said, and gave the '
        '{!O} to {!A}.'),
    ),
    ENDING,
))

_TRADES = Plot("trades", {"S": "A", "H": "A", "W": "Q", "F": "C"}, (
    OPEN, OWN,
    (
        "But what {A} really wanted was {Q.a}, in order to {Q.use}.",
        'All the same, {A} dreamed of {Q.a}. "Then I could {Q.use}," {A.he} told {A.his} {A.kin}.',
        '"I would give anything for {Q.a}," {A.he} said to {animal.a}. It only {gesture.beast}.',
    ),
    (
        "At {place2} {A} met {B}, who needed {O.a} to {O.use} and gave {P.a} for it.",
        "{B}, {A.his} {rel}, had {P.a} and wanted {O.a}. They traded {near} {place2}.",
        '"I will take your {!O}," said {B} at {place2}, "and you may have {P.a}." {A} agreed.',
    ),
    _maybe(
        "So now {A} had the {!P}, and {B} had the {!O}.",
        "{A} carried the {!P} as far as {far}.",
        "Now the {!O} belonged to {!B}. {A} {gesture} and went on with the {!P}.",
    ),
    ASIDE,
    (
        ('Near {far} {C} the {C.job} stopped {A.him}. "That {!P.noun} is just what I need to {P.use}," '
        '{C.he} said. '
        '"Would you take my {!Q.noun}?"'),
        ('{C} the {C.job} was {doing}, and beside {C.him} lay {Q.a}. "I will give you this for your '
        '{!P}," {C.he} said.'),
        ('"Who has {Q.a}?" {A} asked at {far}. "I have," said {C} the {C.job}. "I will give it for your '
        '{!P}."'),
    ),
    (
        "In the end {B} had the {!O}, {C} had the {!P}, and {A} had the {!Q}.",
        "So {C} got the {!P}, and {A} got the {!Q} at last.",
        "{A} had left home with the {!O} and came back with the {!Q}.",
        ('"Who has your {!O} now?" asked {A.his} {A.kin}. "{!B}," said {A}, "and {!C} has the {P}. But '
        'look at this!"'),
    ),
    ENDING,
))

_GIFT = Plot("gift", {"S": "B", "H": "B", "W": "O", "F": "A"}, (
    OPEN,
    (
        "It would soon be the birthday of {A.his} {rel} {B}. {A} had {m1}, {count} {cargo} and an idea.",
        "{A.His} {rel} {B} would be {count} on {weekday}, and {A} had no present.",
        '"What would {B} like best?" {A} asked {A.his} {A.kin}. "Something to {O.use}," was the answer.',
    ),
    (
        "From {C} the {C.job} {A.he} bought {O.a} with {O.mark}, and {A.he} hid it {found}.",
        ("{A} worked for {time}, and {C} the {C.job} helped with {m1}. It became {O.a} with {O.mark}. {A} "
        "hid it {found}."),
        ("{C} the {C.job} gave {A.him} {O.a} for {count} {cargo}. It had {O.mark}. {A} put it {found} and "
        "told nobody."),
    ),
    _maybe(
        '{soon} {B} almost sat down {!found}. "Not there!" cried {A}. "Let us {pause} instead."',
        '"What is {!found}?" asked {B}. "Only {junk}," said {A} quickly.',
        '"You are hiding something, {!A}," said {B}, and {B.he} {gesture}.',
        "{beast.a} went straight there and sniffed. {A} gave it {snack} to keep it quiet.",
    ),
    ASIDE,
    (
        'On the day, {A} led {B} to {place2}. "Now look {!found}," {A.he} said. There lay the {!O}.',
        'At last {A} said, "Look {!found}, {!B}." And {B} found the {!O}.',
        'On the birthday {A} brought out the {!O}. "So that is what was {!found}!" said {B}.',
    ),
    (
        '"It even has {!O.mark}," said {B}. "Now I can {O.use}."',
        '"Did you make it alone?" asked {B}. "{!C} helped," said {A}.',
        '{B} {gesture}. "{thanks}, {!A}," {B.he} said. "We will {O.use} together."',
        "From that day the {!O} belonged to {!B}, and {B} gave {A} {snack}.",
    ),
    ENDING,
))

_FESTIVAL = Plot("festival", {"S": "A", "H": "A", "W": "O", "F": "B"}, (
    OPEN, OWN,
    (
        "On {weekday} {A.he} was going to {fair}, to show it to the {trade}. But {when.bad} {O.flaw}.",
        "{A} wanted to win the prize at {fair} with it. Then {beast.a} sat on it, and {O.flaw}.",
        "It was {count} days to {fair}. {A} took out the {!O}, and — oh! — {O.flaw}.",
    ),
    (
        '"Take my {P.noun} instead," said {A.his} {rel} {B}. It was {P.a} with {P.mark}.',
        '{A.His} {rel} {B} had {P.a}. "Borrow this," said {B}. "It has {P.mark}, and that is lucky."',
        '"I cannot go," {A} told {A.his} {rel} {B}. "Nonsense," said {B}. "Here is {P.a} with {P.mark}."',
    ),
    (
        "So {A} took the {!P} to {!fair}, and left the {!O} with {C} the {C.job}.",
        "{A} went to {!fair} with the {!P}. Meanwhile {C} the {C.job} mended the {!O} with {m1}.",
        "{C} the {C.job} kept the broken {!O.noun} to mend it, and {A} carried the {!P} to {!fair}.",
    ),
    _maybe(
        "There {A.he} came {ordinal} and won {snack}. Everyone asked about {!P.mark}.",
        "{A} won nothing at all, but {animal.a} danced and a {trade} sang a {tune}.",
        "{weather}, and the mayor fell into {snack}. Nobody who saw it ever forgot {!fair}.",
        'The {ordinal} prize, {snack}, went to {A}. "It should go to {!B}," {A.he} said, and shared it.',
    ),
    (
        "{soon} {A} returned the {!P} to {!B} and fetched the {!O} from {!C}.",
        "Afterwards {B} got back the {!P}, and {C} had the {!O} ready.",
        '"Here is your {!P}, {!B}," said {A}. "And here is your {!O}, {!A}," said {C}.',
    ),
    ENDING,
))

_RESCUE = Plot("rescue", {"S": "A", "H": "A", "W": "P", "F": "B"}, (
    OPEN, OWN,
    (
        "{soon} {A.he} heard crying {near} {place2}. It was {beast.a}, stuck {found}.",
        "{beast.a} had fallen into a hole {near} {place2}, and a {trade} stood by and {gesture}.",
        "At {place2}, where {weather}, {beast.a} sat {found} and could not get out.",
    ),
    (
        ('{A} took the {!O}, held one end and pushed the other towards the {!beast}. "Come," {A.he} '
        '{said}. It came.'),
        "With the {!O} and {count} {cargo} {A} needed {time}, but then the {!beast} was free.",
        ('"If only I had a {trade} here," said {A}. But {A.he} had the {!O}, and with that {A.he} got the '
        '{!beast} out.'),
    ),
    (
        "Round its neck hung a {colour} tag with a name: {B}.",
        '"That {!beast} belongs to {B}," said {C} the {C.job}, who had been {doing}. "{B.He} lives {home}."',
        ('"Whose {!beast} is this?" {A} asked {C} the {C.job}. "It is the one that {B} lost in {month}," '
        'said {C}.'),
    ),
    (
        "{A} brought the {!beast} to {!B}, who {gesture} and then wept for joy.",
        'So {A} took it to {!B}. "My {!beast}!" cried {B}. "Where was it?" "Near {!place2}," said {A}.',
        '{B} came running. "{thanks}," {B.he} said. "That {!beast} is all I have, except {P.a}."',
    ),
    (
        '"You must have a reward," said {B}, and gave {A} {P.a} with {P.mark}.',
        '{B} held out {P.a}; it had {P.mark}. "It is for you, {!A}," {B.he} said, "to {P.use}."',
        '{A} wanted no reward, but {B} gave {A.him} {P.a}. "It has {P.mark}," said {B}, "so do not lose it."',
    ),
    _maybe(
        "So {A} had two treasures: the {!O} and the {!P}.",
        "{A} walked home with the {!O} in one hand and the {!P} in the other.",
        "Every {weekday} {A} visits the {!beast} {near} {!place2} with {food}.",
    ),
    ENDING,
))

_GAME = Plot("game", {"S": "C", "H": "C", "W": "O", "F": "B"}, (
    OPEN,
    (
        "{A.He} was playing with {B} and {C}. {A} had {O.a}, and {B} had {P.a}.",
        "Three friends were there: {A} with {O.a}, {B} with {P.a}, and {C} with nothing but {snack}.",
        "{B} and {C} came by. {B} was carrying {P.a}, and {A} had brought {O.a} with {O.mark}.",
    ),
    (
        '"Let us play who-has-it," said {C}. "I shall look at the {plural}, and you must trade."',
        "They had a game for such days. One counted {plural}, and the others passed things round.",
        '"Close your eyes, {!C}," said {A}, "and count to {count}."',
    ),
    (
        ('{A} gave the {!O} to {B}, and {B} gave the {!P} to {A}. "Where is the {O}?" asked {A}. "{!B} '
        'has it," said {C}.'),
        ('Quickly {A} took the {!P} from {!B} and hid the {!O} {found}. "Where is the {O}?" asked {A}. '
        '"I think that it is {!found}," said {C}.'),
        ('{B} took the {!O} from {!A} and kept the {!P} as well. "Who has them?" asked {A}. "{!B} has '
        'both," said {C}.'),
        ('{A} took the {!P} from {!B} and kept the {!O} as well. "Who has them?" asked {B}. "{!A} has '
        'both," said {C}.'),
    ),
    _maybe(
        '"How did you know?" asked {B}. "{animal.a} told me," said {C}, and {C.he} {gesture}.',
        '"You looked!" cried {A}. "I did not," said {C}. "I only listened to the {plural}."',
        "That was right, and {C} won {snack}.",
    ),
    (
        "Then all was given back. {B} took the {!P} home, and {A} gave the {!O} to {!C} as a prize.",
        '"The winner gets the {!O}," said {A}, and {C} took it home.',
        "In the end {C} was allowed to keep the {!O} until {weekday}, and {B} kept the {!P}.",
    ),
    ENDING,
))

_TURNS = Plot("turns", {"S": "A", "H": "A", "W": "O", "F": "B"}, (
    OPEN,
    (
        "{A.His} {rel} {B} was there too. {found}, they saw {O.a} with {O.mark}, and both took hold of it.",
        "{soon} {A.he} and {A.his} {rel} {B} found {O.a} {found}. It had {O.mark}.",
        "A {trade} had left {O.a} for {A} and {A.his} {rel} {B} to share. It had {O.mark}.",
    ),
    (
        '"I want it," said {A}, "to {O.use}." "So do I," said {B}, and {B.he} {gesture}.',
        '"I saw the {!O} first," said {A}. "I touched it first," said {B}. Neither would let go.',
        "They pulled so hard that the {!O} flew through the air and hit {animal.a}.",
        "{A} wanted to {O.use}. {B} wanted to sell it for {snack}. They argued for {time}.",
    ),
    (
        '{C} the {C.job} heard the noise. "Take turns," said {C}. "{day1} for {A}, and {day2} for {B}."',
        ('"Share it," said {C}, a {C.job} who {habit}. "On {day1} it stays with {A}, and on {day2} it '
        'stays with {B}."'),
        '{C} the {C.job} wrote on a paper: "{day1}: {A}. {day2}: {B}."',
    ),
    ASIDE,
    (
        "On {!day1} the {!O} was with {!A}, who could {O.use}. On {!day2} it was with {!B}.",
        "So on {!day2} {B} had the {!O}, and on {!day1} {A} had it, just as {!C} had said.",
        ("When {day2} came, {A} brought the {!O} to {!B} {near} {place2}. When {day1} came, {B} brought "
        "it back to {!A}."),
    ),
    _maybe(
        '"What day is it?" asked a {trade} {soon}. "{day1}," said {B}. "So the {!O} is with {!A}."',
        '"What day is it?" asked a {trade} {soon}. "{day2}," said {A}. "So the {!O} is with {!B}."',
        "On the other days it lay {nightspot}, and {!O.mark} shone in the dark.",
        "{soon} they no longer counted. They went to {place2} to {O.use} together.",
    ),
    ENDING,
))

_WIND = Plot("wind", {"S": "A", "H": "A", "W": "O", "F": "B"}, (
    OPEN, OWN,
    (
        "Then came a wind like {count} trains. It tore the {!O} away and blew it over {place2}.",
        ("A gust from {street} Street lifted the {!O} higher than the {tree} trees and dropped it on the "
        "roof of {far}."),
        "{weather}, and all at once the {!O} was flying past {place2} with {count} {plural} behind it.",
    ),
    (
        "{A} ran after it with {A.his} {rel} {B}. It had landed in a tall {tree}, and nobody could reach it.",
        '"There it is!" cried {A.his} {rel} {B}. They could see {!O.mark}, far up on a {colour} roof.',
        "{A.His} {rel} {B}, who was {doing}, pointed. High above them, in a {tree} tree, hung the {!O}.",
    ),
    (
        ('"We need something long," said {B}. {C} the {C.job} lent them {P.a}. "We must bring it back to '
        '{!C}," said {A}.'),
        '{B} borrowed {P.a} from {C} the {C.job}. "I want it back {deadline}," said {C}.',
        '"Try this," said {C} the {C.job}, and gave {B} {P.a}. "But bring it home {deadline}."',
    ),
    (
        "{B} climbed up with the {!P}, poked {count} times, and the {!O} fell straight into {snack}.",
        "{A} threw the {!P} once, twice, again and again. At last the {!O} came down, with {animal.a} on it.",
        ('With the {!P} in one hand {B} climbed until {dusk}. "Catch, {!A}!" {B.he} called, and down came '
        'the {!O}.'),
    ),
    (
        "{A} hugged the {!O}, and {B} took the {!P} back to {!C}.",
        'They returned the {!P} to {!C}. "And what about the {!O}?" {C.he} asked. "Here," said {A}.',
        '"{thanks}," {A} said to {C}, and gave back the {!P}. "Hold on to your {!O}," said {C}.',
    ),
    ENDING,
))
POOLS["when.bad"] = ("on {weekday}", "the night before", "{count} hours too early", "at the {ordinal} try")

PLOTS: tuple[Plot, ...] = (
    _LEND_AND_LOSE, _LEND_AND_BREAK, _LOST_AND_FOUND, _SWAP_AND_KEEP, _SWAP_AND_REGRET, _THIEF, _ERRAND,
    _NOTE, _TRADES, _GIFT, _FESTIVAL, _RESCUE, _GAME, _TURNS, _WIND,
)

# fmt: on

# ------------------------------------------------------------------------------------------------------------
# Stories.
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recall:
    """A mention that can only be right by memory: ``text[start:end]`` repeats what the story said before.

    ``kind`` is "name", "object" or "detail" (a mark, spot, promise, message or gift). Offsets are characters.
    """

    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class Story:
    """One text, the pair it is filed under (its hero and the hero's object), and where it needs memory."""

    text: str
    plot: str
    hero: str
    noun: str
    recalls: tuple[Recall, ...]


_SLOT = re.compile(r"\{(!?)([A-Za-z0-9.]+)\}")
_PEOPLE = frozenset("ABCSHF")
_OBJECTS = frozenset("OPQW")


@cache
def _pieces(template: str) -> tuple[tuple[str, str, bool], ...]:
    """``template`` as (literal text, slot after it or "", is the slot a recall), parsed once."""
    pieces: list[tuple[str, str, bool]] = []
    end = 0
    for match in _SLOT.finditer(template):
        pieces.append((template[end:match.start()], match.group(2), bool(match.group(1))))
        end = match.end()
    pieces.append((template[end:], "", False))
    return tuple(pieces)


def _agreeing(literal: str, value: str) -> str:
    """``literal`` with its last word "a" made "an" where ``value`` asks for it."""
    if value and (literal == "a " or literal.endswith((" a ", " A "))) and _takes_an(value):
        return literal[:-1] + "n "
    return literal


def _recall_kind(slot: str) -> str:
    if slot in _PEOPLE:
        return "name"
    return "object" if slot[0] in _OBJECTS and slot[1:] in ("", ".noun") else "detail"


class _Writer:
    """Writes sentences into one buffer; ``bound`` is what the story has fixed, all else is drawn fresh."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.bound: dict[str, str] = {}
        self.parts: list[str] = []
        self.length = 0
        self.recalls: list[Recall] = []

    def expand(self, template: str) -> str:
        """``template`` with every slot filled, outside the buffer: for what is fixed before it is told."""
        filled: list[str] = []
        for literal, slot, _ in _pieces(template):
            value = self._value(slot) if slot else ""
            filled += (_agreeing(literal, value), value)
        return "".join(filled)

    def _value(self, slot: str) -> str:
        value = self.bound.get(slot)
        return self.expand(_pick(self.rng, POOLS[slot])) if value is None else value

    def sentence(self, template: str) -> None:
        """Append ``template`` to the story; a slot that opens a sentence or a quotation gets a capital."""
        said = ""  # what this template has written so far
        for literal, slot, is_recall in _pieces(template):
            value = self._value(slot) if slot else ""
            literal = _agreeing(literal, value)
            self._append(literal)
            said += literal
            if not slot:
                continue
            if _opens_sentence(said):
                value = value[0].upper() + value[1:]
            if is_recall:
                self.recalls.append(Recall(_recall_kind(slot), self.length, self.length + len(value)))
            self._append(value)
            said += value

    def _append(self, text: str) -> None:
        self.parts.append(text)
        self.length += len(text)

    def break_with(self, separator: str) -> None:
        """Append ``separator``, unless nothing has been written yet."""
        if self.length:
            self._append(separator)

    def bind_person(self, role: str, name: str) -> None:
        """Fix who plays ``role``: the name, its pronouns and the relatives and trade that go with it."""
        she = name in _GIRL_SET
        he, him, his = ("she", "her", "her") if she else ("he", "him", "his")
        self.bound.update({
            role: name, f"{role}.he": he, f"{role}.him": him, f"{role}.his": his,
            f"{role}.He": he.capitalize(), f"{role}.His": his.capitalize(),
            f"{role}.child": "girl" if she else "boy",
            f"{role}.kin": _pick(self.rng, _KIN), f"{role}.job": _pick(self.rng, POOLS["trade"]),
        })

    def bind_object(self, role: str, adjective: str, noun: str) -> None:
        """Fix what plays ``role``: its name, the mark that tells it apart, and what it is for."""
        name = f"{adjective} {noun}"
        kind = KIND_OF_NOUN[noun]
        self.bound.update({
            role: name, f"{role}.a": _with_article(name), f"{role}.noun": noun,
            f"{role}.mark": self.expand(_pick(self.rng, POOLS["mark"])),
            f"{role}.use": self.expand(_pick(self.rng, USES[kind])),
            f"{role}.flaw": self.expand(_pick(self.rng, FLAWS[kind])),
        })

    def bind_setting(self) -> None:
        """Fix the places, the animal, the days and the promise that a story may come back to."""
        rng, bound = self.rng, self.bound
        bound["place"], bound["place2"], bound["far"] = _pick_apart(rng, _PLACES, 3)
        bound["day1"], bound["day2"] = rng.sample(POOLS["weekday"], 2)
        bound["beast"] = beast = _pick(rng, _THIEVES)
        bound["beast.a"] = _with_article(f"{_pick(rng, _BEAST_ADJECTIVES)} {beast}")
        for slot, pool in _FIXED:  # in this order: a vow mentions the deadline and the treat
            bound[slot] = self.expand(_pick(rng, POOLS[pool]))


_GIRL_SET = frozenset(GIRLS)
_THIEVES = _words(
    "goat fox crow magpie otter badger dog raven pony jackdaw seagull puppy goose donkey cat squirrel"
)
_FIXED = (
    ("fair", "festival"), ("found", "spot"), ("m1", "material"), ("deadline", "deadline"), ("treat", "snack"),
    ("vow", "vow"), ("message", "message"),
)


def _opens_sentence(said: str) -> bool:
    """Whether what follows ``said`` starts a sentence or a quotation, and so takes a capital letter."""
    if not said:
        return True
    if said.endswith('"'):  # an opening quotation mark
        return len(said) == 1 or said[-2] == " "
    # After a closing mark only a full stop ends the sentence: '"Why?" she asked' goes on.
    return said.endswith((". ", "! ", "? ", '." '))


def _tell_plot(writer: _Writer, plot: Plot, people: Sequence[str], nouns: Sequence[str]) -> None:
    """Cast ``plot`` and write its beats, one of each, with a paragraph break here and there."""
    rng = writer.rng
    writer.bound = {}
    writer.bind_setting()  # before the objects, whose uses mention places
    for role, name in zip("ABC", people, strict=True):
        writer.bind_person(role, name)
    adjectives = _pick_apart(rng, ADJECTIVES, len(nouns))
    for role, adjective, noun in zip("OPQ", adjectives, nouns, strict=True):
        writer.bind_object(role, adjective, noun)
    for alias, role in plot.roles.items():
        aliased = {k.replace(role, alias, 1): v for k, v in writer.bound.items() if k.split(".")[0] == role}
        writer.bound.update(aliased)
    breaks = set(rng.sample(range(1, len(plot.beats)), rng.choice((0, 1, 2, 3))))
    brief = rng.random() < 0.3
    for number, beat in enumerate(plot.beats):
        template = "" if brief and "" in beat else _pick(rng, beat)
        if template:
            if number:
                writer.break_with("\n\n" if number in breaks else " ")
            writer.sentence(template)


def _cast(rng: random.Random, split: Split, parts: int) -> list[tuple[list[str], list[str]]]:
    """Three names and three nouns for each of ``parts`` plots; the first name, the hero, stays the same.

    In "train" no name of the whole text is held out with any noun of it; in "heldout" the hero is held out with the
    first noun of each plot.
    """
    while True:
        hero = _pick(rng, NAMES)
        wanted = [noun for noun in NOUNS if ((hero, noun) in HELD_OUT) == (split == "heldout")]
        casts = [
            (_pick_apart(rng, NAMES, 3, first=hero), _pick_apart(rng, NOUNS, 3, first=_pick(rng, wanted)))
            for _ in range(parts)
        ]
        pairs = {(name, noun) for names, _ in casts for name in names for _, nouns in casts for noun in nouns}
        if split == "heldout" or not pairs & HELD_OUT:
            return casts


def _curly(text: str) -> str:
    """``text`` with typographic quotation marks; one character for one, so that offsets stay right."""
    halves = text.replace("'", "’").split('"')
    return halves[0] + "".join(("“" if i % 2 == 0 else "”") + half for i, half in enumerate(halves[1:]))


def generate_story(seed: int, index: int, split: Split = "train") -> Story:
    """Story number ``index`` of the stream ``seed``: the same arguments give the same story on any machine.

    ``split`` says how name and object may pair: "train" never uses a held-out pair, "heldout" is about one.
    Raises ``ValueError`` for an unknown split.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    rng = random.Random(f"{seed}/{split}/{index}")
    writer = _Writer(rng)
    # Now and then the hero has two or three adventures, so that the model also sees long texts.
    parts = rng.choices((1, 2, 3), (95, 4, 1))[0] if split == "train" else 1
    casts = _cast(rng, split, parts)
    hero, noun = casts[0][0][0], casts[0][1][0]
    plots = rng.sample(PLOTS, parts)
    titled = rng.random() < 0.25
    for part, (plot, (names, nouns)) in enumerate(zip(plots, casts, strict=True)):
        if part:
            writer.break_with("\n\n* * *\n\n")
        elif titled:
            writer.sentence(f"The story of {hero} and the {noun}.\n\n")
        _tell_plot(writer, plot, names, nouns)
    text = "".join(writer.parts)
    if rng.random() < 0.2:
        text = _curly(text)
    return Story(text, "+".join(plot.name for plot in plots), hero, noun, tuple(writer.recalls))


def _texts(task: tuple[int, Split, int, int]) -> list[str]:
    seed, split, start, stop = task
    return [generate_story(seed, index, split).text for index in range(start, stop)]


def generate_texts(seed: int, count: int, split: Split = "train", workers: int = 1) -> Iterator[str]:
    """The texts of stories 0 .. count-1, in order; ``workers`` processes change only the speed."""
    tasks = [(seed, split, start, min(start + 1000, count)) for start in range(0, count, 1000)]
    if workers <= 1:
        for task in tasks:
            yield from _texts(task)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for texts in pool.imap(_texts, tasks):
            yield from texts


if __name__ == "__main__":
    import sys

    for story_index in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5):
        print(generate_story(0, story_index).text, end="\n\n<|endoftext|>\n\n")
