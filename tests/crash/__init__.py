"""The crash matrix: kills every flow of localdisk at every command that it runs, in every way.

    python -m tests.crash [--all]      boots guests, runs the cases in them, prints the table

A *flow* is one thing that localdisk does, such as a start (`flows.py`).  A *point* is a moment of a flow:
before, during or after its N-th call of a tool; a script in the place of the tools counts the calls
(`halt.py`).  A *case* is a flow that is killed at a point in one way (`cases.py`).  Then the VM is started
once more, gc runs once, and anything that is left or wrong is a violation.  One of the ways switches the
guest's kernel off and boots it again on the same disks (`__main__.py`).
"""
