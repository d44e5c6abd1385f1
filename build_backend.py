"""setuptools' PEP 517 backend, with torch as a build requirement only where none is installed.

pip builds in an empty environment.  The library uses torch's stable ABI, so the torch it is built with need not be the
torch it runs with, and any torch >= 2.10 of the environment that is being installed into will do: its headers are used
(setup.py, `torch_cpp_extension`) and nothing is downloaded.
"""

import importlib.metadata
import importlib.util
import sys
import sysconfig

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

if not any(map(importlib.util.find_spec, ("wheel", "setuptools.command.bdist_wheel"))):
    sys.exit("consistency_ops: building needs wheel: run `pip install setuptools wheel ninja`, then install again.")


def get_requires_for_build_wheel(config_settings=None):
    # The paths of the interpreter that pip runs with, which its build environment takes off sys.path.
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    found = importlib.metadata.distributions(name="torch", path=paths)
    versions = [tuple(map(int, d.version.split(".")[:2])) for d in found]
    requires = build_meta.get_requires_for_build_wheel(config_settings)
    return requires if versions and versions[0] >= (2, 10) else [*requires, "torch>=2.10"]


get_requires_for_build_editable = get_requires_for_build_wheel
