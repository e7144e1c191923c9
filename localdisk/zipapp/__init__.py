"""How the one file starts and is packed: standard library only, no disk, runs as whoever calls it."""
