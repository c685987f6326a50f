"""Programs for people around ``shmcache``: ``shmcache-stat``, ``shmcache-cleanup`` and the demo.

They use the public API of ``shmcache`` only, so each is also an example of it.
"""
