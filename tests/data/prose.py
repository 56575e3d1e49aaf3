"""Prose to clean, in English and Chinese, written for the tests."""
ENGLISH = """The river was low that summer, and the boys of the village spent their days on the stones below the bridge.
Nobody had told them to stay away from the old mill, but they knew that it was not a place to be after dark.
One evening the miller's daughter came down to the water with a lantern and a basket of bread, and sat with them
until the moon rose over the hills. She said that the wheel had turned by itself in the night, and that her father
would not speak of it. The oldest of the boys, who feared nothing, proposed that they should go and look at once.
They went up the path in a line, holding on to one another, and they did not laugh any more."""
CHINESE = """那年夏天河水很浅，村里的孩子们整天都在桥下的石头上玩耍。没有人告诉他们不要靠近那座旧磨坊，
但是他们知道天黑以后不该去那里。
一天傍晚，磨坊主的女儿提着灯笼和一篮面包来到河边，和他们坐在一起，直到月亮从山后升起来。她说水轮在夜里自己转动了，
而她的父亲不愿意谈这件事。年纪最大的孩子什么也不怕，他提议大家马上去看一看。于是他们排成一队，手拉着手沿着小路往上走，
谁也不再笑了。磨坊的门半开着，里面传来流水的声音，灯光照在墙上，影子像一只巨大的鸟。"""
