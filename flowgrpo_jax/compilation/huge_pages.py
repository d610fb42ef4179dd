"""Huge pages for XLA on the CPU. Imports nothing large: commands restart before they load JAX."""

import os
import sys


def restart() -> None:
    """On Linux, run this command again in place with malloc asking for huge pages.

    XLA on the CPU allocates its large temporaries anew at every call; with 4 kB pages the page
    faults take a third of the time (docs/performance.md). glibc reads the setting only at start.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
