"""``shmcache-cleanup``: ``__main__`` asks and acts, ``plan`` says what would be done to each arena, and why."""
