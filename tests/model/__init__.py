"""The model test: random walks over a host; after every step, the host must be as the model predicts.

    rules.py     a configuration
    state.py     the whole state: rules, VMs, their sources, local disks
    predict.py   what a hook point or gc does in a state
    shelf.py     the same for template LVs
    seen.py      a logical volume as it is, compared with the local disk that it should be
    orders.py    the orders in which two calls at once may have happened
    world.py     what a host must offer to the walk
    judge.py     compares a host with a state
    librarian.py the same for template LVs
    walk.py      the steps
    fake.py      a host in memory; tests/kernel/test_model.py has a real one

`predict.py` describes what a call should do, written from the documents.  Only `fake.py` imports the product,
so that an error of the product is not repeated in the model.
"""
