"""Prompts of many kinds and lengths, for comparing what a real model says."""

from __future__ import annotations

from hotgraph_server.text import Tokenizer

TEXTS = (
    "The lighthouse keeper counted the ships each evening and wrote their names into a ledger bound in green cloth. In the "
    "winter of the long frost he counted none for forty days, and on the forty-first he wrote down the name of a ship that "
    "had sunk before he was born. ",
    "def merge(left: list[int], right: list[int]) -> list[int]:\n    result = []\n    while left and right:\n        source = "
    "left if left[0] <= right[0] else right\n        result.append(source.pop(0))\n    return result + left + right\n\n",
    "Les trains de nuit traversent la plaine sans s'arrêter; à l'aube, les voyageurs découvrent la mer, grise et calme, "
    "et cherchent dans leurs sacs un morceau de pain. Où vont-ils ? Personne ne le sait. ",
    "Q: A baker sells 12 loaves at 3.50 each and 7 cakes at 21.25 each. How much does she earn in total?\nA: Let us compute "
    "step by step. 12 x 3.50 = 42.00 and 7 x 21.25 = 148.75, so the total is 190.75.\nQ: And if every price rises by 4 %?\n",
    '{"id": 4711, "tags": ["north", "süd", "東"], "nested": {"empty": null, "ratio": -0.125e3}, "note": "tab\\tnew\\nline"}\n',
    "1. Wash the rice until the water runs clear.\n2. Soak it for 20 minutes.\n3. Bring 1 1/2 cups of water to the boil.\n"
    "4. Stir once, cover, and keep the heat low for 12 minutes — do not lift the lid! 🍚\n",
)

LENGTHS = (1, 2, 3, 5, 8, 13, 15, 16, 17, 24, 31, 32, 33, 47, 48, 63, 64, 65, 90, 100, 127, 128, 129, 160, 200, 255)
LONG_LENGTHS = (300, 400, 511, 513, 600, 700)
CHATS = ("What is the capital of France?", "Write one sentence about the sea.", "List three prime numbers.")


def prompts(tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """36 prompts of 1 to 700 tokens: prose, code, French, arithmetic, JSON, a recipe, and chats in the model's template."""
    found = []
    for index, length in enumerate((*LENGTHS, *LONG_LENGTHS)):
        # Every length starts elsewhere in the texts, so that no prompt is the beginning of another.
        order = [TEXTS[(index + step) % len(TEXTS)] for step in range(len(TEXTS))]
        ids = tokenizer.encode("".join(order) * 3)
        start = 7 * (index // len(TEXTS))
        found.append(tuple(ids[start : start + length]))
    found += [tuple(tokenizer.encode_chat([("user", text)])) for text in CHATS]
    return found
