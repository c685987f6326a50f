"""shmcache in inference engines: each package here speaks one engine's language, and imports that engine where it
must."""
