"""The pictures of README.md and docs/, drawn from a real run: `./build.sh pictures`.

record.py     plays the scenes in the test bed and prints what it saw, one line of JSON a scene
trace.py      which processes ran, as whom, from when to when, and what they copied
draw.py       reads that on standard input and writes docs/*.svg
terminal.py   the text of a terminal, with its colours, as SVG; several frames move
way.py        the trace of a start and a stop as swimlanes
svg.py        what both say in SVG
"""
