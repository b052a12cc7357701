"""Stands where Horovod would be: this folder comes after site-packages on the path.

So an installed Horovod is found first, and this only without one.
"""

import sys

import dtkit.horovod
from dtkit.horovod import alias

if not alias.is_installed():
    alias.install()
sys.modules["horovod"] = dtkit.horovod
