"""Prompts that layers are scored with if no file is given."""

from __future__ import annotations

# Fifty short captions: things that `emoji` was trained on and that every text-to-image model knows.
CAPTIONS = (
    *("red apple", "green apple", "banana", "strawberry", "pineapple", "watermelon", "cherries", "avocado", "carrot"),
    *("mushroom", "broccoli", "pizza", "hamburger", "french fries", "birthday cake", "doughnut", "ice cream"),
    *("popcorn", "croissant", "pancakes", "tulip", "sunflower", "rose", "cactus", "palm tree", "evergreen tree"),
    *("maple leaf", "black cat", "dog face", "frog", "octopus", "penguin", "elephant", "giraffe", "lion", "zebra"),
    *("butterfly", "lady beetle", "shark", "parrot", "owl", "snail", "red heart", "blue heart", "grinning face"),
    *("crying face", "robot", "ghost", "man astronaut", "woman farmer"),
)
