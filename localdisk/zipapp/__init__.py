"""How the one file starts and is packed: standard library only; runs as its caller, and touches no disk."""
