"""The benchmark: ratios to plain tools, each measured side by side in one run (`./build.sh bench`).

    python -m tests.bench here            what needs no kernel of our own: starts of the program
    python -m tests.bench bed [ROW…]      what needs LVM; runs as root in the test bed; all rows, or these
    python -m tests.bench cache [SIZE…]   the template cache; there, too.  A SIZE is GIB or GIB/N: a template
                                          of this size, of which 1/N (without: a quarter) is data
    python -m tests.bench storm [--full] [VMS]    a hundred VMs of one template, four at a time; there, too.
                                          The template has 64 MiB, 16 of it data, which takes some minutes on
                                          User Mode Linux; with --full 4 GiB, 1 of it data (DISK_SIZE=262144)

Machines differ and are noisy: read the ratios, not the seconds.  In a throw-away kernel without KVM every
instruction of ours is emulated while the disks are not, so that what we add looks larger there, and there is
one processor: nothing that runs at once takes less time.
"""
