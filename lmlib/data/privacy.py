"""Masking of personal data: addresses, telephone numbers and numbers that stand for a person.

Each kind is a strict form, and where the number has a checksum the checksum must hold: Luhn for cards
(ISO/IEC 7812), ISO 7064 MOD 11-2 for Chinese resident identity numbers (GB 11643-1999) with their birth
date and province, MOD 97-10 for IBAN (ISO 13616). What is found becomes a placeholder such as <EMAIL>.
Names and postal addresses are not found: that takes a model.

Every pattern begins where nothing of its own kind stands before it and reads a bounded number of
characters, so the time is linear in the text, whatever the text.
"""
from collections import Counter
from collections.abc import Iterator
import dataclasses
import datetime
import functools
import ipaddress
import re
from typing import ClassVar

# A number stands free: no letter, digit, or sign that would make it part of a name, a decimal or a path.
FREE, END = r'(?<![A-Za-z0-9_.\-+/#$%&])', r'(?![A-Za-z0-9_+]|[.\-:/]\d)'
EMAIL = re.compile(r'(?<![A-Za-z0-9._%+\-])[A-Za-z0-9._%+\-]{1,64}@'
                   r'(?:[A-Za-z0-9][A-Za-z0-9\-]{0,62}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9\-_+%(\[]|\.[A-Za-z0-9])')
NUMBER = re.compile('|'.join([
    rf'{FREE}(?P<resident>\d{{17}}[0-9Xx]){END}',
    rf'{FREE}(?P<card>\d{{13,19}}|\d{{4}}(?P<s>[ \-])\d{{4}}(?P=s)\d{{4}}(?P=s)\d{{1,7}}|'
    rf'\d{{4}}(?P<t>[ \-])\d{{6}}(?P=t)\d{{5}}){END}',
    rf'{FREE}(?P<ssn>\d{{3}}-\d{{2}}-\d{{4}}){END}',
    r'(?<![A-Za-z0-9_.\-/])(?P<ipv4>(?:\d{1,3}\.){3}\d{1,3})(?![A-Za-z0-9_\-]|\.\d)',
    rf'{FREE}(?P<mobile>1[3-9]\d(?P<u>[ \-]?)\d{{4}}(?P=u)\d{{4}}){END}',
    rf'{FREE}(?P<international>(?:\+|00)[1-9](?:[ .\-()]{{0,2}}\d){{6,17}}){END}',
    rf'{FREE}(?P<landline>\(?0\d{{2,3}}\)?[ \-]\d{{7,8}}(?:-\d{{1,6}})?|'
    rf'[48]00-(?:\d{{3}}-\d{{4}}|\d{{4}}-\d{{3}})){END}',
    rf'{FREE}(?P<american>(?:1[ .\-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[.\-])[2-9]\d\d[.\-]\d{{4}}){END}']), re.ASCII)
# Where NUMBER can match: digits and what stands between them. Only there is it tried.
ZONE = re.compile(r'[+(\d][\d .\-()]{6,}', re.ASCII)
IPV6 = re.compile(r'(?<![A-Za-z0-9_.])(?<![0-9A-Fa-f:]:)'
                  r'[0-9A-Fa-f]{1,4}:[0-9A-Fa-f:]{1,34}[0-9A-Fa-f](?![A-Za-z0-9_])')
IBAN = re.compile(r'(?<![A-Za-z0-9_])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9_])')
DECIMAL = frozenset('0123456789')
LEAST_DIGITS = 7  # of an IPv4 address: under 2 in 100 have fewer, while section and version numbers do: 8.2.4.44
DIGITS = re.compile(r'\D', re.ASCII)
PLACEHOLDERS = {'email': '<EMAIL>', 'phone': '<PHONE>', 'card': '<CARD>', 'address': '<IP_ADDRESS>',
                'resident': '<ID_NUMBER>', 'ssn': '<SSN>', 'iban': '<IBAN>'}
KINDS = tuple(PLACEHOLDERS)
# What a match of each form may be, tried in order.
FORMS = {'resident': ('resident', 'card'), 'card': ('card', 'phone'), 'ssn': ('ssn',), 'ipv4': ('address',),
         'mobile': ('phone',), 'international': ('phone',), 'landline': ('phone',), 'american': ('phone',)}
