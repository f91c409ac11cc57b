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

versions = {package.metadata["Name"]: package.version for package in importlib.metadata.distributions()}
pins = sorted(f"{name}=={version}" for name, version in versions.items() if VENDOR_PACKAGES.fullmatch(name))
if sys.argv[1:2] == ["--check"]:
    if changed := sorted(set(Path(sys.argv[2]).read_text().split()) - set(pins)):
        sys.exit(f"keep_vendor.py: error: pip replaced the vendor's {', '.join(changed)}")
else:
    print("\n".join(pins))
