"""The model test: random walks over a host, and what must be there after every step.

    rules.py     a configuration
    state.py     all that is known: the rules, the VMs, their sources, the local disks
    predict.py   what a hook point or gc does in a state
    shelf.py     the part of that about template LVs
    seen.py      a logical volume as it is, compared with the local disk that it should be
    orders.py    the orders in which two calls at once may have happened
    world.py     what a host must offer to be walked on
    judge.py     compares a host with a state
    librarian.py the part of that about template LVs
    walk.py      the steps
    fake.py      a host in memory; tests/kernel/test_model.py has a real one

What a call should do is written down in `predict.py` from DESIGN.md and README.md.  Nothing of the product
is imported but by `fake.py`, so that model and product go wrong independently.
"""
