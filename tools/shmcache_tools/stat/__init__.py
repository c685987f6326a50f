"""``shmcache-stat``: what arenas hold, who holds it, and how it goes.

``__main__`` has the options and chooses a view (``views``), which is drawn once, as JSON (``documents``), as a picture
(``map_plot``), again and again (``watch/``), or served to Prometheus (``serve``). The views: ``render`` (the table of
arenas, one in full), ``shares_view``, ``map_view``; below them what they are drawn with.
"""