# Lengths of IBANs by country, from the registry of ISO 13616.
IBAN_LENGTHS = {country: int(length) for length, countries in {
    15: 'NO', 16: 'BE', 18: 'DK FI FO GL NL', 19: 'MK SI', 20: 'AT BA EE KZ LT LU XK', 21: 'CH HR LI LV',
    22: 'BG BH CR DE GB GE IE ME RS VA', 23: 'AE GI IL IQ TL', 24: 'AD CZ ES MD PK RO SA SE SK TN VG', 25: 'LY PT ST',
    26: 'IS TR', 27: 'FR GR IT MC MR SM', 28: 'AL AZ BY CY DO GT HU LB PL SV', 29: 'BR EG PS QA UA', 30: 'JO KW MU',
    31: 'MT SC', 32: 'LC'}.items() for country in countries.split()}
# The first two digits of a Chinese resident identity number: provinces, by GB/T 2260.
PROVINCES = frozenset({11, 12, 13, 14, 15, 21, 22, 23, 31, 32, 33, 34, 35, 36, 37, 41, 42, 43, 44, 45, 46,
                       50, 51, 52, 53, 54, 61, 62, 63, 64, 65, 71, 81, 82, 83})
# First digits of cards and the lengths they come in: Visa, Mastercard (two), American Express, Discover (three),
# UnionPay, JCB, Diners Club.
CARDS = re.compile(r'4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|'
                   r'3[47]\d{13}|6011\d{12}|64[4-9]\d{13}|65\d{14}|62\d{14,17}|35(?:2[89]|[3-8]\d)\d{12}|'
                   r'3(?:0[0-5]|[689]\d)\d{11}')


@dataclasses.dataclass(frozen=True)
class Privacy:
  """Replaces personal data of some kinds by placeholders."""
  kinds: tuple[str, ...] = KINDS
  private: bool = False  # also addresses of private networks and of the machine itself, such as 127.0.0.1
  version: ClassVar = 1

  def __post_init__(self):
    if not self.kinds or not set(self.kinds) <= set(KINDS):
      raise ValueError(f'Privacy.kinds={self.kinds} must be some of {KINDS}')
    if self.private and 'address' not in self.kinds:
      raise ValueError(f"Privacy.private=True has no effect: 'address' is not in kinds={self.kinds}")

  @property
  def name(self) -> str:
    return 'privacy'

  def __call__(self, text: str) -> str:
    parts, at = [], 0
    for start, stop, kind in self.spans(text):
      parts += [text[at:start], PLACEHOLDERS[kind]]
      at = stop
    return ''.join([*parts, text[at:]]) if parts else text

  def found(self, text: str) -> list[tuple[str, str]]:
    """(kind, what) for each piece of personal data, in order: what would be masked."""
    return [(kind, text[start:stop]) for start, stop, kind in self.spans(text)]

  def changes(self, text: str) -> Counter:
    """How many pieces of each kind are masked."""
    return Counter(kind for _, _, kind in self.spans(text))

  def spans(self, text: str) -> list[tuple[int, int, str]]:
    """(start, stop, kind) of each, in order and apart; of two that overlap the one that begins first."""
    kept, end = [], 0
    for start, stop, kind in sorted(self._candidates(text), key=lambda span: (span[0], -span[1])):
      if start >= end:
        kept.append((start, stop, kind))
        end = stop
    return kept

  def _candidates(self, text) -> Iterator[tuple[int, int, str]]:
    if 'email' in self.kinds and '@' in text:
      yield from ((*match.span(), 'email') for match in EMAIL.finditer(text))
    if 'iban' in self.kinds:
      at = 0
      while match := IBAN.search(text, at):
        length = iban(match.group())
        if length:
          yield match.start(), match.start() + length, 'iban'
        at = match.start() + (length or 4)
    if 'address' in self.kinds and ':' in text:
      yield from ((*match.span(), 'address') for match in IPV6.finditer(text) if self._is_address(match.group()))
    if {'phone', 'card', 'address', 'resident', 'ssn'} & {*self.kinds}:
      for zone in ZONE.finditer(text):
        # Three more: the X of an identity number, and what must not follow.
        at, stop = zone.start(), zone.end() + 3
        while match := NUMBER.search(text, at, stop):
          kind, length = self._number(match)
          if kind:
            yield match.start(), match.start() + length, kind
          at = match.start() + length

  def _number(self, match) -> tuple[str | None, int]:
    """What a match is, and how many characters of it; None and all of them if it is nothing."""
    number = match.group()
    for kind in FORMS[match.lastgroup]:
      if kind in self.kinds and (length := self._length(kind, match.lastgroup, number)):
        return kind, length
    return None, len(number)

  def _length(self, kind, form, number) -> int:
    """How many characters of a match are of this kind: none if a check fails."""
    if kind == 'phone' and form in ('international', 'card'):
      return international(number)
    check = {'resident': is_resident, 'card': is_card, 'ssn': is_ssn, 'address': self._is_address}.get(kind)
    return len(number) if check is None or check(number) else 0

  def _is_address(self, text) -> bool:
    try:
      address = ipaddress.ip_address(text)
    except ValueError:
      return False
    if address.version == 4 and address.is_global and len(text) - 3 < LEAST_DIGITS:
      return False
    if address.version == 6 and not (address in _unicast() or self.private):
      return False  # what is not 2000::/3 is on no network that many can reach
    return address.is_global or (self.private and not address.is_unspecified)


