"""The two prompt sets of scripts.bench.peers: everyday questions, and tasks whose answers repeat the prompt."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

from tide_jax.texts import load_texts
from tide_jax.tokenizer.chat import prompt_ids

OPEN = (
    "Why do leaves change their colour in autumn?",
    "Tell a story about a lighthouse keeper and a lost whale.",
    "How can I learn to cook if I have very little time?",
    "Explain what a bridge engineer does on a normal day.",
    "Write a letter to a friend who is moving to another town.",
    "What makes some materials conduct electricity better than others?",
    "Give me a plan for a rainy weekend with two small children.",
    "Describe a market on a winter morning in four sentences.",
)

COPY = (
    # quote
    "Repeat the following paragraph word for word.\n\n"
    "The old ferry left the harbour at half past six, as it had done every morning for thirty years. Nobody on the "
    "quay looked up when its horn sounded twice, for the whole village knew the sound. Only the harbour master wrote "
    "the time into his blue notebook, drew a line under it, and went back to the small stove in his office, where the "
    "kettle had begun to sing and a grey cat lay asleep on the chair beside it.",
    # edit a word
    "Give this text back unchanged, but write Oslo in place of Madrid.\n\n"
    "Our next meeting will take place in Madrid on the second Tuesday of March. Please send the title of your talk to "
    "the office before the end of January, together with a short summary and a picture of yourself. Rooms have been "
    "reserved in two hotels near the station. Those who arrive by car should tell us the number of their plates, "
    "because parking near the hall is limited. Lunch, coffee and tea are included.",
    # extract a list
    "Write down everything that this note says is in the boxes, one thing a line.\n\n"
    "I have packed the cellar today. In the boxes there are three copper pots, a wooden chess board, two pairs of "
    "hiking boots, the red fishing rod, a box of birthday candles, grandmother's sewing machine, four glass bottles, "
    "the yellow garden hose, a broken accordion, seven picture frames, the green camping tent, a bag of clothes pegs, "
    "an iron key, and the old radio.",
    # complete code that repeats a pattern
    "Complete this Python code for all seven days of the week.\n\n"
    "def open_on_monday(shop):\n    return shop.hours['monday'].opens is not None\n\n"
    "def open_on_tuesday(shop):\n    return shop.hours['tuesday'].opens is not None\n\n"
    "def open_on_wednesday(shop):\n    return shop.hours['wednesday'].opens is not None\n\n"
    "def open_on_thursday(shop):\n    return shop.hours['thursday'].opens is not None\n",
    # correct a mistake
    "Correct the one spelling mistake in this paragraph and write out the whole paragraph.\n\n"
    "Bees find their way home by the position of the sun. When clouds cover the sky they can still see in which "
    "direction its light is polarised, and they remember large objects such as trees, ponds and hedges. A bee that has "
    "found a field of flowers tells the others in a danse on the comb: its angle shows the direction, and its length "
    "shows how far the flight will be.",
    # edit a table
    "Print this table again with the price of the lamp set to 45.\n\n"
    "name,colour,price,stock\nchair,brown,80,12\ntable,white,240,3\nlamp,black,35,20\nshelf,white,110,7\n"
    "carpet,grey,95,5\nmirror,silver,60,9\nsofa,green,620,2\ndesk,brown,310,4\nstool,red,25,30\n",
    # replace in a recipe
    "Write this recipe again with olive oil instead of butter.\n\n"
    "1. Heat the oven to 200 degrees.\n2. Cut the potatoes into thin slices and put them into cold water.\n"
    "3. Melt the butter in a large pan over a low flame.\n4. Dry the slices and turn them in it until they shine.\n"
    "5. Lay them into a flat dish and add salt, pepper and thyme.\n6. Bake them for forty minutes.\n"
    "7. Turn the oven off and let the dish rest for five minutes before you serve it.",
    # fill in settings
    "Return this configuration file with the port changed to 9090, and nothing else changed.\n\n"
    '{\n  "name": "weather-station",\n  "host": "station.example.org",\n  "port": 8080,\n  "sensors": [\n'
    '    {"kind": "temperature", "unit": "celsius", "every": 60},\n'
    '    {"kind": "humidity", "unit": "percent", "every": 60},\n'
    '    {"kind": "wind", "unit": "metres per second", "every": 10}\n  ],\n  "log": "station.log"\n}',
)


class PromptSet(NamedTuple):
    """Prompts that are reported together, as token ids."""

    name: str
    prompts: list[list[int]]


def prompt_sets(tokenizer: Any, files: list[Path], most: int) -> list[PromptSet]:
    """Returns the two sets, or one for each file that the user gives.

    Each has at most `most` prompts, in the model's chat template if there is one.
    """
    texts = {"open": OPEN, "copy": COPY} if not files else {p.stem: load_texts(str(p)) for p in files}
    return [PromptSet(n, prompt_ids(tokenizer, itertools.islice(found, most))) for n, found in texts.items()]
