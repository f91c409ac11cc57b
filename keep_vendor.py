"""Hold on to the packages that the vendor built for a Jetson's GPU; the package index has others under the same names.

python3 keep_vendor.py                 print name==version of each that is installed: constraints for pip
python3 keep_vendor.py --check FILE    fail with one line if one of those in FILE is no longer what it was
"""

import importlib.metadata
import re
import sys
from pathlib import Path

VENDOR = re.compile(
    r"(jax|torch|nvidia|triton|tensorrt|cuda)[a-z0-9]*([-_.].*)?|numpy|scipy|ml[-_.]dtypes", re.IGNORECASE
)

versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
pins = sorted(f"{name}=={version}" for name, version in versions.items() if VENDOR.fullmatch(name))
if sys.argv[1:2] == ["--check"]:
    if changed := sorted(set(Path(sys.argv[2]).read_text().split()) - set(pins)):
        sys.exit(f"keep_vendor.py: error: pip replaced the vendor's {', '.join(changed)}")
else:
    print("\n".join(pins))