def is_card(number: str) -> bool:
  """Whether a number has a card's first digits and length, and its last digit is right (Luhn, ISO/IEC 7812)."""
  digits = DIGITS.sub('', number)
  return CARDS.fullmatch(digits) is not None and luhn(digits)


def luhn(digits: str) -> bool:
  doubled = [int(d) * (1 + i % 2) for i, d in enumerate(reversed(digits))]
  return sum(d - 9 * (d > 9) for d in doubled) % 10 == 0


def is_resident(number: str) -> bool:
  """Whether a Chinese resident identity number has a province, a date of birth and its check character.

  GB 11643-1999: the sum of the digits times 2^(17-i) modulo 11, by ISO 7064 MOD 11-2, where X is ten.
  """
  if int(number[:2]) not in PROVINCES or not 1800 <= int(number[6:10]) <= 2099:
    return False
  try:
    datetime.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
  except ValueError:
    return False
  digits = [10 if character in 'Xx' else int(character) for character in number]
  return sum(digit * pow(2, 17 - i, 11) for i, digit in enumerate(digits)) % 11 == 1


def is_ssn(number: str) -> bool:
  """Whether a US social security number can have been given: no area 000, 666 or 9xx, no group 00, no serial 0000."""
  area, group, serial = number.split('-')
  return area not in ('000', '666') and area[0] != '9' and group != '00' and serial != '0000'


def international(number: str) -> int:
  """How many characters of a number in international form are one telephone number, and 0 if none.

  It begins with + or 00 and has 8 to 15 digits, the country's included (E.164); in North America it has 11,
  and a Chinese mobile number 13. Digits further on are another number, where a space parts them; a single
  digit at the end is a decimal.
  """
  if not number.startswith(('+', '00')):
    return 0
  ends = [i + 1 for i in range(2 if number[0] == '0' else 1, len(number)) if number[i].isdigit()]
  digits = ''.join(number[end - 1] for end in ends)
  if not digits or digits[0] == '0':
    return 0
  exact = 11 if digits[0] == '1' else 13 if re.match('861[3-9]', digits) else None
  for count in range(min(exact or 15, len(ends)), (exact or 8) - 1, -1):
    end = ends[count - 1]
    if number[end:end + 1] in ('', ' ') and number[end - 2] in DECIMAL:
      return end
  return 0


def iban(number: str) -> int:
  """How many characters are an IBAN: its country's length, right check digits (ISO 13616, MOD 97-10); 0 if none."""
  places = [i for i, character in enumerate(number) if character != ' '][:IBAN_LENGTHS.get(number[:2], 0)]
  stop = places[-1] + 1 if places else 0
  compact = number[:stop].replace(' ', '')
  if len(compact) != IBAN_LENGTHS.get(number[:2]) or number[stop:stop + 1] not in ('', ' '):
    return 0
  return stop * (int(''.join(str(int(character, 36)) for character in compact[4:] + compact[:4])) % 97 == 1)


@functools.cache
def _unicast():
  return ipaddress.ip_network('2000::/3')
