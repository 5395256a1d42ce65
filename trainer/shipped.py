"""The base policies that come with the package, by the name that `policy.base` gives them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_FOLDER = Path(__file__).parent / "policies"

SHIPPED: Mapping[str, tuple[Path, str]] = {
    "tiny": (_FOLDER / "tiny", "spreadsheet"),
    "tiny-code": (_FOLDER / "tiny-code", "code"),
}
"""Name -> its folder and its subject (what `espalier make-policy` makes it of)."""

POLICY_OF: Mapping[str, str] = {subject: name for name, (_, subject) in SHIPPED.items()}
"""Subject -> the name of its shipped policy."""
