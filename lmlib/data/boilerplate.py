"""Lines of web pages that are no text: cookie notices, navigation, footers, licence numbers, placeholders.

Differs from C4's rules (quality.Prose), which drop whole pages and every line that is no sentence: here
only lines known to be boilerplate go, in English and Chinese, and the rest stays to the byte.
"""
from collections import Counter
import dataclasses
import functools
import re
from typing import ClassVar

from lmlib.data.cleaning import Rejected

LONGEST = 300  # characters of a line that may be boilerplate: a longer one is a paragraph that mentions such words
PARTS = re.compile('[|<>«»‹›·•/\t\u3000]+|  +')
# By kind: words of which a line holds one, in lower case, if the pattern beside them can match it.
PHRASES = {
    'cookies': (('cookie',), r'(?:uses?|using|use of|accept|accept all|manage|store) cookies|'
                r'consent to .{0,30}cookies|cookie (?:policy|notice|settings|preferences|consent)|'
                r'(?:使用|接受|启用|啟用|同意).{0,8}cookie|cookie.{0,4}(?:政策|设置|設定|声明)'),
    'scripts': (('javascript', '浏览器'), r'(?:enable|requires?|turn on|without|activate|disabled?) javascript|'
                r'javascript (?:is|must be|to be|seems to be|has been) (?:disabled|enabled|required|turned)|'
                r'(?:启用|開啟|开启|打开|啟用|禁用).{0,8}javascript|javascript.{0,6}(?:未启用|被禁用|已停用)|'
                r'浏览器(?:版本过低|不支持)'),
    'copyright': (('rights reserved', '©', '(c)', 'copyright', '版权所有', '版權所有', '保留', '著作權', '未经'),
                  r'all rights reserved|(?:©|\(c\)|copyright|&copy;)\s*(?:©|\(c\)|&copy;)?\s*(?:19|20)\d\d|'
                  r'版权所有|版權所有|保留所有权利|保留一切权利|著作權所有|'
                  r'未经(?:授权|许可|允许).{0,12}(?:转载|复制|镜像)'),
    'licence': (('icp', '公网安备', '许可证'),
                r'[京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼]\s*icp\s*[备備证證]|'
                r'icp\s*(?:备|備|证|證)|公网安备|增值电信业务经营许可证|网络文化经营许可证|'
                r'信息网络传播视听节目许可证|互联网新闻信息服务许可证'),
    'placeholder': (('lorem', 'dolor', 'consectetur'), r'lorem ipsum|dolor sit amet|consectetur adipi[sc]+ing'),
    'policies': (('terms', 'privacy', '条款', '政策', '声明', '聲明'),
                 r'^(?:terms (?:of|and) (?:use|service|conditions)|privacy (?:policy|notice)|使用条款|服务条款|'
                 r'隐私政策|隱私權?政策|免责声明|免責聲明|法律声明)\W*$'),
}
NAVIGATION = 'navigation'
KINDS = (*PHRASES, NAVIGATION)
# Boilerplate where one of these is a whole line.
LINES = frozenset("""skip to content|skip to main content|back to top|read more|read more...|share this|leave a comment
click here|loading...|toggle navigation|log in|sign in|sign up|sitemap|site map|follow us|view all|show more|load more
返回顶部|返回首页|上一页|下一页|上一篇|下一篇|更多>>|查看更多|点击查看更多|阅读全文|展开全文|加入收藏|设为首页|网站地图|網站地圖
分享到|发表评论|友情链接|意见反馈|加载中|加载中...|联系我们|聯絡我們""".replace('\n', '|').split('|'))
# And where two of these, or of those, are all that a line holds.
ITEMS = LINES | frozenset("""home|menu|search|login|register|logout|contact|contact us|about|about us|help|faq|next
previous|prev|back|top|more|share|tweet|like|print|email|comments|reply|subscribe|newsletter|rss|advertisement|close
submit|loading|products|services|news|blog|careers|privacy|privacy policy|terms|terms of use|terms of service|support
cookie policy|shop|首页|首頁|主页|菜单|搜索|登录|登錄|登入|注册|註冊|退出|关于我们|關於我們|帮助|帮助中心|返回|更多|分享
收藏|打印|评论|举报|广告|关闭|提交|当前位置|产品|产品中心|新闻|新闻中心|服务条款|隐私政策|使用条款|免责声明|人才招聘
诚聘英才|客服中心|手机版|微信|微博|公司简介|在线留言|招聘信息|解决方案""".replace('\n', '|').split('|'))


@dataclasses.dataclass(frozen=True)
class Boilerplate:
  """Removes the lines that are boilerplate of these kinds, and drops a text that is made of them."""
  kinds: tuple[str, ...] = KINDS
  share: float | None = None  # most characters in such lines; a text with more is dropped
  version: ClassVar = 1

  def __post_init__(self):
    if not self.kinds or not set(self.kinds) <= set(KINDS):
      raise ValueError(f'Boilerplate.kinds={self.kinds} must be some of {KINDS}')
    if self.share is not None and not 0 <= self.share <= 1:
      raise ValueError(f'Boilerplate.share={self.share} must lie between 0 and 1; None turns it off')

  @property
  def name(self) -> str:
    return 'boilerplate'

  def __call__(self, text: str) -> str | Rejected:
    lines, low = text.split('\n'), text.lower()
    # A hint that is nowhere in the text is in none of its lines: most texts need no pattern.
    hints = {kind: present for kind in self.kinds if kind in PHRASES
             if (present := tuple(hint for hint in PHRASES[kind][0] if hint in low))}
    kept = [line for line, lowered in zip(lines, low.split('\n')) if not self._kind(lowered, hints)]
    if len(kept) == len(lines):
      return text
    result = '\n'.join(kept)
    if self.share is not None and len(text) - len(result) > self.share * len(text):
      return Rejected(f'over {self.share:.0%} boilerplate')
    return result

  def changes(self, text: str) -> Counter:
    """How many lines of each kind go."""
    return Counter(filter(None, map(self.kind, text.split('\n'))))

  def kind(self, line: str) -> str | None:
    """What kind of boilerplate a line is; None if it is text."""
    return self._kind(line.lower(), {kind: PHRASES[kind][0] for kind in self.kinds if kind in PHRASES})

  def _kind(self, line, hints):
    if len(line) > LONGEST:
      return None
    for kind, present in hints.items():
      if any(hint in line for hint in present) and pattern(kind).search(line.strip()):
        return kind
    return NAVIGATION if NAVIGATION in self.kinds and is_menu(line) else None


def is_menu(line: str) -> bool:
  """Whether a line, in lower case, is nothing but the words of a menu, parted by bars, arrows or wide spaces."""
  line = line.strip()
  if line in LINES:
    return True
  parts = PARTS.split(line)
  parts = list(filter(None, (part.strip(' :：') for part in parts))) if len(parts) > 1 else line.split(' ')
  return len(parts) > 1 and all(map(ITEMS.__contains__, parts))


@functools.cache
def pattern(kind: str) -> re.Pattern:
  return re.compile(PHRASES[kind][1])
