"""Attempts to get more from root's half than its verbs, on a real kernel, as user vdsm and as others.

    attempts.py        who tries, the bait, and what must not have changed
    test_requests.py   what can be said to the helper, in what order, by how many
    test_host.py       command lines, environments, what a process inherits
    test_files.py      files, links and locks

No attempt may succeed or change anything.  Each fails where the defence that it is about is removed.
"""
