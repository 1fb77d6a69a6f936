"""What looks like a credential: kept out of everything that others can read.

Configs, MLflow's parameters, a job's entry point and its runtime environment are shown by
dashboards and written beside checkpoints. The credentials that a run needs reach it another way:
AWS's chain (profile, role, metadata service), MLflow's own variables, Kubernetes secrets.
"""

import re
from urllib.parse import urlsplit

# A word of the name of a variable or field whose value is nobody else's business.
_SECRET_WORDS = {
    *("SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "TOKEN", "CREDENTIAL", "CREDENTIALS"),
    *("APIKEY", "KEY"),
}
# Published prefixes and shapes: AWS, GitHub, Hugging Face, Slack, OpenAI and the like, Google, JSON
# Web Tokens, PEM.
_KEY_SHAPES = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bgh[pousr]_[0-9A-Za-z]{20,}"
    r"|\bgithub_pat_[0-9A-Za-z_]{20,}"
    r"|\bhf_[0-9A-Za-z]{20,}"
    r"|\bxox[abprs]-[0-9A-Za-z-]{10,}"
    r"|\bsk-[0-9A-Za-z_-]{20,}"
    r"|\bAIza[0-9A-Za-z_-]{30,}"
    r"|\beyJ[0-9A-Za-z_-]{8,}\.[0-9A-Za-z_-]{8,}\.[0-9A-Za-z_-]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    # Signed URLs of S3 and others carry their signature as a parameter.
    r"|[?&](?:X-Amz-Signature|Signature|sig|token)="
)
# An AWS secret access key, alone: 40 characters of base64 that are no digest in hexadecimal.
_SECRET_ACCESS_KEY = re.compile(r"(?![0-9a-f]{40}$)(?=.*[A-Z])(?=.*[a-z])[0-9A-Za-z/+]{40}")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+")


def credential_in(value: str) -> str | None:
    """Say what in a text looks like a credential, without repeating it; None where nothing does."""
    for url in _URL.findall(value):
        try:
            has_password = urlsplit(url).password is not None
        except ValueError:  # no URL after all
            continue
        if has_password:
            return "a URL with a password in it"
    if _KEY_SHAPES.search(value) or _SECRET_ACCESS_KEY.fullmatch(value.strip()):
        return "an access key or token"
    return None


def names_a_credential(name: str) -> bool:
    """Whether a variable of this name holds one, as AWS_SECRET_ACCESS_KEY does."""
    return not _SECRET_WORDS.isdisjoint(re.split(r"[^A-Z]+", name.upper()))


def masked(text: str) -> str:
    """Return a text, such as an error of a library, with the passwords of its URLs as `***`."""

    def mask(match: re.Match[str]) -> str:
        return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", match.group())

    return _URL.sub(mask, text)
