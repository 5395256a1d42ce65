"""Whose keys and values these are: the name under which a prefix cache may reuse them.

Always true: two requests get the same salt when trust domain, base and adapter are the same, and only then (up to a
collision of SHA-256); without the secret nobody can make one.
"""

from __future__ import annotations

import hashlib
import hmac
import json


def cache_salt(secret: bytes, trust_domain: str, base: str, adapter: str) -> str:
    """The cache salt of a request, 64 hexadecimal digits: HMAC-SHA-256 of its trust domain and of the digests of base
    and adapter (the base's own digest where there is no adapter).
    """
    text = json.dumps([trust_domain, base, adapter]).encode()
    return hmac.new(secret, text, hashlib.sha256).hexdigest()
