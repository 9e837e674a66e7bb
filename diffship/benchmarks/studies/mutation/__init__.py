"""How many faults the proof catches: parts are spoilt on purpose, by module and by graph node, and sent through it."""
