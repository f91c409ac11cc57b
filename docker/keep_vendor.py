"""Check that pip keeps the packages that the vendor built for a Jetson's GPU. The package index has other builds of them.

python3 keep_vendor.py                 print name==version of each one installed, as constraints for pip
python3 keep_vendor.py --check FILE    fail with one line if an installed version differs from FILE
"""

import importlib.metadata
import re
import sys
from pathlib import Path

VENDOR_PACKAGES = re.compile(
    r"(jax|torch|nvidia|triton|tensorrt|cuda)[a-z0-9]*([-_.].*)?|numpy|scipy|ml[-_.]dtypes", re.IGNORECASE
)

versions: dict[str, str] = {}
for package in importlib.metadata.distributions():  # in the order of sys.path
    # A folder that an interrupted pip has left behind has no metadata: None, or nothing in it.
    metadata = package.metadata or {}
    name, version = metadata.get("Name"), metadata.get("Version")
    if name and version and VENDOR_PACKAGES.fullmatch(name):
        # The first one is imported. It hides later ones, also where their names are spelled in another way.
        versions.setdefault(re.sub("[-_.]+", "-", name).lower(), f"{name}=={version}")
pins = sorted(versions.values())
if sys.argv[1:2] == ["--check"]:
    if changed := sorted(set(Path(sys.argv[2]).read_text().split()) - set(pins)):
        sys.exit(f"keep_vendor.py: error: pip replaced the vendor's {', '.join(changed)}")
else:
    print("\n".join(pins))
