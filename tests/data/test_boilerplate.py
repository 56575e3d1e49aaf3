import pytest

from lmlib.data.boilerplate import KINDS, Boilerplate
from lmlib.data.cleaning import Rejected
from tests.data.prose import CHINESE, ENGLISH

LINES = {
    'cookies': ['We use cookies to improve your experience.', 'Cookie Policy', '本网站使用Cookie来改善您的体验',
                'ACCEPT ALL COOKIES'],
    'scripts': ['Please enable JavaScript to view this page.', 'JavaScript is disabled in your browser.',
                '请启用 JavaScript 后继续', '您的浏览器版本过低，请升级'],
    'copyright': ['Copyright © 2021 Example Inc.', '© 2019 All Rights Reserved', '版权所有 © 某某公司',
                  '未经授权禁止转载', '(c) 2020'],
    'licence': ['京ICP备12345678号-1', '粤 ICP证 B2-20001234', '沪公网安备 31010502000001号',
                '增值电信业务经营许可证：京B2-2009', '京ICP備05083646號'],
    'placeholder': ['Lorem ipsum dolor sit amet, consectetur adipiscing elit.'],
    'policies': ['Terms of Use', 'Privacy Policy.', '隐私政策', '免责声明：'],
    'navigation': ['Home | About | Contact', '首页 > 新闻 > 产品', 'Skip to content', '上一篇', '« Previous | Next »',
                   '登录 注册',
                   '返回顶部', 'Home\tNews\tBlog'],
}
TEXT = ['The cookie jar stood on the shelf, and we baked cookies all day.', '他把曲奇放进罐子里。',
        'News of the war came late.', 'home', 'News', '首页', 'JavaScript was designed in ten days.',
        'He contacted us about the copyright of the book.',
        '许可证的问题我们以后再谈。', 'We spoke of the terms of the treaty and of privacy.', '', '   ', '---', 'x > y',
        '公司的产品很多，价格也不贵。', 'about | around']


@pytest.mark.parametrize(('kind', 'line'), [(kind, line) for kind, lines in LINES.items() for line in lines])
def test_boilerplate_goes_and_the_rest_stays_to_the_byte(kind, line):
  assert Boilerplate().kind(line) == kind
  text = f'{ENGLISH}\n  {line} \n\n{CHINESE}\n'
  assert Boilerplate()(text) == f'{ENGLISH}\n\n{CHINESE}\n'
  others = tuple(other for other in KINDS if other != kind)
  assert Boilerplate(others).kind(line) != kind


@pytest.mark.parametrize('line', TEXT)
def test_text_stays(line):
  assert Boilerplate().kind(line) is None
  text = f'{line}\n{ENGLISH}'
  assert Boilerplate()(text) is text


def test_a_paragraph_that_mentions_cookies_stays():
  line = 'We use cookies. ' * 30
  assert Boilerplate()(line) == line


def test_a_page_of_boilerplate_is_dropped():
  page = '\n'.join([*LINES['cookies'], *LINES['navigation'], 'One line of text.'])
  assert Boilerplate()(page) == 'One line of text.'
  assert Boilerplate().changes(page) == {kind: len(LINES[kind]) for kind in ('cookies', 'navigation')}
  assert Boilerplate(share=0.5)(page) == Rejected('over 50% boilerplate')
  assert Boilerplate(share=0.5)(f'{ENGLISH}\n{LINES["policies"][0]}') == ENGLISH


def test_settings_are_checked():
  with pytest.raises(ValueError, match="'adverts'"):
    Boilerplate(('adverts',))
  with pytest.raises(ValueError, match=r'kinds=\(\)'):
    Boilerplate(())
  with pytest.raises(ValueError, match='share=7'):
    Boilerplate(share=7)
