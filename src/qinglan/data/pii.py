"""Personal data in text, found by shape and, where the shape has one, by check sum.

InstructGPT (section 3.2, appendix A) filtered its training split for personally identifiable information without
saying how. Here: email addresses, phone numbers, card numbers (Luhn), bank accounts (IBAN, modulo 97), public IP
addresses and numbers shaped like a US social security number. Names and postal addresses are not found; a phone
number needs separators or a leading "+", since ten bare digits are as often a quantity.
"""

import ipaddress
import re
from typing import Literal, NamedTuple

Kind = Literal["email", "phone", "card", "iban", "ip", "ssn"]
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b")
PHONE = re.compile(
    r"(?<![\w+.\-/])(?:"
    r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?(?:\d{1,5}[ .-]?){2,5}\d"
    r"|(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}"
    r")(?![\w-])"
)
CARD = re.compile(r"(?<![\w.-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\w-])")
IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?!\w)")
IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]*\d)")
IPV6 = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
SSN = re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")
MIN_IBAN, MIN_PHONE_DIGITS, MAX_PHONE_DIGITS = 15, 8, 15


class Found(NamedTuple):
    """One piece of personal data: what kind, and where it stands in the text (characters, end excluded)."""

    kind: Kind
    start: int
    end: int


def find_pii(text: str) -> list[Found]:
    """Return the personal data in `text` in order; of two that overlap, the kind with the stricter test."""
    found: list[Found] = []
    for one in (*emails(text), *cards(text), *ibans(text), *social_security(text), *addresses(text), *phones(text)):
        if all(one.end <= other.start or other.end <= one.start for other in found):
            found.append(one)
    return sorted(found, key=lambda one: one.start)


def emails(text: str) -> list[Found]:
    """Return email addresses."""
    return [Found("email", match.start(), match.end()) for match in EMAIL.finditer(text)]


def cards(text: str) -> list[Found]:
    """Return numbers of 13 to 19 digits that begin as payment cards do and satisfy Luhn's check."""
    return [Found("card", match.start(), match.end()) for match in CARD.finditer(text) if luhn(digits_of(match[0]))]


def luhn(digits: str) -> bool:
    """Return whether 13 to 19 digits satisfy Luhn's check: their sum, every second one doubled, is 0 modulo 10."""
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def ibans(text: str) -> list[Found]:
    """Return bank accounts; words in capitals that follow the number are cut off until the check sum fits."""
    found = []
    for match in IBAN.finditer(text):
        shown = match[0]
        while len(shown.replace(" ", "")) >= MIN_IBAN and not iban_fits(shown.replace(" ", "")):
            shown = shown.rpartition(" ")[0]
        if len(shown.replace(" ", "")) >= MIN_IBAN:
            found.append(Found("iban", match.start(), match.start() + len(shown)))
    return found


def iban_fits(code: str) -> bool:
    """Return whether an IBAN's check fits: first four characters moved to the end, A = 10 and so on, is 1 modulo 97."""
    return len(code) <= 34 and int("".join(str(int(character, 36)) for character in code[4:] + code[:4])) % 97 == 1


def addresses(text: str) -> list[Found]:
    """Return public IP addresses; private, loopback and documentation ranges point at nobody."""
    matches = [*IPV4.finditer(text), *(match for match in IPV6.finditer(text) if not is_name(match[0]))]
    return [Found("ip", match.start(), match.end()) for match in matches if is_public(match[0])]


def is_name(code: str) -> bool:
    """Return whether something shaped like an IPv6 address is rather a name of a program ("a::b")."""
    return not digits_of(code) or sum(bool(part) for part in code.split(":")) < 3


def is_public(code: str) -> bool:
    """Return whether a text is a public IP address."""
    try:
        return ipaddress.ip_address(code).is_global
    except ValueError:
        return False


def social_security(text: str) -> list[Found]:
    """Return numbers shaped like a US social security number (areas never issued are left out)."""
    return [Found("ssn", match.start(), match.end()) for match in SSN.finditer(text)]


def phones(text: str) -> list[Found]:
    """Return phone numbers: "+" and a country code, or ten digits in groups 3-3-4."""
    return [
        Found("phone", match.start(), match.end())
        for match in PHONE.finditer(text)
        if MIN_PHONE_DIGITS <= len(digits_of(match[0])) <= MAX_PHONE_DIGITS
    ]


def digits_of(text: str) -> str:
    """Return the digits of a text."""
    return "".join(character for character in text if character in "0123456789")
