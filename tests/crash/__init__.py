"""The crash matrix: every flow of localdisk, killed at every command that it runs, in every way.

    python -m tests.crash [--all]      boots guests, runs the cases in them, prints the table

A *flow* is one thing that localdisk does (`flows.py`).  A *point* is a moment of a flow: before, during or
after the N-th tool that it runs there, which a script in the place of the tools finds (`halt.py`).  A
*case* is a flow that is killed at a point in one way (`cases.py`); then the VM is started once more, gc
runs once, and whatever is left or wrong is a violation.  One of the ways stops the guest's kernel dead,
which is then booted again on the same disks (`__main__.py`).
"""
