"""A small world of people, places and things, told among filler, after the tasks qa1 to qa5 of bAbI."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from fam_jax.data.synthetic.sample import Make, Placed, Sample, choose, passkey_filler

PEOPLE = ("Mary", "John", "Sandra", "Daniel")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
_GO = ("went to", "journeyed to", "travelled to", "moved to", "went back to")
_TAKE = ("grabbed", "took", "got", "picked up")
_DROP = ("dropped", "put down", "left", "discarded")
_GIVE = ("gave", "handed", "passed")
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
HEAD = "Facts about people and things are hidden within the following text. Memorize them."


@dataclasses.dataclass
class _World:
    """Who is where, who has what, and where things have been."""

    random: np.random.Generator
    told: list[str] = dataclasses.field(default_factory=list)
    # The fact of each person's latest move, and of each thing's latest change of place or owner.
    places: dict[str, str] = dataclasses.field(default_factory=dict)
    moves: dict[str, int] = dataclasses.field(default_factory=dict)
    holders: dict[str, str] = dataclasses.field(default_factory=dict)
    # Of each thing: the places it was in, with the facts that say so.
    ways: dict[str, list[tuple[str, tuple[int, ...]]]] = dataclasses.field(default_factory=dict)
    taken: dict[str, int] = dataclasses.field(default_factory=dict)

    def pick(self, *among: str) -> str:
        return among[int(self.random.integers(len(among)))]

    def go(self, person: str) -> None:
        place = self.pick(*[place for place in PLACES if place != self.places.get(person)])
        self.places[person], self.moves[person] = place, len(self.told)
        self.told.append(f"{person} {self.pick(*_GO)} the {place}.")
        for thing, holder in self.holders.items():
            if holder == person:
                self.ways[thing].append((place, (self.taken[thing], self.moves[person])))

    def take(self, person: str, thing: str) -> None:
        self.holders[thing], self.taken[thing] = person, len(self.told)
        self.told.append(f"{person} {self.pick(*_TAKE)} the {thing}{self.pick(' there', '')}.")
        self.ways.setdefault(thing, []).append((self.places[person], (self.taken[thing], self.moves[person])))

    def drop(self, thing: str) -> None:
        person = self.holders.pop(thing)
        self.told.append(f"{person} {self.pick(*_DROP)} the {thing}{self.pick(' there', '')}.")

    def live(self, events: int) -> None:
        """Let things happen."""
        for person in PEOPLE:
            self.go(person)
        for _ in range(events):
            person = self.pick(*PEOPLE)
            held = [thing for thing, holder in self.holders.items() if holder == person]
            # A thing lies where it was left, and only who is there can take it.
            free = [
                thing
                for thing in THINGS
                if thing not in self.holders
                and (thing not in self.ways or self.ways[thing][-1][0] == self.places[person])
            ]
            kind = self.random.random()
            if kind < 0.3 and free:
                self.take(person, self.pick(*free))
            elif kind < 0.45 and held:
                self.drop(self.pick(*held))
            else:
                self.go(person)


Story = tuple[list[str], tuple[int, ...], str, str, tuple[str, ...]]


def _where_is_a_person(random: np.random.Generator) -> Story:
    world = _World(random)
    world.live(8)
    person = world.pick(*PEOPLE)
    return world.told, (world.moves[person],), f"Where is {person}?", world.places[person], PLACES


def _where_is_a_thing(random: np.random.Generator) -> Story:
    world = _World(random)
    while not world.ways:
        world = _World(random)
        world.live(14)
    thing = world.pick(*world.ways)
    place, needed = world.ways[thing][-1]
    return world.told, needed, f"Where is the {thing}?", place, PLACES


def _where_was_a_thing(random: np.random.Generator) -> Story:
    while True:
        world = _World(random)
        world.live(24)
        for thing, way in world.ways.items():
            # The last place of a name must have one place before it, and come once.
            seen = [each for n, each in enumerate(way) if n == 0 or each[0] != way[n - 1][0]]
            if len(seen) > 1 and sum(place == seen[-1][0] for place, _ in seen) == 1:
                (before, first), (place, last) = seen[-2:]
                needed = tuple(sorted({*first, *last}))
                return world.told, needed, f"Where was the {thing} before the {place}?", before, PLACES


def _what_is_beside(random: np.random.Generator) -> Story:
    first, middle, last = choose(random, PLACES, 3)
    ways = choose(random, [*_OPPOSITE], 2)
    told = [f"The {first} is {ways[0]} of the {middle}.", f"The {last} is {ways[1]} of the {middle}."]
    if random.random() < 0.5:
        question, answer = f"What is {ways[0]} of the {middle}?", first
    else:
        question, answer = f"What is the {middle} {_OPPOSITE[ways[0]]} of?", first
    order = [0, 1] if random.random() < 0.5 else [1, 0]
    return [told[n] for n in order], (order.index(0),), question, answer, PLACES


def _who_gave_what(random: np.random.Generator) -> Story:
    holder = dict.fromkeys(THINGS, "")
    told, gifts = [], []
    for thing in THINGS:
        holder[thing] = choose(random, GIVERS)[0]
        told.append(f"{holder[thing]} {choose(random, _TAKE)[0]} the {thing} there.")
    for _ in range(6):
        thing = choose(random, THINGS)[0]
        giver = holder[thing]
        taker = choose(random, [name for name in GIVERS if name != giver])[0]
        gifts.append((len(told), giver, thing, taker))
        told.append(f"{giver} {choose(random, _GIVE)[0]} the {thing} to {taker}.")
        holder[thing] = taker
    # The last gift of a kind, if the question has one answer.
    for place, giver, thing, taker in reversed(gifts):
        questions = [
            (
                f"What did {giver} give to {taker}?",
                thing,
                {g[2] for g in gifts if g[1::2] == (giver, taker)},
                THINGS,
            ),
            (
                f"Who gave the {thing} to {taker}?",
                giver,
                {g[1] for g in gifts if g[2:] == (thing, taker)},
                GIVERS,
            ),
            (
                f"Who did {giver} give the {thing} to?",
                taker,
                {g[3] for g in gifts if g[1:3] == (giver, thing)},
                GIVERS,
            ),
        ]
        clear = [each for each in questions if len(each[2]) == 1]
        if clear:
            question, answer, _, labels = clear[int(random.integers(len(clear)))]
            return told, (place,), question, answer, labels
    return _who_gave_what(random)


def story(
    random: np.random.Generator, depth: float, *, tell: Callable[[np.random.Generator], Story]
) -> Sample:
    """Return a sample that tells a story, with the first fact that its answer depends on at a depth."""
    told, needed, question, answer, labels = tell(random)
    first = min(needed)
    before = sorted(depth * float(x) for x in random.random(first))
    behind = sorted(depth + (1 - depth) * float(x) for x in random.random(len(told) - first - 1))
    placed = tuple(
        Placed(at, text, number in needed)
        for number, (at, text) in enumerate(zip([*before, depth, *behind], told, strict=True))
    )
    named = rf"\b(?:{'|'.join(labels)})\b"
    return Sample(placed, HEAD, f"\n\nQuestion: {question}\nAnswer:", (answer,), named, passkey_filler)


TASKS: dict[str, Make] = {
    f"facts:qa{number}": functools.partial(story, tell=tell)
    for number, tell in enumerate(
        (_where_is_a_person, _where_is_a_thing, _where_was_a_thing, _what_is_beside, _who_gave_what), 1
    )
}
