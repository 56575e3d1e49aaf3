"""Unicode normalisation, and repair of text that was decoded with the wrong encoding.

Differs from unicodedata.normalize in what it leaves and what it takes: NFC by default, since NFKC rewrites
Chinese punctuation, superscripts and fractions; control characters, byte-order marks and invisible
characters go; line ends become '\\n'. Mojibake of Western encodings is mended by ftfy (Speer 2019); UTF-8
that was read as GBK, the commonest mojibake of Chinese, here, line by line and only where the bytes prove it.
"""
import dataclasses
import re
from typing import ClassVar
import unicodedata

from lmlib.data.cleaning import Rejected

# C0 and C1 controls but tab and newline; soft hyphen; zero-width space, word joiner and what is invisible
# beside them; marks that turn the direction of text; byte-order mark; annotation anchors; characters that
# are none. The zero-width joiner and non-joiner stay: emoji, Persian and Indian scripts need them.
INVISIBLE = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f'
                       '\ufeff\ufff9-\ufffb\ufdd0-\ufdef\ufffe\uffff\U000e0001]')
LINE_ENDS = re.compile('\r\n?|[\u0085\u2028\u2029]')
LETTERS = {code: code - 0xfee0 for first, last in ((0xff10, 0xff19), (0xff21, 0xff3a), (0xff41, 0xff5a))
           for code in range(first, last + 1)}
# What common characters of UTF-8 text become in GBK: the first bytes of 的 ， 。 中 一 是.
READ_AS_GBK = re.compile('[鐨锛銆涓鏄]')
PROOF = 6  # characters of a line: by chance fewer can be both GBK and UTF-8, as 联通 is
CHINESE = re.compile('[\u2010-\u203b\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff\uff00-\uffef]')
LOST = re.compile('\ufffd|锟斤拷')  # the mark of a lost character, and three of them read as GBK


@dataclasses.dataclass(frozen=True)
class Normalization:
  """Text in one Unicode form, without invisible characters."""
  form: str = 'NFC'  # or 'NFKC', which also folds compatibility characters: ２ ² ② ﬁ ，
  letters: bool = True  # full-width letters and digits to ASCII: Ａ１ to A1; Chinese punctuation stays
  invisible: bool = True  # control and invisible characters go, line ends become '\n'
  mojibake: bool = True  # text decoded with the wrong encoding is mended where that is certain
  lost: float | None = 0.001  # most U+FFFD or 锟斤拷 a character; a text with more is dropped
  version: ClassVar = 1

  @property
  def settings(self):
    return dataclasses.asdict(self) | {'unicode': unicodedata.unidata_version}

  @property
  def libraries(self):
    return ('ftfy',) if self.mojibake else ()

  def __post_init__(self):
    if self.form not in ('NFC', 'NFKC'):
      raise ValueError(f"Normalization.form={self.form!r} must be 'NFC' or 'NFKC'")
    if self.form == 'NFKC' and self.letters:
      raise ValueError("Normalization.letters=True has no effect with form='NFKC', which folds all full-width "
                       'characters: set letters=False')
    if self.lost is not None and not 0 <= self.lost <= 1:
      raise ValueError(f'Normalization.lost={self.lost} must be a share between 0 and 1; None turns it off')

  @property
  def name(self) -> str:
    return 'normalization'

  def __call__(self, text: str) -> str | Rejected:
    if self.mojibake and not text.isascii():
      text = mended(text)
    if self.invisible:
      text = INVISIBLE.sub('', LINE_ENDS.sub('\n', text))
    if text.isascii():
      return text
    if self.lost is not None and len(LOST.findall(text)) > self.lost * len(text):
      return Rejected('lost characters')
    if self.letters:
      text = text.translate(LETTERS)
    return text if unicodedata.is_normalized(self.form, text) else unicodedata.normalize(self.form, text)


def mended(text: str) -> str:
  """The text with mojibake undone where that is certain; all else as it was."""
  from ftfy import TextFixerConfig, fix_encoding
  from ftfy.badness import is_bad
  if READ_AS_GBK.search(text):
    text = '\n'.join(map(_from_gbk, text.split('\n')))
  if not is_bad(text):
    return text
  config = TextFixerConfig(unescape_html=False, decode_inconsistent_utf8=False)
  # Line by line, as ftfy works: one broken line is no reason to touch the others.
  return '\n'.join(line if line.isascii() else fix_encoding(line, config) for line in text.split('\n'))


def _from_gbk(line):
  """What a line was if it is Chinese UTF-8 that somebody read as GBK: its bytes make Chinese in UTF-8 too."""
  if not READ_AS_GBK.search(line) or sum(not character.isascii() for character in line) < PROOF:
    return line
  try:
    found = line.encode('gb18030').decode()
  except UnicodeError:
    return line
  return found if all(c.isascii() or CHINESE.match(c) for c in found) else line
