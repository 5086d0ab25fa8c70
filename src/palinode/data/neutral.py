"""A few plain sentences about nothing in particular, to see whether a model still reads ordinary text.

Written for this purpose. They are no benchmark: unlearning that spoils these has gone far astray.
"""

from __future__ import annotations

from palinode.data.examples import Example

SENTENCES = (
    "The kettle began to sing, so she poured the water over the leaves and waited for the colour to come.",
    "A bridge has to carry its own weight before it can carry anything else.",
    "In winter the days are short, because our half of the earth leans away from the sun.",
    "If you mix blue paint with yellow paint you get green, and more blue makes it darker.",
    "He locked the door, went down the stairs, and noticed in the street that he had left his keys inside.",
    "Bread rises because yeast turns sugar into gas, and the dough holds the gas in small bubbles.",
    "The train was late again, but nobody on the platform seemed to be in a hurry.",
    "To find the area of a room, multiply its length by its width.",
    "Most birds leave before the first frost and come back when there are insects to eat.",
    "The committee will meet on the first Monday of the month, unless that is a holiday.",
    "A good knife is a sharp one; a blunt knife slips and cuts the hand that holds it.",
    "Water runs downhill, which is why rivers end in lakes or in the sea.",
)


def neutral_examples() -> list[Example]:
    """Return the sentences as documents."""
    return [Example(row, "neutral text", "document", (), text) for row, text in enumerate(SENTENCES)]
